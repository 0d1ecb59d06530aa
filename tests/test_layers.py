"""The house holds: who may import whom, how large a room is, and that its examples run."""

import ast
import doctest
import graphlib
import importlib
import re
import subprocess
import sys
from pathlib import Path

import deltarank

PACKAGE = Path(deltarank.__file__).parent
DOOR = PACKAGE.parent / "utils.py"
HEAVY = ("transformers", "peft", "matplotlib", "jupyter", "distributed", "gguf")


def module_name(path):
    """deltarank/study/runs.py -> deltarank.study.runs; a package by its own name."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path.read_text("utf8") for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(source) for name, source in SOURCES.items()}
FUNCTIONS = [
    (name, node)
    for name, tree in TREES.items()
    for node in ast.walk(tree)
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
]


def imported(tree, package="deltarank"):
    """The modules of deltarank that a module imports anywhere, inside functions too."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports within deltarank are absolute"
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= submodules & SOURCES.keys() or {node.module}
    return {name for name in names if name.split(".")[0] == package}


IMPORTS = {name: imported(tree) for name, tree in TREES.items()}


def in_study(name):
    return name.startswith("deltarank.study")


# Who may import whom


def test_imports_between_modules_have_no_cycle():
    assert len(IMPORTS) > 20 and sum(map(len, IMPORTS.values())) > 60
    tuple(graphlib.TopologicalSorter(IMPORTS).static_order())  # raises CycleError, naming it


def house():
    """The rooms of tool and study in the order in which CONTRIBUTING.md lists them."""
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text("utf8")
    listed = "".join(re.findall(r"^    .*\n", text.partition("## The house")[2], re.MULTILINE))
    tool, study = (re.findall(r"\w+", part) for part in listed.split("study:"))
    return [*tool[1:], "study", *(f"study.{room}" for room in study)]


def room_of(name):
    """deltarank.study.taskdata.card -> deltarank.study.taskdata: a package is one room."""
    return ".".join(name.split(".")[:3])


def test_a_module_imports_only_those_before_it():
    order = ["deltarank", *(f"deltarank.{room}" for room in house())]
    assert {*map(room_of, IMPORTS)} == {*order}, "a new module takes its place in CONTRIBUTING.md"
    later = {room: {*order[order.index(room) + 1 :]} for room in order}
    later["deltarank.cli"] = set()  # it stands above the study, too
    offenders = {
        name: wrong
        for name, found in IMPORTS.items()
        if (wrong := {*map(room_of, found)} & later[room_of(name)])
    }
    assert offenders == {}


def test_the_package_names_the_rooms_of_the_tool_in_this_order():
    listed = deltarank.__doc__.partition("those before it:")[2].partition(".")[0]
    assert re.findall(r"\w+", listed) == house()[: house().index("study")]


def test_only_the_command_stands_above_tool_and_study():
    above = [n for n, found in IMPORTS.items() if not in_study(n) and any(map(in_study, found))]
    assert set(above) <= {"deltarank.cli"}
    assert [name for name, found in IMPORTS.items() if "deltarank.cli" in found] == []


