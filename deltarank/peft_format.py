"""The PEFT folder: names, config and tensors of an adapter's files, without PEFT."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from deltarank.checkpoints import EMBEDDING, EXPERT, STORED, is_linear_weight, layer_and_module
from deltarank.checks import require, require_disk, require_writable

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
CARD = "README.md"  # which PEFT begins and its reader may have written
WRITER = {"writer": "deltarank"}  # in the metadata of WEIGHTS
Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # a file's tensors: name, type and shape

# What the names of tensors and config.json say of a language model, as transformers builds it.
CONV1D = {"decision_transformer", "gpt2", "imagegpt", "openai-gpt"}  # model types with Conv1D
CONV1D_MODULES = {"c_attn", "c_fc", "c_proj", "q_attn"}
PREFIXES = {  # of the modules of a model with a head, and the model types; a file may leave it out
    "transformer": "bloom codegen ctrl falcon gpt2 gpt_bigcode gpt_neo gptj mpt openai-gpt xlnet",
    "model": "bart bigbird_pegasus blenderbot blenderbot-small cohere cohere2 deepseek_v2 "
    "deepseek_v3 gemma gemma2 gemma3_text glm glm4 gpt_oss granite granitemoe internlm3 llama "
    "m2m_100 marian mbart mistral mixtral modernbert modernbert-decoder olmo olmo2 olmo3 olmoe "
    "opt pegasus phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe smollm3 stablelm starcoder2 "
    "whisper xglm",
    "backbone": "falcon_mamba mamba mamba2 xlstm",
    "albert": "albert",
    "bert": "bert big_bird megatron-bert",
    "biogpt": "biogpt",
    "deberta": "deberta deberta-v2",
    "distilbert": "distilbert",
    "electra": "electra",
    "ernie": "ernie",
    "gpt_neox": "gpt_neox",
    "mobilebert": "mobilebert",
    "roberta": "camembert roberta xlm-roberta xlm-roberta-xl xmod",
    "": "longt5 mt5 switch_transformers t5 umt5",
}
PREFIX = {kind: prefix for prefix, kinds in PREFIXES.items() for kind in kinds.split()}
ROOTS = {"blocks", "decoder", "embeddings", "encoder", "h", "layer", "layers"}  # without a prefix
HEADED = re.compile(r"For[A-Z]|Head|MTModel")  # in the name of an architecture that has a head
HEAD = re.compile(r"cls\.|\w*(classif|head|logits|predictions|qa_outputs|score|vocab_)")
RENAMED = (  # model types whose modules have other names than the tensors of their files
    "axk1 axk2 bailing_hybrid beit deepseek_v4 dory exaone glm5_next glm5_next_text "
    "gradium_phonon_tts gte hrm_text hy_v3 hy_v4 hy_v4_vl_text ibert inkling2_loop_text "
    "inkling2_text jina_embeddings_v3 kimi_linear kolibri1 laguna lara_mini mistral_large4_text "
    "molmo2_text nemotron_h nomic_bert olmo_hybrid sarvam_moe shieldgemma2 t5gemma2 "
    "tipsv2_text_model ultrabert"
)
LANGUAGE = "model.language_model."  # the part of a model of several that an adapter is for


@dataclass(frozen=True)
class Places:
    """Which tensors of a file an adapter can hold, and what the base model calls them."""

    linear: dict[str, str]  # weight of a linear layer -> parameter of the model
    conv1d: set[str]  # those of them that are stored as (in, out)
    norms: dict[str, str]  # tensors of modules that hold nothing but vectors -> parameter

    def renamed(self, names: dict[str, str]) -> Places:
        """The places of another file, {tensor there: the same here}."""
        linear, norms = (
            {there: found[here] for there, here in names.items() if here in found}
            for found in (self.linear, self.norms)
        )
        return Places(linear, {n for n in linear if names[n] in self.conv1d}, norms)


def find_places(config: dict, shapes: dict[str, tuple[int, ...]]) -> Places:
    """The places of a base model's tensors, told by its config.json and its tensors' shapes.

    A linear layer has a 2-D weight and is no embedding, head of the vocabulary, router or expert.
    Raises ValueError where the names of a file do not tell those of the model's modules.
    """
    kind, shapes = config.get("model_type", ""), _language_model(config, shapes)
    removed, added = _prefixes(config["architectures"][0], kind, shapes)
    heads = _vocabulary_sizes(config, shapes)

    def place(name: str) -> str:
        bare = name.removeprefix(removed)
        return bare if HEAD.match(bare) else added + bare

    linear = {n: place(n) for n, shape in shapes.items() if _is_linear(n, shape, heads)}
    conv1d = {n for n in linear if kind in CONV1D and layer_and_module(n)[1] in CONV1D_MODULES}
    return Places(linear, conv1d, {n: place(n) for n in _norms(shapes)})


def _language_model(config: dict, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The tensors of the language model; ValueError if its modules may be named otherwise."""
    kind = config.get("model_type", "")
    named = config.get("architectures")
    told = isinstance(named, list) and bool(named) and isinstance(named[0], str)
    require(told, f"config.json{kind and f' of {kind}'} names no architecture in a list")
    inner = [part for key, part in config.items() if key.endswith("_config")]
    if any(isinstance(part, dict) and part.get("model_type") for part in inner):
        shapes = {name: shape for name, shape in shapes.items() if name.startswith(LANGUAGE)}
    else:
        require("vocab_size" in config, f"{kind} is no language model: no adapter can be written")
    told = bool(shapes) and kind not in RENAMED.split()
    require(told, f"the modules of {kind} are not named as in its file: no adapter can be written")
    return shapes


