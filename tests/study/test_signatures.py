"""Signatures: each optimizer at its best rate, compared at equal loss; shares of a variance."""

import numpy as np
import pandas as pd
import pytest

from deltarank.study.gains import growth_loss
from deltarank.study.profiles import profile
from deltarank.study.runs import run
from deltarank.study.signatures import (
    ADAMW,
    at_equal_loss,
    lora_by_optimizer,
    optimizer_configs,
    variance_shares,
)


@pytest.fixture
def tried(losses):
    """Held-out losses by rate: of AdamW and its like best at 1e-3, of momentum at 1."""
    losses |= {(0, 1e-4): 2, (0, 1e-3): 1, (0, 0.1): 2, (0, 1.0): 1}
    losses |= {(4, 1e-3): 2, (4, 1e-2): 1}
    return losses


def test_each_optimizer_takes_its_best_rate_of_its_own_grid(tried):
    found = optimizer_configs("facts")
    assert {name: config.lr for name, config in found.items()} == {
        ADAMW: 1e-3,
        "muon": 1e-3,
        "sign": 1e-3,
        "sgd_momentum": 1.0,
    }
    assert all(config.optimizer == name for name, config in found.items())
    assert found[ADAMW] == profile().config("facts", lr=1e-3), "the report's own run"


def test_the_factors_of_a_lora_are_trained_by_muon_too(tried):
    found = lora_by_optimizer("facts")
    assert {name: (c.optimizer, c.rank, c.lr) for name, c in found.items()} == {
        ADAMW: (ADAMW, 4, 1e-2),
        "muon": ("muon", 4, 1e-2),
    }


def test_updates_are_compared_where_each_comes_down_to_the_worst_last_loss(store):
    table = at_equal_loss("facts")
    runs = {name: run(config) for name, config in optimizer_configs("facts").items()}
    assert set(table.index) <= set(runs) and len(table) >= 3
    shared = max(growth_loss(runs[name]) for name in table.index)
    worst = table["step"] == profile().steps
    assert (table["loss_nats"] <= shared + 1e-9).all()  # less where the first note has less
    assert table.loc[worst, "loss_nats"].max() == pytest.approx(shared)


def test_a_variance_is_split_among_rows_columns_and_neither():
    rng = np.random.default_rng(0)
    a, b, e = rng.normal(size=(4, 1)), rng.normal(size=(1, 5)), rng.normal(size=(4, 5))
    e -= e.mean(0) + e.mean(1, keepdims=True) - e.mean()
    shares = variance_shares(pd.DataFrame(a + b + e))
    parts = {"rows": a - a.mean(), "columns": b - b.mean(), "neither": e}
    sums = {name: np.broadcast_to(part, (4, 5)).var() for name, part in parts.items()}
    expected = {name: part / sum(sums.values()) for name, part in sums.items()}
    assert shares == pytest.approx(expected)
