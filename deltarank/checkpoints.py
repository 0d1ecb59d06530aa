"""A folder of weights: its headers read and checked, its tensors on demand."""

from __future__ import annotations

import functools
import json
import re
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from deltarank.checks import first_line, require

# What names tell; the rest is known by its shape.
VOCABULARY = re.compile(r"(embed|wte|wpe|shared|lm_head|decoder|cls|score|classifier|qa_outputs)")
EXPERT = re.compile(r"\bexperts\.|\.(gate|router)\.(\w+\.)?weight$")  # also what chooses them
EMBEDDING = re.compile(r"embed|_emb\.|\b(wte|wpe|shared)\.|relative_attention_bias")
BUFFER = re.compile(r"(inv_freq|masked_bias|(position|token_type)_ids|final_logits_bias)$")
STORED = {  # types as safetensors names them
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.bool: "BOOL",
}
FLOATS = {name for dtype, name in STORED.items() if dtype.is_floating_point}


def layer_and_module(name: str) -> tuple[int, str]:
    """Layer number (-1 outside of the layers) and module of a parameter name.

    >>> layer_and_module("model.layers.3.self_attn.q_proj.weight")
    (3, 'q_proj')
    """
    layer = re.search(r"\.(\d+)\.", name)
    return int(layer.group(1)) if layer else -1, name.removesuffix(".weight").split(".")[-1]


def is_vocabulary(name: str) -> bool:
    """Whether a tensor is outside the layers and has a row for each word or class."""
    return layer_and_module(name)[0] < 0 and VOCABULARY.search(name) is not None


def is_linear_weight(name: str) -> bool:
    """Whether a 2-D tensor is, by its name, the weight of a linear layer: no norm, no embedding."""
    plain = name.endswith(".weight") and EMBEDDING.search(name) is None
    return plain and "norm" not in layer_and_module(name)[1]


def model_source(name: str) -> str:
    """What from_pretrained loads for `name`; a path that is no model folder is an error."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").exists():
            _require_no_adapter(name, folder)
            told = f"{name} is not a model folder: it has no config.json"
            raise ValueError(f"{told}{last_checkpoint(folder)}")
        return str(folder)
    require(not folder.is_file(), f"{name} is a file: give the folder that holds it")
    if folder.is_absolute() or name.count("/") != 1 or folder.parent.is_dir():
        raise ValueError(f"model {name!r} is unknown; choose a folder or a hub id")
    return name


def last_checkpoint(folder: Path) -> str:
    """What to give in place of a trainer's output folder, in words; "" where there is nothing."""
    found = [path.name for path in folder.glob("checkpoint-*") if path.name[11:].isdecimal()]
    last = max(found, key=lambda name: int(name[11:]), default="")
    return f"; it has {last}: give that" if last else ""


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
    config = read_json(folder / "config.json")
    quantised = config.get("quantization_config")
    require(not quantised, f"{source} is quantised: dequantise it, then compare")
    files, shapes, dtypes = {}, {}, {}
    for file in _weight_files(folder, allow_pickle):
        for name, (dtype, shape) in read_header(file).items():
            if _is_buffer(name, dtype, shape):
                continue
            told = f"{source}: {name} is"
            require(dtype in FLOATS, f"{told} stored as {dtype}: dequantise it, then compare")
            require(name not in files, f"{told} in two files; delete the stale one")
            files[name], dtypes[name], shapes[name] = file, dtype, shape
    require(bool(files), f"{source} holds no weights")
    return Checkpoint(loaded, folder, config, files, shapes, dtypes)


