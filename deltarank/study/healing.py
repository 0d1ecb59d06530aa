"""Healing: the cut of a pair trained for some steps towards the tuned model, and written."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from deltarank.adapters import AdapterPlan, plan_adapter
from deltarank.alignment import open_pair
from deltarank.checks import require
from deltarank.factors import Cut, Form
from deltarank.options import HEAL_BATCH, HEAL_RATE, HEAL_ROOM, HEAL_STEPS
from deltarank.peft_format import require_replaceable, write_adapter
from deltarank.study.configs import RunConfig
from deltarank.study.distillation import Lessons, distil, divergence, lessons
from deltarank.study.evaluation import newline
from deltarank.study.losses import Head, head_of, require_own_loss
from deltarank.study.models import (
    load_model,
    load_tokenizer,
    require_memory,
    require_short,
)
from deltarank.study.tasks import encode_prompt, load_prompts
from deltarank.study.training import lora_factors, lora_layers, quiet_peft

if TYPE_CHECKING:  # PEFT is imported where it trains
    from peft import PeftModel

HELD_OUT = 64  # rows that tell how far the adapter is from the tuned model, at most
ROUNDING = 1e-3  # nats by which two runs of one model may differ in bfloat16


def extract_healed(
    base: str,
    tuned: str,
    out: str,
    *,
    rows: str,
    rule: dict,
    steps: int = HEAL_STEPS,
    lr: float = HEAL_RATE,
    dtype: str = "float32",
    patterns: bool = False,
) -> pd.DataFrame:
    """Write the cut of tuned - base, healed, as a PEFT adapter: whole or not at all.

    The cut as extract_adapter writes it is the start; then its factors alone are trained for some
    steps to answer the prompts of `rows` (see load_prompts) as the tuned model does (see Lessons).
    rule: of rank, energy, budget and ranks the one that is given, by name.

    Returns what extract_adapter returns, `kept` being of the start and `rounding` of what is
    written; attrs["healed"]: steps, rows, held_out, before and after: the divergence from the
    tuned model in nats a token, on held-out rows or, where these are 0, on the same.  Warns where
    it rose.  Raises as extract_adapter and load_prompts, ValueError for a base without a tokenizer
    and for a rate that diverges.
    """
    folder, form = Path(out).expanduser().resolve(), Form(dtype, patterns)
    learned, held = _parted(load_prompts(rows), steps * HEAL_BATCH)
    require_replaceable(folder)
    _require_answers(base, tuned, learned + held)
    plan = plan_adapter(base, tuned, form, rule=rule)
    batch = min(HEAL_BATCH, len(learned))
    config = _recipe(base, rows, plan, steps=steps, lr=lr, batch_size=batch)
    told, teacher = _teacher(tuned, config, learned + held)
    start, model = _start(base, plan, folder)
    healed = _heal(config, model, told, teacher, len(learned))
    notes: dict[str, dict[str, float]] = {}
    made = plan.factors().tensors(_trained(plan, model, start), notes)
    write_adapter(folder, plan.config(), plan.factors().layout(), made)
    report = plan.report(notes)
    report.attrs["healed"] = healed
    return report


def _parted(prompts: dict[str, list[str]], most: int) -> tuple[list[str], list[str]]:
    """The prompts to learn from, `most` at most, and those held out.

    Held out are those of the split "valid"; without one every tenth, and of fewer than twenty
    prompts none.  Of other splits than "train" none is learned, unless there is no "train".  None
    is in both, nor twice in one.
    """
    train = dict.fromkeys(prompts.get("train") or itertools.chain(*prompts.values()))
    given = [*train]
    held = prompts.get("valid", []) if "train" in prompts else []
    held = [prompt for prompt in dict.fromkeys(held) if prompt not in train]
    if not held and len(given) >= 20:
        held, given = given[::10], [p for i, p in enumerate(given) if i % 10]
    return random.Random(0).sample(given, min(most, len(given))), held[:HELD_OUT]


def _require_answers(base: str, tuned: str, prompts: list[str]) -> None:
    """Raise ValueError, before any work, for models that cannot both answer these prompts."""
    pair, cure = open_pair(base, tuned), "extract without healing"
    require(pair.is_causal(), f"{base} does not continue text: {cure}")
    pair.require_same_vocabulary(cure)
    tokenizer = load_tokenizer(base)
    require_short(base, [len(encode_prompt(p, tokenizer)) + HEAL_ROOM for p in prompts], prompts)
    require_memory(base, cure=cure)


def _recipe(base: str, rows: str, plan: AdapterPlan, **sizes) -> RunConfig:
    """The recipe of the training: that of the report's LoRA runs, of the adapter's rank."""
    r = max(plan.ranks.values())
    sizes |= {"rank": r, "alpha": float(r), "compile": False}  # which takes longer than it saves
    return RunConfig(task=rows, method="lora", model=base, **sizes)


def _teacher(tuned: str, config: RunConfig, prompts: list[str]) -> tuple[Lessons, Head]:
    """The tuned model's lessons on the prompts, and its head; the model is let go."""
    model, tokenizer = load_model(tuned), load_tokenizer(config.model)
    require_own_loss(model)
    told = model.generation_config.eos_token_id
    named = [tokenizer.eos_token_id, *(told if isinstance(told, list) else [told])]
    ends = [token for token in named if token is not None] or [newline(tokenizer)]
    return lessons(model, config, prompts, room=HEAL_ROOM, ends=ends), head_of(model)


