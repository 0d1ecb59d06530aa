"""The project's own files: one list of what it needs, notebooks that can be read and moved."""

import ast
import collections
import dis
import json
import re
import statistics
import sys
import tomllib
import types

import yaml

import deltarank
from deltarank.runtime import ROOT

PYPROJECT = (ROOT / "pyproject.toml").read_text("utf8")
PROJECT = tomllib.loads(PYPROJECT)["project"]
LISTS = {"core": PROJECT["dependencies"]} | PROJECT["optional-dependencies"]
NOTEBOOKS = {
    path.name: json.loads(path.read_text("utf8"))
    for path in sorted((ROOT / "notebooks").glob("*.ipynb"))
}

# What the project needs


def packages(*lists):
    """The names of the packages in these lists of pyproject.toml."""
    return [re.match(r"[\w.-]+", line)[0].lower() for name in lists for line in LISTS[name]]


def test_every_package_is_listed_once():
    assert set(LISTS) == {"core", "study", "dev", "browser", "data"}
    names = packages(*LISTS)
    assert len(names) > 30
    assert sorted(names) == sorted(set(names))
    assert [path.name for path in ROOT.glob("requirements*.txt")] == []


def test_the_citation_names_the_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf8"))
    assert cited["version"] == deltarank.__version__


def test_environment_yml_lists_python_pip_and_the_project_only():
    listed = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    names = [re.match(r"\w+", line)[0] for line in listed if isinstance(line, str)]
    assert names == ["python", "pip"]
    others = [line for line in listed if not isinstance(line, str)]
    assert others == [{"pip": ["-e .[study,dev]"]}]


def test_every_package_says_where_it_is_used():
    said = set(re.findall(r'^ *"(.+?)",? +# *\w', PYPROJECT, re.MULTILINE))
    assert [line for lines in LISTS.values() for line in lines if line not in said] == []


def test_every_package_has_a_version_and_none_is_local():
    lines = [line for name in LISTS for line in LISTS[name]]
    assert [line for line in lines if not re.search(r"[=<>~]=?\d", line)] == []
    assert [line for line in LISTS["data"] if "==" not in line] == []  # so that the bytes are fixed
    assert [line for line in lines if re.search(r"[+@/]", line)] == []


