"""The factors of a cut and of its controls, against float64 SVD."""

import pytest
import torch
from matrices import gaussian

from deltarank.spectra import truncate
from deltarank.study import cuts
from deltarank.study.cuts import CUT_PARTS, LENGTH_PARTS


@pytest.mark.parametrize("part", CUT_PARTS)
def test_the_factors_of_a_cut(part):
    dW = gaussian(30, 20).float()
    B, A = cuts._cut_factors(dW, 8, part, torch.Generator().manual_seed(0))
    oracle = dW.sign() * dW.abs().mean() if part == "sign" else dW
    assert torch.allclose(torch.linalg.svdvals(B @ A)[:8], torch.linalg.svdvals(oracle)[:8])
    head = truncate(oracle, 3)
    assert torch.allclose(B[:, :3] @ A[:3], head, atol=1e-4) == (part != "rotated")
    assert torch.allclose(
        torch.linalg.svdvals(B[:, :3] @ A[:3])[:3], torch.linalg.svdvals(head)[:3]
    )


@pytest.mark.parametrize("part", CUT_PARTS)
def test_the_cut_of_no_update_is_none(part):
    B, A = cuts._cut_factors(torch.zeros(6, 4), 2, part, torch.Generator().manual_seed(0))
    assert torch.equal(B @ A, torch.zeros(6, 4))


@pytest.mark.parametrize(
    ("part", "direction", "norm"),
    [
        ("head", "head", "head"),
        ("tail", "tail", "tail"),
        ("shrunk", "whole", "head"),
        ("stretched", "head", "whole"),
        ("tail-scaled", "tail", "head"),
    ],
)
def test_a_part_has_the_direction_of_one_and_the_norm_of_another(part, direction, norm):
    whole = gaussian(30, 20).float()
    head = truncate(whole, 3)
    parts = {"whole": whole, "head": head, "tail": whole - head}
    found = cuts._part(whole, head, part)
    assert torch.isclose(found.norm(), parts[norm].norm())
    cosine = (found * parts[direction]).sum() / found.norm() / parts[direction].norm()
    assert torch.isclose(cosine, torch.tensor(1.0))


@pytest.mark.parametrize("part", (*CUT_PARTS, *LENGTH_PARTS))
def test_a_part_of_no_update_is_none(part):
    none = torch.zeros(6, 4)
    assert torch.equal(cuts._part(none, none, part), none)
