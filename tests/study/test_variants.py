"""Variants: PEFT's other adapters, as they are sized, trained, measured and put together again."""

import pytest
import torch
from small_runs import ROWS, Q, batch_of

from deltarank.study import training
from deltarank.study.configs import FACTORED, KNOBS, SCALED, VARIANTS, RunConfig
from deltarank.study.models import TINY, load_model, matrices
from deltarank.study.optimizers import own_optimizer
from deltarank.study.profiles import profile
from deltarank.study.runs import run, run_model, updates
from deltarank.study.sizes import trained_parameters
from deltarank.study.training import prepare
from deltarank.study.variants import PARAMETERS

RANKS = {"miss": 4, "oft": 8, "randlora": 8, "vera": 16}  # 2 of the others


def variant(method, **changes):
    """A float32 run of a method, of the smallest size that is all its own."""
    fields = {"rank": RANKS.get(method, 2), "steps": 3, "lr": 1e-2, "dtype": "float32"}
    fields |= {"alpha": 8.0} if method in SCALED else {}
    fields |= {"knob": {"loraplus": 16.0, "vera": 0.1}[method]} if method in KNOBS else {}
    return profile().config("facts", method, **(fields | {"eval_rows": 4} | changes))


def test_every_variant_has_its_size():
    assert PARAMETERS.keys() == {*VARIANTS}


@pytest.mark.parametrize("method", VARIANTS)
def test_parameters_are_counted_as_they_are_trained(method):
    for changes in ({}, {"layers": (1,)}, {"modules": ("k_proj", "up_proj")}):
        config = variant(method, **changes)
        trained = [p for p in prepare(config).parameters() if p.requires_grad]
        assert trained_parameters(config) == sum(p.numel() for p in trained) > 0


@pytest.mark.parametrize("method", VARIANTS)
def test_before_training_the_model_is_the_base_model(method):
    batch = batch_of(ROWS)["input_ids"]
    expected = load_model(TINY)(input_ids=batch).logits
    found = prepare(variant(method))(input_ids=batch).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", VARIANTS)
def test_the_update_makes_the_trained_model_of_the_base(method, store, monkeypatch):
    """The stored update, added to the base weights, answers as the adapted model did."""
    trained, batch = [], batch_of(ROWS)["input_ids"]

    def keeping(config, model, **kwargs):
        losses = training.train(config, model, **kwargs)
        trained.append(model.eval()(input_ids=batch).logits.detach())
        return losses

    monkeypatch.setattr("deltarank.study.measuring.train", keeping)
    result = run(config := variant(method))
    merged = run_model(config)(input_ids=batch).logits
    torch.testing.assert_close(merged, trained[0], atol=1e-4, rtol=1e-4)
    base = load_model(TINY)
    assert (merged - base(input_ids=batch).logits).abs().max() > 1e-3
    dW, names = updates(config), {*matrices(base)}
    assert {*dW} == {*result.spectra} == names
    most = config.rank if method in FACTORED else min(dW[Q].shape)
    assert len(result.spectra[Q]) == most
    expected = torch.linalg.svdvals(dW[Q])[:most]
    torch.testing.assert_close(result.spectra[Q], expected, atol=1e-5, rtol=1e-3)


def fixed(method, seed):
    """What a method draws at random and does not train: its buffers and frozen matrices."""
    adapter = prepare(variant(method, seed=seed))
    parts = {"randlora": "randlora_", "shira": "shira_", "vera": "vera_"}[method]
    drawn = {n: p for n, p in adapter.named_parameters() if parts in n and not p.requires_grad}
    drawn |= {n: b for n, b in adapter.named_buffers() if parts in n}
    for name, layer in adapter.named_modules():
        drawn |= {f"{name} {k}": v for k, v in getattr(layer, "shira_indices", {}).items()}
    return drawn


@pytest.mark.parametrize("method", ["randlora", "shira", "vera"])
def test_a_seed_draws_what_is_fixed_at_random(method):
    first, again, other = (fixed(method, seed) for seed in (0, 0, 1))
    assert first.keys() == again.keys() == other.keys() and len(first) > 0
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_lora_plus_trains_b_faster():
    config = variant("loraplus")
    model = prepare(config)
    names = {id(p): name for name, p in model.named_parameters()}
    rates = {"A": set(), "B": set()}
    for group in own_optimizer(config, model).param_groups:
        for p in group["params"]:
            rates["B" if "lora_B" in names[id(p)] else "A"].add(group["lr"])
    assert rates == {"A": {config.lr}, "B": {16 * config.lr}}


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"method": "dora", "rank": 2}, "alpha=0.0: must be above 0"),
        ({"method": "hira", "rank": 2, "alpha": 8.0}, "alpha=8.0: only in lora, dora"),
        ({"method": "vera", "rank": 2}, "knob=0.0: must be above 0: the first values of d"),
        ({"method": "lora", "rank": 2, "alpha": 8.0, "knob": 1.0}, "knob=1.0: only in loraplus"),
        (
            {"method": "loraplus", "rank": 2, "alpha": 8.0, "knob": 16.0, "optimizer": "muon"},
            "optimizer='muon': unknown; choose one of adamw_torch_fused",
        ),
        ({"method": "oft"}, "rank=0: a oft run needs 1 or more"),
        ({"method": "pissa", "rank": 2, "alpha": 2.0, "rslora": True}, "rslora=True: only in lora"),
    ],
    ids=str,
)
def test_values_that_no_variant_has_are_refused(fields, told):
    with pytest.raises(ValueError, match=f"^{told}"):
        RunConfig(**{"task": "facts", "steps": 1, "lr": 1e-3} | fields)


def test_sizes_that_a_variant_cannot_have_are_refused():
    for rank in (1, 3, 64):
        with pytest.raises(ValueError, match=f"^rank={rank}: choose 2 or more that divide 32"):
            prepare(variant("oft", rank=rank))
    with pytest.raises(ValueError, match="^rank=17 is above the smallest matrix"):
        prepare(variant("dora", rank=17))
    assert trained_parameters(variant("vera", rank=640)) > 0
