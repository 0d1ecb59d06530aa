"""Ranks to a PEFT folder: the cut of a pair, written whole or not at all."""

from __future__ import annotations

import gc
import importlib
import json
import math
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from deltarank.checkpoints import Pair, common_names, open_pair
from deltarank.checks import require, require_disk
from deltarank.compare import compare_checkpoints, difference, differences, require_float32
from deltarank.gram import gram_matrix, leading_eigenvectors
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
    """Write the cut of tuned - base as a PEFT adapter into the new folder `out`.

    rank: one for all matrices (a smaller matrix gets all it has); energy: as in recommend_ranks;
    ranks: what that returned.  Linear layers become LoRA factors of scale 1; norms that changed go
    into modules_to_save; the rest cannot be part of a LoRA and is dropped.  All is float32.

    Returns one line a changed tensor: name, part ("lora", "modules_to_save", "dropped"), rank,
    squared_norm, kept (the share of it that the adapter holds), best (the most that its rank can
    hold); attrs["lora"]: the arguments of LoraConfig.  The folder appears whole or not at all.
    Raises as open_pair, ValueError for a bad rank, FileExistsError for a folder that is there.
    """
    given = sum(value is not None for value in (rank, energy, ranks))
    require(given == 1, "give one of rank=16, energy=0.9 and ranks=recommend_ranks(...)")
    if Path(out).expanduser().exists():
        raise FileExistsError(f"{out} exists: delete it or name another folder")
    pair = open_pair(base, tuned, allow_pickle=allow_pickle)
    places, transposed = _adaptable(pair)
    limit = max((min(pair.shape(name)) for name in transposed), default=0)
    require(rank is None or 1 <= rank <= limit, f"rank={rank}: choose one from 1 to {limit}")
    if energy is not None:
        table = compare_checkpoints(base, tuned, allow_pickle=allow_pickle)
        ranks = recommend_ranks(table, energy=energy)
    chosen = {n: rank_of(ranks, n) if ranks else min(rank, *pair.shape(n)) for n in transposed}
    changed = _changed(pair)
    chosen = {name: r for name, r in chosen.items() if r and name in changed}
    require(bool(chosen), f"no linear layer of {tuned} gets a rank: there is nothing to write")
    rest = {name: difference(pair, name) for name in changed if name not in chosen}
    saved = _whole_norms(places, transposed, rest)
    plan = AdapterPlan(pair, places, transposed, chosen, saved)
    return _adapter_report(plan, rest, plan.write(Path(out).expanduser()))


def _changed(pair: Pair) -> list[str]:
    """The tensors of which an entry differs, each read no further than where one does."""

    def differs(name: str) -> bool:
        parts = (W1 - W0 for W0, W1 in pair.parts(name))
        return any(any(map(float, part.aminmax())) for part in parts if part.numel())

    found = zip(pair.names, by_core(differs, pair.names), strict=True)
    return [name for name, different in found if different]


def _adapter_report(
    plan: AdapterPlan, rest: dict[str, float], factors: dict[str, dict]
) -> pd.DataFrame:
    """The table that extract_adapter returns."""
    rows = [{"name": n, "part": "lora", "rank": plan.ranks[n]} | f for n, f in factors.items()]
    for name, norm in rest.items():
        part, whole = ("modules_to_save", 1.0) if name in plan.saved else ("dropped", 0.0)
        row = {"name": name, "part": part, "rank": 0, "squared_norm": norm}
        rows.append(row | {"kept": whole, "best": whole})
    report = pd.DataFrame(rows)
    report.attrs["lora"] = plan.arguments()
    return report


def _import_peft() -> None:
    """Import peft and transformers without the garbage collector, in two thirds of the time.

    It would walk the half million objects that they bring again and again, and once more when
    the process ends; frozen, they are passed over.  Not where transformers is loaded: a model
    may be there that has yet to be collected.
    """
    if "transformers" in sys.modules or not gc.isenabled():
        return
    gc.disable()
    try:
        importlib.import_module("peft")
    finally:
        gc.enable()
    gc.freeze()


