"""Diversity: mixes within mixes, their sizes and rates, and what each part needs."""

import dataclasses
import math

import pandas as pd
import pytest

from deltarank.study import diversity
from deltarank.study.diversity import (
    exchange,
    exchange_again,
    exchange_table,
    higher_configs,
    long_mix,
    mix_configs,
    mix_runs,
    nested_mixes,
    part_gains,
    part_losses,
)
from deltarank.study.plan import production_configs
from deltarank.study.profiles import PROFILES, profile
from deltarank.study.runs import Result
from deltarank.study.sizes import trained_parameters
from deltarank.study.tasks import PARTS, load_task, mix_of, mix_parts

MIX = "production+json+facts"


def test_a_mix_of_few_parts_is_within_that_of_more(monkeypatch):
    counts = (1, 2, 4, 8)
    grid = dataclasses.replace(profile().mixes, orders=(0, 1), counts=counts)
    monkeypatch.setitem(PROFILES, "smoke", dataclasses.replace(profile(), mixes=grid))
    mixes = nested_mixes()
    for order in (0, 1):
        parts = [set(mix_parts(mixes[order, count])) for count in counts]
        assert [len(found) for found in parts] == [*counts]
        assert parts == sorted(parts, key=len) and parts[0] < parts[1] < parts[2] < parts[3]
    assert len(set(mixes.values())) == 2 * 3 + 1, "all parts are one mix in both orders"


def test_a_mix_has_the_rows_of_its_parts_and_no_others():
    whole, some = load_task("production"), load_task(MIX)
    for split, rows in whole.items():
        assert some[split] == [row for row in rows if row["task"] in ("json", "facts")]
    assert len(some["train"]) == 2 * 960


def test_the_mix_of_all_parts_is_trained_as_the_long_mix_is(monkeypatch):
    assert mix_configs("production") == [
        [c for c in production_configs() if (c.method, c.rank) == size]
        for size in (("full", 0), ("lora", 1), ("lora", 8))
    ]
    monkeypatch.setenv("PROFILE", "paper")
    steps = {count: profile().config(task).steps for (_, count), task in nested_mixes().items()}
    assert steps == {1: 60, 2: 120, 4: 240}
    assert profile().config("production").steps == 480


def test_the_long_mix_twice_as_long_has_the_rows_of_whole_tasks(monkeypatch):
    asked = []

    def sweep(configs):
        asked.extend(configs)
        losses = [{"loss_nats": abs(c.lr - 2e-3), "score": 0.0} for c in configs]
        records = [{"status": "finished", "evaluation": {"valid": loss}} for loss in losses]
        return [Result(c, record) for c, record in zip(configs, records, strict=True)]

    monkeypatch.setattr(diversity, "sweep", sweep)
    found = long_mix(twice=True)
    assert {c.steps for c in asked} == {2 * profile().config("production").steps}
    assert {rank: result.config.lr for rank, result in found.items()} == dict.fromkeys(
        (0, 1, 8), 1e-3
    )
    monkeypatch.setenv("PROFILE", "paper")
    one, whole = (profile().config(task) for task in ("facts", "production"))
    assert 2 * whole.steps == len(PARTS) * one.steps


def test_sizes_ascend_after_full_fine_tuning():
    groups = mix_configs(MIX)
    assert [(g[0].method, g[0].rank, g[0].layers) for g in groups] == [
        ("full", 0, ()), ("lora", 1, (1,)), ("lora", 1, ()), ("lora", 8, ()),
    ]  # fmt: skip
    rates = [[config.lr for config in group] for group in groups]
    assert rates == [[1e-3], [1e-2], [1e-3, 1e-2], [1e-3]]
    assert {config.eval_rows for group in groups for config in group} == {8}, "four a part"
    many = mix_configs(mix_of((*mix_parts(MIX), "kjv")))
    assert [group[0].layers for group in many] == [()] * 3, "none below rank 1"


