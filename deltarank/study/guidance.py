"""Guidance: ranks that a run's spectra give to each matrix, against one rank for all."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from deltarank.ranks import ranks_of, recommend_ranks
from deltarank.study.configs import RunConfig
from deltarank.study.cuts import cut_by_matrix
from deltarank.study.gains import captured_energy
from deltarank.study.profiles import profile
from deltarank.study.runs import Result, run
from deltarank.study.search import tuned
from deltarank.study.tables import spectra_table


def allocations(result: Result, rank: int) -> dict[str, dict[str, int]]:
    """Ranks of every matrix, {"uniform" or "guided": {matrix: rank}}, of one budget.

    uniform: this rank for all; guided: by recommend_ranks, from the spectra of a run, of as many
    parameters or fewer, by less than one rank of one matrix.
    """
    spectra = spectra_table([result]).assign(kind="matrix")
    budget = int(rank * spectra["shape"].map(sum).sum())
    guided = recommend_ranks(spectra, budget=budget)
    return {
        "uniform": dict.fromkeys(result.matrices, rank),
        "guided": ranks_of(guided, result.matrices),
    }


def lora_by_matrix(task: str, ranks: dict[str, int], rank: int) -> RunConfig:
    """A LoRA of these ranks at the learning rate common to all tasks; `rank` is most matrices'."""
    other = ((name.removesuffix(".weight"), r) for name, r in ranks.items() if r != rank)
    return profile().config(task, "lora", rank=rank, rank_pattern=tuple(sorted(other)))


def guidance_table(tasks: Sequence[str], rank: int) -> pd.DataFrame:
    """The allocations of each task's full run, one line each, and runs what is not stored.

    Indexed by task and allocation; columns: energy, see captured_energy; lowest and highest rank;
    cut_loss and cut_score of the update cut to the ranks, lora_loss and lora_score of a LoRA that
    is trained with them, on test rows.
    """
    rows = []
    for task in tasks:
        full = run(tuned(task))
        for allocation, ranks in allocations(full, rank).items():
            cut, lora = cut_by_matrix(full.config, ranks), run(lora_by_matrix(task, ranks, rank))
            row = {"task": task, "allocation": allocation, "energy": captured_energy(full, ranks)}
            row |= {"lowest": min(ranks.values()), "highest": max(ranks.values())}
            row |= {"cut_loss": cut["loss_nats"], "cut_score": cut["score"]}
            rows.append(row | {"lora_loss": lora.loss(), "lora_score": lora.score()})
    return pd.DataFrame(rows).set_index(["task", "allocation"])
