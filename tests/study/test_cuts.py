"""Cuts, against models whose updates are truncated by hand."""

import dataclasses
import json
import weakref
from pathlib import Path

import pandas as pd
import pytest
import torch
from small_runs import saved_pair

from deltarank.spectra import truncate
from deltarank.study import cuts
from deltarank.study.cuts import CUT_PARTS, cut, cut_by_matrix, score_pair, stored_cuts
from deltarank.study.evaluation import evaluate
from deltarank.study.models import load_model, matrices
from deltarank.study.pairs import RunPair
from deltarank.study.profiles import base_of, profile
from deltarank.study.runs import run, stored, updates
from deltarank.study.tasks import load_task


def tuned(config):
    """The tuned model, from the base and the updates."""
    model, dW = load_model(config.model), updates(config)
    return model, dW, dict(model.named_parameters())


def test_a_cut_to_rank_0_keeps_what_lies_outside_the_matrices(config):
    config = dataclasses.replace(config, lr=1e-2, dtype="float32")
    result = run(config)
    model, dW, parameters = tuned(config)
    base = evaluate(model, config, "test")["loss_nats"]
    with torch.no_grad():
        for name in dW.keys() - matrices(model).keys():
            parameters[name] += dW[name]
    expected = evaluate(model, config, "test")["loss_nats"]
    found = cut(config, [0])["loss_nats"].item()
    assert found == pytest.approx(expected, abs=1e-6)
    assert abs(found - base) > 1e-4
    assert abs(found - result.loss()) > 1e-4


def test_a_cut_is_the_model_with_truncated_updates(config):
    config = dataclasses.replace(config, lr=1e-2, dtype="float32")
    model, dW, parameters = tuned(config)
    with torch.no_grad():
        for name, update in dW.items():
            parameters[name] += truncate(update, 2) if name in matrices(model) else update
    expected = evaluate(model, config, "test")["loss_nats"]
    assert cut(config, [2])["loss_nats"].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    "fields",
    [{"method": "lora", "lr": 1e-2, "layers": (1,)}, {"method": "tinylora", "lr": 1, "vector": 9}],
    ids=str,
)
def test_cuts_of_a_small_adapter_go_from_the_base_to_the_run(store, fields):
    sizes = {"rank": 2, "steps": 2, "eval_rows": 4, "dtype": "float32"}
    config = profile().config("sentiment", **sizes | fields)
    base = profile().config("sentiment", "base", eval_rows=4, dtype="float32")
    found = cut(config, [0, 1, 2])["loss_nats"].tolist()
    assert found[0] == pytest.approx(run(base).loss(), abs=1e-6)
    assert found[2] == pytest.approx(run(config).loss(), abs=1e-5)
    assert abs(found[2] - found[0]) > 1e-3 and abs(found[2] - found[1]) > 1e-5


def test_a_cut_above_the_rank_of_the_update_is_the_tuned_model(small_task, store):
    # one step of plain gradient descent on one row of at most 16 tokens: rank(dW) <= 16
    sizes = {"steps": 1, "batch_size": 1, "seq_len": 16, "dtype": "float32"}
    config = profile().config("sentiment", optimizer="sgd", lr=3.0, **sizes)
    result = run(config)
    base = run(profile().config("sentiment", "base", seq_len=16, dtype="float32"))
    table = cut(config, [0, 1, 16])
    assert table["rank"].tolist() == [0, 1, 16]
    assert table["loss_nats"].iloc[-1] == pytest.approx(result.loss(), abs=1e-4)
    assert abs(base.loss() - result.loss()) > 1e-2
    assert abs(table["loss_nats"].iloc[0] - result.loss()) > 1e-3


def test_cuts_are_stored(config, monkeypatch):
    first = cut(config, [0, 1])
    monkeypatch.setattr(cuts, "updates", lambda config: pytest.fail("cut again"))
    assert cut(config, [1, 0])["loss_nats"].tolist() == first["loss_nats"].tolist()[::-1]


def test_stored_cuts_ascend(config):
    cut(config, [8, 1, 16, 0, 2])
    assert stored_cuts(config)["rank"].tolist() == [0, 1, 2, 8, 16]


def test_head_and_tail_of_a_cut_meet_at_the_ends(config):
    config = dataclasses.replace(config, lr=1e-2, dtype="float32")
    head, tail = (cut(config, [0, 32], part=part)["loss_nats"] for part in ("head", "tail"))
    assert tail[0] == pytest.approx(run(config).loss(), abs=1e-5)
    assert tail[1] == pytest.approx(head[0], abs=1e-5)
    assert abs(tail[0] - tail[1]) > 1e-3


def test_parts_of_a_cut_are_stored_apart(config):
    losses = {part: cut(config, [4], part=part)["loss_nats"][0] for part in CUT_PARTS}
    assert len(set(losses.values())) == 4
    assert losses == {part: cut(config, [4], part=part)["loss_nats"][0] for part in losses}
    assert stored_cuts(config)["loss_nats"].tolist() == [losses["head"]]
    with pytest.raises(ValueError, match="part='middle'.*head, tail"):
        cut(config, [4], part="middle")


@pytest.mark.parametrize("rank", [-1, 33])
def test_a_cut_refuses_a_rank_that_a_matrix_cannot_have_before_it_trains(config, monkeypatch, rank):
    monkeypatch.setattr(cuts, "updates", lambda config: pytest.fail("trained"))
    with pytest.raises(ValueError, match="ranks=.*must be 0 to 32"):
        cut(config, [1, rank])
    with pytest.raises(ValueError, match="ranks=.*must be 0 to 32"):
        cut_by_matrix(config, {"a": 1, "b": rank})