@pytest.fixture
def measured(monkeypatch):
    """Runs of MIX in which rank 1 is best at 1e-3, and its losses by part; floors of 4 nats."""

    def loss(config):
        nats = {"full": {"json": 1.0, "facts": 2.0}}.get(config.method, {"json": 1.0, "facts": 2.1})
        return {"json": 1.0, "facts": 3.5} if config.layers else nats

    def result(config):
        valid = 2.0 if config.method == "lora" and config.lr == 1e-2 else 1.0
        return Result(config, {"status": "finished", "evaluation": {"valid": {"loss_nats": valid}}})

    monkeypatch.setattr(diversity, "sweep", lambda configs: [result(c) for c in configs])
    monkeypatch.setattr(
        diversity, "by_part", lambda run: pd.DataFrame({"loss_nats": loss(run.config)})
    )
    floor = pd.DataFrame({"loss_nats": [5.0, 4.0]}, index=["base", "full"])
    monkeypatch.setattr(diversity, "floors", lambda part: floor)


def test_a_size_takes_the_rate_of_the_lowest_held_out_loss(measured):
    assert [run.config.lr for run in mix_runs(MIX)] == [1e-3, 1e-2, 1e-3, 1e-3]


def test_higher_rates_lie_above_those_of_the_mix():
    grid = PROFILES["paper"].mixes
    assert [lr > max(dict(grid.lrs)[rank]) for rank, lr in grid.higher_lrs] == [True] * 3
    higher = [(c.task, c.method, c.rank, c.lr) for c in higher_configs()]
    alone = nested_mixes()[0, 1]
    assert higher == [(alone, "full", 0, 3e-4), (alone, "lora", 1, 3e-3), (alone, "lora", 8, 3e-3)]


def test_a_size_that_diverged_at_every_rate_is_named(monkeypatch):
    diverged = {"status": "diverged", "evaluation": {}}
    monkeypatch.setattr(diversity, "sweep", lambda configs: [Result(c, diverged) for c in configs])
    with pytest.raises(ValueError, match="every learning rate diverged"):
        mix_runs(MIX)


def test_the_gain_of_a_part_is_from_its_own_floor(measured):
    one_layer, rank_1, rank_8 = (trained_parameters(c[0]) for c in mix_configs(MIX)[1:])
    gains = part_gains(MIX)
    assert gains.loc[one_layer].to_dict() == {"json": 1.0, "facts": 0.25}
    assert gains.loc[rank_1].to_dict() == {"json": 1.0, "facts": pytest.approx(0.95)}
    assert gains.index.tolist() == [one_layer, rank_1, rank_8]


def test_the_losses_of_a_part_end_with_those_of_full_fine_tuning(measured):
    losses = part_losses(MIX)
    sizes = [trained_parameters(group[0]) for group in mix_configs(MIX)]
    assert losses.index.tolist() == [*sizes[1:], sizes[0]]
    assert losses["facts"].tolist() == [3.5, 2.1, 2.1, 2.0]


def test_a_part_with_its_own_rate_loses_no_more_than_at_the_rate_of_the_mix(monkeypatch):
    def result(config):
        valid = {"loss_nats": config.lr}  # the lower rate is the mix's
        return Result(config, {"status": "finished", "evaluation": {"valid": valid}})

    def by_part(run):
        return pd.DataFrame({"loss_nats": {"json": run.config.lr, "facts": 1 - run.config.lr}})

    monkeypatch.setattr(diversity, "sweep", lambda configs: [result(c) for c in configs])
    monkeypatch.setattr(diversity, "by_part", by_part)
    rank_1 = trained_parameters(mix_configs(MIX)[2][0])  # at rates of 1e-3 and 1e-2
    assert part_losses(MIX).loc[rank_1].to_dict() == {"json": 1e-3, "facts": 1 - 1e-3}
    assert part_losses(MIX, own_rates=True).loc[rank_1].to_dict() == {"json": 1e-3, "facts": 0.99}


