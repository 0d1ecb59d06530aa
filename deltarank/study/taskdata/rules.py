"""Rules that every task obeys: the form of a row, its length, texts that occur once, splits."""

from __future__ import annotations

import html
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from deltarank.checks import require
from deltarank.study.convert import GEMMA
from deltarank.study.models import load_tokenizer

Item = TypeVar("Item")
MAX_TOKENS = 48  # BOS, prompt, answer and newline
GENERATED = {"train": 4000, "valid": 128, "test": 256}  # rows of a task that a rule generates
SHARED = ("facts", "entities", "mix", "production")  # ask again what was trained, on purpose


def tidy(text: str) -> str:
    """One line of text: HTML entities decoded, quotes straight, white space single.

    >>> tidy("He said:  ‘&lt;go&gt;’")
    "He said: '<go>'"
    """
    text = html.unescape(text).translate(str.maketrans("‘’“”", "''\"\""))
    return " ".join(text.replace("''", '"').split())


def letters(text: str) -> str:
    """The text as lower-case words only, to compare texts.

    >>> letters("Arise, take up thy bed!")
    'arise take up thy bed'
    """
    return " ".join(re.findall(r"\w+", text.lower()))


def make_row(prompt: str, answer: str, group: str | int | None = None) -> dict:
    """A row before it has a split; rows of one group never straddle two splits."""
    return {"group": group, "prompt": prompt, "answer": answer}


def n_tokens(text: str) -> int:
    """The number of tokens of a text by the model under study, without BOS."""
    return len(load_tokenizer(GEMMA)(text, add_special_tokens=False)["input_ids"])


def fits(row: dict) -> bool:
    """True if BOS, prompt, answer and the newline that ends it are at most MAX_TOKENS."""
    return 1 + n_tokens(row["prompt"]) + n_tokens(row["answer"] + "\n") <= MAX_TOKENS


def distinct(rows: Iterable[dict], *fields: str) -> Iterator[dict]:
    """The rows none of whose `fields` was seen before, case and punctuation aside.

    >>> [row["prompt"] for row in distinct([{"prompt": "Go!"}, {"prompt": "go"}], "prompt")]
    ['Go!']
    """
    seen: set[tuple[str, str]] = set()
    for row in rows:
        keys = {(field, letters(row[field])) for field in fields}
        if not keys & seen:
            seen |= keys
            yield row


def split(
    rows: Iterable[dict],
    *,
    n_train: int = 2000,
    n_valid: int = 128,
    n_test: int = 256,
    per_group: int | None = None,
) -> list[dict]:
    """Fill test, then valid, then train with whole groups in a seeded order.

    n_train, n_valid, n_test: rows at most; per_group: rows that are drawn of a group at most.
    """
    rng = random.Random(0)
    groups: dict[Any, list[dict]] = defaultdict(list)
    filled: dict[str, list[dict]] = defaultdict(list)
    room = {"test": n_test, "valid": n_valid, "train": n_train}
    for row in rows:
        groups[row["group"]].append(row)
    for group in rng.sample(sorted(groups), len(groups)):
        name = next((s for s in room if len(filled[s]) < room[s]), "train")
        filled[name] += rng.sample(groups[group], min(len(groups[group]), per_group or 10**9))
    picked = {s: rng.sample(filled[s], min(len(filled[s]), room[s])) for s in room}
    return [
        {"split": s, "prompt": r["prompt"], "answer": r["answer"]}
        for s in ("train", "valid", "test")
        for r in picked[s]
    ]


def split_in_turn(rows: Iterable[tuple[str, str]]) -> list[dict]:
    """Rows of these prompts and answers, as many as GENERATED has in all, split in its order."""
    names = [name for name, size in GENERATED.items() for _ in range(size)]
    return [
        {"split": name, "prompt": prompt, "answer": answer}
        for name, (prompt, answer) in zip(names, rows, strict=True)
    ]


def ask_again(known: Sequence[Item], row: Callable[[str, Item, int], dict]) -> list[dict]:
    """Rows that ask what is known: all of it in training, and again where it is held out.

    row(split, item, phrasing) gives one; train rows 3i to 3i + 2 ask item i in phrasings 0 to 2.
    valid repeats a quarter of them, test the others, each in one phrasing of training; paraphrase
    asks those of test in phrasing 3, which is never trained.
    """
    quarter = len(known) // 4
    tested = range(quarter, len(known))
    return [
        *(row("train", item, i) for item in known for i in range(3)),
        *(row("valid", known[i], i % 3) for i in range(quarter)),
        *(row("test", known[i], i % 3) for i in tested),
        *(row("paraphrase", known[i], 3) for i in tested),
    ]


def check_rows(task: str, rows: Sequence[dict]) -> None:
    """Raise ValueError for a row that is too long, has no one-line answer, or was trained on."""
    for row in rows:
        require(fits(row), f"{task}: more than {MAX_TOKENS} tokens: {row}")
        require(
            bool(row["answer"].strip()) and "\n" not in row["answer"],
            f"{task}: the answer is no line of text: {row}",
        )
    trained = {row["prompt"] for row in rows if row["split"] == "train"}
    seen = [row for row in rows if row["split"] != "train" and row["prompt"] in trained]
    require(task in SHARED or not seen, f"{task}: held out, but trained: {seen[:1]}")
