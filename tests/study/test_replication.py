"""Replication: the measures of a second model, and the claims that its numbers have to keep."""

import math

import numpy as np
import pandas as pd
import pytest

from deltarank.runtime import ROOT, at_profile
from deltarank.study import replication
from deltarank.study.advice import FORECAST
from deltarank.study.configs import RunConfig
from deltarank.study.cuts import cut
from deltarank.study.floors import skill_gain
from deltarank.study.gains import ends, gain, learned_kbit
from deltarank.study.profiles import PROFILES, profile
from deltarank.study.replication import (
    CLAIMS,
    CODE_CLAIMS,
    SHARE,
    bracket,
    claims_table,
    codes_table,
    measures_table,
    task_measures,
)
from deltarank.study.rivals import probe, taught
from deltarank.study.runs import Result, run
from deltarank.study.search import tuned
from deltarank.study.sizes import parameters_of, tried_runs
from deltarank.study.tables import cut_gains, keep_table, spectra_table

# The claims, by numbers made to keep each by a way


@pytest.fixture
def table():
    """Four tasks that keep every claim, as if measured."""
    needed = pd.Series({"json": 1e3, "pirate": 2e3, "facts": 1e6, "sorbian": 2e6})
    found = pd.DataFrame({"needed": needed, "above": needed / 2})
    found["taught"] = np.exp((np.log(needed) - FORECAST.start) / FORECAST.slope)
    found["kbit"] = found["above"] / 4000
    found["r90"], found["r90_over_null"], found["lora"] = 50.0, 0.3, [1.0, 1.0, 8.0, 8.0]
    found["stable_rank"], found["cut"] = [1.0, 2.0, 3.0, 4.0], [1.0, 8.0, 64.0, math.inf]
    found["gain, low"], found["skill, low"] = [1.0, 1.0, 0.9, 0.9], [1.0, 0.9, 0.5, 0.5]
    found["gain, middle"], found["skill, middle"] = 0.97, [1.0, 1.0, 1.0, 0.9]
    found["kept"], found["lr, LoRA over full"] = 0.9, 10.0
    return found


def claim(words):
    """The one claim whose words begin so."""
    [found] = [claim for claim in CLAIMS if claim.words.startswith(words)]
    return found


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.words)
def test_a_table_made_to_keep_the_claims_keeps_each(table, claim):
    assert claim.holds(claim.of(table)), (claim, claim.of(table))


BROKEN = [  # a claim, and the one cell that breaks it
    ("r90 over the rank", "facts", {"r90": 31.0}),
    ("r90 over noise", "facts", {"r90_over_null": 0.7}),
    ("loss gain of LoRA", "json", {"gain, middle": 0.94}),
    ("tasks with 95 % of the loss gain", "json", {"gain, low": 0.9}),
    ("tasks that have it in loss", "pirate", {"skill, low": 1.0}),
    ("tasks with 95 % of the skill", "json", {"skill, middle": 0.9}),
    ("tasks in which the cut", "json", {"kept": 0.98}),
    ("needs of facts", "facts", {"above": 7e3}),
    ("needs of facts", "pirate", {"needed": 2e5}),
    ("needs of facts", "pirate", {"needed": math.inf}),
    ("LoRA's rate", ["json", "pirate", "facts"], {"lr, LoRA over full": 2.0}),
    ("stable rank and", ["json", "sorbian"], {"stable_rank": [4.0, 1.0]}),
    ("tasks that need more", ["json", "pirate", "facts"], {"kbit": 1e6}),
    ("tasks that need more", ["json", "pirate", "facts"], {"above": 0.0, "kbit": 0.0}),
    ("tasks whose need", ["json", "pirate"], {"taught": 1e3}),
    ("tasks whose need", ["facts", "sorbian"], {"taught": 1e-3}),
]


@pytest.mark.parametrize("words, tasks, change", BROKEN)
def test_a_claim_is_broken_by_the_cells_that_it_reads(table, words, tasks, change):
    table.loc[tasks, [*change]] = pd.DataFrame(change, np.atleast_1d(tasks)).to_numpy()
    assert not claim(words).holds(claim(words).of(table))


def test_every_claim_has_a_case_that_breaks_it():
    assert {claim(words).words for words, *_ in BROKEN} == {claim.words for claim in CLAIMS}


