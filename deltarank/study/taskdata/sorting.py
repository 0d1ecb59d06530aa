"""Sorting: nouns in a random order, and task `sorting`."""

from __future__ import annotations

import random

from deltarank.study.codes import WORDS

LENGTH = 5  # nouns a row
SIZES = {"train": 4000, "valid": 128, "test": 256}  # rows


def build_sorting() -> list[dict]:
    """Nouns in a random order -> the same by the alphabet; no set of nouns occurs twice."""
    rng = random.Random(0)
    sets: dict[tuple[str, ...], list[str]] = {}
    while len(sets) < sum(SIZES.values()):
        words = rng.sample(WORDS, LENGTH)
        sets.setdefault(tuple(sorted(words)), words)
    names = [name for name, size in SIZES.items() for _ in range(size)]
    return [
        {"split": s, "prompt": f"Words: {', '.join(words)}\nSorted:", "answer": f" {', '.join(a)}"}
        for s, (a, words) in zip(names, sets.items(), strict=True)
    ]
