"""Ranks to a PEFT folder: the cut of a pair, written whole or not at all."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from deltarank.alignment import Pair, open_pair
from deltarank.checks import require
from deltarank.compare import compare_pair, differences, require_float32, squared_difference
from deltarank.factors import PREFIX, Cut, Factors, Form
from deltarank.gram import gram_matrix, leading_eigenvectors, max_abs
from deltarank.peft_format import (
    Places,
    find_places,
    lora_config,
    require_replaceable,
    write_adapter,
)
from deltarank.ranks import ranks_of, recommend_ranks, require_rule
from deltarank.runtime import by_core, device

SHORTFALL = 1e-3  # share of the squared update by which an adapter may miss the best of its rank


def extract_adapter(
    base: str,
    tuned: str,
    out: str,
    *,
    rank: int | None = None,
    energy: float | None = None,
    budget: int | None = None,
    ranks: dict | None = None,
    dtype: str = "float32",
    patterns: bool = False,
    norms: bool = False,
    allow_pickle: bool = False,
) -> pd.DataFrame:
    """Write the cut of tuned - base as a PEFT adapter: the folder `out`, whole or not at all.

    rank: one for all matrices (a smaller matrix gets all it has); energy, budget: as in
    recommend_ranks (without `patterns` zeros bring each to the largest rank, and what is stored
    exceeds a budget); ranks: what that returned.  dtype, patterns: the Form of the factors.
    norms: those that changed go whole, as float32, into modules_to_save, which PEFT alone reads.

    Returns one line a changed tensor: name, part ("lora", "modules_to_save", "left_out" for norms,
    "not_chosen" by the rule, "dropped" for what no LoRA can hold), rank, squared_norm, kept (the
    share of it that the adapter holds), best (the most that its rank can hold), rounding (the share
    lost to the dtype); attrs["lora"]: LoraConfig's arguments.  An adapter that was
    written here before is replaced.  Raises as open_pair and find_places, ValueError for a bad rank
    and, before any work, FileExistsError for another folder that is there.
    """
    folder, form = Path(out).expanduser().resolve(), Form(dtype, patterns)
    require_replaceable(folder)
    rule = {"rank": rank, "energy": energy, "budget": budget, "ranks": ranks}
    plan = plan_adapter(base, tuned, form, rule=rule, norms=norms, allow_pickle=allow_pickle)
    return plan.write(folder)


def plan_adapter(
    base: str,
    tuned: str,
    form: Form,
    *,
    rule: dict[str, Any],
    norms: bool = False,
    allow_pickle: bool = False,
) -> AdapterPlan:
    """What extract_adapter is to write; raises as it does.

    rule: of its arguments rank, energy, budget and ranks the one that is given, by name.
    """
    rank, energy, budget, ranks = map(rule.get, ("rank", "energy", "budget", "ranks"))
    given = sum(value is not None for value in (rank, energy, budget, ranks))
    require(given == 1, "give one of rank=16, energy=0.9, budget=1_000_000 and ranks={...}")
    pair = open_pair(base, tuned, allow_pickle=allow_pickle)
    places = find_places(pair.base.config, pair.base.shapes).renamed(pair.names)
    require(bool(places.linear), f"{tuned} has no linear layer that a LoRA can adapt")
    shapes = [pair.shape(name) for name in places.linear]
    require_rule(map(min, shapes), shapes, rank=rank, energy=energy, budget=budget)
    if rank is None and ranks is None:
        table = compare_pair(pair)  # a budget goes to what can be written, a classifier's head too
        layers = table[table["name"].isin(places.linear)].assign(kind="matrix")
        ranks = recommend_ranks(layers, energy=energy, budget=budget)
    chosen, rest = _sorted_out(pair, places, rank, ranks)
    saved = _whole_norms(places, rest) if norms else []
    return AdapterPlan(pair, places, chosen, saved, rest, form)


def _sorted_out(
    pair: Pair, places: Places, rank: int | None, ranks: dict | None
) -> tuple[dict[str, int], dict[str, float]]:
    """Of what changed: the ranks of linear layers, and |dW|^2 of what gets no factors."""
    tuned, limits = pair.tuned.folder.name, {n: min(pair.shape(n)) for n in places.linear}
    wanted = ranks_of(ranks, limits) if ranks else dict.fromkeys(limits, rank or 0)
    changed = _changed(pair)
    chosen = {n: min(limits[n], wanted[n]) for n in changed if wanted.get(n)}
    require(bool(chosen), f"no linear layer of {tuned} gets a rank: there is nothing to write")
    return chosen, {name: squared_difference(pair, name) for name in changed if name not in chosen}


def _changed(pair: Pair) -> list[str]:
    """The tensors of which an entry differs, each read no further than where one does."""

    def differs(name: str) -> bool:
        parts = (W1 - W0 for W0, W1 in pair.parts(name))
        return any(any(map(float, part.aminmax())) for part in parts if part.numel())

    found = zip(pair.names, by_core(differs, pair.names), strict=True)
    return [name for name, different in found if different]


def _whole_norms(places: Places, changed: Iterable[str]) -> list[str]:
    """All tensors of the norms of which one changed: PEFT saves modules, known by their ends."""
    norms = {name: place.rpartition(".")[0] for name, place in places.norms.items()}
    modules = tuple({norms[name] for name in changed if name in norms})
    return [name for name, module in norms.items() if module.endswith(modules)]


_memory = threading.local()  # a thread's last update: fresh memory costs as much as the reading


@dataclass(frozen=True)
class AdapterPlan:
    """What goes into an adapter of a pair, and where."""

    pair: Pair
    places: Places  # of the tuned file's tensors
    ranks: dict[str, int]  # of the linear weights that get factors
    saved: list[str]  # tensors of norms, kept whole
    rest: dict[str, float]  # |dW|^2 of what changed and gets no factors
    form: Form

    def modules(self) -> dict[str, str]:
        """{module of the model: its weight in the tuned file} of what gets factors."""
        return {self.places.linear[name].removesuffix(".weight"): name for name in self.ranks}

    def factors(self) -> Factors:
        """The factors of the modules."""
        modules = self.modules()
        shapes = {m: self._out_and_in(name) for m, name in modules.items()}
        return Factors(shapes, {m: self.ranks[name] for m, name in modules.items()}, self.form)

    def _out_and_in(self, name: str) -> tuple[int, int]:
        """The shape of a matrix as PEFT has it: Conv1D stores it turned."""
        m, n = self.pair.shape(name)
        return (n, m) if name in self.places.conv1d else (m, n)

    def config(self) -> dict:
        """The adapter's adapter_config.json."""
        modules = {self.places.norms[name].rpartition(".")[0] for name in self.saved}
        return lora_config(
            self.factors().arguments(),
            task_type="CAUSAL_LM" if self.pair.is_causal() else None,
            fan_in_fan_out=not self.places.conv1d.isdisjoint(self.ranks),
            modules_to_save=sorted(modules) or None,
            base_model_name_or_path=self.pair.base.source,
        )

    def write(self, folder: Path) -> pd.DataFrame:
        """Write the folder, whole or not at all; return the table of extract_adapter."""
        factors, modules = self.factors(), self.modules()
        tuned = self.pair.tuned
        notes: dict[str, dict[str, float]] = {}
        made = factors.tensors(lambda module: self.factorise(modules[module]), notes)
        whole = (tuned.read(name) for name in self.saved)
        at = {name: f"{PREFIX}{self.places.norms[name]}" for name in self.saved}
        layout = {at[name]: (torch.float32, tuned.shapes[name]) for name in self.saved}
        tensors = itertools.chain(made, whole)
        write_adapter(folder, self.config(), factors.layout() | layout, tensors)
        return self.report(notes)

    def report(self, notes: dict[str, dict[str, float]]) -> pd.DataFrame:
        """The table of extract_adapter, from what Factors notes of each module."""
        rest = {name: (self.part(name), norm) for name, norm in self.rest.items()}
        return self.factors().report(notes, self.modules(), rest)

    def part(self, name: str) -> str:
        """What becomes of a tensor that changed and gets no factors."""
        if name in self.saved:
            return "modules_to_save"
        if name in self.places.norms:
            return "left_out"
        return "not_chosen" if name in self.places.linear else "dropped"

    def factorise(self, name: str) -> Cut:
        """B, A and what they hold of one matrix."""
        m, n = self.pair.shape(name)
        dW = self.update(name)
        X = dW if m >= n else dW.T  # (long, small)
        gram, scale = gram_matrix(X), 1.0
        if not 1e-12 < float(gram.trace()) < 1e12:  # squares that under- or overflow
            scale = self.largest(name, dW)
            gram = gram_matrix(X.div_(scale))
        V, best = leading_eigenvectors(gram, self.ranks[name], tolerance=SHORTFALL)
        long = X @ V  # (long, r)
        norm, held = (float(x.double().sum()) for x in (gram.diagonal(), long.square().sum(0)))
        found = {"squared_norm": norm * scale**2, "kept": held / norm, "best": best / norm}
        long.mul_(scale)
        B, A = (long, V.T) if (m >= n) != (name in self.places.conv1d) else (V, long.T)  # (out, in)
        return B, A, found

    def update(self, name: str) -> Tensor:
        """dW of one matrix as stored, in memory that the thread's next one takes over."""
        m, n = self.pair.shape(name)
        if getattr(_memory, "size", 0) < m * n:
            _memory.size, _memory.tensor = m * n, torch.empty(m * n, device=device())
        dW, long, start = _memory.tensor[: m * n].view(m, n), int(m < n), 0
        for W0, W1 in self.pair.parts(name):
            part = dW.narrow(long, start, W1.shape[long])
            start += W1.shape[long]
            if torch.float64 in (W0.dtype, W1.dtype):
                part.copy_(W1.double() - W0.double())
            else:
                part.copy_(W1).sub_(W0.to(part.device))
        return dW

    def largest(self, name: str, dW: Tensor) -> float:
        """max |dW|; raises ValueError for NaN or infinite weights and what float32 cannot hold."""
        found = max_abs(dW)
        if not math.isfinite(found):
            list(differences(self.pair, name, None))  # names the file
        require_float32(found, name)
        return float(found)
