"""The benchmark's own parts: what it times and stops, which pairs it writes, what it reads."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import bench
import bench_pairs
import bench_planted
import bench_variants
import pandas as pd
import pytest
import timing
import torch
from bench_pairs import Size, comparisons, pair_bytes, shortage, write_pair
from bench_planted import planted_at_rank, what_modeldelta_says, what_we_say
from safetensors.torch import load_file

from deltarank.cli import main
from deltarank.study.configs import OWN_OPTIMIZERS
from deltarank.study.profiles import profile
from deltarank.study.signatures import ADAMW
from deltarank.study.trials import METHODS

TINY_LLAMA = Size(
    "LlamaForCausalLM",
    torch.bfloat16,
    {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
        "tie_word_embeddings": True,
    },
)

# Programs


def python(code):
    return [sys.executable, "-c", code]


def test_a_command_is_timed_and_its_memory_seen(tmp_path):
    code = "import time; held = b'1' * 300_000_000; time.sleep(0.5)"
    row = timing.timed(python(code), tmp_path)
    assert row["ended"] == "done"
    assert 0.5 <= row["seconds"] < 30
    assert 0.3 <= row["GB"] < 0.4


def test_a_command_sees_a_cache_of_its_own(tmp_path):
    code = f"import os; open('{tmp_path}/seen', 'w').write(os.environ['LOWRANK_CACHE'])"
    timing.timed(python(code), tmp_path / "cache")
    assert (tmp_path / "seen").read_text() == str(tmp_path / "cache")


def test_a_command_is_stopped_at_the_limit(tmp_path):
    start = time.perf_counter()
    row = timing.timed(python("import time; time.sleep(60)"), tmp_path, limit=0.3)
    assert row["ended"] == "time limit"
    assert 0.3 <= row["seconds"] < 30 and time.perf_counter() - start < 30


def test_a_command_is_stopped_where_memory_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "RESERVE", 1e18)
    row = timing.timed(python("import time; time.sleep(60)"), tmp_path)
    assert row["ended"] == "out of memory" and row["seconds"] < 30


def test_a_command_that_fails_stops_the_bench(tmp_path):
    with pytest.raises(SystemExit, match="failed with 3"):
        timing.timed(python("import sys; sys.exit(3)"), tmp_path)


@pytest.mark.parametrize(
    "status, said, ended",
    [
        (0, "all memory is well", "done"),
        (-9, "", "out of memory"),
        (1, "RuntimeError: [enforce fail] can't allocate memory: you tried", "out of memory"),
        (1, "Traceback\nMemoryError\n", "out of memory"),
        (1, "KeyError: 'memory'", None),
        (-15, "", None),
    ],
)
def test_how_a_program_ended(status, said, ended):
    assert timing.how_it_ended(status, said) == ended


def test_another_tool_is_installed_once_in_an_environment_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWRANK_CACHE", str(tmp_path))
    ran = []
    monkeypatch.setattr(timing.subprocess, "run", lambda command, check: ran.append(command))
    path = timing.other("tool==1.0", "tool-run")
    home = tmp_path / "others" / "tool==1.0"
    assert path == str(home / "bin" / "tool-run")
    assert ran[1] == [home / "bin" / "pip", "install", "-q", "tool==1.0"]
    (home / "bin").mkdir(parents=True)
    (home / "bin" / "tool-run").touch()
    assert timing.other("tool==1.0", "tool-run") == path and len(ran) == 2


def test_a_table_is_stored_with_its_machine_where_asked(tmp_path, monkeypatch):
    table, path = pd.DataFrame({"seconds": [1.5]}), tmp_path / "times.csv"
    monkeypatch.delenv("RECORD", raising=False)
    timing.record(table, path)
    assert not path.exists()
    monkeypatch.setenv("RECORD", "yes")
    timing.record(table, path)
    assert [*pd.read_csv(path)] == ["seconds", "device", "threads", "torch", "commit"]


# Pairs


def tensors(folder):
    """All tensors of a folder of shards by name, each from the file that the index names."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    files = {file: load_file(folder / file) for file in set(index.values())}
    assert sum(map(len, files.values())) == len(index)
    return {name: files[file][name] for name, file in index.items()}


def test_a_pair_differs_in_its_layers_by_what_was_planted(tmp_path):
    torch.manual_seed(0)
    write_pair(tmp_path, TINY_LLAMA, lambda W: W + 1)
    base, tuned = (tensors(tmp_path / side) for side in ("base", "tuned"))
    assert base.keys() == tuned.keys() == bench_pairs.parameter_shapes(TINY_LLAMA).keys()
    assert {W.dtype for W in (*base.values(), *tuned.values())} == {torch.bfloat16}
    changed = {name for name in base if not torch.equal(base[name], tuned[name])}
    assert changed == {name for name in base if ".layers." in name}
    assert len(list((tmp_path / "base").glob("*.safetensors"))) == 3  # two layers and the rest


