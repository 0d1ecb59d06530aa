"""Tables: of runs, their gains, their spectra, and statistics over them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from torch import Tensor

from deltarank.checkpoints import layer_and_module
from deltarank.checks import require
from deltarank.spectra import energy_rank, spectrum_measures
from deltarank.store import cached
from deltarank.study.configs import RunConfig
from deltarank.study.floors import skill_kept
from deltarank.study.gains import captured_energy, first_epoch_kbit, gain_kept
from deltarank.study.plan import scaling_configs
from deltarank.study.profiles import base_of, profile
from deltarank.study.runs import Result, run, sweep
from deltarank.study.search import lr_search
from deltarank.study.tasks import load_split

DRAWS = 2000  # of a bootstrap, and of a permutation test


def keep_table(name: str, compute: Callable[[], pd.DataFrame]) -> pd.DataFrame:
    """The table `name` of the store, computed when it is missing.

    Of a table of matrices the spectra (column S, by name) are stored as tensors, the shapes as
    text, "1024x640".
    """

    def found() -> tuple[dict, dict[str, Tensor] | None]:
        table = compute()
        spectra = dict(zip(table["name"], table["S"], strict=True)) if "S" in table else None
        told = table.drop(columns="S", errors="ignore").astype(object)
        columns = told.where(told.notna(), None).to_dict("list")  # NaN is no JSON
        if "shape" in columns:
            columns["shape"] = ["x".join(map(str, shape)) for shape in columns["shape"]]
        return {"columns": columns, "attrs": table.attrs}, spectra

    name = name if profile().name == "paper" else f"{profile().name}-{name}"
    record, spectra = cached(profile().store / "tables" / name, found)
    table = pd.DataFrame(record["columns"])
    table.attrs = record["attrs"]
    if "shape" in table:
        table["shape"] = [tuple(map(int, text.split("x"))) for text in table["shape"]]
    return table.assign(S=table["name"].map(spectra)) if spectra else table


def cut_gains(config: RunConfig, cuts: pd.DataFrame) -> pd.DataFrame:
    """Cuts of a full run (from `cut`), one line a rank, beside what they keep of update and task.

    Columns: task, seed, rank, loss_nats, score; energy, the share of the squared update of all
    matrices; kept_loss and kept_score, shares of the gain from the base model to the run;
    skill_loss and skill_score, of that from the task's floor (see floors.skill_kept).
    """
    base, full = run(base_of(config)), run(config)
    table = cuts[["rank", "loss_nats", "score"]].assign(task=config.task, seed=config.seed)
    table["energy"] = [captured_energy(full, rank) for rank in table["rank"]]
    table["kept_loss"] = [gain_kept(x, base.loss(), full.loss()) for x in table["loss_nats"]]
    table["kept_score"] = [gain_kept(x, base.score(), full.score()) for x in table["score"]]
    table["skill_loss"] = skill_kept(table["loss_nats"], full)
    table["skill_score"] = skill_kept(table["score"], full, by="score")
    return table


def by_part(result: Result) -> pd.DataFrame:
    """What a run makes of the parts of a mix's test rows: rows, loss_nats, score, one line each."""
    parts = _rows(result).groupby("part")
    return pd.DataFrame(
        {
            "rows": parts.size(),
            "loss_nats": parts["nats"].sum() / parts["tokens"].sum(),
            "score": parts["score"].mean(),
        }
    )


def parts_by_rank(runs: dict[int, Result], what: str) -> pd.DataFrame:
    """A column of by_part, one line a part, by the ranks of runs of one mix."""
    return pd.DataFrame({rank: by_part(result)[what] for rank, result in runs.items()})


def regained(runs: dict[int, Result], start: pd.Series, what: str = "loss_nats") -> pd.DataFrame:
    """How far each rank goes in a column of by_part from `start` to full fine-tuning, rank 0.

    One line a part, one column an adapter's rank.
    """
    found = parts_by_rank(runs, what)
    return found.drop(columns=0).sub(start, axis=0).div(found[0] - start, axis=0)


def _rows(result: Result) -> pd.DataFrame:
    """nats, tokens, score (NaN where a row has none) and part of the test rows of a mix."""
    scored, rows = result.record["evaluation"]["test"], load_split(result.config.task, "test")
    table = pd.DataFrame({name: scored[f"row_{name}"] for name in ("nats", "tokens", "score")})
    table["part"] = [row["task"] for row in rows[: len(table)]]
    return table.astype({"score": float})


