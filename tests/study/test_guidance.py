"""Guidance: equal budgets, what a cut holds, and the runs and cuts that the table is of."""

import pytest

from deltarank.spectra import truncate
from deltarank.study import guidance
from deltarank.study.cuts import cut_by_matrix
from deltarank.study.gains import captured_energy
from deltarank.study.guidance import allocations, guidance_table, lora_by_matrix
from deltarank.study.profiles import profile
from deltarank.study.runs import run, updates


@pytest.fixture
def full(small_task, store):
    """A small full run."""
    return run(profile().config("sentiment", steps=4, lr=1e-2))


def parameters(result, ranks):
    return sum(r * sum(result.shape(name)) for name, r in ranks.items())


def test_both_allocations_cost_the_same_and_guidance_holds_more(full):
    found = allocations(full, 3)
    assert set(found["uniform"].values()) == {3} and [*found["guided"]] == full.matrices
    uniform, guided = (parameters(full, found[name]) for name in ("uniform", "guided"))
    dearest = max(sum(full.shape(name)) for name in full.matrices)
    assert uniform - dearest < guided <= uniform
    assert len(set(found["guided"].values())) > 1
    assert captured_energy(full, found["guided"]) > captured_energy(full, found["uniform"])


def test_the_energy_held_is_that_of_the_cut(full):
    ranks = {name: 1 + i % 3 for i, name in enumerate(full.matrices)}
    dW = updates(full.config)
    kept = sum(truncate(dW[name], r).square().sum() for name, r in ranks.items())
    whole = sum(dW[name].square().sum() for name in ranks)
    assert captured_energy(full, ranks) == pytest.approx(float(kept / whole), rel=1e-5)


def test_a_lora_of_one_rank_has_no_pattern(full):
    names = full.matrices
    one = lora_by_matrix("sentiment", dict.fromkeys(names, 2), 2)
    assert one == profile().config("sentiment", "lora", rank=2)
    other = lora_by_matrix("sentiment", dict.fromkeys(names, 2) | {names[0]: 5}, 2)
    assert other.rank_pattern == ((names[0].removesuffix(".weight"), 5),) and other.rank == 2


def test_the_table_has_the_cut_and_the_lora_of_each_allocation(full, monkeypatch):
    monkeypatch.setattr(guidance, "tuned", lambda task: full.config)
    table = guidance_table(["sentiment"], 2)
    assert list(table.index) == [("sentiment", "uniform"), ("sentiment", "guided")]
    ranks = allocations(full, 2)["guided"]
    line = table.loc[("sentiment", "guided")]
    assert line["cut_loss"] == cut_by_matrix(full.config, ranks)["loss_nats"]
    assert line["lora_loss"] == run(lora_by_matrix("sentiment", ranks, 2)).loss()
    assert (line["lowest"], line["highest"]) == (min(ranks.values()), max(ranks.values()))
    assert table.loc[("sentiment", "uniform"), "highest"] == 2
