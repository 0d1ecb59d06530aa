"""Signatures: tasks learned by other optimizers, and how much of a spectrum is whose."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections.abc import Sequence

import numpy as np
import pandas as pd
from torch import Tensor, nn

from deltarank.runtime import ROOT
from deltarank.spectra import rank_measures, singular_values
from deltarank.store import cached
from deltarank.study.configs import OWN_OPTIMIZERS, RunConfig
from deltarank.study.contest import APART
from deltarank.study.floors import skill_gain
from deltarank.study.gains import at_loss, gain_kept, growth_loss
from deltarank.study.gradients import gradient_spectra
from deltarank.study.measuring import provenance
from deltarank.study.models import matrices
from deltarank.study.optimizers import own_optimizer
from deltarank.study.overlaps import mean_overlap
from deltarank.study.plan import cut_until
from deltarank.study.profiles import base_of, entry_folder, profile
from deltarank.study.runs import Result, run
from deltarank.study.search import at_best_rate, best_alpha, coarse_search
from deltarank.study.tables import cut_gains, step_costs
from deltarank.study.training import prepare

ADAMW = "adamw_torch_fused"  # the report's
STEP_TIMES = ROOT / "data" / "bench_optimizers.csv"  # what a step of each optimizer costs


def optimizer_configs(task: str, **changes) -> dict[str, RunConfig]:
    """Full fine-tuning of a task by each optimizer at its best rate, first seed; AdamW first.

    changes: of fields of all of them.
    """
    names = (ADAMW, *profile().optimizers.names)
    found = {name: at_best_rate(task, **_other(name)) for name in names}
    return {name: dataclasses.replace(config, **changes) for name, config in found.items()}


def optimizer_costs() -> pd.DataFrame:
    """What a step of each optimizer costs beside AdamW's: step_costs of the bench's table."""
    return step_costs(STEP_TIMES, ["optimizer"], ADAMW)


def second_seed() -> int:
    """The seed of each optimizer's second run, APART from the first."""
    return profile().seeds[0] + APART


def lora_configs(task: str) -> dict[str, RunConfig]:
    """LoRA of the profile's rank by AdamW and by Muon, each at its best rate, first seed."""
    lora = functools.partial(
        at_best_rate, task, "lora", rank=profile().optimizers.rank, alpha=best_alpha(task)
    )
    return {name: lora(**_other(name)) for name in (ADAMW, "muon")}


def _other(name: str) -> dict[str, str]:
    """What a recipe says of an optimizer that is not the report's."""
    return {} if name == ADAMW else {"optimizer": name}


def tried_table() -> pd.DataFrame:
    """What full fine-tuning by each optimizer comes to, a line (task, optimizer), first seed.

    Columns: lr, the best; tried and diverged, numbers of rates; loss_nats and score on test rows;
    skill, the share of the skill gain of the report's own full fine-tune; half_least and half_most,
    over the rates that finished, the median r90 of the update half-way, at the last note on it.
    """
    lines = {}
    for task in profile().optimizers.tasks:
        for name, config in optimizer_configs(task).items():
            tried, result = coarse_search(task, **_other(name)), run(config)
            diverged = sum(trial.status == "diverged" for trial in tried)
            line = {"lr": config.lr, "tried": len(tried), "diverged": diverged}
            line |= {"loss_nats": result.loss(), "score": result.score()}
            notes = [trial.record["growth"][-1] for trial in tried if trial.status == "finished"]
            half = [float(np.median(note["r90"])) for note in notes]
            line |= {"skill": skill_gain(result), "half_least": min(half), "half_most": max(half)}
            lines[task, name] = line
    return pd.DataFrame(lines).T.rename_axis(["task", "optimizer"])


def at_equal_loss(task: str, *, seed: int) -> pd.DataFrame:
    """The updates of a task's optimizers where each first comes down to the worst's last loss.

    One line an optimizer, without those that diverged: what at_loss says there, medians over the
    matrices; gained, the share of what AdamW gains in loss by its end, on the same rows, that all
    have there.
    """
    runs = {name: run(config) for name, config in optimizer_configs(task, seed=seed).items()}
    finished = {name: result for name, result in runs.items() if result.status == "finished"}
    shared = max(growth_loss(result) for result in finished.values())
    start, end = growth_loss(run(base_of(runs[ADAMW].config))), growth_loss(runs[ADAMW])
    gained = {"gained": gain_kept(shared, start, end)}
    return pd.DataFrame({n: at_loss(result, shared) | gained for n, result in finished.items()}).T


