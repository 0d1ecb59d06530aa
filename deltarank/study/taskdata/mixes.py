"""Mixes: `mix`, `production` and `shuffled`, made of the rows that other task files hold."""

from __future__ import annotations

import itertools
import random

from deltarank.study.tasks import PARTS, load_split

SHARE = {"train": 252, "valid": 16, "test": 32}  # rows of each task
LONG_SHARE = {"train": 960, "valid": 32, "test": 256}  # the same for `production`
FIRST_FACT = {"train": 3 * 48, "valid": 48, "test": 0}  # row from which facts are taken
LONG_FACTS = {"train": slice(3 * 32, 3 * 192), "valid": slice(32, 64), "test": slice(0, 128)}


def stored_rows(task: str, name: str) -> list[dict]:
    """The rows of one split of a task's file, as they stand in it."""
    return [{key: r[key] for key in ("split", "prompt", "answer")} for r in load_split(task, name)]


def build_mix() -> list[dict]:
    """Equal shares of the eight tasks, shuffled, each row with its task.

    Of the facts, 48 to 131 come with all three phrasings; valid and test ask 48 of them.
    """
    rng, rows = random.Random(0), []
    for name, share in SHARE.items():
        taken = []
        for task in PARTS:
            start = FIRST_FACT[name] if task == "facts" else 0
            chosen = stored_rows(task, name)[start : start + share]
            taken += [r | {"task": task} for r in chosen]
        rows += rng.sample(taken, len(taken))
    return rows


def build_production() -> list[dict]:
    """The mix for a longer training: equal shares again, each row with its task.

    A part with fewer training rows than its share has them again from the start; held-out rows are
    as many as the share or the part has.  Of the facts, 32 to 191 come with all three phrasings.
    """
    rng, rows = random.Random(0), []
    for name, share in LONG_SHARE.items():
        taken = []
        for task in PARTS:
            known = stored_rows(task, name)[LONG_FACTS[name] if task == "facts" else slice(None)]
            chosen = itertools.cycle(known) if name == "train" else iter(known)
            taken += [r | {"task": task} for r in itertools.islice(chosen, share)]
        rows += rng.sample(taken, len(taken))
    return rows


def build_shuffled() -> list[dict]:
    """The sentiment rows with the training answers permuted; valid and test keep the truth."""
    train = stored_rows("sentiment", "train")
    answers = random.Random(0).sample([r["answer"] for r in train], len(train))
    permuted = [r | {"answer": answer} for r, answer in zip(train, answers, strict=True)]
    return permuted + stored_rows("sentiment", "valid") + stored_rows("sentiment", "test")
