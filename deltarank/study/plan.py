"""The plan: every run that the report asks for."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from deltarank.checks import require
from deltarank.study.configs import RunConfig
from deltarank.study.cuts import cut
from deltarank.study.gains import gain_kept
from deltarank.study.profiles import LORA_ALPHA, PROFILES, profile
from deltarank.study.runs import Result, run, sweep


def lr_search(task: str, method: str = "full", *, rank: int = 0) -> list[Result]:
    """The runs that choose a task's learning rate, by ascending rate, all with the first seed.

    In the profile's fine_tasks the coarse search goes on from its best rate in half the steps, by
    finer(rates), for full fine-tuning and LoRA alike.
    """
    found = _coarse_search(task, method, rank)
    if task in profile().fine_tasks:
        rates = finer(_rates(method))
        found |= _climb(_trial(task, method, rank), rates, best_lr([*found.values()]))
    return [found[lr] for lr in sorted(found)]


def _rates(method: str) -> list[float]:
    """The learning rates that the profile has for a method, ascending."""
    return sorted(profile().lora_lrs if method == "lora" else profile().full_lrs)


def _trial(task: str, method: str, rank: int) -> Callable[..., RunConfig]:
    """What makes the configuration of a trial from its learning rate, lr=."""
    recipe: dict = {"rank": rank, "seed": profile().seeds[0]}
    return functools.partial(profile().config, task, method, **recipe)


def _coarse_search(task: str, method: str, rank: int) -> dict[float, Result]:
    """Runs by learning rate: climbs over the profile's rates from their middle."""
    rates = _rates(method)
    return _climb(_trial(task, method, rank), rates, rates[len(rates) // 2])


def _climb(make: Callable[..., RunConfig], rates: list[float], start: float) -> dict:
    """Runs by learning rate, from `start` on: until both neighbours of the best are run.

    Ends where the rates, ascending, have no neighbour.
    """
    found: dict[float, Result] = {}
    best, around = rates.index(start), None
    while best != around:
        around = best
        near = [lr for lr in rates[max(around - 1, 0) : around + 2] if lr not in found]
        found |= {result.config.lr: result for result in sweep([make(lr=lr) for lr in near])}
        best = rates.index(best_lr(list(found.values())))
    return found


def finer(rates: Sequence[float]) -> list[float]:
    """The rates, ascending, and between each two their geometric mean, to two digits.

    >>> finer([1e-4, 3e-4])
    [0.0001, 0.00017, 0.0003]
    """
    between = [float(f"{math.sqrt(a * b):.2g}") for a, b in itertools.pairwise(rates)]
    return sorted([*rates, *between])


def best_lr(results: Sequence[Result]) -> float:
    """The learning rate of the lowest held-out loss (split "valid") among finished runs."""
    finished = [r for r in results if r.status == "finished"]
    names = ", ".join(r.config.key for r in results)
    require(bool(finished), f"every learning rate diverged: {names}; lower the grid")
    return min(finished, key=lambda r: r.loss("valid")).config.lr


def tuned(task: str, method: str = "full", *, rank: int = 0, **changes) -> RunConfig:
    """The configuration at the task's best learning rate; runs what of lr_search is not stored.

    A LoRA whose rank is none of the profile's takes a rate between theirs, by lr_between.
    """
    searched = profile().lora_ranks if method == "lora" else (0,)
    near = {rank} if rank in searched else set(searched)
    best = {r: best_lr(lr_search(task, method, rank=r)) for r in sorted(near)}
    return profile().config(task, method, rank=rank, lr=lr_between(best, rank), **changes)


def lr_between(best: dict[int, float], rank: int) -> float:
    """The learning rate of a rank by those of others, ascending: geometric, to two digits.

    >>> lr_between({1: 1e-4, 64: 1e-2}, 8)
    0.001
    """
    if rank in best:
        return best[rank]
    logs = np.interp(math.log(rank), np.log(list(best)), np.log(list(best.values())))
    return float(f"{math.exp(logs):.2g}")


def base_configs() -> list[RunConfig]:
    """The untuned model on every task."""
    return [profile().config(task, "base") for task in profile().tasks]


def full_configs() -> list[RunConfig]:
    """Full fine-tuning of every task with every seed, at the task's best learning rate."""
    return [tuned(task, seed=seed) for seed in profile().seeds for task in profile().tasks]


def lora_configs() -> list[RunConfig]:
    """LoRA at every rank and task with the first seed; lora_until has the others."""
    return [
        tuned(task, "lora", rank=rank)
        for rank in profile().lora_ranks
        for task in profile().lora_tasks
    ]


def warmup_configs() -> list[RunConfig]:
    """Full fine-tuning with and without warm-up, at each of the profile's rates for it.

    At the middle rate with every seed; its neighbours, with the first, say that it is no edge.
    """
    first = profile().seeds[:1]
    return [
        profile().config(task, lr=lr, warmup=warmup, seed=seed)
        for task, (low, middle, high) in profile().warmup_lrs
        for lr, seeds in ((middle, profile().seeds), (low, first), (high, first))
        for warmup in profile().warmups
        for seed in seeds
    ]


def floor_configs(task: str) -> list[RunConfig]:
    """A task's format floor: full fine-tuning and LoRA at the lowest rank on permuted answers.

    Each at the rate that the coarse search finds best for the task itself, with the first seed.
    """
    found = []
    for method, rank in (("full", 0), ("lora", min(profile().lora_ranks))):
        lr = best_lr([*_coarse_search(task, method, rank).values()])
        found.append(_trial(task, method, rank)(lr=lr, permuted=True))
    return found


def production_configs() -> list[RunConfig]:
    """The long mix by full fine-tuning and LoRA, at the rates that are best for the mix.

    Full fine-tuning and the lowest rank with every seed, the other ranks with the first; nothing
    in a profile without sizes for it.
    """
    if not profile().production_sizes:
        return []
    ranks = (0, *profile().lora_ranks)
    seeds = {rank: profile().seeds[:1] for rank in ranks} | dict.fromkeys(
        ranks[:2], profile().seeds
    )
    found = []
    for seed, rank in itertools.product(profile().seeds, ranks):
        if seed in seeds[rank]:
            method = "lora" if rank else "full"
            lr = tuned("mix", method, rank=rank).lr
            found.append(profile().config("production", method, rank=rank, lr=lr, seed=seed))
    return found


def embedding_configs() -> list[RunConfig]:
    """Full fine-tuning with the embedding trained too, beside the same with it frozen."""
    return [tuned(task, train_embedding=True) for task in profile().embedding_tasks]


SCALES: dict[str, dict] = {  # name: the fields of RunConfig that set it
    f"α / r, α = {LORA_ALPHA:g}": {},
    f"α / √r, α = {LORA_ALPHA:g}": {"rslora": True},
    f"α / r, α = {8 * LORA_ALPHA:g}": {"alpha": 8 * LORA_ALPHA},
}


def _learns_as(config: RunConfig) -> tuple[int, float, float]:
    """What of a LoRA of one task decides what it learns."""
    return config.rank, config.lr, config.scale


def scaling_configs() -> dict[str, list[RunConfig]]:
    """LoRA of the facts by each of SCALES, at every rank and learning rate; {scale's name: runs}.

    Where two scales are equal, such as alpha / r and alpha / sqrt(r) at rank 1, they share runs.
    """
    first: dict[tuple, RunConfig] = {}
    found = {}
    for name, fields in SCALES.items():
        configs = [
            profile().config("facts", "lora", rank=rank, lr=lr, **fields)
            for rank in profile().scaling_ranks
            for lr in profile().scaling_lrs
        ]
        found[name] = [first.setdefault(_learns_as(c), c) for c in configs]
    return found


def larger_scale(*, rank: int, seed: int) -> RunConfig:
    """LoRA of the facts by the last of SCALES, at the best rate of its rank or one between."""
    name, fields = list(SCALES.items())[-1]
    results = sweep(scaling_configs()[name])
    tried = itertools.groupby(results, lambda result: result.config.rank)
    lr = lr_between({r: best_lr(list(group)) for r, group in tried}, rank)
    config = profile().config("facts", "lora", rank=rank, lr=lr, **fields)
    same = (r.config for r in results if _learns_as(r.config) == _learns_as(config))
    return dataclasses.replace(next(same, config), seed=seed)


def budget_configs() -> list[RunConfig]:
    """The profile's budget_runs with each of its budgets of steps and every seed."""
    return [
        tuned(task, "lora" if rank else "full", rank=rank, seed=seed, steps=n * profile().steps)
        for task, rank in profile().budget_runs
        for n in profile().budgets
        for seed in profile().seeds
    ]


def cut_until(config: RunConfig, share: float) -> pd.DataFrame:
    """cut at the profile's ranks, and on at twice the last until `share` of the loss gain is kept.

    The last rank is the first of these that keeps it, or the largest that matrices can have.
    """
    sizes = PROFILES[config.profile]
    base, full = run(sizes.config(config.task, "base")), run(config)
    ranks, limit = [*sizes.cut_ranks], max(min(full.shape(name)) for name in full.spectra)
    while True:
        cuts = cut(config, ranks)
        kept = gain_kept(cuts["loss_nats"].iloc[-1], base.loss(), full.loss())
        if kept >= share or 2 * ranks[-1] > limit:
            return cuts
        ranks.append(2 * ranks[-1])


def lora_until(
    full: RunConfig,
    share: float,
    *,
    start: RunConfig | None = None,
    recipe: Callable[..., RunConfig] | None = None,
) -> list[Result]:
    """LoRA of a full run's task and seed; the rank doubles until `share` of its gain is reached.

    From the lowest of the profile's ranks to the highest.  The gain is that in held-out loss from
    `start`, by default the base model.  recipe(rank=, seed=) gives a rank's configuration, by
    default that of `tuned`.  The last run is the first that reaches the share, or the largest.
    """
    recipe = recipe or functools.partial(tuned, full.task, "lora")
    sizes = PROFILES[full.profile]
    base, end = run(start or sizes.config(full.task, "base")).loss(), run(full).loss()
    rank, kept, found = min(sizes.lora_ranks), -math.inf, []
    while rank <= max(sizes.lora_ranks) and kept < share:
        found.append(run(recipe(rank=rank, seed=full.seed)))
        kept = gain_kept(found[-1].loss(), base, end)
        rank *= 2
    return found
