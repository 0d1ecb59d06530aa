"""The answer loss: gradients formed with it, the head asked for answer tokens, by each family."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deltarank.checks import require
from deltarank.study.tasks import IGNORED, a_line_each, answered, pack

# Relative, in float32.  Gemma 3 270M differs by 3e-7 in loss and 5e-6 in hidden states; a rule
# that is left out, or a row that sees another, moves even random models by much more.
LOSS_TOLERANCE = 1e-4
HIDDEN_TOLERANCE = 1e-3
CHUNK = 2048  # answer tokens whose logits are formed at once: of 262 k words some 2 GB


def answer_hidden(
    model: nn.Module, input_ids: Tensor, labels: Tensor, position_ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Hidden states (answer tokens, width) that predict the answer tokens, and those tokens."""
    places = {} if position_ids is None else {"position_ids": position_ids}
    decoder = _base(model).get_decoder()
    hidden = decoder(input_ids=input_ids, use_cache=False, **places).last_hidden_state
    answer = labels[:, 1:] != IGNORED  # (rows, length - 1): position t predicts token t + 1
    return hidden[:, :-1][answer], labels[:, 1:][answer]


def _base(model: nn.Module) -> nn.Module:
    """The model without its adapters' wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@dataclass(frozen=True)
class LogitRule:
    """What a family makes of z = hidden @ head.T: y = cap * tanh(scale * (z + bias) / cap).

    bias: (vocabulary,), such as Phi's.  scale: Cohere's, or one over Granite's.  cap: Gemma 2's.
    """

    bias: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None

    def logits(self, z: Tensor, ids: slice = slice(None)) -> Tensor:
        """y in float32 of the z (n, ids) of those token ids; z itself where nothing is to do."""
        y = z.float()
        if self.bias is not None:
            y = y + self.bias[ids].float()
        if self.scale != 1:
            y = y * self.scale
        return y if self.cap is None else self.cap * torch.tanh(y / self.cap)

    def slope(self, y: Tensor) -> Tensor | float:
        """dy / dz at the logits y, of their shape; one number where it is the same everywhere."""
        return self.scale * (1.0 if self.cap is None else 1 - (y / self.cap).square())


def logit_rule(model: nn.Module) -> LogitRule:
    """How `model` makes its logits, by its head's bias and the fields of its configuration.

    Fields that are unknown here are not seen: require_own_loss finds what they change.
    """
    config = _base(model).config.get_text_config()
    times, over = (getattr(config, name, None) for name in ("logit_scale", "logits_scaling"))
    return LogitRule(
        bias=getattr(model.get_output_embeddings(), "bias", None),
        scale=(times or 1.0) / (over or 1.0),
        cap=getattr(config, "final_logit_softcapping", None),
    )


@dataclass(frozen=True)
class Head:
    """What makes logits of hidden states: (vocabulary, width) weights and a family's rule."""

    weight: Tensor
    rule: LogitRule

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (n, vocabulary) in float32 of hidden states (n, width)."""
        return self.rule.logits(self.product(hidden))

    def product(self, hidden: Tensor, ids: slice = slice(None)) -> Tensor:
        """z (n, ids) of hidden states (n, width) for those token ids, in the type of hidden."""
        return hidden @ self.weight[ids].to(hidden.dtype).T

    def log_sum(self, products: Sequence[Tensor], slices: Sequence[slice]) -> Tensor:
        """The logarithm (n, 1) of the sum of exp(logits), of the z of all slices."""
        parts = (
            self.rule.logits(z, ids).logsumexp(-1) for ids, z in zip(slices, products, strict=True)
        )
        return torch.stack([*parts]).logsumexp(0)[:, None]


def head_of(model: nn.Module) -> Head:
    """The head of a model that is not trained."""
    return Head(model.get_output_embeddings().weight.detach(), logit_rule(model))


class HeadCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of a LogitRule's logits against `target`, its gradients formed with it.

    hidden: (n, width), head: (vocabulary, width), target: (n,), then the rule's fields.  The
    vocabulary passes by in slices that fit the processor's cache, first for the log-sum, then for
    the gradients (after Cut Cross-Entropy, Wijmans et al. 2024, arXiv 2411.09009, but the products
    are kept between the two: with few answer tokens they are small).  Products in hidden's type.
    """

    SLICE = 4096  # token ids

    @staticmethod
    def slices(hidden: Tensor, head: Tensor, target: Tensor) -> Iterator[tuple]:
        """Yield each slice of token ids, its weights, hidden @ weights.T, the targets in it."""
        for start in range(0, len(head), HeadCrossEntropy.SLICE):
            W = head[start : start + HeadCrossEntropy.SLICE].to(hidden.dtype)
            here = ((target >= start) & (target < start + len(W))).nonzero()[:, 0]
            yield slice(start, start + len(W)), W, hidden @ W.T, (here, target[here] - start)

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        head: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        scale: float = 1.0,
        cap: float | None = None,
    ) -> Tensor:
        """The loss; the gradients are formed along with it, where any is asked for."""
        rule = LogitRule(bias, scale, cap)
        slices = list(HeadCrossEntropy.slices(hidden, head, target))
        picked = torch.empty(len(hidden), device=hidden.device)  # logits of the targets
        sums = []
        for ids, _, z, right in slices:
            y = rule.logits(z, ids)
            picked[right[0]] = y[right]
            sums.append(y.logsumexp(-1))
        log_sum = torch.stack(sums).logsumexp(0)  # (n,)
        loss = (log_sum - picked).mean()
        if not any(ctx.needs_input_grad):
            return loss
        dh = torch.zeros_like(hidden, dtype=torch.float32)
        dW = torch.empty_like(head) if ctx.needs_input_grad[1] else None
        db = torch.empty_like(bias) if bias is not None and ctx.needs_input_grad[3] else None
        for ids, W, z, right in slices:
            y = rule.logits(z, ids)
            slope = rule.slope(y)
            p = y.sub_(log_sum[:, None]).exp_()
            p[right] -= 1
            p = p.div_(len(hidden) / slope)
            if db is not None:
                db[ids] = p.sum(0)
            p = p.to(hidden.dtype)
            dh += p @ W
            if dW is not None:
                dW[ids] = p.T @ hidden
        ctx.save_for_backward(dh.to(hidden.dtype), dW, db)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream: Tensor) -> tuple:
        """Gradients of hidden and, where they are trained, of head and bias."""
        dh, dW, db = (None if d is None else d * upstream for d in ctx.saved_tensors)
        return dh, dW, None, db, None, None


