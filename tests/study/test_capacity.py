"""Capacity: what a record says, the store, and results read off it."""

import dataclasses
import json
import math
from types import SimpleNamespace

import pytest
import torch
from small_codes import result_of, small_codes, sure_model

from deltarank.store import load_entry
from deltarank.study import capacity, code_runs
from deltarank.study.capacity import (
    code_folder,
    code_run,
    code_sweep,
    code_upper,
    measure_codes,
)
from deltarank.study.code_runs import code_parameters
from deltarank.study.codes import code_scores
from deltarank.study.memorizing import Learned
from deltarank.study.profiles import PROFILES
from deltarank.study.upper import Upper


def test_the_untrained_model_holds_nothing_and_so_do_the_codes_of_others(store):
    both = code_upper(small_codes(codes=64, digits=4))
    for part in (slice(64), slice(64, None)):
        scores = code_scores(*both.of(part).scores())
        assert scores["learned_bits"] < 0.05 * both.of(part).targets.numel()
        assert scores["recall"] == 0 and scores["digits_right"] < 0.25


class Table(torch.nn.Module):
    """A model whose last hidden states are what it is given."""

    def get_decoder(self):
        return lambda inputs_embeds, use_cache: SimpleNamespace(last_hidden_state=inputs_embeds)


def test_a_model_that_is_a_table_of_the_codes_holds_all_their_bits(store):
    """The measuring code on a model that looks each digit up by the number of its code."""
    upper = code_upper(small_codes(codes=16, digits=3)).of(slice(16))

    states = torch.zeros(*upper.states.shape[:2], 10)
    states[upper.answers] = 100.0 * torch.nn.functional.one_hot(upper.targets.flatten(), 10).float()
    head = dataclasses.replace(upper.head, weight=torch.eye(10))
    table = Upper(Table(), head, states, upper.answers, upper.targets, torch.float32)
    scores = code_scores(*table.scores())
    assert scores["learned_bits"] == pytest.approx(16 * 3 * math.log2(10))
    assert scores["recall"] == 1
    other = dataclasses.replace(table, targets=(upper.targets + 1) % 10)
    assert code_scores(*other.scores())["learned_bits"] < -1000


def test_the_shuffled_codes_have_the_prompts_of_codes_and_the_digits_of_others(store, monkeypatch):
    monkeypatch.setattr(capacity, "CONTROL", 5)
    both = code_upper(small_codes(codes=8, digits=3))
    codes, others = both.targets[:8], both.targets[8:]
    assert torch.equal(others, codes[1:6])
    prompt = both.answers[0].int().argmax()
    same, shuffled = both.states[:5], both.states[8:]
    assert torch.allclose(shuffled[:, :prompt], same[:, :prompt], atol=1e-5)
    assert not torch.allclose(shuffled[:, prompt + 1 :], same[:, prompt + 1 :], atol=1e-2)


def test_a_record_says_what_was_measured(store, monkeypatch):
    monkeypatch.setattr(code_runs, "load_model", sure_model)
    config = small_codes(steps=6)
    result = code_run(config)
    record = result.record
    assert result.status == "finished" and result.parameters == code_parameters(config)
    assert record["config"]["layers"] == [1] and record["bits"] == pytest.approx(
        config.bits, abs=1e-3
    )
    assert {len(values) for values in record["curve"].values()} == {len(result.curve("step"))}
    assert result.curve("step")[0] == 0 and result.curve("step")[-1] == 8
    assert record["shuffled"].keys() == {"learned_bits", "recall", "digits_right"}
    assert {"torch", "commit", "train_seconds", "threads"} <= record["provenance"].keys()
    assert record["identity"] == json.loads(json.dumps(config.identity))


def test_of_the_shuffled_codes_nothing_is_learned(store, monkeypatch):
    monkeypatch.setattr(code_runs, "load_model", sure_model)
    result = code_run(small_codes(codes=4, steps=60, rank=8, layers=(0, 1)))
    assert result.last("learned_bits") > 0 > result.record["shuffled"]["learned_bits"]


def test_what_is_stored_is_not_trained_again(store, monkeypatch):
    config = small_codes(steps=2)
    first = code_run(config)
    assert code_folder(config) == store / "capacity" / config.key
    assert load_entry(code_folder(config))[0] == first.record
    monkeypatch.setattr(capacity, "measure_codes", lambda *_: pytest.fail("trained again"))
    assert code_run(config).record == first.record
    assert [r.record for r in code_sweep([config, config])] == [first.record] * 2


def test_what_is_interrupted_leaves_nothing_and_starts_anew(store, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    config = small_codes(steps=2)
    with monkeypatch.context() as patch:
        patch.setattr(capacity, "memorize", interrupted)
        with pytest.raises(KeyboardInterrupt):
            code_run(config)
    assert [*code_folder(config).parent.glob("*")] == []
    assert code_run(config).status == "finished"


def test_a_run_that_diverges_is_stored_as_diverged(store, monkeypatch):
    monkeypatch.setattr(code_runs, "load_model", sure_model)
    result = code_run(small_codes(lr=1e30, steps=20))
    assert result.status == "diverged" and math.isnan(result.last("learned_bits"))
    assert math.isnan(result.passes_until(0.9)) and result.record["shuffled"] == {}


def test_a_diverged_run_is_told_from_one_that_learned(store, monkeypatch):
    found = Learned([{"step": 0, "learned_bits": -1.0, "recall": 0.0}], diverged=True)
    monkeypatch.setattr(capacity, "memorize", lambda *_, **__: found)
    record = measure_codes(small_codes())
    assert record["status"] == "diverged" and record["curve"]["step"] == [0]


def test_the_passes_until_a_share_are_read_off_between_notes():
    result = result_of(small_codes())  # whose steps take half of the codes
    assert result.passes_until(0.9) == pytest.approx(9)
    assert result.passes_until(0.5) == pytest.approx(5)
    assert result.passes_until(1) == 10
    assert math.isnan(result_of(small_codes(), bits=-2.0).passes_until(0.9))


def test_a_step_passes_over_a_batch_or_over_all_codes_where_they_are_fewer():
    assert result_of(small_codes(codes=8, batch_size=4)).passes.tolist() == [0, 5, 10]
    assert result_of(small_codes(codes=2, batch_size=4)).passes.tolist() == [0, 10, 20]


def test_what_was_forgotten_again_does_not_count_at_the_end():
    result = result_of(small_codes())
    result.record["curve"]["recall"] = [0, 0.75, 0.5]
    assert result.last("recall") == 0.5


def test_another_size_or_seed_is_another_entry(store):
    config = small_codes()
    other = dataclasses.replace(config, seed=1)
    assert code_folder(config) != code_folder(other)
    paper = dataclasses.replace(config, profile="paper")
    assert code_folder(paper).parent == PROFILES["paper"].store / "capacity"
