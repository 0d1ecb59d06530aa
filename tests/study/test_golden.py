"""The measurement's golden numbers: a small run of each method, held to tolerances.

golden.json has what the measuring code gave when it was last decided on.  Another processor stays
within the tolerances (without vector instructions, on one thread or two, 3e-6 was the most); a
change of what is measured does not, as the mutants below show.  To renew it, after the decision
that RENEW asks for:

    python tests/study/test_golden.py
"""

import dataclasses
import json
import math
import tempfile
from pathlib import Path

import pandas as pd
import pytest
import torch

from deltarank import spectra
from deltarank.spectra import rank_measures
from deltarank.study import configs, cuts, evaluation, losses, measuring, overlaps, tasks, training
from deltarank.study.models import TINY
from deltarank.study.profiles import profile

GOLDEN = Path(__file__).with_name("golden.json")
RENEW = (
    "the measuring code gives other numbers than golden.json has. Either the results are to stay "
    "the same within tolerance: then find what changed them. Or they are to change: raise "
    "configs.MEASUREMENT by one, so that every stored run is computed again, and write the new "
    "numbers with: python tests/study/test_golden.py"
)
RELATIVE, ABSOLUTE = 1e-4, 1e-4  # growth is noted to four places

COLOURS = ("red", "blue", "green", "gold", "grey")
SHORT = [{"prompt": f"{i} colour:", "answer": f" {COLOURS[i % 5]}"} for i in range(8)]
LONG = [
    {"task": "kjv", "prompt": f"say {word} twice:", "answer": f" {word} and {word}"}
    for word in COLOURS
]
# What the untrained model makes of these prompts begins as the answers do.
MADE = [
    {"prompt": "zz", "answer": ":uu"},
    {"task": "kjv", "prompt": "the sea", "answer": "==== said"},
    {"task": "kjv", "prompt": "x: 1", "answer": "ww 222222"},
    {"task": "kjv", "prompt": "mmm mm", "answer": ":OO//"},
]
SOME = ("q_proj", "up_proj")
SPLITS = {"train": SHORT + LONG, "valid": LONG[:3] + SHORT[:3], "test": MADE + LONG[:2] + SHORT[:2]}


def config(method, **changes):
    """A float32 run of the tiny model on SPLITS, four steps if it trains."""
    task = Path(profile().store.parent, "golden.jsonl")
    if not task.exists():
        task.parent.mkdir(parents=True, exist_ok=True)
        rows = [{"split": split} | row for split, part in SPLITS.items() for row in part]
        task.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf8")
    sizes = {"model": TINY, "seq_len": 64, "batch_size": 8, "eval_rows": 8, "generate_rows": 5}
    steps = {} if method == "base" else {"steps": 4, "lr": 1e-2}
    recipe = sizes | steps | {"dtype": "float32", "compile": False} | changes
    return configs.RunConfig(task=str(task), method=method, **recipe)


def lora():
    return config("lora", rank=4, alpha=8.0)


def numbers_of(run):
    """What a run's record and spectra say, in numbers."""
    record = measuring.measure(run)
    names = record["shapes"]
    found = measuring.kept_spectra(run, names) if names else {}
    ranks = pd.DataFrame([rank_measures(S) for S in found.values()], found).to_dict("list")
    return {
        "losses": record["train_loss_nats"],
        "evaluation": record["evaluation"],
        "squared_norms": record["squared_norms"],
        "growth": record["growth"],
        "ranks": ranks | ({"mean_r90": sum(ranks["r90"]) / len(ranks["r90"])} if ranks else {}),
    }


def numbers_of_cuts():
    """Loss and score of each part, cut to two ranks."""
    found = {part: cuts.cut(config("full"), [2, 8], part=part) for part in cuts.CUT_PARTS}
    return {part: table[["loss_nats", "score"]].to_dict("list") for part, table in found.items()}


