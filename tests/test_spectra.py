"""Spectra, ranks and the null, against float64 SVD, closed forms and PEFT."""

import doctest
import math

import pandas as pd
import pytest
import torch

import utils

SHAPES = [(48, 48), (96, 24), (24, 96), (1, 30), (30, 1), (1, 1)]


def gaussian(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def planted(S, shape=(40, 30), seed=0):
    """A matrix with the singular values S."""
    U = torch.linalg.qr(gaussian(shape[0], len(S), seed=seed)).Q
    V = torch.linalg.qr(gaussian(shape[1], len(S), seed=seed + 1)).Q
    return U @ torch.diag(torch.as_tensor(S, dtype=torch.float64)) @ V.T


def test_doctests_of_utils():
    outcome = doctest.testmod(utils)
    assert outcome.failed == 0
    assert outcome.attempted >= 8


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_singular_values_equal_a_float64_svd(shape, scale):
    dW = (gaussian(*shape) * scale).float()
    S, oracle = utils.singular_values(dW), torch.linalg.svdvals(dW.double())
    assert S.dtype == torch.float64
    assert S.shape == oracle.shape
    assert (S - oracle).abs().max() <= 1e-9 * oracle[0]


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_singular_values_whose_squares_leave_float64(scale):
    dW = gaussian(20, 12)
    assert torch.allclose(utils.singular_values(dW * scale) / scale, torch.linalg.svdvals(dW))


@pytest.mark.parametrize("rank", [1, 8, 60])
@pytest.mark.parametrize("shape", [(200, 100), (100, 200), (100, 100)], ids=str)
def test_singular_values_of_a_rank_deficient_matrix(shape, rank):
    dW = gaussian(shape[0], rank) @ gaussian(rank, shape[1], seed=1)
    S, oracle = utils.singular_values(dW), torch.linalg.svdvals(dW)
    assert (S - oracle)[:rank].abs().max() <= 1e-9 * oracle[0]
    assert (S - oracle).abs().max() <= 1e-7 * oracle[0]  # zeros: the Gram matrix's floor


def test_singular_values_of_a_decaying_spectrum():
    S = torch.logspace(0, -6, 30, dtype=torch.float64)
    assert torch.allclose(utils.singular_values(planted(S)), S, atol=1e-9, rtol=0)


def test_singular_values_of_a_zero_matrix():
    assert utils.singular_values(torch.zeros(5, 3)).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_singular_values_refuse_nan_and_inf(value):
    dW = torch.ones(4, 3)
    dW[1, 2] = value
    with pytest.raises(ValueError, match="NaN or inf"):
        utils.singular_values(dW)


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (40, 40)], ids=str)
def test_factor_singular_values_equal_the_svd_of_the_product(shape):
    B, A = gaussian(shape[0], 5), gaussian(5, shape[1], seed=1)
    oracle = torch.linalg.svdvals(B @ A)
    S = utils.factor_singular_values(B.float(), A.float())
    assert S.shape == (5,)
    assert torch.allclose(S, oracle[:5], rtol=1e-6)


def test_energy_of_a_planted_spectrum():
    E = utils.energy(utils.singular_values(planted([3.0, 2.0, 1.0], (6, 3))))
    assert E.tolist() == pytest.approx([9 / 14, 13 / 14, 1.0])


def test_energy_is_one_minus_the_squared_error_of_the_cut():
    dW = gaussian(20, 12)
    E = utils.energy(utils.singular_values(dW))
    errors = [(dW - utils.truncate(dW, r)).square().sum() for r in range(1, 13)]
    assert torch.allclose(E, 1 - torch.stack(errors) / dW.square().sum())


def test_energy_and_ranks_of_a_zero_update():
    S = torch.zeros(4)
    assert utils.energy(S).tolist() == [0.0] * 4
    assert (utils.energy_rank(S, 0.9), utils.stable_rank(S), utils.entropy_rank(S)) == (0, 0, 0)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.95, 0.99])
@pytest.mark.parametrize("seed", range(3))
def test_energy_rank_selects_as_peft_does(share, seed):
    from peft.tuners.lora.conversion import _find_cutoff_index

    S = utils.singular_values(gaussian(50, 40, seed=seed))
    assert utils.energy_rank(S, share) == _find_cutoff_index(S, share)


@pytest.mark.parametrize(
    ("share", "rank"), [(0.25, 1), (0.2500001, 2), (0.5, 2), (0.75, 3), (0.76, 4), (1.0, 4)]
)
def test_energy_rank_is_the_smallest_that_reaches_the_share(share, rank):
    assert utils.energy_rank(torch.ones(4), share) == rank


