"""Rivals: what they read of a task is what its runs hold, and rules that read nothing say so."""

import math

import numpy as np
import pandas as pd
import pytest

from deltarank.study import rivals
from deltarank.study.floors import skill_gain
from deltarank.study.forecast import forecast, rank_by_rows
from deltarank.study.gains import first_epoch_kbit, taught_kbit
from deltarank.study.gradients import first_gradients
from deltarank.study.profiles import profile
from deltarank.study.rivals import (
    LEAST_KBIT,
    against_chance,
    control,
    costs,
    dealt,
    forecasts,
    known_sizes,
    one_size,
    paid,
    parameters_of,
    probe,
    read_of,
    summed_costs,
    taught,
)
from deltarank.study.runs import Result, run
from deltarank.study.search import tuned
from deltarank.study.sizes import trained_parameters, tried_runs
from deltarank.study.tasks import load_split


def test_they_read_what_was_measured(store):
    found = read_of(["facts", "sentiment"])
    told = run(probe("facts", profile()))
    assert (told.config.rank, told.config.method) == (4, "lora")
    rows = len(load_split("facts", "train"))
    assert found.loc["facts", "bits"] == max(taught_kbit(told, rows), LEAST_KBIT)
    assert found.loc["facts", "code length"] == first_epoch_kbit(told)
    gradient = first_gradients(profile().config("facts", "base"))["stable_rank"]
    assert found.loc["facts", "gradient"] == gradient.median()
    growth = run(profile().config("facts")).record["growth"]
    assert [*found.columns[3:]] == [f"stable rank, {note['step']} steps" for note in growth]
    last = pd.Series(growth[-1]["stable_rank"]).median()
    assert found.loc["facts"].iloc[-1] == last and len(growth) > 0
    assert (found > 0).all(axis=None)


def test_a_probe_that_diverged_is_named(store, monkeypatch):
    told = Result(probe("facts", profile()), {"status": "diverged"})
    monkeypatch.setattr(rivals, "run", lambda config: told)
    with pytest.raises(ValueError, match="diverged: it tells no bits"):
        read_of(["facts"])


def test_a_probe_that_teaches_nothing_has_the_least_bits(store, monkeypatch):
    monkeypatch.setattr(rivals, "taught_kbit", lambda told, rows: -1.0)
    told = Result(probe("facts", profile()), {"status": "finished"})
    assert taught(told) == LEAST_KBIT


@pytest.fixture
def three(monkeypatch):
    """Three known tasks whose needed size is the square of their bits, and one that is asked."""
    bits = pd.DataFrame({"bits": {"pirate": 1.0, "json": 2.0, "facts": 4.0, "kjv": 8.0}})
    monkeypatch.setattr(rivals, "read_of", lambda tasks: bits.loc[[*tasks]])
    ends = {"pirate": (50.0, 200.0), "json": (200.0, 800.0), "facts": (800.0, 3200.0)}
    monkeypatch.setattr(rivals, "needed_size", lambda task, share: ends[task])
    return [*ends]


def test_a_bracket_counts_by_its_middle(three):
    assert known_sizes(three, 0.95).round(6).to_dict() == {
        "pirate": 100.0,
        "json": 400.0,
        "facts": 1600.0,
    }


def test_a_forecast_goes_by_the_known_tasks(three):
    table = forecasts(three, ["kjv"], 0.95)
    assert table.loc["kjv", "bits"] == pytest.approx(6400)
    one = parameters_of({"method": "lora", "rank": 1})
    rows = len(load_split("kjv", "train"))
    assert table.loc["kjv", "always"] == 4 * one
    assert table.loc["kjv", "by rows"] == one * rank_by_rows(rows)


def test_a_forecast_is_of_the_size_that_the_share_needs(three, monkeypatch):
    monkeypatch.setattr(rivals, "needed_size", lambda task, share: (1000 * share, 1000 * share))
    assert forecasts(three, ["kjv"], 0.5).loc["kjv", "bits"] == pytest.approx(500)


@pytest.fixture
def dates(store):
    """The sizes of dates that were tried, and what full fine-tuning ends at."""
    return tried_runs("dates"), run(tuned("dates")).loss()


def test_what_is_paid_is_what_the_sizes_tried_end_at(dates):
    tried, full = dates
    table = paid("dates")
    assert [*table.index] == sorted(table.index)
    for count, result in tried.items():
        assert table.loc[count, "lost"] == pytest.approx(result.loss() - full)
        assert table.loc[count, "kept"] == pytest.approx(skill_gain(result), nan_ok=True)


def test_a_size_beyond_those_tried_costs_what_the_last_does(dates):
    table = paid("dates")
    asked = {"below": 1, "second": table.index[1], "above": 1e9}
    found = costs(pd.DataFrame(asked, ["dates"])).xs("dates", level="task")
    assert [*found["parameters"]] == [table.index[0], table.index[1], 1e9]
    for name in table:
        assert found[name].tolist() == pytest.approx([*table[name].iloc[[0, 1, -1]]], nan_ok=True)


def test_between_two_sizes_it_is_read_over_the_logarithm(dates):
    tried, full = dates
    (low, below), (high, above), *_ = tried.items()
    middle = math.sqrt(low * high)
    [found] = costs(pd.DataFrame({"middle": middle}, ["dates"])).to_dict("records")
    assert found["parameters"] == pytest.approx(middle)
    assert found["lost"] == pytest.approx((below.loss() + above.loss()) / 2 - full)


def test_the_usual_rank_is_among_what_is_paid(dates):
    usual = 4 * parameters_of({"method": "lora", "rank": 1})
    assert usual in paid("dates").index and {*dates[0]} <= {*paid("dates").index}


