"""make bench: what the report computes, against stock recipes run beside it.

A training step, the spectra of one model, checkpoint pairs, and the whole quick report.  Timings
need an otherwise idle machine; nothing is asserted.  `make bench ONLY=pairs` runs one part
(spectra, training, pairs, report).  With RECORD=yes what was measured of pairs and report is
stored for notebook 8 and the README.
"""

import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import psutil
import torch

from deltarank.checkpoints import layer_and_module
from deltarank.runtime import cache_folder, commit, device, device_name
from deltarank.spectra import singular_values
from deltarank.study import training
from deltarank.study.configs import RunConfig
from deltarank.study.models import load_model, load_tokenizer
from deltarank.study.profiles import PAIR_TIMES, PROFILES, REPORT_TIMES
from deltarank.study.tasks import collate, encode, load_split

STEPS = 10  # the first four warm up and compile


@contextlib.contextmanager
def peak_memory():
    """Yield a list that holds, at the end, the peak resident memory of the block in GB."""
    peak, done = [0.0], threading.Event()

    def watch():
        while not done.wait(0.02):
            peak[0] = max(peak[0], psutil.Process().memory_info().rss / 1e9)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


class Stamps(list):
    """A progress bar that only notes the time of every step."""

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return False

    def update(self):
        self.append(time.perf_counter())

    def seconds_per_step(self):
        return statistics.median(b - a for a, b in zip(self[3:], self[4:], strict=False))


def our_step(config: RunConfig) -> tuple[float, float]:
    """Seconds and peak GB of a step of the report's recipe."""
    stamps = Stamps()
    training.progress, bar = lambda total, label: stamps, training.progress
    with peak_memory() as peak:
        training.train(config, training.prepare(config))
    training.progress = bar
    return stamps.seconds_per_step(), peak[0]


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


ROUNDS = 3  # of the programs on every pair, interleaved
PAIRS = {  # of these shapes; random weights with planted updates, written on the fly
    "Gemma 3 270M, float32": (
        "Gemma3ForCausalLM",
        torch.float32,
        {
            "hidden_size": 640,
            "intermediate_size": 2048,
            "num_hidden_layers": 18,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "vocab_size": 262144,
        },
    ),
    "1.5 B parameters, bfloat16, sharded": (
        "Qwen2ForCausalLM",
        torch.bfloat16,
        {
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
            "tie_word_embeddings": True,
        },
    ),
}
ADAPTER_RANK = 128
MERGEKIT = "mergekit==0.1.5"  # compared with, in an environment of its own; never a dependency

PLAIN_SCRIPT = """
import sys, torch
from transformers import AutoModelForCausalLM
base, tuned = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in sys.argv[1:3])
W0 = dict(base.named_parameters())
with open(sys.argv[3], "w") as held:
    print("name,held", file=held)
    for name, W1 in tuned.named_parameters():
        if W1.dim() == 2 and "embed" not in name:
            U, S, Vh = torch.linalg.svd((W1 - W0[name]).detach(), full_matrices=False)
            energy = S.double() ** 2
            print(name, float(energy[: int(sys.argv[4])].sum() / energy.sum()), sep=",", file=held)
"""


def write_pair(folder: Path, model_class: str, dtype: torch.dtype, sizes: dict) -> None:
    """Base and tuned folders, one shard a layer: a planted rank-32 update and a small noise."""
    import transformers
    from safetensors.torch import save_file

    architecture = getattr(transformers, model_class)
    config = architecture.config_class(**sizes)
    config.architectures, config.dtype = [model_class], str(dtype).removeprefix("torch.")
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in architecture(config).named_parameters()}
    groups: dict[int, list[str]] = {}
    for name in shapes:
        groups.setdefault(layer_and_module(name)[0], []).append(name)
    index: dict[str, str] = {}
    for side in ("base", "tuned"):
        (folder / side).mkdir(parents=True)
        config.save_pretrained(folder / side)
    for group, names in groups.items():
        shard = f"model-{group + 2:05d}-of-{len(groups):05d}.safetensors"
        index |= dict.fromkeys(names, shard)
        before = {n: torch.randn(shapes[n]).mul_(0.02).to(dtype) for n in names}
        save_file(before, folder / "base" / shard, metadata={"format": "pt"})
        after = {n: planted(W.float()).to(dtype) if group >= 0 else W for n, W in before.items()}
        save_file(after, folder / "tuned" / shard, metadata={"format": "pt"})
    for side in ("base", "tuned"):
        text = json.dumps({"metadata": {}, "weight_map": index})
        (folder / side / "model.safetensors.index.json").write_text(text)


def planted(W: torch.Tensor) -> torch.Tensor:
    """W with an update of a twentieth of its size: 32 directions, sigma ~ 1 / i, a tenth noise."""
    if W.dim() < 2:
        return W
    m, n = W.shape
    U = torch.randn(m, 32) / m**0.5 / torch.arange(1, 33)
    update = U @ torch.randn(32, n) / n**0.5
    noise = torch.randn(m, n)
    update = update / update.norm() + 0.1 * noise / noise.norm()
    return W + 0.05 * W.norm() * update


def timed(command: list[str], scratch: Path) -> tuple[float, float]:
    """Seconds and peak resident GB of a command and its children; stops the bench if it fails."""
    os.sync()  # or it waits for what another wrote
    start, peak = time.perf_counter(), 0.0
    environment = os.environ | {"LOWRANK_CACHE": str(scratch)}  # or a second round finds the first
    process = psutil.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    drained = threading.Thread(target=process.stdout.read, daemon=True)
    drained.start()
    while process.poll() is None:
        with contextlib.suppress(psutil.Error):
            family = [process, *process.children(recursive=True)]
            peak = max(peak, sum(p.memory_info().rss for p in family) / 1e9)
        time.sleep(0.05)
    if process.returncode:
        sys.exit(f"{' '.join(command[:3])} ... failed with {process.returncode}")
    return time.perf_counter() - start, peak