def imported(folder, pattern):
    """{package: a file that imports it}, other than Python's own and this project's."""
    found = {}
    for path in sorted((ROOT / folder).glob(pattern)):
        for node in ast.walk(ast.parse(path.read_text("utf8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            found |= {name.split(".")[0].lower().replace("_", "-"): path.name for name in names}
    if "bs4" in found:  # which the package is not called
        found["beautifulsoup4"] = found.pop("bs4")
    known = {"deltarank", *(name.lower().replace("_", "-") for name in sys.stdlib_module_names)}
    return {name: file for name, file in found.items() if name not in known}


def test_what_the_code_imports_is_in_the_list():
    tool, study = imported("deltarank", "*.py"), imported("deltarank/study", "**/*.py")
    site = imported("notebooks/site", "*.py")
    assert {"torch", "safetensors"} <= tool.keys() and {"peft", "joblib"} <= study.keys()
    assert {n: file for n, file in tool.items() if n not in packages("core")} == {}
    lists = packages("core", "study", "data")
    assert {n: file for n, file in study.items() if n not in lists} == {}
    assert "beautifulsoup4" in site and {n: f for n, f in site.items() if n not in lists} == {}


# Notebooks


def is_claims(cell):
    """Whether a cell holds the prose's numbers against what is measured; sites fold it."""
    return "paper-only" in cell["metadata"].get("tags", [])


def code_of(notebook, wanted=lambda cell: True):
    """The sources of a notebook's code cells, as lists of the lines that are not empty."""
    cells = [c for c in notebook["cells"] if c["cell_type"] == "code" and wanted(c)]
    sources = ["".join(cell["source"]) for cell in cells]
    return [[line for line in source.splitlines() if line.strip()] for source in sources]


def mentions(pattern):
    """The lines of code that hold a pattern, by notebook."""
    lines = {
        n: [line for c in code_of(notebook) for line in c] for n, notebook in NOTEBOOKS.items()
    }
    found = {n: [line for line in code if re.search(pattern, line)] for n, code in lines.items()}
    return {name: code for name, code in found.items() if code}


def test_there_are_notebooks_in_the_order_of_their_numbers():
    numbers = [name[:2] for name in NOTEBOOKS]
    assert numbers == sorted(set(numbers)) and numbers[:6] == [f"{i:02d}" for i in range(6)]


def test_a_notebook_writes_what_bears_its_number():
    titles = {name: "".join(book["cells"][0]["source"]) for name, book in NOTEBOOKS.items()}
    written = {name: re.findall(r"`(\d\d)_\*`", title) for name, title in titles.items()}
    assert sum(map(bool, written.values())) > 10
    assert {name: found for name, found in written.items() if set(found) - {name[:2]}} == {}


def without_images(cell):
    """A cell whose images, which are letters at random, are left out."""
    outputs = [
        output | {"data": {k: v for k, v in output["data"].items() if not k.startswith("image/")}}
        if "data" in output
        else output
        for output in cell.get("outputs", [])
    ]
    return cell | {"outputs": outputs}


def test_no_notebook_names_an_absolute_path():
    start = r"(?:(?<![\w./:<])/(?:home|root|work|tmp|Users|usr|opt|mnt|var)/|\b[A-Z]:\\\\)"
    texts = {n: json.dumps([*map(without_images, b["cells"])]) for n, b in NOTEBOOKS.items()}
    found = {name: re.findall(start + ".{,40}", text) for name, text in texts.items()}
    assert {name: paths for name, paths in found.items() if paths} == {}


def test_every_notebook_is_under_one_megabyte():
    sizes = {name: (ROOT / "notebooks" / name).stat().st_size for name in NOTEBOOKS}
    assert {name: size for name, size in sizes.items() if size >= 1e6} == {}


def test_every_notebook_is_committed_as_it_ran():
    counts = {
        name: [c["execution_count"] for c in notebook["cells"] if c["cell_type"] == "code"]
        for name, notebook in NOTEBOOKS.items()
    }
    assert [n for n, found in counts.items() if found != list(range(1, len(found) + 1))] == []


def test_every_figure_of_a_notebook_is_saved_and_said_in_words():
    cells = [cell for book in NOTEBOOKS.values() for cell in book["cells"]]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    shown = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(shown) > 20
    silent = [output for output in shown if "alt" not in output["metadata"]["image/png"]]
    assert [output["data"]["text/plain"] for output in silent] == []


def test_no_notebook_holds_a_widget():
    found = [
        name
        for name, notebook in NOTEBOOKS.items()
        for cell in notebook["cells"]
        for output in cell.get("outputs", [])
        if "widget" in " ".join(output.get("data", {}))
    ]
    assert found == [] and [n for n in NOTEBOOKS if "widgets" in NOTEBOOKS[n]["metadata"]] == []


def test_a_cell_of_code_has_at_most_25_lines():
    longest = {name: max(map(len, code_of(notebook))) for name, notebook in NOTEBOOKS.items()}
    assert {name: lines for name, lines in longest.items() if lines > 25} == {}


def test_no_four_cells_of_code_follow_each_other_without_a_word():
    kinds = {n: "".join(c["cell_type"][0] for c in book["cells"]) for n, book in NOTEBOOKS.items()}
    assert [name for name, cells in kinds.items() if "cccc" in cells] == []


def names_of(code):
    """The names that compiled code takes from elsewhere, and those that it binds."""
    taken, bound = set(), set()
    for step in dis.get_instructions(code):
        if step.opname == "STORE_NAME":
            bound.add(step.argval)
        elif step.opname in ("LOAD_NAME", "LOAD_GLOBAL"):
            taken |= {step.argval} - bound
        elif isinstance(step.argval, types.CodeType):  # of a function, a comprehension
            taken |= names_of(step.argval)[0] - bound
    return taken, bound


def unclear_names(cells):
    """The names that a cell takes and two cells bind: what it finds hangs on the order."""
    found = [names_of(compile("\n".join(lines), "cell", "exec")) for lines in cells]
    writers = collections.Counter(name for _, bound in found for name in bound)
    return {name for taken, _ in found for name in taken if writers[name] > 1}


def test_cells_can_be_changed_and_run_again_in_any_order():
    for again in ("x = 2 * x", "x = [x for _ in x]", "def f():\n    return x\nx = 2"):
        assert unclear_names([["x = 1"], again.split("\n")]) == {"x"}
    assert unclear_names([["x = 1", "y = 2 * x"], ["x = 2", "print(x, y)"]]) == set()
    found = {name: unclear_names(code_of(notebook)) for name, notebook in NOTEBOOKS.items()}
    assert {name: names for name, names in found.items() if names} == {}


def uneven_rows(text):
    """The lines of tables in Markdown with more or fewer cells than their heading."""
    tables = re.findall(r"(?:^\|.*\n?){2,}", text, re.MULTILINE)
    rows = [(table.splitlines()[0], row) for table in tables for row in table.splitlines()]
    return [row for head, row in rows if cells(row) != cells(head)]


def cells(row):
    """How many bars a line has; those in code and in mathematics are none, nor are escaped ones."""
    return re.sub(r"`[^`]*`|\$[^$]*\$|\\\|", "", row).count("|")


def prose():
    """The text of every cell of Markdown, and of every file of it."""
    books = [cell for notebook in NOTEBOOKS.values() for cell in notebook["cells"]]
    cells = ["".join(cell["source"]) for cell in books if cell["cell_type"] == "markdown"]
    files = [*ROOT.glob("*.md"), *ROOT.glob("*/README.md")]
    return cells + [path.read_text("utf8") for path in files]


def test_every_row_of_a_table_has_the_cells_of_its_heading():
    assert uneven_rows("| a | b |\n|---|---|\n| 1 | `|` |\n| 1 2 |\n") == ["| 1 2 |"]
    assert [row for text in prose() for row in uneven_rows(text)] == []


def test_a_link_names_a_notebook_by_its_number():
    link = r"\[(?:[Nn]otebook\s+)?(\d+)\b[^]]*\]\((?:notebooks/)?(\d\d)_"
    found = {numbers for text in prose() for numbers in re.findall(link, text)}
    assert len(found) > 10
    assert [pair for pair in found if int(pair[0]) != int(pair[1])] == []


def test_no_notebook_touches_the_path_or_the_environment():
    assert mentions(r"\bsys\.path\b") == {}
    assert mentions(r"\bos\.(environ|getenv|putenv)\b") == {}


def test_the_notebooks_are_short():
    books = NOTEBOOKS.values()
    claims = sum(len(cell) for notebook in books for cell in code_of(notebook, is_claims))
    cells = [len(cell) for notebook in books for cell in code_of(notebook)]
    assert sum(cells) - claims <= 120 * len(NOTEBOOKS)  # what a reader has before him
    assert claims <= 80 * len(NOTEBOOKS)
    assert statistics.median(cells) <= 8


def test_a_line_of_code_comes_with_eight_words():
    ratios = {}
    for name, notebook in NOTEBOOKS.items():
        prose = [c for c in notebook["cells"] if c["cell_type"] == "markdown"]
        words = sum(len("".join(cell["source"]).split()) for cell in prose)
        ratios[name] = round(words / sum(map(len, code_of(notebook))), 1)
    assert {name: ratio for name, ratio in ratios.items() if ratio < 8} == {}