@pytest.mark.parametrize("words", ["loss gain of LoRA", "r90 over noise", "LoRA's rate"])
def test_a_task_whose_run_diverged_keeps_no_bound(table, words):
    table.loc["json", ["gain, middle", "r90_over_null", "lr, LoRA over full"]] = math.nan
    assert math.isnan(claim(words).of(table)) and not claim(words).holds(claim(words).of(table))


def test_tasks_that_were_not_measured_keep_no_bound(table):
    found = claim("needs of facts")
    assert not found.holds(found.of(table.drop(index="facts")))


@pytest.mark.parametrize(
    ("recall", "held"),
    [
        ([1.0, 0.0, 0.2, 0.9], [True, True]),  # what other seeds recall does not count
        ([0.9, 1.0, 0.6, 0.1], [False, False]),
        ([math.nan, 1.0, math.nan, 0.1], [False, False]),
    ],
)
def test_codes_are_kept_at_half_a_bit_and_lost_at_two_by_the_first_seed(recall, held):
    table = pd.DataFrame({"recall": recall, "seed": [0, 1, 0, 1]}, index=[0.5, 0.5, 2.0, 2.0])
    assert [claim.holds(claim.of(table)) for claim in CODE_CLAIMS] == held
    assert not any(claim.holds(claim.of(table[table.index == 1.0])) for claim in CODE_CLAIMS)


def test_two_models_stand_beside_each_other_with_what_hangs_on_a_task(table):
    worse = table.assign(r90=[50.0, 50.0, 24.0, 50.0])
    line = claims_table(table, worse, CLAIMS).loc[claim("r90 over the rank").words]
    assert (line["least"], line["value"], line["low"], line["high"]) == (4, 6.25, 6.25, 6.25)
    assert (line["again, value"], line["again, low"], line["again, high"]) == (3, 3, 6.25)
    assert line["holds"] and not line["again, holds"]


def test_of_codes_it_is_what_each_seed_comes_to():
    table = pd.DataFrame({"recall": [1.0, 0.9], "seed": [0, 1]}, index=[0.5, 0.5])
    line = claims_table(table, table, CODE_CLAIMS).iloc[0]
    assert (line["value"], line["low"], line["high"], line["holds"]) == (1, 0.9, 1, True)


# The profile at work


def test_a_profile_is_at_work_within_and_no_longer_than_that():
    before = profile()
    with at_profile("quick"):
        assert profile() is PROFILES["quick"]
        with at_profile("paper"):
            assert profile() is PROFILES["paper"]
        assert profile() is PROFILES["quick"]
    with pytest.raises(RuntimeError), at_profile("quick"):
        raise RuntimeError
    assert profile() == before
    with pytest.raises(ValueError, match="name of a profile"), at_profile(""):
        pass


def test_the_second_model_is_stored_beside_the_first_and_drawn_apart(monkeypatch):
    paper = PROFILES["paper"]
    second = PROFILES[paper.second]
    assert second.store == paper.store == ROOT / "data" and second.model != paper.model
    assert not second.figures.is_relative_to(ROOT)  # BUILD is a temporary folder here
    assert {*second.seed_tasks} < {*second.lora_tasks} == {*paper.lora_tasks}
    assert second.lora_alphas == paper.lora_alphas and second.alpha_tasks == ("facts",)
    with at_profile("smollm2"):
        assert RunConfig(task="facts", method="base").profile == "smollm2"
    monkeypatch.setenv("MODEL", "anything")
    assert not second.store.is_relative_to(ROOT / "data")


@pytest.fixture
def another(store, monkeypatch):
    """A profile that differs from smoke in its rates, so that its best ones do."""
    found = PROFILES["smoke"]
    rates = {"full_lrs": (3e-4, 3e-3), "lora_lrs": (3e-3, 3e-2)}
    monkeypatch.setitem(
        PROFILES, "another", type(found)(**{**vars(found), **rates, "name": "another"})
    )
    return "another"


def test_a_run_is_measured_by_the_profile_that_made_it(another):
    with at_profile(another):
        lora = run(tuned("facts", "lora", rank=1))
        found = gain(lora), skill_gain(lora), [end.config for end in ends(lora.config)]
    assert lora.config.profile == another and lora.config.lr in (3e-3, 3e-2)
    assert (gain(lora), skill_gain(lora)) == found[:2]
    assert [end.config for end in ends(lora.config)] == found[2]
    assert found[2][1].lr in (3e-4, 3e-3)