@pytest.mark.parametrize("rank", [1, 5, 30])
def test_energy_rank_finds_a_planted_rank(rank):
    S = utils.singular_values(planted(torch.linspace(3, 1, rank)))
    assert utils.energy_rank(S, 1 - 1e-9) == rank


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1, math.nan])
def test_energy_rank_refuses_a_share_outside_0_to_1(share):
    with pytest.raises(ValueError, match="share"):
        utils.energy_rank(torch.ones(3), share)


@pytest.mark.parametrize(("S", "rank"), [([2.0, 1.0, 1.0], 1.5), ([5.0], 1.0), ([7.0] * 9, 9.0)])
def test_stable_rank_closed_form(S, rank):
    assert utils.stable_rank(torch.tensor(S)) == pytest.approx(rank)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_entropy_rank_closed_form(scale):
    p = (0.5, 0.25, 0.25)
    expected = math.exp(-sum(x * math.log(x) for x in p))
    assert utils.entropy_rank(scale * torch.tensor(p)) == pytest.approx(expected)
    assert utils.entropy_rank(scale * torch.tensor([1.0] * 6 + [0.0] * 3)) == pytest.approx(6)


@pytest.mark.parametrize("shape", [(64, 64), (64, 128), (32, 256), (96, 64)], ids=str)
def test_null_energy_closed_form_agrees_with_simulation(shape):
    closed = utils.null_energy(shape)
    simulated = utils.null_energy(shape, draws=8)
    assert closed.shape == (min(shape),)
    assert (closed - simulated).abs().max() < 0.01


@pytest.mark.parametrize("n", [64, 256, 768])
def test_null_energy_of_a_square_matrix_is_the_quarter_circle_law(n):
    a = torch.linspace(0, math.pi / 2, 200_001, dtype=torch.float64)  # sigma = 2 cos(a)
    share_of_ranks = 2 / math.pi * (a - (2 * a).sin() / 2)
    share_of_energy = 2 / math.pi * (a - (4 * a).sin() / 4)
    r = torch.arange(1, n + 1, dtype=torch.float64)
    at = torch.searchsorted(share_of_ranks, r / n).clamp_max(len(a) - 1)
    assert torch.allclose(utils.null_energy((n, n)), share_of_energy[at], atol=2e-4)


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
    E = utils.null_energy(shape)
    r90 = int((E < 0.9).sum()) + 1
    assert r90 / min(shape) == pytest.approx(r90_over_min, abs=1.5 / min(shape) + 5e-4)
    assert float(E[7]) == pytest.approx(energy_8, abs=1e-3)
    assert float(E[63]) == pytest.approx(energy_64, abs=1e-3)


def test_null_energy_ignores_the_transpose():
    assert torch.equal(utils.null_energy((40, 90)), utils.null_energy((90, 40)))


@pytest.mark.parametrize("r", [0, 1, 5, 12])
@pytest.mark.parametrize("shape", [(20, 12), (12, 20)], ids=str)
def test_truncate_is_the_best_approximation(shape, r):
    dW = gaussian(*shape)
    S = torch.linalg.svdvals(dW)
    cut = utils.truncate(dW, r)
    assert torch.linalg.matrix_rank(cut) == r
    error = (dW - cut).square().sum()
    assert error == pytest.approx(float(S[r:].square().sum()), abs=1e-9)


@pytest.mark.parametrize("r", [-1, 13])
def test_truncate_refuses_a_rank_that_the_matrix_cannot_have(r):
    with pytest.raises(ValueError, match="r="):
        utils.truncate(torch.ones(20, 12), r)


def test_subspace_overlap_of_the_same_subspace_is_one():
    A = gaussian(30, 20)
    assert utils.subspace_overlap(A, -3 * A, 5) == pytest.approx(1)


def test_subspace_overlap_of_orthogonal_subspaces_is_zero():
    eye = torch.eye(8)
    assert utils.subspace_overlap(eye[:, :3], eye[:, 3:6], 3) == pytest.approx(0, abs=1e-12)


def test_subspace_overlap_by_chance_is_r_over_m():
    pairs = [(gaussian(100, 40, seed=2 * i), gaussian(100, 50, seed=2 * i + 1)) for i in range(20)]
    overlaps = [utils.subspace_overlap(A, B, 10) for A, B in pairs]
    assert sum(overlaps) / 20 == pytest.approx(0.1, abs=0.015)


def test_subspace_overlap_is_symmetric_and_counts_shared_directions():
    A = planted([5.0, 4.0, 3.0, 2.0], (30, 20))
    U = torch.linalg.svd(A).U
    B = U[:, [0, 1, 8, 9]]  # shares two of four directions
    B = B * torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    assert utils.subspace_overlap(A, B, 4) == pytest.approx(0.5)
    assert utils.subspace_overlap(B, A, 4) == pytest.approx(0.5)


