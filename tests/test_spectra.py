"""Spectra, ranks and the null, against float64 SVD, closed forms and PEFT."""

import math

import pytest
import torch
from matrices import gaussian, planted

from deltarank.spectra import (
    above_edge,
    energy,
    energy_rank,
    entropy_rank,
    factor_singular_values,
    null_energy,
    singular_values,
    spectrum_measures,
    stable_rank,
    subspace_overlap,
    truncate,
)

SHAPES = [(48, 48), (96, 24), (24, 96), (1, 30), (30, 1), (1, 1)]


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_singular_values_equal_a_float64_svd(shape, scale):
    dW = (gaussian(*shape) * scale).float()
    S, oracle = singular_values(dW), torch.linalg.svdvals(dW.double())
    assert S.dtype == torch.float64
    assert S.shape == oracle.shape
    assert (S - oracle).abs().max() <= 1e-9 * oracle[0]


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_singular_values_whose_squares_leave_float64(scale):
    dW = gaussian(20, 12)
    assert torch.allclose(singular_values(dW * scale) / scale, torch.linalg.svdvals(dW))


@pytest.mark.parametrize("rank", [1, 8, 60])
@pytest.mark.parametrize("shape", [(200, 100), (100, 200), (100, 100)], ids=str)
def test_singular_values_of_a_rank_deficient_matrix(shape, rank):
    dW = gaussian(shape[0], rank) @ gaussian(rank, shape[1], seed=1)
    S, oracle = singular_values(dW), torch.linalg.svdvals(dW)
    assert (S - oracle)[:rank].abs().max() <= 1e-9 * oracle[0]
    assert (S - oracle).abs().max() <= 1e-7 * oracle[0]  # zeros: the Gram matrix's floor


def test_singular_values_of_a_decaying_spectrum():
    S = torch.logspace(0, -6, 30, dtype=torch.float64)
    assert torch.allclose(singular_values(planted(S)), S, atol=1e-9, rtol=0)


def test_singular_values_of_a_zero_matrix():
    assert singular_values(torch.zeros(5, 3)).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_singular_values_refuse_nan_and_inf(value):
    dW = torch.ones(4, 3)
    dW[1, 2] = value
    with pytest.raises(ValueError, match="NaN or inf"):
        singular_values(dW)


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (40, 40)], ids=str)
def test_factor_singular_values_equal_the_svd_of_the_product(shape):
    B, A = gaussian(shape[0], 5), gaussian(5, shape[1], seed=1)
    oracle = torch.linalg.svdvals(B @ A)
    S = factor_singular_values(B.float(), A.float())
    assert S.shape == (5,)
    assert torch.allclose(S, oracle[:5], rtol=1e-6)


def test_energy_of_a_planted_spectrum():
    E = energy(singular_values(planted([3.0, 2.0, 1.0], (6, 3))))
    assert E.tolist() == pytest.approx([9 / 14, 13 / 14, 1.0])


def test_energy_is_one_minus_the_squared_error_of_the_cut():
    dW = gaussian(20, 12)
    E = energy(singular_values(dW))
    errors = [(dW - truncate(dW, r)).square().sum() for r in range(1, 13)]
    assert torch.allclose(E, 1 - torch.stack(errors) / dW.square().sum())


def test_energy_and_ranks_of_a_zero_update():
    S = torch.zeros(4)
    assert energy(S).tolist() == [0.0] * 4
    assert (energy_rank(S, 0.9), stable_rank(S), entropy_rank(S)) == (0, 0, 0)


@pytest.mark.parametrize(
    ("share", "rank"), [(0.25, 1), (0.2500001, 2), (0.5, 2), (0.75, 3), (0.76, 4), (1.0, 4)]
)
def test_energy_rank_is_the_smallest_that_reaches_the_share(share, rank):
    assert energy_rank(torch.ones(4), share) == rank