def test_exchanges_are_of_the_parts_that_are_alone_in_a_mix(monkeypatch):
    mixes = {(0, 1): "production+json", (0, 2): MIX, (1, 1): "production+code"}
    monkeypatch.setattr(diversity, "nested_mixes", lambda: mixes)

    def losses(mix, own_rates):
        nats = {"production+json": [5.0, 3.0, 2.0, 1.5], MIX: [5.0, 3.5, 2.5, 1.5]}
        whole = [3.0 if own_rates else 3.5, 1.5, 1.0] if mix == "production" else None
        sizes = [4, 8, 64, 999][-len(whole or "four") :]
        return pd.DataFrame({part: nats.get(mix, whole or [4.0] * 4) for part in PARTS}, sizes)[
            [*mix_parts(mix)]
        ]

    monkeypatch.setattr(diversity, "part_losses", losses)
    monkeypatch.setattr(diversity, "exchange_again", lambda *asked: {("json", MIX): 1.5}[asked])
    table = exchange_table()
    assert [*table.index] == [
        ("code", 1, "production+code"), ("code", 8, "production"), ("json", 1, "production+json"),
        ("json", 2, MIX), ("json", 8, "production"),
    ]  # fmt: skip
    assert [*table.columns] == [4, 8, 64, 999, "exchange", "own_rates", "second_seed"]
    assert table[4].isna().tolist() == [False, True, False, False, True]
    json = [1, pytest.approx(8**0.5), pytest.approx(8**0.25)]
    assert table.loc["json", "exchange"].tolist() == json
    assert table.loc["json", "own_rates"].tolist() == [*json[:2], 1]
    assert table["second_seed"].dropna().to_dict() == {("json", 2, MIX): 1.5}
    assert table.loc["code", "exchange"].tolist() == [0.5, 1], (
        "at most: the smallest size is enough"
    )


def test_another_seed_has_the_rates_of_the_first(monkeypatch):
    def result(config):
        valid = {"loss_nats": config.lr if config.seed == 0 else -config.lr}
        return Result(config, {"status": "finished", "evaluation": {"valid": valid}})

    def by_part(run):
        assert (run.config.seed, run.config.lr) == (1, 1e-3), "of seed 0 the lower rate is best"
        alone, mixed = {1: 3.0, 8: 2.0}, {1: 3.5, 8: 2.5}
        nats = (alone if run.config.task == "production+json" else mixed)[run.config.rank]
        return pd.DataFrame({"loss_nats": {"json": nats, "facts": 9.0}})

    monkeypatch.setattr(diversity, "sweep", lambda configs: [result(c) for c in configs])
    monkeypatch.setattr(diversity, "by_part", by_part)
    parameters = [trained_parameters(group[0]) for group in mix_configs(MIX)[-2:]]
    found = exchange_again("json", MIX)
    assert found == pytest.approx((parameters[1] / parameters[0]) ** 0.5)


def test_an_exchange_counts_the_parameters_of_an_equal_loss():
    alone, apart = pd.Series({1: 3.0, 8: 2.0}), pd.Series({1: 3.4, 8: 2.6, 64: 1.8})
    assert exchange(alone, apart, 1) == pytest.approx(8**0.5)
    assert exchange(alone, apart, 8) == pytest.approx(8**0.75)
    assert exchange(alone, alone, 8) == exchange(alone, alone, 1) == 1
    assert exchange(alone, alone + 2, 8) == math.inf
    assert exchange(alone, alone - 2, 8) == 1 / 8, "at most: the smallest size loses less"


def test_parts_stand_in_one_order():
    assert mix_parts("production") == PARTS
    assert mix_parts("production+facts+json") == mix_parts("production+facts+facts") == ()
    assert mix_parts("production+") == mix_parts("json+facts") == ()
