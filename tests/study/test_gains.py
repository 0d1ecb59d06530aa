"""Shares of a fine-tune's gain: the rank that a cut needs, and where a run had regained it."""

import math

import pandas as pd
import pytest
import torch

from deltarank.study.gains import at_gain, needed_rank
from deltarank.study.profiles import PROFILES
from deltarank.study.runs import Result


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
    assert needed_rank(pd.Series(kept), 0.95) == pytest.approx(rank)


def a_run(losses, ranks):
    """A full run whose notes at steps 1, 2, 4 have these losses and one matrix of these r90."""
    notes = [
        {"step": step, "loss_nats": loss, "energy_8": [1 / rank], "r90": [rank]}
        for step, loss, rank in zip((1, 2, 4), losses, ranks, strict=True)
    ]
    config = PROFILES["smoke"].config("facts", steps=8)
    valid = {"row_nats": [1.0, 3.0], "row_tokens": [2, 2]}  # 1 nat a token at the end
    return Result(config, {"growth": notes, "evaluation": {"valid": valid}}, {"W": torch.ones(40)})


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
    base = Result(
        PROFILES["smoke"].config("facts", "base"),
        {"evaluation": {"valid": {"row_nats": [22.0], "row_tokens": [2]}}},
        {},
    )
    found = at_gain(a_run([7.0, 5.0, 3.0], [10, 20, 30]), base, share)
    assert found["step"] == pytest.approx(step)
    assert found["r90"] == pytest.approx(r90)
