"""Modules: the parsed sources of installed Python packages, and tasks `code` and `naming`."""

from __future__ import annotations

import ast
import re
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path

from deltarank.study.taskdata.rules import (
    distinct,
    fits,
    letters,
    make_row,
    n_tokens,
    split,
    tidy,
)

SKIPPED = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "encodings", "site-packages"}
PACKAGE = "tkinter"  # one code base with a style of its own


def standard_library() -> Path:
    """The folder of the running Python's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def syntax_trees(root: Path) -> Iterator[tuple[str, ast.Module]]:
    """Yield (module name, syntax tree) of every module under `root`, tests aside."""
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if not SKIPPED & set(parts) and not parts[0].startswith("_sysconfigdata"):
            yield ".".join(parts), ast.parse(path.read_text("utf-8"))


def next_lines(function: ast.FunctionDef) -> Iterator[dict]:
    """The rows of a function: up to three lines of it, and the line that follows.

    Only lines of 4 to 20 tokens are answers.
    """
    if ast.get_docstring(function):
        function.body = function.body[1:] or [ast.Pass()]
    lines = ast.unparse(function).splitlines()
    for i in range(1, len(lines)):
        start = textwrap.dedent("\n".join(lines[max(0, i - 3) : i]))
        row = make_row(f"Python:\n{start}\nNext line:\n", lines[i].strip())
        if 4 <= n_tokens(row["answer"]) <= 20 and fits(row) and start.isascii():
            yield row


def build_code() -> list[dict]:
    """The start of a function of PACKAGE -> its next line; a group is a function."""
    rows = []
    for name, tree in syntax_trees(standard_library()):
        if name.split(".")[0] == PACKAGE:
            functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
            for number, function in enumerate(functions):
                rows += [r | {"group": f"{name} {number:04}"} for r in next_lines(function)]
    return split(distinct(rows, "prompt", "answer"))


def named_functions(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield (docstring's first sentence, name) of the public functions of a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            said = tidy((ast.get_docstring(node) or "").split("\n\n")[0])
            sentence = re.match(r"[A-Z][^.]{15,}\.", said)
            if sentence and letters(node.name) not in letters(sentence[0]):
                yield sentence[0], node.name


def build_naming() -> list[dict]:
    """What a function of the standard library does -> its name, which is not in the sentence.

    A group is a module.
    """
    rows = (
        make_row(f"Docstring: {sentence}\nFunction:", f" {name}", module)
        for module, tree in syntax_trees(standard_library())
        for sentence, name in named_functions(tree)
    )
    return split(distinct(filter(fits, rows), "prompt"))
