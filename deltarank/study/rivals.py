"""Rivals: what rules are told of a task, the size that they say it needs, and what that costs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from deltarank.checks import require
from deltarank.study.configs import RunConfig
from deltarank.study.floors import skill_gain
from deltarank.study.forecast import forecast, middle_of, rank_by_rows
from deltarank.study.gains import first_epoch_kbit, taught_kbit
from deltarank.study.gradients import first_gradients
from deltarank.study.profiles import middle, profile
from deltarank.study.runs import run
from deltarank.study.search import tuned
from deltarank.study.sizes import ladder, needed_size, parameters_of, tried_runs
from deltarank.study.tasks import load_split

LEAST_KBIT = 0.001  # of what rows teach: a measure has a logarithm


def probe(task: str) -> RunConfig:
    """The short training that tells a task's bits: LoRA of the middle rank, at the common rate."""
    return profile().config(task, "lora", rank=middle(profile().lora_ranks))


def read_of(tasks: Sequence[str]) -> pd.DataFrame:
    """What each rule reads of a task, a line a task; runs what is not stored, with the first seed.

    bits: taught_kbit of the probe, and LEAST_KBIT at the least; code length: its first_epoch_kbit;
    gradient: the median stable rank of the first gradients; stable rank, n steps: the median of the
    update of full fine-tuning after so many steps, at the common rate, so that none is searched.
    Raises ValueError where the probe diverged.
    """
    rows = {}
    for task in tasks:
        told, full = run(probe(task)), run(profile().config(task))
        require(told.status == "finished", f"{told.config.key} diverged: it tells no bits")
        bits = taught_kbit(told, len(load_split(task, "train")))
        row = {"bits": max(bits, LEAST_KBIT), "code length": first_epoch_kbit(told)}
        first = first_gradients(profile().config(task, "base"))
        row["gradient"] = first["stable_rank"].median()
        for note in full.record["growth"]:
            row[f"stable rank, {note['step']} steps"] = pd.Series(note["stable_rank"]).median()
        rows[task] = row
    return pd.DataFrame(rows).T


def known_sizes(tasks: Sequence[str], share: float) -> pd.Series:
    """What each task needs, as one number of trained parameters: the middle of its bracket."""
    counts = [parameters_of(size) for size in ladder().values()]
    least, most = min(counts), max(counts)
    ends = {task: needed_size(task, share) for task in tasks}
    return pd.Series({t: middle_of(*pair, least=least, most=most) for t, pair in ends.items()})


def forecasts(known: Sequence[str], asked: Sequence[str], share: float) -> pd.DataFrame:
    """What each rule says that tasks need, in trained parameters; a line a task, a column a rule.

    Those that read_of has are fitted to the known tasks, without the one that is asked.  always:
    the middle rank of the profile for every task; by rows: rank_by_rows.
    """
    needed, before, now = known_sizes(known, share), read_of(known), read_of(asked)
    table = pd.DataFrame({name: forecast(before[name], needed, now[name]) for name in before})
    one = parameters_of({"method": "lora", "rank": 1})
    table["always"] = one * middle(profile().lora_ranks)
    table["by rows"] = [one * rank_by_rows(len(load_split(t, "train"))) for t in table.index]
    return table


def followed(task: str, size: float) -> dict[str, float]:
    """What it costs to train an adapter of `size` parameters on a task, told by the sizes tried.

    Returns parameters, the size, but no smaller and no larger than those tried; lost, its held-out
    loss above that of full fine-tuning, in nats a token; and kept, its skill gain.  Both are read
    on straight lines between the sizes of tried_runs that finished, over the logarithm of their
    parameters.  Raises ValueError where none did.
    """
    results = {count: r for count, r in tried_runs(task).items() if r.status == "finished"}
    require(bool(results), f"{task}: every size that was tried diverged")
    logs, at = np.log([*results]), math.log(size)
    losses, gains = zip(*((r.loss(), skill_gain(r)) for r in results.values()), strict=True)
    return {
        "parameters": float(np.clip(size, min(results), max(results))),
        "lost": float(np.interp(at, logs, losses)) - run(tuned(task)).loss(),
        "kept": float(np.interp(at, logs, gains)),
    }


def costs(says: pd.DataFrame) -> pd.DataFrame:
    """`followed` for what every rule says of every task: a line a rule and task.

    says: as forecasts gives it.
    """
    lines = {
        (rule, task): followed(str(task), size)
        for rule, sizes in says.items()
        for task, size in sizes.items()
    }
    return pd.DataFrame(lines).T.rename_axis(["rule", "task"])
