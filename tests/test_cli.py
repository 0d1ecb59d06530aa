"""The command: what it prints and writes, what it refuses, and that a second call works."""

import fcntl
import json
import os
import pty
import shutil
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import torch
from pairs import Q, edit
from safetensors.torch import load_file

from deltarank import cli, compare
from deltarank.study import models, runs

ROOT = Path(cli.__file__).resolve().parent.parent


@pytest.fixture
def pair(save):
    """Folders of a base and a tuned model whose matrices have updates of rank 3."""
    return save()


def said(capsys, *arguments):
    """Exit status, and what was printed to the terminal and as errors."""
    status = cli.main([*map(str, arguments)])
    return status, *capsys.readouterr()


def test_the_first_line_says_what_was_found_and_what_to_do(pair, capsys):
    status, out, errors = said(capsys, "inspect", *pair)
    assert status == 0 and errors == ""
    first = " ".join(out.split("\n\n")[0].split())
    assert first.startswith("Of the squared update of 14 matrices rank 8 keeps 100 %")
    assert "it is low-rank. Cut at rank 2 it keeps 95 %." in first
    assert first.endswith("start at rank 8 on all linear layers and tune the learning rate first.")


def test_the_table_fits_a_terminal_and_says_what_its_columns_are(pair, capsys):
    lines = said(capsys, "inspect", *pair)[1].splitlines()
    assert max(len(line) for line in lines if "deltarank extract" not in line) <= 100
    (header,) = [line for line in lines if line.startswith("module")]
    assert header.split()[:3] == ["module", "matrices", "size"]
    q = next(line for line in lines if line.startswith("q ")).split()
    assert q[1] == "2" and q[4] == "2", "two layers; two of three directions hold 90 %"


@pytest.mark.parametrize(
    ("rule", "ranks"),
    [(["--energy", "0.9"], {2, 3}), (["--rank", "2"], {2}), (["--budget", "500"], {1})],
)
def test_ranks_follow_the_rule(pair, tmp_path, capsys, rule, ranks):
    assert said(capsys, "inspect", *pair, *rule, "--json", tmp_path / "out.json")[0] == 0
    found = json.loads((tmp_path / "out.json").read_text())
    lora = found["ranks"]["LoraConfig"]
    assert {lora["r"], *lora["rank_pattern"].values()} <= ranks
    assert found["ranks"]["use"].startswith("extraction")


def test_json_holds_every_number(pair, tmp_path, capsys):
    said(capsys, "inspect", *pair, "--json", tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    table = compare.compare_checkpoints(*pair)
    matrix = next(m for m in found["matrices"] if m["name"] == Q)
    assert matrix["S"][:3] == pytest.approx([0.04, 0.02, 0.01], rel=1e-3)
    assert matrix["shape"] == [32, 32] and len(found["matrices"]) == len(table)
    assert found["versions"]["torch"] == torch.__version__
    assert found["base"] == pair[0] and len(found["verdict"]) == 3


def test_what_was_measured_is_reused_when_only_the_rule_changes(pair, capsys, monkeypatch):
    first = said(capsys, "inspect", *pair)
    monkeypatch.setattr(compare, "_compare_matrix", lambda *a: pytest.fail("measured again"))
    assert said(capsys, "inspect", *pair) == first
    assert said(capsys, "inspect", *pair, "--rank", "1")[0] == 0


def test_a_second_call_replaces_page_numbers_and_adapter(pair, tmp_path, capsys):
    page, numbers, out = tmp_path / "page.html", tmp_path / "out.json", tmp_path / "adapter"
    for rank in ("2", "1"):
        files = ("--html", page, "--json", numbers)
        assert said(capsys, "inspect", *pair, *files, "--rank", rank)[0] == 0
        status, told, _ = said(capsys, "extract", *pair, out, "--rank", rank)
        assert status == 0 and f"holds 14 matrices at rank {rank}" in told
        assert json.loads((out / "adapter_config.json").read_text())["r"] == int(rank)
        assert json.loads(numbers.read_text())["rule"] == {"rank": int(rank)}
        assert f"--rank {rank}" in page.read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("adapter", "base", "out.json", "page.html", "tuned"),
    ]


