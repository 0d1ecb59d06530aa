"""A pair's table: size, spectrum and rounding of every matrix of tuned - base."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from deltarank.alignment import Pair, open_pair
from deltarank.checkpoints import (
    EXPERT,
    folder_and_name,
    is_linear_weight,
    is_vocabulary,
    layer_and_module,
)
from deltarank.checks import all_finite, require
from deltarank.gram import gram_matrix, root_spectrum
from deltarank.runtime import by_core, cache_folder, device, progress
from deltarank.spectra import spectrum_measures
from deltarank.store import cached, digest

MANTISSA_BITS = {"F16": 10, "BF16": 7}  # stored bits; one ulp of w in [2^e, 2^(e+1)) is 2^(e-bits)
LOW_BITS = {"F16": 0x1FFF, "BF16": 0xFFFF}  # of a float32, that are 0 in values of these types
OUT_OF_RANGE = "the update is out of the range of float32"
RESCALE = "rescale both checkpoints"
NEAR_ROUNDING = 0.05  # share of rounding noise in the squared update above which ranks mean little


def compare_checkpoints(base: str, tuned: str, *, allow_pickle: bool = False) -> pd.DataFrame:
    """One line a matrix of tuned - base: how large the update is, and its rank by each definition.

    Columns: name, layer, module, kind ("matrix", of a linear layer; "vocabulary"; "expert", their
    routers too; "other"), shape (m, n), S (the singular values of the update, descending,
    float32), dtype_base, dtype_tuned; relative_size |dW| / |W0| and changed_share of the entries;
    those of spectrum_measures; rounding_share, what rounding the tuned weights is expected to add
    to |dW|^2, as a share of it (at most 1; too high for updates below the spacing of the type, and
    where few entries changed, since those that did not count, too), by
    the narrowest type that holds them: float32 may be a copy of bfloat16; above_rounding, how many
    singular values exceed that noise; near_rounding, a share over 5 %; base_rounding_share, that of
    base weights in a narrower type than the tuned ones.

    attrs: "rest" {tensor that is no matrix: |dW|^2}, "only_base", "only_tuned", "added_rows"
    {tensor: rows that only tuned has}.
    Memory: of each matrix at work (one a core, four at most) slices of 2 M entries of both, and
    three times the Gram matrix of its small side (float64): the sum, and what adding to it or its
    eigenvalues need.  What was measured is kept, so that a killed call goes on.  Raises and warns
    as open_pair does; raises for NaN or infinite weights, warns of an identical pair, an
    unrelated one, and one whose base may be a rounded copy of what training started from.
    """
    return compare_pair(open_pair(base, tuned, allow_pickle=allow_pickle))


def compare_pair(pair: Pair) -> pd.DataFrame:
    """The table of compare_checkpoints, of a pair that is open; raises as it does."""
    folder = cache_folder() / "pairs" / _pair_digest(pair)
    found, rows = pair.matrices(), []
    base, tuned = pair.base.source, pair.tuned.source
    require(bool(found), f"{base} and {tuned} share no matrix: there is nothing to compare")
    sizes = {label: math.prod(pair.shape(name)[-2:]) for label, (name, _) in found.items()}
    with progress(sum(sizes.values()), "compare checkpoints") as bar:
        compared = by_core(functools.partial(_compared, pair, found, folder), found)
        for label, entry in zip(found, compared, strict=True):
            rows.append(_pair_row(pair, label, found[label][0], entry))
            bar.update(sizes[label])
    table = pd.DataFrame(rows)
    measured = {name for name, _ in found.values()}
    rest = [name for name in pair.names if name not in measured]
    table.attrs = {
        "rest": {name: squared_difference(pair, name) for name in rest},
        "only_base": pair.only_base,
        "only_tuned": pair.only_tuned,
        "added_rows": pair.added_rows(),
    }
    _warn_of_strange_pairs(table, base, tuned)
    return table


def _compared(pair: Pair, found: dict, folder: Path, label: str) -> tuple[dict, dict[str, Tensor]]:
    """The stored entry of one matrix, computed when it is missing."""
    entry = folder / digest({"matrix": label})[:16]  # a name in a file may be any path
    return cached(entry, lambda: _compare_matrix(pair, *found[label]))


def _pair_digest(pair: Pair) -> str:
    """Names a pair by its files' places, sizes, times and nodes: reading them would take longer."""
    files = sorted({*pair.base.files.values(), *pair.tuned.files.values()})
    stats = {}
    for file in files:  # one that is replaced may have the old size and time
        stat = file.stat()
        stats[str(file.resolve())] = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
    sides = [str(side.folder.resolve()) for side in (pair.base, pair.tuned)]
    return digest({"files": stats, "sides": sides, "version": 3})[:16]


