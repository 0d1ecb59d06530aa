"""Distillation: a model that is trained towards the answers of another, without labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deltarank.runtime import product_dtype, progress
from deltarank.study.configs import RunConfig
from deltarank.study.evaluation import continuations, newline
from deltarank.study.losses import (
    AnswerModel,
    Head,
    answer_hidden,
    autocast,
    head_of,
    logit_rule,
    scoring,
)
from deltarank.study.models import load_tokenizer
from deltarank.study.tasks import IGNORED, a_line_each, answered, batches, encode_prompt
from deltarank.study.training import fit


@dataclass(frozen=True)
class Lessons:
    """What a teacher answers to prompts, and what it held likely at each token of its answers.

    The path is the teacher's own greedy answer, not a label: nobody has to write one, and it is
    the text that the student is to write when it serves.  Of the likelihoods the hidden state is
    kept that makes them (width numbers a token, not one for each token of the vocabulary), so that
    the teacher need not stay in memory.
    """

    rows: list[dict[str, list[int]]]  # input_ids, labels; places: the line of `hidden` of a token
    hidden: Tensor  # (answer tokens, width), float32: last hidden states before those tokens

    def of(self, picked: slice) -> Lessons:
        """The lessons of some of the rows."""
        return dataclasses.replace(self, rows=self.rows[picked])


@torch.no_grad()
def lessons(
    model: nn.Module, config: RunConfig, prompts: Sequence[str], *, room: int, ends: Sequence[int]
) -> Lessons:
    """The lessons of a teacher: its greedy answers to `prompts`, of at most `room` tokens.

    An answer ends with one of the tokens `ends`; one that finds no end in its room is taken up to
    its first newline, if it has one.  config: the teacher's tokenizer and autocast type.
    """
    tokenizer = load_tokenizer(config.model)
    encoded = [encode_prompt(prompt, tokenizer) for prompt in prompts]
    line_end, answers = newline(tokenizer), [[0]] * len(prompts)
    with scoring(model), progress(len(prompts), "answers of the tuned model") as bar:
        for picked in batches([len(prompt) for prompt in encoded]):
            asked = [encoded[i] for i in picked]
            found = continuations(model, config, asked, max_new_tokens=room, ends=ends)
            for i, tokens in zip(picked, found, strict=True):
                ended = tokens[-1] in ends or line_end not in tokens
                answers[i] = tokens if ended else tokens[: tokens.index(line_end) + 1]
            bar.update(len(picked))
    rows, start = [], 0
    for prompt, answer in zip(encoded, answers, strict=True):
        before, places = len(prompt), [*range(start, start + len(answer))]
        rows.append(answered(prompt, answer) | {"places": [0] * before + places})
        start += len(answer)
    hidden = torch.empty(start, model.get_output_embeddings().weight.shape[1])
    for at, states in _hidden_states(model, config, rows):
        hidden[at] = states.float().cpu()
    return Lessons(rows, hidden)


def _hidden_states(
    model: nn.Module, config: RunConfig, rows: Sequence[dict[str, list[int]]]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield, batch by batch, places (n,) and hidden states (n, width) of the answers' tokens."""
    dtype, place = product_dtype(config.dtype), model.get_output_embeddings().weight.device
    for picked in batches([len(row["labels"]) for row in rows]):
        batch = a_line_each([rows[i] for i in picked])
        places = batch["places"][batch["labels"] != IGNORED]  # as answer_hidden has them
        seen = {key: batch[key].to(place) for key in ("input_ids", "labels")}
        with scoring(model), autocast(place, dtype):
            states = answer_hidden(model, **seen)[0]
        yield places, states


