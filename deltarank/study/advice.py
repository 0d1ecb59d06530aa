"""Advice: the rank that a reader's rows need, forecast from the bits that they teach, in words."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

from deltarank.checks import require
from deltarank.study.models import matrices, skeleton
from deltarank.study.own_rows import Holding, adaptable_modules, holding
from deltarank.study.profiles import PROFILES, Profile, middle
from deltarank.study.sizes import trained_parameters


@dataclass(frozen=True)
class Forecast:
    """log size = start + slope * log kbit: the trained parameters enough for what rows teach.

    Fitted in notebook 9 to tasks of least to most kbit.  Of tasks left out of the fit it misses
    what they need by `factor`, up or down, in the geometric mean.
    """

    start: float
    slope: float
    factor: float
    least: float
    most: float

    def size(self, kbit: float) -> float:
        """The trained parameters that are enough."""
        return math.exp(self.start + self.slope * math.log(kbit))


FORECAST = Forecast(start=9.49, slope=1.93, factor=13.0, least=0.6, most=9.0)
FITTED = PROFILES["paper"]  # by whose sizes the bits were measured that it is fitted to


def advice(file: str, model: str = "") -> str:
    """What to train on the rows of a file, in lines of text; measures them.

    By the sizes of FITTED, whose model is the default.  Raises ValueError as `holding` does, and
    for rows of which the short training learned nothing that holds of those held out.
    """
    sizes = dataclasses.replace(FITTED, model=model or FITTED.model)
    held = holding(file, sizes)
    name = Path(file).name
    require(
        held.learned_kbit > 0,
        f"{name}: a short training learned nothing that holds of the rows held out (code length "
        f"{held.code_kbit:.1f} kbit, learned {held.learned_kbit:.1f}): give more rows, or rows "
        "whose answers follow from their prompts; of facts, some lines once more, as of the split "
        '"test"',
    )
    return "\n".join([_rows(name, held), *_kinds(held), _bits(held, sizes), *_rank(held, sizes)])


def _rows(name: str, held: Holding) -> str:
    """How many rows and tokens there are."""
    prompts, answers = held.by_kind[["prompt_tokens", "answer_tokens"]].sum()
    return f"{name}: {held.rows:,} rows, {prompts:,} tokens of prompts, {answers:,} of answers"


def _kinds(held: Holding) -> list[str]:
    """A line a kind of rows, where there are several."""
    if len(held.by_kind) == 1:
        return []
    table = held.by_kind.rename_axis(None).rename(columns=lambda name: name.replace("_", " "))
    return table.to_string().splitlines()


def _bits(held: Holding, sizes: Profile) -> str:
    """The bits that the rows teach, and on which of them they were measured."""
    each = f"{1000 * held.learned_kbit / held.seen:.1f} bits a row"
    taught = f"They teach {sizes.model} {held.all_kbit:.1f} kbit"
    return f"{taught}: {each}, measured on {held.seen:,} of them."


def _rank(held: Holding, sizes: Profile) -> list[str]:
    """The forecast as a rank on all linear layers, and whether the usual rank is enough."""
    usual, size = middle(sizes.lora_ranks), FORECAST.size(held.all_kbit)
    modules = adaptable_modules(sizes.model, usual)
    one = trained_parameters(sizes.config("facts", "lora", rank=1, modules=modules))
    weights = matrices(skeleton(sizes.model), modules=modules).values()
    most = min(min(weight.shape) for weight in weights)
    high = size * FORECAST.factor
    load = 1000 * held.all_kbit / one
    where = ", ".join(modules) or "all linear layers"
    other = "" if sizes.model == FITTED.model else f" It is fitted to {FITTED.model} alone."
    lines = [
        f"Forecast: {size:,.0f} trained parameters, {_named(size / one, most)} on {where}, missed "
        f"in tasks left out by a factor of {FORECAST.factor:.0f} in the mean; rank 1 has {one:,}, "
        f"a load of {load:.2g} bits each.{other}"
    ]
    if not FORECAST.least <= held.all_kbit <= FORECAST.most:
        span = f"{FORECAST.least:g} to {FORECAST.most:g} kbit"
        lines.append(f"That is beyond the {span} of the tasks that it is fitted to.")
    if high <= usual * one:
        much = f"at least {FORECAST.factor:.0f} times the parameters forecast"
        return [*lines, f"Take rank {usual} on {where}: it has {much}."]
    return [*lines, f"Take rank {usual}, which lost less in tasks left out than this forecast did, "
            f"score it, and beside it {_named(high / one, most)}: that factor more."]  # fmt: skip


def _named(times: float, most: int) -> str:
    """The least rank, of `most` at the highest, that has so many times rank 1's parameters."""
    rank = math.ceil(times)
    if rank > most:
        return f"rank {most}, the highest"
    return f"rank {rank}" if times >= 1 else "less than rank 1"
