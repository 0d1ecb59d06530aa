"""Tables of runs: one line a run or matrix, kept in the store."""

import dataclasses

import pandas as pd
import pytest
import torch
from small_runs import Q

from deltarank.spectra import null_energy
from deltarank.study import tables
from deltarank.study.profiles import PROFILES, profile
from deltarank.study.runs import Result, run
from deltarank.study.tables import finer_table, keep_table, runs_table, spectra_table


def test_tables_have_one_line_a_run_and_one_a_matrix(config):
    results = [run(config)]
    table, spectra = runs_table(results), spectra_table(results)
    assert table[["task", "method", "seed", "status"]].values.tolist() == [
        ["sentiment", "full", 0, "finished"]
    ]
    assert table["loss_nats"].tolist() == [results[0].loss()]
    assert len(spectra) == 14
    row = spectra.set_index("name").loc[Q]
    S = results[0].spectra[Q].double()
    share = S.square() / S.square().sum()
    assert row["energy_8"] == pytest.approx(float(share[:8].sum()))
    assert row["r90"] == int((share.cumsum(0) < 0.9).sum()) + 1
    assert row["stable_rank"] == pytest.approx(float(1 / share[0]))
    assert (row["layer"], row["module"], row["shape"]) == (0, "q_proj", (32, 32))
    assert row["excess_8"] == pytest.approx(row["energy_8"] - float(null_energy((32, 32))[7]))


def test_a_kept_table_is_computed_once(store):
    calls = []

    def compute():
        calls.append(1)
        table = pd.DataFrame({"name": ["a"], "r90": [3], "shape": [(3, 4)], "S": [torch.ones(3)]})
        table.attrs = {"rest": {"norm": 0.5}}
        return table

    first, second = keep_table("t", compute), keep_table("t", compute)
    assert calls == [1] and second.attrs["rest"] == {"norm": 0.5}
    assert first.drop(columns="S").equals(second.drop(columns="S"))
    assert second[["name", "r90", "shape"]].values.tolist() == [["a", 3, (3, 4)]]
    assert torch.equal(first["S"][0], torch.ones(3)) and torch.equal(second["S"][0], torch.ones(3))


def test_a_kept_table_without_spectra_is_computed_once_too(store):
    table = pd.DataFrame({"seed": [0, 1], "gain": [0.5, 0.25]})
    assert keep_table("t", lambda: table).equals(table)
    assert keep_table("t", lambda: pytest.fail("computed again")).equals(table)


def test_a_finer_rate_has_mean_and_ends_over_its_seeds(monkeypatch):
    fine = dataclasses.replace(PROFILES["smoke"], fine_tasks=("facts",))
    monkeypatch.setitem(PROFILES, "smoke", fine)

    def found(task, method, *, rank):
        for lr, seed, nats in [(2e-3, 0, 1.0), (2e-3, 1, 2.0), (1e-3, 0, 5.0)]:
            config = profile().config(task, method, rank=rank, lr=lr, seed=seed)
            scores = {"valid": {"loss_nats": nats}, "test": {"loss_nats": 9, "score": 10 * nats}}
            record = {"status": "finished", "evaluation": scores}
            yield Result(config, record | {"provenance": {"train_seconds": 1}})

    monkeypatch.setattr(tables, "lr_search", found)
    table = finer_table("lora", (1, 4))
    rates = [(1, 2e-3), (1, 1e-3), (4, 2e-3), (4, 1e-3)]
    assert [*table.index] == [("facts", *pair) for pair in rates]
    assert table["nats"].loc["facts", 4, 2e-3].to_dict() == {"mean": 1.5, "min": 1.0, "max": 2.0}
    assert table["score"].loc["facts", 1, 1e-3].tolist() == [50.0] * 3
