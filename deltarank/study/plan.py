"""The plan: runs that the report asks for; those of sizes, codes, heals, mixes stand with these."""

from __future__ import annotations

import dataclasses
import itertools

import pandas as pd

from deltarank.checks import require_share
from deltarank.runtime import at_profile
from deltarank.study.configs import RunConfig
from deltarank.study.cuts import cut
from deltarank.study.gains import gain_kept
from deltarank.study.profiles import LARGE_ALPHA, LORA_ALPHA, base_of, middle, profile
from deltarank.study.runs import Result, run
from deltarank.study.search import coarsely_tuned, lr_between, tuned
from deltarank.study.tasks import TASKS


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
    The runs at the middle rate have every held-out row scored.
    """
    first, found = profile().seeds[:1], []
    for task, (low, medium, high) in profile().warmup_lrs:
        for lr, seeds in ((medium, profile().seeds), (low, first), (high, first)):
            for warmup, seed in itertools.product(profile().warmups, seeds):
                config = profile().config(task, lr=lr, warmup=warmup, seed=seed)
                found.append(scored_whole(config) if lr == medium else config)
    return found


def scored_whole(config: RunConfig) -> RunConfig:
    """The run with a score of every held-out row, where fewer would be generated for it."""
    if TASKS[config.task].metric != "chrf":
        return config
    return dataclasses.replace(config, generate_rows=config.eval_rows)


def again_configs() -> list[tuple[RunConfig, RunConfig]]:
    """Runs of the profile's again_tasks, each beside the same run with every row scored.

    Full fine-tuning and LoRA of the middle rank, with every seed, at the rates of the coarse
    search.  The first of a pair come from several processors, the second from one.
    """
    ranks = (0, middle(profile().lora_ranks))
    grid = itertools.product(profile().again_tasks, ranks, profile().seeds)
    runs = [coarsely_tuned(task, rank=rank, seed=seed) for task, rank, seed in grid]
    return [(config, scored_whole(config)) for config in runs]


def floor_configs(task: str) -> list[RunConfig]:
    """A task's format floor: full fine-tuning and LoRA at the lowest rank on permuted answers.

    Each at the rate that the coarse search finds best for the task itself, with the first seed.
    """
    seed = profile().seeds[0]
    ranks = (0, min(profile().lora_ranks))
    return [coarsely_tuned(task, rank=rank, seed=seed, permuted=True) for rank in ranks]


def production_configs(*, twice: bool = False) -> list[RunConfig]:
    """The long mix at each of the profile's rates for it, with the first seed; rank 0 is full.

    twice: with twice its steps, so that a part has as many rows as where it is the whole task.
    """
    whole = profile().config("production")
    steps = whole.steps * (2 if twice else 1)
    return [
        profile().config("production", "lora" if rank else "full", rank=rank, lr=lr, steps=steps)
        for rank, lrs in (profile().mixes.twice_lrs if twice else profile().mixes.lrs)
        for lr in lrs
    ]


def embedding_configs() -> list[RunConfig]:
    """Full fine-tuning with the embedding trained too, beside the same with it frozen."""
    return [tuned(task, train_embedding=True) for task in profile().embedding_tasks]


SCALES: dict[str, dict] = {  # name: the fields of RunConfig that set it
    f"α / r, α = {LORA_ALPHA:g}": {},
    f"α / r, α = {LARGE_ALPHA:g}": {"alpha": LARGE_ALPHA},
    f"α / √r, α = {LORA_ALPHA:g}": {"rslora": True},
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


def alpha_configs() -> list[RunConfig]:
    """LoRA of the facts at each of the profile's ranks and alphas for it, with every seed."""
    sizes = profile()
    grid = itertools.product(sizes.scaling_ranks, sizes.lora_alphas, sizes.seeds)
    return [coarsely_tuned("facts", rank=r, alpha=a, seed=s) for r, a, s in grid]


def between_config() -> RunConfig:
    """King James at the middle of LoRA's ranks, its rate on a line between those of the ends."""
    ranks = profile().lora_ranks
    ends = {rank: tuned("kjv", "lora", rank=rank).lr for rank in (min(ranks), max(ranks))}
    rank = middle(ranks)
    return profile().config("kjv", "lora", rank=rank, lr=lr_between(ends, rank))


def entities_configs() -> dict[tuple[int, float, int], list[RunConfig]]:
    """Entities, which are learned by heart: {(rank, alpha, budget): a run a seed}; rank 0 is full.

    At the rate of the coarse search; a budget of 2 has twice the steps.
    """
    seeds = {(0, 0.0, 1): 3, (8, LORA_ALPHA, 1): 3, (8, LARGE_ALPHA, 1): 3}
    seeds |= {(1, LORA_ALPHA, 1): 1, (1, LARGE_ALPHA, 1): 1}
    seeds |= {(0, 0.0, 2): 1, (1, LORA_ALPHA, 2): 1, (8, LORA_ALPHA, 2): 1}
    return {
        (rank, alpha, n): [
            coarsely_tuned("entities", rank=rank, alpha=alpha, seed=s, steps=n * profile().steps)
            for s in profile().seeds[:count]
        ]
        for (rank, alpha, n), count in seeds.items()
    }


def budget_configs() -> list[RunConfig]:
    """The profile's budget_runs with each of its budgets of steps and every seed.

    At the rate of the coarse search, LoRA with the alpha common to all tasks.
    """
    return [
        coarsely_tuned(task, rank=rank, seed=seed, steps=n * profile().steps)
        for task, rank in profile().budget_runs
        for n in profile().budgets
        for seed in profile().seeds
    ]


def cut_until(config: RunConfig, share: float) -> pd.DataFrame:
    """cut at the profile's ranks, and on at twice the last until `share` of the loss gain is kept.

    The last rank is the first of these that keeps it, or the last doubling that some matrix has.
    Raises ValueError for a share that is not above 0 and at most 1.
    """
    require_share(share)
    base, full = run(base_of(config)), run(config)
    ranks = [*profile(config.profile).cut_ranks]
    while True:
        cuts, doubled = cut(config, ranks), 2 * ranks[-1]
        kept = gain_kept(cuts["loss_nats"].iloc[-1], base.loss(), full.loss())
        if kept >= share or all(doubled > min(full.shape(name)) for name in full.matrices):
            return cuts
        ranks.append(doubled)


def lora_until(full: RunConfig, share: float) -> list[Result]:
    """LoRA of a full run's task and seed; the rank doubles until `share` of its gain is reached.

    From the lowest of the profile's ranks to the highest, each by `tuned`.  The gain is that in
    held-out loss; the share has to be reached on the rows of "valid" and of "test" alike, so that
    luck with some rows ends no ladder.  The last run is the first that reaches it, or the largest.
    Raises ValueError for a share that is not above 0 and at most 1.
    """
    require_share(share)
    sizes = profile(full.profile)
    ends = run(base_of(full)), run(full)
    rank, reached, found = min(sizes.lora_ranks), False, []
    while rank <= max(sizes.lora_ranks) and not reached:
        with at_profile(full.profile):
            lora = run(tuned(full.task, "lora", rank=rank, seed=full.seed))
        reached = all(  # not by a run that diverged, whose loss is NaN
            gain_kept(lora.loss(split), *(end.loss(split) for end in ends)) >= share
            for split in ("valid", "test")
        )
        found.append(lora)
        rank *= 2
    return found
