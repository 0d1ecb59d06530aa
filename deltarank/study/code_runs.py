"""Code runs: what determines one, its key, and the model that it trains."""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deltarank.checks import require
from deltarank.runtime import profile_name
from deltarank.store import digest
from deltarank.study.codes import DIGIT_BITS, draw_codes
from deltarank.study.configs import KNOWN_VALUES, each_once, identity_fields
from deltarank.study.convert import GEMMA
from deltarank.study.losses import require_own_loss
from deltarank.study.models import load_model, matrices, model_sha256, skeleton
from deltarank.study.training import quiet_peft, require_rank
from deltarank.study.upper import decoder_layers
from deltarank.study.variants import lora_parameters

MEASUREMENT = 1  # raise it when a change alters what a run measures


@dataclass(frozen=True, kw_only=True)
class CodeRun:
    """Codes (see draw_codes) learned by some layers of a frozen model, and its `key` in the store.

    method "lora" trains rank-`rank` factors on the linear layers of `layers`, on those of
    `modules` only where some are named, scaled by alpha / rank; "full" trains all parameters of
    `layers`.  steps: at most, at the full rate (see memorize).  The seed draws the codes, the
    factors and the order of rows.  Raises ValueError, naming field and cure, for values that
    cannot run.
    """

    codes: int
    layers: tuple[int, ...]  # from 0 on; those below the first are passed through only once
    lr: float
    steps: int
    method: str = "lora"
    modules: tuple[str, ...] = ()
    rank: int = 0
    alpha: float = 0.0
    digits: int = 6  # a code
    model: str = GEMMA
    batch_size: int = 64  # codes a step, or all of them where there are fewer
    seed: int = 0
    dtype: str = "bfloat16"  # autocast type
    profile: str = dataclasses.field(default_factory=profile_name, metadata={"identity": False})

    def __post_init__(self) -> None:
        lora = self.method == "lora"
        rules = {
            "codes": (self.codes >= 2, "must be 2 or more"),
            "digits": (self.digits >= 1, "must be 1 or more"),
            "method": (self.method in ("lora", "full"), "unknown; choose one of lora, full"),
            "dtype": (
                self.dtype in KNOWN_VALUES["dtype"],
                f"unknown; choose one of {', '.join(KNOWN_VALUES['dtype'])}",
            ),
            "layers": (
                bool(self.layers) and each_once(self.layers) and self.layers[0] >= 0,
                "numbers from 0 on, each once, ascending, such as (14,)",
            ),
            "modules": (
                each_once(self.modules) and (lora or not self.modules),
                "only in lora: names, each once, ascending, such as ('q_proj',)",
            ),
            "rank": (
                self.rank >= 1 if lora else self.rank == 0,
                f"a {self.method} run needs {'1 or more' if lora else '0'}",
            ),
            "alpha": (
                0 < self.alpha < math.inf if lora else self.alpha == 0,
                "must be above 0, such as 32" if lora else "only in lora",
            ),
            "lr": (0 < self.lr < math.inf, "must be above 0, such as 3e-3"),
            "steps": (self.steps >= 1, "must be 1 or more"),
            "batch_size": (self.batch_size >= 1, "must be 1 or more"),
        }
        for field, (holds, cure) in rules.items():
            require(holds, f"{field}={getattr(self, field)!r}: {cure}")

    @property
    def bits(self) -> float:
        """What the codes hold."""
        return self.codes * self.digits * DIGIT_BITS

    @property
    def recipe(self) -> dict:
        """The fields that determine the run, by name."""
        return identity_fields(self)

    @property
    def identity(self) -> dict:
        """The recipe, the hashes of codes and model, and the version of what is measured."""
        return self.recipe | {
            "codes_sha256": _codes_sha256(self.codes, self.digits, self.seed),
            "model_sha256": model_sha256(self.model),
            "measurement": MEASUREMENT,
        }

    @property
    def key(self) -> str:
        """The run's name: readable parts, then 12 hex digits of the hash of its identity."""
        parts = ["codes", self.method] + ([f"r{self.rank}"] if self.rank else [])
        parts += [f"l{len(self.layers)}", f"n{self.codes}", f"s{self.seed}"]
        return "-".join([*parts, digest(self.identity)[:12]])


@functools.lru_cache
def _codes_sha256(count: int, digits: int, seed: int) -> str:
    """The sha256 of the codes themselves: another Python may draw others by the same seed."""
    return digest({"rows": draw_codes(count, digits, seed)})


def code_matrices(config: CodeRun, model: nn.Module) -> dict[str, Tensor]:
    """The matrices that a run trains or adapts, by parameter name: of its layers and modules.

    Raises ValueError as `matrices` does, and for a rank above the smallest of them.
    """
    found = matrices(model, layers=config.layers, modules=config.modules)
    require_rank(config.rank, found)
    return found


def code_parameters(config: CodeRun) -> int:
    """How many numbers a run trains, told by the shapes of its model.

    Raises as code_matrices does.
    """
    model = skeleton(config.model)
    adapted = code_matrices(config, model)
    if config.method == "lora":
        return sum(lora_parameters(len(W), W.shape[1], config.rank) for W in adapted.values())
    layers = decoder_layers(model)
    return sum(p.numel() for i in config.layers for p in layers[i].parameters())


def code_model(config: CodeRun) -> nn.Module:
    """The model of a run, of which only what the run trains has gradients.

    Raises ValueError as code_matrices does, and for a model whose loss is not ours.
    """
    from peft import LoraConfig, get_peft_model

    model = load_model(config.model)
    names = [name.removesuffix(".weight") for name in code_matrices(config, model)]
    require_own_loss(model)
    model.set_attn_implementation("eager")  # for rows so short a seventh faster than sdpa
    model.requires_grad_(False)
    if config.method == "full":
        for i in config.layers:
            decoder_layers(model)[i].requires_grad_(True)
        return model
    torch.manual_seed(config.seed)
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # PEFT says int, any number will do
        target_modules=names,
    )
    with quiet_peft():
        return get_peft_model(model, lora)
