"""Spectra, tensors in and tensors out: singular values, energy, ranks, noise, overlaps."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from deltarank.checks import all_finite, require, require_share
from deltarank.gram import add_gram, max_abs, root_spectrum

ZERO = 1e-7  # of sigma_1: what is less is rounding


def singular_values(dW: Tensor) -> Tensor:
    """Singular values of a matrix, descending, float64, (min(m, n),).

    Square roots of the eigenvalues of the Gram matrix of the small side, formed in float64
    after division by max |dW|: twice as fast as an SVD and within 1e-9 of sigma_1 of a float64
    one; values that are zero in exact arithmetic come out below ZERO of sigma_1.
    Raises ValueError for NaN or infinite entries.

    >>> singular_values(torch.tensor([[3.0, 0.0], [0.0, 4.0]])).tolist()
    [4.0, 3.0]
    """
    require(all_finite(dW), "the matrix holds NaN or infinite values")
    scale = max_abs(dW).double() if dW.numel() else torch.zeros((), dtype=torch.float64)
    if scale == 0:
        return torch.zeros(min(dW.shape), dtype=torch.float64, device=dW.device)
    A = (dW if dW.shape[0] >= dW.shape[1] else dW.T).double() / scale
    return root_spectrum(add_gram(A.new_zeros(A.shape[1], A.shape[1]), A)) * scale


def factor_singular_values(B: Tensor, A: Tensor) -> Tensor:
    """Singular values of B @ A, descending, float64, (min(m, r, n),), without forming the product.

    B: (m, r), A: (r, n).  QR of both factors, then the SVD of the small core.
    """
    core = torch.linalg.qr(B.double()).R @ torch.linalg.qr(A.double().T).R.T
    return torch.linalg.svdvals(core)


def factor_svd(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, r), S (r,) descending and Vh (r, n) of B @ A, float64, without forming the product.

    B: (m, r), A: (r, n); where r exceeds m or n, the smallest of the three is returned for r.

    >>> U, S, Vh = factor_svd(torch.tensor([[2.0], [0.0]]), torch.tensor([[0.0, 3.0]]))
    >>> S.tolist(), (U @ Vh).abs().tolist()
    ([6.0], [[0.0, 1.0], [0.0, 0.0]])
    """
    (Q_B, R_B), (Q_A, R_A) = torch.linalg.qr(B.double()), torch.linalg.qr(A.double().T)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    return Q_B @ U, S, Vh @ Q_A.T


def energy(S: Tensor) -> Tensor:
    """Share of sum(sigma^2) that the best approximation of rank 1, 2, ... keeps, (len(S),).

    By Eckart and Young (1936), E(r) = 1 - |dW - dW_r|_F^2 / |dW|_F^2.  Zeros for dW = 0.

    >>> energy(torch.tensor([2.0, 1.0, 1.0])).round(decimals=3).tolist()
    [0.667, 0.833, 1.0]
    """
    squares = S.double().square()
    total = squares.sum()
    return squares.cumsum(0) / total if total > 0 else torch.zeros_like(squares)


def common_energy(spectra: Iterable[Tensor], ranks: int | Iterable[int]) -> float:
    """E of several matrices together: what their cuts keep of the sum of sigma^2.

    ranks: to which they are cut, one for all or one a matrix, in their order.
    Raises ValueError for a rank below 0.

    >>> common_energy([torch.tensor([2.0, 1.0]), torch.tensor([1.0])], 1)
    0.8333333333333334
    """
    squares = [S.double().square() for S in spectra]
    each = [*ranks] if isinstance(ranks, Iterable) else [ranks] * len(squares)
    require(min(each, default=0) >= 0, f"ranks={ranks}: must be 0 or more")
    kept = sum(s[:r].sum() for s, r in zip(squares, each, strict=True))
    return float(kept / sum(s.sum() for s in squares))


def energy_rank(S: Tensor, share: float) -> int:
    """Smallest r with energy(S)[r - 1] >= share; 0 for dW = 0 (as PEFT's convert_to_lora).

    Raises ValueError for a share that is not above 0 and at most 1.

    >>> energy_rank(torch.tensor([2.0, 1.0, 1.0]), 0.8)
    2
    """
    require_share(share)
    E = energy(S)
    return int((min(share, float(E[-1])) > E).sum()) + 1 if E[-1] > 0 else 0


def stable_rank(S: Tensor) -> float:
    """sum(sigma^2) / sigma_1^2 (Rudelson and Vershynin 2007); 0 for dW = 0.

    >>> u, v = torch.arange(1.0, 4.0), torch.ones(5)
    >>> round(stable_rank(singular_values(torch.outer(u, v))), 6)
    1.0
    """
    squares = S.double().square()
    return float(squares.sum() / squares.max()) if squares.sum() > 0 else 0.0


def entropy_rank(S: Tensor) -> float:
    """exp(entropy of sigma / sum(sigma)), the effective rank of Roy and Vetterli (2007).

    >>> round(entropy_rank(singular_values(torch.eye(7))), 6)
    7.0
    """
    p = S.double() / S.double().sum()
    return float(torch.special.entr(p).sum().exp()) if S.sum() > 0 else 0.0


