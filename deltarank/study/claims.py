"""Claims: every number that the prose states, held against what is measured."""

from __future__ import annotations

import pandas as pd


def assert_claims(claims: dict[str, tuple[float, str]]) -> pd.DataFrame:
    """Compare each number that the prose states with its value, {claim: (value, "stated")}.

    Raises AssertionError, naming the claim, when a value does not round to what is stated.

    >>> assert_claims({"a third": (1 / 3, "0.33")}).shape
    (1, 2)
    """
    rows = []
    for claim, (value, text) in claims.items():
        measured = f"{value:z.{len(text.partition('.')[2])}f}"  # z: never "-0"
        assert measured == text, f"{claim}: the text says {text}, measured {measured}"
        rows.append({"claim": claim, "stated": text, "measured": measured})
    return pd.DataFrame(rows).set_index("claim")


def assert_table(
    table: pd.DataFrame, stated: dict, *, columns: list | None = None, scale: float = 1.0
) -> pd.DataFrame:
    """Compare rows of a table with what the prose states, {row: "one number a column"}.

    columns: those that the numbers are of, in order, by default all; scale: what the table is
    multiplied by first, 100 for shares that are stated in percent; "." passes over a cell.
    Returns the stated numbers; raises AssertionError as assert_claims does.

    >>> shares = pd.DataFrame({"head": {"json": 0.83}, "tail": {"json": 0.97}})
    >>> assert_table(shares, {"json": "97 83"}, columns=["tail", "head"], scale=100).shape
    (1, 2)
    """
    columns = list(table.columns if columns is None else columns)
    texts = {row: dict(zip(columns, text.split(), strict=True)) for row, text in stated.items()}
    claims = {
        f"{row}, {column}": (scale * table.loc[row, column], text)
        for row, by_column in texts.items()
        for column, text in by_column.items()
        if text != "."
    }
    assert_claims(claims)
    return pd.DataFrame(texts).T


def assert_groups(column: pd.Series, stated: dict) -> pd.DataFrame:
    """Compare which rows have each value of a column with what the prose states, {value: "rows"}.

    Every row is named, in any order, parted by spaces.  Returns the stated rows; raises
    AssertionError, naming the first value whose rows are others.

    >>> needed = pd.Series({"json": "1", "kjv": "1 to 8", "mix": "1 to 8"})
    >>> assert_groups(needed, {"1": "json", "1 to 8": "mix kjv"}).shape
    (2, 1)
    """
    groups = column.groupby(column, dropna=False).groups
    found = {value: " ".join(sorted(rows)) for value, rows in groups.items()}
    texts = {value: " ".join(sorted(rows.split())) for value, rows in stated.items()}
    for value in texts | found:
        text, measured = texts.get(value), found.get(value)
        assert measured == text, f"{value}: the text says {text}, measured {measured}"
    return pd.Series(texts, name=column.name).to_frame()