def differences(pair: Pair, name: str, expert: int | None) -> Iterator[tuple[Tensor, ...]]:
    """Yield W0, W1 and dW = W1 - W0 slice by slice, at least float32, on the device.

    Raises ValueError for NaN and infinite entries, naming the file and the tensor.
    """
    for W0, W1 in pair.parts(name, expert):
        W0, W1 = (W.to(device()) for W in (W0, W1))
        W0, W1 = (W if W.dtype == torch.float64 else W.float() for W in (W0, W1))
        dW = W1 - W0
        if not all_finite(dW):
            whole = all_finite(W0), all_finite(W1)
            require(not all(whole), f"{name}: {OUT_OF_RANGE}: {RESCALE}")
            broken = pair.tuned if whole[0] else pair.base
            tensor = name if broken is pair.tuned else pair.names[name]
            where = folder_and_name(broken.files[tensor])
            raise ValueError(f"{where}: {tensor} holds NaN or infinite values; repair it")
        yield W0, W1, dW


def _compare_matrix(pair: Pair, name: str, expert: int | None) -> tuple[dict, dict[str, Tensor]]:
    """Sums over one matrix, in float64, and S of its update, from one pass over its slices."""
    m, n = pair.shape(name)[-2:]
    gram = torch.zeros(min(m, n), min(m, n), dtype=torch.float64, device=device())
    sums = dict.fromkeys(("base", "update", "changed"), 0.0)
    stored = pair.base.dtypes[pair.names[name]], pair.tuned.dtypes[name]
    before, after = map(_Rounding, stored)
    for W0, W1, dW in differences(pair, name, expert):
        sums["base"] += float(torch.linalg.vector_norm(W0, dtype=torch.float64)) ** 2
        sums["changed"] += int(torch.count_nonzero(dW))
        before.add(W0)
        after.add(W1)
        if sums["changed"]:
            gram += gram_matrix((dW if m >= n else dW.T).double())
    sums["update"] = float(gram.trace())
    sums |= {"rounding": after.variance(), "base_rounding": before.beyond(after)}
    require(math.isfinite(sums["update"]), f"{name}: {OUT_OF_RANGE}: {RESCALE}")
    S = root_spectrum(gram).float().cpu()
    if sums["update"]:
        require_float32(S[0], name)
    return {"sums": sums}, {"S": S}


def require_float32(size: Tensor, name: str, *, cure: str = RESCALE) -> None:
    """Raise ValueError for an update of doubles whose size became zero or infinite in float32."""
    fits = 0 < float(size) < math.inf
    require(fits, f"{name}: {OUT_OF_RANGE}: {cure}")


class _Rounding:
    """What rounding to a type adds to the weights of one tensor, seen slice by slice.

    The type is the narrowest that holds all of them: a tensor stored as float32 may be a copy.
    """

    def __init__(self, stored: str) -> None:
        self.sums = {kind: 0.0 for kind in MANTISSA_BITS if stored in (kind, "F32")}
        self.stored = stored

    def add(self, W: Tensor) -> None:
        """See more of the weights, float32 (or float64, which no type here holds)."""
        for kind in [*self.sums]:
            if self.stored == "F32" and bool((W.view(torch.int32) & LOW_BITS[kind]).any()):
                del self.sums[kind]
            else:
                self.sums[kind] += _rounding_variance(W, kind)

    def variance(self) -> float:
        """Expected squared norm of the rounding error; 0 for weights that need all of float32."""
        return max(self.sums.values(), default=0.0)

    def beyond(self, other: _Rounding) -> float:
        """The variance, if `other` has none: these weights are of a narrower type."""
        return 0.0 if other.sums else self.variance()


