"""The answer loss: its gradients formed with it, the head asked for answer tokens only."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn


def answer_hidden(
    model: nn.Module, input_ids: Tensor, labels: Tensor, position_ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Hidden states (answer tokens, width) that predict the answer tokens, and those tokens."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder = base.get_decoder()
    hidden = decoder(
        input_ids=input_ids, position_ids=position_ids, use_cache=False
    ).last_hidden_state
    answer = labels[:, 1:] != -100  # (rows, length - 1): position t predicts token t + 1
    return hidden[:, :-1][answer], labels[:, 1:][answer]


class HeadCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of `hidden @ head.T` against `target`, its gradients formed with it.

    hidden: (n, width), head: (vocabulary, width), target: (n,).  The vocabulary passes by in
    slices that fit the processor's cache, first for the log-sum, then for the gradients (after
    Cut Cross-Entropy, Wijmans et al. 2024, arXiv 2411.09009, but the logits are kept between the
    two: with few answer tokens they are small).  Logits and products in hidden's type.
    """

    SLICE = 4096  # words

    @staticmethod
    def slices(hidden: Tensor, head: Tensor, target: Tensor) -> Iterator[tuple]:
        """Yield the start of each slice, its weights, its logits, the targets in it."""
        for start in range(0, len(head), HeadCrossEntropy.SLICE):
            W = head[start : start + HeadCrossEntropy.SLICE].to(hidden.dtype)
            here = ((target >= start) & (target < start + len(W))).nonzero()[:, 0]
            yield start, W, hidden @ W.T, (here, target[here] - start)

    @staticmethod
    def forward(ctx, hidden: Tensor, head: Tensor, target: Tensor) -> Tensor:
        """The loss; the gradients are formed along with it."""
        picked = torch.empty(len(hidden), device=hidden.device)  # logits of the targets
        sums = []
        slices = list(HeadCrossEntropy.slices(hidden, head, target))
        for _, _, logits, (rows, words) in slices:
            picked[rows] = logits[rows, words].float()
            sums.append(logits.float().logsumexp(-1))
        log_sum = torch.stack(sums).logsumexp(0)  # (n,)
        dh = torch.zeros_like(hidden, dtype=torch.float32)
        dW = torch.empty_like(head) if ctx.needs_input_grad[1] else None
        for start, W, logits, (rows, words) in slices:
            p = logits.float().sub_(log_sum[:, None]).exp_()
            p[rows, words] -= 1
            p = p.div_(len(hidden)).to(hidden.dtype)
            dh += p @ W
            if dW is not None:
                dW[start : start + len(W)] = p.T @ hidden
        ctx.save_for_backward(dh.to(hidden.dtype), dW)
        return (log_sum - picked).mean()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, scale: Tensor) -> tuple:
        """Gradients of hidden and, if it is trained, of head."""
        dh, dW = ctx.saved_tensors
        return dh * scale, None if dW is None else dW * scale, None


def answer_loss(model: nn.Module, head: Tensor, batch: dict, *, dtype: torch.dtype) -> Tensor:
    """Mean cross-entropy of the answer tokens in nats; the head sees only their rows.

    head: (vocabulary, width).  A frozen head comes in the autocast type, so that the 262 k
    rows are not converted at every step.
    """
    with torch.autocast(head.device.type, dtype, enabled=dtype != torch.float32):
        hidden, target = answer_hidden(model, **batch)
    return HeadCrossEntropy.apply(hidden.to(dtype), head, target)


class AnswerModel(nn.Module):
    """A language model whose output is its mean answer loss, as Trainer wants it; notes each."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype, self.losses = model, dtype, []
        head = model.get_output_embeddings().weight
        self.head = head if head.requires_grad else head.detach().to(dtype)

    def forward(self, input_ids: Tensor, labels: Tensor, position_ids: Tensor) -> dict[str, Tensor]:
        """{"loss": mean cross-entropy of the answer tokens}; the arguments as pack() gives them."""
        batch = {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}
        loss = answer_loss(self.model, self.head, batch, dtype=self.dtype)
        self.losses.append(loss.item())
        return {"loss": loss}
