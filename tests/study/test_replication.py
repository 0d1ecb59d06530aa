"""Replication: the measures of a second model, and the claims that its numbers have to keep."""

import math

import pandas as pd
import pytest

from deltarank.runtime import ROOT, at_profile
from deltarank.study.advice import FORECAST
from deltarank.study.profiles import PROFILES, profile
from deltarank.study.replication import CLAIMS, CODE_CLAIMS, Claim, measures_table
from deltarank.study.runs import run
from deltarank.study.search import tuned
from deltarank.study.tables import spectra_table


@pytest.fixture
def table():
    """Four tasks that keep every claim, as if measured: each bound is passed by some way."""
    tasks = {"json": 1e3, "pirate": 2e3, "facts": 1e6, "sorbian": 2e6}
    found = pd.DataFrame({"needed": tasks})
    found["above"] = found["needed"] / 2
    found["taught"] = [
        math.exp((math.log(n) - FORECAST.start) / FORECAST.slope) for n in tasks.values()
    ]
    found["kbit"] = found["above"] / 4000
    found["r90"], found["r90_over_null"], found["lora"] = 50.0, 0.3, [1.0, 1.0, 8.0, 8.0]
    found["stable_rank"], found["cut"] = [1.0, 2.0, 3.0, 4.0], [1.0, 8.0, 64.0, math.inf]
    found["gain, low"], found["skill, low"] = [1.0, 1.0, 0.9, 0.9], [1.0, 0.9, 0.5, 0.5]
    found["gain, middle"], found["skill, middle"] = 0.97, [1.0, 1.0, 1.0, 0.9]
    found["kept"], found["lr, LoRA over full"] = 0.9, 10.0
    return found


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.words)
def test_a_table_made_to_keep_the_claims_keeps_each(table, claim):
    assert claim.holds(claim.of(table)), (claim, claim.of(table))


BROKEN = {
    "r90 over the rank": {"r90": 3.0},
    "r90 over noise": {"r90_over_null": 0.7},
    "loss gain of LoRA": {"gain, middle": 0.94},
    "tasks with 95 % of the loss gain": {"gain, low": 0.9},
    "tasks that have it in loss": {"skill, low": 1.0},
    "tasks with 95 % of the skill": {"skill, middle": 0.9},
    "tasks in which the cut": {"kept": 0.98},
    "needs of facts": {"above": 1.0},
    "tasks that need more than two": {"kbit": 1e6},
    "stable rank and": {"stable_rank": [4.0, 3.0, 2.0, 1.0]},
    "LoRA's rate": {"lr, LoRA over full": 2.0},
    "tasks whose need": {"taught": 1e3},
}


@pytest.mark.parametrize("words, change", BROKEN.items())
def test_each_claim_can_be_broken_by_what_it_reads(table, words, change):
    [claim] = [claim for claim in CLAIMS if claim.words.startswith(words)]
    assert not claim.holds(claim.of(table.assign(**change)))


def test_every_claim_has_a_test_that_breaks_it():
    assert all(any(claim.words.startswith(words) for words in BROKEN) for claim in CLAIMS)


@pytest.mark.parametrize(
    "recall, held", [([1.0, 1.0, 0.2], [True, True]), ([0.9, 0.9, 0.6], [False, False])]
)
def test_codes_are_kept_at_half_a_bit_and_lost_at_two(recall, held):
    table = pd.DataFrame({"recall": recall}, index=[0.5, 0.5, 2.0])
    assert [claim.holds(claim.of(table)) for claim in CODE_CLAIMS] == held


def test_a_number_that_is_none_keeps_no_bound():
    assert not Claim("any", lambda table: math.nan).holds(math.nan)


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


def test_the_second_model_is_stored_beside_the_first(monkeypatch):
    paper = PROFILES["paper"]
    second = PROFILES[paper.second]
    assert second.store == paper.store == ROOT / "data" and second.model != paper.model
    assert {*second.seed_tasks} < {*second.lora_tasks} <= {*paper.lora_tasks}
    monkeypatch.setenv("MODEL", "anything")
    assert not second.store.is_relative_to(ROOT / "data")


def test_measures_are_those_of_the_runs(store):
    """One task of the smoke profile, against what its runs say themselves."""
    [found] = measures_table(["facts"], 0).to_dict("records")
    full = run(tuned("facts", seed=0))
    assert found["lr"] == full.config.lr
    assert found["r90"] == spectra_table([full])["r90"].median()
    assert found["above"] < found["needed"]