class HeadDivergence(torch.autograd.Function):
    """Mean KL(p || q), in nats a token, of next-token distributions; q's gradient formed with it.

    q is made of `hidden` (n, width) by the student's head, p of `taught` (n, width) by the
    teacher's; neither head is trained.  The vocabulary passes by in slices that fit the processor's
    cache, first for the log-sums, then for the gradient, as in HeadCrossEntropy; so many tokens
    pass by at once as long answers leave memory for.  d KL / d logits of q is q - p (Hinton et al.
    2015, arXiv 1503.02531).
    """

    TOKENS = 512
    SLICE = 2048  # token ids

    @staticmethod
    def forward(ctx, hidden: Tensor, student: Head, taught: Tensor, teacher: Head) -> Tensor:
        """The mean divergence; the gradient is formed along with it."""
        dh, total = torch.empty_like(hidden), torch.zeros((), device=hidden.device)
        for start in range(0, len(hidden), HeadDivergence.TOKENS):
            part = slice(start, start + HeadDivergence.TOKENS)
            nats, gradient = HeadDivergence._of_tokens(hidden[part], student, taught[part], teacher)
            total += nats
            dh[part] = (gradient / len(hidden)).to(hidden.dtype)
        ctx.save_for_backward(dh)
        return total / len(hidden)

    @staticmethod
    def _of_tokens(
        hidden: Tensor, student: Head, taught: Tensor, teacher: Head
    ) -> tuple[Tensor, Tensor]:
        """The sum of the tokens' KL(p || q), and its gradient (tokens, width) in float32."""
        size = HeadDivergence.SLICE
        slices = [slice(i, i + size) for i in range(0, len(student.weight), size)]
        own, told = ([head.product(h, ids) for ids in slices]
                     for head, h in ((student, hidden), (teacher, taught)))  # fmt: skip
        log_sum_q, log_sum_p = student.log_sum(own, slices), teacher.log_sum(told, slices)
        total = torch.zeros((), device=hidden.device)
        dh = torch.zeros_like(hidden, dtype=torch.float32)
        for ids, z, taught_z in zip(slices, own, told, strict=True):
            y = student.rule.logits(z, ids)  # (tokens, slice)
            log_q, log_p = y - log_sum_q, teacher.rule.logits(taught_z, ids) - log_sum_p
            p = log_p.exp()
            total += (p * (log_p - log_q)).sum()
            dy = (log_q.exp() - p) * student.rule.slope(y)
            dh += dy.to(hidden.dtype) @ student.weight[ids].to(hidden.dtype)
        return total, dh

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream: Tensor) -> tuple:
        """The gradient of hidden."""
        return ctx.saved_tensors[0] * upstream, None, None, None


class Student(AnswerModel):
    """A model whose output is its divergence from a teacher's lessons, as Trainer wants it."""

    def __init__(
        self, model: nn.Module, dtype: torch.dtype, taught: Lessons, teacher: Head
    ) -> None:
        super().__init__(model, dtype)
        self.own = Head(self.head, logit_rule(model))
        self.teacher = dataclasses.replace(teacher, weight=teacher.weight.to(dtype))
        self.hidden = taught.hidden.to(self.head.device, dtype)

    def forward(  # type: ignore[override]  # lessons have places
        self, input_ids: Tensor, labels: Tensor, places: Tensor, position_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        """{"loss": mean KL of the answers' tokens}; the arguments as pack() gives them."""
        with autocast(self.head.device, self.dtype):
            hidden, _ = answer_hidden(self.model, input_ids, labels, position_ids)
        told = self.hidden[places[:, 1:][labels[:, 1:] != IGNORED]]
        loss = HeadDivergence.apply(hidden.to(self.dtype), self.own, told, self.teacher)
        self.losses.append(loss.item())
        return {"loss": loss}


def distil(
    config: RunConfig, model: nn.Module, taught: Lessons, teacher: Head, *, label: str = ""
) -> list[float]:
    """Train what of `model` is to be trained towards the lessons, in place, by config's recipe.

    teacher: the head that belongs to the lessons.  Returns the divergence of every step, in nats
    a token; stops at one that is NaN or infinite, which is then the last one.
    """
    student = Student(model, product_dtype(config.dtype), taught, teacher)
    return fit(config, student, taught.rows, label=label)


@torch.no_grad()
def divergence(model: nn.Module, config: RunConfig, taught: Lessons, teacher: Head) -> float:
    """Mean KL(teacher || model) of the lessons' tokens, in nats, of float32 logits."""
    own, total, count = head_of(model), 0.0, 0
    own, teacher = (
        dataclasses.replace(head, weight=head.weight.float()) for head in (own, teacher)
    )
    for places, states in _hidden_states(model, config, taught.rows):
        told = taught.hidden[places].to(states.device)
        total += len(places) * HeadDivergence.apply(states.float(), own, told, teacher).item()
        count += len(places)
    return total / count