def _is_buffer(name: str, dtype: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is no weight but a mask, positions or what else training leaves alone."""
    mask = len(shape) == 4 and name.endswith(("bias", "mask"))  # GPT-2 calls its mask a bias
    counts = dtype in ("BOOL", "I64") or (dtype not in FLOATS and len(shape) < 2)
    return mask or counts or BUFFER.search(name) is not None


def _require_no_adapter(source: str, folder: Path) -> None:
    """Raise ValueError for the folder of an adapter in place of a model's."""
    adapter = (folder / "adapter_config.json").exists()
    cure = "inspect it alone, or merge it (merge_and_unload) and give the model"
    require(not adapter, f"{source} is an adapter, not a model: {cure}")


def folder_and_name(file: Path) -> str:
    """What a reader is told of a file.

    >>> folder_and_name(Path("models/tuned/config.json"))
    'tuned/config.json'
    """
    return f"{file.parent.name}/{file.name}"


def read_json(file: Path) -> dict:
    """What a JSON file says; raises FileNotFoundError or ValueError that names it."""
    where = folder_and_name(file)
    if not file.exists():
        raise FileNotFoundError(f"{where} is not there: fetch it again")
    try:
        record = json.loads(file.read_text(encoding="utf8"))
    except ValueError as error:
        raise ValueError(f"{where} is torn ({first_line(error)}): fetch it again") from error
    require(isinstance(record, dict), f"{where} is no JSON object: fetch it again")
    return record


def download(source: str, patterns: list[str]) -> Path:
    """The folder into which those files of a hub model were downloaded that match the patterns.

    Not its subfolders, nor what other programs read: onnx/, original/, consolidated.safetensors.
    """
    from huggingface_hub import snapshot_download

    _tell(f"{source}: no folder of this name here, so it is taken from the hub")
    try:
        others = ["*/*", "consolidated*"]
        return Path(snapshot_download(source, allow_patterns=patterns, ignore_patterns=others))
    except Exception as error:
        raise ValueError(f"{source!r} cannot be downloaded: {first_line(error)}") from error


@functools.lru_cache
def _tell(message: str) -> None:
    """Say something on stderr, once."""
    print(message, file=sys.stderr)


def _weight_files(folder: Path, allow_pickle: bool) -> list[Path]:
    """The weight files of a folder as from_pretrained chooses them: one, those of its index, all.

    Never a stray pickle.
    """
    for whole in ("model.safetensors", "pytorch_model.bin")[: 1 + allow_pickle]:
        files = {file.name: file for file in folder.glob(f"*{Path(whole).suffix}")}
        files.pop("training_args.bin", None)
        index = folder / f"{whole}.index.json"
        if whole in files:
            return [files[whole]]
        if index.exists():
            return _listed_files(index, files)
        if files:
            return [files[name] for name in sorted(files)]
    if list(folder.glob("*.bin")):
        raise ValueError(
            f"{folder.name} holds pickles (.bin), which can run code when they are read: convert "
            "it to safetensors, or pass allow_pickle=True if you trust it"
        )
    if list(folder.glob("*.gguf")):
        raise ValueError(f"{folder.name} holds a GGUF, which is quantised: give the safetensors")
    raise FileNotFoundError(f"{folder.name} holds no *.safetensors: save the model there")


def _listed_files(index: Path, files: dict[str, Path]) -> list[Path]:
    """Those of the files that an index lists; raises FileNotFoundError where one is missing."""
    where = folder_and_name(index)
    record = read_json(index)
    told = isinstance(record.get("weight_map"), dict)
    require(told, f"{where} has no weight_map: fetch it again")
    listed = sorted({str(name) for name in record["weight_map"].values()})
    missing = [name for name in listed if name not in files]
    if missing:
        raise FileNotFoundError(f"{missing[0]}, which {where} lists, is not there: fetch it again")
    return [files[name] for name in listed]


@functools.lru_cache(maxsize=2)
def _unpickle(file: Path) -> dict[str, Tensor]:
    """The tensors of a pickle, mapped where torch can; nothing but tensors is unpickled.

    Raises ValueError for what is no dictionary of tensors, without torch's advice to trust it.
    """
    mapped = zipfile.is_zipfile(file)  # torch before 1.6 wrote no zip
    where = folder_and_name(file)
    try:
        tensors = torch.load(file, map_location="cpu", mmap=mapped, weights_only=True)
    except Exception as error:  # a torn pickle may raise anything
        told = f"{where} is torn, or holds more than tensors"
        raise ValueError(f"{told}: fetch it again, or as safetensors") from error
    require(isinstance(tensors, dict), f"{where} holds no tensors by name: save it as safetensors")
    return {name: tensor.detach() for name, tensor in tensors.items() if isinstance(tensor, Tensor)}


def read_header(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of every tensor of a file, {name: (dtype, shape)}."""
    from safetensors import SafetensorError, safe_open

    where = folder_and_name(file)
    with open(file, "rb") as opened:
        start = opened.read(64)
    require(bool(start), f"{where} is empty (0 bytes): fetch it again")
    lfs = start.startswith(b"version https://git-lfs")
    require(not lfs, f"{where} is a git-lfs pointer, not weights: run `git lfs pull`")
    page = start.lstrip()[:1] == b"<" and 0 not in start[:8]  # where a header has its length
    require(not page, f"{where} is a web page, not weights: fetch it again")
    try:
        if file.suffix == ".bin":
            tensors = _unpickle(file).items()
            found = {n: (STORED.get(t.dtype, str(t.dtype)), tuple(t.shape)) for n, t in tensors}
        else:
            with safe_open(file, "pt") as opened:
                slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
                found = {n: (s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}
    except SafetensorError as error:
        raise ValueError(f"{where} is torn ({first_line(error)}): fetch it again") from error
    strange = [name for name in found if not name.isprintable()]  # a terminal would obey it
    require(not strange, f"{where} has a tensor named {strange[:1]}: rename it")
    return found
