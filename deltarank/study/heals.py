"""Heals: cuts of the report's runs trained further, beside other starts of the same budget."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor, nn

from deltarank.checks import require
from deltarank.factors import balanced
from deltarank.gram import leading_factors
from deltarank.runtime import cache_folder
from deltarank.spectra import factor_svd
from deltarank.store import cached, digest
from deltarank.study.configs import GROWTH_ROWS, RunConfig
from deltarank.study.distillation import Lessons, distil, divergence, lessons
from deltarank.study.evaluation import evaluate, newline
from deltarank.study.gains import gain_kept
from deltarank.study.losses import Head, head_of
from deltarank.study.measuring import provenance, rounded
from deltarank.study.models import load_tokenizer, skeleton
from deltarank.study.profiles import LARGE_ALPHA, base_of, entry_folder, middle, profile
from deltarank.study.runs import Result, in_parallel, run, run_model, updates
from deltarank.study.search import best_lr, climb, tuned
from deltarank.study.tasks import load_split
from deltarank.study.training import lora_factors, lora_layers, plant, prepare

STARTS = ("cut", "nothing", "squeezed")
ROOM = 48  # tokens that an answer of the full run may have
SPLITS = ("valid", "test")  # that are scored


@dataclass(frozen=True, kw_only=True)
class Heal:
    """A LoRA trained to answer as a full run does (see Lessons), and its `key` in the store.

    start "cut": the leading directions of the full run's update, scale 1, as `extract` writes
    them: without norms.  "nothing": as PEFT starts, of LARGE_ALPHA.  "squeezed": the same at rank
    `wide`, cut to `rank` after it was trained (arXiv 2602.10993).  All learn from the same `rows`
    prompts of the full run's training rows, in the same order.  Steps 0, of a cut only, leave it
    as it is.  Raises ValueError for values that cannot run.
    """

    full: RunConfig
    start: str
    rank: int
    steps: int
    rows: int
    lr: float = 0.0
    wide: int = 0  # of "squeezed"

    def __post_init__(self) -> None:
        known, full = ", ".join(STARTS), self.full
        require(self.start in STARTS, f"start={self.start!r}: unknown; choose one of {known}")
        require(self.rank >= 1, f"rank={self.rank}: must be 1 or more")
        embedding = full.train_embedding or full.method != "full"
        require(not embedding, f"full={full.key}: must be a full run, its embedding frozen")
        least = 0 if self.start == "cut" else 1
        require(self.steps >= least, f"steps={self.steps}: {self.start} needs {least} or more")
        require((self.lr > 0) == (self.steps > 0), f"lr={self.lr}: needed where steps are taken")
        squeezed = self.start == "squeezed"
        fits = self.wide > self.rank if squeezed else self.wide == 0
        require(fits, f"wide={self.wide}: {'must be above rank' if squeezed else 'only squeezed'}")
        require(self.rows >= full.batch_size, f"rows={self.rows}: fewer than a batch")

    @property
    def recipe(self) -> RunConfig:
        """The LoRA run that it is, as to batches, rate and scores; steps 0 are none of it."""
        rank = self.wide or self.rank
        alpha = float(rank) if self.start == "cut" else LARGE_ALPHA
        changes: dict[str, Any] = {
            "rank": rank,
            "alpha": alpha,
            "steps": self.steps or 1,
            "lr": self.lr or 1.0,
        }
        return dataclasses.replace(self.full, method="lora", **changes)

    @property
    def identity(self) -> dict:
        """What determines it: its fields, the full run by its key, alpha, and the answers' room."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return fields | {"full": self.full.key, "alpha": self.recipe.alpha, "room": ROOM}

    @property
    def key(self) -> str:
        """Its name in the store: readable parts, then 12 hex digits of the hash of its identity."""
        parts = [Path(self.full.task).stem, "heal", self.start, f"r{self.rank}", f"n{self.steps}"]
        return "-".join([*parts, f"s{self.full.seed}", digest(self.identity)[:12]])


def heal_run(heal: Heal) -> Result:
    """The result of a heal: loaded when it is stored, otherwise trained, scored and stored.

    Its config is the heal's recipe; it has no spectra.
    """
    folder = entry_folder(heal.full, "heals", heal.key)
    record, _ = cached(folder, lambda: (measure_heal(heal), None))
    return Result(heal.recipe, record)


def measure_heal(heal: Heal) -> dict:
    """Train and score one heal; its record.

    divergence_nats is from the full run on held-out prompts of the split "valid", in nats a token.
    full: the loss and score of the full run that taught; trained again on another processor it is
    not quite the stored one.
    """
    started, config = time.perf_counter(), heal.recipe
    taught, held, full = _told(heal)
    model = prepare(config)
    if heal.start == "cut":
        _cut_to(model, updates(heal.full), heal.rank)
    teacher = _teacher_head(model, heal.full)
    losses = distil(config, model, taught, teacher, label=heal.key) if heal.steps else []
    finished = all(map(math.isfinite, losses))
    if heal.start == "squeezed" and finished:
        _squeeze(model, heal.rank)
    evaluation = {split: evaluate(model, config, split) for split in SPLITS} if finished else {}
    away = divergence(model, config, held, teacher) if finished else math.nan
    finished &= all(map(math.isfinite, [away, *(e["loss_nats"] for e in evaluation.values())]))
    return {
        "heal": heal.identity,
        "config": config.recipe,
        "status": "finished" if finished else "diverged",
        "train_divergence_nats": rounded(losses),
        "divergence_nats": away if finished else None,
        "full": full,
        "evaluation": evaluation if finished else {},
        "provenance": provenance(time.perf_counter() - started),
    }


