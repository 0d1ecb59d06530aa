"""Forgetting: what a run loses of what it was not trained on, at equal skill and at its end."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable

import pandas as pd
import torch
from torch import Tensor, nn

from deltarank.checks import require
from deltarank.spectra import rank_measures, singular_values
from deltarank.study.configs import RunConfig
from deltarank.study.contest import APART, contestants
from deltarank.study.evaluation import mean_loss
from deltarank.study.floors import skill_kept
from deltarank.study.general import general_loss, kept_by, word_loss
from deltarank.study.intruders import intruder_counts
from deltarank.study.measuring import provenance, tuned_weights
from deltarank.study.models import load_model, matrices
from deltarank.study.profiles import LARGE_ALPHA, base_of, entry_folder, middle, profile
from deltarank.study.runs import run
from deltarank.study.search import full_of, tuned
from deltarank.study.tasks import PARTS, load_split
from deltarank.study.training import prepare, train
from deltarank.study.trials import chosen, trials

EVERY = 10  # steps from one look at the skill to the next
LEVELS = (0.5, 0.95)  # of the skill gain: runs are compared where they first have it, and at end
OTHER_ROWS = 64  # test rows of each other task
RATE_FACTORS = (0.3, 1.0)  # of the best rate; 3 is to come
# LoRA at other alphas: its alpha and its best rate, times these; the last two are equal steps.
ALPHA_FACTORS = ((1 / 8, 3.0), (1 / 8, 8.0), (8.0, 1 / 8))


def forget_configs() -> list[tuple[str, RunConfig]]:
    """The runs whose forgetting is measured, with the first seed: method and configuration of each.

    Of each of the profile's forget_tasks full fine-tuning and LoRA of its ranks, of the first full
    fine-tuning on permuted answers, which teach no skill; of the first contest, where it is of that
    task, the contestants at the setting chosen for them.
    """
    found = []
    for task in profile().forget_tasks:
        full, ranks = tuned(task), profile().lora_ranks
        found.append(("full", full))
        if task == profile().forget_tasks[0]:  # of the others to come
            found.append(("no skill", dataclasses.replace(full, permuted=True)))
        found += [(f"LoRA, rank {r}", tuned(task, "lora", rank=r)) for r in ranks]
        sizes = [size for contest, size in profile().contests[:1] if contest == task]
        for name in contestants(task, *sizes) if sizes else ():
            if name != "full":  # that of its own rates, above, is the better one
                best = chosen(trials(task, name, *sizes), seed=profile().seeds[0])
                found.append((f"LoRA, α = {best.alpha:g}" if name == "LoRA" else name, best))
    return found


def repeat_configs() -> list[tuple[str, RunConfig]]:
    """Full fine-tuning and LoRA of the middle rank of the first task, with three seeds, APART."""
    first, *_ = seeds = profile().seeds
    apart = [first, *(seed + APART for seed in seeds[:2])]
    runs = _full_and_lora(profile().forget_tasks[0])
    return [(n, dataclasses.replace(c, seed=s)) for s in apart for n, c in runs]


def rate_configs() -> list[tuple[str, RunConfig]]:
    """The same two of every task with the first seed, at the best rate and below it.

    Below it full fine-tuning is of the first task alone; the others are to come.
    """
    first, *_ = tasks = profile().forget_tasks
    return [
        (name, _at_rate(config, factor))
        for task in tasks
        for name, config in _full_and_lora(task)
        for factor in RATE_FACTORS
        if factor == 1 or task == first or config.method != "full"
    ]


def other_alphas() -> list[tuple[str, RunConfig]]:
    """The same LoRA of every task at ALPHA_FACTORS, none above LARGE_ALPHA; named by its alpha."""
    found = []
    for task in profile().forget_tasks:
        _, (_, best) = _full_and_lora(task)
        for alpha, rate in ALPHA_FACTORS:
            config = dataclasses.replace(_at_rate(best, rate), alpha=best.alpha * alpha)
            if config.alpha <= LARGE_ALPHA:
                found.append((f"LoRA, α = {config.alpha:g}", config))
    return found


def _at_rate(config: RunConfig, factor: float) -> RunConfig:
    """The same run at so many times its rate, to two digits."""
    return dataclasses.replace(config, lr=float(f"{config.lr * factor:.2g}"))


def _full_and_lora(task: str) -> list[tuple[str, RunConfig]]:
    """Full fine-tuning of a task and LoRA of the middle rank, first seed."""
    rank = middle(profile().lora_ranks)
    return [("full", tuned(task)), (f"LoRA, rank {rank}", tuned(task, "lora", rank=rank))]


def yardstick() -> pd.DataFrame:
    """What is lost of general text, in nats a token by kind, before any training, and at most.

    Lines: "base model", and "word frequencies", of what knows only how often each token occurs.
    """
    base = profile().config(profile().forget_tasks[0], "base")
    lines = {"base model": forget_run(base)["end"]["general"]}
    return pd.DataFrame(lines | {"word frequencies": word_loss(base.model)}).T


def forgotten_table(configs: Iterable[tuple[str, RunConfig]]) -> pd.DataFrame:
    """What these runs forget, a line a look: the first at each of LEVELS that a run has, "end".

    Columns: task, method, seed, lr, look, step, skill, relative_size, intruders (PEFT's threshold);
    r90 and stable_rank: medians over the matrices of the update so far; prose, code and others:
    nats a token above the base model's, the last the mean over the other tasks.  Of a run that
    diverged there is no line.
    """
    lines = []
    for method, config in configs:
        record, before = forget_run(config), forget_run(base_of(config))["end"]
        looks = record["levels"] | {"end": record["end"]}
        run_is = {"task": config.task, "method": method, "seed": config.seed, "lr": config.lr}
        for look, found in looks.items():
            if found:
                numbers = {name: found[name] for name in ("step", "skill", "relative_size")}
                numbers |= {"intruders": found["intruders"]["0.5"]} | found["ranks"]
                lines.append(run_is | {"look": look} | numbers | _lost(found, before))
    return pd.DataFrame(lines)


def _lost(found: dict, before: dict) -> dict[str, float]:
    """What a look has lost: nats a token above the base model's, by what was read."""
    lost = {kind: found["general"][kind] - nats for kind, nats in before["general"].items()}
    others = [found["others"][other] - nats for other, nats in before["others"].items()]
    return lost | {"others": sum(others) / len(others)}


def forget_run(config: RunConfig) -> dict:
    """What a run forgets: loaded when it is stored, otherwise trained again, measured and stored.

    The record's "levels" are of the first looks at which the run has each of LEVELS, None where
    none has, "end" of its end.  Each has step; skill: share of the skill gain in the loss of
    "valid"; general: nats a token on general text by kind; others: nats a token of the other tasks;
    relative_size: |dW| / |W0| of all matrices together; intruders, by threshold; ranks: r90 and
    stable_rank, medians over the matrices.
    Of a base run only "end".  A run that diverges has none.  Raises ValueError for a task that
    is no part of the long mix, and for an entry that was measured on other text or by other rules.
    """
    known = ", ".join(PARTS)
    require(config.task in PARTS, f"{config.task}: forgetting is measured of {known}")
    rules = {"every": EVERY, "levels": [*LEVELS], "other_rows": OTHER_ROWS}
    folder = entry_folder(config, "forgetting")
    return kept_by(folder, rules, lambda: measure_forgetting(config))


def measure_forgetting(config: RunConfig) -> dict:
    """Train one run and measure it on the way; its record."""
    started = time.perf_counter()
    model = prepare(config)
    watch = _Watch(config, model)
    losses = train(config, model, label=config.key, after_step=watch) if config.steps else []
    ended = [*losses, watch.loss(), relative_size(tuned_weights(config, model), config.model)]
    finished = all(map(math.isfinite, ended))  # the last step may have broken it
    return {
        "run": config.key,
        "config": config.recipe,
        "status": "finished" if finished else "diverged",
        "levels": watch.levels if finished else {},
        "end": watch.look(config.steps) if finished else None,
        "provenance": provenance(time.perf_counter() - started),
    }


class _Watch:
    """Looks at a model on its way, where it first has each of LEVELS."""

    def __init__(self, config: RunConfig, model: nn.Module) -> None:
        self.config, self.model = config, model
        self.levels: dict[str, dict | None] = {f"{level:g}": None for level in LEVELS}
        self.looks: dict[int, dict] = {}  # by step
        self.full = run(full_of(config)) if config.steps else None

    def __call__(self, step: int) -> None:
        """After a training step."""
        missing = [level for level, look in self.levels.items() if look is None]
        if missing and step % EVERY == 0:
            skill = self.skill() or 0
            if reached := [level for level in missing if skill >= float(level)]:
                self.levels |= dict.fromkeys(reached, self.look(step))

    def skill(self) -> float | None:
        """The share of the skill gain, in the loss of the rows that choose; None of a base run."""
        if self.full is None:
            return None
        return float(skill_kept(self.loss(), self.full, split="valid"))

    def loss(self) -> float:
        """The loss of the rows that choose, in nats a token."""
        rows = load_split(self.config.task, "valid")[: self.config.eval_rows]
        return mean_loss(self.model, self.config, rows)

    def look(self, step: int) -> dict:
        """What the model has lost and how far it went, so far; measured once a step."""
        if step not in self.looks:
            self.looks[step] = {"step": step, "skill": self.skill()} | self._measured()
        return self.looks[step]

    def _measured(self) -> dict:
        """What a look measures beside the skill."""
        task, base = self.config.task, self.config.model
        W1 = tuned_weights(self.config, self.model)
        rows = {t: load_split(t, "test")[:OTHER_ROWS] for t in PARTS if t != task}
        return {
            "general": general_loss(self.model, self.config),
            "others": {t: mean_loss(self.model, self.config, few) for t, few in rows.items()},
            "relative_size": relative_size(W1, base),
            "intruders": intruder_counts(W1, base),
            "ranks": update_ranks(W1, base),
        }


def relative_size(W1: dict[str, Tensor], model: str) -> float:
    """|W1 - W0| / |W0| of all matrices of W1 together, Frobenius norms; model: the base."""
    W0 = _before(W1, model)
    moved, before = (
        torch.stack([part.norm() for part in parts]).norm()
        for parts in ([W1[name] - W for name, W in W0.items()], W0.values())
    )
    return float(moved / before)


def update_ranks(W1: dict[str, Tensor], model: str) -> dict[str, float]:
    """r90 and stable_rank of the updates W1 - W0, medians over the matrices; model: the base.

    Empty where nothing has moved.
    """
    moved = [W1[name] - W for name, W in _before(W1, model).items()]
    ranks = pd.DataFrame(rank_measures(singular_values(dW)) for dW in moved if dW.any())
    return {} if ranks.empty else {name: ranks[name].median() for name in ("r90", "stable_rank")}


def _before(W1: dict[str, Tensor], model: str) -> dict[str, Tensor]:
    """W0 of the matrices of W1, on the CPU as they are."""
    return {n: W.detach().cpu() for n, W in matrices(load_model(model)).items() if n in W1}