@pytest.mark.parametrize("r", [0, 13])
def test_subspace_overlap_refuses_a_rank_out_of_range(r):
    with pytest.raises(ValueError, match="r="):
        utils.subspace_overlap(gaussian(20, 12), gaussian(20, 15), r)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.17.mlp.down_proj.weight", (17, "down_proj")),
        ("model.embed_tokens.weight", (-1, "embed_tokens")),
    ],
)
def test_layer_and_module(name, expected):
    assert utils.layer_and_module(name) == expected


def test_bootstrap_interval_covers_the_mean_of_normal_data():
    values = gaussian(400)
    low, high = utils.bootstrap_interval(values.tolist())
    mean, error = float(values.mean()), float(values.std()) / 20
    assert low == pytest.approx(mean - 1.96 * error, abs=0.3 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.3 * error)


def test_bootstrap_interval_leaves_out_missing_values():
    assert utils.bootstrap_interval([2.0, None, 2.0]) == (2.0, 2.0)


@pytest.mark.parametrize("shape", [(400, 400), (600, 200), (200, 600)], ids=str)
@pytest.mark.parametrize("spikes", [0, 1, 5])
def test_above_edge_counts_planted_spikes_in_noise(shape, spikes):
    noise = 0.01 * gaussian(*shape)
    edge = 0.01 * (math.sqrt(shape[0]) + math.sqrt(shape[1]))
    spiked = noise + planted([3 * edge] * spikes, shape, seed=5) if spikes else noise
    assert spikes <= utils.above_edge(utils.singular_values(spiked), shape) <= spikes + 1


def test_above_edge_of_a_zero_update():
    assert utils.above_edge(torch.zeros(4), (4, 6)) == 0


def test_without_an_update_every_measure_is_zero():
    measures = utils.spectrum_measures(torch.zeros(4), (4, 6))
    assert measures.pop("min_dim") == 4
    assert set(measures.values()) == {0}


@pytest.mark.parametrize("part", utils.CUT_PARTS)
def test_the_factors_of_a_cut(part):
    dW = gaussian(30, 20).float()
    B, A = utils._cut_factors(dW, 8, part, torch.Generator().manual_seed(0))
    oracle = dW.sign() * dW.abs().mean() if part == "sign" else dW
    assert torch.allclose(torch.linalg.svdvals(B @ A)[:8], torch.linalg.svdvals(oracle)[:8])
    head = utils.truncate(oracle, 3)
    assert torch.allclose(B[:, :3] @ A[:3], head, atol=1e-4) == (part != "rotated")
    assert torch.allclose(
        torch.linalg.svdvals(B[:, :3] @ A[:3])[:3], torch.linalg.svdvals(head)[:3]
    )


@pytest.mark.parametrize("part", utils.CUT_PARTS)
def test_the_cut_of_no_update_is_none(part):
    B, A = utils._cut_factors(torch.zeros(6, 4), 2, part, torch.Generator().manual_seed(0))
    assert torch.equal(B @ A, torch.zeros(6, 4))


def overlap_by_rank(A, B):
    """Overlap of two matrices at OVERLAP_RANKS, (ranks, 2: left, right)."""
    r = min(128, *A.shape)
    return utils._overlaps(utils._leading_vectors(A, r), utils._leading_vectors(B, r))


def test_overlaps_equal_subspace_overlap():
    A, B = gaussian(40, 30), gaussian(40, 30, seed=1)
    found = overlap_by_rank(A, B)
    ranks = [r for r in utils.OVERLAP_RANKS if r <= 30]
    assert found[:, 0].tolist() == pytest.approx([utils.subspace_overlap(A, B, r) for r in ranks])
    right = [utils.subspace_overlap(A.T, B.T, r) for r in ranks]
    assert found[:, 1].tolist() == pytest.approx(right)


def test_overlaps_with_a_low_rank_update_tell_how_much_of_it_the_other_holds():
    A, B = gaussian(40, 4) @ gaussian(4, 30), gaussian(40, 30, seed=1)
    found = utils._overlaps(utils._leading_vectors(A, 4), utils._leading_vectors(B, 30))
    U, _, Vh = torch.linalg.svd(B, full_matrices=False)
    columns, rows = torch.linalg.qr(A[:, :4]).Q, torch.linalg.qr(A[:4].T).Q
    for r, (left, right) in zip(utils.OVERLAP_RANKS, found.tolist(), strict=False):
        if r >= 4:
            assert left == pytest.approx(float((U[:, :r].T @ columns).square().sum() / 4))
            assert right == pytest.approx(float((Vh[:r] @ rows).square().sum() / 4))