@pytest.mark.parametrize("rank", [1, 5, 30])
def test_energy_rank_finds_a_planted_rank(rank):
    S = singular_values(planted(torch.linspace(3, 1, rank)))
    assert energy_rank(S, 1 - 1e-9) == rank


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1, math.nan])
def test_energy_rank_refuses_a_share_outside_0_to_1(share):
    with pytest.raises(ValueError, match="share"):
        energy_rank(torch.ones(3), share)


@pytest.mark.parametrize(("S", "rank"), [([2.0, 1.0, 1.0], 1.5), ([5.0], 1.0), ([7.0] * 9, 9.0)])
def test_stable_rank_closed_form(S, rank):
    assert stable_rank(torch.tensor(S)) == pytest.approx(rank)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_entropy_rank_closed_form(scale):
    p = (0.5, 0.25, 0.25)
    expected = math.exp(-sum(x * math.log(x) for x in p))
    assert entropy_rank(scale * torch.tensor(p)) == pytest.approx(expected)
    assert entropy_rank(scale * torch.tensor([1.0] * 6 + [0.0] * 3)) == pytest.approx(6)


@pytest.mark.parametrize("shape", [(64, 64), (64, 128), (32, 256), (96, 64)], ids=str)
def test_null_energy_closed_form_agrees_with_simulation(shape):
    closed = null_energy(shape)
    simulated = null_energy(shape, draws=8)
    assert closed.shape == (min(shape),)
    assert (closed - simulated).abs().max() < 0.01


@pytest.mark.parametrize("n", [64, 256, 768])
def test_null_energy_of_a_square_matrix_is_the_quarter_circle_law(n):
    a = torch.linspace(0, math.pi / 2, 200_001, dtype=torch.float64)  # sigma = 2 cos(a)
    share_of_ranks = 2 / math.pi * (a - (2 * a).sin() / 2)
    share_of_energy = 2 / math.pi * (a - (4 * a).sin() / 4)
    r = torch.arange(1, n + 1, dtype=torch.float64)
    at = torch.searchsorted(share_of_ranks, r / n).clamp_max(len(a) - 1)
    assert torch.allclose(null_energy((n, n)), share_of_energy[at], atol=2e-4)


@pytest.mark.parametrize(  # recomputed from the Marchenko-Pastur integral, checked by simulation
    ("shape", "r90_over_min", "energy_8", "energy_64"),
    [
        ((4096, 4096), 0.510, 0.008, 0.058),
        ((4096, 11008), 0.712, 0.005, 0.039),
        ((768, 768), 0.510, 0.040, 0.269),
        ((768, 3072), 0.761, 0.023, 0.165),
        ((576, 1536), 0.711, 0.035, 0.241),
        ((128, 896), 0.808, 0.109, 0.659),
    ],
    ids=str,
)
def test_null_energy_constants(shape, r90_over_min, energy_8, energy_64):
    E = null_energy(shape)
    r90 = int((E < 0.9).sum()) + 1
    assert r90 / min(shape) == pytest.approx(r90_over_min, abs=1.5 / min(shape) + 5e-4)
    assert float(E[7]) == pytest.approx(energy_8, abs=1e-3)
    assert float(E[63]) == pytest.approx(energy_64, abs=1e-3)


def test_null_energy_ignores_the_transpose():
    assert torch.equal(null_energy((40, 90)), null_energy((90, 40)))


@pytest.mark.parametrize("r", [0, 1, 5, 12])
@pytest.mark.parametrize("shape", [(20, 12), (12, 20)], ids=str)
def test_truncate_is_the_best_approximation(shape, r):
    dW = gaussian(*shape)
    S = torch.linalg.svdvals(dW)
    cut = truncate(dW, r)
    assert torch.linalg.matrix_rank(cut) == r
    error = (dW - cut).square().sum()
    assert error == pytest.approx(float(S[r:].square().sum()), abs=1e-9)


@pytest.mark.parametrize("r", [-1, 13])
def test_truncate_refuses_a_rank_that_the_matrix_cannot_have(r):
    with pytest.raises(ValueError, match="r="):
        truncate(torch.ones(20, 12), r)


