"""Overlaps: which directions the updates of two runs share."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import pandas as pd
import torch
from torch import Tensor

from deltarank.gram import leading_factors
from deltarank.store import cached
from deltarank.study.configs import RunConfig
from deltarank.study.profiles import entry_folder, profile
from deltarank.study.runs import run, updates
from deltarank.study.search import coarsely_tuned

OVERLAP_RANKS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)


def overlaps(first: RunConfig, second: RunConfig) -> pd.DataFrame:
    """subspace_overlap of two runs' updates, one line a matrix of both and rank; stored.

    The two may be given in either order.

    A LoRA has no more directions than its rank; beyond, all it has are compared with the r of the
    other run: the share of them that lies in its r leading ones.

    Columns: name, rank, left, right (overlaps of the singular subspaces) and left_chance,
    right_chance (what random subspaces give).
    """

    def compute() -> tuple[dict, dict[str, Tensor]]:
        one, other = _leading_subspaces(first), _leading_subspaces(second)
        found = {
            name: _overlaps(vectors, other[name]) for name, vectors in one.items() if name in other
        }
        return {"runs": [first.key, second.key]}, found

    orders = ((first, second), (second, first))
    folders = [entry_folder(a, "overlaps", f"{a.key}--{b.key}") for a, b in orders]
    folder = next((known for known in folders if known.exists()), folders[0])
    rows, shape_of = [], run(first).shape
    for name, both in cached(folder, compute)[1].items():
        m, n = shape_of(name)
        for rank, (left, right) in zip(OVERLAP_RANKS, both.tolist(), strict=False):
            row = {"name": name, "rank": rank, "left": left, "right": right}
            rows.append(row | {"left_chance": rank / m, "right_chance": rank / n})
    return pd.DataFrame(rows)


def mean_overlap(first: RunConfig, second: RunConfig) -> pd.Series:
    """The share, 0 to 1, of leading directions that two runs' updates have in common, by rank.

    The mean of `overlaps` over matrices and both sides.
    """
    return overlaps(first, second).groupby("rank")[["left", "right"]].mean().mean(axis=1)


def overlaps_of_seeds(tasks: Sequence[str]) -> pd.DataFrame:
    """mean_overlap of every two seeds of a task at the lora_ranks, a line (task, seed, seed).

    The full runs are coarsely_tuned: all seeds of a task have one rate.
    """
    pairs = itertools.product(tasks, itertools.combinations(profile().seeds, 2))
    found = {
        (task, *seeds): mean_overlap(*(coarsely_tuned(task, seed=seed) for seed in seeds))
        for task, seeds in pairs
    }
    return pd.DataFrame(found, profile().lora_ranks).T


def overlaps_of_tasks(tasks: Sequence[str]) -> pd.DataFrame:
    """mean_overlap of every two tasks at the lora_ranks, a line (task, other) in both orders."""
    found = {}
    for pair in itertools.combinations(tasks, 2):
        found[pair] = found[pair[::-1]] = mean_overlap(*map(coarsely_tuned, pair))
    return pd.DataFrame(found, profile().lora_ranks).T


def _overlaps(A: tuple[Tensor, Tensor], B: tuple[Tensor, Tensor]) -> Tensor:
    """subspace_overlap at OVERLAP_RANKS as far as _leading_vectors go, (ranks, 2: left, right)."""
    directions = A[0].shape[1], B[0].shape[1]
    ranks = torch.tensor([r for r in OVERLAP_RANKS if r <= max(directions)])
    a, b = (ranks.clamp(max=k) for k in directions)
    products = [(X.T @ Y).square() for X, Y in zip(A, B, strict=True)]
    shared = [P.cumsum(0).cumsum(1)[a - 1, b - 1] / torch.minimum(a, b) for P in products]
    return torch.stack(shared, dim=1)


@functools.lru_cache(maxsize=16)  # of 170 MB each on Gemma; a run is compared with several
def _leading_subspaces(config: RunConfig) -> dict[str, tuple[Tensor, Tensor]]:
    """_leading_vectors of every matrix's update, up to its rank or the last of OVERLAP_RANKS."""
    dW = updates(config)
    return {
        name: _leading_vectors(dW[name], min(max(OVERLAP_RANKS), len(S)))
        for name, S in run(config).spectra.items()
    }


def _leading_vectors(dW: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Orthonormal (m, r) and (n, r), whose first k columns span dW's k leading singular vectors."""
    B, A, _ = leading_factors(dW, r)
    return torch.linalg.qr(B).Q, torch.linalg.qr(A.T).Q
