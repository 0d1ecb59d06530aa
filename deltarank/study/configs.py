"""Configurations: everything that determines one run, and its name in the store."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltarank.checks import require
from deltarank.runtime import profile_name
from deltarank.store import digest
from deltarank.study.convert import GEMMA
from deltarank.study.models import model_sha256
from deltarank.study.tasks import CHOICES, is_task, task_sha256

# Raise by one when a change alters what a run measures, as tests/study/test_golden.py shows: it
# holds the numbers of a small run of each method, and every stored run is then computed again.
MEASUREMENT = 2
GROWTH_ROWS = 64  # held-out rows scored in the midst of training
OWN_OPTIMIZERS = ("muon", "sign", "sgd_momentum")  # beside those of transformers
# Other adapters of PEFT's (see variants), those of them that have a scale, and those with a knob.
VARIANTS = ("dora", "hira", "loraplus", "miss", "oft", "pissa", "randlora", "shira", "vera")
SCALED = ("lora", "dora", "loraplus", "pissa", "randlora")
FACTORED = ("lora", "loraplus", "tinylora")  # whose update is a product B A of low rank
KNOBS = {"loraplus": "its ratio of rates, such as 16", "vera": "the first values of d, such as 0.1"}
KNOWN_VALUES = {
    "method": ("base", "full", "lora", "tinylora", *VARIANTS),
    "schedule": ("linear", "constant"),
    "optimizer": ("adamw_torch_fused", "sgd", *OWN_OPTIMIZERS),
    "dtype": ("bfloat16", "float32"),
}


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that determines one run, its `key` in the store, and whose store that is.

    method "base" is the untuned model (steps 0), "full" trains every parameter (the embedding, and
    a head tied to it, only with `train_embedding`), "lora" trains rank-`rank` factors of every
    linear layer, scaled by alpha / rank, or by alpha / sqrt(rank) with `rslora`.  "tinylora" trains
    `vector` numbers in all (arXiv 2602.04118, as in PEFT): it adds B R A to a matrix, where B A is
    the base weight cut to rank `rank`, and R (rank, rank) the sum of fixed random matrices, each
    times its number.  VARIANTS are other adapters, whose `rank` is what their size goes by.
    `layers` and `modules` say which linear layers have the adapter.  `dtype` is the autocast type
    of forward and backward passes (see product_dtype); master weights and deltas are float32.
    `profile` says in whose store results go, and is no part of what is run.
    Raises ValueError, naming field and cure, for values that cannot run.
    """

    task: str
    method: str = "full"
    model: str = GEMMA
    rank: int = 0
    alpha: float = 0.0
    rslora: bool = False
    rank_pattern: tuple[tuple[str, int], ...] = ()  # LoRA ranks that differ from `rank`, by module
    layers: tuple[int, ...] = ()  # that carry the adapter, from 0 on; (): all of them
    modules: tuple[str, ...] = ()  # that carry it, such as ("q_proj",); (): every linear layer
    vector: int = 0  # how many numbers a TinyLoRA trains; its matrices share them
    knob: float = 0.0  # of the methods in KNOBS
    lr: float = 0.0
    schedule: str = "linear"  # decay to zero
    warmup: float = 0.0  # share of the steps in which the rate first rises from zero
    max_grad_norm: float = 1.0  # a longer gradient is clipped to this norm
    steps: int = 0
    batch_size: int = 16
    seq_len: int = 48
    optimizer: str = "adamw_torch_fused"
    weight_decay: float = 0.0
    train_embedding: bool = False
    permuted: bool = False  # trained on the answers of other rows: form without skill
    seed: int = 0
    dtype: str = "bfloat16"
    compile: bool = True
    eval_rows: int = 256
    generate_rows: int = 64
    profile: str = dataclasses.field(default_factory=profile_name, metadata={"identity": False})

    def __post_init__(self) -> None:
        trained = self.method != "base"
        own = self.task.endswith(".jsonl") and Path(self.task).expanduser().exists()
        known = KNOWN_VALUES.copy()
        if self.method == "loraplus":
            known |= {"optimizer": ("adamw_torch_fused",)}
        rules = {
            field: (getattr(self, field) in values, f"unknown; choose one of {', '.join(values)}")
            for field, values in known.items()
        }
        for field in ("batch_size", "seq_len", "eval_rows"):
            rules[field] = (getattr(self, field) >= 1, "must be 1 or more")
        rules |= {
            "task": (own or is_task(self.task), f"unknown; {CHOICES}"),
            "steps": (
                self.steps >= 1 if trained else self.steps == 0,
                f"a {self.method} run needs {'1 or more' if trained else '0'}",
            ),
            "lr": (not trained or 0 < self.lr < math.inf, "must be above 0, such as 5e-5"),
            "train_embedding": (not self.train_embedding or self.method == "full", "only in full"),
            "permuted": (trained or not self.permuted, "only in runs that train"),
            "warmup": (0 <= self.warmup < 1, "must be 0 or more and below 1, such as 0.1"),
            "max_grad_norm": (0 < self.max_grad_norm < math.inf, "must be above 0, such as 1"),
            "generate_rows": (self.generate_rows >= 0, "must be 0 or more"),
            "weight_decay": (0 <= self.weight_decay < math.inf, "must be 0 or more"),
        }
        rules |= self._adapter_rules()
        for field in (f.name for f in dataclasses.fields(self) if f.type == "int"):
            if not float(getattr(self, field)).is_integer():
                rules[field] = (False, "must be a whole number")
        for field, (holds, cure) in rules.items():
            require(holds, f"{field}={getattr(self, field)!r}: {cure}")

    def _adapter_rules(self) -> dict[str, tuple[bool, str]]:
        """Of each field of an adapter whether its value can run, and the cure."""
        lora, tiny, adapter = self.method == "lora", self.method == "tinylora", self.adapter
        scaled, knob = self.method in SCALED, KNOBS.get(self.method, "")
        return {
            "rank": (
                self.rank >= 1 if adapter else self.rank == 0,
                f"a {self.method} run needs {'1 or more' if adapter else '0'}",
            ),
            "alpha": (
                0 < self.alpha < math.inf if scaled else self.alpha == 0,
                "must be above 0, such as 32" if scaled else f"only in {', '.join(SCALED)}",
            ),
            "knob": (
                0 < self.knob < math.inf if knob else self.knob == 0,
                f"must be above 0: {knob}" if knob else f"only in {', '.join(KNOBS)}",
            ),
            "rslora": (lora or not self.rslora, "only in lora"),
            "rank_pattern": (lora or not self.rank_pattern, "only in lora"),
            "layers": (
                (adapter or not self.layers)
                and each_once(self.layers)
                and min(self.layers, default=0) >= 0,
                "only in adapters: numbers from 0 on, each once, ascending, such as (3, 9)",
            ),
            "modules": (
                (adapter or not self.modules) and each_once(self.modules),
                "only in adapters: names, each once, ascending, such as ('q_proj',)",
            ),
            "vector": (
                self.vector >= 1 if tiny else self.vector == 0,
                f"a {self.method} run needs {'1 or more' if tiny else '0'}",
            ),
        }

    @property
    def adapter(self) -> bool:
        """Whether a run trains an adapter on frozen weights."""
        return self.method not in ("base", "full")

    @property
    def recipe(self) -> dict:
        """The fields that determine the run, by name."""
        return identity_fields(self)

    @property
    def identity(self) -> dict:
        """The fields that differ from their defaults, the hashes of data and model, the version.

        Defaults are left out, so that a new field does not rename the runs of before.
        """
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        changed = {k: v for k, v in self.recipe.items() if v != defaults[k]}
        return changed | {
            "task_sha256": task_sha256(self.task),
            "model_sha256": model_sha256(self.model),
            "measurement": MEASUREMENT,
        }

    @property
    def scale(self) -> float:
        """What a LoRA's B @ A is multiplied by; 0 in other runs."""
        if self.method != "lora":
            return 0.0
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def growth_steps(self) -> set[int]:
        """The steps after which the update of a full run with a skill is measured on the way."""
        parts = {self.steps // 16, self.steps // 8, self.steps // 4, self.steps // 2}
        return parts - {0} if self.method == "full" and not self.permuted else set()

    @property
    def key(self) -> str:
        """The run's name: readable parts, then 12 hex digits of the hash of its identity."""
        parts = [Path(self.task).stem, self.method] + ([f"r{self.rank}"] if self.rank else [])
        parts += ["permuted"] if self.permuted else []
        return "-".join([*parts, f"s{self.seed}", digest(self.identity)[:12]])


def identity_fields(config: Any) -> dict:
    """The fields of a configuration by name, but for those that say they are no part of it.

    Numbers are of one type however they were written, so that alpha 32 and 32.0 have one key.
    """
    fields = [f for f in dataclasses.fields(config) if f.metadata.get("identity", True)]
    given = {f.name: getattr(config, f.name) for f in fields}
    kinds = {"float": float, "int": int}  # NumPy has its own
    return given | {f.name: kinds[f.type](given[f.name]) for f in fields if f.type in kinds}


def each_once(values: tuple) -> bool:
    """Whether these are in order and each once, so that one choice has one key."""
    return values == tuple(sorted(set(values)))
