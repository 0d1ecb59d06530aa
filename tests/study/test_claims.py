"""Claims: a stated number is held against its measured value, at its own precision."""

import math

import pandas as pd
import pytest

from deltarank.study.claims import assert_claims, assert_groups, assert_table


@pytest.mark.parametrize(
    ("value", "stated"),
    [(1 / 3, "0.33"), (-0.3, "0"), (-0.04, "0.0"), (-0.6, "-1"), (96.6, "97"), (12.0, "12")],
)
def test_a_number_that_rounds_to_what_is_stated_holds(value, stated):
    found = assert_claims({"it": (value, stated)})
    assert found.loc["it"].tolist() == [stated, stated]


@pytest.mark.parametrize(
    ("value", "stated"),
    [(1 / 3, "0.34"), (-0.3, "-0"), (-0.6, "0"), (96.4, "97"), (12.0, "12.1"), (math.nan, "0")],
)
def test_a_number_that_does_not_is_named_with_what_was_measured(value, stated):
    with pytest.raises(AssertionError, match=f"it: the text says {stated}, measured"):
        assert_claims({"it": (value, stated)})


SHARES = pd.DataFrame({"head": {"json": 0.83, "facts": 0.46}, "tail": {"json": 0.97, "facts": 0.6}})


def test_a_table_is_held_against_what_is_stated_of_its_rows():
    found = assert_table(SHARES, {"json": "97 83", "facts": "60 ."}, columns=["tail", "head"],
                         scale=100)  # fmt: skip
    assert found.loc["json"].tolist() == ["97", "83"]
    assert assert_table(SHARES, {"facts": "0.46 0.60"}).shape == (1, 2)


def test_a_wrong_cell_is_named_by_row_and_column():
    with pytest.raises(AssertionError, match="facts, tail: the text says 61, measured 60"):
        assert_table(SHARES, {"json": "83 97", "facts": "46 61"}, scale=100)


def test_a_row_with_a_number_too_few_is_refused():
    with pytest.raises(ValueError):
        assert_table(SHARES, {"json": "83"}, scale=100)


NEEDED = pd.Series({"json": "1", "kjv": "1 to 8", "mix": "1 to 8"}, name="needed")


def test_rows_of_each_value_are_held_against_what_is_stated():
    found = assert_groups(NEEDED, {"1 to 8": "mix kjv", "1": "json"})
    assert found["needed"].to_dict() == {"1 to 8": "kjv mix", "1": "json"}


@pytest.mark.parametrize(
    ("stated", "told"),
    [
        ({"1": "json", "1 to 8": "kjv"}, "1 to 8: the text says kjv, measured kjv mix"),
        ({"1": "json"}, "1 to 8: the text says None, measured kjv mix"),
        ({"1": "json", "1 to 8": "kjv mix", "8": "code"}, "8: the text says code, measured None"),
    ],
)
def test_a_wrong_group_is_named(stated, told):
    with pytest.raises(AssertionError, match=f"^{told}"):
        assert_groups(NEEDED, stated)


def test_a_row_without_a_value_has_to_be_stated_too():
    with pytest.raises(AssertionError, match="nan: the text says None, measured mix"):
        assert_groups(pd.Series({"json": 1.0, "mix": math.nan}), {1.0: "json"})
