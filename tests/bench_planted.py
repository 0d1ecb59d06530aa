"""What each tool reports of a pair whose update has rank 8, at four sizes, stored in bfloat16.

Nothing is timed, so that the machine may be busy.  Smaller updates come nearer to the rounding of
the stored type; below its spacing the planted rank is lost.
"""

import functools
import json
import statistics
import tempfile
from pathlib import Path

import pandas as pd
import torch
from bench_pairs import Size, readers, write_pair
from timing import record, timed

from deltarank.runtime import cache_folder
from deltarank.study.pairs import PLANTED_RANKS

RANK = 8
RELATIVE_SIZES = (0.05, 0.01, 0.002, 0.0005)  # |update| / |W|
SMALL_LLAMA = Size(
    "LlamaForCausalLM",
    torch.bfloat16,
    {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 2,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "vocab_size": 1024,
    },
)
OURS = ("relative_size", "entropy_rank", "energy_8", "r90", "rank", "above_rounding")
OURS += ("rounding_share",)
THEIRS = {  # our names of what modeldelta reports a matrix
    "frob_norm_relative": "relative_size",
    "effective_rank": "entropy_rank",
    "concentration_top_k": "energy_20",
}


def bench_planted() -> None:
    """Print what each tool says of each planted update, a line a size and tool."""
    rows = []
    for planted_size in RELATIVE_SIZES:
        with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
            ours, theirs = reports(Path(scratch), planted_size)
        planted = {"planted_rank": RANK, "planted_size": planted_size}
        rows += [planted | row for row in (what_we_say(ours), what_modeldelta_says(theirs))]
    table = pd.DataFrame(rows)
    print(f"an update of rank {RANK} stored in bfloat16:")
    print(table.drop(columns="says").to_string(index=False, na_rep="–"))
    for row in rows:
        print(f"  {row['planted_size']}, {row['program']}: {row['says']}")
    record(table, PLANTED_RANKS)


def reports(scratch: Path, planted_size: float) -> tuple[dict, dict]:
    """What inspect and modeldelta write of one pair."""
    torch.manual_seed(0)
    update = functools.partial(planted_at_rank, r=RANK, size=planted_size)
    write_pair(scratch, SMALL_LLAMA, update)
    for command in readers(f"{scratch}/base", f"{scratch}/tuned", scratch).values():
        timed(command, scratch / "cache")
    ours, theirs = (scratch / f"{side}.json" for side in ("ours", "theirs"))
    return json.loads(ours.read_text("utf8")), json.loads(theirs.read_text("utf8"))


def planted_at_rank(W: torch.Tensor, *, r: int, size: float) -> torch.Tensor:
    """W (m, n) with an update of r equal singular values, size * |W| in all; no other tensor."""
    if W.dim() < 2:
        return W
    U, V = (torch.linalg.qr(torch.randn(d, r)).Q for d in W.shape)
    return W + size * W.norm() / r**0.5 * (U @ V.T)


def what_we_say(report: dict) -> dict:
    """A line of the table from the JSON of inspect: medians over the layers' matrices, words."""
    rows = [row for row in report["matrices"] if row["kind"] == "matrix"]
    finding, _, precision = report["verdict"]
    return {
        "program": "deltarank",
        "matrices": len(rows),
        **{name: median(rows, name) for name in OURS},
        "near_rounding": sum(row["near_rounding"] for row in rows),
        "says": f"{finding.split('. ')[0]}. {precision.split('. ')[-1]}",
    }


def what_modeldelta_says(report: dict) -> dict:
    """The same of modeldelta's JSON, where it reports it; its words are its findings' titles."""
    rows = [row for row in report["modules"] if row["has_svd"] and ".layers." in row["name"]]
    titles = [
        finding["title"]
        for finding in report["diagnostics"]["findings"]
        if finding["category"] in ("magnitude", "structure")
    ]
    return {
        "program": "modeldelta",
        "matrices": len(rows),
        **{name: median(rows, key) for key, name in THEIRS.items()},
        "says": f"{'. '.join(titles)}.",
    }


def median(rows: list[dict], key: str) -> float:
    """The median of one number over rows, to four digits."""
    return float(f"{statistics.median(row[key] for row in rows):.4g}")
