"""An adapter cut to ranks: another PEFT folder, written whole or not at all, without the base."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from deltarank.checks import require
from deltarank.factors import Cut, Factors, Form
from deltarank.lora import Lora, open_lora
from deltarank.peft_format import lora_config, require_replaceable, write_adapter
from deltarank.ranks import changed_matrices, ranks_of, recommend_ranks
from deltarank.spectra import factor_svd

CARRIED = ("task_type", "auto_mapping", "base_model_name_or_path", "revision", "fan_in_fan_out")


def shrink_adapter(
    adapter: str,
    out: str,
    *,
    rank: int | None = None,
    energy: float | None = None,
    budget: int | None = None,
    dtype: str = "float32",
    patterns: bool = False,
    allow_pickle: bool = False,
) -> pd.DataFrame:
    """Write a LoRA cut to smaller ranks as another adapter: the folder `out`, whole or not at all.

    rank, energy, budget: one of them, as in extract_adapter; dtype and patterns: the Form of the
    factors.  Each update scale * B @ A becomes its best approximation of that rank, of scale 1.
    Returns what extract_adapter returns; embeddings and biases are "dropped".  Raises as
    open_lora and recommend_ranks and, before factors are read, FileExistsError for a folder that
    is there and is no adapter that was written here.
    """
    folder, form = Path(out).expanduser().resolve(), Form(dtype, patterns)
    lora = open_lora(adapter, allow_pickle=allow_pickle)
    same = folder == lora.checkpoint.folder.resolve()
    require(not same, f"{out} is the adapter that is to be cut: name another folder")
    require_replaceable(folder)
    lora.require_rule(rank=rank, energy=energy, budget=budget)
    table = lora.spectra()
    chosen = recommend_ranks(table, rank=rank, energy=energy, budget=budget)
    factors = _factors(lora, chosen, form)
    notes: dict[str, dict[str, float]] = {}
    config = {key: lora.checkpoint.config.get(key) for key in CARRIED}
    made = factors.tensors(lambda module: _cut(lora, module, factors.ranks[module]), notes)
    write_adapter(folder, lora_config(factors.arguments(), **config), factors.layout(), made)
    return _report(table, factors, notes)


def _factors(lora: Lora, chosen: dict, form: Form) -> Factors:
    """The factors of the modules that get a rank."""
    modules = {name: matrix.module for name, matrix in lora.matrices.items()}
    shapes = {module: lora.shape(name) for name, module in modules.items()}
    ranks = ranks_of(chosen, modules)
    return Factors(shapes, {modules[name]: r for name, r in ranks.items() if r}, form)


def _cut(lora: Lora, module: str, rank: int) -> Cut:
    """B, A and what they hold of the update of one module."""
    U, S, Vh = factor_svd(*lora.factors(f"{module}.weight"))
    norm, held = (float(x.square().sum()) for x in (S, S[:rank]))
    note = {"squared_norm": norm, "kept": held / norm, "best": held / norm}
    return U[:, :rank] * S[:rank], Vh[:rank], note


def _report(table: pd.DataFrame, factors: Factors, notes: dict[str, dict]) -> pd.DataFrame:
    """The table that shrink_adapter returns."""
    names = {module: f"{module}.weight" for module in factors.ranks}
    norms = dict(zip(table["name"], table["squared_norm"], strict=True)) | table.attrs["rest"]
    matrices, written = {*changed_matrices(table)["name"]}, {*names.values()}
    rest = {
        name: ("not_chosen" if name in matrices else "dropped", norm)
        for name, norm in norms.items()
        if norm and name not in written
    }
    return factors.report(notes, names, rest)