def mergekit() -> str:
    """The path of mergekit-extract-lora, installed beside the cache on first use."""
    home = cache_folder() / "mergekit"
    if not (home / "bin" / "mergekit-extract-lora").exists():
        subprocess.run([sys.executable, "-m", "venv", home], check=True)
        subprocess.run([home / "bin" / "pip", "install", "-q", MERGEKIT], check=True)
    return str(home / "bin" / "mergekit-extract-lora")


def programs(pair: Path, out: Path) -> dict[str, list[str]]:
    """The command line of each program: ours, mergekit, plain SVD, and two that only start."""
    spectra = "from deltarank.compare import compare_checkpoints; compare_checkpoints"
    adapter = "from deltarank.adapters import extract_adapter; extract_adapter"
    python, base, tuned = [sys.executable, "-c"], f"{pair}/base", f"{pair}/tuned"
    theirs = [mergekit(), "--model", tuned, "--base-model", base, "--out-path", f"{out}/theirs"]
    theirs += ["--max-rank", str(ADAPTER_RANK), "--no-embed-lora"]
    adapter += f"('{base}', '{tuned}', '{out}/ours', rank={ADAPTER_RANK}).to_csv('{out}/ours.csv')"
    plain = [base, tuned, f"{out}/plain.csv", str(ADAPTER_RANK)]
    return {
        "spectra": [*python, f"{spectra}('{base}', '{tuned}')"],
        "adapter": [*python, adapter],
        "mergekit": [*theirs, "--exclude-regex", "embed|lm_head"],
        "plain SVD": [*python, PLAIN_SCRIPT, *plain],
        "start": [*python, "import deltarank.adapters"],
        "start of mergekit": [mergekit(), "--help"],
    }


def bench_pairs() -> None:
    """Print time and memory of spectra and adapter of generated pairs, ours and two others'."""
    mergekit()
    tables = []
    for title, (model_class, dtype, sizes) in PAIRS.items():
        with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
            print(f"pair, {title}:", flush=True)
            torch.manual_seed(0)
            write_pair(Path(scratch), model_class, dtype, sizes)
            rows = [row for i in range(ROUNDS) for row in one_round(Path(scratch), i)]
            tables.append(pd.DataFrame(rows).assign(pair=title, **energy_held(Path(scratch) / "0")))
        print_pair(tables[-1])
    record(pd.concat(tables), PAIR_TIMES)


def record(times: pd.DataFrame, path: Path) -> None:
    """Store times with the machine that they were taken on, where RECORD asks for it."""
    if os.environ.get("RECORD"):
        machine = {"device": device_name(), "threads": torch.get_num_threads()}
        machine |= {"torch": torch.__version__, "commit": commit()}
        times.assign(**machine).to_csv(path, index=False)


def bench_report() -> None:
    """Print time and memory of `make report` from an empty cache, packages apart."""
    with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
        command = ["make", "report", f"BUILD={scratch}/build"]
        seconds, memory = timed(command, Path(scratch) / "cache")
    print(f"make report: {seconds / 60:.1f} min, {memory:.1f} GB")
    times = {"minutes": [round(seconds / 60, 1)], "GB": [round(memory, 1)]}
    record(pd.DataFrame(times), REPORT_TIMES)


def one_round(pair: Path, i: int) -> Iterator[dict]:
    """Run the programs one after the other and yield time and memory; plain SVD but once."""
    out = pair / str(i)
    out.mkdir()
    for name, command in programs(pair, out).items():
        if i and name == "plain SVD":  # takes longest, and says the same of accuracy every time
            continue
        seconds, memory = timed(command, out / "cache")
        print(f"  {name}: {seconds:.1f} s, {memory:.1f} GB", flush=True)
        yield {"round": i, "program": name, "seconds": round(seconds, 2), "GB": round(memory, 2)}


def energy_held(out: Path) -> dict[str, float]:
    """Shares of the update: held by the adapter and by the full SVD, the most a matrix lacks."""
    ours = pd.read_csv(out / "ours.csv").query("part == 'lora'")
    both = ours.merge(pd.read_csv(out / "plain.csv"), on="name", validate="1:1")
    return {
        "held": both["kept"].mean(),
        "held_svd": both["held"].mean(),
        "lacks": (both["held"] - both["kept"]).max(),
        "lacks_bound": (ours["best"] - ours["kept"]).max(),
    }


def print_pair(table: pd.DataFrame) -> None:
    """Print ratios of the median times, and what the adapter holds."""
    seconds = table.groupby("program")["seconds"].median()
    for name in ("spectra", "adapter"):
        ratios = [f"{seconds[other] / seconds[name]:.1f}x" for other in ("mergekit", "plain SVD")]
        print(f"  {name}: {ratios[0]} faster than mergekit, {ratios[1]} than plain SVD")
    theirs = seconds["mergekit"] - seconds["start of mergekit"]
    ours = seconds["adapter"] - seconds["start"]
    print(f"  adapter without the start of both: {theirs / ours:.1f}x faster than mergekit")
    first = table.iloc[0]
    print(f"  the adapter holds {first['held']:.4f} of the update, full SVD "
          f"{first['held_svd']:.4f}; a matrix at most {first['lacks']:.0e} less, "
          f"{first['lacks_bound']:.0e} by its own bound")  # fmt: skip


PARTS = {
    "spectra": bench_spectra,
    "training": bench_training,
    "pairs": bench_pairs,
    "report": bench_report,
}

if __name__ == "__main__":
    print(f"{device_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for part in sys.argv[1:] or PARTS:
        PARTS[part]()