def test_the_bytes_of_a_pair_are_those_on_disk(tmp_path):
    write_pair(tmp_path, TINY_LLAMA, lambda W: W)
    stored = sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors"))
    assert 0 <= stored - pair_bytes(TINY_LLAMA) < 0.1 * stored  # the headers


def test_the_sizes_are_what_their_titles_say():
    parameters = {t: pair_bytes(s) / 2 / s.dtype.itemsize for t, s in bench_pairs.PAIRS.items()}
    said = {t: re.search(r"([\d.]+) ?(M|B)\b", t).groups() for t in parameters}
    assert len(said) == 3
    for title, (number, unit) in said.items():
        expected = float(number) * {"M": 1e6, "B": 1e9}[unit]
        assert parameters[title] == pytest.approx(expected, rel=0.04), title


def test_a_pair_needs_its_bytes_and_some_to_spare():
    assert shortage(10e9, 12e9) == ""
    assert shortage(10e9, 11.9e9) == "it needs 12.0 GB of disk, 11.9 are free"


def test_a_pair_that_does_not_fit_is_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_pairs, "other", lambda *needed: "")
    monkeypatch.setattr(bench_pairs, "PAIRS", {"small": TINY_LLAMA, "huge": TINY_LLAMA})
    bytes_of = iter((0, 1e18))
    monkeypatch.setattr(bench_pairs, "pair_bytes", lambda size: next(bytes_of))
    done = {"round": 0, "program": "spectra", "seconds": 1.0, "GB": 1.0, "ended": "done"}
    monkeypatch.setattr(bench_pairs, "measured", lambda size: pd.DataFrame([done]))
    monkeypatch.setattr(bench_pairs, "PAIR_TIMES", tmp_path / "times.csv")
    monkeypatch.setenv("RECORD", "yes")
    bench_pairs.bench_pairs()
    assert [*pd.read_csv(tmp_path / "times.csv")["pair"]] == ["small"]
    assert re.search(r"pair, huge:\n  left out: it needs \d+\.0 GB", capsys.readouterr().out)


def test_a_round_runs_the_programs_of_its_size_and_plain_svd_once(tmp_path, monkeypatch):
    monkeypatch.setattr(
        bench_pairs, "programs", lambda *_: dict.fromkeys(bench_pairs.ALL, python(""))
    )
    few = Size("", torch.float32, {}, ("modeldelta", "plain SVD"))
    rounds = [[row["program"] for row in bench_pairs.one_round(tmp_path, few, i)] for i in (0, 1)]
    assert rounds == [["modeldelta", "plain SVD"], ["modeldelta"]]


def test_programs_are_compared_by_medians_and_a_stopped_one_says_at_least():
    rows = [("spectra", s, 0.5, "done") for s in (2.0, 4.0, 90.0)]
    rows += [("modeldelta", 100.0, 7.0, "time limit"), ("adapter", 5.0, 1.0, "done")]
    table = pd.DataFrame(rows, columns=["program", "seconds", "GB", "ended"])
    assert comparisons(table) == [
        "spectra: at least 25.0x faster than modeldelta, 0.50 GB, not at least 7.00"
    ]
    assert comparisons(table.assign(ended="done")) == [
        "spectra: 25.0x faster than modeldelta, 0.50 GB, not 7.00"
    ]
    table.loc[0, "ended"] = "out of memory"
    assert comparisons(table) == []  # of ours that did not finish nothing is claimed


# A step of each method


def test_a_method_is_timed_in_a_process_of_its_own():
    assert bench_variants.in_fresh_process(os.getpid) != os.getpid()


def test_every_method_that_competes_has_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_variants, "PROFILES", {"paper": profile()})
    monkeypatch.setattr(bench_variants, "METHOD_TIMES", tmp_path / "times.csv")
    few = {name: METHODS[name] for name in ("LoRA", "VeRA")}
    monkeypatch.setattr(bench_variants, "METHODS", few)
    monkeypatch.setattr(bench_variants, "in_fresh_process", lambda step, config: (0.5, 1.25))
    monkeypatch.setenv("RECORD", "yes")
    bench_variants.bench_variants()
    found = pd.read_csv(tmp_path / "times.csv")
    one = [("LoRA", 1), ("VeRA", 1)]  # the contest of this profile is at size 1
    assert [*zip(found["method"], found["size"], strict=True)] == one * bench_variants.ROUNDS
    assert set(found["seconds"]) == {0.5} and (found["parameters"] > 0).all()


def test_every_optimizer_has_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_variants, "PROFILES", {"paper": profile()})
    monkeypatch.setattr(bench_variants, "STEP_TIMES", tmp_path / "times.csv")
    asked = []

    def timed(step, config):
        asked.append(config.optimizer)
        return 0.5, 1.25

    monkeypatch.setattr(bench_variants, "in_fresh_process", timed)
    monkeypatch.setenv("RECORD", "yes")
    bench_variants.bench_optimizers()
    found = pd.read_csv(tmp_path / "times.csv")
    assert [*found["optimizer"]] == asked == [ADAMW, *OWN_OPTIMIZERS] * bench_variants.ROUNDS
    assert [*found["round"].unique()] == [*range(bench_variants.ROUNDS)]