def score_intervals(result: Result, full: Result, floor: pd.Series) -> pd.DataFrame:
    """The share of a full run's score above the floor that another has, by part: low and high.

    Both are of one mix.  95 % percentile bootstrap over its test rows, drawn for both together,
    seed 0; floor: the score of each part that needs no skill.  Draws in which
    the full run is not above its floor are NaN, and so is the interval then.
    """
    rows, rng = _rows(result).assign(full=_rows(full)["score"]), np.random.default_rng(0)
    found = {}
    for part, table in rows.dropna(subset="score").groupby("part"):
        scores = table[["score", "full"]].to_numpy()  # (rows, 2)
        draws = scores[rng.integers(0, len(scores), (DRAWS, len(scores)))].mean(1) - floor[part]
        above = np.where(draws[:, 1] <= 0, np.nan, draws[:, 1])
        found[part] = np.percentile(draws[:, 0] / above, [2.5, 97.5])
    return pd.DataFrame(found, ["low", "high"]).T


def runs_table(results: Sequence[Result]) -> pd.DataFrame:
    """One line a run: what was run, loss_nats and score on the test split, and what it cost."""
    return pd.DataFrame(
        {
            "task": r.config.task,
            "method": r.config.method,
            "rank": r.config.rank,
            "seed": r.config.seed,
            "lr": r.config.lr,
            "status": r.status,
            "loss_nats": r.loss(),
            "score": r.score(),
            "train_seconds": r.record["provenance"]["train_seconds"],
        }
        for r in results
    )


def costs_table(results: Sequence[Result]) -> pd.DataFrame:
    """What runs cost, each counted once, a line a method and processor.

    Columns: runs; diverged, of these; ended worse, with a higher loss than the untuned model; hours
    of training and measuring.
    """
    once = [*{result.config: result for result in results}.values()]
    table = runs_table(once).assign(runs=1)
    untuned = table[table["method"] == "base"].set_index("task")["loss_nats"]
    costs = [result.record["provenance"] for result in once]
    table["processor"] = [cost["device"] for cost in costs]
    table["hours"] = [cost["seconds"] / 3600 for cost in costs]
    table["diverged"] = table["status"] == "diverged"
    table["ended worse"] = table["loss_nats"] > table["task"].map(untuned)
    columns = ["runs", "diverged", "ended worse", "hours"]
    return table.groupby(["method", "processor"])[columns].sum()


def step_costs(path: Path, by: list[str], reference: str) -> pd.DataFrame:
    """What a training step costs by the bench's table, a line for what the columns `by` name.

    Columns: seconds and GB (peak resident memory), medians over the rounds; times: seconds over
    those of the reference, an entry of the last of `by`, the median over the rounds, least and most
    of one round.
    """
    costs = pd.read_csv(path).set_index(["round", *by])[["seconds", "GB"]]
    times = costs["seconds"] / costs["seconds"].xs(reference, level=by[-1])
    found = costs.groupby(by, sort=False).median()
    return found.join(times.groupby(by).agg(times="median", least="min", most="max"))


def finer_table(method: str = "full", ranks: Sequence[int] = (0,)) -> pd.DataFrame:
    """A line a task, rank and rate that lr_search tries in the profile's fine_tasks.

    Columns: nats on the rows that choose, and score on test rows, each mean, min and max over the
    seeds.
    """
    grid = itertools.product(profile().fine_tasks, ranks)
    found = [r for task, rank in grid for r in lr_search(task, method, rank=rank)]
    table = runs_table(found).assign(nats=[r.loss("valid") for r in found])
    by_rate = table.groupby(["task", "rank", "lr"], sort=False)
    return by_rate[["nats", "score"]].agg(["mean", "min", "max"])


def scaling_table() -> pd.DataFrame:
    """runs_table of scaling_configs, with each run's scale and its loss on the rows that choose."""
    groups = scaling_configs()
    results = iter(sweep([config for configs in groups.values() for config in configs]))
    tables = []
    for name, configs in groups.items():
        found = [next(results) for _ in configs]
        valid = [result.loss("valid") for result in found]
        tables.append(runs_table(found).assign(scale=name, valid_nats=valid))
    return pd.concat(tables, ignore_index=True)


