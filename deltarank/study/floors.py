"""Floors: what a model without the skill reaches by the form of answers, or by copying."""

from __future__ import annotations

import pandas as pd

from deltarank.checks import require
from deltarank.runtime import at_profile
from deltarank.study.gains import Measured, gain_kept
from deltarank.study.plan import floor_configs
from deltarank.study.profiles import profile
from deltarank.study.runs import Result, run
from deltarank.study.search import full_of
from deltarank.study.tasks import load_split


def copied(row: dict) -> str:
    """The input of a rewriting, given back as its answer.

    >>> copied({"prompt": "Modern: Arise, and walk.\\nKing James:", "answer": " Rise, and walk."})
    'Arise, and walk.'
    """
    return row["prompt"].split("\n")[0].split(": ", 1)[1]


def copy_score(task: str, rows: int | None = None) -> float:
    """Mean score of a task's test rows when rewritings give their input back; NaN without any.

    A rewriting has its chrF, another row, where nothing can be given back, 0.  rows: how many
    rewritings, by default as many as the profile's runs generate.
    """
    from sacrebleu import sentence_chrf

    given = load_split(task, "test")[: profile().eval_rows]
    rewritings = [row for row in given if row["metric"] == "chrf"]
    if not rewritings:
        return float("nan")
    others, picked = len(given) - len(rewritings), rewritings[: rows or profile().generate_rows]
    scores = [sentence_chrf(copied(row), [row["answer"].strip()]).score for row in picked]
    return sum(scores) / (len(scores) + others)


def floors(task: str, split: str = "test") -> pd.DataFrame:
    """What of a task needs no skill: loss_nats and score on rows of a split, one line a way.

    base: the untuned model; full and lora: trained on permuted answers, which have the form of
    answers and not their sense (see plan.floor_configs); copy: the input of test rows.
    """
    full, lora = (run(config) for config in floor_configs(task))
    ways = {"base": run(profile().config(task, "base")), "full": full, "lora": lora}
    rows = {name: [result.loss(split), result.score(split)] for name, result in ways.items()}
    rows["copy"] = [float("nan"), copy_score(task)]
    return pd.DataFrame(rows, index=["loss_nats", "score"]).T


def has_floor(task: str) -> bool:
    """Whether LoRA is trained on a task alone, and so on its permuted answers, too."""
    return task in (*profile().lora_tasks, *profile().forecast_tasks)


def skill_kept(value: Measured, full: Result, *, by: str = "loss", split: str = "test") -> Measured:
    """How far `value`, a loss or score or a series of them, goes from the floor to a full run.

    The floor is the best of floors(task): the lowest loss or the highest score without the skill.
    NaN for a task that has none in the full run's profile (has_floor).  by: "loss" or "score".
    """
    with at_profile(full.config.profile):
        if not has_floor(full.config.task):
            return value * float("nan")
        without = floors(full.config.task, split)
    floor = without["loss_nats"].min() if by == "loss" else without["score"].max()
    return gain_kept(value, floor, _measured(full, by, split))


def skill_gain(result: Result, *, by: str = "loss", split: str = "test") -> float:
    """The share of its full fine-tune's gain over the floor that a run reaches on rows of a split.

    The full fine-tune is that of full_of.
    """
    full = run(full_of(result.config))
    return skill_kept(_measured(result, by, split), full, by=by, split=split)


def _measured(result: Result, by: str, split: str) -> float:
    """The loss or the score of a run on a split; ValueError for what is neither."""
    require(by in ("loss", "score"), f"by={by!r} is unknown; choose loss or score")
    return getattr(result, by)(split)
