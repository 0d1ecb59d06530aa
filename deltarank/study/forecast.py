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


def left_out(measure: pd.Series, needed: pd.Series) -> pd.Series:
    """What each task's measure says it needs, by a line fitted to the other tasks alone.

    log needed = a + b log measure, by least squares; both by task, above 0.  A measure that is the
    same for all others predicts their geometric mean.

    >>> x = pd.Series([1.0, 2.0, 4.0, 8.0])
    >>> left_out(x, 3 * x**2).round(6).tolist()
    [3.0, 12.0, 48.0, 192.0]
    """
    x, y = measure.map(math.log), needed.map(math.log)

    def predicted(task) -> float:
        u, v = x.drop(task), y.drop(task)
        spread = ((u - u.mean()) ** 2).sum()
        slope = ((u - u.mean()) * v).sum() / spread if spread else 0.0
        return math.exp(v.mean() + slope * (x[task] - u.mean()))

    return pd.Series({task: predicted(task) for task in measure.index})


def cost_of(size: float, nats: pd.Series) -> dict[str, float]:
    """What it costs to train the smallest adapter that has `size` numbers or more.

    nats: held-out loss by number of trained parameters, ascending.  Returns parameters, those of
    the adapter, the largest where none has as many; and lost, its loss above the lowest of all.

    >>> cost_of(50, pd.Series({16: 1.5, 128: 1.25, 1024: 1.0}))
    {'parameters': 128, 'lost': 0.25}
    """
    taken = next((count for count in nats.index if count >= size), nats.index[-1])
    return {"parameters": int(taken), "lost": float(nats[taken] - nats.min())}