def spectra_table(results: Sequence[Result]) -> pd.DataFrame:
    """One line a matrix of every run: what spectrum_measures says of it."""
    rows = []
    for result in results:
        for name, S in result.spectra.items():
            layer, module = layer_and_module(name)
            shape = result.shape(name)
            row = {"task": result.config.task, "seed": result.config.seed, "name": name}
            row |= {"layer": layer, "module": module, "shape": shape, "S": S}
            rows.append(row | spectrum_measures(S, shape))
    return pd.DataFrame(rows)


def spectrum_by_task(results: Sequence[Result]) -> pd.DataFrame:
    """Measures of the spectrum, a line a task: medians over matrices, then over its full runs.

    Columns: what spectrum_measures has that orders tasks, and r50, the rank of half the energy.
    """
    table = spectra_table(results)
    table["r50"] = [energy_rank(S, 0.5) for S in table["S"]]
    names = ["energy_8", "r50", "r90", "stable_rank", "entropy_rank", "above_edge"]
    by_run = table.groupby(["task", "seed"], sort=False)[names].median()
    return by_run.groupby("task", sort=False).median()


def without_spectrum(results: Sequence[Result]) -> pd.DataFrame:
    """What orders tasks without an SVD, a line a task: medians over its full runs that finished.

    learning rate; norm, that of the update of all matrices (Frobenius); bits, first_epoch_kbit.
    """
    found = pd.DataFrame(
        {
            "task": result.config.task,
            "learning rate": result.config.lr,
            "norm": math.sqrt(result.record["squared_norms"]["matrices"]),
            "bits": first_epoch_kbit(result),
        }
        for result in results
        if result.status == "finished"
    )
    return found.groupby("task", sort=False).median()


def spearman(x: pd.Series, y: pd.Series) -> dict[str, float]:
    """Spearman's rank correlation of two measures of the same tasks, with an interval over these.

    Infinite values are tied as the highest.  95 % percentile bootstrap over the tasks (Efron
    1979), seed 0, without the draws in which a measure has one value alone; NaN without any.

    >>> found = spearman(pd.Series([1.0, 2.0, 5.0]), pd.Series([1.0, np.inf, np.inf]))
    >>> round(found["spearman"], 3)
    0.866
    """
    y = y[x.index]
    picks = np.random.default_rng(0).integers(0, len(x), (DRAWS, len(x)))
    one, other = (pd.DataFrame(z.to_numpy()[picks]).rank(axis=1) for z in (x, y))
    low, high = one.corrwith(other, axis=1).quantile([0.025, 0.975])
    whole = x.rank().corr(y.rank())  # corr itself drops what is infinite
    return {"spearman": float(whole), "low": float(low), "high": float(high)}


def joint_agreement(measures: pd.DataFrame, needs: pd.DataFrame) -> dict[str, float]:
    """Mean Spearman correlation of every measure of the tasks with every need, tested as one.

    A line a task in both; infinite values are tied as the highest.  p: how often tasks that are
    paired at random, seed 0, have as high a mean.  Measures that are alike stay alike then, so that
    p counts them once (permutation test; Phipson and Smyth 2010 for the 1 that is added).  Raises
    ValueError for a measure or need without an order.

    >>> found = joint_agreement(pd.DataFrame({"x": range(8)}), pd.DataFrame({"y": range(8)}))
    >>> round(found["spearman"], 3), found["p"] < 0.01
    (1.0, True)
    """
    ranks = [table.rank().to_numpy() for table in (measures, needs.loc[measures.index])]
    told = "a measure or need has one value alone, or none of a task: it has no order"
    require(all(bool((x.std(0) > 0).all()) for x in ranks), told)
    one, other = (((x - x.mean(0)) / x.std(0)).mean(1) for x in ranks)  # (tasks,)
    paired = np.random.default_rng(0).permuted(np.tile(one, (DRAWS, 1)), axis=1) @ other
    p = (1 + (paired >= one @ other).sum()) / (1 + DRAWS)
    return {"spearman": float(one @ other / len(one)), "p": float(p)}


def bootstrap_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean over rows (Efron 1979), seed 0.

    >>> bootstrap_interval([1.0, 1.0, 1.0])
    (1.0, 1.0)
    """
    x = np.array([v for v in values if v is not None], dtype=float)
    picks = np.random.default_rng(0).integers(0, len(x), (DRAWS, len(x)))
    low, high = np.percentile(x[picks].mean(1), [2.5, 97.5])
    return float(low), float(high)