def autocast(place: torch.device, dtype: torch.dtype) -> torch.autocast:
    """A context of forward passes in `dtype`; of float32 one that changes nothing."""
    return torch.autocast(place.type, dtype, enabled=dtype != torch.float32)


def answer_loss(model: nn.Module, head: Tensor, batch: dict, *, dtype: torch.dtype) -> Tensor:
    """Mean cross-entropy of the answer tokens in nats; the head sees only their rows.

    head: (vocabulary, width).  A frozen head comes in the autocast type, so that the 262 k
    rows are not converted at every step.  Of long answers it sees a chunk at a time.
    """
    with autocast(head.device, dtype):
        hidden, target = answer_hidden(model, **batch)
    rule = logit_rule(model)
    fields = rule.bias, rule.scale, rule.cap
    chunks = zip(hidden.to(dtype).split(CHUNK), target.split(CHUNK), strict=True)
    whole = len(target)
    means = [(len(t) / whole) * HeadCrossEntropy.apply(h, head, t, *fields) for h, t in chunks]
    return torch.stack(means).sum()


class AnswerModel(nn.Module):
    """A language model whose output is its mean answer loss, as Trainer wants it; notes each."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype
        self.losses: list[float] = []
        head = model.get_output_embeddings().weight
        self.head = head if head.requires_grad else head.detach().to(dtype)

    def forward(
        self, input_ids: Tensor, labels: Tensor, position_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        """{"loss": mean cross-entropy of the answer tokens}; the arguments as pack() gives them."""
        batch = {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}
        loss = answer_loss(self.model, self.head, batch, dtype=self.dtype)
        self.losses.append(loss.item())
        return {"loss": loss}


@contextlib.contextmanager
def scoring(model: nn.Module) -> Iterator[None]:
    """The model as it is scored: without dropout, gradients and compiled layers."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        model.train(was_training)


def require_own_loss(model: nn.Module) -> None:
    """Raise ValueError, naming the architecture, where our loss is not `model(...).loss`.

    Ours is of two short rows padded to one length, the model's own is of each row by itself, both
    in float32: it finds what logit_rule does not know, and padding that is not ignored.
    """
    rows, head = _probe(model), model.get_output_embeddings().weight.detach()
    batch = on_device(model, a_line_each(rows))
    counts = [len(row["labels"]) - 1 for row in rows]
    with scoring(model):
        ours = answer_loss(model, head, batch, dtype=torch.float32).item()
        alone = [on_device(model, a_line_each([row])) for row in rows]
        losses = [model(**row).loss.item() for row in alone]
    own = sum(n * loss for n, loss in zip(counts, losses, strict=True)) / sum(counts)
    require(
        abs(ours - own) <= LOSS_TOLERANCE * own,
        f"{type(_base(model)).__name__} makes its logits by a rule that is not known here: its own "
        f"loss on a short text is {own:.4f} nats, ours {ours:.4f}; choose another model",
    )


def packs(model: nn.Module) -> bool:
    """Whether rows end to end are to the model what a line each is (see tasks.pack).

    Not so where a row sees the one before it: a family that ignores position_ids in its attention
    (Bloom, OPT), or that has a state instead (Mamba).  Trained with a row a line, it is as right.
    """
    rows = _probe(model)
    with scoring(model):
        packed, plain = (
            answer_hidden(model, **on_device(model, batch))[0]
            for batch in (pack(rows), a_line_each(rows))
        )
    moved = (packed - plain).norm(dim=1) / plain.norm(dim=1)
    return moved.max().item() <= HIDDEN_TOLERANCE


def _probe(model: nn.Module) -> list[dict[str, list[int]]]:
    """Two rows, the longer first, that stand for a batch when a model is checked."""
    vocabulary = len(model.get_input_embeddings().weight)
    tokens = [(7 * i + 3) % vocabulary for i in range(15)]
    parts = tokens[:9], tokens[9:]  # the first token of a row is its prompt
    return [answered(part[:1], part[1:]) for part in parts]


def on_device(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch where the model is."""
    place = model.get_input_embeddings().weight.device
    return {key: value.to(place) for key, value in batch.items()}
