"""Treatments: the weights that are scored under each, and what PEFT makes of intruders."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.intruders import reduce_intruder_dimension

from deltarank.spectra import truncate
from deltarank.study import treatments
from deltarank.study.models import TINY, load_model, matrices
from deltarank.study.profiles import PROFILES, profile
from deltarank.study.runs import Result, run_model, updates
from deltarank.study.training import lora_layers, quiet_peft
from deltarank.study.treatments import (
    CUT,
    MITIGATED,
    SHRUNK,
    treated,
    treated_configs,
    turned,
    without_intruders,
)

Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def scored(monkeypatch, store):
    """The weights of one matrix and of the last norm each time that a model is scored."""
    seen = []

    def loss(model, config, rows):
        named = dict(model.named_parameters())
        seen.append((named[Q].detach().clone(), named["model.norm.weight"].detach().clone()))
        return float(len(seen))

    monkeypatch.setattr(treatments, "mean_loss", loss)
    monkeypatch.setattr(treatments, "general_loss", lambda *_: {"prose": 3.0, "code": 2.0})
    monkeypatch.setattr(treatments, "full_of", lambda c: profile().config(c.task, seed=c.seed))
    monkeypatch.setattr(treatments, "skill_kept", lambda loss, full: loss / 10)
    return seen


def test_a_full_update_is_shrunk_and_cut_and_its_norms_are_kept(scored):
    config = profile().config("facts", lr=3e-3)
    table, dW, W0 = treated(config), updates(config)[Q], load_model(TINY).get_parameter(Q).detach()
    around = turned(dW, seed=config.seed)
    updated = [
        dW,
        around,
        *(c * dW for c in SHRUNK),
        *(truncate(dW, min(r, *dW.shape)) for r in CUT),
    ]
    assert [*table["treatment"]] == ["none", "turned", *["shrunk"] * 3, *["cut"] * 3]
    assert [*table["amount"]] == [1, 1, *SHRUNK, *CUT] and table["skill"].iloc[-1] == 0.8
    whole = run_model(config)
    for (W, norm), expected in zip(scored, updated, strict=True):
        torch.testing.assert_close(W - W0, expected, atol=1e-5, rtol=1e-3)
        assert torch.equal(norm, whole.get_parameter("model.norm.weight"))
    before = len(scored)
    assert treated(config).equals(table) and len(scored) == before, "stored"


def test_a_lora_loses_its_intruders_too(scored):
    config = profile().config("facts", "lora", rank=2, lr=1e-2)
    table = treated(config)
    assert [*table["treatment"]] == ["none", "turned", *["shrunk"] * 3, *["intruders"] * 3]
    assert [*table["amount"]][-3:] == [*MITIGATED]


def test_without_intruders_is_what_peft_leaves(monkeypatch, store):
    torch.manual_seed(0)
    config = profile().config("facts", "lora", rank=2, alpha=4.0, lr=1e-2)
    names = [name.removesuffix(".weight") for name in matrices(load_model(TINY))]
    with quiet_peft():
        lora = LoraConfig(r=2, lora_alpha=4, target_modules=names)
        model = get_peft_model(load_model(TINY), lora)
    layers = lora_layers(model)
    for layer in layers.values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=1.0)
    dW = {n: layer.get_delta_weight("default").detach() for n, layer in layers.items()}
    with quiet_peft():
        reduce_intruder_dimension(model, top_k=10, mitigation_lambda=0.25, logging_sink=None)
    found = without_intruders(config, dW, 0.25)
    assert (found[Q] - dW[Q]).norm() > 0.1 * dW[Q].norm()
    for name, layer in layers.items():
        expected = layer.get_delta_weight("intruder_reduced").detach()
        torch.testing.assert_close(found[name], expected, atol=1e-3, rtol=1e-2)


def test_an_adapter_whose_update_is_of_high_rank_is_cut_too(scored):
    table = treated(profile().config("facts", "hira", rank=2, lr=1e-2))
    assert [*table["treatment"]] == ["none", "turned", *["shrunk"] * 3, *["cut"] * 3]


def test_an_entry_of_other_rules_is_named(scored, monkeypatch):
    config = profile().config("facts", lr=3e-3)
    treated(config)
    monkeypatch.setattr(treatments, "CUT", (4,))
    with pytest.raises(ValueError, match="is of other text or rules: delete it"):
        treated(config)


def test_another_adapter_keeps_its_intruders():
    config = profile().config("facts", "dora", rank=2, alpha=4.0, lr=1e-3)
    with pytest.raises(ValueError, match="PEFT takes intruders out of LoRA alone"):
        without_intruders(config, {}, 0.5)


def test_the_full_run_beside_it_is_of_the_profile_that_made_the_run(store, losses, monkeypatch):
    losses[0, 1e-4] = 1.0
    asked = []
    line = {"treatment": "none", "amount": 1.0, "loss_nats": 1.0}
    monkeypatch.setattr(treatments, "_measured", lambda config: [line])
    monkeypatch.setattr(treatments, "run", lambda config: Result(config, {}))
    monkeypatch.setattr(treatments, "skill_kept", lambda loss, full: asked.append(full) or loss)
    treated(PROFILES["quick"].config("facts", lr=3e-4))
    assert [full.config for full in asked] == [PROFILES["quick"].config("facts", lr=1e-4)]


def test_a_turned_update_keeps_its_spectrum_and_no_direction():
    torch.manual_seed(0)
    dW = torch.randn(60, 1) @ torch.randn(1, 90)
    around = turned(dW, seed=0)
    torch.testing.assert_close(torch.linalg.svdvals(around)[:1], torch.linalg.svdvals(dW)[:1])
    assert abs((around * dW).sum() / dW.square().sum()) < 0.1
    assert torch.equal(around, turned(dW, seed=0)) and not torch.equal(around, turned(dW, seed=1))


def test_full_fine_tuning_and_the_widest_lora_are_treated(store):
    assert [name for name, _ in treated_configs()] == ["full", "LoRA, rank 8"]