def rank_measures(S: Tensor) -> dict[str, float]:
    """The ranks of one spectrum by each definition: energy_8, r90, entropy_rank, stable_rank.

    >>> rank_measures(torch.ones(16))["energy_8"]
    0.5
    """
    return {
        "energy_8": float(energy(S)[:8][-1]),
        "r90": energy_rank(S, 0.9),
        "entropy_rank": entropy_rank(S),
        "stable_rank": stable_rank(S),
    }


@functools.cache
def _marchenko_pastur(c: float) -> tuple[Tensor, Tensor, Tensor]:
    """x over the support of the law at aspect ratio c <= 1, its cumulative mass and moment.

    x is the squared singular value of noise over (entry variance x long side); both sums end at 1.
    """
    low, high = (1 - c**0.5) ** 2, (1 + c**0.5) ** 2
    # x = low + (high - low) sin^2(t) removes the square-root singularity at both edges
    t = torch.linspace(0, torch.pi / 2, 20_001, dtype=torch.float64)
    x = low + (high - low) * t.sin().square()
    density = (t.sin() * t.cos()).square() / x.clamp_min(1e-12)
    mass, moment = (torch.cumulative_trapezoid(y, t) for y in (density, density * x))
    return x[1:], mass / mass[-1], moment / moment[-1]


@functools.cache
def null_energy(shape: tuple[int, int], *, draws: int = 0) -> Tensor:
    """energy(S) of a matrix of this shape with independent entries of one variance.

    draws = 0: closed form, what the largest r / n of the Marchenko-Pastur law (1967) hold of it.
    draws > 0: mean over that many seeded Gaussian matrices.  Both (min(shape),), float64.

    >>> round(float(null_energy((768, 768))[63]), 3)
    0.269
    """
    small, large = sorted(shape)
    if draws:
        generator = torch.Generator().manual_seed(0)
        noise = (torch.randn(large, small, generator=generator) for _ in range(draws))
        return torch.stack([energy(singular_values(X)) for X in noise]).mean(0)
    _, mass, moment = _marchenko_pastur(small / large)
    quantiles = 1 - torch.arange(1, small + 1, dtype=torch.float64) / small  # top r of n
    return 1 - torch.from_numpy(np.interp(quantiles, mass, moment))


def above_edge(S: Tensor, shape: tuple[int, int]) -> int:
    """How many singular values lie above the upper edge of the Marchenko-Pastur law.

    The variance of the noise is taken from the median singular value, as Gavish and Donoho
    (2014, arXiv 1305.5870) do; below ZERO of the largest it is 0, and so 0 for dW = 0.

    >>> above_edge(torch.cat([torch.tensor([9.0, 8.0]), torch.ones(62)]), (64, 64))
    2
    >>> above_edge(torch.cat([torch.ones(3), torch.full((61,), 1e-9)]), (64, 64))
    3
    """
    x, mass, _ = _marchenko_pastur(min(shape) / max(shape))
    squares = torch.where(ZERO * S.max() < S, S, 0).double().square()
    edge = squares.median() * float(x[-1]) / np.interp(0.5, mass, x)
    return int((squares > edge).sum())


def spectrum_measures(S: Tensor, shape: tuple[int, int]) -> dict[str, float]:
    """What a spectrum says beside noise of its shape: rank_measures, and of E(r) the excess.

    excess_8, _16, _64: E(r) - E_null(r), shares of sum(sigma^2); r90_over_null: r90 over that of
    noise; above_edge; min_dim; squared_norm: sum(sigma^2).  All but min_dim are 0 for dW = 0.
    """
    S = F.pad(S, (0, min(shape) - len(S)))  # a LoRA has no more than its rank; the rest are 0
    E, null = energy(S), null_energy(shape)
    row = rank_measures(S)
    excess = E - null if E[-1] > 0 else E
    row |= {f"excess_{r}": float(excess[:r][-1]) for r in (8, 16, 64)}
    row["r90_over_null"] = row["r90"] / (int((null < 0.9).sum()) + 1)
    row["above_edge"] = above_edge(S, shape)
    return row | {"min_dim": min(shape), "squared_norm": float(S.double().square().sum())}


def truncate(dW: Tensor, r: int) -> Tensor:
    """The best rank-r approximation of dW in the Frobenius norm, same shape and dtype.

    Raises ValueError for r below 0 or above min(dW.shape).
    """
    limit = min(dW.shape)
    require(0 <= r <= limit, f"r={r}: a {tuple(dW.shape)} matrix has ranks 0 to {limit}")
    U, S, Vh = torch.linalg.svd(dW, full_matrices=False)
    return (U[:, :r] * S[:r]) @ Vh[:r]


def subspace_overlap(A: Tensor, B: Tensor, r: int) -> float:
    """|U_A^T U_B|_F^2 / r of the leading r left singular vectors: 1 same, r / m by chance.

    A, B: (m, n), (m, n').  Transpose both for the right singular vectors.  Raises ValueError where
    r is less than 1 or more than the smallest side.

    >>> subspace_overlap(torch.eye(4), torch.eye(4), 4)
    1.0
    """
    limit = min(*A.shape, *B.shape)
    require(1 <= r <= limit, f"r={r}: must be between 1 and {limit}")
    U_A, U_B = (torch.linalg.svd(X.double(), full_matrices=False).U[:, :r] for X in (A, B))
    return float((U_A.T @ U_B).square().sum() / r)
