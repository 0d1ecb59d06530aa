"""Sorting: nouns in a random order, and task `sorting`."""

from __future__ import annotations

import random

from deltarank.study.codes import WORDS
from deltarank.study.taskdata.rules import GENERATED, split_in_turn

LENGTH = 5  # nouns a row


def build_sorting() -> list[dict]:
    """Nouns in a random order -> the same by the alphabet; no set of nouns occurs twice."""
    rng = random.Random(0)
    sets: dict[tuple[str, ...], list[str]] = {}
    while len(sets) < sum(GENERATED.values()):
        words = rng.sample(WORDS, LENGTH)
        sets.setdefault(tuple(sorted(words)), words)
    return split_in_turn(
        (f"Words: {', '.join(words)}\nSorted:", f" {', '.join(a)}") for a, words in sets.items()
    )
