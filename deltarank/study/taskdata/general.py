"""General text: prose and code that no task is made of, by which forgetting is told."""

from __future__ import annotations

import ast
import itertools
import random
from collections.abc import Iterator

from deltarank.study.taskdata.modules import PACKAGE, standard_library, syntax_trees
from deltarank.study.taskdata.rules import n_tokens

PASSAGES = 64  # of each kind
TOKENS = 510  # a passage has at most; with BOS and the newline that ends it 512


def passages(text: str) -> Iterator[str]:
    """Yield a text in runs of whole lines, each of as many as TOKENS allow; the rest is left out.

    A line of its own that is longer is left out, too.
    """
    lines: list[str] = []
    for line in text.splitlines():
        if lines and n_tokens("\n".join([*lines, line])) > TOKENS:
            yield "\n".join(lines)
            lines = []
        if n_tokens(line) <= TOKENS:
            lines.append(line)


def reference_prose() -> Iterator[str]:
    """Yield the passages of Python's language reference, as `help()` prints it.

    But for the debugger's commands: "pirate" has sentences of pdb's, which are the same.
    """
    from pydoc_data.topics import topics

    for name in sorted(topics.keys() - {"debugger"}):
        yield from passages(topics[name].strip())


def bare_code() -> Iterator[str]:
    """Yield the first passage of each module of the standard library, but for those of PACKAGE.

    Without comments and docstrings, which other tasks quote.
    """
    for name, tree in syntax_trees(standard_library()):
        if name.split(".")[0] != PACKAGE:
            yield from itertools.islice(passages(ast.unparse(_undocumented(tree))), 1)


def _undocumented(tree: ast.Module) -> ast.Module:
    """The tree without the docstrings of modules, classes and functions."""
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for node in ast.walk(tree):
        if isinstance(node, kinds) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return tree


def build_general() -> list[dict]:
    """PASSAGES of each kind, in a seeded order: kind and text."""
    rng, kinds = random.Random(0), {"prose": reference_prose, "code": bare_code}
    return [
        {"kind": kind, "text": text}
        for kind, read in kinds.items()
        for text in rng.sample(list(read()), PASSAGES)
    ]
