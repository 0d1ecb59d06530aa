"""Time and memory of pairs of checkpoints at three sizes: ours, and others on the same files."""

import dataclasses
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import torch
from timing import other, record, timed

from deltarank.checkpoints import layer_and_module
from deltarank.runtime import cache_folder
from deltarank.study.pairs import PAIR_TIMES

ALL = ("spectra", "adapter", "modeldelta", "mergekit", "plain SVD", "start", "start of mergekit")
ONCE = ("plain SVD",)  # takes long, and says the same of accuracy every time
LIMIT = 1800  # seconds a program may take
SPARE = 2e9  # bytes of disk left beside a pair, for what the programs write
ADAPTER_RANK = 128
# Compared with, each in an environment of its own; never dependencies.
MERGEKIT = ("mergekit==0.1.5", "mergekit-extract-lora")
MODELDELTA = ("modeldelta==0.4.4", "modeldelta")
# How many times as fast and how much smaller the first is than the second.
COMPARED = (
    ("spectra", "modeldelta"),
    ("spectra", "plain SVD"),
    ("adapter", "mergekit"),
    ("adapter", "plain SVD"),
)


@dataclasses.dataclass(frozen=True)
class Size:
    """A pair's class of transformers, type and configuration, and what is run on it how often."""

    model_class: str
    dtype: torch.dtype
    config: dict[str, int]
    programs: tuple[str, ...] = ALL
    rounds: int = 3  # of the programs, interleaved


GEMMA = {
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_hidden_layers": 18,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "vocab_size": 262144,
}
QWEN = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
LLAMA = {
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}
READERS = ("spectra", "modeldelta")  # of spectra alone: the others would take hours
PAIRS = {  # random weights with planted updates, written on the fly
    "Gemma 3 270M, float32": Size("Gemma3ForCausalLM", torch.float32, GEMMA),
    "1.5 B parameters, bfloat16, sharded": Size("Qwen2ForCausalLM", torch.bfloat16, QWEN),
    "3.2 B parameters, bfloat16, sharded": Size(
        "LlamaForCausalLM", torch.bfloat16, LLAMA, READERS, rounds=1
    ),
}

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


def bench_pairs() -> None:
    """Print time and memory of spectra and adapter of generated pairs, ours and three others'."""
    for needed in (MERGEKIT, MODELDELTA):
        other(*needed)
    tables = []
    for title, size in PAIRS.items():
        print(f"pair, {title}:", flush=True)
        short = shortage(pair_bytes(size), shutil.disk_usage(cache_folder()).free)
        if short:
            print(f"  left out: {short}", flush=True)
            continue
        tables.append(measured(size).assign(pair=title))
        print_pair(tables[-1])
    record(pd.concat(tables), PAIR_TIMES)


def measured(size: Size) -> pd.DataFrame:
    """One line a round and program: seconds, GB, how it ended; and what the adapter held."""
    with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
        torch.manual_seed(0)
        write_pair(Path(scratch), size, planted)
        rows = [row for i in range(size.rounds) for row in one_round(Path(scratch), size, i)]
        done = {row["program"] for row in rows if row["ended"] == "done"}
        held = energy_held(Path(scratch) / "0") if {"adapter", "plain SVD"} <= done else {}
    return pd.DataFrame(rows).assign(**held)


def one_round(pair: Path, size: Size, i: int) -> Iterator[dict]:
    """Run the programs one after the other and yield time and memory; those of ONCE but once."""
    out = pair / str(i)
    out.mkdir()
    for name, command in programs(pair, out).items():
        if name not in size.programs or (i and name in ONCE):
            continue
        row = timed(command, out / "cache", limit=LIMIT)
        print(f"  {name}: {row['seconds']:.1f} s, {row['GB']:.1f} GB, {row['ended']}", flush=True)
        yield {"round": i, "program": name} | row


def programs(pair: Path, out: Path) -> dict[str, list[str]]:
    """The command line of each program: ours, two others', plain SVD, and two that only start."""
    python, base, tuned = [sys.executable, "-c"], f"{pair}/base", f"{pair}/tuned"
    adapter = "from deltarank.adapters import extract_adapter; extract_adapter"
    adapter += f"('{base}', '{tuned}', '{out}/ours', rank={ADAPTER_RANK}).to_csv('{out}/ours.csv')"
    mergekit = [other(*MERGEKIT), "--model", tuned, "--base-model", base]
    mergekit += ["--out-path", f"{out}/theirs", "--max-rank", str(ADAPTER_RANK)]
    plain = [base, tuned, f"{out}/plain.csv", str(ADAPTER_RANK)]
    return readers(base, tuned, out) | {
        "adapter": [*python, adapter],
        "mergekit": [*mergekit, "--no-embed-lora", "--exclude-regex", "embed|lm_head"],
        "plain SVD": [*python, PLAIN_SCRIPT, *plain],
        "start": [*python, "import deltarank.adapters"],
        "start of mergekit": [other(*MERGEKIT), "--help"],
    }


