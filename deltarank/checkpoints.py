"""Two folders of weights: headers read, tensors aligned, slices streamed."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import pickle
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from deltarank.checks import first_line, require

# On disk a vocabulary matrix is known by its name, the rest by its shape.
VOCABULARY = re.compile(r"(embed|wte|wpe|shared|lm_head|decoder|cls|score|classifier|qa_outputs)")
CAUSAL = re.compile(r"CausalLM|(?<!With)LMHeadModel")  # LlamaForCausalLM, GPT2LMHeadModel
FLOATS = {"F64", "F32", "F16", "BF16"}
SLICE_ENTRIES = 2**21  # of a matrix, read at once; larger buffers cost more than they save


def layer_and_module(name: str) -> tuple[int, str]:
    """Layer number and module of a parameter name.

    >>> layer_and_module("model.layers.3.self_attn.q_proj.weight")
    (3, 'q_proj')
    """
    layer = re.search(r"\.(\d+)\.", name)
    return int(layer.group(1)) if layer else -1, name.removesuffix(".weight").split(".")[-1]


def model_source(name: str) -> str:
    """What from_pretrained loads for `name`; a path that is no model folder is an error."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise ValueError(f"{name} is not a model folder: it has no config.json")
        return str(folder)
    if folder.is_absolute() or name.count("/") != 1 or folder.parent.is_dir():
        raise ValueError(f"model {name!r} is unknown; choose a folder or a hub id")
    return name


@dataclass(frozen=True)
class Checkpoint:
    """A folder of weights: its headers are read, its tensors are not."""

    source: str  # what from_pretrained loads: the folder or a hub id
    folder: Path
    config: dict  # its config.json
    files: dict[str, Path]  # the file that holds each tensor
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]  # as safetensors names them: F32, BF16, ...

    def read(self, name: str, *index: slice | int) -> Tensor:
        """A tensor, or the part of it that `index` picks, as stored; nothing stays in memory."""
        file = self.files[name]
        if file.suffix == ".bin":
            return _unpickle(file)[name][index].clone()
        from safetensors import safe_open

        with safe_open(file, "pt") as opened:
            return opened.get_slice(name)[index] if index else opened.get_tensor(name)


def open_checkpoint(source: str, *, allow_pickle: bool = False) -> Checkpoint:
    """The checkpoint in a local folder or of a hub id (downloaded).

    Reads headers only.  Raises ValueError or FileNotFoundError that names the file, the tensor
    and the cure for whatever cannot be compared: pickles unless `allow_pickle` (they can run code
    when read), torn, empty or missing files, quantised weights, an adapter in place of a model.
    """
    _require_no_adapter(source, Path(source).expanduser())
    loaded = model_source(source)
    folder = Path(loaded)
    if not folder.is_dir():
        folder = download(source, ["*.safetensors", "*.json"] + ["*.bin"] * allow_pickle)
        _require_no_adapter(source, folder)
    config = read_config(folder / "config.json")
    quantised = config.get("quantization_config")
    require(not quantised, f"{source} is quantised: dequantise it, then compare")
    files, shapes, dtypes = {}, {}, {}
    for file in _weight_files(folder, allow_pickle):
        for name, (dtype, shape) in read_header(file).items():
            require(name not in files, f"{source}: {name} is in two files; delete the stale one")
            files[name], dtypes[name], shapes[name] = file, dtype, shape
    for name in [n for n in files if dtypes[n] not in FLOATS]:
        stored_whole = dtypes[name].startswith(("F8", "I8", "U8", "F4")) and len(shapes[name]) > 1
        require(
            not stored_whole or "bias" in name,  # GPT-2 keeps its causal mask as a "bias"
            f"{source}: {name} is stored as {dtypes[name]}: dequantise it, then compare",
        )
        del files[name], shapes[name], dtypes[name]  # masks and positions are no weights
    require(bool(files), f"{source} holds no weights")
    return Checkpoint(loaded, folder, config, files, shapes, dtypes)


def _require_no_adapter(source: str, folder: Path) -> None:
    """Raise ValueError for the folder of an adapter in place of a model's."""
    adapter = (folder / "adapter_config.json").exists()
    cure = "inspect it alone, or merge it (merge_and_unload) and give the model"
    require(not adapter, f"{source} is an adapter, not a model: {cure}")


