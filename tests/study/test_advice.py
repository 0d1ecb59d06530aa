"""Advice: the forecast in words, by the load that rows make and by what it is fitted to."""

import dataclasses
import math

import pandas as pd
import pytest

from deltarank.study import advice as advice_module
from deltarank.study.advice import Forecast, advice
from deltarank.study.own_rows import Holding
from deltarank.study.profiles import PROFILES
from deltarank.study.sizes import parameters_of

RANK_1 = {"method": "lora", "rank": 1}
COLUMNS = ["rows", "prompt_tokens", "answer_tokens"]
ONE_KIND = pd.DataFrame([[80, 400, 160]], ["rows"], COLUMNS)
TWO_KINDS = pd.DataFrame([[60, 300, 120], [20, 100, 40]], ["chat", "tables"], COLUMNS)


@pytest.fixture
def told(monkeypatch):
    """advice of rows that hold what is given, by a forecast of a parameter a bit, up to twice."""
    plain = Forecast(start=math.log(1000), slope=1.0, factor=2.0, least=1.0, most=100.0)
    monkeypatch.setattr(advice_module, "FORECAST", plain)
    monkeypatch.setattr(advice_module, "FITTED", PROFILES["smoke"])

    def lines(learned, kinds=ONE_KIND, seen=40):
        held = Holding(seen, 2 * abs(learned), learned, learned * 80 / seen, kinds)
        monkeypatch.setattr(advice_module, "holding", lambda file, sizes: held)
        return advice("folder/mine.jsonl").splitlines()

    return lines


def test_rows_bits_and_forecast_are_told_in_this_order(told):
    one = parameters_of(RANK_1)
    rows, bits, forecast, last = told(2.5)
    assert rows == "mine.jsonl: 80 rows, 400 tokens of prompts, 160 of answers"
    assert (
        "teach" in bits and "5.0 kbit: 62.5 bits a row, measured on 40 of them" in bits
    )  # 80 rows
    named = f"rank {math.ceil(5_000 / one)} on all linear layers"
    assert forecast.startswith(f"Forecast: 5,000 trained parameters, {named}, missed in tasks")
    assert "by a factor of 2 in the mean" in forecast
    assert f"has {one:,}, a load of {5_000 / one:.2g} bits each" in forecast
    assert last.startswith("Take rank 4, which lost less in tasks left out than this forecast did")
    assert last.endswith(f"beside it rank {math.ceil(10_000 / one)}: that factor more.")


def test_of_another_base_it_says_whose_the_fit_is(told, monkeypatch):
    assert "fitted to" not in " ".join(told(2.5))
    other = dataclasses.replace(PROFILES["smoke"], model="another")
    monkeypatch.setattr(advice_module, "FITTED", other)
    *_, forecast, _ = advice("folder/mine.jsonl", PROFILES["smoke"].model).splitlines()
    assert forecast.endswith(" bits each. It is fitted to another alone.")


def test_the_usual_rank_is_enough_up_to_its_parameters(told):
    one, usual = parameters_of(RANK_1), 4
    fits = usual * one / 2 / 1000  # kbit, whose upper end is just the usual rank
    enough = "Take rank 4 on all linear layers: it has at least 2 times the parameters forecast."
    assert told(fits * 0.99 / 2)[-1] == enough
    assert told(fits * 1.01 / 2)[-1].endswith(f"rank {usual + 1}: that factor more.")
    assert told(fits)[-1].endswith(f"rank {2 * usual}: that factor more.")


def test_what_lies_beyond_the_tasks_of_the_fit_is_named(told):
    assert len(told(5.0)) == 4
    for learned in (0.4, 51.0):
        assert "That is beyond the 1 to 100 kbit of the tasks that it is fitted to." in told(
            learned
        )


def test_kinds_are_told_where_there_are_several(told):
    lines = told(5.0, kinds=TWO_KINDS)
    assert lines[1].split() == ["rows", "prompt", "tokens", "answer", "tokens"]
    assert [line.split() for line in lines[2:4]] == [
        ["chat", "60", "300", "120"],
        ["tables", "20", "100", "40"],
    ]


def test_rows_that_teach_nothing_are_refused(told):
    with pytest.raises(ValueError, match=r"mine\.jsonl: .* learned nothing .* give more rows"):
        told(-1.0)


def test_no_rank_is_above_the_smallest_matrix(told):
    one, most = parameters_of(RANK_1), 16  # of the tiny model
    for times, ends in ((0.99, ""), (100, ", the highest")):
        *_, forecast, _, last = told(times * most * one / 2 / 2 / 1000)
        assert last.endswith(f"beside it rank {most}{ends}: that factor more.")
    assert f"rank {most}, the highest on all linear layers" in forecast


def test_a_forecast_below_one_rank_is_no_rank(told):
    one = parameters_of(RANK_1)
    assert "parameters, less than rank 1 on" in told(0.99 * one / 2 / 1000)[2]
    assert "parameters, rank 2 on" in told(1.01 * one / 2 / 1000)[2]


def test_a_forecast_is_a_line_in_the_logarithms():
    law = Forecast(start=1.0, slope=2.0, factor=2.0, least=1.0, most=10.0)
    assert law.size(3.0) == pytest.approx(9 * math.e)
    assert dataclasses.replace(law, slope=0.0).size(7.0) == pytest.approx(math.e)
