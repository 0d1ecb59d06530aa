"""A LoRA on disk: its folder read and checked, its factors, their scales and their spectra."""

from __future__ import annotations

import functools
import math
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pandas as pd
from torch import Tensor

from deltarank.checkpoints import (
    FLOATS,
    Checkpoint,
    download,
    folder_and_name,
    last_checkpoint,
    layer_and_module,
    model_source,
    read_header,
    read_json,
)
from deltarank.checks import all_finite, first_line, listed, require
from deltarank.compare import require_float32
from deltarank.factors import PREFIX
from deltarank.peft_format import CONFIG, WEIGHTS
from deltarank.ranks import require_rule
from deltarank.runtime import by_core, device, progress
from deltarank.spectra import factor_singular_values, spectrum_measures

Number = TypeVar("Number", int, float)

PICKLE = "adapter_model.bin"
FACTOR = re.compile(rf"(?:{re.escape(PREFIX)})?(.+)\.lora_(embedding_)?([AB])(?:\.(weight|bias))?")
BASE = ".base_layer.weight"  # the end of a base model's own weight; biases there are trained
MERGE = "merge it (merge_and_unload), then give BASE and TUNED"  # what helps where factors do not
VARIANTS = {  # fields of LoraConfig by which the update is another than scale * B @ A
    "use_dora": "DoRA",
    "use_bdlora": "BD-LoRA",
    "use_qalora": "QALoRA",
    "alora_invocation_tokens": "aLoRA",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
    "layer_replication": "LoRA of replicated layers",
    "target_parameters": "LoRA of parameters",
}
STARTS = (None, True, False, "gaussian", "eva", "orthogonal")  # that leave the base as it is


@dataclass(frozen=True)
class LoraMatrix:
    """A matrix that a LoRA adapts: dW = scale * B @ A, turned where the weight is stored so."""

    module: str  # of the base model
    A: str  # tensors of the file: (r, in) and (out, r)
    B: str
    bias: str | None  # of B, where lora_bias trained one
    rank: int
    scale: float
    turned: bool  # the weight is stored as (in, out)
    kind: str  # "matrix" or, of an embedding, "vocabulary"


@dataclass(frozen=True)
class Lora:
    """An adapter of PEFT whose updates are scale * B @ A; its headers are read, not its tensors."""

    checkpoint: Checkpoint  # config: its adapter_config.json
    matrices: dict[str, LoraMatrix]  # by the name of the weight

    def shape(self, name: str) -> tuple[int, int]:
        """(out, in) of the update of a matrix."""
        matrix, shapes = self.matrices[name], self.checkpoint.shapes
        return shapes[matrix.B][0], shapes[matrix.A][1]

    def require_rule(self, **rule) -> None:
        """Raise ValueError, before factors are read, for a rule that gives its matrices nothing."""
        names = [name for name, matrix in self.matrices.items() if matrix.kind == "matrix"]
        shapes = [self.shape(name) for name in names]
        if names:
            limits = (self.matrices[name].rank for name in names)
            require_rule(map(min, limits, *zip(*shapes, strict=True)), shapes, **rule)

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """scale * B (out, r) and A (r, in), float64, on the device."""
        matrix = self.matrices[name]
        B, A = (self._read(tensor) for tensor in (matrix.B, matrix.A))
        return B * matrix.scale, A

    def _read(self, tensor: str) -> Tensor:
        """A tensor as float64; raises ValueError for NaN and infinite entries."""
        W, file = self.checkpoint.read(tensor), self.checkpoint.files[tensor]
        told = f"{folder_and_name(file)}: {tensor} holds NaN or infinite values; train it again"
        require(all_finite(W), told)
        return W.to(device()).double()

    def biases(self) -> dict[str, float]:
        """{bias: |update|^2} of the biases that lora_bias trained: no LoRA of ours holds them."""
        return {
            f"{matrix.module}.bias": float((matrix.scale * self._read(matrix.bias)).square().sum())
            for matrix in self.matrices.values()
            if matrix.bias
        }

    def spectra(self) -> pd.DataFrame:
        """One line a matrix of its update, with the columns of compare_checkpoints that apply.

        S has no more entries than the factors' rank; lora_rank and scale are those of the
        factors.  NaN is what needs the base (relative_size, rounding_share, near_rounding) or
        compares with noise of full rank (above_edge, r90_over_null).  attrs as there.
        """
        rows = []
        with progress(len(self.matrices), "read adapter") as bar:
            for row in by_core(self._row, self.matrices):
                rows.append(row)
                bar.update(1)
        table = pd.DataFrame(rows)
        table.attrs = {"rest": self.biases(), "only_base": [], "only_tuned": [], "added_rows": {}}
        return table

    def _row(self, name: str) -> dict:
        """The line of one matrix."""
        matrix, (rows, columns) = self.matrices[name], self.shape(name)
        S = factor_singular_values(*self.factors(name)).cpu()  # (r,)
        if S.any():
            require_float32(S[0].float(), name, cure="train the adapter again, or lower its alpha")
        layer, module = layer_and_module(name)
        shape = (columns, rows) if matrix.turned else (rows, columns)
        row = {"name": name, "layer": layer, "module": module, "kind": matrix.kind}
        row |= {"shape": shape, "S": S.float(), "dtype_tuned": self.checkpoint.dtypes[matrix.B]}
        row |= {"lora_rank": matrix.rank, "scale": matrix.scale, "relative_size": math.nan}
        row |= spectrum_measures(S.float(), shape)
        unknown = ("rounding_share", "near_rounding", "above_edge", "r90_over_null")
        return row | dict.fromkeys(unknown, math.nan)  # a LoRA's own rank is all that noise has