def numbers_of_overlaps():
    """The mean over the matrices, by rank."""
    overlaps._leading_subspaces.cache_clear()
    table = overlaps.overlaps(lora(), config("full"))
    table = table[table["rank"] <= 4]
    columns = ["left", "right", "left_chance", "right_chance"]
    return table.groupby("rank")[columns].mean().to_dict("list")


def defaults():
    """What a configuration leaves out of its key: a changed default would rename no run."""
    fields = dataclasses.fields(configs.RunConfig)
    return {f.name: repr(f.default) for f in fields if f.default is not dataclasses.MISSING}


def numbers_of_variants():
    """Of every adapter of PEFT's beside LoRA and TinyLoRA."""
    ranks = {"miss": 4, "oft": 8, "randlora": 8, "vera": 16}
    found = {}
    for method in configs.VARIANTS:
        fields = {"rank": ranks.get(method, 2)}
        fields |= {"alpha": 8.0} if method in configs.SCALED else {}
        fields |= {"knob": 0.5} if method in configs.KNOBS else {}
        found[method] = numbers_of(config(method, **fields))
    return found


SECTIONS = {
    "defaults": defaults,
    "base": lambda: numbers_of(config("base")),
    "full": lambda: numbers_of(config("full")),
    "lora": lambda: numbers_of(lora()),
    "sparse": lambda: numbers_of(config("lora", rank=4, alpha=8.0, layers=(1,), modules=SOME)),
    # At rank 1 the signs of singular vectors, which another machine may turn, change no update.
    "tinylora": lambda: numbers_of(config("tinylora", rank=1, vector=8, lr=0.3)),
    "variants": numbers_of_variants,
    "cuts": numbers_of_cuts,
    "overlaps": numbers_of_overlaps,
}


