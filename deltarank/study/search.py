"""Learning rates and alphas: searched for every task, method and rank, coarse and fine."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from deltarank.checks import require
from deltarank.runtime import at_profile
from deltarank.study.configs import RunConfig
from deltarank.study.profiles import LORA_ALPHA, middle, profile
from deltarank.study.runs import Result, sweep


def lr_search(task: str, method: str = "full", *, rank: int = 0) -> list[Result]:
    """The runs that choose a task's learning rate, by ascending rate; a LoRA has best_alpha.

    In the profile's fine_tasks, where a low rank falls short or one seed misleads, the climb goes
    on from the best rate of coarse_search over finer(rates), each with every seed, for full
    fine-tuning and LoRA alike.
    """
    recipe = {"rank": rank} | scale_of(task, method)
    coarse = coarse_search(task, method, **recipe)
    if task not in profile().fine_tasks:
        return coarse
    make = functools.partial(profile().config, task, method, **recipe)
    return climb(_trials(make, profile().seeds), finer(_rates(method)), best_lr(coarse))


def scale_of(task: str, method: str) -> dict[str, float]:
    """The field of RunConfig that a LoRA of the task has beyond its rank and rate."""
    return {"alpha": best_alpha(task)} if method == "lora" else {}


def coarse_search(task: str, method: str = "full", **recipe) -> list[Result]:
    """The runs of a climb over the profile's rates from their middle, with the first seed.

    recipe: optimizer=, and of an adapter rank=, alpha=, layers=, modules= or vector=.  With a
    larger alpha than LORA_ALPHA a step moves the weights further: its climb starts one rate below
    the best of that.
    """
    rates = _rates(method, recipe.get("optimizer", ""))
    start = middle(rates)
    if recipe.get("alpha", LORA_ALPHA) > LORA_ALPHA:
        best = best_lr(coarse_search(task, method, **recipe | {"alpha": LORA_ALPHA}))
        start = rates[max(rates.index(best) - 1, 0)]
    make = functools.partial(profile().config, task, method, **recipe)
    return climb(_trials(make, profile().seeds[:1]), rates, start)


def at_best_rate(task: str, method: str = "full", **recipe) -> RunConfig:
    """The configuration at the best rate of coarse_search, with the first seed."""
    results = coarse_search(task, method, **recipe)
    return dataclasses.replace(results[0].config, lr=best_lr(results))


def coarsely_tuned(task: str, *, rank: int = 0, alpha: float = LORA_ALPHA, **changes) -> RunConfig:
    """The configuration at_best_rate: LoRA of this rank and alpha, 0 is full.

    What is compared with other runs of one seed and few rates takes it, and so no finer search.
    """
    method, recipe = ("lora", {"rank": rank, "alpha": alpha}) if rank else ("full", {})
    return dataclasses.replace(at_best_rate(task, method, **recipe), **changes)


def _rates(method: str, optimizer: str = "") -> list[float]:
    """The learning rates that the profile has for a method, or for an optimizer, ascending."""
    sizes = profile()
    grids = {"full": sizes.full_lrs, "lora": sizes.lora_lrs, "tinylora": sizes.ladder.tiny_lrs}
    return sorted(dict(sizes.optimizers.lrs).get(optimizer, grids[method]))


def best_lr(results: Sequence[Result]) -> float:
    """The learning rate of the lowest held-out loss (split "valid"), mean over its runs.

    Rates with a run that diverged are out.  Raises ValueError where that leaves none.
    """
    by_rate: dict[float, list[Result]] = {}
    for result in results:
        by_rate.setdefault(result.config.lr, []).append(result)
    finished = {
        lr: np.mean([r.loss("valid") for r in runs])
        for lr, runs in by_rate.items()
        if all(r.status == "finished" for r in runs)
    }
    names = ", ".join(r.config.key for r in results)
    require(bool(finished), f"every learning rate diverged: {names}; lower the grid")
    return min(finished, key=finished.__getitem__)


def climb(
    tried: Callable[[list[float]], list[Any]],
    rates: Sequence[float],
    start: float,
    *,
    best_of: Callable[[list[Any]], float] = best_lr,
) -> list[Any]:
    """The runs of a search for the best of ascending rates, from the rate `start` on, by rate.

    Ends when both neighbours of the best rate are run, or where the rates have no neighbour.
    tried(lrs) gives the runs at these rates; best_of(runs) the best rate of some.
    """
    found: dict[float, list[Any]] = {}
    best, around = rates.index(start), None
    while best != around:
        around = best
        near = [lr for lr in rates[max(around - 1, 0) : around + 2] if lr not in found]
        for result in tried(near):
            found.setdefault(result.config.lr, []).append(result)
        best = rates.index(best_of(list(itertools.chain(*found.values()))))
    return [result for lr in sorted(found) for result in found[lr]]


def _trials(
    make: Callable[..., RunConfig], seeds: Sequence[int]
) -> Callable[[list[float]], list[Result]]:
    """The runs of the configurations make(lr=, seed=), each rate with these seeds, by the rates."""
    return lambda lrs: sweep([make(lr=lr, seed=seed) for lr in lrs for seed in seeds])


def finer(rates: Sequence[float]) -> list[float]:
    """The rates, ascending, and between each two their geometric mean, to two digits.

    >>> finer([1e-4, 3e-4])
    [0.0001, 0.00017, 0.0003]
    """
    between = [float(f"{math.sqrt(a * b):.2g}") for a, b in itertools.pairwise(rates)]
    return sorted([*rates, *between])


def tuned(task: str, method: str = "full", *, rank: int = 0, **changes) -> RunConfig:
    """The configuration at the task's best learning rate; runs what of lr_search is not stored.

    A LoRA has best_alpha.  One whose rank is none of the profile's takes a rate between theirs, by
    lr_between.  Raises ValueError for another method, for a LoRA without a rank, and for a rank of
    full fine-tuning.
    """
    require(method in ("full", "lora"), f"method={method!r} is unknown; choose full or lora")
    fits = (method == "lora") == (rank > 0)
    require(fits, f"{method} at rank={rank}: a LoRA needs a rank, full fine-tuning none")
    searched = profile().lora_ranks if method == "lora" else (0,)
    near = {rank} if rank in searched else set(searched)
    best = {r: best_lr(lr_search(task, method, rank=r)) for r in sorted(near)}
    recipe = {"rank": rank, "lr": lr_between(best, rank)} | scale_of(task, method)
    return profile().config(task, method, **recipe | changes)


def full_of(config: RunConfig) -> RunConfig:
    """The full run that a run is measured by: its task and seed, tuned in its profile."""
    with at_profile(config.profile):
        return tuned(config.task, seed=config.seed)


def best_alpha(task: str) -> float:
    """The alpha of a task's LoRAs: LORA_ALPHA, but where the larger of lora_alphas clearly wins.

    It wins in the profile's alpha_tasks, if its held-out loss (split "valid") at the middle rank is
    the lower one with every seed, each alpha at its best rate of coarse_search.
    """
    if task not in profile().alpha_tasks:
        return LORA_ALPHA
    rank = middle(profile().lora_ranks)

    def wins(seed: int) -> bool:
        alphas = (LORA_ALPHA, max(profile().lora_alphas))
        tried = sweep([coarsely_tuned(task, rank=rank, alpha=a, seed=seed) for a in alphas])
        return tried[1].loss("valid") < tried[0].loss("valid")  # not by one that diverged: NaN

    return max(profile().lora_alphas) if all(map(wins, profile().seeds)) else LORA_ALPHA


def lr_between(best: dict[int, float], rank: int) -> float:
    """The learning rate of a rank by those of others, ascending: geometric, to two digits.

    >>> lr_between({1: 1e-4, 64: 1e-2}, 8)
    0.001
    """
    if rank in best:
        return best[rank]
    logs = np.interp(math.log(rank), np.log(list(best)), np.log(list(best.values())))
    return float(f"{math.exp(logs):.2g}")