def test_a_plan_is_timed_without_a_cache_and_quoted_from_it(tmp_path, monkeypatch, capsys):
    caches = []

    def run(command, *, env, **options):
        caches.append(env["LOWRANK_CACHE"])
        return subprocess.CompletedProcess(command, 0, "entities.jsonl: 2 rows\n", "")

    def timed(command, scratch):
        caches.append(str(scratch))
        return {"seconds": 90.0, "GB": 2.0}

    monkeypatch.setattr(bench, "timed", timed)
    monkeypatch.setattr(bench.subprocess, "run", run)
    monkeypatch.setattr(bench, "PLAN_TIMES", tmp_path / "times.csv")
    monkeypatch.setenv("RECORD", "yes")
    monkeypatch.setattr(timing, "machine", dict)
    bench.bench_plan()
    assert capsys.readouterr().out == "entities.jsonl: 2 rows\ndeltarank plan: 1.5 min, 2.0 GB\n"
    [found] = pd.read_csv(tmp_path / "times.csv").to_dict("records")
    assert found == {"said": "entities.jsonl: 2 rows\n", "minutes": 1.5, "GB": 2.0}
    assert len({*caches}) == 1 and not Path(caches[0]).exists()
    assert bench.PLAN_ROWS.exists()


# What the tools say


def test_an_update_is_planted_at_its_rank_and_size():
    torch.manual_seed(0)
    W = torch.randn(40, 24)
    dW = planted_at_rank(W, r=8, size=0.05) - W
    S = torch.linalg.svdvals(dW.double())
    assert torch.allclose(S[:8], S[:1], rtol=1e-3) and S[8] < 1e-4 * S[0]
    assert float(dW.norm() / W.norm()) == pytest.approx(0.05, rel=1e-3)
    assert torch.equal(planted_at_rank(W[0], r=8, size=0.05), W[0])


@pytest.mark.parametrize("size, near", [(0.3, 0), (0.003, 14)])
def test_what_inspect_says_of_a_planted_rank(size, near, tmp_path):
    torch.manual_seed(0)
    write_pair(tmp_path, TINY_LLAMA, lambda W: planted_at_rank(W, r=3, size=size))
    folders = [str(tmp_path / side) for side in ("base", "tuned")]
    assert main(["inspect", *folders, "--json", str(tmp_path / "ours.json")]) == 0
    said = what_we_say(json.loads((tmp_path / "ours.json").read_text()))
    assert said["program"] == "deltarank" and said["matrices"] == 14
    assert said["relative_size"] == pytest.approx(size, rel=0.2)
    assert said["near_rounding"] == near
    assert said["says"].startswith("Of the squared update of 14 matrices rank 8 keeps")
    doubt = ": what a cut leaves out is mostly rounding, and its rank none of the training's"
    doubt = doubt if near else ""
    assert said["says"].endswith(f" {near} of 14 matrices are near rounding{doubt}.")
    if near:
        assert "much of it is rounding, above which 3 directions stand (median)." in said["says"]
    else:
        assert said["rank"] == said["r90"] == said["above_rounding"] == 3
        assert 3 < said["entropy_rank"] < 10 and ": it is low-rank. " in said["says"]


def module(name, rank, share, *, svd=True):
    numbers = {"effective_rank": rank, "concentration_top_k": share} if svd else {}
    return {"name": name, "has_svd": svd, "frob_norm_relative": rank / 1000, **numbers}


def test_what_modeldelta_says_is_read_of_the_layers_matrices():
    findings = [
        {"category": category, "title": title}
        for category, title in (("magnitude", "Heavy"), ("structure", "LoRA-like"), ("head", "No"))
    ]
    modules = [module(f"model.layers.{i}.q.weight", 40.0 + i, 0.9) for i in range(3)]
    modules += [module("model.embed_tokens.weight", 1.0, 0.0)]  # unchanged: rank 1 for them
    modules += [module("model.layers.0.norm.weight", 9.0, 0.0, svd=False)]
    assert what_modeldelta_says({"modules": modules, "diagnostics": {"findings": findings}}) == {
        "program": "modeldelta",
        "matrices": 3,
        "relative_size": 0.041,
        "entropy_rank": 41.0,
        "energy_20": 0.9,
        "says": "Heavy. LoRA-like.",
    }


def test_numbers_keep_four_digits():
    rows = [{"x": value} for value in (1.0, 0.00123456, 12345.6)]
    assert bench_planted.median(rows, "x") == 1.0
    assert bench_planted.median(rows[1:2], "x") == 0.001235
