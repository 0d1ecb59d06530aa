"""Optimizers beside those of transformers: the update of a step by another geometry."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.optim import SGD, AdamW, Muon, Optimizer

from deltarank.study.configs import OWN_OPTIMIZERS, RunConfig


class Joint(Optimizer):
    """Optimizers of different parameters as one, whose learning rates are set together."""

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # needs no closure
        """One step of each, at the rates that its groups have here."""
        own = (group for part in self.parts for group in part.param_groups)
        for group, theirs in zip(self.param_groups, own, strict=True):
            theirs["lr"] = group["lr"]
        for part in self.parts:
            part.step()


def _muon(config: RunConfig, parameters: list[nn.Parameter]) -> Optimizer:
    """Muon for matrices and AdamW for the rest, with steps of the size that AdamW's have."""
    lr, decay = config.lr, config.weight_decay
    matrices = [p for p in parameters if p.ndim == 2]
    rest = [p for p in parameters if p.ndim != 2]
    muon = Muon(matrices, lr=lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    return Joint([muon, AdamW(rest, lr=lr, weight_decay=decay)] if rest else [muon])


def _sign(config: RunConfig, parameters: list[nn.Parameter]) -> Optimizer:
    """Gradient descent in which every entry moves by the rate, against the sign of its gradient."""
    descent = SGD(parameters, lr=config.lr, weight_decay=config.weight_decay)

    def signs(*_) -> None:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.sign_()

    descent.register_step_pre_hook(signs)
    return descent


def _momentum(config: RunConfig, parameters: list[nn.Parameter]) -> Optimizer:
    """Gradient descent with the usual momentum."""
    return SGD(parameters, lr=config.lr, momentum=0.9, weight_decay=config.weight_decay)


MAKERS: dict[str, Callable[[RunConfig, list[nn.Parameter]], Optimizer]] = dict(
    zip(OWN_OPTIMIZERS, (_muon, _sign, _momentum), strict=True)
)


def own_optimizer(config: RunConfig, model: nn.Module) -> Optimizer | None:
    """The optimizer of what `model` trains where it is one of OWN_OPTIMIZERS or LoRA+'s; else None.

    LoRA+ (arXiv 2402.12354) is AdamW whose rate is `knob` times as high for B as for A.

    "muon" (https://kellerjordan.github.io/posts/muon, as in torch): a matrix moves along the
    nearest orthogonal matrix to its momentum, so that all directions move alike.
    """
    if config.method == "loraplus":
        from peft.optimizers import create_loraplus_optimizer

        return create_loraplus_optimizer(
            model,  # type: ignore[arg-type]  # PEFT says its own model, any other will do
            AdamW,
            lr=config.lr,
            loraplus_lr_ratio=config.knob,
            loraplus_weight_decay=config.weight_decay,
            fused=True,
        )
    if config.optimizer not in MAKERS:
        return None
    return MAKERS[config.optimizer](config, [p for p in model.parameters() if p.requires_grad])
