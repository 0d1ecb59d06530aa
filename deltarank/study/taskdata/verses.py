"""Verses: two translations of the Bible side by side, and task `kjv`."""

from __future__ import annotations

import re
from collections.abc import Iterator

from deltarank.study.taskdata.rules import distinct, fits, letters, make_row, split, tidy

OVERLAP = (0.2, 0.67)  # the shares of common words between which wordings really differ


def overlap(first: str, second: str) -> float:
    """The share of words that two texts have in common (Jaccard index).

    >>> overlap("Arise, and walk.", "Rise and walk!")
    0.5
    """
    a, b = set(letters(first).split()), set(letters(second).split())
    return len(a & b) / len(a | b)


def verse_pairs() -> Iterator[tuple[int, str, str]]:
    """Yield (chapter id, modern verse, King James verse) without quotation marks."""
    import pythonbible as bible
    from pythonbible.verses import VERSE_IDS

    for verse in VERSE_IDS:
        try:
            modern, old = (
                tidy(bible.get_verse_text(verse, version=version))
                for version in (bible.Version.WORLD_ENGLISH, bible.Version.KING_JAMES)
            )
        except (bible.VersionMissingVerseError, bible.VersionMissingBookError):
            continue  # apocrypha, and verses that one of the two lacks
        words = re.findall(r"\b[a-z]+\b", modern)  # few in a list of names
        if len(words) >= 4 and not re.search(r"[`0-9()]|'\"|'$", modern):
            yield verse // 1000, modern.replace('"', ""), re.sub(r"[\[\]]", "", old)


def build_kjv() -> list[dict]:
    """Modern verse -> King James verse, where the wording really differs; a group is a chapter."""
    low, high = OVERLAP
    rows = (
        make_row(f"Modern: {modern}\nKing James:", f" {old}", chapter)
        for chapter, modern, old in verse_pairs()
        if low < overlap(modern, old) < high
    )
    return split(distinct(filter(fits, rows), "prompt", "answer"), per_group=6)
