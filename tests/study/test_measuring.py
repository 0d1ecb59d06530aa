"""Measured runs: updates, spectra and growth, against weights, float64 SVD and PEFT."""

import dataclasses
import json

import pytest
import torch

from deltarank.checkpoints import layer_and_module
from deltarank.study import measuring
from deltarank.study.measuring import kept_spectra, measure
from deltarank.study.models import TINY, load_model, matrices
from deltarank.study.profiles import profile
from deltarank.study.runs import run, run_model, updates
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
        record = measure(config)
        return record, kept_spectra(config, record["shapes"]), updates(config)

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


def test_the_embedding_is_known_whatever_a_family_calls_it():
    names = ("transformer.wte.weight", "transformer.h.0.mlp.c_fc.weight", "transformer.ln_f.weight")
    dW = {name: torch.full((2,), float(i)) for i, name in enumerate(names, start=1)}
    found = measuring._squared_norms(dW, [names[1]])
    assert found == {"embedding": 2.0, "matrices": 8.0, "rest": 18.0}


@pytest.mark.parametrize(
    "fields",
    [{}, {"method": "lora", "rank": 2}, {"method": "tinylora", "rank": 2, "vector": 8}],
    ids=str,
)
def test_an_unchanged_model_has_a_zero_spectrum(store, fields):
    still = {"steps": 1, "lr": 1e-300, "eval_rows": 4}  # below what float32 can add
    sizes = profile()
    record = measure(config := sizes.config("sentiment", **still, **fields))
    base = measure(sizes.config("sentiment", "base", eval_rows=4))
    spectra = kept_spectra(config, record["shapes"])
    assert len(spectra) == 14
    assert all(not S.any() for S in spectra.values())
    loss, expected = (r["evaluation"]["test"]["loss_nats"] for r in (record, base))
    assert loss == pytest.approx(expected, rel=1e-5)  # PEFT casts what a TinyLoRA gives


ADAPTERS = [
    {"method": "lora"},
    {"method": "lora", "rslora": True},
    {"method": "lora", "layers": (1,)},
    {"method": "lora", "layers": (0,), "modules": ("down_proj", "q_proj")},
    {"method": "tinylora", "vector": 20},
    {"method": "tinylora", "vector": 20, "layers": (1,)},
]


def adapter(fields):
    """A small float32 run of rank 4 that moves the tiny model by much."""
    rate = {"lora": 1e-2, "tinylora": 1.0}[fields["method"]]
    sizes = {"rank": 4, "steps": 3, "eval_rows": 4, "dtype": "float32", "lr": rate}
    return profile().config("sentiment", **sizes | fields)


def carries(fields, name):
    """Whether a matrix is one that the adapter is to be on."""
    layer, module = layer_and_module(name)
    return layer in fields.get("layers", (0, 1)) and module in fields.get("modules", (module,))


@pytest.mark.parametrize("fields", ADAPTERS, ids=str)
def test_an_adapters_spectra_are_those_of_pefts_own_update(store, fields):
    config = adapter(fields)
    spectra = kept_spectra(config, measure(config)["shapes"])
    dW = updates(config)
    model = prepare(config)
    train(config, model)
    layers = {
        f"{n}.weight": m
        for n, m in model.get_base_model().named_modules()
        if hasattr(m, "get_delta_weight")
    }
    delta = {name: layer.get_delta_weight("default").detach() for name, layer in layers.items()}
    W0 = matrices(load_model(config.model))
    merged = matrices(model.merge_and_unload())
    assert spectra.keys() == dW.keys() == delta.keys()
    assert spectra.keys() == {name for name in W0 if carries(fields, name)}
    for name, S in spectra.items():
        by_delta = torch.linalg.svdvals(delta[name].double())
        by_merge = torch.linalg.svdvals((merged[name] - W0[name]).detach().double())
        assert S.shape == (4,)
        assert S[0] > 0
        assert torch.allclose(dW[name], delta[name], rtol=1e-5, atol=1e-9)
        assert torch.allclose(S.double(), by_delta[:4], atol=float(1e-5 * by_delta[0]))
        assert torch.allclose(S.double(), by_merge[:4], atol=float(1e-3 * by_merge[0]))


@pytest.mark.parametrize("fields", ADAPTERS, ids=str)
def test_base_and_stored_update_are_the_adapted_model(store, fields):
    config = adapter(fields)
    result, model = run(config), prepare(config)
    train(config, model)
    base, whole = load_model(config.model), run_model(config)
    tokens = torch.arange(3, 120)[None]
    with torch.no_grad():
        untuned, adapted, merged = (m.eval()(tokens).logits for m in (base, model, whole))
    assert (adapted - untuned).abs().max() > 1e-2
    assert (adapted - merged).abs().max() < 1e-5
    for name, W in matrices(whole).items():
        assert torch.equal(W, matrices(base)[name]) != carries(fields, name)
    assert {*spectra_table([result])["name"]} == {n for n in matrices(base) if carries(fields, n)}


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


def test_an_update_that_cannot_be_kept_leaves_nothing(config, monkeypatch, tmp_path):
    monkeypatch.setenv("LOWRANK_CACHE", str(tmp_path))
    monkeypatch.setattr(measuring.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        measure(config)
    assert [path for path in (tmp_path / "deltas").rglob("*") if path.is_file()] == []