def without_skill(task: str) -> pd.DataFrame:
    """r90 of the updates of right and of permuted answers, a line an optimizer, second seed.

    Columns: right, permuted: medians over the matrices at the end of training; loss_nats of the
    latter on test rows.
    """
    lines = {}
    for name, config in optimizer_configs(task, seed=second_seed()).items():
        right, permuted = run(config), run(dataclasses.replace(config, permuted=True))
        line = {"right": _median_r90(right), "permuted": _median_r90(permuted)}
        lines[name] = line | {"loss_nats": permuted.loss()}
    return pd.DataFrame(lines).T


def _median_r90(result: Result) -> float:
    """The median of r90 over the matrices of a run at its end."""
    return float(np.median([rank_measures(S)["r90"] for S in result.spectra.values()]))


def cuts_table(share: float) -> pd.DataFrame:
    """What cuts keep of the updates of second seeds, a line a rank, optimizer and task.

    By cut_until, to the rank that keeps `share` of the run's own loss gain.  Columns: optimizer and
    those of cut_gains, where kept_loss is that gain.
    """
    runs = {t: optimizer_configs(t, seed=second_seed()) for t in profile().optimizers.again}
    return pd.concat(
        cut_gains(config, cut_until(config, share)).assign(optimizer=name)
        for by_name in runs.values()
        for name, config in by_name.items()
    )


def shared_directions(task: str) -> pd.DataFrame:
    """mean_overlap of the updates of every two optimizers, a line (optimizer, other), by rank.

    Of one seed, the second; of an optimizer with itself those of its first and second seed, of
    AdamW the report's own two.
    """
    second = optimizer_configs(task, seed=second_seed())
    seeds: dict[str, Sequence[int]] = dict.fromkeys(second, (profile().seeds[0], second_seed()))
    seeds[ADAMW] = profile().seeds[:2]
    pairs = {pair: [second[name] for name in pair] for pair in itertools.combinations(second, 2)}
    for name, both in seeds.items():
        pairs[name, name] = [dataclasses.replace(second[name], seed=seed) for seed in both]
    found = {pair: mean_overlap(*configs) for pair, configs in pairs.items()}
    return pd.DataFrame(found).T.rename_axis(["optimizer", "other"])


def first_steps(base: RunConfig) -> tuple[dict[str, list[float]], Tensor]:
    """r90 of the first step of each of OWN_OPTIMIZERS, one value a matrix, and a gradient; stored.

    Of the gradient of first_gradients, by the optimizers that train; the gradient (m, n) given is
    the first matrix's of the fewest entries, to show computations on.
    """

    def compute() -> tuple[dict, dict[str, Tensor]]:
        started, model = time.perf_counter(), prepare(base)
        gradient_spectra(model, base)
        gradients = [W.grad for W in matrices(model).values() if W.grad is not None]
        found = {name: _step_ranks(base, name, gradients) for name in OWN_OPTIMIZERS}
        record = {"run": base.key, "r90": found}
        record |= provenance(time.perf_counter() - started)
        return record, {"gradient": min(gradients, key=lambda G: G.numel())}

    folder = entry_folder(base, "gradients", f"{base.key}-steps")
    record, tensors = cached(folder, compute)
    return record["r90"], tensors["gradient"]


def _step_ranks(base: RunConfig, optimizer: str, gradients: list[Tensor]) -> list[float]:
    """r90 of what the first step of an optimizer makes of each gradient (m, n)."""
    steps = nn.ParameterList(G.new_zeros(G.shape) for G in gradients)
    for step, G in zip(steps, gradients, strict=True):
        step.grad = G.clone()
    config = dataclasses.replace(base, method="full", steps=1, lr=1.0, optimizer=optimizer)
    own_optimizer(config, steps).step()
    return [rank_measures(singular_values(step.detach()))["r90"] for step in steps]


def variance_shares(table: pd.DataFrame) -> dict[str, float]:
    """Of the variance of a table (rows, columns) the shares of rows, of columns, of neither.

    Two-way analysis of variance with one value a cell: sums of squares of the means of rows and of
    columns about the whole mean, over that of all values.

    >>> shares = variance_shares(pd.DataFrame([[0.0, 1.0], [2.0, 3.0]]))
    >>> {name: round(share, 3) for name, share in shares.items()}
    {'rows': 0.8, 'columns': 0.2, 'neither': 0.0}
    """
    values = table.to_numpy(float)
    rows, columns = (float(values.mean(axis).var() / values.var()) for axis in (1, 0))
    return {"rows": rows, "columns": columns, "neither": 1 - (rows + columns)}
