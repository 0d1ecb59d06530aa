"""Intruders: leading directions of tuned weights that no direction of the base is near."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from deltarank.gram import leading_factors
from deltarank.study.models import load_model, matrices

TOP = 10  # leading directions of a matrix that are looked at, as in PEFT's tuners/lora/intruders
THRESHOLDS = (0.3, 0.5, 0.7, 0.9)  # cosines; PEFT's is 0.5


def intruder_cosines(W1: Tensor, U0: Tensor) -> Tensor:
    """How near each of the TOP leading left singular vectors of W1 (m, n) comes to one of U0.

    U0 (m, k): all left singular vectors of the base.  Returns the largest |cosine| of each, (TOP,)
    or (min(m, n),); an intruder dimension has a low one (Shuttleworth et al. 2024, arXiv
    2410.21228).

    >>> U0 = torch.eye(3)
    >>> turned = torch.tensor([[0.6, -0.8, 0.0], [0.8, 0.6, 0.0], [0.0, 0.0, 1.0]])
    >>> intruder_cosines(turned @ torch.diag(torch.tensor([3.0, 2.0, 1.0])), U0)
    tensor([0.8000, 0.8000, 1.0000])
    """
    B, _, _ = leading_factors(W1, min(TOP, *W1.shape))
    return ((B / B.norm(dim=0)).T @ U0.to(B)).abs().amax(1)


@functools.lru_cache(1)
def base_directions(model: str) -> dict[str, Tensor]:
    """All left singular vectors (m, min(m, n)) of each matrix of a base model, by name."""
    weights = matrices(load_model(model))
    return {n: torch.linalg.svd(W.detach(), full_matrices=False).U for n, W in weights.items()}


def intruder_counts(W1: dict[str, Tensor], model: str) -> dict[str, int]:
    """How many of the leading directions of all matrices are intruders, by threshold.

    W1: the tuned matrices by name; model: the base.
    """
    U0 = base_directions(model)
    found = torch.cat([intruder_cosines(W, U0[name].to(W.device)) for name, W in W1.items()])
    return {f"{threshold:g}": int((found < threshold).sum()) for threshold in THRESHOLDS}
