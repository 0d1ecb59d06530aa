"""Gram matrices: their eigenvalues, and their leading eigenvectors with a bound."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor


def add_gram(gram: Tensor, A: Tensor) -> Tensor:
    """Add A.T @ A to the lower triangle of gram, which is all that eigh reads; return gram."""
    for k in range(0, len(gram), 256):
        gram[k:, k : k + 256].addmm_(A[:, k:].T, A[:, k : k + 256])
    return gram


def gram_matrix(A: Tensor) -> Tensor:
    """A.T @ A; NumPy sees that it is symmetric and does half of the work."""
    if A.device.type != "cpu":
        return A.T @ A
    with np.errstate(over="ignore", invalid="ignore"):  # as torch: the trace tells
        return torch.from_numpy(A.numpy().T @ A.numpy())


def max_abs(X: Tensor) -> Tensor:
    """max |X|, without a copy of X."""
    low, high = X.aminmax()
    return torch.maximum(high, -low)


def root_spectrum(gram: Tensor) -> Tensor:
    """Singular values of a matrix, descending, from the lower triangle of its Gram matrix."""
    return torch.linalg.eigvalsh(gram).flip(0).clamp_min(0).sqrt()


def leading_factors(dW: Tensor, r: int) -> tuple[Tensor, Tensor, float]:
    """B (m, r) and A (r, n), in dW's type, with B @ A = truncate(dW, r), and the best |B @ A|^2.

    The factor of the small side holds the r leading eigenvectors of the Gram matrix and is
    orthonormal, the other is dW's product with it.  The best is the sum of the r largest
    eigenvalues: what |B @ A|^2 falls short of it by is rounding.

    >>> B, A, best = leading_factors(torch.tensor([[3.0, 0.0], [0.0, 4.0]]), 1)
    >>> (B @ A).abs().tolist(), round(best, 4)
    ([[0.0, 0.0], [0.0, 4.0]], 16.0)
    """
    X = dW if dW.shape[0] >= dW.shape[1] else dW.T  # (long, small)
    largest = max_abs(X)
    scale = torch.where(largest > 0, largest, 1)
    unit = X / scale  # whose squares do not underflow
    gram = add_gram(unit.new_zeros(unit.shape[1], unit.shape[1]), unit)
    V, best = leading_eigenvectors(gram, r)  # (small, r)
    return *((dW @ V, V.T) if X is dW else (V, V.T @ dW)), best * float(scale) ** 2


def leading_eigenvectors(gram: Tensor, r: int, *, tolerance: float = 0.0) -> tuple[Tensor, float]:
    """V (n, r), orthonormal, and the most that tr(V.T @ gram @ V) can be: r largest eigenvalues.

    gram: (n, n), positive semidefinite; without a tolerance only its lower triangle is read.
    With one, V may hold less than the most by that share of the trace.  It then comes from a
    Krylov space, which takes a fraction of the time where r is small beside n, and the most is
    an upper bound that a Cholesky factorisation has confirmed; without such a bound V is exact.

    >>> V, most = leading_eigenvectors(torch.diag(torch.tensor([1.0, 3.0, 2.0])), 2)
    >>> V.abs().tolist(), most
    ([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], 5.0)
    """
    sizes = (r + max(2 * r, 64), r + max(3 * r, 128))  # the first is enough for most updates
    if r and tolerance and len(gram) >= 2.5 * sizes[0]:
        for V, theta, residuals in _block_lanczos(gram, r, sizes):
            most = _confirmed_bound(gram, V, theta, residuals)
            missing = (most - float(theta.double().sum())) / float(gram.trace())
            if missing <= tolerance:
                return V, most
            if missing > 20 * tolerance:  # as of noise: the larger space would not do either
                break
    eigenvalues, eigenvectors = _eigh(gram)
    return eigenvectors.flip(1)[:, :r], float(eigenvalues[len(gram) - r :].double().sum())


def _eigh(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and eigenvectors of a symmetric matrix, from its lower triangle.

    torch's LAPACK gives up on many float32 matrices with rows of zeros, as updates of a few
    columns have them; NumPy's in float64 does not.
    """
    try:
        return torch.linalg.eigh(gram)
    except torch.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(gram.double().cpu().numpy())
        return torch.from_numpy(values).to(gram), torch.from_numpy(vectors).to(gram)


def _block_lanczos(
    G: Tensor, r: int, sizes: Sequence[int]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield the r leading Ritz vectors V (n, r), values theta and residual norms |G v - theta v|.

    Of Krylov spaces of at least these sizes, from a seeded block, fully reorthogonalised (Golub
    and Van Loan 2013, section 10.3).  Nothing of a space that lost its orthogonality, as it does
    where the matrix has fewer distinct eigenvalues than steps were taken.
    """
    block, limit = 16, sizes[-1] + 16
    basis, H = G.new_empty(len(G), limit + block), G.new_zeros(limit, limit)
    start = torch.randn(len(G), block, generator=torch.Generator().manual_seed(0)).to(G)
    Q, m = torch.linalg.qr(start).Q, 0
    for size in sizes:
        while m < size:
            basis[:, m : m + block] = Q
            m += block
            known, GQ = basis[:, :m], G @ Q
            H[:m, m - block : m] = known.T @ GQ
            Q, R = torch.linalg.qr(GQ - known @ H[:m, m - block : m])
            Q = torch.linalg.qr(Q - known @ (known.T @ Q)).Q  # also where nothing was left of GQ
        theta, Y = _eigh(H[:m, :m].T)
        theta, Y = theta.flip(0)[:r], Y.flip(1)[:, :r]  # (r,), (m, r)
        V, T = torch.linalg.qr(basis[:, :m] @ Y)  # T: the identity, but for signs
        if not torch.allclose(T.abs(), torch.eye(r).to(G), rtol=0, atol=1e-4):
            return
        yield V, theta, (R @ Y[-block:]).norm(dim=0)


def _confirmed_bound(gram: Tensor, V: Tensor, theta: Tensor, residuals: Tensor) -> float:
    """An upper bound on the sum of the r largest eigenvalues, by r Ritz pairs; inf if none holds.

    If M = mu I + V diag(z) V.T - gram is positive definite and z >= 0, that sum is at most
    r mu + sum(z) (the dual of Ky Fan's maximum principle).  With mu = theta_r + gap and
    mu + z_i = theta_i + slack_i, M is so if the rest of the spectrum stays below theta_r + gap / 2
    and sum(residual_i^2 / slack_i) <= gap / 2; the gap is chosen for the least sum of slacks, the
    Cholesky factorisation decides.
    """
    theta, residuals = theta.double(), residuals.double()
    rounding = 32 * torch.finfo(gram.dtype).eps * theta[0]

    def slacks(gap: Tensor) -> Tensor:
        coupled = 2 * residuals * residuals.sum() / gap + rounding
        return torch.maximum(coupled, gap + theta[-1] - theta)  # so that z >= 0

    gaps = (theta[-1] * torch.logspace(-3, 0, 13).to(theta)).clamp_min(2 * rounding)
    gap = min(gaps, key=lambda gap: slacks(gap).sum())
    mu, levels = theta[-1] + gap, theta + slacks(gap)
    M = add_gram(-gram, ((levels - mu).sqrt().to(V) * V).T)
    M.diagonal().add_(mu.to(M))
    confirmed = int(torch.linalg.cholesky_ex(M).info) == 0
    return min(float(levels.sum()), float(gram.trace())) if confirmed else math.inf