def test_extract_says_what_it_holds_drops_and_how_to_load_it(pair, tmp_path, capsys):
    edit(pair[1], lambda tensors: tensors["model.embed_tokens.weight"].add_(0.01))
    status, told, _ = said(capsys, "extract", *pair, tmp_path / "adapter", "--budget", "5000")
    assert status == 0
    assert "Dropped, since a LoRA cannot hold them: model.embed_tokens.weight" in told
    assert f"PeftModel.from_pretrained(base_model, '{tmp_path / 'adapter'}')" in told


def bad_calls(pair, home):
    """Calls that are refused, and the word that each message has to name."""
    base, tuned = pair
    (home / "mine").mkdir()
    (home / "mine" / "notes.txt").write_text("keep me")
    broken = home / "broken"
    shutil.copytree(tuned, broken)
    edit(broken, lambda tensors: tensors[Q].fill_(float("nan")))
    return {
        "no folder": (["inspect", base, home / "nowhere"], "nowhere"),
        "no model": (["inspect", base, home / "mine"], "config.json"),
        "NaN": (["inspect", base, broken], Q),
        "an energy": (["inspect", base, tuned, "--energy", "1.5"], "1.5"),
        "a rank": (["inspect", base, tuned, "--rank", "400"], "400"),
        "a budget": (["extract", base, tuned, home / "new", "--budget", "3"], "budget=3"),
        "two rules": (["inspect", base, tuned, "--rank", "4", "--energy", "0.9"], "not allowed"),
        "a folder of mine": (["extract", base, tuned, home / "mine"], "mine"),
        "no place": (["inspect", base, tuned, "--html", home / "no" / "page.html"], "no folder"),
        "no file": (["inspect", base, tuned, "--json", home], "no file"),
        "no task": (["inspect", base, tuned, "--task", "cooking.jsonl"], "cooking"),
        "no command": (["shrink", base, tuned], "shrink"),
    }


def test_bad_input_is_one_line_and_status_2_before_any_work(pair, tmp_path, capsys):
    for name, (arguments, word) in bad_calls(pair, tmp_path).items():
        try:
            status = cli.main([*map(str, arguments)])
        except SystemExit as stop:  # argparse
            status = stop.code
        out, errors = capsys.readouterr()
        assert status == 2 and out == "", name
        assert word in errors and errors.count("\n") == 1 and errors.startswith("deltarank: "), name
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep me"


def test_warnings_are_one_line_each(pair, capsys):
    status, out, errors = said(capsys, "inspect", pair[0], pair[0])
    assert status == 0 and "unchanged" in out
    assert errors.count("\n") == 1 and "warning" in errors and "identical" in errors


def test_an_interrupt_says_that_what_was_measured_is_kept(pair, capsys, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "open_pair", interrupted)
    status, _, errors = said(capsys, "inspect", *pair)
    assert status == 130 and errors.count("\n") == 1 and "kept" in errors


def test_a_task_needs_the_extra_and_says_so(pair, capsys, monkeypatch):
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    status, _, errors = said(capsys, "inspect", *pair, "--task", "sentiment")
    assert status == 2 and "deltarank[study]" in errors


def test_a_task_scores_base_cuts_and_tuned(config, tmp_path, capsys):
    base, tuned = str(tmp_path / "start"), str(tmp_path / "end")
    runs.save_model(config.__class__(task="sentiment", method="base", model=models.TINY), base)
    runs.save_model(config, tuned)
    own = tmp_path / "rows.jsonl"
    own.write_text('{"prompt": "1 + 1 =", "answer": " 2"}\n' * 3)
    status, out, errors = said(capsys, "inspect", base, tuned, "--task", own)
    assert status == 0 and errors == "", errors
    lines = [line.split() for line in out.splitlines()]
    assert [line[0] for line in lines if line and line[0] in ("base", "cut", "tuned")] == [
        *("base", "cut", "cut", "tuned"),
    ]