def read_config(file: Path) -> dict:
    """What a config file says; raises FileNotFoundError or ValueError that names it."""
    where = f"{file.parent.name}/{file.name}"
    if not file.exists():
        raise FileNotFoundError(f"{where} is not there: fetch it again")
    try:
        config = json.loads(file.read_text(encoding="utf8"))
    except ValueError as error:
        raise ValueError(f"{where} is torn ({first_line(error)}): fetch it again") from error
    require(isinstance(config, dict), f"{where} is no JSON object: fetch it again")
    return config


def download(source: str, patterns: list[str]) -> Path:
    """The folder into which those files of a hub model were downloaded that match the patterns."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=patterns))
    except Exception as error:
        raise ValueError(f"{source!r} cannot be downloaded: {first_line(error)}") from error


def _weight_files(folder: Path, allow_pickle: bool) -> list[Path]:
    """The weight files of a folder: those that its index lists, or all; never a stray pickle."""
    for pattern in ("*.safetensors", "*.bin") if allow_pickle else ("*.safetensors",):
        indices = list(folder.glob(f"{pattern}.index.json"))
        found = {file.name for file in folder.glob(pattern)} - {"training_args.bin"}
        if indices:
            listed = json.loads(indices[0].read_text(encoding="utf8"))["weight_map"]
            missing = sorted(set(listed.values()) - found)
            if missing:
                raise FileNotFoundError(
                    f"{folder.name}: {missing[0]} is listed in {indices[0].name} but is not there; "
                    "fetch it again"
                )
            found = set(listed.values())
        if found:
            return [folder / name for name in sorted(found)]
    if list(folder.glob("*.bin")):
        raise ValueError(
            f"{folder.name} holds pickles (.bin), which can run code when they are read: convert "
            "it to safetensors, or pass allow_pickle=True if you trust it"
        )
    raise FileNotFoundError(f"{folder.name} holds no *.safetensors: save the model there")


@functools.lru_cache(maxsize=2)
def _unpickle(file: Path) -> dict[str, Tensor]:
    """The tensors of a pickle, mapped rather than read; nothing but tensors is unpickled."""
    tensors = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)}


def read_header(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of every tensor of a file, {name: (dtype, shape)}."""
    from safetensors import SafetensorError, safe_open

    where = f"{file.parent.name}/{file.name}"
    with open(file, "rb") as opened:
        start = opened.read(64)
    require(bool(start), f"{where} is empty (0 bytes): fetch it again")
    lfs = start.startswith(b"version https://git-lfs")
    require(not lfs, f"{where} is a git-lfs pointer, not weights: run `git lfs pull`")
    require(start.lstrip()[:1] != b"<", f"{where} is a web page, not weights: fetch it again")
    try:
        if file.suffix == ".bin":
            short = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16"}
            short[torch.bfloat16] = "BF16"
            tensors = _unpickle(file).items()
            return {n: (short.get(t.dtype, str(t.dtype)), tuple(t.shape)) for n, t in tensors}
        with safe_open(file, "pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {n: (s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}
    except (SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{where} is torn ({first_line(error)}): fetch it again") from error


@dataclass(frozen=True)
class Pair:
    """Base and tuned checkpoint, aligned tensor by tensor."""

    base: Checkpoint
    tuned: Checkpoint
    names: dict[str, str]  # tensor in tuned -> the same in base
    only_base: list[str]  # heads and poolers that one side lacks
    only_tuned: list[str]

    def matrices(self) -> dict[str, tuple[str, int | None]]:
        """What has a spectrum, {label: (tensor in tuned, expert)}: 2-D, experts of a 3-D one."""
        found: dict[str, tuple[str, int | None]] = {}
        for name in self.names:
            shape = self.tuned.shapes[name]
            entries = math.prod(shape)
            if len(shape) == 2 and entries:
                found[name] = (name, None)
            elif len(shape) == 3 and entries and "conv" not in name:
                found |= {f"{name}[{i}]": (name, i) for i in range(shape[0])}
        return found

    def is_causal(self) -> bool:
        """Whether the base continues text, which PEFT wants to be told."""
        return any(map(CAUSAL.search, self.base.config.get("architectures") or []))

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape that both sides have: for a resized vocabulary, of its common rows."""
        shapes = self.base.shapes[self.names[name]], self.tuned.shapes[name]
        return tuple(map(min, *shapes)) if shapes[0] else ()

    def parts(self, name: str, expert: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield W0 and W1 slice by slice along the longer side, as stored, 2 M entries each."""
        shape = self.shape(name)
        if len(shape) < 2 or math.prod(shape) == 0:
            yield self.base.read(self.names[name]), self.tuned.read(name)
            return
        m, n = shape[-2:]
        lead = [slice(0, size) for size in shape[:-2]] if expert is None else [expert]
        long, step = max(m, n), max(1, SLICE_ENTRIES // (math.prod(shape[:-2]) * min(m, n)))
        for start in range(0, long, step):
            cut = slice(start, min(start + step, long))
            index = (*lead, cut, slice(0, n)) if m >= n else (*lead, slice(0, m), cut)
            yield self.base.read(self.names[name], *index), self.tuned.read(name, *index)


def open_pair(base: str, tuned: str, *, allow_pickle: bool = False) -> Pair:
    """Both checkpoints, aligned by name; everything that headers can tell is checked here.

    One side's names may carry a prefix ("transformer."), a tied head may be missing on one side,
    a vocabulary may have grown.  Raises ValueError naming tensor and both shapes otherwise.
    """
    W0, W1 = (open_checkpoint(source, allow_pickle=allow_pickle) for source in (base, tuned))
    W0, W1 = _without_tied_heads(W0, W1), _without_tied_heads(W1, W0)
    names = common_names(W0.files, W1.files)
    only_base = sorted(set(W0.files) - set(names.values()))
    only_tuned = sorted(set(W1.files) - set(names))
    require(bool(names), f"{base} and {tuned} have no tensor in common: another architecture?")
    for side, other, alone in ((base, tuned, only_base), (tuned, base, only_tuned)):
        deep = [name for name in alone if layer_and_module(name)[0] >= 0]
        require(
            not deep,
            f"{side} has {', '.join(deep[:1])} and {other} has not ({len(deep)} such tensors): "
            f"is {tuned} a fine-tune of {base}?",
        )
    pair = Pair(W0, W1, names, only_base, only_tuned)
    for name, of_base in names.items():
        before, after = W0.shapes[of_base], W1.shapes[name]
        grown = len(before) == len(after) == 2 and before[1:] == after[1:]
        require(
            before == after or (grown and VOCABULARY.search(name) is not None),
            f"{name} has shape {before} in {base} ({W0.files[of_base].name}) and {after} in "
            f"{tuned} ({W1.files[name].name}): is {tuned} a fine-tune of {base}?",
        )
    return pair


def _without_tied_heads(checkpoint: Checkpoint, other: Checkpoint) -> Checkpoint:
    """Without the head that is only another name of the embedding and that `other` leaves out."""
    heads = [n for n in checkpoint.files if n.endswith("lm_head.weight") and n not in other.files]
    if not heads or not other.config.get("tie_word_embeddings", True):
        return checkpoint
    files = {name: file for name, file in checkpoint.files.items() if name not in heads}
    return dataclasses.replace(checkpoint, files=files)


def common_names(base: Iterable[str], tuned: Iterable[str]) -> dict[str, str]:
    """{tensor in tuned: the same in base}; one side's names may carry a prefix.

    >>> common_names(["h.0.w", "lm_head.w"], ["model.h.0.w", "lm_head.w"])
    {'model.h.0.w': 'h.0.w', 'lm_head.w': 'lm_head.w'}
    """
    base, tuned = dict.fromkeys(base), list(tuned)
    prefixes = {"": None} | {f"{name.split('.')[0]}.": None for name in [*base, *tuned]}

    def matched(prefix: str) -> dict[str, str]:
        forms = {name: (name, name.removeprefix(prefix), prefix + name) for name in tuned}
        found = {name: [form for form in three if form in base] for name, three in forms.items()}
        return {name: present[0] for name, present in found.items() if present}

    return max(map(matched, prefixes), key=len)
