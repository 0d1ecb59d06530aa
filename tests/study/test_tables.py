"""Statistics over runs: bootstrap intervals."""

import pytest
from matrices import gaussian

from deltarank.study.tables import bootstrap_interval


def test_bootstrap_interval_covers_the_mean_of_normal_data():
    values = gaussian(400)
    low, high = bootstrap_interval(values.tolist())
    mean, error = float(values.mean()), float(values.std()) / 20
    assert low == pytest.approx(mean - 1.96 * error, abs=0.3 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.3 * error)


def test_bootstrap_interval_leaves_out_missing_values():
    assert bootstrap_interval([2.0, None, 2.0]) == (2.0, 2.0)
