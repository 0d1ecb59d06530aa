"""The adapter that was written, in the lines that a terminal shows."""

from __future__ import annotations

import shlex
from pathlib import Path

import pandas as pd

from deltarank.checkpoints import read_json
from deltarank.checks import counted, listed
from deltarank.peft_format import CONFIG
from deltarank.ranks import VLLM_RANKS, percent

NOT_HELD = {  # parts of the update that the adapter leaves out, and why
    "not_chosen": "Given no rank by the rule",
    "dropped": "Dropped, since no factors are written for them",
}


def summary(out: Path, report: pd.DataFrame, dtype: str) -> str:
    """What the adapter in the folder `out` holds, what it leaves out and how to load it.

    report: of extract_adapter, shrink_adapter or extract_healed; dtype: of the factors.
    """
    lora, norms, left_out = (
        report[report["part"] == part] for part in ("lora", "modules_to_save", "left_out")
    )
    size = sum(file.stat().st_size for file in out.iterdir()) / 1e6
    whole = f" and {counted(len(norms), 'norm')} whole" if len(norms) else ""
    ranks = _ranks(lora["rank"], report.attrs["lora"])
    lines = [
        f"{out} holds {counted(len(lora), 'matrix', 'matrices')} at {ranks}{whole}, {size:.1f} MB.",
        _kept(report, dtype),
    ]
    if len(left_out):
        share = percent(_share(left_out, report))
        norm = f"{counted(len(left_out), 'tensor')} of norms, {share} of the squared update"
        lines.append(f"Left out: {norm}; --norms keeps them, in PEFT only.")
    for part, told in NOT_HELD.items():
        rows = report[report["part"] == part].sort_values("squared_norm", ascending=False)
        if len(rows):
            share = f"{percent(_share(rows, report))} of the squared update"
            lines.append(f"{told}: {listed([*rows['name']])}, {share}.")
    if "healed" in report.attrs:
        lines.append(_healed(**report.attrs["healed"]))
    config = read_json(out / CONFIG) | report.attrs["lora"]
    lines += _served(out, config, norms=len(norms) > 0)
    load = f"PeftModel.from_pretrained(base_model, {str(out)!r})"
    return "\n".join([*lines, f"PEFT loads it: model = {load}  # base_model: BASE, loaded"])


def _served(out: Path, config: dict, *, norms: bool) -> list[str]:
    """What vLLM and llama.cpp have to be told to load an adapter of this configuration."""
    if config.get("fan_in_fan_out"):
        return ["vLLM and llama.cpp were not tried with adapters of GPT-2's Conv1D."]
    if config.get("task_type") != "CAUSAL_LM":
        return [f"vLLM and llama.cpp were tried with models that {CONFIG} calls CAUSAL_LM alone."]
    if norms:
        return ["vLLM and llama.cpp load no adapter that keeps norms: leave --norms out for them."]
    gguf = "llama.cpp loads it from what convert_lora_to_gguf.py --base BASE OUT writes."
    if config["rank_pattern"]:
        gguf = "llama.cpp mis-scales it: leave --patterns out for it."
    r = max(config["r"], *config["rank_pattern"].values(), 0)
    fits, most = [rank for rank in VLLM_RANKS if rank >= r], VLLM_RANKS[-1]
    if not fits:
        return [f"vLLM loads no more than rank {most}: --rank or --budget give less.", gguf]
    rank = "" if r <= VLLM_RANKS[0] else f" --max-lora-rank {fits[0]}"
    return [
        f"vLLM loads it with --enable-lora --lora-modules {shlex.quote(f'cut={out}')}{rank}.",
        gguf,
    ]


def _share(rows: pd.DataFrame, report: pd.DataFrame) -> float:
    """The share of the squared update that these rows have."""
    return rows["squared_norm"].sum() / report["squared_norm"].sum()


def _ranks(ranks: pd.Series, lora: dict) -> str:
    """The ranks of the matrices, and the one that all are stored at."""
    low, middle, high = ranks.min(), ranks.median(), ranks.max()
    if low == high:
        return f"rank {low}"
    padded = "" if lora["rank_pattern"] else f", all stored at {lora['r']} (zeros fill the rest)"
    return f"rank {low} to {high} (median {middle:.0f}){padded}"


def _kept(report: pd.DataFrame, dtype: str) -> str:
    """How much of the squared update the adapter keeps, and what rounding loses.

    Of the matrices that can get a rank, of which inspect says it, and of all, where they differ.
    """
    matrices = report[report["part"].isin(["lora", "not_chosen"])]
    of_matrices, of_whole = (percent(_held(rows, "kept")) for rows in (matrices, report))
    lost = percent(_held(report, "rounding"))
    rounding = "" if dtype == "float32" else f"; rounding to {dtype} loses {lost} of it"
    subject = "The cut that was healed keeps" if "healed" in report.attrs else "It keeps"
    more = f" of the matrices that can get a rank, {of_whole} of the whole"
    differ = of_matrices != of_whole
    return f"{subject} {of_matrices} of the squared update{more if differ else ''}{rounding}."


def _held(rows: pd.DataFrame, column: str) -> float:
    """The mean of a share over rows, weighted by their squared update."""
    return (rows["squared_norm"] * rows[column]).sum() / rows["squared_norm"].sum()


def _healed(steps: int, rows: int, held_out: int, before: float, after: float) -> str:
    """How far the adapter is from the tuned model, after healing and before."""
    where = counted(held_out, "held-out prompt") if held_out else "the same prompts"
    trained = f"{counted(steps, 'step')} on {counted(rows, 'prompt')}"
    return (
        f"Healed for {trained}: in answers of the tuned model it diverges from it "
        f"by {after:.3g} nats a token, the cut by {before:.3g} ({where})."
    )
