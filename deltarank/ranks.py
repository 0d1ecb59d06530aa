"""Spectra to ranks: one a matrix by energy or budget, and what to say of them."""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from deltarank.checks import counted, require
from deltarank.spectra import common_energy, energy_rank, null_energy

TRAINING_ADVICE = (  # what the report found for a LoRA that is trained
    "To train a LoRA anew, start at rank 8 on all linear layers and tune the learning rate first "
    "(found on a model of 270 M parameters, in short training)."
)
SCORE_IT = "That is no measure of the task: score the cut before you ship it."
VLLM_RANKS = (16, 32, 64, 128, 256, 320, 512)  # that --max-lora-rank takes, 16 without it; 0.33


def recommend_ranks(
    table: pd.DataFrame,
    *,
    rank: int | None = None,
    energy: float | None = None,
    budget: int | None = None,
) -> dict:
    """Ranks for the matrices of compare_checkpoints or Lora.spectra, as PEFT's LoraConfig.

    rank: one for all (a matrix of fewer singular values gets all it has).
    energy: every matrix gets the smallest rank that holds this share of its energy above noise,
    sum over i of max(sigma_i^2 - noise_i^2, 0), where noise has the matrix's shape and the
    variance that the median singular value gives (as above_edge).
    budget: at most this many adapter parameters, r (m + n) a matrix, given out one rank at a time
    to the matrix whose next sigma^2 is largest per parameter.  sigma falls within a matrix, so no
    other allocation of the parameters used keeps more energy (greedy for concave gains).
    Vocabulary, experts and routers are left out.  Returns r (the most frequent), lora_alpha,
    rank_pattern, alpha_pattern (both {module: rank}, so that every scale alpha / r is 1) and
    target_modules.  Raises ValueError unless one of the three is given, and where it gives nothing.
    """
    given = sum(value is not None for value in (rank, energy, budget))
    require(given == 1, "give one of rank=16, energy=0.9 and budget=1_000_000")
    rows = changed_matrices(table)
    shapes = dict(zip(rows["name"], rows["shape"], strict=True))
    spectra = {name: S.double() for name, S in zip(rows["name"], rows["S"], strict=True)}
    require(bool(shapes), "no linear layer was changed: there is nothing to adapt")
    limits = map(len, spectra.values())
    require_rule(limits, shapes.values(), rank=rank, energy=energy, budget=budget)
    if rank is not None:
        ranks = {name: min(rank, len(S)) for name, S in spectra.items()}
    elif energy is not None:
        ranks = {
            n: max(1, energy_rank(_above_noise(S, shapes[n]), energy)) for n, S in spectra.items()
        }
    elif budget is not None:
        ranks = _allocate(spectra, shapes, budget)
    return lora_arguments(ranks)


def require_rule(
    limits: Iterable[int],
    shapes: Iterable[tuple[int, ...]],
    *,
    rank: int | None = None,
    energy: float | None = None,
    budget: int | None = None,
) -> None:
    """Raise ValueError for a rule that gives nothing to matrices of these limits and shapes."""
    most, least = max(limits), min(map(sum, shapes))
    require(rank is None or 1 <= rank <= most, f"rank={rank}: choose one from 1 to {most}")
    told = f"energy={energy}: must be above 0 and at most 1, such as 0.9"
    require(energy is None or 0 < energy <= 1, told)
    told = f"budget={budget}: one rank of one matrix takes {least} parameters or more"
    require(budget is None or budget >= least, told)


