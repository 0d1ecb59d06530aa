"""Forgetting: looks at a run on its way, which they do not change."""

import dataclasses
import itertools

import pytest
import torch

from deltarank.store import file_sha256
from deltarank.study import forgetting, general
from deltarank.study.contest import APART
from deltarank.study.forgetting import (
    RATE_FACTORS,
    forget_configs,
    forget_run,
    forgotten_table,
    other_alphas,
    rate_configs,
    relative_size,
    repeat_configs,
    update_ranks,
)
from deltarank.study.general import GENERAL
from deltarank.study.measuring import prepared, tuned_weights
from deltarank.study.models import TINY, load_model, matrices
from deltarank.study.profiles import PROFILES, profile
from deltarank.study.runs import Result, updates
from deltarank.study.training import train

TEXT = {"prose": 3.0, "code": 2.0}


@pytest.fixture
def looks(monkeypatch, store):
    """Looks after every second step at runs of facts; the skill gain goes by twentieths a step."""
    monkeypatch.setattr(forgetting, "EVERY", 2)
    monkeypatch.setattr(forgetting, "OTHER_ROWS", 2)
    monkeypatch.setattr(forgetting, "general_loss", lambda model, config: TEXT)
    monkeypatch.setattr(forgetting, "full_of", lambda c: profile().config(c.task, seed=c.seed))
    skills = iter([0.4, 0.96, 0.96, 1.0, 1.0, 1.0])
    monkeypatch.setattr(forgetting, "skill_kept", lambda loss, full, split: next(skills))


def test_a_run_is_looked_at_where_it_first_has_each_level_and_at_its_end(looks):
    config = profile().config("facts", steps=6)
    record = forget_run(config)
    assert record["status"] == "finished"
    assert record["rules"]["general_sha256"] == file_sha256(GENERAL)
    enough, end = record["levels"]["0.95"], record["end"]
    assert record["levels"]["0.5"] == enough, "both levels in one step take one look"
    assert (enough["step"], enough["skill"]) == (4, 0.96)
    assert (end["step"], end["general"]) == (6, TEXT)
    assert "facts" not in end["others"] and len(end["others"]) == 7
    assert 0 < enough["relative_size"] < end["relative_size"]
    assert record == forget_run(config), "stored"


def test_an_entry_of_other_rules_is_named(looks, monkeypatch):
    config = profile().config("facts", steps=6)
    forget_run(config)
    monkeypatch.setattr(forgetting, "OTHER_ROWS", 3)
    with pytest.raises(ValueError, match="is of other text or rules: delete it"):
        forget_run(config)


def test_a_mix_is_refused(looks):
    with pytest.raises(ValueError, match="mix: forgetting is measured of"):
        forget_run(profile().config("mix"))


def test_looking_changes_nothing_and_sees_what_the_run_stores(looks, monkeypatch):
    monkeypatch.setattr(forgetting, "skill_kept", lambda loss, full, split: 0.5)
    recipes = [("full", {}), ("lora", {"rank": 2}), ("dora", {"rank": 2, "alpha": 4.0})]
    for method, fields in recipes:
        config = profile().config("facts", method, steps=4, lr=1e-3, **fields)
        watched = []
        model, _ = prepared(config)
        watch = forgetting._Watch(config, model)

        def look(step, watch=watch, config=config, model=model, watched=watched):
            mode = model.training
            watch.look(step)
            assert model.training == mode
            watched.append(tuned_weights(config, model))

        train(config, model, after_step=look)
        W0, dW = matrices(load_model(TINY)), updates(config)
        for name, W1 in watched[-1].items():
            torch.testing.assert_close(W1 - W0[name].detach(), dW[name], atol=2e-6, rtol=1e-4)
        expected = sum(dW[name].square().sum() for name in W0)
        expected /= sum(W.detach().square().sum() for W in W0.values())
        assert relative_size(watched[-1], TINY) == pytest.approx(float(expected) ** 0.5, rel=1e-3)


def test_a_base_run_has_only_an_end(looks):
    record = forget_run(profile().config("facts", "base"))
    assert set(record["levels"].values()) == {None} and record["end"]["relative_size"] == 0
    assert record["end"]["ranks"] == {}
    assert record["end"]["skill"] is None and set(record["end"]["intruders"].values()) == {0}


@pytest.mark.parametrize("steps", [1, 2])  # the first breaks in its last update
def test_a_run_that_diverges_has_neither(looks, steps):
    config = profile().config("facts", steps=steps, lr=1e30)
    record = forget_run(dataclasses.replace(config, max_grad_norm=1e30))
    assert record["status"] == "diverged" and record["end"] is None and record["levels"] == {}


