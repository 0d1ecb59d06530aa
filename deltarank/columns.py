"""The columns of a pair's tables: their headings, how values are shown, what they mean."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pandas as pd

from deltarank.ranks import percent

LOSSES = (
    "On the task's test rows. rank: of the cut. loss_nats: mean loss in nats a token of the "
    "answers. score: 0 to 100, exact answers in %, or chrF where the task is scored by it."
)


def number(digits: str) -> Callable[[float], str]:
    """A function that shows a number in this format, and "–" for what is none.

    >>> number(".1f")(2.25), number(".4g")(94.0), number(".2f")(float("inf"))
    ('2.2', '94', '–')
    """
    return lambda x: format(x, digits) if math.isfinite(x) else "–"


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of the tables: its heading, how its values are shown, what they are."""

    heading: str
    show: Callable[[float], str]
    meaning: str


COLUMNS = {
    "relative_size": Column(
        "size",
        percent,
        "the norm of the update over that of the weights, |dW| / |W0| (Frobenius)",
    ),
    "energy_8": Column("E(8)", number(".2f"), "energy at rank 8"),
    "energy_64": Column("E(64)", number(".2f"), "energy at rank 64"),
    "r90": Column("r90", number(".4g"), "the smallest rank whose energy is 0.9"),
    "r90_over_null": Column(
        "of noise’s", number(".2f"), "r90 over that of noise; 1: no more low-rank than noise"
    ),
    "stable_rank": Column(
        "stable rank", number(".1f"), "sum of σ² over the largest σ²; the count if all were equal"
    ),
    "entropy_rank": Column(
        "entropy rank",
        number(".1f"),
        "exp of the entropy of σ / sum of σ; the count if all were equal",
    ),
    "above_edge": Column(
        "above edge",
        number(".4g"),
        "how many σ exceed the largest that noise would have whose median σ is the same",
    ),
    "rounding_share": Column(
        "rounding",
        percent,
        "share of the squared update that rounding to the stored type is expected to add",
    ),
    "near_rounding": Column(
        "near rounding",
        number(".0f"),
        "matrices of which rounding is over 5 %: their ranks say little about the training",
    ),
    "rank": Column("cut rank", number(".4g"), "the rank by the rule, for extraction"),
}


def losses_text(losses: pd.DataFrame) -> str:
    """The table of score_pair as text; of the rank of what is not cut to one "–".

    >>> print(losses_text(pd.DataFrame({"model": ["base", "cut"], "rank": [0.0, 4.0]})))
    model rank
     base    –
      cut    4
    """
    ranks = losses["rank"].astype(float).replace(0, math.nan)
    shown = losses.assign(rank=ranks.map(COLUMNS["rank"].show))
    return shown.to_string(index=False, na_rep="–")
