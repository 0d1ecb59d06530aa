"""Evaluation, against plain cross-entropy and free generation."""

import math

import pytest
import torch
from small_runs import batch_of, plain_loss, small

from deltarank.study.evaluation import evaluate, generate, mean_loss, score_rows
from deltarank.study.models import TINY, load_model
from deltarank.study.training import prepare, train


def test_score_rows_agrees_with_plain_cross_entropy_row_by_row(small_task):
    model, config = load_model(TINY).eval(), small()
    scores = score_rows(model, config, small_task)
    for row, nats, tokens in zip(small_task, scores["nats"], scores["tokens"], strict=True):
        batch = batch_of([row], seq_len=16)
        assert tokens == len(row["answer"]) + 1
        with torch.no_grad():
            mean = plain_loss(model, batch, torch.float32).item()
        assert nats == pytest.approx(mean * tokens, rel=1e-5)


@pytest.fixture
def overfitted(small_task, store):
    """A model that knows the first four rows of the small task and no others."""
    config = small(steps=60, lr=1e-2)
    model = prepare(config)
    train(config, model)
    return config, model.eval(), small_task


def test_right_by_teacher_forcing_is_right_by_free_generation(overfitted):
    config, model, rows = overfitted
    right = score_rows(model, config, rows)["right"].tolist()
    texts = generate(model, config, [row["prompt"] for row in rows], max_new_tokens=8)
    assert right == [text == row["answer"] for text, row in zip(texts, rows, strict=True)]
    assert all(right[:4])
    assert not all(right)


def test_a_tie_is_right_only_where_greedy_decoding_takes_it(small_task):
    model, config = load_model(TINY).eval(), small()
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()  # all words are equally likely
    assert not score_rows(model, config, small_task)["right"].any()


def test_evaluate_reports_what_score_rows_found(overfitted):
    config, model, rows = overfitted
    scores = score_rows(model, config, rows)
    evaluation = evaluate(model, config, "test")
    assert evaluation["row_score"] == [100.0 * right for right in scores["right"]]
    assert evaluation["score"] == pytest.approx(100 * scores["right"].mean())
    expected = scores["nats"].sum() / scores["tokens"].sum()
    assert evaluation["loss_nats"] == pytest.approx(expected)


def test_evaluate_looks_at_the_first_rows_only(small_task):
    model = load_model(TINY)
    whole, half = (evaluate(model, small(eval_rows=n), "test") for n in (8, 3))
    assert half["row_nats"] == pytest.approx(whole["row_nats"][:3], abs=1e-4)


def test_evaluate_leaves_the_mode_of_the_model(small_task):
    model = load_model(TINY)
    for mode in (True, False):
        evaluate(model.train(mode), small(), "valid")
        assert model.training == mode


def test_the_mean_loss_of_a_broken_model_is_no_number(small_task):
    config = small()
    model = prepare(config)
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(math.nan)
    assert math.isnan(mean_loss(model, config, small_task))
