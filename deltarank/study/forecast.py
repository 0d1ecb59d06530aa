"""Forecasts: what rules say of the size that a task needs."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from deltarank.checks import require

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
    """What tasks with the measures `asked` need, by a line fitted to known tasks: see fit_line.

    A task that is known itself has no part in its own forecast.  Raises ValueError for a measure
    that is not above 0.

    >>> x = pd.Series({"a": 1.0, "b": 2.0, "c": 4.0})
    >>> forecast(x, 3 * x**2, pd.Series({"c": 4.0, "new": 8.0})).round(6).to_dict()
    {'c': 48.0, 'new': 192.0}
    """
    require(bool((asked > 0).all()), f"measures must be above 0, not {dict(asked)}")
    found = {}
    for task, value in asked.items():
        others = [known for known in measure.index if known != task]
        start, slope = fit_line(measure[others], needed[others])
        found[task] = math.exp(start + slope * math.log(value))
    return pd.Series(found)


def fit_line(measure: pd.Series, needed: pd.Series) -> tuple[float, float]:
    """The line log needed = a + b log measure of least squares, (a, b).

    Where all measures are the same, b is 0: it says the geometric mean of what is needed.  Raises
    ValueError for measures that are not above 0, and where there are none.
    """
    require(len(measure) > 0, "a line needs one known task or more")
    require(bool((measure > 0).all()), f"measures must be above 0, not {dict(measure)}")
    x, y = np.log(measure.to_numpy(float)), np.log(needed.to_numpy(float))
    if np.ptp(x) == 0:
        return float(y.mean()), 0.0
    [slope], *_ = np.linalg.lstsq((x - x.mean())[:, None], y - y.mean())
    return float(y.mean() - slope * x.mean()), float(slope)