def leaves(tree, path=""):
    """{path: value} of nested dictionaries and lists."""
    if not isinstance(tree, dict | list):
        return {path: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {at: leaf for key, part in items for at, leaf in leaves(part, f"{path}/{key}").items()}


def close(path, golden, found):
    """Whether a number is what it was, for another processor: r90 within 1, its mean 0.25."""
    if isinstance(golden, str | None) or isinstance(found, str | None):
        return golden == found
    if "r90" in path:
        return abs(found - golden) <= (0.25 if path.endswith("mean_r90") else 1)
    return math.isclose(found, golden, rel_tol=RELATIVE, abs_tol=ABSOLUTE)


def differences(golden, found):
    """One line a number that is missing, new or not close."""
    golden, found = leaves(golden), leaves(found)
    lines = [f"{path}: only in one of both" for path in sorted(golden.keys() ^ found.keys())]
    return lines + [
        f"{path}: {golden[path]} was {found[path]} here"
        for path in golden
        if path in found and not close(path, golden[path], found[path])
    ]


@pytest.fixture
def stored_numbers():
    return json.loads(GOLDEN.read_text(encoding="utf8"))


@pytest.fixture(autouse=True)
def fresh(store, monkeypatch, tmp_path):
    """Neither store nor cache holds anything that would be loaded instead of computed."""
    monkeypatch.setenv("LOWRANK_CACHE", str(tmp_path / "cache"))


def test_the_golden_numbers_are_of_the_present_measurement(stored_numbers):
    assert stored_numbers.keys() == {"measurement", *SECTIONS}
    assert stored_numbers["measurement"] == configs.MEASUREMENT, RENEW


@pytest.mark.parametrize("section", SECTIONS)
def test_the_measuring_code_gives_the_golden_numbers(stored_numbers, section):
    found = differences(stored_numbers[section], SECTIONS[section]())
    assert found == [], f"{RENEW}\n{len(found)} differ"


def test_the_golden_numbers_hold_scores_of_what_was_generated(stored_numbers):
    """Scores that were all 0 would see no change of generation."""
    scores = stored_numbers["base"]["evaluation"]["test"]["row_score"]
    assert all(0 < score < 100 for score in scores[1:4])


# Mutants: what a change of the code might do, where it is used, and the section that must see it.


def but(change):
    """A function whose result is changed."""
    return lambda original: lambda *a, **k: change(original(*a, **k))


def given(change):
    """A function whose first argument is changed."""
    return lambda original: lambda first, *a, **k: original(change(first), *a, **k)


def with_fields(**fields):
    """A function whose configuration, its first argument, is changed."""
    return given(lambda run: dataclasses.replace(run, **fields))


def rounded(model):
    """The model with its weights rounded to bfloat16."""
    return model.bfloat16().float()


def one_metric(splits):
    """Splits whose rows are all scored by exact match."""
    return {name: [row | {"metric": "exact"} for row in rows] for name, rows in splits.items()}


def without_end(row):
    """A row without the newline that ends its answer."""
    return {key: tokens[:-1] for key, tokens in row.items()}


def everything(row):
    """A row whose prompt counts as well."""
    return row | {"labels": row["input_ids"]}


def without_borders(batch):
    """A packed batch whose rows see the ones before them."""
    places = torch.arange(batch["labels"].shape[1]).expand_as(batch["labels"])
    return batch | {"position_ids": places}


def weighed(gradients):
    """Gradients of the loss in which the first tokens count less."""
    dh, *others = gradients
    return dh * torch.linspace(0, 1, len(dh))[:, None], *others


def mean_of_rows(result):
    """An evaluation whose loss weighs every row alike."""
    rows = zip(result["row_nats"], result["row_tokens"], strict=True)
    return result | {"loss_nats": sum(n / k for n, k in rows) / len(result["row_nats"])}


def fewer(factors):
    """Factors of one direction less."""
    B, A, best = factors
    return B[:, :-1], A[:-1], best


def part_instead(part, other):
    """Factors of another part where `part` is asked for."""
    return lambda original: (
        lambda dW, r, asked, generator: original(
            dW, r, other if asked == part else asked, generator
        )
    )


def plus_one(r):
    """An energy rank that is one too high."""
    return r + 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongerRows(configs.RunConfig):
    """A configuration with another default."""

    seq_len: int = 64


MUTANTS = {
    "load_model: weights in bfloat16": ("base", training, "load_model", but(rounded)),
    "load_model, cuts: weights in bfloat16": ("cuts", cuts, "load_model", but(rounded)),
    "load_task: one metric for all": ("base", tasks, "load_task", but(one_metric)),
    "load_task: rows reversed": (
        "base", tasks, "load_task", but(lambda splits: {k: v[::-1] for k, v in splits.items()})),
    "encode: no newline when scored": ("base", evaluation, "encode", but(without_end)),
    "encode: no newline when trained": ("full", training, "encode", but(without_end)),
    "encode: the prompt counts": ("full", training, "encode", but(everything)),
    "pack: rows see each other": ("full", training, "pack", but(without_borders)),
    "prepare: another seed": ("lora", measuring, "prepare", with_fields(seed=1)),
    "prepare: another seed, TinyLoRA": (
        "tinylora", measuring, "prepare", with_fields(seed=1)),
    "prepare: a TinyLoRA of less": ("tinylora", measuring, "prepare", with_fields(vector=7)),
    "prepare: the other layer": ("sparse", measuring, "prepare", with_fields(layers=(0,))),
    "prepare: the embedding too": (
        "full", measuring, "prepare", with_fields(train_embedding=True)),
    "train: another schedule": ("full", measuring, "train", with_fields(schedule="constant")),
    "train: another order": ("full", measuring, "train", with_fields(seed=1)),
    "train: a weight decay": ("lora", measuring, "train", with_fields(weight_decay=1.0)),
    "HeadCrossEntropy: rows weigh unlike": (
        "full", losses.HeadCrossEntropy, "backward", but(weighed)),
    "answer_hidden: one token late": (
        "base", evaluation, "answer_hidden", but(lambda both: (both[0].roll(1, 0), both[1]))),
    "score_rows: nats a token": (
        "base", evaluation, "score_rows", but(lambda t: t.assign(nats=t["nats"] / t["tokens"]))),
    "score_rows: always right": (
        "base", evaluation, "score_rows", but(lambda t: t.assign(right=True))),
    "mean_loss, growth: a hundredth more": (
        "full", measuring, "mean_loss", but(lambda nats: 1.01 * nats)),
    "generate: a letter less": (
        "base", evaluation, "generate", but(lambda texts: [text[:-1] for text in texts])),
    "evaluate: rows weigh alike": ("base", measuring, "evaluate", but(mean_of_rows)),
    "evaluate, cuts: rows weigh alike": ("cuts", cuts, "evaluate", but(mean_of_rows)),
    "matrices: one is left out": (
        "full", measuring, "matrices", but(lambda found: dict(list(found.items())[1:]))),
    "singular_values: squared": (
        "full", measuring, "singular_values", but(lambda S: S.square() / S[0])),
    "factor_singular_values: of one factor": (
        "lora", measuring, "factor_singular_values",
        lambda original: lambda B, A: torch.linalg.svdvals(B.double())),
    "energy: sigma instead of its square": (
        "full", spectra, "energy", given(torch.sqrt)),
    "energy_rank: one too high": ("full", spectra, "energy_rank", but(plus_one)),
    "energy_rank: another share": (
        "full", spectra, "energy_rank", lambda original: lambda S, share: original(S, 0.92)),
    "stable_rank: by sigma": ("full", spectra, "stable_rank", given(torch.sqrt)),
    "entropy_rank: of the squares": ("full", spectra, "entropy_rank", given(torch.square)),
    "leading_factors: one direction less": ("cuts", cuts, "leading_factors", but(fewer)),
    "leading_factors, overlaps: one less": ("overlaps", overlaps, "leading_factors", but(fewer)),
    "cut: the head is rotated": ("cuts", cuts, "_cut_factors", part_instead("head", "rotated")),
    "cut: the rotated is the head": ("cuts", cuts, "_cut_factors", part_instead("rotated", "head")),
    "cut: the sign is the head": ("cuts", cuts, "_cut_factors", part_instead("sign", "head")),
    "cut: the tail is of signs": ("cuts", cuts, "_cut_factors", part_instead("tail", "sign")),
    "overlaps: not squared": ("overlaps", overlaps, "_overlaps", but(torch.sqrt)),
    "overlaps: sides swapped": ("overlaps", overlaps, "_overlaps", but(lambda both: both.flip(1))),
    "RunConfig: another default": ("defaults", configs, "RunConfig", lambda original: LongerRows),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_change_of_what_is_measured_is_seen(stored_numbers, monkeypatch, mutant):
    section, module, name, change = MUTANTS[mutant]
    monkeypatch.setattr(module, name, change(getattr(module, name)))
    assert differences(stored_numbers[section], SECTIONS[section]()) != []


def test_every_part_of_a_cut_is_seen_by_its_own_numbers(stored_numbers, monkeypatch):
    for part, other in [("head", "sign"), ("tail", "head"), ("rotated", "sign"), ("sign", "head")]:
        instead = stored_numbers["cuts"] | {part: stored_numbers["cuts"][other]}
        assert len(differences(stored_numbers["cuts"], instead)) >= 2


def rewrite():
    """Write golden.json anew, and say which numbers are not close to what it had."""
    golden = json.loads(GOLDEN.read_text(encoding="utf8")) if GOLDEN.exists() else {}
    with tempfile.TemporaryDirectory() as home, pytest.MonkeyPatch.context() as patch:
        settings = {"PROFILE": "smoke", "PROGRESS": "off", "BUILD": home, "LOWRANK_CACHE": home}
        for name, value in settings.items():
            patch.setenv(name, value)
        found = {name: compute() for name, compute in SECTIONS.items()}
    print(*differences(golden, {"measurement": configs.MEASUREMENT} | found), sep="\n")
    lines = [f"{json.dumps(name)}: {json.dumps(part)}" for name, part in found.items()]
    lines.insert(0, f'"measurement": {configs.MEASUREMENT}')
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf8")


if __name__ == "__main__":
    rewrite()
