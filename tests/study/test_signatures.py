"""Signatures: each optimizer at its best rate, compared at equal loss; first steps, a variance."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch

from deltarank.spectra import rank_measures
from deltarank.study.gains import growth_loss
from deltarank.study.gradients import first_gradients
from deltarank.study.models import load_model, matrices
from deltarank.study.overlaps import mean_overlap
from deltarank.study.plan import cut_until
from deltarank.study.profiles import profile
from deltarank.study.runs import run
from deltarank.study.signatures import (
    ADAMW,
    at_equal_loss,
    cuts_table,
    first_steps,
    lora_configs,
    optimizer_configs,
    second_seed,
    shared_directions,
    tried_table,
    variance_shares,
    without_skill,
)
from deltarank.study.tables import cut_gains


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
    found = lora_configs("facts")
    assert {name: (c.optimizer, c.rank, c.lr) for name, c in found.items()} == {
        ADAMW: (ADAMW, 4, 1e-2),
        "muon": ("muon", 4, 1e-2),
    }


def test_updates_are_compared_where_each_comes_down_to_the_worst_last_loss(store):
    seed = second_seed()
    table = at_equal_loss("facts", seed=seed)
    runs = {name: run(config) for name, config in optimizer_configs("facts", seed=seed).items()}
    assert {result.config.seed for result in runs.values()} == {100}
    assert set(table.index) <= set(runs) and len(table) >= 3
    shared = max(growth_loss(runs[name]) for name in table.index)
    worst = table["step"] == profile().steps
    assert table["gained"].nunique() == 1 and table["gained"].max() <= 1
    assert (table["loss_nats"] <= shared + 1e-9).all()  # less where the first note has less
    assert table.loc[worst, "loss_nats"].max() == pytest.approx(shared)


def test_second_runs_are_cut_compared_and_set_against_permuted_answers(store):
    configs, cuts = optimizer_configs("facts", seed=second_seed()), cuts_table(0.95)
    assert [*cuts["optimizer"].unique()] == [*configs]
    for name, found in cuts.groupby("optimizer"):
        expected = cut_gains(configs[name], cut_until(configs[name], 0.95))
        assert found.drop(columns="optimizer").equals(expected)
    assert cuts["seed"].unique() == [100]

    shared = shared_directions("facts")
    assert len(shared) == 4 * 3 / 2 + 4
    muon = configs["muon"]
    first = dataclasses.replace(muon, seed=profile().seeds[0])
    assert shared.loc[("muon", "muon")].equals(mean_overlap(first, muon).rename(("muon", "muon")))
    at = dataclasses.replace(configs[ADAMW], seed=0), dataclasses.replace(configs[ADAMW], seed=1)
    assert shared.loc[(ADAMW, ADAMW), 1] == mean_overlap(*at)[1]
    assert shared.loc[(ADAMW, "sign"), 1] == mean_overlap(configs[ADAMW], configs["sign"])[1]

    table = without_skill("facts")
    wrong = run(dataclasses.replace(muon, permuted=True))
    assert table.loc["muon", "loss_nats"] == wrong.loss() != run(muon).loss()
    ranks = [rank_measures(S)["r90"] for S in wrong.spectra.values()]
    assert table.loc["muon", "permuted"] == np.median(ranks)


def test_what_was_tried_is_told_of_each_optimizer(store):
    table = tried_table()
    assert [*table.index] == [("facts", name) for name in optimizer_configs("facts")]
    assert (table["tried"] == 2).all()
    assert (table["half_least"] <= table["half_most"]).all() and table["half_least"].min() >= 1
    assert table.loc[("facts", ADAMW), "loss_nats"] == run(optimizer_configs("facts")[ADAMW]).loss()


def test_a_first_step_of_descent_has_the_ranks_of_the_gradient_and_muons_is_flat(store):
    base = profile().config("facts", "base")
    ranks, G = first_steps(base)
    gradient = first_gradients(base)
    assert ranks["sgd_momentum"] == pytest.approx(gradient["r90"], abs=1)
    assert min(torch.tensor(ranks["muon"]) - torch.tensor(ranks["sgd_momentum"])) > 0
    shapes = {tuple(W.shape) for W in matrices(load_model(base.model)).values()}
    assert tuple(G.shape) in shapes and G.numel() == min(m * n for m, n in shapes)


def test_a_variance_is_split_among_rows_columns_and_neither():
    rng = np.random.default_rng(0)
    a, b, e = rng.normal(size=(4, 1)), rng.normal(size=(1, 5)), rng.normal(size=(4, 5))
    e -= e.mean(0) + e.mean(1, keepdims=True) - e.mean()
    shares = variance_shares(pd.DataFrame(a + b + e))
    parts = {"rows": a - a.mean(), "columns": b - b.mean(), "neither": e}
    sums = {name: np.broadcast_to(part, (4, 5)).var() for name, part in parts.items()}
    expected = {name: part / sum(sums.values()) for name, part in sums.items()}
    assert shares == pytest.approx(expected)