def _prefixes(architecture: str, kind: str, names: Iterable[str]) -> tuple[str, str]:
    """What to take from and to put before the names of a file, to have those of the model."""
    roots = {name.partition(".")[0] for name in names}
    if not HEADED.search(architecture):
        extra = roots & {PREFIX.get(kind, "model"), kind.replace("-", "_")}
        return (f"{extra.pop()}.", "") if extra else ("", "")
    prefix = PREFIX.get(kind)
    if not roots & ROOTS or prefix == "" or prefix in roots:
        return "", ""
    require(
        bool(prefix) and not (prefix == "model" and "QuestionAnswering" in architecture),
        f"the tensors lack the prefix that {architecture} gives them: load the base with "
        "transformers and save it again",
    )
    return "", f"{prefix}."


def _vocabulary_sizes(config: dict, shapes: dict[str, tuple[int, ...]]) -> set[int]:
    """How many rows an output head can have: config.json's, and those of the largest embedding."""
    rows = [shape[0] for n, shape in shapes.items() if EMBEDDING.search(n) and len(shape) == 2]
    return {config.get("vocab_size", 0), max(rows, default=0)}


def _is_linear(name: str, shape: tuple[int, ...], heads: set[int]) -> bool:
    """Whether a tensor is the weight of a linear layer that PEFT can adapt."""
    if len(shape) != 2 or not is_linear_weight(name) or EXPERT.search(name):
        return False
    return layer_and_module(name)[0] >= 0 or shape[0] not in heads


