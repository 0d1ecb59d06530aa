"""Shares of a fine-tune's gain: the rank that a cut needs, and where a run had regained it."""

import math

import pandas as pd
import pytest
import torch
from small_runs import small, with_spectra

from deltarank.study import gains
from deltarank.study.configs import GROWTH_ROWS
from deltarank.study.gains import (
    at_gain,
    at_loss,
    bracket_text,
    captured_energy,
    epoch_rows,
    first_epoch_kbit,
    gain,
    gain_kept,
    growth_loss,
    learned_kbit,
    needed_bracket,
    needed_rank,
    taught_kbit,
)
from deltarank.study.profiles import PROFILES, profile
from deltarank.study.runs import Result


def test_a_gain_goes_from_the_base_to_the_full_run(monkeypatch):
    nats = {"base": 5.0, "full": 1.0, "lora": 2.0}

    def run(config):
        test = {"loss_nats": nats[config.method]}
        return Result(config, {"status": "finished", "evaluation": {"test": test}})

    monkeypatch.setattr(gains, "run", run)
    monkeypatch.setattr(gains, "full_of", lambda config: profile().config(config.task))
    assert gain(run(profile().config("facts", "lora", rank=1))) == 0.75


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


@pytest.mark.parametrize(
    ("kept", "bracket", "text"),
    [
        ({1: 0.2, 8: 0.9, 64: 1.0}, (8, 64), "8 to 64"),
        ({1: 0.2, 8: 0.96, 16: 0.9, 64: 1.0}, (16, 64), "16 to 64"),  # the last shortfall counts
        ({1: 0.2, 8: 0.9}, (8, math.inf), "> 8"),
        ({1: 0.98, 8: 0.99}, (0, 1), "1"),
        ({1: 0.9, 2: 0.95}, (1, 2), "2"),  # share is enough
        ({8: 0.98, 64: 0.99}, (0, 8), "1 to 8"),
        ({0: 0.1, 1: 0.98}, (0, 1), "1"),
        ({1: math.nan, 8: 0.98}, (1, 8), "1 to 8"),
    ],
)
def test_needed_bracket(kept, bracket, text):
    kept = pd.Series(kept)
    assert needed_bracket(kept, 0.95) == bracket
    assert bracket_text(*bracket) == text
    assert bracket[0] <= needed_rank(kept, 0.95) <= bracket[1]


def a_run(losses, ranks):
    """A full run whose notes at steps 1, 2, 4 have these losses and r90, and one odd matrix."""
    notes = [
        {
            "step": step,
            "loss_nats": loss,
            "energy_8": [1 / rank, 1 / rank, 1.0],
            "r90": [rank, rank, 1],
            "entropy_rank": [2 * rank, 2 * rank, 1.0],
            "stable_rank": [1.0, 1.0, 1.0],
        }
        for step, loss, rank in zip((1, 2, 4), losses, ranks, strict=True)
    ]
    config = PROFILES["smoke"].config("facts", steps=8)
    valid = {"row_nats": [1.0, 3.0], "row_tokens": [2, 2]}  # 1 nat a token at the end
    record = {"growth": notes, "evaluation": {"valid": valid}}
    spectra = {"W": torch.ones(40), "V": torch.ones(40), "odd": torch.ones(1)}
    return with_spectra(Result(config, record), spectra)


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
def test_the_ranks_at_a_share_of_the_gain(store, share, step, r90):
    base = Result(
        PROFILES["smoke"].config("facts", "base"),
        {"evaluation": {"valid": {"row_nats": [22.0], "row_tokens": [2]}}},
    )
    found = at_gain(a_run([7.0, 5.0, 3.0], [10, 20, 30]), base, share)
    assert found["step"] == pytest.approx(step)
    assert found["r90"] == pytest.approx(r90)


def test_a_loss_that_a_run_never_comes_down_to_is_refused(store):
    run = a_run([7.0, 5.0, 3.0], [10, 20, 30])
    assert at_loss(run, 1.0)["step"] == 8 and at_loss(run, 4.0)["step"] == 3
    assert at_loss(run, 6.0)["energy_8"] == pytest.approx(0.075)  # half way from 1/10 to 1/20
    assert at_loss(run, 6.0)["entropy_rank"] == pytest.approx(30)
    with pytest.raises(ValueError, match=r"never comes down to 0\.9 nats"):
        at_loss(run, 0.9)


