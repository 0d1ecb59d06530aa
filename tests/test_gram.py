"""Leading eigenvectors and factors, against planted eigenvalues and float64 SVD."""

import functools
import math

import pytest
import torch

from deltarank.gram import _confirmed_bound, leading_eigenvectors, leading_factors

SPECTRA = {  # of a 300 x 200 matrix
    "a head above noise": torch.cat([torch.linspace(9, 5, 20), torch.full((180,), 0.05)]),
    "a decay": 1 / torch.arange(1.0, 201),
    "noise": torch.linspace(2, 0.2, 200),
    "a tiny update": torch.linspace(2, 0.2, 200) * 1e-25,
}


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("r", [1, 8, 200])
@pytest.mark.parametrize("turned", [False, True])
def test_leading_factors_hold_the_best_that_their_rank_can(kind, r, turned):
    torch.manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(n, 200))[0] for n in (300, 200))
    dW = (U * SPECTRA[kind] @ V.T).T if turned else U * SPECTRA[kind] @ V.T
    B, A, best = leading_factors(dW, r)
    assert B.shape == (dW.shape[0], r) and A.shape == (r, dW.shape[1])
    exact = SPECTRA[kind].double().square()
    held = (B.double() @ A.double()).square().sum()
    assert abs(held - exact[:r].sum()) / exact.sum() < 1e-6
    assert abs(best - exact[:r].sum()) / exact.sum() < 1e-6


EIGENVALUES = {  # of a Gram matrix, (600,), and whether a Krylov space finds the leading ones
    "a head above noise": (torch.cat([torch.linspace(81, 25, 20), torch.full((580,), 3e-3)]), True),
    "a decay": (1 / torch.arange(1.0, 601) ** 2, True),
    "a slow decay": (1 / torch.arange(1.0, 601), True),
    "the same twenty times": (torch.cat([torch.ones(20), torch.full((580,), 1e-6)]), True),
    "noise": (torch.linspace(4, 0.04, 600), False),
    "all the same": (torch.ones(600), False),
    "one alone": (torch.cat([torch.ones(1), torch.zeros(599)]), True),
}


def a_gram(eigenvalues):
    """A Gram matrix of these eigenvalues, and its eigenvectors in their order."""
    torch.manual_seed(0)
    Q = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), dtype=torch.float64)).Q
    return ((Q * eigenvalues.double()) @ Q.T).float(), Q.float()


@pytest.mark.parametrize("kind", EIGENVALUES)
@pytest.mark.parametrize("r", [8, 40])
def test_leading_eigenvectors_hold_the_most_within_the_tolerance(kind, r, monkeypatch):
    eigenvalues, krylov = EIGENVALUES[kind]
    gram, _ = a_gram(eigenvalues)
    eigh, sizes = torch.linalg.eigh, []
    monkeypatch.setattr(
        torch.linalg, "eigh", lambda A, **options: sizes.append(len(A)) or eigh(A, **options)
    )
    V, most = leading_eigenvectors(gram, r, tolerance=1e-3)
    torch.testing.assert_close(V.T @ V, torch.eye(r), rtol=0, atol=1e-5)
    total, exact = float(eigenvalues.double().sum()), float(eigenvalues[:r].double().sum())
    held = float((V.double().T @ gram.double() @ V.double()).trace())
    rounding = 1e-5 * total
    assert exact - 1e-3 * total - rounding <= held <= exact + rounding
    assert max(held, exact) - rounding <= most <= held + 1e-3 * total + rounding
    assert (max(sizes) < 600) == krylov


@functools.cache
def a_sparse_update(kind, seed):
    """An update (500, 400) of few entries or few values, and its squared singular values."""
    torch.manual_seed(seed)
    X, k = torch.zeros(500, 400), int(torch.randint(1, 60, (1,)))
    if kind == "columns":
        X[:, torch.randperm(400)[:k]] = torch.randn(500, k)
    elif kind == "a block":
        X[:k, :k] = torch.randn(k, k)
    elif kind == "entries":
        X[torch.randint(500, (k,)), torch.randint(400, (k,))] = 1.0
    else:
        X = torch.eye(500, 400)
        X[:k] *= 3
    return X, torch.linalg.svdvals(X.double()).square()


@pytest.mark.parametrize("kind", ["columns", "a block", "entries", "two values"])
@pytest.mark.parametrize("r", [1, 8, 40])
@pytest.mark.parametrize("tolerance", [0.0, 1e-3])
def test_leading_eigenvectors_of_sparse_updates(kind, r, tolerance):
    for seed in range(10):
        X, squares = a_sparse_update(kind, seed)
        V, most = leading_eigenvectors(X.T @ X, r, tolerance=tolerance)
        torch.testing.assert_close(V.T @ V, torch.eye(r), rtol=0, atol=1e-5)
        best, total = float(squares[:r].sum()), float(squares.sum())
        held = float((X.double() @ V.double()).square().sum())
        assert best - (tolerance + 1e-5) * total <= held <= best + 1e-5 * total
        assert max(held, best) - 1e-5 * total <= most


@pytest.mark.parametrize("kind", ["a head above noise", "a decay", "a slow decay"])
@pytest.mark.parametrize("missed", [0, 3, 7])
def test_a_bound_is_not_confirmed_when_a_leading_direction_was_missed(kind, missed):
    eigenvalues, _ = EIGENVALUES[kind]
    gram, Q = a_gram(eigenvalues)
    found = [i for i in range(9) if i != missed]
    bound = _confirmed_bound(gram, Q[:, :8], eigenvalues[:8], torch.zeros(8))
    assert float(eigenvalues[:8].sum()) <= bound < math.inf
    assert _confirmed_bound(gram, Q[:, found], eigenvalues[found], torch.zeros(8)) == math.inf


@pytest.mark.parametrize("tolerance", [0.0, 1e-3])
def test_no_direction_holds_nothing(tolerance):
    gram, _ = a_gram(EIGENVALUES["a decay"][0])
    V, most = leading_eigenvectors(gram, 0, tolerance=tolerance)
    assert V.shape == (600, 0) and most == 0


def test_factors_of_rank_0_are_an_update_of_zeros():
    B, A, best = leading_factors(torch.ones(5, 3), 0)
    assert torch.equal(B @ A, torch.zeros(5, 3)) and best == 0
