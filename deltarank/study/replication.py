"""Replication: what the report claims of its model, asked of another by the same measures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from deltarank.checks import require
from deltarank.runtime import at_profile
from deltarank.study.advice import FORECAST
from deltarank.study.cuts import cut
from deltarank.study.floors import skill_gain
from deltarank.study.gains import gain, learned_kbit, needed_bracket
from deltarank.study.loads import capacity_table, code_configs
from deltarank.study.plan import cut_until
from deltarank.study.profiles import middle, profile
from deltarank.study.rivals import probe, taught
from deltarank.study.runs import run, sweep
from deltarank.study.search import tuned
from deltarank.study.sizes import ladder, sized, trained_parameters, tried_sizes
from deltarank.study.tables import cut_gains, spearman, spectra_table

SHARE = 0.95  # of a gain, that counts as enough
MEASURES = ["r90", "r90_over_null", "stable_rank", "energy_8"]
EASY, HARD = ["json", "pirate"], ["facts", "sorbian"]  # tasks that need least, and most


def bracket(task: str, seed: int) -> tuple[float, float]:
    """The trained parameters between which the needed size lies, of all sizes that are trained.

    Those of tried_sizes for SHARE, and LoRA of the profile's ranks on all layers.
    """
    whole = {name: size for name, size in ladder().items() if {*size} == {"method", "rank"}}
    sizes = tried_sizes(task, shares=(SHARE,), seed=seed) | whole
    results = sweep([sized(task, size, seed=seed) for size in sizes.values()])
    kept = {trained_parameters(result.config): skill_gain(result) for result in results}
    return needed_bracket(pd.Series(kept).sort_index(), SHARE)


def task_measures(task: str, seed: int) -> dict[str, float]:
    """What the report measures of a task; runs what is not stored.

    MEASURES of the spectrum, medians over the matrices; gain and skill: the shares that LoRA of the
    profile's lowest and of its middle rank has; lora: the first of its ranks from which on the gain
    is enough, and cut the same of the cut update; kept: the gain of the cut to the middle rank;
    above and needed: `bracket`; kbit: what full fine-tuning learned; lr: its rate, and LoRA's over
    it.  Floors, rates and `taught` have the first seed.  Raises ValueError where full fine-tuning
    diverged.
    """
    full, ranks = run(tuned(task, seed=seed)), sorted(profile().lora_ranks)
    require(full.status == "finished", f"{full.config.key} diverged: it is no yardstick")
    loras = {rank: run(tuned(task, "lora", rank=rank, seed=seed)) for rank in ranks}
    gains = pd.Series({rank: gain(lora) for rank, lora in loras.items()})
    cuts = cut_gains(full.config, cut_until(full.config, SHARE)).set_index("rank")["kept_loss"]
    [kept] = cut_gains(full.config, cut(full.config, [middle(ranks)]))["kept_loss"]
    spectra = spectra_table([full])
    found = {name: float(spectra[name].median()) for name in MEASURES}
    for name, rank in {"low": min(ranks), "middle": middle(ranks)}.items():
        found |= {f"gain, {name}": gains[rank], f"skill, {name}": skill_gain(loras[rank])}
    found |= {"lora": needed_bracket(gains, SHARE)[1]}
    found |= {"cut": needed_bracket(cuts.drop(0), SHARE)[1], "kept": kept}
    found["above"], found["needed"] = bracket(task, seed)
    found["taught"] = taught(run(probe(task, profile())))
    found |= {"kbit": max(learned_kbit(full), 0.0), "lr": full.config.lr}
    return found | {"lr, LoRA over full": loras[middle(ranks)].config.lr / full.config.lr}


def measures_table(name: str, seed: int) -> pd.DataFrame:
    """task_measures at a profile, one line a task of its lora_tasks."""
    with at_profile(name):
        found = {task: task_measures(task, seed) for task in profile().lora_tasks}
    return pd.DataFrame(found).T.rename_axis("task")


def codes_table(name: str) -> pd.DataFrame:
    """capacity_table at a profile, of the size that has every seed, by its load to two digits."""
    with at_profile(name):
        size = profile().codes.seed_size
        same = [c for c in code_configs() if (c.layers, c.modules, c.rank) == size]
        return capacity_table(same).round({"load": 2}).set_index("load")


@dataclass(frozen=True)
class Claim:
    """What the report says of its model, as a number and the bound that it keeps."""

    words: str
    of: Callable[[pd.DataFrame], float]  # measures_table, or codes_table
    least: float = float("-inf")
    most: float = float("inf")

    def holds(self, value: float) -> bool:
        """Whether a number keeps the bound; NaN, of a run that diverged, does not."""
        return self.least <= value <= self.most


def _least(values: pd.Series) -> float:
    """The least of all, NaN where one is."""
    return float(values.min(skipna=False)) if len(values) else float("nan")


def _most(values: pd.Series) -> float:
    """The most of all, NaN where one is."""
    return float(values.max(skipna=False)) if len(values) else float("nan")


def _missed(table: pd.DataFrame) -> pd.Series:
    """By which factor the line of bits misses the bracket that a task needs; 1 or less within."""
    said = table["taught"].map(FORECAST.size)
    return pd.concat([said / table["needed"], table["above"] / said], axis=1).max(axis=1)


def _over(table: pd.DataFrame) -> float:
    """The least that a hard task is known to need over the most that an easy one does."""
    return _least(table["above"].reindex(HARD)) / _most(table["needed"].reindex(EASY))


def _recall(table: pd.DataFrame, load: float) -> float:
    """The share of codes that the first seed recalls at a load."""
    return _least(table["recall"][(table.index == load) & (table["seed"] == table["seed"].min())])


CLAIMS = [
    Claim(
        "r90 over the rank that LoRA needs, least of all tasks",
        lambda t: _least(t["r90"] / t["lora"]),
        least=4,
    ),
    Claim("r90 over noise's, most of all tasks", lambda t: _most(t["r90_over_null"]), most=0.6),
    Claim("loss gain of LoRA, rank 8, least", lambda t: _least(t["gain, middle"]), least=SHARE),
    Claim(
        "tasks with 95 % of the loss gain at rank 1",
        lambda t: (t["gain, low"] >= SHARE).mean(),
        least=0.5,
    ),
    Claim(
        "tasks that have it in loss at rank 1 and not in skill",
        lambda t: ((t["gain, low"] >= SHARE) & (t["skill, low"] < SHARE)).sum(),
        least=1,
    ),
    Claim(
        "tasks with 95 % of the skill at rank 8",
        lambda t: (t["skill, middle"] >= SHARE).mean(),
        least=2 / 3,
    ),
    Claim(
        "tasks in which the cut to rank 8 keeps less than LoRA",
        lambda t: (t["kept"] < t["gain, middle"]).mean(),
        least=0.8,
    ),
    Claim("needs of facts and Sorbian over those of JSON and pirate", _over, least=4),
    Claim(
        "tasks that need more than two parameters a bit learned",
        lambda t: ((t["above"] > 0) & (t["above"] > 2000 * t["kbit"])).mean(),
        least=0.5,
    ),
    Claim(
        "stable rank and the rank that the cut needs, Spearman's",
        lambda t: spearman(t["stable_rank"], t["cut"])["spearman"],
        least=0.5,
    ),
    Claim(
        "LoRA's rate over full's, median",
        lambda t: float(np.median(t["lr, LoRA over full"])),
        least=3,
    ),
    Claim(
        "tasks whose need the bits forecast within their factor",
        lambda t: (_missed(t) <= FORECAST.factor).mean(),
        least=2 / 3,
    ),
]
CODE_CLAIMS = [
    Claim("codes recalled at half a bit a parameter", lambda t: _recall(t, 0.5), least=0.99),
    Claim("codes recalled at two bits a parameter", lambda t: _recall(t, 2.0), most=0.5),
]


def claims_table(
    first: pd.DataFrame, second: pd.DataFrame, claims: Sequence[Claim]
) -> pd.DataFrame:
    """What the tables of two models say of each claim, a line a claim.

    Columns: least and most, the bound; of each model (second: "again, ...") value, low and high,
    the ends of what it comes to with any one task left out, of codes with any one seed alone, NaN
    where the claim is of that one; holds, of the value.
    """
    lines = {}
    for claim in claims:
        line: dict[str, float | bool] = {"least": claim.least, "most": claim.most}
        for model, table in {"": first, "again, ": second}.items():
            apart = pd.Series([claim.of(part) for part in _parts(table)], dtype=float)
            found = {"value": claim.of(table), "low": apart.min(), "high": apart.max()}
            line |= {model + name: value for name, value in found.items()}
            line[f"{model}holds"] = claim.holds(found["value"])
        lines[claim.words] = line
    return pd.DataFrame.from_dict(lines, orient="index").rename_axis("claim")


def _parts(table: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """Yield the table of tasks without each of them, that of codes by seed."""
    if "seed" in table:
        yield from (part for _, part in table.groupby("seed"))
    else:
        yield from (table.drop(index=task) for task in table.index)