def test_the_loss_on_the_way_is_that_of_the_tokens_of_the_first_rows():
    nats = [2.0] * GROWTH_ROWS + [1000.0]
    tokens = [4] + [1] * GROWTH_ROWS
    valid = {"row_nats": nats, "row_tokens": tokens}
    result = Result(profile().config("facts"), {"evaluation": {"valid": valid}})
    assert growth_loss(result) == pytest.approx(2 * GROWTH_ROWS / (3 + GROWTH_ROWS))


def tokens_a_row(rows):
    """The mean number of answer tokens, which are bytes."""
    return sum(len(row["answer"] + "\n") for row in rows) / len(rows)


@pytest.mark.parametrize(
    ("steps", "batch_size", "seen"),
    [(2, 1, 2), (6, 1, 4), (4, 2, 4), (5, 3, 3)],  # four rows are an epoch, whole batches
)
def test_the_code_length_is_the_loss_of_rows_not_seen_before(small_task, steps, batch_size, seen):
    config = small(steps=steps, batch_size=batch_size)
    losses = [math.log(2), math.log(4), *[math.log(2)] * (steps - 2)]
    bits = batch_size * sum([1, 2, 1, 1][: seen // batch_size]) * tokens_a_row(small_task[:4])
    result = Result(config, {"train_loss_nats": losses})
    assert epoch_rows(result) == seen
    assert first_epoch_kbit(result) == pytest.approx(bits / 1000)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_learned_bits_leave_out_what_the_trained_model_still_loses(small_task, batch_size):
    config = small(steps=2, batch_size=batch_size)
    tokens = batch_size * tokens_a_row(small_task[:4])  # of a batch
    record: dict = {"train_loss_nats": [math.log(8), math.log(2)]}
    for left, bits in ((0.0, 3 + 1), (math.log(2), 3 + 1 - 2)):
        record["evaluation"] = {"test": {"loss_nats": left}}
        found = learned_kbit(Result(config, record))
        assert found == pytest.approx(bits * tokens / 1000)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_rows_that_were_not_seen_teach_as_the_last_did(small_task, batch_size):
    """Two batches are seen, of 3 bits and 1 a token; where none is left other rows teach 1."""
    config = small(steps=2, batch_size=batch_size)
    tokens, seen = tokens_a_row(small_task[:4]), 2 * batch_size
    record: dict = {"train_loss_nats": [math.log(8), math.log(2)]}
    for left, more in ((0.0, 1), (math.log(2), 0), (math.log(4), 0)):
        record["evaluation"] = {"test": {"loss_nats": left}}
        result = Result(config, record)
        for rows, unseen in ((seen - 1, 0), (seen, 0), (seen + 2, 2)):
            expected = learned_kbit(result) + unseen * more * tokens / 1000
            assert taught_kbit(result, rows) == pytest.approx(expected)


def test_the_last_that_others_teach_as_are_a_quarter_of_the_first_epoch(write_task, small_task):
    """Of eight rows two, of 3 bits and 1 a token; the later steps see the first of them again."""
    write_task([{"split": split} | row for split in ("train", "test") for row in small_task])
    losses = [5, 5, 5, 5, 5, 5, 3, 1, 0, 0]
    record = {"train_loss_nats": [math.log(2) * bits for bits in losses]}
    record["evaluation"] = {"test": {"loss_nats": 0.0}}
    result = Result(small(steps=10, batch_size=1), record)
    expected = learned_kbit(result) + 2 * tokens_a_row(small_task) / 1000
    assert taught_kbit(result, 9) == pytest.approx(expected)


def test_ranks_of_matrices_are_taken_by_their_names(store):
    spectra = {"first": torch.ones(4), "second": torch.ones(1)}
    result = with_spectra(Result(profile().config("facts"), {}), spectra)
    assert captured_energy(result, {"second": 1, "first": 2}) == pytest.approx(3 / 5)


def test_a_negative_rank_keeps_no_energy(store):
    result = with_spectra(Result(profile().config("facts"), {}), {"first": torch.ones(4)})
    for ranks in (-3, {"first": -3}):
        with pytest.raises(ValueError, match="must be 0 or more"):
            captured_energy(result, ranks)


@pytest.mark.parametrize("share", [0.0, 1.1, 95, math.nan])
def test_a_share_outside_0_to_1_is_refused(store, share):
    ran = a_run([7.0, 5.0, 3.0], [10, 20, 30])
    with pytest.raises(ValueError, match="share=.*at most 1, such as 0.9"):
        needed_bracket(pd.Series({1: 1.0}), share)
    with pytest.raises(ValueError, match="share=.*at most 1, such as 0.9"):
        at_gain(ran, ran, share)


def test_where_nothing_was_gained_no_share_of_it_is_kept():
    assert math.isnan(gain_kept(1.0, base=2.0, full=2.0))
