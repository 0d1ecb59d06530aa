"""Forgetting: what a run loses of what it was not trained on, at equal skill and at its end."""

from __future__ import annotations

import math
import time

import pandas as pd
import torch
from torch import Tensor, nn

from deltarank.checks import require
from deltarank.spectra import rank_measures
from deltarank.study.configs import RunConfig
from deltarank.study.contest import contestants
from deltarank.study.evaluation import mean_loss
from deltarank.study.floors import skill_kept
from deltarank.study.general import general_loss, kept_by
from deltarank.study.intruders import intruder_counts
from deltarank.study.measuring import provenance, tuned_weights
from deltarank.study.models import load_model, matrices
from deltarank.study.profiles import base_of, entry_folder, profile
from deltarank.study.runs import run
from deltarank.study.search import full_of, tuned
from deltarank.study.tasks import PARTS, load_split
from deltarank.study.training import prepare, train
from deltarank.study.trials import chosen, trials

EVERY = 10  # steps from one look at the skill to the next
ENOUGH = 0.95  # of the skill gain: runs are compared where they first have it, and at their end
OTHER_ROWS = 64  # test rows of each other task


def forget_configs() -> dict[tuple[str, str], RunConfig]:
    """The runs whose forgetting is measured, with the first seed: {(task, method): configuration}.

    Of each task of the profile's contests full fine-tuning and LoRA of its ranks by `tuned`, and
    the contestants of the smallest size at the setting chosen for them.
    """
    seed, found = profile().seeds[0], dict[tuple[str, str], RunConfig]()
    size = min((size for _, size in profile().contests), default=0)
    for task in dict.fromkeys(task for task, _ in profile().contests):
        found[task, "full"] = tuned(task)
        for rank in profile().lora_ranks:
            found[task, f"LoRA, rank {rank}"] = tuned(task, "lora", rank=rank)
        for name in contestants(size):
            if name not in ("full", "LoRA"):
                found[task, name] = chosen(trials(task, name, size), seed=seed)
    return found


def forgotten_table() -> pd.DataFrame:
    """What the runs of forget_configs forget, a line a look: "enough" (if a run has it), "end".

    Columns: task, method, look, lr, step, skill, relative_size, intruders (PEFT's threshold); r90
    and stable_rank, medians of the update at the end; prose, code and others: nats a token above
    the base model's, the last the mean over the other tasks.
    """
    lines = []
    for (task, method), config in forget_configs().items():
        record, before = forget_run(config), forget_run(base_of(config))["end"]
        ranks = pd.DataFrame(rank_measures(S) for S in run(config).spectra.values()).median()
        for look in ("enough", "end"):
            if found := record[look]:
                line = {"task": task, "method": method, "look": look, "lr": config.lr}
                line |= {name: found[name] for name in ("step", "skill", "relative_size")}
                line |= {"intruders": found["intruders"]["0.5"]}
                line |= {"r90": ranks["r90"], "stable_rank": ranks["stable_rank"]}
                lines.append(line | _lost(found, before))
    return pd.DataFrame(lines)


def _lost(found: dict, before: dict) -> dict[str, float]:
    """What a look has lost: nats a token above the base model's, by what was read."""
    lost = {kind: found["general"][kind] - nats for kind, nats in before["general"].items()}
    others = [found["others"][other] - nats for other, nats in before["others"].items()]
    return lost | {"others": sum(others) / len(others)}


def forget_run(config: RunConfig) -> dict:
    """What a run forgets: loaded when it is stored, otherwise trained again, measured and stored.

    The record's "enough" is of the first look at which the run has ENOUGH, None where none has;
    "end" is of its end.  Each has step; skill: share of the skill gain in the loss of "valid";
    general: nats a token on general text by kind; others: nats a token of the other tasks;
    relative_size: |dW| / |W0| of all matrices together; intruders, by threshold.
    Of a base run only "end".  A run that diverges has neither.  Raises ValueError for a task that
    is no part of the long mix, and for an entry that was measured on other text or by other rules.
    """
    known = ", ".join(PARTS)
    require(config.task in PARTS, f"{config.task}: forgetting is measured of {known}")
    rules = {"every": EVERY, "enough": ENOUGH, "other_rows": OTHER_ROWS}
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
        "enough": watch.enough if finished else None,
        "end": watch.look(config.steps) if finished else None,
        "provenance": provenance(time.perf_counter() - started),
    }


class _Watch:
    """Looks at a model on its way, until it has ENOUGH."""

    def __init__(self, config: RunConfig, model: nn.Module) -> None:
        self.config, self.model = config, model
        self.enough: dict | None = None
        self.full = run(full_of(config)) if config.steps else None

    def __call__(self, step: int) -> None:
        """After a training step."""
        if self.enough is None and step % EVERY == 0 and (self.skill() or 0) >= ENOUGH:
            self.enough = self.look(step)

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
        """What the model has lost and how far it went, so far."""
        task, W1 = self.config.task, tuned_weights(self.config, self.model)
        rows = {t: load_split(t, "test")[:OTHER_ROWS] for t in PARTS if t != task}
        return {
            "step": step,
            "skill": self.skill(),
            "general": general_loss(self.model, self.config),
            "others": {t: mean_loss(self.model, self.config, few) for t, few in rows.items()},
            "relative_size": relative_size(W1, self.config.model),
            "intruders": intruder_counts(W1, self.config.model),
        }


def relative_size(W1: dict[str, Tensor], model: str) -> float:
    """|W1 - W0| / |W0| of all matrices of W1 together, Frobenius norms; model: the base."""
    W0 = {name: W.detach() for name, W in matrices(load_model(model)).items() if name in W1}
    moved, before = (
        torch.stack([part.norm() for part in parts]).norm()
        for parts in ([W1[name].to(W) - W for name, W in W0.items()], W0.values())
    )
    return float(moved / before)
