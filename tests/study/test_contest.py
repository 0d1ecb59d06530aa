"""The contest: every method as often, each run's skill beside it, and LoRA against itself."""

import dataclasses
import itertools

import numpy as np
import pandas as pd
import pytest

from deltarank.spectra import rank_measures
from deltarank.study import contest
from deltarank.study.configs import VARIANTS
from deltarank.study.contest import (
    AGAIN,
    MORE,
    contestants,
    finals_table,
    trials_table,
    tuning_curves,
    updates_table,
)
from deltarank.study.floors import skill_gain
from deltarank.study.gains import gain
from deltarank.study.overlaps import mean_overlap
from deltarank.study.profiles import profile
from deltarank.study.runs import Result, run
from deltarank.study.search import tuned
from deltarank.study.sizes import trained_parameters
from deltarank.study.trials import METHODS, chosen, trials


def test_all_methods_that_have_a_size_take_part(monkeypatch):
    monkeypatch.setattr(contest, "TO_COME", {})
    small, large = (contestants("facts", size) for size in (1, 8))
    assert small[:2] == ["full", "LoRA"] and "VeRA" in small and "rsLoRA" not in small
    assert {*small, *large} == {*METHODS}
    named = {METHODS[name].fields[8]["method"] for name in large}
    assert named >= {"full", "lora"} and named <= {"full", "lora", *VARIANTS}


def test_what_is_still_to_be_run_of_a_contest_is_left_out():
    for (task, size), out in contest.TO_COME.items():
        ready = contestants(task, size)
        assert {*ready, *out} == {name for name, of in METHODS.items() if size in of.fields}
        assert not {*ready} & {*out}


@pytest.fixture
def two(store, monkeypatch):
    """Two methods of the contest, each with two trials."""
    monkeypatch.setattr(contest, "contestants", lambda *contest: ["LoRA", "HiRA"])


def test_a_line_a_trial(two):
    table = trials_table()
    assert len(table) == 2 * profile().trials
    second = table[(table["method"] == "LoRA") & (table["trial"] == 2)].iloc[0]
    result = trials("facts", "LoRA", 1)[1]
    assert (second["lr"], second["knob"]) == (result.config.lr, result.config.alpha)
    assert second["parameters"] == trained_parameters(result.config)
    assert second["gain"] == max(skill_gain(result, split="valid"), 0)
    assert table[table["method"] == "HiRA"]["knob"].isna().all()


def test_a_curve_is_the_best_so_far_and_the_mean_best_of_as_many_draws():
    gains = [0.5, 0.2, 0.9, 0.4]
    table = pd.DataFrame({"task": "facts", "size": 1, "method": "LoRA", "gain": gains})
    curve = tuning_curves(table).loc["facts", 1, "LoRA"]
    assert [*curve["so_far"]] == [0.5, 0.5, 0.9, 0.9]
    for k, expected in curve["expected"].items():
        draws = [max(drawn) for drawn in itertools.product(gains, repeat=k)]
        assert expected == pytest.approx(sum(draws) / len(draws))


def test_a_line_a_seed_at_the_best_setting(two):
    table, seeds = finals_table(), profile().seeds
    assert [*table["method"]] == [m for m in ("LoRA", "HiRA", AGAIN, MORE) for _ in seeds]
    assert not {*table[table["method"] == AGAIN]["seed"]} & {*seeds}
    tried = trials("facts", "LoRA", 1)
    for _, line in table[table["method"] != "HiRA"].iterrows():
        more = tuned("facts", "lora", rank=1, seed=line["seed"])
        config = more if line["method"] == MORE else chosen(tried, seed=line["seed"])
        result = run(config)
        assert line["score"] == result.score()
        seed = line["seed"] - contest.APART * (line["method"] == AGAIN)  # of its full run
        by = dataclasses.replace(result, config=dataclasses.replace(result.config, seed=seed))
        assert (line["gain"], line["loss_gain"]) == (max(skill_gain(by), 0), gain(by))


def test_a_run_that_diverged_has_none_of_the_skill(store):
    config = dataclasses.replace(trials("facts", "LoRA", 1)[0].config, lr=1.0)
    diverged = Result(config, {"status": "diverged", "evaluation": {}})
    assert contest._line("LoRA", diverged, "test")["gain"] == 0


def test_a_run_that_ended_worse_than_without_the_skill_is_worth_as_little(store, monkeypatch):
    result = trials("facts", "LoRA", 1)[0]
    for kept, worth in ((-3.0, 0), (0.5, 0.5)):
        monkeypatch.setattr(contest, "skill_gain", lambda result, split, kept=kept: kept)
        assert contest._line("LoRA", result, "test")["gain"] == worth


def test_an_update_is_set_beside_those_of_full_fine_tuning_and_of_lora(store, monkeypatch):
    monkeypatch.setattr(contest, "contestants", lambda *contest: ["full", "LoRA"])
    table, seed = updates_table(), profile().seeds[0]
    full, lora = (chosen(trials("facts", name, 1), seed=seed) for name in ("full", "LoRA"))
    shared = mean_overlap(full, lora)[1]
    assert table.loc[("facts", 1, "full"), "LoRA"] == pytest.approx(shared)
    assert table.loc[("facts", 1, "LoRA"), "full"] == pytest.approx(shared)
    again = dataclasses.replace(lora, seed=seed + contest.APART)
    assert table.loc[("facts", 1, "LoRA"), "LoRA"] == mean_overlap(lora, again)[1] < 1
    ranks = [rank_measures(S)["r90"] for S in run(lora).spectra.values()]
    assert table.loc[("facts", 1, "LoRA"), "r90"] == np.median(ranks)