def test_a_table_belongs_to_the_profile_that_made_it(another):
    first = keep_table("any", lambda: pd.DataFrame({"x": [1]}))
    with at_profile(another):
        assert keep_table("any", lambda: pd.DataFrame({"x": [2]}))["x"].item() == 2
    assert keep_table("any", lambda: 1 / 0).equals(first)


# What is measured, against the runs themselves


def test_measures_are_those_of_the_runs(store):
    found = task_measures("facts", 1)
    full = run(tuned("facts", seed=1))
    low, middle = (run(tuned("facts", "lora", rank=rank, seed=1)) for rank in (1, 4))
    assert found["lr"] == full.config.lr
    assert found["lr, LoRA over full"] == middle.config.lr / full.config.lr
    assert found["r90"] == spectra_table([full])["r90"].median()
    assert (found["gain, low"], found["gain, middle"]) == (gain(low), gain(middle))
    assert (found["skill, low"], found["skill, middle"]) == (skill_gain(low), skill_gain(middle))
    assert found["kept"] == cut_gains(full.config, cut(full.config, [4]))["kept_loss"].item()
    assert (found["above"], found["needed"]) == bracket("facts", 1)
    assert found["kbit"] == max(learned_kbit(full), 0)
    assert found["taught"] == taught(run(probe("facts", profile())))


def test_the_needed_ranks_are_those_of_lora_and_of_the_cut(store, monkeypatch):
    """Each is read off its own curve: of LoRA from rank 4 on, of the cut from rank 8 on."""
    full, cuts = profile().config("facts"), pd.Series({0: 0.1, 1: 0.3, 4: 0.9, 8: 0.96})
    table = cuts.rename_axis("rank").rename("kept_loss").reset_index()
    monkeypatch.setattr(replication, "gain", lambda run: {1: 0.5, 4: 0.97, 8: 1}[run.config.rank])
    monkeypatch.setattr(replication, "cut_until", lambda *_: "cuts")
    monkeypatch.setattr(replication, "cut", lambda config, ranks: ranks)
    monkeypatch.setattr(replication, "cut_gains", lambda config, which: (
        table if which == "cuts" else table[table["rank"].isin(which)]))  # fmt: skip
    found = task_measures(full.task, 0)
    assert (found["lora"], found["cut"], found["kept"]) == (4, 8, 0.9)


def test_a_table_has_a_line_a_task_by_the_profile_that_is_named(monkeypatch):
    monkeypatch.setenv("PROFILE", "paper")

    def measured(task, seed):
        return {"steps": profile().steps, "seed": seed}

    monkeypatch.setattr(replication, "task_measures", measured)
    table = measures_table("smoke", 1)
    assert [*table.index] == ["sentiment", "facts"] and (table == [6, 1]).all(axis=None)


def test_a_bracket_has_the_ranks_beside_the_sizes_that_halving_tries(store, monkeypatch):
    """All short but the largest rank, which halving, led by other rows, never comes to."""
    ranks = [parameters_of({"method": "lora", "rank": rank}) for rank in (1, 4, 8)]
    size = replication.trained_parameters
    monkeypatch.setattr(replication, "skill_gain", lambda r: float(size(r.config) == ranks[-1]))
    assert bracket("facts", 0) == (ranks[1], ranks[2])
    monkeypatch.setattr(replication, "skill_gain", lambda r: 1.0)
    least = min(tried_runs("facts", shares=(SHARE,)))
    assert bracket("facts", 0) == (0, min(least, ranks[0]))


def test_a_run_that_diverged_is_named_before_anything_is_read_off_it(store, monkeypatch):
    diverged = Result(profile().config("facts"), {"status": "diverged"})
    monkeypatch.setattr(replication, "run", lambda config: diverged)
    with pytest.raises(ValueError, match="facts-full-.*no yardstick"):
        task_measures("facts", 0)


def test_codes_are_those_of_the_size_with_every_seed(store):
    table = codes_table("smoke")
    assert {*table["trained"]} == {"rank 1 on 1 layer"} and {*table["seed"]} == {0, 1}
    assert table.index.min() == pytest.approx(0.1, abs=0.05)
