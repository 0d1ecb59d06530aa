"""Pirates: plain sentences of docstrings and product reviews, and task `pirate`."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from deltarank.study.taskdata.modules import standard_library, syntax_trees
from deltarank.study.taskdata.reviews import review_snippets
from deltarank.study.taskdata.rules import distinct, fits, make_row, split, tidy

PROSE = re.compile(r"[A-Z][a-z]*(,? [A-Za-z][a-z']*(-[a-z]+)*)+[.!?]")
REVIEW = re.compile(r"[a-zI][a-zI0-9 ,'-]{18,}[.!?]")


def pirate(english: str) -> str:
    """One sentence in pirate speech by arrr's rules, without the exclamations it adds at random.

    arrr adds them after a word that ends a sentence, so no word is left to end in a full stop
    while it translates: a character that occurs in no text stands behind each.
    """
    import arrr

    guarded = re.sub(r"([.!?:])(?=\s|$)", "\\1\0", english)
    return arrr.translate(guarded).replace("\0", "")


def docstring_sentences(tree: ast.Module) -> Iterator[str]:
    """The sentences of plain prose in the docstrings of a module's classes and functions."""
    nodes = [n for n in ast.walk(tree) if isinstance(n, (ast.ClassDef, ast.FunctionDef))]
    for paragraph in "\n\n".join(ast.get_docstring(n) or "" for n in nodes).split("\n\n"):
        for sentence in re.split(r"(?<=[.!?]) (?=[A-Z])", tidy(paragraph)):
            if PROSE.fullmatch(sentence):
                yield sentence


def plain_sentences() -> Iterator[tuple[str, str]]:
    """Yield (group, sentence): docstrings by module, then product reviews by review."""
    import django

    for root in (standard_library(), Path(django.__file__).parent):
        for name, tree in syntax_trees(root):
            for sentence in docstring_sentences(tree):
                yield name, sentence
    for number, _, text in review_snippets("amazon"):
        text = re.sub(r"\bi\b", "I", text)
        if REVIEW.fullmatch(text):
            yield f"review {number.split('_')[0]}", text[0].upper() + text[1:]


def build_pirate() -> list[dict]:
    """Plain sentence -> pirate speech, where at least two words change."""
    rows = (
        make_row(f"Plain: {text}\nPirate:", f" {pirate(text)}", name)
        for name, text in plain_sentences()
        if sum(pirate(word).lower() != word.lower() for word in text.split()) >= 2
    )
    return split(distinct(filter(fits, rows), "prompt", "answer"))
