"""Ranks to a PEFT folder: the cut of a pair, written whole or not at all."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from deltarank.checkpoints import Pair, open_pair
from deltarank.checks import require, require_disk
from deltarank.compare import compare_checkpoints, difference, differences, require_float32
from deltarank.gram import gram_matrix, leading_eigenvectors
from deltarank.peft_format import (
    Places,
    find_places,
    lora_config,
    require_replaceable,
    write_adapter,
)
from deltarank.ranks import lora_arguments, rank_of, recommend_ranks
from deltarank.runtime import by_core, device, progress

SHORTFALL = 1e-3  # share of the squared update by which an adapter may miss the best of its rank


def extract_adapter(
    base: str,
    tuned: str,
    out: str,
    *,
    rank: int | None = None,
    energy: float | None = None,
    ranks: dict | None = None,
    allow_pickle: bool = False,
) -> pd.DataFrame:
    """Write the cut of tuned - base as a PEFT adapter: the folder `out`, whole or not at all.

    rank: one for all matrices (a smaller matrix gets all it has); energy: as in recommend_ranks;
    ranks: what that returned.  Linear layers become LoRA factors of scale 1; norms that changed go
    into modules_to_save; the rest cannot be part of a LoRA and is dropped.  All is float32.

    Returns one line a changed tensor: name, part ("lora", "modules_to_save", "dropped"), rank,
    squared_norm, kept (the share of it that the adapter holds), best (the most that its rank can
    hold); attrs["lora"]: the arguments of LoraConfig.  An adapter that `out` holds is replaced.
    Raises as open_pair and find_places, ValueError for a bad rank and, before any work,
    FileExistsError for a folder that is there and is no adapter.
    """
    given = sum(value is not None for value in (rank, energy, ranks))
    require(given == 1, "give one of rank=16, energy=0.9 and ranks=recommend_ranks(...)")
    folder = Path(out).expanduser().resolve()
    require_replaceable(folder)
    pair = open_pair(base, tuned, allow_pickle=allow_pickle)
    places = find_places(pair.base.config, pair.base.shapes).renamed(pair.names)
    if energy is not None:
        table = compare_checkpoints(base, tuned, allow_pickle=allow_pickle)
        ranks = recommend_ranks(table, energy=energy)
    plan = _plan(pair, places, rank, ranks)
    return _adapter_report(plan, plan.write(folder))


def _plan(pair: Pair, places: Places, rank: int | None, ranks: dict | None) -> AdapterPlan:
    """What changed, sorted into factors, whole norms and the rest."""
    tuned, limits = pair.tuned.folder.name, {n: min(pair.shape(n)) for n in places.linear}
    require(bool(limits), f"{tuned} has no linear layer that a LoRA can adapt")
    most = max(limits.values())
    require(rank is None or 1 <= rank <= most, f"rank={rank}: choose one from 1 to {most}")
    wanted = {name: rank_of(ranks, name) if ranks else rank or 0 for name in limits}
    changed = _changed(pair)
    chosen = {n: min(limits[n], wanted[n]) for n in changed if wanted.get(n)}
    require(bool(chosen), f"no linear layer of {tuned} gets a rank: there is nothing to write")
    rest = {name: difference(pair, name) for name in changed if name not in chosen}
    return AdapterPlan(pair, places, chosen, _whole_norms(places, rest), rest)


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


def _adapter_report(plan: AdapterPlan, factors: dict[str, dict]) -> pd.DataFrame:
    """The table that extract_adapter returns."""
    rows = [{"name": n, "part": "lora", "rank": plan.ranks[n]} | f for n, f in factors.items()]
    for name, norm in plan.rest.items():
        part, whole = ("modules_to_save", 1.0) if name in plan.saved else ("dropped", 0.0)
        row = {"name": name, "part": part, "rank": 0, "squared_norm": norm}
        rows.append(row | {"kept": whole, "best": whole})
    report = pd.DataFrame(rows)
    report.attrs["lora"] = plan.arguments()
    return report


_memory = threading.local()  # a thread's last update: fresh memory costs as much as the reading


@dataclass(frozen=True)
class AdapterPlan:
    """What goes into an adapter, and where."""

    pair: Pair
    places: Places  # of the tuned file's tensors
    ranks: dict[str, int]  # of the linear weights that get factors
    saved: list[str]  # tensors of norms, kept whole
    rest: dict[str, float]  # |dW|^2 of what changed and gets no factors

    def arguments(self) -> dict:
        """The arguments of LoraConfig that say where the factors go."""
        return lora_arguments({self.places.linear[name]: r for name, r in self.ranks.items()})

    def config(self) -> dict:
        """The adapter's adapter_config.json."""
        modules = {self.places.norms[name].rpartition(".")[0] for name in self.saved}
        return lora_config(
            self.arguments(),
            task_type="CAUSAL_LM" if self.pair.is_causal() else None,
            fan_in_fan_out=not self.places.conv1d.isdisjoint(self.ranks),
            modules_to_save=sorted(modules) or None,
            base_model_name_or_path=str(self.pair.base.folder),
        )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name in the adapter's file and shape of every tensor, in the order they are made."""
        shapes: dict[str, tuple[int, ...]] = {}
        for name, r in self.ranks.items():
            rows, columns = self.pair.shape(name)[:: -1 if name in self.places.conv1d else 1]
            module = f"base_model.model.{self.places.linear[name].removesuffix('.weight')}"
            shapes |= {f"{module}.lora_A.weight": (r, columns)}
            shapes |= {f"{module}.lora_B.weight": (rows, r)}
        at = {name: f"base_model.model.{self.places.norms[name]}" for name in self.saved}
        return shapes | {at[name]: self.pair.tuned.shapes[name] for name in self.saved}

    def tensors(self, factors: dict[str, dict]) -> Iterator[Tensor]:
        """Yield the tensors; note in `factors` the squared_norm, kept and best of each matrix."""
        sizes = {name: math.prod(self.pair.shape(name)) for name in self.ranks}
        with progress(sum(sizes.values()), "extract adapter") as bar:
            found = by_core(self.factorise, self.ranks)
            for name, (A, B, factors[name]) in zip(self.ranks, found, strict=True):
                yield A
                yield B
                bar.update(sizes[name])
        yield from (self.pair.tuned.read(name) for name in self.saved)

    def factorise(self, name: str) -> tuple[Tensor, Tensor, dict[str, float]]:
        """A, B and what they hold of one matrix."""
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
        return A, B, found

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
        found = torch.stack(dW.aminmax()).abs().max()
        if not math.isfinite(found):
            list(differences(self.pair, name, None))  # names the file
        require_float32(found, name)
        return float(found)

    def write(self, folder: Path) -> dict[str, dict]:
        """Write the folder, whole or not at all; return what `tensors` notes."""
        shapes = self.shapes()
        factors: dict[str, dict] = {}
        require_disk(folder.parent, 4e-9 * sum(map(math.prod, shapes.values())))
        write_adapter(folder, self.config(), shapes, self.tensors(factors))
        return factors
