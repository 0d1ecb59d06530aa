"""Memorizing: rows trained on by heart until a model learns no more of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LinearLR
from tqdm import tqdm

from deltarank.runtime import progress
from deltarank.study.code_runs import CodeRun
from deltarank.study.codes import code_scores
from deltarank.study.upper import Upper

RISE = 0.02  # of the learned bits over the last quarter of the steps: below it is a plateau
# Learning may start late, and the flat curve before it is no plateau: learned bits count from this
# share on, of what the codes hold or of one bit a trained parameter, whichever is less.
BEGUN = 0.1
LOOKS = 3  # in a row that find the curve level make a plateau: a single one may be the noise's
PASSES = 16  # over the codes before a plateau counts, for the first ones teach next to nothing
SPACING = 1.15  # from one step after which all codes are scored to the next
FALL = 0.25  # steps of the falling rate, as a share of those before
MAX_GRAD_NORM = 1.0  # as in the report's runs


@dataclass
class Learned:
    """What a model had learned on the way: scores (see code_scores) by step, and how it ended."""

    notes: list[dict[str, float]] = field(default_factory=list)  # step, learned_bits, recall, ...
    begun: float = 0.0  # learned bits at or below which there is no plateau
    plateau: int | None = None  # the step at which the rate began to fall, if a plateau was found
    diverged: bool = False

    def curve(self, name: str) -> list[float]:
        """One value of every note."""
        return [note[name] for note in self.notes]

    def levelled(self) -> bool:
        """Whether the learned bits rose by less than RISE over the last quarter of the steps.

        The most so far counts, or a relapse would be a plateau; between notes it is read off
        linearly.

        >>> notes = [{"step": 30, "learned_bits": 100}, {"step": 40, "learned_bits": 101}]
        >>> Learned(notes).levelled()
        True
        """
        if self.diverged:
            return False
        steps, bits = self.curve("step"), np.maximum.accumulate(self.curve("learned_bits"))
        before = float(np.interp(0.75 * steps[-1], steps, bits))
        return self.begun < float(bits[-1]) < (1 + RISE) * before


def memorize(config: CodeRun, upper: Upper, *, label: str = "") -> Learned:
    """Train what of `upper` is to be trained on its rows, in place.

    AdamW at a constant rate until a plateau (a curve that LOOKS looks in a row find levelled), or
    for config.steps; then its rate falls linearly to zero over FALL times as many steps, or the
    noise of the last steps would be measured along.
    All rows are scored at the start, on the way (see _score_steps), halfway through the fall and at
    the end.  Ends at a loss that is NaN or infinite.
    """
    with progress(math.ceil((1 + FALL) * config.steps), label) as bar:
        learner, step = Learner(config, upper, bar), 0
        learner.score()
        looks = 0
        for step in _score_steps(config):
            learner.train_to(step)
            looks = looks + 1 if learner.learned.levelled() else 0
            if looks >= LOOKS and step >= PASSES * _epoch(config):
                learner.learned.plateau = step
                break
        fall = math.ceil(FALL * step)
        learner.schedule = LinearLR(learner.optimizer, 1.0, 0.0, total_iters=fall)
        learner.train_to(step + fall // 2)
        learner.train_to(step + fall)
    return learner.learned


class Learner:
    """A model on its way: does nothing more once it has diverged."""

    def __init__(self, config: CodeRun, upper: Upper, bar: tqdm) -> None:
        self.config, self.upper, self.bar = config, upper, bar
        self.step, self.batches = 0, _batches(config)
        self.parameters = [p for p in upper.model.parameters() if p.requires_grad]
        most = min(config.bits, float(sum(p.numel() for p in self.parameters)))
        self.learned = Learned(begun=BEGUN * most)
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.lr, weight_decay=0.0, fused=True
        )
        self.schedule: LinearLR | None = None

    def train_to(self, step: int) -> None:
        """Train until so many steps are done, and score all rows."""
        while self.step < step and not self.learned.diverged:
            self.learned.diverged = not math.isfinite(self._train(next(self.batches)))
            if self.schedule:
                self.schedule.step()
            self.step += 1
            self.bar.update()
        if not self.learned.diverged:
            self.score()

    def _train(self, picked: Tensor) -> float:
        """One step on the picked rows; their mean loss before it, in nats a digit."""
        self.optimizer.zero_grad()
        loss = self.upper.nats(picked).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, MAX_GRAD_NORM)
        self.optimizer.step()
        return loss.item()

    def score(self) -> None:
        """Note the scores of all rows."""
        scores = code_scores(*self.upper.scores())
        self.learned.diverged = not math.isfinite(scores["learned_bits"])
        if not self.learned.diverged:
            self.learned.notes.append({"step": self.step, **scores})
            self.bar.set_postfix_str(f"{scores['learned_bits'] / self.config.bits:.0%} learned")


def _epoch(config: CodeRun) -> int:
    """The steps in which every code is seen once."""
    return math.ceil(config.codes / config.batch_size)


def _score_steps(config: CodeRun) -> Iterator[int]:
    """Yield the steps after which all rows are scored: SPACING apart, and two epochs or more."""
    step = gap = 2 * _epoch(config)
    while step < config.steps:
        yield step
        step = max(step + gap, math.ceil(SPACING * step))
    yield config.steps


def _batches(config: CodeRun) -> Iterator[Tensor]:
    """Yield the numbers of the rows of each step, without end: one random order after another."""
    generator = torch.Generator().manual_seed(config.seed)
    size, waiting = min(config.batch_size, config.codes), torch.empty(0, dtype=torch.long)
    while True:
        if len(waiting) < size:
            waiting = torch.cat([waiting, torch.randperm(config.codes, generator=generator)])
        yield waiting[:size]
        waiting = waiting[size:]