def open_lora(adapter: str, *, allow_pickle: bool = False) -> Lora:
    """The LoRA in a local folder or of a hub id (downloaded).

    Raises ValueError or FileNotFoundError that names the thing and the cure for a model in place
    of an adapter, other tuners, variants whose update is not scale * B @ A (DoRA), starts that
    changed the base (PiSSA), and factors that PEFT could not load.  Warns of what is kept whole
    (modules_to_save, biases): what it changed is not told without the base.
    """
    folder = _adapter_folder(adapter, allow_pickle)
    config = read_json(folder / CONFIG)
    _require_plain(adapter, config)
    file = _weight_file(folder, allow_pickle)
    header = read_header(file)
    dtypes = {name: dtype for name, (dtype, _) in header.items()}
    shapes = {name: shape for name, (_, shape) in header.items()}
    checkpoint = Checkpoint(adapter, folder, config, dict.fromkeys(header, file), shapes, dtypes)
    modules, whole = _by_module(checkpoint)
    require(bool(modules), f"{adapter} holds no factors of a LoRA: save it again")
    if whole:
        first = listed([name.removeprefix(PREFIX) for name in whole], most=1)
        left = f"{adapter} keeps {first} whole, not as factors: left out"
        cure = f"to have those of layers, {MERGE}; copy those of the vocabulary"
        warnings.warn(f"{left} and in no total; {cure}", stacklevel=3)
    found = [_matrix(checkpoint, module, parts) for module, parts in modules.items()]
    return Lora(checkpoint, {f"{matrix.module}.weight": matrix for matrix in found})


def _adapter_folder(adapter: str, allow_pickle: bool) -> Path:
    """The folder of an adapter, downloaded if it is a hub id; ValueError if it holds none."""
    folder = Path(adapter).expanduser()
    if not folder.is_dir():
        folder = download(model_source(adapter), [CONFIG, WEIGHTS] + [PICKLE] * allow_pickle)
    told = "give BASE and TUNED (and OUT to extract), or one adapter" + last_checkpoint(folder)
    require((folder / CONFIG).exists(), f"{adapter} is no adapter (it has no {CONFIG}): {told}")
    return folder


def _require_plain(adapter: str, config: dict) -> None:
    """Raise ValueError for an adapter whose update is not scale * B @ A on an unchanged base."""
    tuner, start = config.get("peft_type"), config.get("init_lora_weights")
    require(tuner == "LORA", f"{adapter} is no LoRA but of type {tuner}: {MERGE}")
    for field, name in VARIANTS.items():
        asked = f"{adapter} is a {name} ({field}), whose update is not its factors' product"
        require(not config.get(field), f"{asked}: {MERGE}")
    require(start in STARTS, f"{adapter} was started by {start}, which changes the base: {MERGE}")


def _weight_file(folder: Path, allow_pickle: bool) -> Path:
    """The file of the factors; a pickle only where it is allowed."""
    for name in (WEIGHTS, PICKLE) if allow_pickle else (WEIGHTS,):
        if (folder / name).exists():
            return folder / name
    require(
        not (folder / PICKLE).exists(),
        f"{folder.name} holds a pickle ({PICKLE}), which can run code when it is read: save it as "
        "safetensors, or pass allow_pickle=True if you trust it",
    )
    raise FileNotFoundError(f"{folder.name} holds no {WEIGHTS}: save the adapter there")


