"""Spectra to ranks: one a matrix by energy or budget, and what to say of them."""

from __future__ import annotations

import collections

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from deltarank.checks import require
from deltarank.spectra import common_energy, energy_rank, null_energy


def recommend_ranks(
    table: pd.DataFrame, *, energy: float | None = None, budget: int | None = None
) -> dict:
    """Ranks for the matrices of compare_checkpoints, as arguments of PEFT's LoraConfig.

    energy: every matrix gets the smallest rank that holds this share of its energy above noise,
    sum over i of max(sigma_i^2 - noise_i^2, 0), where noise has the matrix's shape and the
    variance that the median singular value gives (as above_edge).
    budget: at most this many adapter parameters, r (m + n) a matrix, given out one rank at a time
    to the matrix whose next sigma^2 is largest per parameter.  sigma falls within a matrix, so no
    other allocation of the parameters used keeps more energy (greedy for concave gains).
    Vocabulary and experts are left out.  Returns r (the most frequent), lora_alpha, rank_pattern,
    alpha_pattern (both {module: rank}, so that every scale alpha / r is 1) and target_modules.
    """
    require((energy is None) != (budget is None), "give either energy=0.9 or budget=1_000_000")
    rows = table[(table["kind"] == "matrix") & (table["squared_norm"] > 0)]
    shapes = dict(zip(rows["name"], rows["shape"], strict=True))
    spectra = {name: S.double() for name, S in zip(rows["name"], rows["S"], strict=True)}
    require(bool(shapes), "no matrix was changed: there is nothing to adapt")
    if energy is not None:
        require(0 < energy <= 1, f"energy={energy}: must be above 0 and at most 1, such as 0.9")
        ranks = {
            n: max(1, energy_rank(_above_noise(S, shapes[n]), energy)) for n, S in spectra.items()
        }
    else:
        ranks = _allocate(spectra, shapes, budget)
    return lora_arguments(ranks)


def _above_noise(S: Tensor, shape: tuple[int, int]) -> Tensor:
    """The singular values without what noise of this shape and their median would give them."""
    null = null_energy(shape).diff(prepend=torch.zeros(1, dtype=torch.float64))  # of sum = 1
    noise = null * S.double().square().median() / null.median()
    return (S.double().square() - noise).clamp_min(0).sqrt()


def _allocate(
    spectra: dict[str, Tensor], shapes: dict[str, tuple[int, int]], budget: int
) -> dict[str, int]:
    """Ranks by the largest sigma^2 a parameter until the next would pass the budget."""
    gains = [(S.square() / sum(shapes[name])).tolist() for name, S in spectra.items()]
    order = sorted(
        ((gain, name) for name, row in zip(spectra, gains, strict=True) for gain in row),
        reverse=True,
    )
    costs = np.cumsum([sum(shapes[name]) for _, name in order])
    taken = order[: int((costs <= budget).sum())]
    require(
        bool(taken), f"budget={budget}: one rank of one matrix takes {costs[0]} parameters or more"
    )
    return dict(collections.Counter(name for _, name in taken))


def lora_arguments(ranks: dict[str, int]) -> dict:
    """{matrix: rank} as LoraConfig takes it; the scale alpha / r is 1 everywhere."""
    modules = {name.removesuffix(".weight"): r for name, r in ranks.items() if r}
    r = collections.Counter(modules.values()).most_common(1)[0][0]
    pattern = {module: rank for module, rank in modules.items() if rank != r}
    same = {"lora_alpha": r, "rank_pattern": pattern, "alpha_pattern": dict(pattern)}
    return {"r": r} | same | {"target_modules": sorted(modules)}


def rank_of(ranks: dict, name: str) -> int:
    """The rank that LoraConfig's arguments give a matrix; 0 for one that they leave out."""
    module = name.removesuffix(".weight")
    return ranks["rank_pattern"].get(module, ranks["r"]) if module in ranks["target_modules"] else 0


def verdict(table: pd.DataFrame, lora: dict) -> list[str]:
    """Three sentences on a pair: how low-rank, which ranks (from recommend_ranks), how sure."""
    rows = table[(table["kind"] == "matrix") & (table["squared_norm"] > 0)]
    held = ", ".join(f"rank {r} keeps {common_energy(rows['S'], r):.0%}" for r in (8, 64, 128))
    parts = table.groupby("kind")["squared_norm"].sum().to_dict()
    parts["norms and biases"] = sum(table.attrs["rest"].values())
    shares = [f"{k} {x / sum(parts.values()):.1%}" for k, x in parts.items() if k != "matrix"]
    ranks = pd.Series({name: rank_of(lora, name) for name in rows["name"]})
    sides = rows.set_index("name")["shape"].map(sum)
    more = ranks[ranks > ranks.median()].sort_values()
    near, types = int(rows["near_rounding"].sum()), ", ".join(sorted(set(rows["dtype_tuned"])))
    return [
        f"Of the squared update of {len(rows)} matrices {held}. For 90 % a matrix needs rank "
        f"{rows['r90'].median():.0f} (median), {rows['r90_over_null'].median():.2f} of what noise "
        f"of its shape needs. Outside these matrices: {', '.join(shares)}.",
        f"Ranks by the rule: {ranks.min()} to {ranks.max()}, median {ranks.median():.0f}, "
        f"{(ranks * sides).sum() / 1e6:.1f} M parameters; {len(more)} matrices need more than the "
        f"median" + (f", most of all {more.index[-1]}." if len(more) else "."),
        f"Stored as {types}: the update is {rows['relative_size'].median():.1%} of the weights "
        f"(median); {near} of {len(rows)} matrices are near rounding"
        + (", and their ranks say little about the training." if near else "."),
    ]
