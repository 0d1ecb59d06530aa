"""The contest: every method with as many trials, then with several seeds at its best setting."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from deltarank.runtime import ROOT
from deltarank.spectra import rank_measures
from deltarank.study.configs import RunConfig
from deltarank.study.floors import skill_gain
from deltarank.study.gains import gain
from deltarank.study.overlaps import mean_overlap
from deltarank.study.profiles import profile
from deltarank.study.runs import Result, run
from deltarank.study.search import tuned
from deltarank.study.sizes import trained_parameters
from deltarank.study.tables import step_costs
from deltarank.study.trials import METHODS, chosen, trials

AGAIN = "LoRA again"  # with other seeds: what two of the same method differ by
MORE = "LoRA, more trials"  # at the report's finer rates, of six tasks at the better of two alphas
APART = 100  # which these seeds lie from the first: the next seeds would share epochs with them
# What is still to be run of a contest: its other methods stand already.
TO_COME: dict[tuple[str, int], tuple[str, ...]] = {}
METHOD_TIMES = ROOT / "data" / "bench_variants.csv"  # what a step of each method costs, and size


def contestants(task: str, size: int) -> list[str]:
    """The methods of a contest that have its size, full fine-tuning first; not TO_COME."""
    out = TO_COME.get((task, size), ())
    return [name for name, method in METHODS.items() if size in method.fields and name not in out]


def trials_table() -> pd.DataFrame:
    """One line a trial of the profile's contests, in the order of trying; runs what is not stored.

    Columns: task, size, method, trial from 1, parameters (trained ones), lr, knob (of the method,
    if any), status; gain: the share of the skill gain in the loss of the rows that choose
    ("valid"), 0 where a run diverged or ended above the floor, so that neither is worth more than
    the other.
    """
    return pd.DataFrame(
        {"task": task, "size": size, "method": name, "trial": trial} | _line(name, result, "valid")
        for task, size in profile().contests
        for name in contestants(task, size)
        for trial, result in enumerate(trials(task, name, size), start=1)
    )


def tuning_curves(table: pd.DataFrame) -> pd.DataFrame:
    """How far each method is after k trials, a line (task, size, method, k), from a trials_table.

    so_far: the best gain of the first k, in the order of trying; expected: the mean best of k drawn
    from all of them (expected_best).
    """
    found = {}
    for key, gains in table.groupby(["task", "size", "method"], sort=False)["gain"]:
        curve = {"so_far": gains.cummax().to_numpy(), "expected": expected_best([*gains])}
        found[key] = pd.DataFrame(curve, range(1, len(gains) + 1))
    return pd.concat(found, names=["task", "size", "method", "k"])


def expected_best(values: Sequence[float]) -> np.ndarray:
    """The mean of the best of k of n values, drawn with replacement, for k = 1 ... n; (n,).

    With the i-th lowest value v_i it is sum_i v_i ((i / n)^k - ((i - 1) / n)^k) (Dodge et al. 2019,
    arXiv 1909.03004).

    >>> expected_best([0.0, 1.0])
    array([0.5 , 0.75])
    """
    n = len(values)
    below = np.arange(n + 1) / n  # chances that a draw is no better than the i-th lowest
    powers = below[:, None] ** np.arange(1, n + 1)  # (n + 1, n)
    return np.sort(np.asarray(values, float)) @ np.diff(powers, axis=0)


def finals_table() -> pd.DataFrame:
    """One line a seed of each method at its best setting; runs what is not stored.

    Columns: as of trials_table, with seed, on test rows; loss_gain, the share of full fine-tuning's
    by which predictions 27 to 29 judge, and score (both NaN where a run diverged).  LoRA comes
    twice more: as AGAIN, at the same setting with as many seeds, APART from the profile's, and by
    the same full runs; and as MORE, tuned as elsewhere in the report.
    """
    lines = []
    for task, size in profile().contests:
        for name, configs in _final_configs(task, size).items():
            for seed, config in zip(profile().seeds, configs, strict=True):
                own = dataclasses.replace(config, seed=seed)
                result = dataclasses.replace(run(config), config=own)  # by this seed's full run
                line = {"task": task, "size": size, "method": name, "seed": config.seed}
                line |= _line(name if name in METHODS else "LoRA", result, "test")
                lines.append(line | {"loss_gain": gain(result), "score": result.score()})
    return pd.DataFrame(lines)


def _final_configs(task: str, size: int) -> dict[str, list[RunConfig]]:
    """Of each method in a contest the runs of all seeds by which it is judged."""
    seeds = profile().seeds
    tried = {name: trials(task, name, size) for name in contestants(task, size)}
    found = {
        name: [chosen(results, seed=seed) for seed in seeds] for name, results in tried.items()
    }
    found[AGAIN] = [chosen(tried["LoRA"], seed=seed + APART) for seed in seeds]
    return found | {MORE: [tuned(task, "lora", rank=size, seed=seed) for seed in seeds]}


def updates_table() -> pd.DataFrame:
    """What a method's update is at its best setting, first seed: a line (task, size, method).

    Columns: r90 and stable_rank, medians over the matrices; full and LoRA: the mean_overlap of
    rank 1 with that method's update, of a method with itself that of two seeds, APART.
    """
    lines, seed = {}, profile().seeds[0]
    for task, size in profile().contests:
        names = contestants(task, size)
        best = {name: chosen(trials(task, name, size), seed=seed) for name in names}
        for name, config in best.items():
            ranks = pd.DataFrame(rank_measures(S) for S in run(config).spectra.values()).median()
            line = dict(ranks[["r90", "stable_rank"]])
            for other in ("full", "LoRA"):
                apart = seed + APART * (other == name)
                line[other] = mean_overlap(config, dataclasses.replace(best[other], seed=apart))[1]
            lines[task, size, name] = line
    return pd.DataFrame(lines).T.rename_axis(["task", "size", "method"])


def method_costs() -> pd.DataFrame:
    """What a training step costs beside LoRA's of the size, a line (size, method)."""
    return step_costs(METHOD_TIMES, ["size", "method"], "LoRA")


def _line(method: str, result: Result, split: str) -> dict[str, Any]:
    """What a run of a method was told, and what it has of the skill."""
    knob, finished = METHODS[method].knob, result.status == "finished"
    return {
        "parameters": trained_parameters(result.config),
        "lr": result.config.lr,
        "knob": float(getattr(result.config, knob)) if knob else float("nan"),
        "status": result.status,
        "gain": max(skill_gain(result, split=split), 0.0) if finished else 0.0,
    }