def test_subspace_overlap_of_the_same_subspace_is_one():
    A = gaussian(30, 20)
    assert subspace_overlap(A, -3 * A, 5) == pytest.approx(1)


def test_subspace_overlap_of_orthogonal_subspaces_is_zero():
    eye = torch.eye(8)
    assert subspace_overlap(eye[:, :3], eye[:, 3:6], 3) == pytest.approx(0, abs=1e-12)


def test_subspace_overlap_by_chance_is_r_over_m():
    pairs = [(gaussian(100, 40, seed=2 * i), gaussian(100, 50, seed=2 * i + 1)) for i in range(20)]
    overlaps = [subspace_overlap(A, B, 10) for A, B in pairs]
    assert sum(overlaps) / 20 == pytest.approx(0.1, abs=0.015)


def test_subspace_overlap_is_symmetric_and_counts_shared_directions():
    A = planted([5.0, 4.0, 3.0, 2.0], (30, 20))
    U = torch.linalg.svd(A).U
    B = U[:, [0, 1, 8, 9]]  # shares two of four directions
    B = B * torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    assert subspace_overlap(A, B, 4) == pytest.approx(0.5)
    assert subspace_overlap(B, A, 4) == pytest.approx(0.5)


@pytest.mark.parametrize("r", [0, 13])
def test_subspace_overlap_refuses_a_rank_out_of_range(r):
    with pytest.raises(ValueError, match="r="):
        subspace_overlap(gaussian(20, 12), gaussian(20, 15), r)


@pytest.mark.parametrize("shape", [(400, 400), (600, 200), (200, 600)], ids=str)
@pytest.mark.parametrize("spikes", [0, 1, 5])
def test_above_edge_counts_planted_spikes_in_noise(shape, spikes):
    noise = 0.01 * gaussian(*shape)
    edge = 0.01 * (math.sqrt(shape[0]) + math.sqrt(shape[1]))
    spiked = noise + planted([3 * edge] * spikes, shape, seed=5) if spikes else noise
    assert spikes <= above_edge(singular_values(spiked), shape) <= spikes + 1


@pytest.mark.parametrize("shape", [(400, 400), (600, 200)], ids=str)
def test_the_edge_of_noise_is_where_it_is(shape):
    """Noise of variance 1 as it is expected, with one value just above its edge, one just below."""
    null = null_energy(shape).diff(prepend=torch.zeros(1, dtype=torch.float64))
    edge, S = math.sqrt(shape[0]) + math.sqrt(shape[1]), (shape[0] * shape[1] * null).sqrt()
    S[:2] = torch.tensor([1.03 * edge, 0.98 * edge])
    assert above_edge(S, shape) == 1


def test_a_short_spectrum_of_a_lora_is_measured_as_the_whole():
    """The update of a LoRA of rank 8 has eight singular values; the other 632 are zero."""
    S, shape = torch.linspace(2, 1, 8), (1024, 640)
    measures = spectrum_measures(S, shape)
    null = null_energy(shape)
    assert measures["excess_8"] == pytest.approx(1 - float(null[7]))
    assert measures["excess_64"] == pytest.approx(1 - float(null[63]))
    assert measures["above_edge"] == 8
    assert measures["min_dim"] == 640
    assert measures == spectrum_measures(torch.cat([S, torch.zeros(632)]), shape)


def test_above_edge_of_a_zero_update():
    assert above_edge(torch.zeros(4), (4, 6)) == 0


def test_without_an_update_every_measure_is_zero():
    measures = spectrum_measures(torch.zeros(4), (4, 6))
    assert measures.pop("min_dim") == 4
    assert set(measures.values()) == {0}


def test_all_of_the_energy_is_no_rank_beyond_the_matrix():
    S = 1 / torch.arange(1.0, 11)  # the shares of which end below 1 by rounding
    assert energy_rank(S, 1.0) == 10


def test_directions_of_rounding_are_not_above_the_edge():
    S = torch.cat([torch.ones(3), torch.logspace(-8, -16, 61)])
    assert above_edge(S, (64, 64)) == 3