@pytest.mark.parametrize("shared", [0, 4, 16])
def test_reproducible_rank_finds_the_directions_that_two_updates_share(shared):
    shape, common = (300, 200), planted([500.0] * shared, (300, 200), seed=9) if shared else 0
    first, second = (common + gaussian(*shape, seed=seed) for seed in (1, 2))
    overlap = overlap_by_rank(first, second)
    ranks = pd.Index([r for r in utils.OVERLAP_RANKS if r <= 200])
    for side, size in enumerate(shape):
        chance = pd.Series(ranks / size, ranks)
        found = utils.reproducible_rank(pd.Series(overlap[:, side].numpy(), ranks), chance)
        assert found == pytest.approx(shared, abs=1.0)


@pytest.mark.parametrize(
    ("kept", "rank"),
    [
        ({1: 0.2, 4: 0.9, 16: 1.0}, 8.0),  # half way over log r
        ({1: 1.0, 4: 0.9, 16: 1.0}, 8.0),  # the last shortfall counts
        ({1: 0.99, 4: 0.98}, 1.0),
        ({0: 0.2, 1: 0.98}, 1.0),
        ({1: 0.2, 4: 0.9}, math.inf),
        ({1: math.nan, 4: 0.98}, 4.0),
        ({1: 0.98, 4: math.nan}, math.inf),
    ],
)
def test_needed_rank(kept, rank):
    assert utils.needed_rank(pd.Series(kept), 0.95) == pytest.approx(rank)


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
    B, A, best = utils.leading_factors(dW, r)
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
    V, most = utils.leading_eigenvectors(gram, r, tolerance=1e-3)
    torch.testing.assert_close(V.T @ V, torch.eye(r), rtol=0, atol=1e-5)
    total, exact = float(eigenvalues.double().sum()), float(eigenvalues[:r].double().sum())
    held = float((V.double().T @ gram.double() @ V.double()).trace())
    rounding = 1e-5 * total
    assert exact - 1e-3 * total - rounding <= held <= exact + rounding
    assert max(held, exact) - rounding <= most <= held + 1e-3 * total + rounding
    assert (max(sizes) < 600) == krylov


def a_sparse_update(kind, seed):
    """An update (500, 400) of which few entries are not zero, or few values occur."""
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
    return X


@pytest.mark.parametrize("kind", ["columns", "a block", "entries", "two values"])
@pytest.mark.parametrize("r", [1, 8, 40])
@pytest.mark.parametrize("tolerance", [0.0, 1e-3])
def test_leading_eigenvectors_of_sparse_updates(kind, r, tolerance):
    for seed in range(10):
        X = a_sparse_update(kind, seed)
        V, most = utils.leading_eigenvectors(X.T @ X, r, tolerance=tolerance)
        torch.testing.assert_close(V.T @ V, torch.eye(r), rtol=0, atol=1e-5)
        squares = torch.linalg.svdvals(X.double()).square()
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
    bound = utils._confirmed_bound(gram, Q[:, :8], eigenvalues[:8], torch.zeros(8))
    assert float(eigenvalues[:8].sum()) <= bound < math.inf
    assert utils._confirmed_bound(gram, Q[:, found], eigenvalues[found], torch.zeros(8)) == math.inf


def a_run(losses, ranks):
    """A full run whose notes at steps 1, 2, 4 have these losses and one matrix of these r90."""
    notes = [
        {"step": step, "loss_nats": loss, "energy_8": [1 / rank], "r90": [rank]}
        for step, loss, rank in zip((1, 2, 4), losses, ranks, strict=True)
    ]
    config = utils.PROFILES["smoke"].config("facts", steps=8)
    valid = {"row_nats": [1.0, 3.0], "row_tokens": [2, 2]}  # 1 nat a token at the end
    return utils.Result(
        config, {"growth": notes, "evaluation": {"valid": valid}}, {"W": torch.ones(40)}
    )


@pytest.mark.parametrize(
    ("share", "step", "r90"),
    [
        (0.5, 1.5, 15.0),  # half way from 0.4 to 0.6
        (0.6, 2.0, 20.0),
        (0.7, 3.0, 25.0),  # the note at 4 has 0.8
        (0.9, 6.0, 33.0),  # half way from there to the end: 40 equal values, r90 = 36
        (0.1, 1.0, 10.0),  # the first note has more
    ],
)
def test_the_ranks_at_a_share_of_the_gain(share, step, r90):
    base = utils.Result(
        utils.PROFILES["smoke"].config("facts", "base"),
        {"evaluation": {"valid": {"row_nats": [22.0], "row_tokens": [2]}}},
        {},
    )
    found = utils.at_gain(a_run([7.0, 5.0, 3.0], [10, 20, 30]), base, share)
    assert found["step"] == pytest.approx(step)
    assert found["r90"] == pytest.approx(r90)
