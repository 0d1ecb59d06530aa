"""The models under study: loaded in float32, refused where weights are missing."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deltarank.checkpoints import download, layer_and_module, model_source
from deltarank.checks import all_finite, first_line, require
from deltarank.runtime import device, memory
from deltarank.store import digest, file_sha256
from deltarank.study.convert import EMBEDDED, embedded_folder

if TYPE_CHECKING:  # transformers is imported where it loads
    from transformers import PreTrainedTokenizerBase

LONGEST = 2048  # tokens of a row of a reader's own
KINDS = ("safetensors", "json", "model", "txt")  # of files that say what a model computes
TINY = "tiny-gemma3"  # two random layers of the same architecture, for tests


@functools.lru_cache
def model_sha256(name: str) -> str:
    """What identifies the weights: file hashes of a folder, the revision of a hub model.

    Of an embedded model and of the tiny one the name: what is embedded has its own sha256 checked
    when it is converted, the code determines the other.
    """
    if name in (*EMBEDDED, TINY):
        return digest({"name": name})
    source = Path(model_source(name))
    if not source.is_dir():
        folder = download(name, ["config.json"])  # named by the commit; without a network, the last
        return digest({"name": name, "revision": folder.name})
    files = sorted(file for kind in KINDS for file in source.glob(f"*.{kind}"))
    return digest({file.name: file_sha256(file) for file in files})


def _source(name: str) -> str:
    """What from_pretrained loads for `name`; raises ValueError for one that is no model."""
    try:
        return str(embedded_folder(name)) if name in EMBEDDED else model_source(name)
    except ValueError as error:
        more = f", or {' or '.join(EMBEDDED)}" if "choose" in str(error) else ""
        raise ValueError(f"{error}{more}") from error


def load_model(name: str) -> nn.Module:
    """The causal language model `name` with float32 weights, on the device there is.

    name: "gemma-3-270m" or "smollm2-135m" (embedded), "tiny-gemma3" (random, for tests), a local
    folder with safetensors, or a hub id.  Raises ValueError for an unknown name, missing or
    unexpected weights, and NaN or infinite ones, naming the tensor.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    if name == TINY:
        return _tiny_model().to(device())
    source = _source(name)
    with quiet_transformers():
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=torch.float32,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # so that they are reported by name, and refused
            )
        except (OSError, RuntimeError, ValueError, SafetensorError) as error:
            raise ValueError(f"model {name!r} cannot be loaded: {first_line(error)}") from error
    model, report = loaded  # a pair, by output_loading_info
    wrong = {k: sorted(map(str, v)) for k, v in report.items() if v}
    if wrong:
        raise ValueError(f"{name}: the weights do not match the architecture: {wrong}")
    for tensor_name, tensor in model.state_dict().items():
        if not all_finite(tensor):
            raise ValueError(f"{name}: {tensor_name} holds NaN or infinite values; repair it")
    return model.to(device())


@functools.lru_cache
def skeleton(name: str) -> nn.Module:
    """The model `name` without weights, on the meta device: the names and shapes of what it has."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        if name == TINY:
            return _tiny_model()
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(_source(name)))


def _tiny_model() -> nn.Module:
    """A random Gemma-3-shaped model of two layers over bytes, the same at every call."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        layer_types=["sliding_attention", "full_attention"],
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Gemma3ForCausalLM(config)


@functools.lru_cache
def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of model `name`; bytes for the tiny model.  Raises as load_model does."""
    from transformers import AutoTokenizer, ByT5Tokenizer

    if name == TINY:
        return ByT5Tokenizer()
    source = _source(name)
    try:
        return AutoTokenizer.from_pretrained(source)
    except Exception as error:  # tokenizers raises none that is narrower
        cure = "loaded: save it beside the model (tokenizer.save_pretrained)"
        if not Path(source).is_dir():
            cure = "downloaded: check the name and the network"
        told = first_line(error).rstrip(":")
        raise ValueError(f"the tokenizer of {name!r} cannot be {cure}; {told}") from error


def require_short(name: str, lengths: Sequence[int], texts: Sequence[str]) -> None:
    """Raise ValueError for a text of more tokens than LONGEST or than model `name` has places for.

    lengths: the tokens of each text, or of the row that begins with it.
    """
    config = skeleton(name).config.get_text_config()
    most = min(LONGEST, getattr(config, "max_position_embeddings", None) or LONGEST)
    tokens, text = max(zip(lengths, texts, strict=True))
    told = f"a row has {tokens:,} tokens, {name} takes {most:,} here: shorten it"
    require(tokens <= most, f"{told}: {text[:60]!r}")


def require_memory(name: str, *, cure: str, models: int = 1, answers: int = 0) -> None:
    """Raise ValueError where as many models of the size of `name` do not fit into the memory.

    answers: the tokens of a batch whose logits training holds beside them.
    """
    model = skeleton(name)
    numbers = models * sum(parameter.numel() for parameter in model.parameters())
    numbers += answers * len(model.get_output_embeddings().weight)
    needed, there = 4 * numbers / 1e9, memory() / 1e9  # 4 bytes a number, in float32
    logits = f", with the logits of {answers:,} tokens" if answers else ""
    told = f"{name} takes {needed:.2g} GB of memory (in float32, {models} at once{logits})"
    require(needed <= there, f"{told}, there are {there:.2g}: {cure}")


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep loading bars out of notebook outputs."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def matrices(
    model: nn.Module, *, layers: Sequence[int] = (), modules: Sequence[str] = ()
) -> dict[str, Tensor]:
    """The weight matrices under study, by parameter name: every linear layer but the head.

    Only those of `layers` and of `modules`, such as ("q_proj",), where some are named.  GPT-2's
    Conv1D is a linear layer too; it stores its matrix as (in, out).  Raises ValueError for a layer
    or module that the model lacks, naming those it has.
    """
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    found = {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }
    places = {name: layer_and_module(name) for name in found}
    known = sorted({layer for layer, _ in places.values()})
    has = f"the model has layers {known[0]} to {known[-1]}"
    require(set(layers).issubset(known), f"layers={tuple(layers)}: {has}")
    names = sorted({module for _, module in places.values()})
    cure = f"choose from {', '.join(names)}"
    require(set(modules).issubset(names), f"modules={tuple(modules)}: {cure}")
    return {
        name: weight
        for name, weight in found.items()
        if places[name][0] in (layers or known) and places[name][1] in (modules or names)
    }