def _rounding_variance(W: Tensor, dtype: str) -> float:
    """Expected squared norm of the error of rounding W to its stored type: sum of ulp^2 / 12."""
    biased = (W.view(torch.int32) >> 23 & 255).flatten()  # 127 more than the exponent
    counts = torch.bincount(biased, minlength=256).double()
    counts[0] = 0  # zeros; a subnormal bfloat16 is as good as zero
    exponent = (torch.arange(256, device=W.device) - 127.0).clamp_min(
        -14 if dtype == "F16" else -126
    )
    return float((counts * torch.exp2(2 * (exponent.double() - MANTISSA_BITS[dtype]))).sum() / 12)


def _pair_row(pair: Pair, label: str, name: str, entry: tuple[dict, dict[str, Tensor]]) -> dict:
    """The line of compare_checkpoints for one matrix."""
    sums, S, (m, n) = entry[0]["sums"], entry[1]["S"], pair.shape(name)[-2:]
    layer, module = layer_and_module(name)
    row = {"name": label, "layer": layer, "module": module, "kind": matrix_kind(label, name)}
    row |= {"shape": (m, n), "S": S, "dtype_base": pair.base.dtypes[pair.names[name]]}
    row["dtype_tuned"] = pair.tuned.dtypes[name]
    none = math.inf if sums["update"] else 0.0  # of weights that were all zero
    row["relative_size"] = math.sqrt(sums["update"] / sums["base"]) if sums["base"] else none
    row["changed_share"] = sums["changed"] / (m * n)
    row |= spectrum_measures(S, (m, n))
    share, of_base = (
        min(1.0, sums[added] / sums["update"]) if sums["update"] else 0.0
        for added in ("rounding", "base_rounding")
    )
    edge = math.sqrt(sums["rounding"]) * (m**-0.5 + n**-0.5)
    row |= {"rounding_share": share, "above_rounding": int((edge < S).sum())}
    return row | {"near_rounding": share > NEAR_ROUNDING, "base_rounding_share": of_base}


def matrix_kind(label: str, name: str) -> str:
    """What a matrix is: only of a linear layer's can a rank be chosen."""
    if label != name or EXPERT.search(name):
        return "expert"
    if is_vocabulary(name):
        return "vocabulary"
    return "matrix" if is_linear_weight(name) else "other"


def squared_difference(pair: Pair, name: str) -> float:
    """|dW|^2 of a tensor, of any number of dimensions."""
    return sum(float(dW.double().square().sum()) for *_, dW in differences(pair, name, None))


def _warn_of_strange_pairs(table: pd.DataFrame, base: str, tuned: str) -> None:
    """Warn of an identical pair, an update that dwarfs the weights, and a base that was rounded."""
    rest = sum(table.attrs["rest"].values())
    if not table["squared_norm"].sum() + rest:
        warnings.warn(f"{base} and {tuned} are identical: there is no update", stacklevel=3)
    elif table["relative_size"].median() > 0.5:
        warnings.warn(
            f"the update is {table['relative_size'].median():.1f} times as large as the weights "
            f"(median): is {base} really the base of {tuned}?",
            stacklevel=3,
        )
    coarse = int((table["base_rounding_share"] > NEAR_ROUNDING).sum())
    if coarse:
        warnings.warn(
            f"{base} is stored in a narrower type than {tuned}: unless training started from these "
            f"rounded weights, {coarse} of {len(table)} matrices are near its rounding",
            stacklevel=3,
        )
