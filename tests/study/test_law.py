"""The law: its two ends, its inverse, a fit that finds what was planted, and its interval."""

import math

import numpy as np
import pandas as pd
import pytest

from deltarank.study import law
from deltarank.study.law import Law, capacity_interval, fit_law, law_table

LOADS = pd.Series([0.05, 0.2, 0.5, 1.0, 2.0, 5.0, 20.0])


@pytest.mark.parametrize("sharpness", [0.5, 2.0, 30.0])
def test_a_small_load_is_kept_and_a_large_one_fills_the_capacity(sharpness):
    shares = Law(2.0, sharpness).share(np.array([1e-9, 1e9]))
    assert shares[0] == pytest.approx(1, abs=1e-3)
    assert shares[1] * 1e9 == pytest.approx(2.0, rel=1e-3)
    assert np.all(np.diff(Law(2.0, sharpness).share(LOADS.to_numpy())) <= 0)


@pytest.mark.parametrize(("capacity", "sharpness"), [(0.7, 1.0), (2.0, 3.0), (3.6, 8.0)])
def test_a_planted_law_is_found(capacity, sharpness):
    planted = Law(capacity, sharpness)
    found = fit_law(LOADS, pd.Series(planted.share(LOADS.to_numpy())))
    assert found.capacity == pytest.approx(capacity, rel=1e-3)
    assert found.sharpness == pytest.approx(sharpness, rel=1e-2)
    assert found.share(np.array([found.load(0.9)]))[0] == pytest.approx(0.9)


def test_no_law_beside_the_one_that_is_found_is_closer_to_the_points():
    shares, loads = np.array([1.0, 0.9, 0.8, 0.5, 0.4, 0.1, 0.02]), LOADS.to_numpy()
    found = fit_law(LOADS, pd.Series(shares))

    def away(capacity, sharpness):
        """The sum of the squared errors in the share."""
        law = Law(capacity * found.capacity, sharpness * found.sharpness)
        return ((law.share(loads) - shares) ** 2).sum()

    for by in (0.98, 1.02):
        assert away(1, 1) < away(by, 1) and away(1, 1) < away(1, by)


def test_two_points_are_no_law():
    with pytest.raises(ValueError, match="2 points: a law needs three"):
        fit_law(LOADS[:2], LOADS[:2])


def test_points_that_have_no_law_are_named():
    for loads, shares in ((LOADS - 1, LOADS), (LOADS, LOADS * np.nan)):
        with pytest.raises(ValueError, match="loads must be above 0 and shares finite"):
            fit_law(loads, shares)


def test_shares_below_zero_are_fitted():
    """Codes of which nothing was learned have fewer bits than none."""
    found = fit_law(LOADS, pd.Series([1.0, 0.9, -0.1, -0.2, -0.1, -0.3, -0.3]))
    assert 0 < found.capacity < 1


def test_the_interval_is_over_groups_and_holds_what_was_planted(monkeypatch):
    monkeypatch.setattr(law, "DRAWS", 50)
    points = pd.concat([LOADS.to_frame("load").assign(size=c) for c in (1.0, 1.5, 2.0)])
    points = points.reset_index(drop=True)
    share = pd.concat([pd.Series(Law(c, 3.0).share(LOADS.to_numpy())) for c in (1.0, 1.5, 2.0)])
    share = share.reset_index(drop=True)
    low, high = capacity_interval(points["load"], share, points["size"])
    assert 0.99 < low < 1.4 < high < 2.01
    assert capacity_interval(points["load"], share, points["size"]) == (low, high), "seeded"
    alike = points.assign(share=share).set_index(pd.Index([0] * len(points)))  # one label for all
    again = capacity_interval(alike["load"], alike["share"], alike["size"])
    assert again == (low, high), "by place, not by label"
    one = points[points["size"] == 1.5]
    same = capacity_interval(one["load"], share[one.index], one["size"])
    assert same == pytest.approx((1.5, 1.5), rel=1e-3), "one group has no spread"


def test_the_interval_holds_95_percent_of_the_draws(monkeypatch):
    """Of a mean in a capacity's place it is the normal one: 1.96 standard errors to both sides."""
    monkeypatch.setattr(law, "fit_law", lambda load, share: Law(load.mean(), 1.0))
    loads = pd.Series(np.random.default_rng(0).normal(size=400))
    ends = capacity_interval(loads, loads, pd.Series(range(400)))
    error, mean = loads.std() / math.sqrt(400), loads.mean()
    expected = (mean - 1.96 * error, mean + 1.96 * error)
    assert ends == pytest.approx(expected, abs=0.2 * error)


def test_a_table_has_a_line_a_set_of_runs(monkeypatch):
    monkeypatch.setattr(law, "DRAWS", 20)
    planted = {"small": Law(1.0, 3.0), "large": Law(2.0, 3.0)}
    sets = {n: pd.DataFrame({"load": LOADS, "share": x.share(LOADS)}) for n, x in planted.items()}
    table = law_table(sets, 0.9)
    for name, x in planted.items():
        low, high = capacity_interval(LOADS, sets[name]["share"], LOADS)
        expected = [x.capacity, low, high, x.sharpness, x.load(0.9)]
        assert table.loc[name].tolist() == pytest.approx(expected, rel=1e-2)
    assert [*table] == ["C", "low", "high", "s", "90 % kept up to"]