def readers(base: str, tuned: str, out: Path) -> dict[str, list[str]]:
    """The command lines that write a pair's spectra as JSON: out/ours.json and out/theirs.json."""
    ours, theirs = str(Path(sys.executable).with_name("deltarank")), other(*MODELDELTA)
    return {
        "spectra": [ours, "inspect", base, tuned, "--json", f"{out}/ours.json"],
        "modeldelta": [theirs, base, tuned, "--quiet", "--output", f"{out}/theirs.json"],
    }


def configuration(size: Size):
    """The configuration of transformers that a pair is stored with."""
    import transformers

    config = getattr(transformers, size.model_class).config_class(**size.config)
    config.architectures = [size.model_class]
    config.dtype = str(size.dtype).removeprefix("torch.")
    return config


def parameter_shapes(size: Size) -> dict[str, torch.Size]:
    """The shapes of a model's parameters by name; nothing is allocated."""
    import transformers

    with torch.device("meta"):
        model = getattr(transformers, size.model_class)(configuration(size))
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def pair_bytes(size: Size) -> int:
    """Bytes of disk that base and tuned take."""
    return 2 * size.dtype.itemsize * sum(s.numel() for s in parameter_shapes(size).values())


def shortage(needed: float, free: float) -> str:
    """What is missing of the disk for a pair and SPARE, all in bytes; empty where it is enough.

    >>> shortage(12.9e9, 65e9), shortage(12.9e9, 9e9)
    ('', 'it needs 14.9 GB of disk, 9.0 are free')
    """
    if needed + SPARE <= free:
        return ""
    return f"it needs {(needed + SPARE) / 1e9:.1f} GB of disk, {free / 1e9:.1f} are free"


def write_pair(folder: Path, size: Size, update: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Base and tuned folders, one shard a layer: tuned = update(base) in float32, then rounded.

    update: W (m, n) or (n,) to one of the same shape; it gets the layers, not the vocabulary.
    """
    from safetensors.torch import save_file

    shapes, groups = parameter_shapes(size), {}
    for name in shapes:
        groups.setdefault(layer_and_module(name)[0], []).append(name)
    index: dict[str, str] = {}
    for side in ("base", "tuned"):
        configuration(size).save_pretrained(folder / side)
    for group, names in groups.items():
        shard = f"model-{group + 2:05d}-of-{len(groups):05d}.safetensors"
        index |= dict.fromkeys(names, shard)
        before = {n: torch.randn(shapes[n]).mul_(0.02).to(size.dtype) for n in names}
        save_file(before, folder / "base" / shard, metadata={"format": "pt"})
        after = {n: update(W.float()).to(W.dtype) if group >= 0 else W for n, W in before.items()}
        save_file(after, folder / "tuned" / shard, metadata={"format": "pt"})
    text = json.dumps({"metadata": {}, "weight_map": index})
    for side in ("base", "tuned"):
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


def comparisons(table: pd.DataFrame) -> list[str]:
    """What COMPARED says of one pair's lines of `measured`, by medians over the rounds."""
    medians = table.groupby("program")[["seconds", "GB"]].median()
    stopped = set(table.loc[table["ended"] != "done", "program"])
    lines = []
    for ours, theirs in COMPARED:
        if ours not in medians.index or theirs not in medians.index or ours in stopped:
            continue
        (seconds, GB), (other_seconds, other_GB) = medians.loc[ours], medians.loc[theirs]
        least = "at least " if theirs in stopped else ""
        lines.append(
            f"{ours}: {least}{other_seconds / seconds:.1f}x faster than {theirs}, "
            f"{GB:.2f} GB, not {least}{other_GB:.2f}"
        )
    return lines


def print_pair(table: pd.DataFrame) -> None:
    """Print ratios of the median times, and what the adapter holds."""
    for line in comparisons(table):
        print(f"  {line}")
    seconds = table.groupby("program")["seconds"].median()
    if {"adapter", "start", "mergekit", "start of mergekit"} <= set(seconds.index):
        theirs = seconds["mergekit"] - seconds["start of mergekit"]
        ours = seconds["adapter"] - seconds["start"]
        print(f"  adapter without the start of both: {theirs / ours:.1f}x faster than mergekit")
    if "held" in table:
        first = table.iloc[0]
        print(f"  the adapter holds {first['held']:.4f} of the update, full SVD "
              f"{first['held_svd']:.4f}; a matrix at most {first['lacks']:.0e} less, "
              f"{first['lacks_bound']:.0e} by its own bound")  # fmt: skip
