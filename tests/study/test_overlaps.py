"""Directions that two updates share, against subspace_overlap and planted ones."""

from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from matrices import gaussian, planted

from deltarank.spectra import subspace_overlap
from deltarank.study import overlaps
from deltarank.study.overlaps import OVERLAP_RANKS
from deltarank.study.profiles import profile


def overlap_by_rank(A, B):
    """Overlap of two matrices at OVERLAP_RANKS, (ranks, 2: left, right)."""
    r = min(128, *A.shape)
    return overlaps._overlaps(overlaps._leading_vectors(A, r), overlaps._leading_vectors(B, r))


def test_overlaps_equal_subspace_overlap():
    A, B = gaussian(40, 30), gaussian(40, 30, seed=1)
    found = overlap_by_rank(A, B)
    ranks = [r for r in OVERLAP_RANKS if r <= 30]
    assert found[:, 0].tolist() == pytest.approx([subspace_overlap(A, B, r) for r in ranks])
    right = [subspace_overlap(A.T, B.T, r) for r in ranks]
    assert found[:, 1].tolist() == pytest.approx(right)


def test_overlaps_with_a_low_rank_update_tell_how_much_of_it_the_other_holds():
    A, B = gaussian(40, 4) @ gaussian(4, 30), gaussian(40, 30, seed=1)
    found = overlaps._overlaps(overlaps._leading_vectors(A, 4), overlaps._leading_vectors(B, 30))
    U, _, Vh = torch.linalg.svd(B, full_matrices=False)
    columns, rows = torch.linalg.qr(A[:, :4]).Q, torch.linalg.qr(A[:4].T).Q
    for r, (left, right) in zip(OVERLAP_RANKS, found.tolist(), strict=False):
        if r >= 4:
            assert left == pytest.approx(float((U[:, :r].T @ columns).square().sum() / 4))
            assert right == pytest.approx(float((Vh[:r] @ rows).square().sum() / 4))


@pytest.mark.parametrize("shared", [0, 4, 16])
def test_two_updates_share_what_was_planted_and_the_rest_by_chance(shared):
    shape, common = (300, 200), planted([500.0] * shared, (300, 200), seed=9) if shared else 0
    first, second = (common + gaussian(*shape, seed=seed) for seed in (1, 2))
    at_16 = overlap_by_rank(first, second)[OVERLAP_RANKS.index(16)]
    for overlap, size in zip(at_16.tolist(), shape, strict=True):
        chance = 16 / size
        assert 16 * (overlap - chance) / (1 - chance) == pytest.approx(shared, abs=1.0)


def test_stored_overlaps_are_found_in_either_order(store, monkeypatch):
    first, second = (profile().config("facts", seed=seed) for seed in (0, 1))
    vectors = {"W": overlaps._leading_vectors(gaussian(40, 30), 30)}
    asked = []
    monkeypatch.setattr(overlaps, "_leading_subspaces", lambda run: asked.append(run) or vectors)
    monkeypatch.setattr(
        overlaps, "run", lambda config: SimpleNamespace(shape=lambda name: (40, 30))
    )
    found = overlaps.overlaps(first, second)
    pd.testing.assert_frame_equal(overlaps.overlaps(second, first), found)
    assert asked == [first, second]


def test_what_two_runs_have_in_common_is_the_mean_over_matrices_and_sides(monkeypatch):
    found = {
        "name": ["a", "b", "a"],
        "rank": [1, 1, 2],
        "left": [0.1, 0.3, 1],
        "right": [0.4, 0, 0],
    }
    monkeypatch.setattr(overlaps, "overlaps", lambda *runs: pd.DataFrame(found))
    assert overlaps.mean_overlap("one", "other").to_dict() == pytest.approx({1: 0.2, 2: 0.5})


def test_overlaps_of_pairs_stand_by_task_and_seed(monkeypatch):
    """Two runs have in common, of 100 tasks and seeds, what tells the pair from all others."""
    monkeypatch.setattr(overlaps, "coarsely_tuned", lambda task, seed=0: (len(task), seed))
    found = {1: lambda a, b: 10 * a[0] + a[1], 2: lambda a, b: 10 * b[0] + b[1]}

    def mean_overlap(a, b):
        return pd.Series({rank: told(a, b) for rank, told in found.items()} | {3: 0.0})

    monkeypatch.setattr(overlaps, "mean_overlap", mean_overlap)
    sizes = SimpleNamespace(seeds=(0, 1, 2), lora_ranks=(1, 2))
    monkeypatch.setattr(overlaps, "profile", lambda: sizes)
    of_seeds = overlaps.overlaps_of_seeds(["kjv", "json"])
    assert of_seeds.loc["kjv"].to_dict("index") == {
        (0, 1): {1: 30, 2: 31},
        (0, 2): {1: 30, 2: 32},
        (1, 2): {1: 31, 2: 32},
    }
    assert of_seeds[1]["json"].tolist() == [40, 40, 41] and [*of_seeds] == [1, 2]
    of_tasks = overlaps.overlaps_of_tasks(["kjv", "json", "dates"]).to_dict("index")
    assert len(of_tasks) == 6
    for pair, both in {("kjv", "json"): {1: 30, 2: 40}, ("kjv", "dates"): {1: 30, 2: 50}}.items():
        assert of_tasks[pair] == of_tasks[pair[::-1]] == both