def _norms(shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """Tensors of the modules that hold a 1-D weight and nothing else, or a 1-D bias beside it."""
    modules: dict[str, dict[str, int]] = {}
    for name, shape in shapes.items():
        module, _, parameter = name.rpartition(".")
        modules.setdefault(module, {})[parameter] = len(shape)
    norms = [m for m, held in modules.items() if held in ({"weight": 1}, {"weight": 1, "bias": 1})]
    return [f"{module}.{parameter}" for module in norms for parameter in modules[module]]


def lora_config(arguments: dict, **more) -> dict:
    """The adapter_config.json of a LoRA: `arguments` of lora_arguments, and more of LoraConfig."""
    fixed = {"peft_type": "LORA", "bias": "none", "lora_dropout": 0.0, "init_lora_weights": True}
    fixed |= {"use_dora": False, "use_rslora": False, "inference_mode": True}
    return fixed | arguments | more


def require_replaceable(folder: Path) -> None:
    """Raise FileExistsError for a folder that is there and is more than an adapter written here.

    One that is empty, as mkdir leaves it, is no more.  NotADirectoryError for one that cannot be
    made, since it would be inside of a file; OSError where nothing can be written beside it.
    """
    above = next(parent for parent in folder.parents if os.path.lexists(parent))
    if not above.is_dir():
        raise NotADirectoryError(f"{above} is no folder: name another place for {folder.name}")
    require_writable(above, str(folder), cure="name another folder")
    if not os.path.lexists(folder):
        return
    held = {file.name for file in folder.iterdir()} if folder.is_dir() else {""}
    if not held:
        return
    if CONFIG not in held or held - {CONFIG, WEIGHTS, CARD}:
        raise FileExistsError(f"{folder} exists and is no adapter: name another folder")
    if not _is_written_here(folder):
        told = f"{folder} holds an adapter without the mark of what deltarank writes"
        raise FileExistsError(f"{told}: name another folder, or delete it")


def _is_written_here(folder: Path) -> bool:
    """Whether write_adapter wrote the adapter of a folder."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / WEIGHTS, "pt") as opened:
            return WRITER.items() <= (opened.metadata() or {}).items()
    except (OSError, SafetensorError):
        return False


def write_adapter(folder: Path, config: dict, layout: Layout, tensors: Iterable[Tensor]) -> None:
    """Write config and tensors beside the folder, then rename: whole or not at all.

    An adapter that is there stays until the new one is complete, and its README.md after that.
    Raises FileExistsError as require_replaceable does, OSError where the disk is too full.
    """
    size = sum(dtype.itemsize * math.prod(shape) for dtype, shape in layout.values())
    require_disk(folder.parent, size / 1e9, cure="make room, or name another folder")
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        text = json.dumps(config, indent=2, sort_keys=True)
        (scratch / CONFIG).write_text(text, encoding="utf8")
        _write_safetensors(scratch / WEIGHTS, layout, tensors)
        scratch.chmod(0o755)
        _put_in_place(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _put_in_place(scratch: Path, folder: Path) -> None:
    """Rename scratch to folder; an adapter there goes aside, and comes back if that fails."""
    require_replaceable(folder)
    aside = scratch.with_name(f"{scratch.name}-old")
    if folder.exists():
        if (folder / CARD).exists():
            shutil.copy2(folder / CARD, scratch)
        os.rename(folder, aside)
    try:
        os.rename(scratch, folder)
    finally:
        if aside.exists() and not folder.exists():
            os.rename(aside, folder)
    shutil.rmtree(aside, ignore_errors=True)


def _write_safetensors(file: Path, layout: Layout, tensors: Iterable[Tensor]) -> None:
    """Write tensors of known types and shapes one by one, so that never all are in memory.

    The format: the header's length (8 bytes), the header (JSON), the tensors' bytes.
    """
    header: dict[str, dict] = {"__metadata__": {"format": "pt"} | WRITER}
    start = 0
    for name, (dtype, shape) in layout.items():
        end = start + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": STORED[dtype], "shape": shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        for (dtype, shape), tensor in zip(layout.values(), tensors, strict=True):
            require(tuple(tensor.shape) == shape, f"a tensor is {tuple(tensor.shape)}, not {shape}")
            held = tensor.to("cpu", dtype).clone(memory_format=torch.contiguous_format)
            opened.write(held.view(torch.uint8).numpy().data)  # NumPy has no bfloat16
        opened.flush()
        os.fsync(opened.fileno())