def _start(base: str, plan: AdapterPlan, folder: Path) -> tuple[pd.DataFrame, PeftModel]:
    """The cut's report, and the base with the cut, whose factors alone are to be trained.

    The cut is written beside `folder` and loaded by PEFT, as it would be where it is served.
    """
    from peft import PeftModel

    whole = dataclasses.replace(plan, form=Form(patterns=plan.form.patterns))  # nothing is rounded
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        report, model = whole.write(Path(scratch) / "cut"), load_model(base)
        require_own_loss(model)
        with quiet_peft():
            model = PeftModel.from_pretrained(model, f"{scratch}/cut", is_trainable=True)
    strange = {f"{module}.weight" for module in plan.modules()} ^ lora_layers(model).keys()
    told = f"{base} loads with other modules than its file names, such as {sorted(strange)[:1]}"
    require(not strange, f"{told}: extract without healing")
    return report, model


def _heal(
    config: RunConfig, model: PeftModel, told: Lessons, teacher: Head, learned: int
) -> dict[str, float]:
    """Train the factors on the first `learned` rows; what attrs["healed"] says of it."""
    taught, rest = told.of(slice(learned)), told.of(slice(learned, None))
    held = rest if rest.rows else taught
    before = divergence(model, config, held, teacher)
    losses = distil(config, model, taught, teacher, label="heal")
    after = divergence(model, config, held, teacher) if math.isfinite(losses[-1]) else math.nan
    lower = f"choose a rate below {config.lr:g}"
    require(math.isfinite(after), f"healing diverged at step {len(losses)}: {lower}")
    if after > before + ROUNDING:
        warnings.warn(f"healing led away from the tuned model: {lower}", stacklevel=3)
    counts = {"steps": config.steps, "rows": learned, "held_out": len(rest.rows)}
    return counts | {"before": before, "after": after}


def _trained(plan: AdapterPlan, model: PeftModel, start: pd.DataFrame) -> Callable[[str], Cut]:
    """A function that gives B, A and the notes of a module: those of the start, in `start`."""
    layers, noted, names = lora_layers(model), start.set_index("name"), plan.modules()
    columns = ["squared_norm", "kept", "best"]

    def factors(module: str) -> Cut:
        name = names[module]
        r = plan.ranks[name]  # the zeros that fill a smaller rank are not trained: no gradient
        B, A, scale = lora_factors(layers[f"{module}.weight"])
        return scale * B[:, :r], A[:r], {column: float(noted[column][name]) for column in columns}

    return factors
