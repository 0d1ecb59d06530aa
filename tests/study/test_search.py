"""The search of learning rates: climbs that end, coarse and fine, and rates between ranks."""

import dataclasses

import pytest

from deltarank.study.profiles import PROFILES, profile
from deltarank.study.search import (
    best_alpha,
    best_lr,
    coarse_search,
    coarsely_tuned,
    full_of,
    lr_search,
    tuned,
)


@pytest.mark.parametrize(("low", "high", "lr"), [(1.0, 2.0, 1e-4), (2, 1, 1e-3), (3, None, 1e-4)])
def test_a_task_takes_the_learning_rate_of_the_lowest_held_out_loss(losses, low, high, lr):
    losses |= {(0, 1e-4): low, (0, 1e-3): high}
    assert tuned("facts", seed=3) == profile().config("facts", lr=lr, seed=3)


@pytest.mark.parametrize(
    ("by_rate", "tried", "best"),
    [
        ({1e-4: 2, 1e-3: 1, 1e-2: 2}, [1e-4, 1e-3, 1e-2], 1e-3),  # in the middle at once
        ({1e-6: 4, 1e-5: 3, 1e-4: 4, 1e-3: 5, 1e-2: 5}, [1e-6, 1e-5, 1e-4, 1e-3], 1e-5),
        ({1e-5: 9, 1e-4: 5, 1e-3: 4, 1e-2: 3, 1e-1: None}, [1e-4, 1e-3, 1e-2, 1e-1], 1e-2),
        ({1e-4: 3, 1e-3: 2, 1e-2: 1}, [1e-4, 1e-3, 1e-2], 1e-2),  # at the edge of what is there
    ],
)
def test_the_search_climbs_until_both_neighbours_are_no_better(
    monkeypatch, losses, by_rate, tried, best
):
    wide = dataclasses.replace(PROFILES["smoke"], full_lrs=tuple(by_rate))
    monkeypatch.setitem(PROFILES, "smoke", wide)
    losses |= {(0, lr): loss for lr, loss in by_rate.items()}
    results = lr_search("facts")
    assert [result.config.lr for result in results] == tried
    assert best_lr(results) == best


def test_a_fine_search_goes_on_in_half_the_steps(monkeypatch, losses):
    wide = dataclasses.replace(
        PROFILES["smoke"], full_lrs=(1e-4, 1e-3, 1e-2), fine_tasks=("facts",)
    )
    monkeypatch.setitem(PROFILES, "smoke", wide)
    losses |= {
        (0, lr): loss for lr, loss in {1e-4: 4, 1e-3: 3, 1e-2: 9, 3.2e-4: 2, 3.2e-3: 5}.items()
    }
    tried = [(result.config.lr, result.config.seed) for result in lr_search("facts")]
    assert tried == [(lr, s) for lr in (1e-4, 3.2e-4, 1e-3, 3.2e-3) for s in profile().seeds]
    assert tuned("facts").lr == 3.2e-4
    assert [result.config.lr for result in lr_search("sentiment")] == [1e-4, 1e-3, 1e-2]
    losses[0, 3.2e-4, 1] = 9  # its mean over the seeds is no longer the lowest
    assert tuned("facts").lr == 1e-3
    losses[0, 1e-3, 1] = None  # and this one diverges with a seed
    assert tuned("facts").lr == 3.2e-3


def test_ranks_between_the_profiles_interpolate_their_learning_rates(losses):
    searched = {1: 1e-3, 4: 1e-2, 8: 1e-2}
    losses |= {(r, lr): abs(lr - best) for r, best in searched.items() for lr in (1e-3, 1e-2)}
    found = {rank: tuned("facts", "lora", rank=rank).lr for rank in (1, 2, 4, 8)}
    assert found == searched | {2: 3.2e-3}  # 10 ** -2.5, half way from rank 1 to rank 4


@pytest.mark.parametrize(
    ("first", "second", "alpha"), [(3, 1, 32), (2, 1, 32), (1, 1, 256), (1, 3, 32)]
)
def test_a_task_takes_the_larger_alpha_where_it_wins_with_every_seed(
    monkeypatch, losses, first, second, alpha
):
    sizes = dataclasses.replace(PROFILES["smoke"], alpha_tasks=("facts",))
    monkeypatch.setitem(PROFILES, "smoke", sizes)
    losses |= {(r, lr): 2 for r in (1, 4) for lr in (1e-3, 1e-2)} | {(1, 1e-2): 1}
    losses |= {(4, 1e-3, 32.0): None, (4, 1e-3, 256.0): first, (1, 1e-2, 256.0): 9}
    losses |= {(4, 1e-2, 256.0): 4, (4, 1e-3, 1): second}
    assert best_alpha("facts") == alpha
    assert {run.config.alpha for run in lr_search("facts", "lora", rank=1)} == {alpha}
    found = tuned("facts", "lora", rank=1, seed=1)
    assert (found.alpha, found.lr, found.seed) == (alpha, 1e-2 if alpha == 32 else 1e-3, 1)
    assert best_alpha("sentiment") == tuned("sentiment", "lora", rank=1).alpha == 32
    assert coarsely_tuned("facts", rank=1).alpha == 32


def test_a_larger_alpha_climbs_from_one_rate_below_the_best_of_the_common_one(monkeypatch, losses):
    wide = dataclasses.replace(PROFILES["smoke"], lora_lrs=(1e-5, 1e-4, 1e-3, 1e-2, 1e-1))
    monkeypatch.setitem(PROFILES, "smoke", wide)
    rates = {alpha: {1e-5: 4, 1e-4: 3, 1e-3: 3, 1e-2: 3, 1e-1: 9} for alpha in (32.0, 256.0)}
    rates[32.0][1e-3], rates[256.0][1e-4] = 2, 1
    losses |= {(4, lr, a): loss for a, by_lr in rates.items() for lr, loss in by_lr.items()}
    found = {a: coarse_search("facts", "lora", rank=4, alpha=a) for a in rates}
    tried = {alpha: [result.config.lr for result in results] for alpha, results in found.items()}
    assert tried == {32.0: [1e-4, 1e-3, 1e-2], 256.0: [1e-5, 1e-4, 1e-3]}


def test_a_finer_search_moves_no_coarsely_tuned_run(monkeypatch, losses):
    wide = dataclasses.replace(PROFILES["smoke"], fine_tasks=("facts",))
    monkeypatch.setitem(PROFILES, "smoke", wide)
    losses |= {(0, 1e-4): 3, (0, 3.2e-4): 1, (0, 1e-3): 2}
    assert (tuned("facts").lr, coarsely_tuned("facts").lr) == (3.2e-4, 1e-3)


def test_the_full_run_beside_a_run_has_its_seed_and_the_best_rate_in_its_profile(losses):
    losses |= {(0, 1e-4): 2.0, (0, 1e-3): 1.0}
    for name, best in (("smoke", 1e-3), ("quick", 1e-4)):  # which has this rate alone
        lora = PROFILES[name].config("facts", "lora", rank=2, seed=3)
        assert full_of(lora) == PROFILES[name].config("facts", lr=best, seed=3)


@pytest.mark.parametrize(("method", "rank"), [("lora", 0), ("full", 8)])
def test_a_rank_that_a_method_does_not_take_is_refused_before_any_run(method, rank):
    with pytest.raises(ValueError, match="a LoRA needs a rank, full fine-tuning none"):
        tuned("facts", method, rank=rank)


def test_a_method_that_is_not_searched_is_refused_by_name():
    with pytest.raises(ValueError, match="method='LoRA'.*full or lora"):
        tuned("facts", "LoRA", rank=8)
