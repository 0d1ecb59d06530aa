"""Forecasts: what rules say of the size that a task needs, and what it costs to follow them."""

from __future__ import annotations

import math

import pandas as pd

# Rank by rows of training data: the proposal of axolotl's pull request 3691 (May 2026).
RANK_BY_ROWS = {1_000: 8, 10_000: 16, 100_000: 32}


def rank_by_rows(rows: int) -> int:
    """The rank that a table proposes for so many training rows: that of the first bound above them.

    >>> rank_by_rows(960), rank_by_rows(1_000), rank_by_rows(1_000_000)
    (8, 16, 64)
    """
    return next((rank for bound, rank in RANK_BY_ROWS.items() if rows < bound), 64)


def middle_of(above: float, enough: float, *, least: float, most: float) -> float:
    """One number for a needed size that is known to lie between two: their geometric mean.

    A bracket without a lower end begins at least / 2, and one without an upper end ends at 2 most.

    >>> middle_of(100, 400, least=16, most=1e6), middle_of(0, 16, least=32, most=1e6)
    (200.0, 16.0)
    """
    return math.sqrt(max(above, least / 2) * min(enough, 2 * most))


def forecast(measure: pd.Series, needed: pd.Series, asked: pd.Series) -> pd.Series:
    """What other tasks' measures, `asked`, say that they need, by a line fitted to known tasks.

    log needed = a + b log measure, by least squares; all by task, above 0.  A measure that is the
    same for all known tasks predicts the geometric mean of what they need.

    >>> x = pd.Series([1.0, 2.0, 4.0])
    >>> forecast(x, 3 * x**2, pd.Series({"new": 8.0})).round(6).to_dict()
    {'new': 192.0}
    """
    x, y = measure.map(math.log), needed.map(math.log)
    spread = ((x - x.mean()) ** 2).sum()
    slope = ((x - x.mean()) * y).sum() / spread if spread else 0.0
    return (y.mean() + slope * (asked.map(math.log) - x.mean())).map(math.exp)


def left_out(measure: pd.Series, needed: pd.Series) -> pd.Series:
    """What each task's measure says it needs, by the forecast of the other tasks alone."""
    parts = (
        forecast(measure.drop(task), needed.drop(task), measure.loc[[task]])
        for task in measure.index
    )
    return pd.concat(parts)


def cost_of(size: float, nats: pd.Series) -> dict[str, float]:
    """What it costs to train the smallest adapter that has `size` numbers or more.

    nats: held-out loss by number of trained parameters, ascending.  Returns parameters, those of
    the adapter, the largest where none has as many; and lost, its loss above the lowest of all.

    >>> cost_of(50, pd.Series({16: 1.5, 128: 1.25, 1024: 1.0}))
    {'parameters': 128, 'lost': 0.25}
    """
    taken = next((count for count in nats.index if count >= size), nats.index[-1])
    return {"parameters": int(taken), "lost": float(nats[taken] - nats.min())}
