"""Factors as they are stored: the product stays, the norms agree, what rounding loses is known."""

import pytest
import torch
from matrices import gaussian

from deltarank import options
from deltarank.factors import DTYPES, Factors, Form, balanced, rounding_loss


def lost(B, A, dtype):
    """The share of |B @ A|^2 that rounding both loses, by the products."""
    exact, rounded = B.double() @ A.double(), B.to(dtype).double() @ A.to(dtype).double()
    return float((exact - rounded).square().sum() / exact.square().sum())


def cut(sigma):
    """B = U S and A of a (96, 64) update with the singular values sigma / (1, 2, ..., 16)."""
    U, V = (torch.linalg.qr(gaussian(d, 16, seed=d)).Q.float() for d in (96, 64))
    return U * sigma / torch.arange(1, 17), V.T


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_balancing_keeps_the_product_and_equals_the_norms(scale):
    B, A = cut(scale)
    B_balanced, A_balanced = balanced(B, A)
    product = B_balanced.double() @ A_balanced.double()
    torch.testing.assert_close(product / scale, B.double() @ A.double() / scale, rtol=0, atol=1e-7)
    of_B, of_A = B_balanced.double().norm(dim=0), A_balanced.double().norm(dim=1)
    torch.testing.assert_close(of_B, of_A, rtol=1e-6, atol=0)


def test_balancing_leaves_directions_of_nothing_alone():
    B, A = cut(1.0)
    B[:, 3], A[5] = 0, 0
    assert all(X.isfinite().all() for X in balanced(B, A))


@pytest.mark.parametrize("scale", [1e-2, 1e-25])  # whose square float32 does not hold
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_loss_by_rounding_is_that_of_the_products(dtype, scale):
    B, A = cut(scale)
    norm = float((B.double() @ A.double()).square().sum())
    found = rounding_loss(B, A, B.to(dtype), A.to(dtype)) / norm
    assert found == pytest.approx(lost(B, A, dtype), rel=1e-5)


def test_balanced_factors_lose_least_in_float16():
    """What the docstring of `balanced` says: a small B in float16 has few digits left."""
    B, A = cut(1e-4)
    plain, even = lost(B, A, torch.float16), lost(*balanced(B, A), torch.float16)
    assert even < 2e-7 and plain > 100 * even
    assert lost(B, A, torch.bfloat16) == pytest.approx(lost(*balanced(B, A), torch.bfloat16), 0.3)


@pytest.mark.parametrize("patterns", [False, True])
def test_the_layout_is_that_of_the_tensors(patterns):
    shapes = {"one": (6, 4), "other": (5, 7)}
    factors = Factors(shapes, {"other": 3, "one": 2}, Form("bfloat16", patterns))

    def of_ones(module):
        (rows, columns), r = shapes[module], factors.ranks[module]
        return torch.ones(rows, r), torch.ones(r, columns), {"squared_norm": 1.0, "kept": 1.0}

    notes = {}
    made = [(W.dtype, tuple(W.shape)) for W in factors.tensors(of_ones, notes)]
    assert made == list(factors.layout().values())
    ranks = {"one": 2, "other": 3} if patterns else {"one": 3, "other": 3}
    assert {module: factors.stored_rank(module) for module in shapes} == ranks
    assert notes.keys() == shapes.keys()


def test_the_padding_is_of_zeros():
    factors = Factors({"one": (6, 4), "other": (5, 7)}, {"one": 1, "other": 3}, Form())
    B, A, _ = factors.stored("one", torch.full((6, 1), 2.0), torch.full((1, 4), 2.0))
    assert B.shape == (6, 3) and A.shape == (3, 4)
    assert torch.equal(B @ A, torch.full((6, 4), 4.0))
    assert B[:, 1:].count_nonzero() == A[1:].count_nonzero() == 0


def test_every_type_is_one_of_torch():
    assert {name: getattr(torch, name) for name in DTYPES} == DTYPES
    assert tuple(DTYPES) == options.DTYPES
