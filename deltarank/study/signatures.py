"""Signatures: tasks learned by other optimizers, and how much of a spectrum is whose."""

from __future__ import annotations

import functools

import pandas as pd

from deltarank.study.configs import RunConfig
from deltarank.study.gains import at_loss, growth_loss
from deltarank.study.profiles import profile
from deltarank.study.runs import run
from deltarank.study.search import at_best_rate, best_alpha

ADAMW = "adamw_torch_fused"  # the report's


def optimizer_configs(task: str) -> dict[str, RunConfig]:
    """Full fine-tuning of a task by each optimizer at its best rate, first seed; AdamW first."""
    others = {name: at_best_rate(task, optimizer=name) for name in profile().optimizers.names}
    return {ADAMW: at_best_rate(task)} | others


def lora_by_optimizer(task: str) -> dict[str, RunConfig]:
    """LoRA of the profile's rank by AdamW and by Muon, each at its best rate, first seed."""
    lora = functools.partial(
        at_best_rate, task, "lora", rank=profile().optimizers.rank, alpha=best_alpha(task)
    )
    return {ADAMW: lora(), "muon": lora(optimizer="muon")}


def at_equal_loss(task: str) -> pd.DataFrame:
    """The updates of a task's optimizers where each first comes down to the worst's last loss.

    One line an optimizer, without those that diverged: step, energy_8, r90 and loss_nats there, by
    at_loss; lr; ended: its last loss on all of the rows that choose.
    """
    runs = {name: run(config) for name, config in optimizer_configs(task).items()}
    ended = {name: result for name, result in runs.items() if result.status == "finished"}
    shared = max(growth_loss(result) for result in ended.values())
    lines = {
        name: at_loss(result, shared) | {"lr": result.config.lr, "ended": result.loss("valid")}
        for name, result in ended.items()
    }
    return pd.DataFrame(lines).T


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
