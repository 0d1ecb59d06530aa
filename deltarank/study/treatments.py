"""Treatments: an update shrunk, cut, turned or rid of its intruders, and what that gives back."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator

import pandas as pd
import torch
from torch import Tensor

from deltarank.checks import require
from deltarank.factors import balanced
from deltarank.gram import leading_factors
from deltarank.study.configs import FACTORED, RunConfig
from deltarank.study.evaluation import mean_loss
from deltarank.study.floors import skill_kept
from deltarank.study.general import general_loss, kept_by
from deltarank.study.intruders import TOP
from deltarank.study.measuring import provenance
from deltarank.study.models import load_model
from deltarank.study.profiles import entry_folder, profile
from deltarank.study.runs import run, update_setter, updates
from deltarank.study.search import full_of, tuned
from deltarank.study.tasks import load_split
from deltarank.study.training import lora_layers, plant, prepare, quiet_peft

SHRUNK = (0.9, 0.75, 0.5)  # factors of the whole update
CUT = (64, 16, 8)  # ranks
MITIGATED = (0.75, 0.5, 0.25)  # what is left of an intruder, PEFT's mitigation_lambda: 0.75


def treated_configs() -> list[tuple[str, RunConfig]]:
    """Full fine-tuning and LoRA of the highest rank, first seed, of the first of forget_tasks.

    The other tasks are to come.
    """
    task, rank = profile().forget_tasks[0], max(profile().lora_ranks)
    return [("full", tuned(task)), (f"LoRA, rank {rank}", tuned(task, "lora", rank=rank))]


def treated(config: RunConfig) -> pd.DataFrame:
    """A run under each treatment of its matrices, a line each; stored.

    What is outside the matrices keeps its full update.  Columns: treatment and its amount (of none
    1); loss_nats: of test rows; skill: its share of the skill gain; prose and code: nats a token on
    general text.  Intruders are PEFT's and of LoRA alone.  Raises ValueError for an entry that was
    measured on other text or by other rules.
    """

    def compute() -> dict:
        started, rows = time.perf_counter(), list(_measured(config))
        seconds = time.perf_counter() - started
        return {"run": config.key, "rows": rows, "provenance": provenance(seconds)}

    rules = {"shrunk": [*SHRUNK], "cut": [*CUT], "intruders": [*MITIGATED]}
    record = kept_by(entry_folder(config, "treatments"), rules, compute)
    table = pd.DataFrame(record["rows"])
    full = run(full_of(config))
    table["skill"] = skill_kept(table["loss_nats"], full)
    return table


def _measured(config: RunConfig) -> Iterator[dict]:
    """Yield the line of each treatment: its name and amount, and the losses."""
    model, dW = load_model(config.model), updates(config)
    put, rows = update_setter(model, dW), load_split(config.task, "test")[: config.eval_rows]
    for treatment, amount, change in _treatments(config, dW):
        put(change)
        losses = {"loss_nats": mean_loss(model, config, rows)}
        losses |= general_loss(model, config)
        yield {"treatment": treatment, "amount": amount} | losses


Treatment = tuple[str, float, Callable[[str], Tensor]]  # name, amount, a matrix's update by name


def _treatments(config: RunConfig, dW: dict[str, Tensor]) -> Iterator[Treatment]:
    """Yield every treatment; none is the update as it is, turned a control of the same spectrum."""
    yield "none", 1.0, lambda name: dW[name]
    yield "turned", 1.0, lambda name: turned(dW[name], seed=config.seed)
    for factor in SHRUNK:
        yield "shrunk", factor, lambda name, c=factor: c * dW[name]  # type: ignore[misc]
    for r in CUT:
        if config.method not in FACTORED or r < config.rank:
            yield "cut", r, lambda name, r=r: _head(dW[name], r)  # type: ignore[misc]
    if config.method == "lora":
        for left in MITIGATED:
            yield "intruders", left, without_intruders(config, dW, left).__getitem__


def _head(dW: Tensor, r: int) -> Tensor:
    """dW (m, n) cut to rank r."""
    B, A, _ = leading_factors(dW, min(r, *dW.shape))
    return B @ A


def turned(dW: Tensor, *, seed: int) -> Tensor:
    """Q dW R with random rotations Q (m, m) and R (n, n): the same spectrum in random directions.

    >>> torch.linalg.svdvals(turned(torch.diag(torch.tensor([2.0, 1.0])), seed=0))
    tensor([2.0000, 1.0000])
    """
    draw = torch.Generator().manual_seed(seed)
    Q, R = (torch.linalg.qr(torch.randn(n, n, generator=draw)).Q for n in dW.shape)
    return Q @ dW @ R


def without_intruders(config: RunConfig, dW: dict[str, Tensor], left: float) -> dict[str, Tensor]:
    """The update (m, n) of every matrix after PEFT's reduce_intruder_dimension.

    dW: a LoRA's, whose intruders are scaled by `left` (Shuttleworth et al. 2024, arXiv 2410.21228).
    Raises ValueError for other runs.
    """
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    require(config.method == "lora", f"{config.key}: PEFT takes intruders out of LoRA alone")
    model = prepare(dataclasses.replace(config, compile=False))
    layers = lora_layers(model)
    plant(model, lambda n: balanced(*leading_factors(dW[n], layers[n].r["default"])[:2]))
    with quiet_peft():
        reduce_intruder_dimension(model, top_k=TOP, mitigation_lambda=left, logging_sink=None)
    return {n: layer.get_delta_weight("intruder_reduced").detach() for n, layer in layers.items()}
