"""Shares of a fine-tune's gain: kept by a cut, reached by a LoRA, regained on the way."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from deltarank.spectra import common_energy, rank_measures
from deltarank.study.configs import GROWTH_ROWS
from deltarank.study.runs import Result


def gain_kept(value: float, base: float, full: float) -> float:
    """How far `value` goes from the base model's towards the full fine-tune's; NaN without a gain.

    >>> gain_kept(2.0, base=5.0, full=1.0)
    0.75
    """
    return (value - base) / (full - base) if full != base else float("nan")


def needed_rank(kept: pd.Series, share: float) -> float:
    """The rank from which on `kept`, a share of the gain by ascending rank, is `share` or more.

    Read off between two ranks of the grid, linearly over log r; inf where the last falls short.

    >>> needed_rank(pd.Series({1: 0.0, 4: 1.0, 16: 1.0}), 0.5)
    2.0
    """
    short = kept.index[~(kept >= share)]
    enough = kept.index[kept.index > short[-1]] if len(short) else kept.index
    if not len(enough):
        return math.inf
    if not len(short) or short[-1] < 1 or math.isnan(kept[short[-1]]):
        return float(enough[0])
    low, high = short[-1], enough[0]
    part = (share - kept[low]) / (kept[high] - kept[low])
    return float(low * (high / low) ** part)


def at_gain(run: Result, base: Result, share: float) -> dict[str, float]:
    """Where a full run had first regained `share` of its fall in loss: step, energy_8, r90.

    From its notes on the way, with the loss of GROWTH_ROWS rows of "valid", linearly between the
    last that falls short and the first that does not; medians over the matrices.  A share that
    the first note exceeds gives that note.  The runs must have scored as many rows (eval_rows).
    """
    start, end = (_growth_loss(result) for result in (base, run))
    last: dict = {"step": run.config.steps, "loss_nats": end}
    last |= pd.DataFrame(rank_measures(S) for S in run.spectra.values()).to_dict("list")
    notes = [
        {
            "kept": gain_kept(note["loss_nats"], start, end),
            "step": note["step"],
            "energy_8": float(np.median(note["energy_8"])),
            "r90": float(np.median(note["r90"])),
        }
        for note in [*run.record["growth"], last]
    ]
    first = next(i for i, note in enumerate(notes) if note["kept"] >= share)
    before, after = notes[max(first - 1, 0)], notes[first]
    way = (share - before["kept"]) / (after["kept"] - before["kept"]) if first else 0.0
    return {name: before[name] + way * (after[name] - before[name]) for name in after}


def _growth_loss(result: Result) -> float:
    """The loss of the rows that notes on the way are of, in nats a token."""
    scores = result.record["evaluation"]["valid"]
    nats, tokens = (sum(scores[f"row_{what}"][:GROWTH_ROWS]) for what in ("nats", "tokens"))
    return nats / tokens


def captured_energy(result: Result, rank: int) -> float:
    """Share of the squared update of all matrices together that their cut to `rank` keeps."""
    return common_energy(result.spectra.values(), rank)