def test_costs_are_those_of_the_sizes_that_a_share_asks_for(dates):
    high = {*tried_runs("dates", shares=(1e9,))}  # which no size keeps
    usual = 4 * parameters_of({"method": "lora", "rank": 1})
    assert high != {*dates[0]} and {*paid("dates", shares=(1e9,)).index} == high | {usual}
    asked = pd.DataFrame({"any": [1.0]}, ["dates"])
    assert costs(asked, shares=(1e9,))["parameters"].item() == min(high | {usual})


def test_costs_have_a_line_a_rule_and_task(store):
    says = pd.DataFrame({"low": [1.0, 1.0], "high": [1e9, 1e9]}, ["dates", "facts"])
    assert [*costs(says).index] == [(rule, task) for rule in says for task in says.index]


def test_one_size_for_all_is_a_rule_a_lora_of_the_ladder():
    table = one_size(["facts", "sentiment"])
    assert (table.nunique() == 1).all() and [*table.index] == ["facts", "sentiment"]
    assert [float(name.replace(",", "")) for name in table] == [*table.iloc[0]]
    assert f"{parameters_of({'method': 'lora', 'rank': 8}):,}" in table


def test_what_rules_cost_is_summed_beside_one_size_as_large(monkeypatch):
    sizes = [float(n.replace(",", "")) for n in one_size(["a"])]
    first, last = sizes[0], sizes[-1]
    middle = math.sqrt(first * last)
    says = pd.DataFrame({"rule": [first, last]}, index=["a", "b"])

    def paid_by_size(says, *, shares):
        """A size loses 1 nat at the first rung, 0 at the last, a line between; kept the rest."""
        share = np.log(says / first) / math.log(last / first)
        found = pd.concat({"parameters": says.stack(), "lost": (1 - share).stack()}, axis=1)
        found.index.names = ["task", "rule"]
        return found.assign(kept=1 - found["lost"]).swaplevel()

    monkeypatch.setattr(rivals, "costs", paid_by_size)
    found = summed_costs(says, 0.9).loc["rule"]
    assert found["parameters"] == pytest.approx(middle)
    expected = {"lost, mean": 0.5, "lost, max": 1.0, "short": 1, "one size": 0.5}
    assert found[[*expected]].to_dict() == pytest.approx(expected)


def test_dealt_readings_are_those_of_other_tasks():
    read = pd.DataFrame({"bits": {"pirate": 1.0, "json": 2.0, "facts": 4.0}})
    needed = read["bits"] ** 2
    found = dealt(read, needed, 20)
    assert [*found] == [f"bits: {i}" for i in range(20)] and [*found.index] == [*read.index]
    true = forecast(read["bits"], needed, read["bits"])
    same = [np.allclose(found[column], true) for column in found]
    assert 0 < sum(same) < 20, "of six orders one is that of the tasks"
    assert dealt(read, needed, 20).equals(found)


def test_a_rule_is_as_low_as_the_draws_that_lie_no_lower():
    """Two sizes for all draw the line 2 - log10 parameters; draws lie 0, 1 and 5 above it.

    In the mean over three tasks, of the loss and of the logarithm of the parameters.
    """
    rules = {"rule": (10**1.5, 1.5), "rule: 0": (10.0, 1.0), "rule: 1": (10**1.5, 1.5)}
    rules |= {"rule: 2": (100.0, 5.0)}
    apart = {"facts": (0.1, -1.0), "json": (0.1, -1.0), "kjv": (100.0, 2.0)}  # times, more
    rows = {
        (rule, task): (n * times, lost + more)
        for rule, (n, lost) in rules.items()
        for task, (times, more) in apart.items()
    }
    for size, lost in ((10.0, 1.0), (100.0, 0.0)):
        rows |= {(f"{size:.0f}", task): (size, lost) for task in apart}
    spent = pd.DataFrame(rows, ["parameters", "lost"]).T.rename_axis(["rule", "task"])
    found = against_chance(spent, ["rule"], ["100", "10"]).loc["rule"]
    assert found.round(6).to_dict() == {"nats": 1.0, "dealt": 1.0, "as low": round(2 / 3, 6)}


def test_the_control_deals_each_rule_its_own_readings(three, monkeypatch):
    needed, read = known_sizes(three, 0.95), rivals.read_of(three)

    def missed(says, *, shares=()):
        """What a size costs: the logarithm by which it misses what is needed."""
        lost = np.log(says.div(needed, axis=0)).abs()
        found = pd.concat({"parameters": says.stack(), "lost": lost.stack()}, axis=1)
        found.index.names = ["task", "rule"]
        return found.swaplevel()

    monkeypatch.setattr(rivals, "costs", missed)
    found = control(read, needed, 0.95, draws=40).loc["bits"]  # the rule misses nothing
    assert found["nats"] < found["dealt"] and 0 < found["as low"] < 0.5


def test_a_task_of_which_all_diverged_is_named(store, monkeypatch):
    diverged = Result(probe("dates", profile()), {"status": "diverged"})
    monkeypatch.setattr(rivals, "tried_runs", lambda task, shares: {8: diverged})
    monkeypatch.setattr(rivals, "run", lambda config: diverged)
    with pytest.raises(ValueError, match="dates: every size that was tried diverged"):
        paid("dates")


def test_a_rank_of_all_layers_has_so_many_times_the_parameters_of_rank_1():
    one, four = (profile().config("facts", "lora", rank=r) for r in (1, 4))
    assert np.isclose(trained_parameters(four), 4 * parameters_of({"method": "lora", "rank": 1}))
    assert trained_parameters(one) == parameters_of({"method": "lora", "rank": 1})