def _skeleton(folder: Path) -> nn.Module:
    """The model of a folder without memory for its weights, to know what kind each tensor is."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    name = (config.architectures or [""])[0]
    known = bool(name) and hasattr(transformers, name)
    require(known, f"{folder.name}: transformers has no {name!r}, so no adapter can be written")
    with torch.device("meta"):
        return getattr(transformers, name)(config)


def _adaptable(pair: Pair) -> tuple[dict[str, str], dict[str, bool]]:
    """What an adapter can hold: {tensor in tuned: parameter of the base model}, norms and linears.

    And of the linear layers' weights, whether they are stored as (in, out), as Conv1D does.
    """
    _import_peft()
    from transformers.pytorch_utils import Conv1D

    model = _skeleton(pair.base.folder)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    places, transposed = {}, {}
    for name, place in common_names(parameters, pair.names).items():
        module = model.get_submodule(place.rpartition(".")[0])
        if isinstance(module, nn.Linear | Conv1D):
            if module is not model.get_output_embeddings() and place.endswith(".weight"):
                places[name], transposed[name] = place, isinstance(module, Conv1D)
        elif all(p.dim() == 1 for p in module.parameters()):
            places[name] = place
    return places, transposed


def _whole_norms(
    places: dict[str, str], transposed: dict[str, bool], changed: Iterable[str]
) -> list[str]:
    """All tensors of the norms of which one changed: PEFT saves modules, not tensors."""
    norms = {n: place.rpartition(".")[0] for n, place in places.items() if n not in transposed}
    modules = {norms[name] for name in changed if name in norms}
    return [name for name, module in norms.items() if module in modules]


_memory = threading.local()  # a thread's last update: fresh memory costs as much as the reading


@dataclass(frozen=True)
class AdapterPlan:
    """What goes into an adapter, and where."""

    pair: Pair
    places: dict[str, str]  # tensor in tuned -> parameter of the base model
    transposed: dict[str, bool]  # linear weights: stored as (in, out)?
    ranks: dict[str, int]  # of the linear weights that get factors
    saved: list[str]  # norms, kept whole

    def arguments(self) -> dict:
        """The arguments of LoraConfig that say where the factors go."""
        return lora_arguments({self.places[name]: r for name, r in self.ranks.items()})

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name in the adapter's file and shape of every tensor, in the order they are made."""
        shapes = {}
        for name, r in self.ranks.items():
            rows, columns = self.pair.shape(name)[:: -1 if self.transposed[name] else 1]
            module = f"base_model.model.{self.places[name].removesuffix('.weight')}"
            shapes |= {f"{module}.lora_A.weight": (r, columns)}
            shapes |= {f"{module}.lora_B.weight": (rows, r)}
        at = {name: f"base_model.model.{self.places[name]}" for name in self.saved}
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
        B, A = (long, V.T) if (m >= n) != self.transposed[name] else (V, long.T)  # (out, in)
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
        """Write the folder beside its place, then rename it; return what `tensors` notes."""
        from peft import LoraConfig

        modules = {self.places[name].rpartition(".")[0] for name in self.saved}
        config = LoraConfig(
            **self.arguments(),
            task_type="CAUSAL_LM" if self.pair.is_causal() else None,
            fan_in_fan_out=any(self.transposed[name] for name in self.ranks),
            modules_to_save=sorted(modules) or None,
            base_model_name_or_path=str(self.pair.base.folder),
            inference_mode=True,
        )
        shapes, factors = self.shapes(), {}
        require_disk(folder.parent, 4e-9 * sum(map(math.prod, shapes.values())))
        scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
        try:
            config.save_pretrained(scratch)
            file = scratch / "adapter_model.safetensors"
            _write_safetensors(file, shapes, self.tensors(factors))
            scratch.chmod(0o755)
            os.rename(scratch, folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return factors


def _write_safetensors(
    file: Path, shapes: dict[str, tuple[int, ...]], tensors: Iterable[Tensor]
) -> None:
    """Write float32 tensors of known shapes one by one, so that never all are in memory.

    The format: the header's length (8 bytes), the header (JSON), the tensors' bytes.
    """
    header, start = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        end = start + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        for shape, tensor in zip(shapes.values(), tensors, strict=True):
            require(tuple(tensor.shape) == shape, f"a tensor is {tuple(tensor.shape)}, not {shape}")
            opened.write(tensor.float().cpu().contiguous().numpy().data)
        opened.flush()
        os.fsync(opened.fileno())
