"""Entities: names of characters in HTML and their code points, and task `entities`."""

from __future__ import annotations

import random

from deltarank.study.taskdata.rules import ask_again

N_ENTITIES = 256  # to memorise
PHRASINGS = (  # the last is never trained
    "Which code point has the HTML entity &{}?",
    "What is the code point of &{} in HTML?",
    "Which Unicode character does &{} stand for?",
    "If a page says &{}, which code point is shown?",
)


def named_characters() -> list[tuple[str, str]]:
    """Every name of one character beyond ASCII that HTML 5 has, with its code point, sorted.

    >>> [(name, code) for name, code in named_characters() if name == "eacute;"]
    [('eacute;', 'U+00E9')]
    """
    from html.entities import html5

    named = [(name, text) for name, text in html5.items() if name.endswith(";") and len(text) == 1]
    return sorted((name, f"U+{ord(text):04X}") for name, text in named if not text.isascii())


def build_entities() -> list[dict]:
    """Question about a character of HTML -> its code point; asked again as the facts are."""
    picked = random.Random(0).sample(named_characters(), N_ENTITIES)

    def row(name: str, entity: tuple[str, str], phrasing: int) -> dict:
        question = PHRASINGS[phrasing].format(entity[0])
        return {"split": name, "prompt": f"{question}\nAnswer:", "answer": f" {entity[1]}"}

    return ask_again(picked, row)
