"""Distillation, against torch's own divergence, the model's own logits and greedy decoding."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from small_runs import small

from deltarank.study import distillation
from deltarank.study.distillation import (
    HeadDivergence,
    Student,
    distil,
    divergence,
    lessons,
)
from deltarank.study.evaluation import continuations, newline
from deltarank.study.losses import Head, LogitRule, head_of
from deltarank.study.models import TINY, load_model, load_tokenizer
from deltarank.study.tasks import a_line_each, encode_prompt, pack
from deltarank.study.training import prepare

PROMPTS = ["Say it:", "And now the other:", "x", "One more, please:", "Again:"]


@pytest.fixture
def config(small_task, store):
    """A LoRA of the tiny model in float32, of scale 1."""
    return small(method="lora", rank=4, alpha=4.0, steps=20, lr=1e-2)


@pytest.fixture
def teacher():
    """The tiny model with an update of rank 2 in one matrix, by which its answers change."""
    model = load_model(TINY)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        weight = model.model.layers[1].mlp.down_proj.weight  # (32, 64)
        weight += torch.randn(32, 2, generator=generator) @ torch.randn(2, 64, generator=generator)
    return model


@pytest.fixture
def told(teacher, config):
    """The teacher's lessons, with answers of at most six tokens."""
    return lessons(teacher, config, PROMPTS, room=6, ends=[1])


RULES = {"plain": LogitRule(), "capped": LogitRule(cap=2.0, scale=0.5)}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("tokens", "ids"), [(3, 4), (64, 4), (64, 11)])
def test_the_divergence_and_its_gradient_are_those_of_torch(monkeypatch, rule, tokens, ids):
    monkeypatch.setattr(HeadDivergence, "TOKENS", tokens)
    monkeypatch.setattr(HeadDivergence, "SLICE", ids)
    generator = torch.Generator().manual_seed(0)
    hidden, taught = (torch.randn(7, 5, generator=generator) for _ in range(2))
    own, other = (torch.randn(11, 5, generator=generator) for _ in range(2))
    found = []
    for ours in (True, False):
        h = hidden.clone().requires_grad_()
        if ours:
            loss = HeadDivergence.apply(h, Head(own, RULES[rule]), taught, Head(other, LogitRule()))
        else:
            log_q = RULES[rule].logits(h @ own.T).log_softmax(-1)
            log_p = (taught @ other.T).log_softmax(-1)
            loss = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
        (3 * loss).backward()
        found.append((loss.item(), h.grad))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5) and found[0][0] > 0.1
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-6)


def test_lessons_are_the_greedy_answers_and_what_the_teacher_held_likely(teacher, config, told):
    tokenizer, head = load_tokenizer(TINY), head_of(teacher)
    assert len(told.rows) == len(PROMPTS) and len({len(row["labels"]) for row in told.rows}) > 2
    for prompt, row in zip(PROMPTS, told.rows, strict=True):
        before = len(encode_prompt(prompt, tokenizer))
        answer = row["labels"][before:]
        assert row["labels"][:before] == [-100] * before
        assert row["input_ids"] == encode_prompt(prompt, tokenizer) + answer
        with torch.no_grad():
            logits = teacher(input_ids=torch.tensor([row["input_ids"]])).logits[0, before - 1 : -1]
        assert logits.argmax(-1).tolist() == answer, "each token is the most likely one"
        made = head.logits(told.hidden[row["places"][before:]])
        torch.testing.assert_close(made, logits, rtol=1e-4, atol=1e-4)


def test_an_answer_ends_where_the_model_ends_it_or_else_with_its_first_line(
    teacher, config, monkeypatch
):
    line = newline(load_tokenizer(TINY))
    said = {10: [7, line, 8, 1], 20: [7, line, 8, line, 9], 30: [7, 8, 9]}  # 1 ends a text

    def fake(model, config, prompts, *, max_new_tokens, ends):
        return [said[prompt[0]] for prompt in prompts]

    monkeypatch.setattr(distillation, "continuations", fake)
    monkeypatch.setattr(distillation, "encode_prompt", lambda prompt, tokenizer: [int(prompt)])
    found = lessons(teacher, config, ["10", "20", "30"], room=5, ends=[1])
    assert [row["labels"][1:] for row in found.rows] == [said[10], [7, line], said[30]]
    assert found.rows[1]["places"] == [0, 4, 5] and len(found.hidden) == 9


def test_continuations_stop_at_the_first_end(teacher, config):
    prompts = [encode_prompt(prompt, load_tokenizer(TINY)) for prompt in PROMPTS]
    whole = continuations(teacher, config, prompts, max_new_tokens=6, ends=[383])
    assert {len(tokens) for tokens in whole} == {6}
    end = whole[0][2]
    short = continuations(teacher, config, prompts, max_new_tokens=6, ends=[383, end])
    for tokens, rest in zip(whole, short, strict=True):
        assert rest == (tokens[: tokens.index(end) + 1] if end in tokens else tokens)


def test_a_teacher_does_not_diverge_from_itself_and_another_model_does(teacher, config, told):
    assert divergence(teacher, config, told, head_of(teacher)) == pytest.approx(0, abs=1e-6)
    assert divergence(load_model(TINY), config, told, head_of(teacher)) > 1e-3


def test_logits_of_a_divergence_are_float32_where_the_model_runs_in_bfloat16(
    teacher, config, told, monkeypatch
):
    kinds, product = set(), Head.product

    def noted(self, hidden, ids):
        found = product(self, hidden, ids)
        kinds.add((hidden.dtype, found.dtype))
        return found

    monkeypatch.setattr(Head, "product", noted)
    low = dataclasses.replace(config, dtype="bfloat16")
    divergence(load_model(TINY), low, told, head_of(teacher))
    assert kinds == {(torch.float32, torch.float32)}


def test_the_loss_of_a_batch_is_the_divergence_packed_or_not(teacher, config, told):
    model = load_model(TINY).requires_grad_(False)
    expected = divergence(model, config, told, head_of(teacher))
    student = Student(model, torch.float32, told, head_of(teacher))
    for collator in (pack, a_line_each):
        assert student(**collator(told.rows))["loss"].item() == pytest.approx(expected, rel=1e-4)


def test_some_of_the_lessons_are_those_rows(teacher, config, told):
    model, head = load_model(TINY), head_of(teacher)
    first, rest = told.of(slice(2)), told.of(slice(2, None))
    counts = [sum(label != -100 for row in part.rows for label in row["labels"])
              for part in (first, rest)]  # fmt: skip
    parts = [divergence(model, config, part, head) for part in (first, rest)]
    whole = sum(n * nats for n, nats in zip(counts, parts, strict=True)) / sum(counts)
    assert divergence(model, config, told, head) == pytest.approx(whole, rel=1e-4)


def test_distillation_lowers_the_divergence_and_trains_the_factors_alone(teacher, config, told):
    model = prepare(config)
    W0 = {n: W.detach().clone() for n, W in model.named_parameters() if "lora_" not in n}
    before = divergence(model, config, told, head_of(teacher))
    losses = distil(config, model, told, head_of(teacher))
    assert len(losses) == config.steps and losses[0] > 2 * losses[-1]
    assert divergence(model, config, told, head_of(teacher)) < 0.5 * before
    assert all(torch.equal(W, W0[n]) for n, W in model.named_parameters() if n in W0)


def test_distillation_stops_where_it_diverges(teacher, config, told):
    wild = dataclasses.replace(config, lr=1e30)
    losses = distil(wild, prepare(wild), told, head_of(teacher))
    assert len(losses) < config.steps and losses[-1] != losses[-1]
