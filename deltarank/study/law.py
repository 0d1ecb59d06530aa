"""Law: the share of what data hold that a number of trained parameters keeps, by its load."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from deltarank.checks import require

DRAWS = 1000  # of the bootstrap


@dataclass(frozen=True)
class Law:
    """share = (1 + (load / capacity) ** sharpness) ** (-1 / sharpness); loads in bits a parameter.

    Of a small load all is kept, of a large one `capacity` bits a parameter; the higher the
    sharpness, the more sudden the change between them.
    """

    capacity: float
    sharpness: float

    def share(self, load: np.ndarray) -> np.ndarray:
        """The share that is kept of these loads.

        >>> Law(2.0, 50.0).share(np.array([0.2, 20.0])).round(3).tolist()
        [1.0, 0.1]
        """
        s = self.sharpness
        return np.exp(-np.logaddexp(0.0, s * np.log(load / self.capacity)) / s)

    def load(self, share: float) -> float:
        """The load of which this share is kept: the inverse of `share`.

        >>> law = Law(2.0, 3.0)
        >>> round(float(law.share(np.array([law.load(0.95)]))[0]), 6)
        0.95
        """
        return self.capacity * (share**-self.sharpness - 1) ** (1 / self.sharpness)


def fit_law(load: pd.Series, share: pd.Series) -> Law:
    """The law of least squares in the share.

    Raises ValueError for fewer than three points, and for loads that are not above 0 or not finite.
    """
    from scipy.optimize import least_squares

    require(len(load) >= 3, f"{len(load)} points: a law needs three or more")
    x, y = load.to_numpy(float), share.to_numpy(float)
    require(
        bool(np.isfinite(x * y).all() and (x > 0).all()),
        "loads must be above 0 and shares finite: leave out runs that diverged",
    )

    def away(logs: np.ndarray) -> np.ndarray:
        return Law(*np.exp(logs)).share(x) - y

    bounds = np.log([x.min() / 100, 0.1]), np.log([x.max() * 100, 100.0])
    start = math.log(max(float(np.median(x * y)), x.min() / 100)), 0.5
    found = least_squares(away, np.clip(start, *bounds), bounds=bounds)
    return Law(*map(float, np.exp(found.x)))


def capacity_interval(load: pd.Series, share: pd.Series, groups: pd.Series) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the law's capacity, over groups of points, seed 0.

    Points of one group (runs of one size, say) are drawn together (Efron 1979).  load, share and
    groups stand in one order.
    """
    rng, names = np.random.default_rng(0), groups.unique()
    of_group = {name: np.flatnonzero(groups == name) for name in names}
    found = []
    for picks in rng.integers(0, len(names), (DRAWS, len(names))):
        drawn = np.concatenate([of_group[names[i]] for i in picks])
        found.append(fit_law(load.iloc[drawn], share.iloc[drawn]).capacity)
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)


def law_table(points: Mapping[str, pd.DataFrame], share: float) -> pd.DataFrame:
    """The law of some sets of points, which have a load and a share each; a line a set.

    Columns: C, the capacity, with its capacity_interval over the points, low and high; s, the
    sharpness; "95 % kept up to", the load of which `share` is kept, by its name in %.
    """
    lines = {}
    for name, table in points.items():
        law = fit_law(table["load"], table["share"])
        each = pd.Series(range(len(table)), table.index)
        low, high = capacity_interval(table["load"], table["share"], each)
        line = {"C": law.capacity, "low": low, "high": high, "s": law.sharpness}
        lines[name] = line | {f"{share:.0%} kept up to".replace("%", " %"): law.load(share)}
    return pd.DataFrame(lines).T