def _by_module(checkpoint: Checkpoint) -> tuple[dict[str, dict[str, str]], list[str]]:
    """The tensors of each module by part ("A", "B", "bias", ...), and those that are no factors.

    Not BASE, which PEFT saves beside the factors of an embedding: a LoRA leaves it as it was.
    """
    modules: dict[str, dict[str, str]] = {}
    whole = []
    for name in checkpoint.shapes:
        if match := FACTOR.fullmatch(name):
            module, embedding, side, suffix = match.groups()
            part = "bias" if suffix == "bias" else f"{embedding or ''}{side}"
            modules.setdefault(module, {})[part] = name
        else:
            strange = f"{checkpoint.source}: {name} is no factor of a plain LoRA"
            require(".lora_" not in name, f"{strange}: {MERGE}")
            whole += [name] * (not name.endswith(BASE))
    return modules, whole


def _matrix(checkpoint: Checkpoint, module: str, parts: dict[str, str]) -> LoraMatrix:
    """What a module's tensors and the config say of it; ValueError where they disagree."""
    source, embedding = checkpoint.source, "embedding_A" in parts or "embedding_B" in parts
    names = [f"{'embedding_' if embedding else ''}{side}" for side in "AB"]
    lacks = [name for name in names if name not in parts]
    require(not lacks, f"{source}: {module} has no lora_{', '.join(lacks)}: save it again")
    A, B = (parts[name] for name in names)
    shapes = checkpoint.shapes[A], checkpoint.shapes[B]
    for tensor, shape in zip((A, B), shapes, strict=True):
        empty = f"{source}: {tensor} is empty, {shape}: save it again, its shards gathered"
        require(len(shape) != 1 and 0 not in shape, empty)
        require(len(shape) == 2, f"{source}: {tensor} is no matrix but {shape}: {MERGE}")
        dtype = checkpoint.dtypes[tensor]
        require(dtype in FLOATS, f"{source}: {tensor} is stored as {dtype}: save it as float32")
    rank, scale = _rank_and_scale(checkpoint.config, module)
    held = shapes[0][0], shapes[1][1]
    require(
        held == (rank, rank),
        f"{source}: {module} has factors of rank {' and '.join(map(str, sorted({*held})))}, "
        f"{CONFIG} says {rank}: correct r or rank_pattern there",
    )
    turned = embedding or bool(checkpoint.config.get("fan_in_fan_out"))
    kind = "vocabulary" if embedding else "matrix"
    return LoraMatrix(module, A, B, parts.get("bias"), rank, scale, turned, kind)


def _rank_and_scale(config: dict, module: str) -> tuple[int, float]:
    """r and alpha / r, or alpha / sqrt(r) of rsLoRA, as PEFT has them for a module.

    Raises ValueError for a pattern that is no regular expression, and for what is no such number.
    """
    ranks, alphas = (config.get(f"{of}_pattern") or {} for of in ("rank", "alpha"))
    try:
        r = int(pattern_value(ranks, module, config.get("r", 8)))
        alpha = float(pattern_value(alphas, module, config.get("lora_alpha", 8)))
        require(r >= 0 and math.isfinite(alpha), f"they are {r} and {alpha}")
    except (re.error, TypeError, AttributeError, ValueError, OverflowError) as error:
        told = f"{CONFIG}: the rank or alpha of {module} cannot be read ({first_line(error)})"
        raise ValueError(f"{told}: correct r, lora_alpha or their patterns") from error
    return r, alpha / (math.sqrt(r) if config.get("use_rslora") else r) if r else 0.0


def pattern_value(pattern: dict[str, Number], module: str, default: Number) -> Number:
    """What PEFT reads of a rank_pattern or alpha_pattern for a module.

    A key is a regular expression that the whole name or its end after a dot matches; the first
    that does counts, and without one the default.

    >>> pattern_value({"[qk]_proj": 4, "q_proj": 2}, "h.0.q_proj", 8)
    4
    """
    keys = (key for key in pattern if _ending(key).match(module))
    return pattern.get(next(keys, module), default)


@functools.lru_cache(maxsize=2**16)  # re keeps 512: an adapter may have a key for every expert
def _ending(key: str) -> re.Pattern:
    """The names that a key of a pattern is for."""
    return re.compile(rf"(.*\.)?({key})$")