def changed_matrices(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of compare_checkpoints that can get a rank: layer matrices with an update."""
    return table[(table["kind"] == "matrix") & (table["squared_norm"] > 0)]


def _above_noise(S: Tensor, shape: tuple[int, int]) -> Tensor:
    """The singular values without what noise of this shape and their median would give them."""
    null = null_energy(shape).diff(prepend=torch.zeros(1, dtype=torch.float64))  # of sum = 1
    S = F.pad(S, (0, len(null) - len(S)))  # a LoRA has no more than its rank; the rest are 0
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
    first = f"the first rank goes to {order[0][1]} and takes {costs[0]} parameters"
    require(bool(taken), f"budget={budget}: {first}: give as many or more")
    return dict(collections.Counter(name for _, name in taken))


def lora_arguments(ranks: dict[str, int], *, patterns: bool = True) -> dict:
    """{matrix: rank} as LoraConfig takes it; the scale alpha / r is 1 everywhere.

    Without patterns all matrices have the largest rank.
    """
    modules = {name.removesuffix(".weight"): r for name, r in ranks.items() if r}
    most, counts = max(modules.values()), collections.Counter(modules.values())
    r = counts.most_common(1)[0][0] if patterns else most
    pattern = {module: rank for module, rank in modules.items() if patterns and rank != r}
    same = {"lora_alpha": r, "rank_pattern": pattern, "alpha_pattern": dict(pattern)}
    return {"r": r} | same | {"target_modules": sorted(modules)}


def ranks_of(ranks: dict, names: Iterable[str]) -> dict[str, int]:
    """The ranks that LoraConfig's arguments give matrices; 0 for those that they leave out."""
    targets = set(ranks["target_modules"])  # a list, of thousands in a mixture of experts
    modules = {name: name.removesuffix(".weight") for name in names}
    return {
        name: ranks["rank_pattern"].get(module, ranks["r"]) if module in targets else 0
        for name, module in modules.items()
    }


def percent(share: float) -> str:
    """A share in percent, to a whole or to two digits; "–" for what is no number.

    >>> percent(0.386), percent(0.0531), percent(float("nan"))
    ('39 %', '5.3 %', '–')
    """
    if not math.isfinite(share):
        return "–"
    if 0 < share < 1e-6:
        return "< 0.0001 %"
    return f"{100 * share:#.2g} %" if 0 < share < 0.0995 else f"{100 * share:.0f} %"


def kept_share(table: pd.DataFrame, lora: dict) -> float:
    """Share of the squared update of the changed matrices that the cut to these ranks keeps."""
    rows = changed_matrices(table)
    return common_energy(rows["S"], ranks_of(lora, rows["name"]).values())


def verdict(table: pd.DataFrame, lora: dict | None) -> list[str]:
    """What was found in a pair and what to do, which ranks to cut it at, and how sure that is.

    lora: from recommend_ranks; None for a pair of which no matrix was changed.
    """
    rows = changed_matrices(table)
    if lora is None or rows.empty:
        kinds = table.loc[table["squared_norm"] > 0, "kind"].value_counts()
        parts = [f"{count} of kind {kind}" for kind, count in kinds.items()]
        more = sum(size > 0 for size in table.attrs.get("rest", {}).values())
        changed = ", ".join([*parts, *[f"{more} norms, biases and others"] * (more > 0)])
        found = f"None of {len(table)} matrices can be cut: those of linear layers are unchanged."
        return [f"{found} What changed no LoRA of ours holds: {changed}." if changed else found]
    ranks = pd.Series(ranks_of(lora, rows["name"]))
    return [
        _finding(table, rows, lora, ranks),
        f"For 90 % of its squared update a matrix needs rank {rows['r90'].median():.0f} (median), "
        f"{rows['r90_over_null'].median():.2f} of what noise of its shape needs. "
        f"{_rank_sentences(rows, ranks)} {_outside(table)}",
        _precision_sentences(rows),
    ]


def adapter_verdict(table: pd.DataFrame, lora: dict | None) -> list[str]:
    """What an adapter uses of its rank, which ranks to cut it at, and how sure that is.

    table: of Lora.spectra; lora: as in verdict.
    """
    rows = changed_matrices(table)
    if lora is None or rows.empty:
        return [f"None of {len(table)} matrices can be cut: the adapter changes no layer."]
    ranks = pd.Series(ranks_of(lora, rows["name"]))
    used = {share: [energy_rank(S, share) for S in rows["S"]] for share in (0.9, 0.99)}
    at_90, at_99 = (pd.Series(used[share]).median() for share in (0.9, 0.99))
    half = rows["lora_rank"].median() / 2
    found = "it uses most of its rank"
    if at_90 <= half:
        found = f"half of its rank holds {99 if at_99 <= half else 90} % of it"
    parameters = int((rows["shape"].map(sum) * rows["lora_rank"]).sum())
    return [
        f"Of its {_span(rows['lora_rank'])} in {len(rows)} matrices the adapter uses {at_90:.0f} "
        f"directions (median) for 90 % and {at_99:.0f} for 99 % of its squared update: {found}. "
        f"Cut at {_span(ranks)} it keeps {percent(kept_share(table, lora))}.",
        f"{_rank_sentences(rows, ranks)} What an adapter keeps whole is not counted.",
        f"The adapter takes {parameters:,} parameters, stored as "
        f"{', '.join(sorted(set(rows['dtype_tuned'])))}. Its squared update is no measure of what "
        "it has learned: score the cut before you ship it.",
    ]


def _span(ranks: pd.Series) -> str:
    """Ranks in words.

    >>> _span(pd.Series([4, 4])), _span(pd.Series([2, 4, 16]))
    ('rank 4', 'ranks of 2 to 16 (median 4)')
    """
    low, high = ranks.min(), ranks.max()
    if low == high:
        return f"rank {low}"
    return f"ranks of {low} to {high} (median {ranks.median():.0f})"


def _finding(table: pd.DataFrame, rows: pd.DataFrame, lora: dict, ranks: pd.Series) -> str:
    """The first line: how low-rank the update is, where to cut it, how to train instead."""
    at_8, at_64 = (common_energy(rows["S"], r) for r in (8, 64))
    kept = percent(kept_share(table, lora))
    return (
        f"Of the squared update of {len(rows)} matrices rank 8 keeps {percent(at_8)}, rank 64 "
        f"{percent(at_64)}: {_kind(rows, at_8)}. Cut at {_span(ranks)} it keeps {kept}. {SCORE_IT} "
        f"{TRAINING_ADVICE}"
    )


def _kind(rows: pd.DataFrame, at_8: float) -> str:
    """What kind of update it is, in words; at_8: the share that rank 8 keeps."""
    if rows["near_rounding"].mean() > 0.5:
        above = rows["above_rounding"].median()
        return f"much of it is rounding, above which {above:.0f} directions stand (median)"
    if at_8 >= 0.9:
        return "it is low-rank"
    whole = pd.Series([energy_rank(S, 0.999) for S in rows["S"]]).median()
    if whole <= rows["min_dim"].median() / 4:
        return f"nearly all of it is in {whole:.0f} directions (median), as of a merged LoRA"
    if rows["r90_over_null"].median() > 0.8:
        return "it is spread out like noise"
    return "it is concentrated, but not low-rank"


def _rank_sentences(rows: pd.DataFrame, ranks: pd.Series) -> str:
    """What the ranks for extraction take, and where they are largest."""
    sides = rows.set_index("name")["shape"].map(sum)
    more, top = ranks[ranks > ranks.median()], ranks[ranks == ranks.max()]
    need = counted(len(more), "matrix needs", "matrices need")
    most = f"; {need} more than the median" if len(more) else ""
    if len(more) and len(top) == 1:
        most += f", most of all {top.index[0]}"
    stored = (ranks.max() * sides).sum()
    padded = f"{stored:,} stored at one rank, " if ranks.min() < ranks.max() else ""
    served = (
        "" if ranks.max() <= VLLM_RANKS[-1] else f" vLLM loads no more than rank {VLLM_RANKS[-1]}."
    )
    return (
        f"The ranks for extraction take {(ranks * sides).sum():,} parameters ({padded}"
        f"{4 * stored / 1e6:,.1f} MB in float32){most}.{served}"
    )


def _outside(table: pd.DataFrame) -> str:
    """What of the update lies outside the matrices of the layers."""
    parts = table.groupby("kind")["squared_norm"].sum().to_dict()
    parts["norms, biases and others"] = sum(table.attrs["rest"].values())
    total = sum(parts.values())
    shares = [f"{kind} {percent(x / total)}" for kind, x in parts.items() if kind != "matrix"]
    told = f"{', '.join(shares)} of the whole squared update"
    return f"Outside these matrices, not in the factors: {told}."


def _precision_sentences(rows: pd.DataFrame) -> str:
    """The third line: how large the update is beside the weights and the rounding."""
    near, types = int(rows["near_rounding"].sum()), ", ".join(sorted(set(rows["dtype_tuned"])))
    doubt = ": their ranks say little about the training." if near else "."
    if near > len(rows) / 2:
        doubt = ": what a cut leaves out is mostly rounding, and its rank none of the training's."
    return (
        f"Stored as {types}, the update is {percent(rows['relative_size'].median())} of the "
        f"weights (median). {near} of {len(rows)} matrices are near rounding{doubt}"
    )
