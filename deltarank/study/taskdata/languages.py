"""Languages: interface strings and names with their translations; tasks `sorbian`, `danish`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from deltarank.study.taskdata.rules import distinct, fits, letters, make_row, split, tidy


def interface_strings(language: str) -> Iterator[tuple[str, str]]:
    """Yield (English, translation or "") from Django's .po files: nothing fuzzy, no plurals."""
    import django
    from babel.messages.pofile import read_po

    for path in sorted(Path(django.__file__).parent.rglob(f"{language}/LC_MESSAGES/*.po")):
        with path.open("rb") as file:
            for message in read_po(file):
                text, translation = message.id, message.string
                if isinstance(text, str) and isinstance(translation, str) and not message.fuzzy:
                    yield text, translation


def display_names(language: str) -> Iterator[tuple[str, str]]:
    """Yield (English, translation) of the names of territories, languages and the like."""
    from babel import Locale

    english, other = Locale("en"), Locale(language)
    for kind in ("territories", "languages", "currencies", "scripts"):
        names = getattr(english, kind)
        yield from ((names[k], v) for k, v in sorted(getattr(other, kind).items()) if k in names)


def translations(language: str, name: str) -> list[dict]:
    """English interface string or name -> `language`; no placeholders, nothing left as it is."""
    pairs = [*display_names(language), *interface_strings(language)]
    rows = (
        make_row(f"English: {tidy(text)}\n{name}:", f" {tidy(translation)}", text)
        for text, translation in pairs
        if translation
        and letters(text) != letters(translation)
        and not re.search(r"[%{}<>]", text)
        and len(letters(text)) > 1
    )
    return split(distinct(filter(fits, rows), "prompt", "answer"), n_test=128)


def build_sorbian() -> list[dict]:
    """English -> Upper Sorbian, a language that the base hardly speaks."""
    return translations("hsb", "Upper Sorbian")


def build_danish() -> list[dict]:
    """English -> Danish, a language of more speakers."""
    return translations("da", "Danish")
