"""Dates: days written as people write them in five languages, and task `dates`."""

from __future__ import annotations

import random
from datetime import date, timedelta

from deltarank.study.taskdata.rules import distinct, fits, make_row, split

LANGUAGES = ("en", "de", "es", "fr", "it")
FIRST, DAYS = date(1900, 1, 1), 80_000  # to 2119
COUNT = 2600  # drawn, a few of them more than are split


def build_dates() -> list[dict]:
    """A day in words, with its weekday -> the day by ISO 8601; a group is a day."""
    from babel.dates import format_date

    rng, rows = random.Random(0), []
    for number in rng.sample(range(DAYS), COUNT):
        day = FIRST + timedelta(days=number)
        text = format_date(day, "full", locale=rng.choice(LANGUAGES))
        rows.append(make_row(f"Date: {text}\nISO:", f" {day.isoformat()}", number))
    return split(distinct(filter(fits, rows), "prompt"))
