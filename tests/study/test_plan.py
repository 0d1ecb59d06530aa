"""The plan: searches that climb, grids that share runs, ranks that double until it is enough."""

import dataclasses
import itertools

import pandas as pd
import pytest

from deltarank.study import plan, search
from deltarank.study.plan import (
    alpha_configs,
    between_config,
    cut_until,
    entities_configs,
    floor_configs,
    lora_until,
    scaling_configs,
)
from deltarank.study.profiles import profile
from deltarank.study.runs import Result
from deltarank.study.search import tuned


def test_a_format_floor_is_the_tuned_recipe_on_permuted_answers(losses):
    losses |= {(rank, lr): lr for rank in (0, 1) for lr in (1e-4, 1e-3, 1e-2)}
    full, lora = floor_configs("facts")
    assert (full.rank, lora.rank) == (0, 1) and full.permuted and lora.permuted
    assert dataclasses.replace(full, permuted=False) == tuned("facts")
    assert full.key.startswith("facts-full-permuted-s0-")


@pytest.fixture
def ladder(monkeypatch):
    """Runs whose loss falls from 5 (base) over LoRA's ranks towards 1.

    On the rows of each split; a test may change a rank's, None: it diverges.
    """
    lora = {split: {1: 2.0, 2: 1.5, 4: 1.2, 8: 1.1} for split in ("valid", "test")}

    def result(config):
        others = {"base": 5.0, "full": 1.0}
        losses = {
            split: by_rank[config.rank] if config.rank else others[config.method]
            for split, by_rank in lora.items()
        }
        if None in losses.values():
            return Result(config, {"status": "diverged", "evaluation": {}})
        evaluation = {split: {"loss_nats": loss} for split, loss in losses.items()}
        return Result(config, {"status": "finished", "evaluation": evaluation})

    monkeypatch.setattr(plan, "run", result)
    monkeypatch.setattr(search, "sweep", lambda configs: [result(c) for c in configs])
    return lora


@pytest.mark.parametrize("split", ["valid", "test"])
def test_luck_with_some_rows_ends_no_ladder(ladder, split):
    ladder[split][1] = 1.0
    found = lora_until(profile().config("sentiment"), 0.9)
    assert [run.config.rank for run in found] == [1, 2, 4]


def test_a_run_that_diverged_ends_no_ladder(ladder):
    ladder["valid"][2] = ladder["test"][2] = None
    found = lora_until(profile().config("sentiment"), 0.9)
    assert [run.config.rank for run in found] == [1, 2, 4]
    assert [run.status for run in found] == ["finished", "diverged", "finished"]


@pytest.mark.parametrize("until", [cut_until, lora_until])
def test_a_share_outside_0_to_1_is_refused_before_any_run(monkeypatch, until):
    monkeypatch.setattr(plan, "run", lambda config: pytest.fail("ran"))
    for share in (0.0, 1.1, 95):
        with pytest.raises(ValueError, match="share=.*at most 1, such as 0.9"):
            until(profile().config("sentiment"), share)


@pytest.mark.parametrize(
    ("share", "ranks"), [(0.5, [1]), (0.9, [1, 2, 4]), (0.96, [1, 2, 4, 8]), (1.0, [1, 2, 4, 8])]
)
def test_lora_doubles_its_rank_until_it_reaches_the_share(ladder, share, ranks):
    found = lora_until(profile().config("sentiment", seed=1), share)
    assert [run.config.rank for run in found] == ranks
    assert {run.config.seed for run in found} == {1}


def test_the_rate_between_lies_on_the_line(losses):
    losses |= {(1, lr): lr for lr in (1e-3, 1e-2)}
    losses |= {(8, lr): -lr for lr in (1e-3, 1e-2)}
    config = between_config()
    assert (config.task, config.rank) == ("kjv", 4)
    assert config.lr == pytest.approx(1e-3 * 10 ** (2 / 3), rel=0.01)  # two of three doublings


def test_entities_and_facts_are_trained_by_rank_alpha_and_seed(losses):
    sizes = profile()
    losses |= {(rank, lr): lr for rank in (0, 1, 4, 8, 64) for lr in (1e-4, 1e-3, 1e-2)}
    for (rank, alpha, times), configs in entities_configs().items():
        assert [config.seed for config in configs] == [*sizes.seeds[: len(configs)]]
        for config in configs:
            assert (config.task, config.rank, config.alpha) == ("entities", rank, alpha)
            assert config.steps == times * sizes.steps
    found = [(config.rank, config.alpha, config.seed) for config in alpha_configs()]
    grid = itertools.product(sizes.scaling_ranks, sizes.lora_alphas, sizes.seeds)
    assert found == [*grid]


def test_scales_that_are_equal_share_their_runs(store):
    found = {
        name: [(c.rank, c.alpha, c.rslora) for c in configs if c.lr == 1e-2]
        for name, configs in scaling_configs().items()
    }
    assert found == {
        "α / r, α = 32": [(1, 32, False), (8, 32, False)],
        "α / √r, α = 32": [(1, 32, False), (8, 32, True)],
        "α / r, α = 256": [(1, 256, False), (8, 256, False)],
    }


def test_a_grid_that_diverged_as_a_whole_is_named(losses):
    losses |= {(0, 1e-4): None, (0, 1e-3): None}
    with pytest.raises(ValueError, match=r"every learning rate diverged: facts-full.*lower"):
        tuned("facts")


@pytest.mark.parametrize(
    ("nats", "ranks"),
    [
        ({0: 5.0, 1: 4.0, 8: 3.0, 16: 1.1}, [0, 1, 8, 16]),  # 97.5 % of the gain at once
        ({0: 5.0, 1: 4.0, 8: 3.0, 16: 2.0, 32: 1.0}, [0, 1, 8, 16, 32]),
        ({0: 5.0, 1: 4.0, 8: 3.0, 16: 2.0, 32: 1.5}, [0, 1, 8, 16, 32]),  # and 32 is the largest
    ],
)
def test_cuts_go_on_until_enough_is_kept(config, monkeypatch, nats, ranks):
    def result(asked):
        loss = 5.0 if asked.method == "base" else 1.0
        record = {"evaluation": {"test": {"loss_nats": loss}}, "shapes": {"one": [32, 48]}}
        return Result(asked, record)

    def fake_cut(_, asked):
        return pd.DataFrame({"rank": asked, "loss_nats": [nats[rank] for rank in asked]})

    monkeypatch.setattr(plan, "run", result)
    monkeypatch.setattr(plan, "cut", fake_cut)
    assert cut_until(config, 0.95)["rank"].tolist() == ranks


def test_cuts_of_a_run_that_diverged_are_refused_by_name(config):
    diverged = dataclasses.replace(config, lr=1e30)
    with pytest.raises(ValueError, match=f"^{diverged.key} diverged: it has no update"):
        cut_until(diverged, 0.95)