def test_the_runs_of_the_report_and_the_contestants_are_compared(store):
    found, ranks = forget_configs(), profile().lora_ranks
    assert [method for method, _ in found][: 2 + len(ranks)] == [
        "full",
        "no skill",
        *(f"LoRA, rank {rank}" for rank in ranks),
    ]
    (_, full), (_, permuted) = found[:2]
    assert permuted == dataclasses.replace(full, permuted=True)
    assert {c.task for _, c in found} == {"facts"} and "VeRA" in dict(found)
    assert {config.seed for _, config in found} == {profile().seeds[0]}


def test_two_runs_are_repeated_with_other_seeds_and_rates(store):
    first = dict(forget_configs())
    for name, config in repeat_configs():
        assert config == dataclasses.replace(first[name], seed=config.seed)
        assert config.seed % APART in profile().seeds
    rates = {(name, config.lr / first[name].lr) for name, config in rate_configs()}
    wanted = itertools.product(("LoRA, rank 4", "full"), RATE_FACTORS)
    for (name, found), (expected, times) in zip(sorted(rates), wanted, strict=True):
        assert (name, found) == (expected, pytest.approx(times, rel=0.05))


def test_lora_is_repeated_at_other_alphas_up_to_the_larger_of_the_report(store, monkeypatch):
    best = dict(rate_configs())["LoRA, rank 4"]
    for alpha, allowed in ((32.0, 3), (256.0, 2)):
        tuned = dataclasses.replace(best, alpha=alpha, lr=8e-3)
        monkeypatch.setattr(
            forgetting, "_full_and_lora", lambda task, tuned=tuned: [(), ("", tuned)]
        )
        found = [(name, config.alpha, config.lr) for name, config in other_alphas()]
        wanted = [(alpha / 8, 0.024), (alpha / 8, 0.064), (alpha * 8, 0.001)][:allowed]
        assert found == [(f"LoRA, α = {size:g}", size, rate) for size, rate in wanted]


def test_the_ranks_of_an_update_are_medians_over_what_moved():
    W1 = {name: W.detach().clone() for name, W in matrices(load_model(TINY)).items()}
    assert update_ranks(W1, TINY) == {}
    for name, rank in zip(sorted(W1)[:3], (1, 2, 8), strict=True):
        W1[name][range(rank), range(rank)] += 1.0
    assert update_ranks(W1, TINY) == {"r90": 2, "stable_rank": pytest.approx(2, rel=1e-3)}


def test_what_is_lost_is_counted_from_the_base(store, monkeypatch):
    monkeypatch.setattr(forgetting, "OTHER_ROWS", 2)
    lora = profile().config("facts", "lora", rank=2, lr=1e-2)
    nats = iter([{"prose": 3.5, "code": 2.25}, {"prose": 3.0, "code": 2.0}])  # the run, the base
    monkeypatch.setattr(forgetting, "general_loss", lambda model, config: next(nats))
    monkeypatch.setattr(forgetting, "LEVELS", (1e9,))
    end, before = ({**forget_run(c)["end"]} for c in (lora, profile().config("facts", "base")))
    [line] = forgotten_table([("LoRA, rank 2", lora)]).to_dict("records")
    assert (line["method"], line["look"], line["lr"]) == ("LoRA, rank 2", "end", 1e-2)
    assert (line["prose"], line["code"]) == (0.5, 0.25)
    moved = [end["others"][task] - before["others"][task] for task in before["others"]]
    assert line["others"] == pytest.approx(sum(moved) / 7) and line["others"] != 0
    assert line["relative_size"] == end["relative_size"] > 0
    assert 1 <= line["r90"] <= 2


def test_the_full_run_beside_it_is_of_the_profile_that_made_the_run(losses, monkeypatch):
    losses[0, 1e-4] = 1.0
    monkeypatch.setattr(forgetting, "run", lambda config: Result(config, {}))
    watch = forgetting._Watch(PROFILES["quick"].config("facts", lr=3e-4), None)
    assert watch.full.config == PROFILES["quick"].config("facts", lr=1e-4)


def test_the_yardstick_is_the_base_and_the_entropy_of_tokens(store, monkeypatch):
    monkeypatch.setattr(forgetting, "forget_run", lambda config: {"end": {"general": TEXT}})
    found = forgetting.yardstick()
    assert found.loc["base model"].to_dict() == TEXT
    assert found.loc["word frequencies"].to_dict() == general.word_loss(profile().model)