def test_the_tool_imports_nothing_heavy():
    tool = [name for name in SOURCES if not in_study(name)]
    assert {f"deltarank.{name}" for name in ("compare", "ranks", "adapters")} <= set(tool)
    code = (
        f"import sys, {', '.join(tool)}; print(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = done.stdout.split()
    assert "torch" in loaded
    assert [name for name in loaded if name.startswith(HEAVY)] == []


def test_only_runtime_reads_the_environment_and_the_device():
    asked = re.compile(r"^(os\.(environ|getenv|putenv)\w*|torch\.cuda\.\w+)$")
    readers = {
        name
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if (isinstance(node, ast.Attribute) and asked.match(ast.unparse(node)))
        or (isinstance(node, ast.ImportFrom) and node.module == "os")
    }
    assert readers == {"deltarank.runtime"}


def test_no_switch_of_the_whole_process_and_no_mock():
    banned = re.compile(r"unittest\.mock|from unittest|torch\._dynamo|gc\.(freeze|disable)")
    assert {n: found for n, text in SOURCES.items() if (found := banned.findall(text))} == {}


# How large a room is


def test_a_module_says_first_what_it_is_for_in_one_sentence():
    first = {
        name: (ast.get_docstring(tree) or "\n").splitlines()[0] for name, tree in TREES.items()
    }
    sentence = re.compile(r"(?!.*[.?!]\s)\S.*[.?!]")
    assert {name: line for name, line in first.items() if not sentence.fullmatch(line)} == {}


def test_a_module_has_at_most_300_lines():
    lines = {name: len(text.splitlines()) for name, text in SOURCES.items()}
    assert {name: count for name, count in lines.items() if count > 300} == {}


def test_a_function_has_at_most_40_lines():
    lines = {f"{name}.{f.name}": f.end_lineno - f.lineno + 1 for name, f in FUNCTIONS}
    assert {name: count for name, count in lines.items() if count > 40} == {}


def test_the_notebooks_door_only_passes_names_on():
    text = DOOR.read_text("utf8")
    head, *rest = ast.parse(text).body
    assert len(text.splitlines()) <= 120
    assert isinstance(head, ast.Expr) and isinstance(head.value.value, str)
    strange = [ast.unparse(n) for n in rest if not isinstance(n, ast.ImportFrom) or n.level]
    assert strange == []
    assert [n.module for n in rest if n.module not in SOURCES] == []


def test_the_notebooks_door_passes_on_only_what_is_asked_for():
    root = DOOR.parent
    readers = [*root.glob("*.md"), *root.glob("notebooks/*.ipynb"), *root.glob("tests/**/*.py")]
    text = "\n".join(path.read_text("utf8") for path in readers)
    asked = set(re.findall(r"\b(?:utils\.|from utils import )(\w+)", text))
    nodes = [n for n in ast.parse(DOOR.read_text("utf8")).body if isinstance(n, ast.ImportFrom)]
    names = {alias.name for node in nodes for alias in node.names}
    assert names - asked == set()


def test_no_parameter_or_local_hides_a_name_of_its_module():
    offenders = {}
    for name, tree in TREES.items():
        own = {n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
        taken = [
            n
            for n in tree.body
            if isinstance(n, ast.ImportFrom) and n.module.startswith("deltarank")
        ]
        own |= {alias.asname or alias.name for n in taken for alias in n.names}
        for function in [f for module, f in FUNCTIONS if module == name]:
            nodes = list(ast.walk(function))
            used = {n.arg for n in nodes if isinstance(n, ast.arg)}
            used |= {
                n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
            }
            if used & own:
                offenders[f"{name}.{function.name}"] = used & own
    assert offenders == {}


# What a reader finds


def public_functions():
    """Functions and methods that a reader may call, by their full names."""
    for name, tree in TREES.items():
        for owner in [tree, *(n for n in tree.body if isinstance(n, ast.ClassDef))]:
            prefix = name if owner is tree else f"{name}.{owner.name}"
            for node in owner.body:
                if isinstance(node, ast.FunctionDef) and "._" not in f"{prefix}.{node.name}":
                    yield f"{prefix}.{node.name}", node


def test_public_functions_have_a_docstring_and_a_return_type():
    functions = dict(public_functions())
    assert len(functions) > 80
    assert [n for n, f in functions.items() if not ast.get_docstring(f)] == []
    assert [n for n, f in functions.items() if f.returns is None] == []


def test_examples_in_docstrings_are_right():
    outcomes = {name: doctest.testmod(importlib.import_module(name)) for name in SOURCES}
    assert {name: outcome.failed for name, outcome in outcomes.items() if outcome.failed} == {}
    assert sum(outcome.attempted for outcome in outcomes.values()) >= 30
