"""Forecasts: fitted without the task that they are of, and costed by what was trained."""

import math

import numpy as np
import pandas as pd
import pytest

from deltarank.study.forecast import fit_line, forecast, middle_of, rank_by_rows


@pytest.mark.parametrize(
    ("rows", "rank"), [(1, 8), (999, 8), (9_999, 16), (10_000, 32), (99_999, 32), (100_000, 64)]
)
def test_the_table_by_rows(rows, rank):
    assert rank_by_rows(rows) == rank


def test_a_task_has_no_part_in_its_own_forecast():
    rng = np.random.default_rng(0)
    measure, needed = (pd.Series(np.exp(rng.normal(size=6)), list("abcdef")) for _ in range(2))
    before = forecast(measure, needed, measure)
    for task in measure.index:
        changed = needed.copy()
        changed[task] *= 1000
        after = forecast(measure, changed, measure)
        assert after[task] == pytest.approx(before[task])
        assert not np.allclose(after.drop(task), before.drop(task))


def test_it_is_the_line_of_least_squares_through_the_others():
    rng = np.random.default_rng(1)
    measure, needed = (pd.Series(np.exp(rng.normal(size=7))) for _ in range(2))
    slope, start = np.polyfit(np.log(measure[1:]), np.log(needed[1:]), 1)
    assert forecast(measure, needed, measure)[0] == pytest.approx(
        math.exp(start + slope * math.log(measure[0]))
    )


def test_a_measure_that_tells_nothing_says_the_mean_of_the_others():
    same = pd.Series([8, 8, 8]), pd.Series([5.0, 10.0, 1000.0])
    assert forecast(*same, same[0])[0] == pytest.approx(100)
    assert fit_line(pd.Series([12.3] * 11), pd.Series(range(1, 12)))[1] == 0


def test_what_has_no_logarithm_is_named():
    some = pd.Series([1.0, 2.0])
    for measure, asked in ((some, -some), (some - 1, some)):
        with pytest.raises(ValueError, match="measures must be above 0"):
            forecast(measure, some, asked)
    with pytest.raises(ValueError, match="one known task or more"):
        forecast(some[:1], some[:1], some[:1])


def test_a_bracket_without_an_end_has_one():
    assert middle_of(0, 16, least=16, most=1000) == pytest.approx(math.sqrt(8 * 16))
    assert middle_of(1000, math.inf, least=16, most=1000) == pytest.approx(math.sqrt(2) * 1000)