def _teacher_head(model: nn.Module, full: RunConfig) -> Head:
    """The head of the full run, of the base model `model`: moved where it is not the embedding."""
    head, names = head_of(model), skeleton(full.model)
    own = names.get_output_embeddings().weight
    if own is names.get_input_embeddings().weight:  # which the full run left as it was
        return head
    name = next(name for name, weight in names.named_parameters() if weight is own)
    return dataclasses.replace(head, weight=head.weight + updates(full)[name].to(head.weight))


def _told(heal: Heal) -> tuple[Lessons, Lessons, dict[str, dict]]:
    """The full run's lessons, on training prompts and on held-out ones, and its loss and score.

    The last by split.  All are kept in the cache.
    """
    full = heal.full
    given, valid = load_split(full.task, "train"), load_split(full.task, "valid")[:GROWTH_ROWS]
    learned = random.Random(0).sample(given, min(heal.rows, len(given)))

    def answered() -> tuple[dict, dict[str, Tensor]]:
        prompts = [row["prompt"] for row in learned + valid]
        ends = [newline(load_tokenizer(full.model))]
        model = run_model(full)
        told = lessons(model, full, prompts, room=ROOM, ends=ends)
        scores = {split: evaluate(model, full, split) for split in SPLITS}
        means = {split: {k: s[k] for k in ("loss_nats", "score")} for split, s in scores.items()}
        return {"run": full.key, "rows": told.rows, "full": means}, {"hidden": told.hidden}

    name = f"{full.key}-{len(learned)}-{ROOM}"
    record, tensors = cached(cache_folder() / "lessons" / name, answered)
    told = Lessons(record["rows"], tensors["hidden"])
    taught, held = told.of(slice(len(learned))), told.of(slice(len(learned), None))
    return taught, held, record["full"]


def _cut_to(model: nn.Module, dW: dict[str, Tensor], rank: int) -> None:
    """Put the leading directions of each matrix's update (m, n) into its LoRA."""
    plant(model, lambda name: balanced(*leading_factors(dW[name], min(rank, *dW[name].shape))[:2]))


def _squeeze(model: nn.Module, rank: int) -> None:
    """Cut the update of every LoRA to `rank`, by the arithmetic of shrink_adapter."""
    layers = lora_layers(model)

    def narrow(name: str) -> tuple[Tensor, Tensor]:
        B, A, scale = lora_factors(layers[name])
        U, S, Vh = factor_svd(scale * B.double(), A.double())
        return balanced(U[:, :rank] * S[:rank], Vh[:rank])

    plant(model, narrow)


def heal_of(task: str, start: str, rank: int, steps: int, *, seed: int, **fields) -> Heal:
    """A heal of the task's full run, by the profile's sizes; fields: lr, wide."""
    full, rows = tuned(task, seed=seed), profile().heals.rows
    return Heal(full=full, start=start, rank=rank, steps=steps, rows=rows, **fields)


def heal_lr(task: str, start: str) -> float:
    """The rate of the lowest held-out loss, by a climb over the profile's for a start.

    Of heals with the first seed, the middle rank and the middle number of steps; the squeezed LoRA
    at its first pair of ranks.
    """
    grid, first = profile().heals, profile().seeds[0]
    fields = {"rank": middle(grid.ranks), "steps": middle(grid.steps)}
    if start == "squeezed":
        fields |= dict(zip(("wide", "rank"), grid.squeezes[0], strict=True))

    def make(lr: float) -> Heal:
        return heal_of(task, start, seed=first, lr=lr, **fields)

    rates = dict(grid.lrs)[start]
    tried = climb(lambda lrs: in_parallel(heal_run, [*map(make, lrs)]), rates, middle(rates))
    return best_lr(tried)


def heal_configs() -> list[Heal]:
    """The profile's heals: cuts as they are and healed, LoRA from nothing, and squeezed LoRA.

    Those that take steps at the rate of heal_lr; runs what of its search is not stored.
    """
    grid, seeds, found = profile().heals, profile().seeds, []
    starts = [(start, 0, rank) for start in ("cut", "nothing") for rank in grid.ranks]
    starts += [("squeezed", *pair) for pair in grid.squeezes]
    for task in grid.tasks:
        cuts = itertools.product(grid.ranks, seeds)
        found += [heal_of(task, "cut", rank, 0, seed=seed) for rank, seed in cuts]
        best = {start: heal_lr(task, start) for start in STARTS}
        points = itertools.product(starts, grid.steps, seeds)
        found += [
            heal_of(task, start, rank, steps, seed=seed, lr=best[start], wide=wide)
            for (start, wide, rank), steps, seed in points
        ]
    return found


def heals_table(heals: Sequence[Heal]) -> pd.DataFrame:
    """One line a heal, and runs what is not stored.

    Columns: task, seed, start, rank, steps, lr, status, loss_nats and score of the test split, both
    of the full run that taught (full_nats, full_score), kept_loss: the share of its loss gain, and
    divergence_nats from it on held-out prompts.
    """
    rows = []
    for heal, result in zip(heals, in_parallel(heal_run, heals), strict=True):
        names = ("start", "rank", "steps", "lr")
        row = {"task": heal.full.task, "seed": heal.full.seed}
        row |= {name: getattr(heal, name) for name in names} | {"status": result.status}
        row |= {"loss_nats": result.loss(), "score": result.score()}
        full, base = result.record["full"]["test"], run(base_of(heal.full))
        row |= {"full_nats": full["loss_nats"], "full_score": full["score"]}
        row["kept_loss"] = gain_kept(result.loss(), base.loss(), full["loss_nats"])
        rows.append(row | {"divergence_nats": result.record["divergence_nats"]})
    return pd.DataFrame(rows)
