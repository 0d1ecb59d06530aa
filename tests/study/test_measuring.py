"""Measured runs: updates, spectra and growth, against weights, float64 SVD and PEFT."""

import dataclasses
import json

import pytest
import torch

from deltarank.study.measuring import measure
from deltarank.study.models import TINY, load_model, matrices
from deltarank.study.profiles import profile
from deltarank.study.runs import run, updates
from deltarank.study.tables import spectra_table
from deltarank.study.tasks import task_sha256
from deltarank.study.training import prepare, train


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """A function that measures a configuration in a cache of its own; returns dW as well."""
    runs = []

    def measured(config):
        monkeypatch.setenv("LOWRANK_CACHE", str(tmp_path / f"cache{len(runs)}"))
        runs.append(config)
        return (*measure(config), updates(config))

    return measured


def test_a_seed_determines_every_byte_of_the_update(trained, config):
    first, again = trained(config)[2], trained(config)[2]
    other = trained(dataclasses.replace(config, seed=1))[2]
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in matrices(load_model(TINY)))


def test_updates_are_the_tuned_weights_minus_the_base(trained, config):
    dW = trained(config)[2]
    base, tuned = load_model(config.model), prepare(config)
    train(config, tuned)
    W0, W1 = (dict(model.named_parameters()) for model in (base, tuned))
    assert dW.keys() == {name for name, p in W1.items() if p.requires_grad}
    assert all(torch.equal(dW[name], (W1[name] - W0[name]).detach()) for name in dW)


def test_spectra_and_norms_are_those_of_the_updates(trained, config):
    record, spectra, dW = trained(config)
    for name, S in spectra.items():
        oracle = torch.linalg.svdvals(dW[name].double())
        assert torch.allclose(S.double(), oracle, atol=float(1e-6 * oracle[0]))
        assert record["shapes"][name] == list(dW[name].shape)
    norms = record["squared_norms"]
    assert norms["matrices"] == pytest.approx(
        sum(float(S.square().sum()) for S in spectra.values())
    )
    total = sum(float(update.double().square().sum()) for update in dW.values())
    assert sum(norms.values()) == pytest.approx(total)
    assert norms["rest"] > 0


@pytest.mark.parametrize("method", ["full", "lora"])
def test_an_unchanged_model_has_a_zero_spectrum(store, method):
    still = {"steps": 1, "lr": 1e-300, "eval_rows": 4}  # below what float32 can add
    still |= {"method": "lora", "rank": 2} if method == "lora" else {}
    sizes = profile()
    record, spectra = measure(sizes.config("sentiment", **still))
    base, _ = measure(sizes.config("sentiment", "base", eval_rows=4))
    assert len(spectra) == 14
    assert all(not S.any() for S in spectra.values())
    loss, expected = (r["evaluation"]["test"]["loss_nats"] for r in (record, base))
    assert loss == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("rslora", [False, True])
def test_lora_spectra_are_those_of_pefts_own_update(store, rslora):
    from peft.tuners.lora import LoraLayer

    config = profile().config(
        "sentiment", "lora", rank=4, rslora=rslora, steps=3, eval_rows=4, lr=1e-2
    )
    _, spectra = measure(config)
    dW = updates(config)
    model = prepare(config)
    train(config, model)
    layers = {
        f"{n}.weight": m
        for n, m in model.get_base_model().named_modules()
        if isinstance(m, LoraLayer)
    }
    delta = {name: layer.get_delta_weight("default").detach() for name, layer in layers.items()}
    W0 = matrices(load_model(config.model))
    merged = matrices(model.merge_and_unload())
    assert spectra.keys() == dW.keys() == delta.keys() == W0.keys()
    for name, S in spectra.items():
        by_delta = torch.linalg.svdvals(delta[name].double())
        by_merge = torch.linalg.svdvals((merged[name] - W0[name]).detach().double())
        assert S.shape == (4,)
        assert S[0] > 0
        assert torch.allclose(dW[name], delta[name], rtol=1e-5, atol=1e-9)
        assert torch.allclose(S.double(), by_delta[:4], atol=float(1e-5 * by_delta[0]))
        assert torch.allclose(S.double(), by_merge[:4], atol=float(1e-3 * by_merge[0]))


@pytest.mark.parametrize("trained_embedding", [False, True])
def test_the_embedding_is_trained_when_asked_only(trained, config, trained_embedding):
    config = dataclasses.replace(config, train_embedding=trained_embedding)
    record, spectra, dW = trained(config)
    moved = [name for name in dW if "embed" in name]
    assert bool(moved) == trained_embedding
    assert all(dW[name].any() for name in moved)
    assert (record["squared_norms"]["embedding"] > 0) == trained_embedding
    assert len(spectra) == 14


def test_growth_is_what_a_shorter_run_ends_with(store):
    """At a constant learning rate the first half of a run is the run of half as many steps."""
    sizes = profile()
    whole, half = (
        run(sizes.config("sentiment", steps=steps, schedule="constant", eval_rows=64))
        for steps in (8, 4)
    )
    assert [growth["step"] for growth in whole.record["growth"]] == [1, 2, 4]
    found = whole.record["growth"][-1]
    table = spectra_table([half]).set_index("name").loc[list(half.record["shapes"])]
    for column in ("energy_8", "r90", "entropy_rank", "stable_rank"):
        assert found[column] == pytest.approx(table[column].tolist(), abs=1e-4)
    assert found["loss_nats"] == pytest.approx(
        sum(half.record["evaluation"]["valid"]["row_nats"][:64])
        / sum(half.record["evaluation"]["valid"]["row_tokens"][:64]),
        abs=1e-4,
    )


def test_a_lora_takes_ranks_by_matrix(store):
    config = profile().config("facts", "lora", rank=2, steps=1)
    config = dataclasses.replace(config, rank_pattern=(("model.layers.0.mlp.up_proj", 5),))
    spectra = run(config).spectra
    lengths = {name: len(S) for name, S in spectra.items()}
    assert lengths.pop("model.layers.0.mlp.up_proj.weight") == 5
    assert set(lengths.values()) == {2}


def test_a_record_holds_what_a_reader_needs(config):
    record = run(config).record
    assert record["config"] == json.loads(json.dumps(config.recipe))
    assert record["identity"] == json.loads(json.dumps(config.identity))
    assert record["identity"]["task_sha256"] == task_sha256("sentiment")
    assert {"torch", "transformers", "peft", "device", "commit"} <= record["provenance"].keys()
    assert len(record["train_loss_nats"]) == config.steps
