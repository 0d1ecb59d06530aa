"""Variants: what PEFT is told of its other adapters, and how many numbers each trains."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from deltarank.study.configs import RunConfig

if TYPE_CHECKING:  # PEFT is imported where it trains
    from peft import PeftConfig


def variant_adapter(config: RunConfig, names: list[str]) -> PeftConfig:
    """What PEFT is told of one of VARIANTS on the modules of these names.

    All else is as each method's documentation has it.  HiRA multiplies a matrix, entry by entry, by
    a product of rank `rank`; MiSS repeats `rank` rows over the inputs; OFT turns blocks of `rank`
    inputs; RandLoRA adds random bases of rank `rank`, so that a lower one trains more; SHiRA trains
    as many scattered entries as a LoRA of the rank has; VeRA scales fixed factors of the rank.
    """
    import peft

    fixed = {"projection_prng_key": config.seed}
    scaled = {"r": config.rank, "lora_alpha": config.alpha}
    adapters: dict[str, tuple[Callable[..., PeftConfig], dict]] = {
        "dora": (peft.LoraConfig, scaled | {"use_dora": True}),
        "hira": (peft.HiraConfig, {"r": config.rank}),
        "loraplus": (peft.LoraConfig, scaled),
        "miss": (peft.MissConfig, {"r": config.rank}),
        "oft": (peft.OFTConfig, {"oft_block_size": config.rank}),
        "pissa": (peft.LoraConfig, scaled | {"init_lora_weights": "pissa"}),
        "randlora": (
            peft.RandLoraConfig,
            {"r": config.rank, "randlora_alpha": config.alpha} | fixed,
        ),
        "shira": (peft.ShiraConfig, {"r": config.rank, "random_seed": config.seed}),
        "vera": (peft.VeraConfig, {"r": config.rank, "d_initial": config.knob} | fixed),
    }
    kind, own = adapters[config.method]
    return kind(target_modules=names, **own)


def lora_parameters(m: int, n: int, r: int) -> int:
    """The numbers of a LoRA of rank r on a matrix (m, n): r (m + n)."""
    return r * (m + n)


def _randlora(m: int, n: int, r: int) -> int:
    return math.ceil(min(m, n) / r) * (r + min(m, n))


# Of each variant how many numbers it trains on a matrix (m, n).
PARAMETERS: dict[str, Callable[[int, int, int], int]] = {
    "dora": lambda m, n, r: lora_parameters(m, n, r) + m,
    "hira": lora_parameters,
    "loraplus": lora_parameters,
    "miss": lambda m, n, r: m * r,
    "oft": lambda m, n, r: n * (r - 1) // 2,
    "pissa": lora_parameters,
    "randlora": _randlora,
    "shira": lora_parameters,
    "vera": lambda m, n, r: m + r,
}
