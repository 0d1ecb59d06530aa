"""Floors: the best of what has no skill, and gains that are measured from it."""

import pandas as pd
import pytest
from sacrebleu import sentence_chrf

from deltarank.runtime import at_profile
from deltarank.study import floors
from deltarank.study.configs import RunConfig
from deltarank.study.floors import copied, copy_score, has_floor, skill_gain, skill_kept
from deltarank.study.profiles import PROFILES, profile
from deltarank.study.runs import Result
from deltarank.study.tasks import load_split


def result(loss, score, config=None):
    """A run that loses ten times as much on the rows that choose, and scores half as much."""
    test = {"loss_nats": loss, "score": score}
    valid = {"loss_nats": 10 * loss, "score": score / 2}
    return Result(config, {"evaluation": {"test": test, "valid": valid}})


@pytest.fixture
def without_skill(monkeypatch):
    """Base 5 nats and 1 %, trained on permuted answers 2 and 20 or 3 and 10; full: 1 and 100."""
    known = {0.0: result(5.0, 1.0), 1.0: result(2.0, 20.0), 1.5: result(3.0, 10.0)}
    known[2.0] = result(1.0, 100.0, profile().config("facts"))
    monkeypatch.setattr(floors, "run", lambda config: known[config.lr])
    permuted = [RunConfig(task="facts", steps=1, lr=1.0)]
    permuted += [RunConfig(task="facts", method="lora", rank=1, alpha=1.0, steps=1, lr=1.5)]
    monkeypatch.setattr(floors, "floor_configs", lambda task: permuted)
    best = RunConfig(task="facts", steps=1, lr=2.0)
    monkeypatch.setattr(floors, "full_of", lambda config: best)


def test_the_floor_is_the_best_without_skill(without_skill):
    table = floors.floors("facts")
    assert table["loss_nats"].to_dict() == pytest.approx(
        {"base": 5, "full": 2, "lora": 3, "copy": float("nan")}, nan_ok=True
    )
    full = result(1.0, 100.0, profile().config("facts"))
    assert skill_kept(2.0, full) == 0 and skill_kept(1.0, full) == 1
    assert skill_kept(5.0, full) == -3  # below the floor
    assert skill_kept(60.0, full, by="score") == 0.5
    lower = result(0.0, 180.0, profile().config("facts"))
    assert skill_kept(1.0, lower) == 0.5 and skill_kept(100.0, lower, by="score") == 0.5


def test_what_a_copy_scores_is_no_skill(without_skill):
    with at_profile("paper"):
        score = copy_score("kjv")
    full = result(1.0, 100.0, PROFILES["paper"].config("kjv"))
    assert score > 20 and skill_kept(score, full, by="score") == 0  # trained permuted: 20


def test_the_gain_of_a_run_is_read_from_the_floor(without_skill):
    run = result(1.5, 28.0, profile().config("facts"))
    assert skill_gain(run) == skill_gain(run, split="valid") == 0.5
    assert skill_gain(run, by="score") == pytest.approx(0.1)
    assert skill_gain(run, by="score", split="valid") == pytest.approx(0.1)
    for by in ("nats", "spectra"):
        with pytest.raises(ValueError, match=f"by='{by}'.*loss or score"):
            skill_gain(run, by=by)


@pytest.mark.parametrize("task", ["pirate", "kjv", "sorbian"])
def test_copying_gives_the_input_back(task):
    row = load_split(task, "test")[0]
    assert copied(row) in row["prompt"] and "\n" not in copied(row)
    assert 0 < copy_score(task) < 100


def test_copying_is_scored_on_as_many_rows_as_are_asked_for():
    first = load_split("kjv", "test")[0]
    one = sentence_chrf(copied(first), [first["answer"].strip()]).score
    assert copy_score("kjv", 1) == one != copy_score("kjv")
    assert copy_score("kjv", profile().generate_rows) == copy_score("kjv")


def test_a_mix_is_copied_where_it_is_a_rewriting_and_has_nothing_elsewhere():
    given = load_split("mix", "test")[: profile().eval_rows]
    rewritings = [row for row in given if row["metric"] == "chrf"][: profile().generate_rows]
    scores = [sentence_chrf(copied(row), [row["answer"].strip()]).score for row in rewritings]
    exact = sum(row["metric"] == "exact" for row in given)
    assert exact > 0 and copy_score("mix") == pytest.approx(sum(scores) / (len(scores) + exact))


def test_only_a_rewriting_can_be_copied():
    assert copy_score("json") != copy_score("json")  # NaN


def test_a_task_without_lora_has_no_floor(without_skill):
    kept = skill_kept(pd.Series([1.0, 2.0]), result(1.0, 50.0, profile().config("shuffled")))
    assert kept.isna().all()


def test_a_task_that_is_forecast_has_a_floor():
    with at_profile("paper"):
        forecast = {*profile().forecast_tasks}
        assert forecast - {*profile().lora_tasks} and all(map(has_floor, forecast))


def test_whether_a_task_has_a_floor_is_said_by_the_profile_of_the_run(monkeypatch):
    table = pd.DataFrame({"loss_nats": [3.0], "score": [0.0]})
    monkeypatch.setattr(floors, "floors", lambda task, split: table)
    full = result(1.0, 100.0, PROFILES["paper"].config("kjv"))
    assert skill_kept(2.0, full) == 0.5