@pytest.mark.parametrize("command", [[], ["inspect"], ["extract"]])
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([*command, "--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and "example:\n  deltarank " in out


def test_the_installed_command_works_twice_and_is_quiet(pair, tmp_path):
    command = [Path(sys.executable).with_name("deltarank"), "inspect", *pair]
    environment = {k: v for k, v in os.environ.items() if k != "PROGRESS"}
    done = [
        subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
        for _ in range(2)
    ]
    assert [one.returncode for one in done] == [0, 0] and done[0].stdout == done[1].stdout
    assert done[0].stdout.startswith("Of the squared update") and done[0].stderr == ""


def test_make_inspect_wraps_the_command(pair, tmp_path):
    make = [
        "make",
        "-C",
        ROOT,
        "-o",
        ".venv/ready",
        "inspect",
        f"BUILD={tmp_path}/build",
        f"OUT={tmp_path}/adapter",
    ]
    lacking = subprocess.run([*make, "BASE=one"], capture_output=True, text=True)
    assert lacking.returncode and "make inspect BASE=" in lacking.stdout
    for _ in range(2):
        whole = [*make, f"BASE={pair[0]}", f"TUNED={pair[1]}"]
        done = subprocess.run(whole, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Of the squared update of 14 matrices" in done.stdout
    assert (tmp_path / "build" / "inspect" / "page.html").exists()
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("option", ["--html", "--json"])
def test_a_target_that_cannot_be_written_is_refused_before_any_work(
    pair, tmp_path, capsys, monkeypatch, option
):
    monkeypatch.setattr(compare, "open_pair", lambda *a, **k: pytest.fail("the pair was opened"))
    for target in (tmp_path, tmp_path / "no" / "file", "/proc/file"):
        status, out, errors = said(capsys, "inspect", *pair, option, target)
        assert status == 2 and out == "" and "cannot be written" in errors


def test_a_page_that_cannot_be_finished_leaves_the_last_one(pair, tmp_path, capsys, monkeypatch):
    page = tmp_path / "page.html"
    page.write_text("the last one")

    def full(path, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    status, _, errors = said(capsys, "inspect", *pair, "--html", page)
    assert status == 2 and "No space left" in errors and page.read_text() == "the last one"
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_pickles_are_read_only_where_the_option_says_so(pair, capsys):
    base, tuned = pair
    weights = f"{tuned}/model.safetensors"
    torch.save(load_file(weights), f"{tuned}/pytorch_model.bin")
    os.remove(weights)
    status, _, errors = said(capsys, "inspect", base, tuned)
    assert status == 2 and "--allow-pickle" in errors and "allow_pickle" not in errors
    assert said(capsys, "inspect", base, tuned, "--allow-pickle")[0] == 0


def test_the_version_is_told_without_loading_torch():
    code = "import sys; from deltarank import cli; cli.main(['--version'])"
    lists = f"import atexit, sys; atexit.register(lambda: print(*sys.modules)); {code}"
    done = subprocess.run([sys.executable, "-c", lists], capture_output=True, text=True)
    version, loaded = done.stdout.split("\n", 1)
    assert done.returncode == 0 and version == f"deltarank {cli.__version__}"
    assert not {"torch", "pandas", "transformers", "jinja2"} & set(loaded.split())


def test_inspect_loads_neither_transformers_nor_the_page_it_does_not_write(pair):
    code = "import sys; from deltarank import cli; cli.main(sys.argv[1:]); print(*sys.modules)"
    command = [sys.executable, "-c", code, "inspect", *pair]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "torch" in loaded
    assert not {"transformers", "peft", "jinja2", "matplotlib", "huggingface_hub"} & loaded


def test_a_reader_that_stops_reading_is_no_error(pair):
    command = f"{Path(sys.executable).with_name('deltarank')} inspect {pair[0]} {pair[1]}"
    piped = f"set -o pipefail; {command} | true"
    done = subprocess.run(["bash", "-c", piped], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""


def test_a_terminal_sees_progress(pair):
    here, there = pty.openpty()
    fcntl.ioctl(there, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
    command = [Path(sys.executable).with_name("deltarank"), "inspect", *pair]
    environment = {k: v for k, v in os.environ.items() if k != "PROGRESS"}
    subprocess.run(command, stdout=subprocess.PIPE, stderr=there, env=environment, check=True)
    assert b"compare checkpoints" in os.read(here, 4096)
