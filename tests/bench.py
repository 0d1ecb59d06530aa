"""make bench: what the report computes, against stock recipes run beside it.

A training step, the spectra of one model, checkpoint pairs, a plan, and the whole quick report.
Timings need an otherwise idle machine; nothing is asserted.  `make bench ONLY=pairs` runs one part
(spectra, training, planted, pairs with planted, variants, optimizers, plan, report).  With
RECORD=yes what was measured of pairs, variants, optimizers, plan and report is stored for the
notebooks and the README.
"""

import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch
from bench_pairs import bench_pairs
from bench_planted import bench_planted
from bench_variants import bench_optimizers, bench_variants
from timing import PLAN_TIMES, REPORT_TIMES, machine, record, timed
from training_steps import Stamps, our_step, peak_memory

from deltarank.runtime import ROOT, cache_folder, device
from deltarank.spectra import singular_values
from deltarank.study.configs import RunConfig
from deltarank.study.models import load_model, load_tokenizer
from deltarank.study.profiles import PROFILES
from deltarank.study.tasks import collate, encode, load_split

PLAN_ROWS = ROOT / "data" / "tasks" / "entities.jsonl"  # as in the README
STEPS = 10  # the first four warm up and compile


def stock_step(config: RunConfig) -> tuple[float, float]:
    """Seconds and peak GB of a step of `Trainer(bf16=True)` on the same batches."""
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    tokenizer = load_tokenizer(config.model)
    rows = [encode(r, tokenizer, config.seq_len) for r in load_split(config.task, "train")]
    stamps = Stamps()

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            stamps.update()

    with tempfile.TemporaryDirectory() as scratch, peak_memory() as peak:
        arguments = TrainingArguments(
            output_dir=scratch,
            bf16=True,
            max_steps=config.steps,
            per_device_train_batch_size=config.batch_size,
            learning_rate=config.lr,
            seed=config.seed,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            use_cpu=device().type == "cpu",  # without it bf16 is refused
            disable_tqdm=True,
        )
        trainer = Trainer(
            model=load_model(config.model),
            args=arguments,
            train_dataset=rows,
            data_collator=lambda batch: collate(batch, config.seq_len),
            callbacks=[Clock()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return stamps.seconds_per_step(), peak[0]


def bench_training() -> None:
    """Print a step of each recipe, for short and for long answers."""
    for task in ("sentiment", "json"):
        config = PROFILES["paper"].config(task, steps=STEPS)
        print(f"training step, {config.batch_size} x {config.seq_len} tokens, {task}:")
        seconds, memory = stock_step(config)
        print(f"  stock Trainer(bf16=True): {seconds:.2f} s, {memory:.1f} GB")
        for name, compiled in {"compiled": True, "eager": False}.items():
            ours, memory = our_step(dataclasses.replace(config, compile=compiled))
            print(f"  ours, {name}: {ours:.2f} s, {memory:.1f} GB: {seconds / ours:.1f}x faster")
    print("  ours differs: embedding frozen, rows packed, logits of answer tokens only, compiled")


def bench_spectra() -> None:
    """Print the time for all matrices of Gemma 3 270M and the largest error."""
    shapes = [
        (1024, 640),
        (256, 640),
        (256, 640),
        (640, 1024),
        (2048, 640),
        (2048, 640),
        (640, 2048),
    ]
    torch.manual_seed(0)
    matrices = [torch.randn(shape) * 1e-4 for _ in range(18) for shape in shapes]
    clock = time.perf_counter()
    ours = [singular_values(dW) for dW in matrices]
    our_seconds = time.perf_counter() - clock
    clock = time.perf_counter()
    for dW in matrices:
        torch.linalg.svd(dW, full_matrices=False)
    stock_seconds = time.perf_counter() - clock
    exact = [torch.linalg.svdvals(dW.double()) for dW in matrices]
    error = max(float((a - b).abs().max() / b[0]) for a, b in zip(ours, exact, strict=True))
    print(
        f"spectra of {len(matrices)} matrices: torch.linalg.svd {stock_seconds:.1f} s, ours "
        f"{our_seconds:.1f} s: {stock_seconds / our_seconds:.1f}x faster; largest error "
        f"{error:.0e} of sigma_1 against float64"
    )


def bench_plan() -> None:
    """Print what `deltarank plan` says of a task, and its time and memory without a cache."""
    command = [str(Path(sys.executable).with_name("deltarank")), "plan", str(PLAN_ROWS)]
    with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
        took = timed(command, Path(scratch))
        again = os.environ | {"LOWRANK_CACHE": scratch, "PROGRESS": "off"}
        said = subprocess.run(command, env=again, capture_output=True, text=True, check=True).stdout
    minutes, memory = took["seconds"] / 60, took["GB"]
    print(f"{said}deltarank plan: {minutes:.1f} min, {memory:.1f} GB")
    times = {"said": [said], "minutes": [round(minutes, 1)], "GB": [round(memory, 1)]}
    record(pd.DataFrame(times), PLAN_TIMES)


def bench_report() -> None:
    """Print time and memory of `make report` from an empty cache, packages apart."""
    with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
        command = ["make", "report", f"BUILD={scratch}/build"]
        took = timed(command, Path(scratch) / "cache")
    minutes, memory = took["seconds"] / 60, took["GB"]
    print(f"make report: {minutes:.1f} min, {memory:.1f} GB")
    times = {"minutes": [round(minutes, 1)], "GB": [round(memory, 1)]}
    record(pd.DataFrame(times), REPORT_TIMES)


PARTS = {
    "spectra": [bench_spectra],
    "training": [bench_training],
    "planted": [bench_planted],
    "pairs": [bench_planted, bench_pairs],
    "variants": [bench_variants],
    "optimizers": [bench_optimizers],
    "plan": [bench_plan],
    "report": [bench_report],
}

if __name__ == "__main__":
    print("{device}, {threads} threads, torch {torch}, commit {commit}".format(**machine()))
    for measure in dict.fromkeys(f for part in sys.argv[1:] or PARTS for f in PARTS[part]):
        measure()
