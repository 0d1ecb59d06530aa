"""Trials: the settings of a method, tried one after another, as many for each method alike."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from deltarank.checks import require
from deltarank.study.configs import RunConfig
from deltarank.study.profiles import profile
from deltarank.study.runs import Result, run

RATE_STEP = math.sqrt(10)
KNOB_STEP = 8.0  # of a scale or another knob, as between the two alphas of the report
Setting = tuple[float, int]  # steps of the rate and of the knob away from the centre


@dataclass(frozen=True)
class Method:
    """A method of fine-tuning: what its documentation recommends, and what it lets one tune.

    fields: of RunConfig, by size; a size is that of a LoRA of so high a rank.  knob: the field
    that is tuned beside the rate, if any.
    """

    lr: float
    fields: dict[int, dict]
    knob: str = ""

    def at(self, task: str, size: int, setting: Setting, *, seed: int) -> RunConfig:
        """The run of a setting.  Raises ValueError for a size that the method does not have."""
        sizes = ", ".join(map(str, self.fields))
        require(size in self.fields, f"size={size}: the method has the sizes {sizes}")
        fields, (rate, knob) = dict(self.fields[size]), setting
        if knob:
            fields[self.knob] = _rounded(fields[self.knob] * KNOB_STEP**knob)
        lr = _rounded(self.lr * RATE_STEP**rate)
        return profile().config(task, **fields, lr=lr, seed=seed)


def _rounded(value: float) -> float:
    """To two digits.

    >>> _rounded(1e-4 * RATE_STEP)
    0.00032
    """
    return float(f"{value:.2g}")


def _by_size(method: str, ranks: Sequence[int], **fields: Callable[[int], float]) -> dict:
    """The fields of the sizes 1 and 8 (or of the first only), whose values go by the rank."""
    return {
        size: {"method": method, "rank": rank} | {name: of(rank) for name, of in fields.items()}
        for size, rank in zip((1, 8), ranks, strict=False)
    }


def _twice(rank: int) -> float:
    """PEFT's usual alpha."""
    return 2.0 * rank


# Centres: the settings of PEFT's own benchmark (method_comparison/MetaMathQA at 5d602fd, where a
# method without a rate of its own has 1e-4); LoRA+ and PiSSA are not in it and have those of
# PEFT's pages on them.  Ranks: those whose number of parameters is next to that of the LoRA; VeRA
# would need factors of rank 14,080 for the larger size.
METHODS = {
    "full": Method(1e-5, {size: {"method": "full"} for size in (1, 8)}),
    "LoRA": Method(1e-4, _by_size("lora", (1, 8), alpha=_twice), "alpha"),
    "rsLoRA": Method(
        1e-4, {8: {"method": "lora", "rank": 8, "alpha": 8.0, "rslora": True}}, "alpha"
    ),
    "LoRA+": Method(
        5e-5, _by_size("loraplus", (1, 8), alpha=_twice, knob=lambda rank: 16.0), "knob"
    ),
    "DoRA": Method(1e-4, _by_size("dora", (1, 8), alpha=_twice), "alpha"),
    "PiSSA": Method(2e-5, _by_size("pissa", (1, 8), alpha=float), "alpha"),
    "HiRA": Method(4.5e-3, _by_size("hira", (1, 8))),
    "MiSS": Method(1e-4, _by_size("miss", (2, 16))),
    "OFT": Method(1e-4, _by_size("oft", (4, 32))),
    "RandLoRA": Method(
        1e-4, _by_size("randlora", (256, 22), alpha=lambda rank: 20.0 * rank), "alpha"
    ),
    "SHiRA": Method(3e-4, _by_size("shira", (1, 8))),
    "VeRA": Method(1e-3, _by_size("vera", (896,), knob=lambda rank: 0.1), "knob"),
}


def trials(task: str, method: str, size: int) -> list[Result]:
    """The runs of a method's first settings, in the order in which they were tried.

    As many as the profile's `trials`, each with the first seed; runs what is not stored.  A
    setting is better by its lowest held-out loss (split "valid"); one that diverged is the worst.
    """
    seed, tried = profile().seeds[0], dict[Setting, Result]()
    while len(tried) < profile().trials:
        setting = _next({at: _held_out(result) for at, result in tried.items()}, method)
        tried[setting] = run(METHODS[method].at(task, size, setting, seed=seed))
    return list(tried.values())


def _held_out(result: Result) -> float:
    """The loss that chooses."""
    return result.loss("valid") if result.status == "finished" else math.inf


def _next(losses: dict[Setting, float], method: str) -> Setting:
    """The setting to try after these, one rule for all methods.

    The centre first.  Then the rate goes up from the best setting or, where that was no better,
    down, until both neighbours are tried; then the knob, of a method that has one, and at last the
    rate in half the steps.  Of equals, as of those that diverged, the lowest rate is the best.
    """
    if not losses:
        return 0.0, 0
    best = min(losses, key=lambda at: (losses[at], at))
    return next(setting for setting in _around(best, method) if setting not in losses)


def _around(best: Setting, method: str) -> Iterator[Setting]:
    """Yield the settings near one, those to be tried first before others."""
    rate, knob = best
    for step in (1, -1):
        yield rate + step, knob
    if METHODS[method].knob:
        for step in (1, -1):
            yield rate, knob + step
    for part in range(2, 12):
        for sign in (1, -1):
            yield rate + sign / part, knob


def chosen(results: Sequence[Result], *, seed: int) -> RunConfig:
    """The setting of the lowest held-out loss, with another seed.

    Where all diverged, that of the lowest rate.
    """
    best = min(results, key=lambda result: (_held_out(result), result.config.lr))
    return dataclasses.replace(best.config, seed=seed)