@pytest.mark.parametrize("part", CUT_PARTS)
def test_a_cut_is_the_same_whatever_other_ranks_are_asked_for(config, monkeypatch, tmp_path, part):
    config = dataclasses.replace(config, lr=1e-2, dtype="float32")
    alone = cut(config, [8], part=part)
    monkeypatch.setenv("BUILD", str(tmp_path / "other"))  # whose store is empty
    beside = cut(config, [8, 16, 4], part=part)
    assert beside["rank"].tolist() == [8, 16, 4]
    assert beside["loss_nats"].nunique() == 3
    assert beside["row_nats"][0] == pytest.approx(alone["row_nats"][0], abs=2e-5)


@pytest.fixture
def tiny_pair(store, tmp_path):
    """Base and tuned folder of a small run of the smoke profile, and its configuration."""
    return saved_pair(tmp_path)


def test_scores_of_a_pair_are_those_of_the_run(tiny_pair):
    base, tuned, config = tiny_pair
    rows = [{"prompt": r["prompt"], "answer": r["answer"]} for r in load_task("facts")["test"]]
    own = Path(base).parent / "own.jsonl"
    own.write_text("".join(json.dumps(row) + "\n" for row in rows[: config.eval_rows]))
    scores = score_pair(base, tuned, str(own), [1, 32]).set_index("model")
    tuned_loss = run(config).loss()
    assert scores.loc["tuned", "loss_nats"] == pytest.approx(tuned_loss, rel=1e-3)
    assert scores.loc["base", "loss_nats"] > tuned_loss
    one, all_of_it = scores.loc["cut", "loss_nats"]
    assert all_of_it == pytest.approx(tuned_loss, rel=1e-3)
    assert one == pytest.approx(cut(config, [1])["loss_nats"][0], rel=1e-3)


@pytest.mark.parametrize("side", [0, 1])
def test_a_tuned_model_that_does_no_better_is_warned_of(tiny_pair, side):
    """The base in its place, against itself and against the tuned model."""
    with pytest.warns(UserWarning, match='does no better on facts than .*name its "end"'):
        score_pair(tiny_pair[side], tiny_pair[0], "facts", [1])


def test_both_models_of_a_pair_are_let_go_before_the_cuts(tiny_pair, monkeypatch):
    base, tuned, _ = tiny_pair
    loaded = []

    def noted(name):
        model = load_model(name)
        loaded.append(weakref.ref(model))
        return model

    def scored(*arguments):
        alive = [model() is not None for model in loaded]
        assert alive == [False, False]
        yield {"loss_nats": 1.0, "score": 50.0}

    monkeypatch.setattr(cuts, "load_model", noted)
    monkeypatch.setattr(cuts, "_evaluate_cuts", scored)
    assert score_pair(base, tuned, "facts", [1])["model"].tolist() == ["base", "cut", "tuned"]


def test_a_cut_by_matrix_is_the_cut_where_all_ranks_are_one(tiny_pair):
    config = tiny_pair[2]
    names = stored(config).matrices
    uniform = cut(config, [2])["loss_nats"][0]
    assert cut_by_matrix(config, dict.fromkeys(names, 2))["loss_nats"] == uniform
    ranks = dict.fromkeys(names, 2) | {next(iter(names)): 0}
    assert cut_by_matrix(config, ranks)["loss_nats"] != uniform


def test_a_pair_is_scored_at_ranks_of_its_matrices_too(tiny_pair):
    base, tuned, config = tiny_pair
    uniform = dict.fromkeys(stored(config).matrices, 1)
    scored = score_pair(base, tuned, "facts", [1], by_matrix=uniform)
    assert scored["model"].tolist() == ["base", "cut", "cut by matrix", "tuned"]
    start, one, same, end = scored["loss_nats"]
    assert same == one and len({start, one, end}) == 3
    ranks = uniform | {next(iter(uniform)): 4}
    first, again = (RunPair(config).score((1,), ranks) for _ in range(2))
    pd.testing.assert_frame_equal(first, again)  # which is stored
    start, other, by_matrix, end = first["loss_nats"]
    assert start == pytest.approx(run(base_of(config)).loss())  # on the run's own rows
    assert other == pytest.approx(cut(config, [1])["loss_nats"][0])
    assert end == pytest.approx(stored(config).loss())
    assert abs(by_matrix - other) > 1e-5


def test_a_matrix_without_a_rank_is_cut_to_nothing(tiny_pair):
    base, tuned, config = tiny_pair
    first, *others = stored(config).matrices
    some = dict.fromkeys(others, 2)
    cuts_by_matrix = (
        score_pair(base, tuned, "facts", [2], by_matrix=ranks, eval_rows=4)
        for ranks in (some, some | {first: 0}, some | {first: 2})
    )
    left_out, zero, two = (table["loss_nats"][2] for table in cuts_by_matrix)
    assert left_out == zero != two


def test_ranks_of_matrices_that_the_model_names_otherwise_are_left_out_with_a_warning(tiny_pair):
    base, tuned, _ = tiny_pair
    with pytest.warns(UserWarning, match="some.weight has another name .*cut by matrix"):
        scored = score_pair(base, tuned, "facts", [1], by_matrix={"some.weight": 1})
    assert scored["model"].tolist() == ["base", "cut", "tuned"]
