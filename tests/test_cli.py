"""The command: what it prints and writes, what it refuses, and that a second call works."""

import contextlib
import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import torch
from loras import planted, write_lora
from pairs import Q, edit
from safetensors.torch import load_file
from small_runs import saved_pair

from deltarank import __version__, adapters, alignment, cli, compare
from deltarank.lora import Lora
from deltarank.options import PLAN_STEPS, SAID
from deltarank.study import advice, convert, cuts, healing, models, own_rows, rivals, runs
from deltarank.study.profiles import PROFILES

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
    assert "score the cut before you ship it. To train a LoRA anew, start at rank 8 on all" in first


def test_the_table_fits_a_terminal_and_says_what_its_columns_are(pair, capsys):
    lines = said(capsys, "inspect", *pair)[1].splitlines()
    assert max(len(line) for line in lines if "deltarank extract" not in line) <= 100
    (header,) = [line for line in lines if line.startswith("module")]
    assert header.split()[:3] == ["module", "matrices", "size"]
    q = next(line for line in lines if line.startswith("q ")).split()
    assert q[1] == "2" and q[4] == "2", "two layers; two of three directions hold 90 %"


@pytest.mark.parametrize(
    ("rule", "ranks"),
    [
        ([], {2}),
        (["--energy", "0.999"], {3}),
        (["--rank", "2"], {2}),
        (["--budget", "500"], {1}),
    ],
)
def test_ranks_follow_the_rule(pair, tmp_path, capsys, rule, ranks):
    assert said(capsys, "inspect", *pair, *rule, "--json", tmp_path / "out.json")[0] == 0
    found = json.loads((tmp_path / "out.json").read_text())
    lora = found["ranks"]["LoraConfig"]
    assert {lora["r"], *lora["rank_pattern"].values()} == ranks
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
    assert "Dropped, since no factors are written for them: model.embed_tokens.weight" in told
    assert f"vLLM loads it with --enable-lora --lora-modules cut={tmp_path / 'adapter'}.\n" in told
    assert "convert_lora_to_gguf.py --base BASE OUT" in told
    assert f"PeftModel.from_pretrained(base_model, '{tmp_path / 'adapter'}')" in told


def test_extract_says_what_the_rule_gives_no_rank(pair, lora, tmp_path, capsys):
    told = said(capsys, "extract", *pair, tmp_path / "small", "--budget", "300")[1]
    assert "Given no rank by the rule: model.layers." in told and "Dropped" not in told
    told = said(capsys, "extract", lora, tmp_path / "smaller", "--budget", "300")[1]
    assert "Given no rank by the rule: model.layers." in told


def test_extract_with_norms_says_that_vllm_loads_it_not(pair, tmp_path, capsys):
    (tmp_path / "out").mkdir()  # which is no adapter that is replaced
    told = said(capsys, "extract", *pair, tmp_path / "out", "--rank", "20", "--norms")[1]
    assert "load no adapter that keeps norms" in told and "--max-lora-rank" not in told
    again = said(capsys, "extract", *pair, tmp_path / "out", "--rank", "2", "--patterns")[1]
    assert "llama.cpp" in again and "It replaced the adapter that was there." in again
    assert "It replaced" not in told


def test_extract_leaves_norms_out_and_says_so(pair, tmp_path, capsys):
    _, told, _ = said(capsys, "extract", *pair, tmp_path / "adapter", "--rank", "2")
    whole = 14 * 21 + 5 * 32  # of 14 matrices (16 + 4 + 1), of 5 norms 1 each of 32, times 1e-4
    kept = f"It keeps {20 / 21:.0%} of the squared update of the matrices that can get a rank, "
    assert f"{kept}{14 * 20 / whole:.0%} of the whole.".replace("%", " %") in told
    share = f"{5 * 32 / whole:.0%}".replace("%", " %")
    assert f"Left out: 5 tensors of norms, {share} of the squared update; --norms" in told
    inspected = " ".join(said(capsys, "inspect", *pair)[1].split())
    assert f"Cut at rank 2 it keeps {20 / 21:.0%}.".replace("%", " %") in inspected
    outside = "Outside these matrices, not in the factors: vocabulary 0 %, norms, biases and others"
    assert f"{outside} {share} of the whole" in inspected
    assert "all stored at" not in told
    _, told, _ = said(capsys, "extract", *pair, tmp_path / "adapter", "--norms")
    assert "and 5 norms whole" in told and "Left out" not in told


def test_extract_says_at_which_rank_all_are_stored(pair, tmp_path, capsys):
    out = tmp_path / "adapter"
    _, told, _ = said(capsys, "extract", *pair, out, "--rank", "20")
    assert "at rank 16 to 20 (median 20), all stored at 20 (zeros fill the rest)" in told
    assert json.loads((out / "adapter_config.json").read_text())["rank_pattern"] == {}
    _, told, _ = said(capsys, "extract", *pair, out, "--rank", "20", "--patterns")
    assert "at rank 16 to 20 (median 20), " in told and "stored at" not in told
    assert json.loads((out / "adapter_config.json").read_text())["rank_pattern"]


def test_extract_says_what_rounding_loses(pair, tmp_path, capsys):
    out = tmp_path / "adapter"
    assert "rounding" not in said(capsys, "extract", *pair, out, "--rank", "2")[1]
    _, told, _ = said(capsys, "extract", *pair, out, "--rank", "2", "--dtype", "bfloat16")
    assert re.search(r"; rounding to bfloat16 loses 0\.000\d+ % of it\.", told)
    kinds = {W.dtype for W in load_file(out / "adapter_model.safetensors").values()}
    assert kinds == {torch.bfloat16}


@pytest.fixture
def lora(tmp_path):
    """Folder of an adapter of PEFT with random factors of rank 4 in six matrices."""
    return planted(tmp_path / "lora", "plain")


def test_an_adapter_is_inspected_alone(lora, tmp_path, capsys):
    page, numbers = tmp_path / "page.html", tmp_path / "out.json"
    status, out, errors = said(capsys, "inspect", lora, "--html", page, "--json", numbers)
    assert status == 0 and errors == ""
    assert out.startswith("Of its rank 4 in 6 matrices the adapter uses ")
    assert f"deltarank extract {lora} OUT --energy 0.9" in out
    found = json.loads(numbers.read_text())
    assert found["base"] is None and found["tuned"] == lora and len(found["matrices"]) == 6
    assert {m["lora_rank"] for m in found["matrices"]} == {4}
    assert {m["relative_size"] for m in found["matrices"]} == {None}
    assert "Adapter: <code>" in page.read_text() and "nan" not in out


def test_an_adapter_is_cut_alone(lora, tmp_path, capsys):
    out = tmp_path / "out"
    status, told, errors = said(capsys, "extract", lora, out, "--rank", "2", "--dtype", "float16")
    assert status == 0 and errors == ""
    assert told.startswith(f"{out} holds 6 matrices at rank 2, 0.0 MB.")
    assert "rounding to float16 loses" in told and "Left out" not in told
    status, told, _ = said(capsys, "inspect", out)
    assert status == 0 and "Of its rank 2 in 6 matrices" in told


def test_what_an_adapter_keeps_whole_is_one_line_of_warning(tmp_path, capsys):
    options = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["norm"]}
    lora = write_lora(tmp_path / "lora", **options)
    for command in (["inspect", lora], ["extract", lora, tmp_path / "out"]):
        status, _, errors = said(capsys, *command)
        assert status == 0 and errors.count("\n") == 1 and "whole, not as factors" in errors


def test_paths_may_stand_around_options(pair, lora, tmp_path, capsys):
    base, tuned = pair
    page, out = tmp_path / "page.html", tmp_path / "out"
    calls = [
        ["inspect", base, "--html", page, tuned],
        ["inspect", "--html", page, base, tuned],
        ["extract", base, tuned, "--rank", "2", out],
        ["extract", base, "--rank", "2", tuned, out],
        ["extract", "--rank", "2", lora, out],
        ["extract", lora, "--rank", "2", out],
    ]
    assert [said(capsys, *call)[0] for call in calls] == [0] * 6


def bad_healing(base, tuned, lora, home):
    """Calls of extract --heal that are refused, and the word that each message has to name."""
    (home / "rows.csv").write_text("prompt\n")
    lines = {"rows": '{"prompt": "a"}', "lack": '{"prompt": "a"}\n{"answer": "b"}', "none": ""}
    for name, text in lines.items():
        (home / f"{name}.jsonl").write_text(text)
    rows, lack, none = (home / f"{name}.jsonl" for name in lines)
    pair = ["extract", base, tuned, home / "new"]
    return {
        "steps alone": ([*pair, "--steps", "3"], "--steps needs --heal"),
        "a rate alone": ([*pair, "--lr", "1e-3"], "--lr needs --heal"),
        "no steps": ([*pair, "--heal", rows, "--steps", "0"], "'0' is no whole number"),
        "no rate": ([*pair, "--heal", rows, "--lr", "0"], "'0' is not above 0, such as 0.001"),
        "to heal a LoRA": (["extract", lora, home / "new", "--heal", rows], "needs BASE and TUNED"),
        "to heal norms": ([*pair, "--heal", rows, "--norms"], "leave --norms out"),
        "to heal pickles": ([*pair, "--heal", rows, "--allow-pickle"], "leave --allow-pickle out"),
        "no prompt": ([*pair, "--heal", lack], "lack.jsonl, line 2: a row lacks prompt"),
        "no rows": ([*pair, "--heal", none], "none.jsonl is empty"),
        "no such rows": ([*pair, "--heal", home / "nowhere.jsonl"], "there is no such file"),
        "a folder of rows": ([*pair, "--heal", home], "is a folder: give a .jsonl file"),
        "no lines": ([*pair, "--heal", home / "rows.csv"], "give a .jsonl file"),
        "no tokenizer": ([*pair, "--heal", rows], "save it beside the model"),
        "healed onto mine": ([*pair[:3], home / "mine", "--heal", rows], "is no adapter"),
        "from a LoRA": (["extract", lora, tuned, home / "new", "--heal", rows], "is an adapter"),
    }


def bad_calls(pair, home):
    """Calls that are refused, and the word that each message has to name."""
    base, tuned = pair
    lora = planted(home / "a-lora", "plain")
    (home / "mine").mkdir()
    (home / "mine" / "notes.txt").write_text("keep me")
    for name in ("checkpoint-500", "checkpoint-1000", "checkpoint-best"):
        (home / "run" / name).mkdir(parents=True)
    healing = bad_healing(base, tuned, lora, home)
    return healing | {
        "no folder": (["inspect", base, home / "nowhere"], "nowhere"),
        "no model": (["inspect", base, home / "mine"], "config.json"),
        "a trainer's folder": (
            ["inspect", base, home / "run"],
            "json; it has checkpoint-1000: give",
        ),
        "one of an adapter": (["inspect", home / "run"], "; it has checkpoint-1000: give that"),
        "an energy": (["inspect", base, tuned, "--energy", "1.5"], "1.5"),
        "a rank": (["inspect", base, tuned, "--rank", "400"], "400"),
        "a budget": (["extract", base, tuned, home / "new", "--budget", "3"], "budget=3"),
        "a power": (["inspect", base, tuned, "--budget", "1e6"], "such as 1000000"),
        "two rules": (["inspect", base, tuned, "--rank", "4", "--energy", "0.9"], "not allowed"),
        "a folder of mine": (["extract", base, tuned, home / "mine"], "mine"),
        "no place": (["inspect", base, tuned, "--html", home / "no" / "page.html"], "no folder"),
        "no file": (["inspect", base, tuned, "--json", home], "no file"),
        "a file that is read": (
            ["inspect", base, tuned, "--json", f"{tuned}/model.safetensors"],
            "model.safetensors cannot be written: it is a file of what is read",
        ),
        "one file for two": (
            ["inspect", base, tuned, "--html", home / "new", "--json", home / "new"],
            "give two files",
        ),
        "OUT in a file": (["extract", base, tuned, f"{tuned}/config.json/out"], "is no folder"),
        "no task": (["inspect", base, tuned, "--task", "cooking.jsonl"], "no such file"),
        "a task of pickles": (
            ["inspect", base, tuned, "--task", "facts", "--allow-pickle"],
            "leave --allow-pickle out",
        ),
        "no command": (["shrink", base, tuned], "shrink"),
        "no path": (["inspect"], "BASE TUNED | ADAPTER"),
        "one model": (
            ["inspect", base],
            "give BASE and TUNED (and OUT to extract), or one adapter",
        ),
        "no OUT": (
            ["extract", base, tuned],
            "give BASE and TUNED (and OUT to extract), or one adapter",
        ),
        "one path": (["extract", lora], "give BASE TUNED OUT, or ADAPTER OUT; 1 given"),
        "three": (["inspect", base, tuned, lora], "give BASE TUNED, or ADAPTER; 3 given"),
        "four": (["extract", base, tuned, lora, home / "new"], "4 given"),
        "no option": (["inspect", base, tuned, "--rnk", "4"], "--rnk"),
        "a LoRA as base": (["inspect", lora, tuned], f"{lora} is an adapter"),
        "a LoRA as tuned": (["inspect", base, lora], "inspect it alone, or merge it"),
        "a LoRA to cut": (["extract", base, lora, home / "new"], "merge it (merge_and_unload)"),
        "onto itself": (["extract", lora, lora], "name another folder"),
        "a LoRA onto mine": (["extract", lora, home / "mine"], "mine"),
        "a LoRA's rank": (["extract", lora, home / "new", "--rank", "5"], "from 1 to 4"),
        "a LoRA's task": (["inspect", lora, "--task", "facts"], "--task needs BASE and TUNED"),
        "its norms": (["extract", lora, home / "new", "--norms"], "--norms needs BASE and TUNED"),
        "a type": (["extract", base, tuned, home / "new", "--dtype", "int8"], "int8"),
        "a small budget": (["inspect", lora, "--budget", "3"], "takes 48 parameters or more"),
        "no prompts": (["extract", base, tuned, home / "new", "--heal", ""], "--heal: the name is"),
        "no page": (["inspect", base, tuned, "--html", " "], "--html: the name is empty"),
        "no base": (["inspect", "", tuned], "BASE TUNED | ADAPTER: the name is empty"),
        "an empty model": (["plan", "rows.jsonl", "--model", ""], "--model: the name is empty"),
        "rows and base": (["plan", "rows.jsonl", base], "ROWS; 2 given; the base goes to --model"),
        "nobody's": (["inspect", "~nobody-here/base", tuned], "in the home of a user who is not"),
    }


def test_bad_input_is_one_line_and_status_2_before_any_work(pair, tmp_path, capsys, monkeypatch):
    for owner, name in ((compare, "_compare_matrix"), (Lora, "factors")):
        monkeypatch.setattr(owner, name, lambda *_: pytest.fail("a matrix was read"))
    for name, (arguments, word) in bad_calls(pair, tmp_path).items():
        try:
            status = cli.main([*map(str, arguments)])
        except SystemExit as stop:  # argparse
            status = stop.code
        out, errors = capsys.readouterr()
        assert status == 2 and out == "", name
        assert word in errors and errors.count("\n") == 1 and errors.startswith("deltarank: "), name
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep me"
    assert not (tmp_path / "new").exists()


def test_a_tensor_that_is_not_finite_is_named_in_one_line(pair, capsys):
    edit(pair[1], lambda tensors: tensors[Q].fill_(float("nan")))
    status, out, errors = said(capsys, "inspect", *pair)
    assert status == 2 and out == "" and errors.count("\n") == 1 and Q in errors


def test_a_budget_for_a_smaller_matrix_than_a_layers_is_refused(pair, capsys, monkeypatch):
    """The norm of heads as a matrix is no linear layer, and gets no rank."""
    monkeypatch.setattr(compare, "_compare_matrix", lambda *_: pytest.fail("a matrix was read"))
    norm = "model.layers.0.self_attn.q_norm.weight"
    for folder in pair:
        edit(folder, lambda tensors: tensors.update({norm: torch.ones(8, 16)}))
    status, out, errors = said(capsys, "inspect", *pair, "--budget", "30")
    assert status == 2 and out == "" and "one rank of one matrix takes 48" in errors


@pytest.mark.parametrize("rule", [("--rank", "400"), ("--budget", "3")])
@pytest.mark.parametrize("command", ["inspect", "extract"])
def test_a_rule_that_gives_nothing_is_refused_before_any_work(
    pair, tmp_path, capsys, monkeypatch, command, rule
):
    monkeypatch.setattr(compare, "_compare_matrix", lambda *_: pytest.fail("a matrix was read"))
    out = [tmp_path / "new"] * (command == "extract")
    status, told, errors = said(capsys, command, *pair, *out, *rule)
    assert status == 2 and told == "" and rule[1] in errors


def test_warnings_are_one_line_each(pair, capsys):
    status, out, errors = said(capsys, "inspect", pair[0], pair[0])
    assert status == 0 and "unchanged" in out
    assert errors.count("\n") == 1 and "warning" in errors and "identical" in errors


def test_what_the_base_lacks_is_one_line_of_warning(pair, tmp_path, capsys):
    """Added words, as a template for chats brings them, and a new head."""

    def grow(tensors):
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = torch.cat([tensors[name], torch.ones(2, 32)])
        tensors |= {"score.weight": torch.ones(3, 32), "score.bias": torch.ones(3)}

    edit(pair[1], grow)
    page, extract = tmp_path / "page.html", ["extract", *pair, tmp_path / "out"]
    for call in (["inspect", *pair, "--html", page], extract, [*extract, "--rank", "2"]):
        status, _, errors = said(capsys, *call)
        assert status == 0 and errors.count("\n") == 1
        new = "lm_head.weight[-2:], model.embed_tokens.weight[-2:], score.bias and 1 more"
        assert f"{pair[1]} has {new}, which {pair[0]} has not: no adapter holds them" in errors
    assert "score.bias and 1 more" in page.read_text()


def test_an_interrupt_says_that_what_was_measured_is_kept(pair, capsys, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "_compare_matrix", interrupted)
    status, _, errors = said(capsys, "inspect", *pair)
    assert status == 130 and errors.count("\n") == 1 and "kept" in errors


def test_an_interrupt_of_what_keeps_nothing_says_so(pair, tmp_path, capsys, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(adapters, "write_adapter", interrupted)
    status, _, errors = said(capsys, "extract", *pair, tmp_path / "out", "--rank", "2")
    assert status == 130 and errors == "deltarank: interrupted; nothing was written\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_the_end_of_a_job_is_as_an_interrupt(pair, tmp_path, capsys, monkeypatch, number):
    before = signal.signal(number, signal.SIG_DFL)  # nohup, under which tests may run, ignores one
    monkeypatch.setattr(adapters, "write_adapter", lambda *_: signal.raise_signal(number))
    try:
        status, told, errors = said(capsys, "extract", *pair, tmp_path / "new", "--rank", "2")
    finally:
        signal.signal(number, before)
    assert status == 130 and told == "" and "interrupted; nothing was written" in errors


def test_an_interrupt_that_a_library_turns_into_an_error_is_one(pair, capsys, monkeypatch):
    """What safetensors reads while Ctrl-C comes raises a ValueError."""

    def reads(*_):
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        raise ValueError("could not determine the shape")

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs behind & ignore it
    monkeypatch.setattr(compare, "_compare_matrix", reads)
    try:
        status, told, errors = said(capsys, "inspect", *pair)
    finally:
        signal.signal(signal.SIGINT, before)
    assert status == 130 and told == "" and errors.startswith("deltarank: interrupted; what was")


def test_a_terminal_that_cannot_show_a_sign_shows_another(pair):
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    call = [sys.executable, "-c", "import deltarank.cli; deltarank.cli.main()", "inspect", *pair]
    done = subprocess.run(call, env=environment, capture_output=True, text=True, check=False)
    assert done.stderr == "" and "rank 8 keeps 100 %" in done.stdout
    assert "embed_tokens (vocabulary)" in done.stdout and "?" in done.stdout  # in place of a dash


def test_what_runs_out_of_memory_is_one_line(pair, capsys, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(compare, "_compare_matrix", full)
    assert said(capsys, "inspect", *pair) == (2, "", "deltarank: out of memory\n")


@pytest.mark.parametrize("missing", ["transformers", "sacrebleu"])
def test_a_task_needs_the_extra_and_says_so_before_any_work(pair, capsys, monkeypatch, missing):
    monkeypatch.setattr(compare, "_compare_matrix", lambda *_: pytest.fail("a matrix was read"))
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: name != missing or None)
    status, _, errors = said(capsys, "inspect", *pair, "--task", "sentiment")
    assert status == 2 and f"--task needs {missing}: pip install '.[study]'" in errors


def test_a_base_without_a_tokenizer_is_refused_before_any_work(pair, capsys, monkeypatch):
    monkeypatch.setattr(compare, "_compare_matrix", lambda *_: pytest.fail("a matrix was read"))
    status, told, errors = said(capsys, "inspect", *pair, "--task", "sentiment")
    assert status == 2 and told == "" and errors.count("\n") == 1
    assert "deltarank: the tokenizer of " in errors and "save it beside the model" in errors


def test_models_that_cannot_be_scored_are_refused_before_any_work(
    config, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(compare, "_compare_matrix", lambda *_: pytest.fail("a matrix was read"))
    base, tuned, _ = saved_pair(tmp_path)
    model = models.load_model(tuned)
    model.resize_token_embeddings(390)
    model.save_pretrained(tuned)
    capsys.readouterr()  # of transformers
    status, told, errors = said(capsys, "inspect", base, tuned, "--task", "sentiment")
    assert status == 2 and told == "" and errors.count("\n") == 1
    assert "differ in vocabulary" in errors and "leave --task out" in errors
    rows = tmp_path / "long.jsonl"
    rows.write_text(json.dumps({"prompt": "x" * 3000, "answer": "y"}))
    status, told, errors = said(capsys, "inspect", base, base, "--task", rows)
    assert status == 2 and told == "" and "a row has 3,002 tokens" in errors
    monkeypatch.setattr(models, "memory", lambda: 1)
    status, told, errors = said(capsys, "inspect", base, base, "--task", "sentiment")
    assert status == 2 and told == "" and "2 at once" in errors and "leave --task out" in errors


def test_a_task_scores_base_cuts_recommended_ranks_and_tuned(config, tmp_path, capsys):
    base, tuned = str(tmp_path / "start"), str(tmp_path / "end")
    runs.save_model(config.__class__(task="sentiment", method="base", model=models.TINY), base)
    runs.save_model(config, tuned)
    own = tmp_path / "rows.jsonl"
    own.write_text('{"prompt": "1 + 1 =", "answer": " 2"}\n' * 3)
    status, out, errors = said(capsys, "inspect", base, tuned, "--task", own)
    assert status == 0 and errors == "", errors
    lines = [line.split() for line in out.splitlines()]
    assert [line[0] for line in lines if line and line[0] in ("base", "cut", "tuned")] == [
        *("base", "cut", "cut", "cut", "tuned"),
    ]
    assert [line[:4] for line in lines].count(["cut", "by", "matrix", "–"]) == 1
    before = own.read_text()
    status, told, errors = said(capsys, "inspect", base, tuned, "--task", own, "--json", own)
    assert status == 2 and told == "" and "a file of what is read" in errors
    assert own.read_text() == before


def test_what_cannot_be_scored_does_not_lose_what_was_measured(tmp_path, capsys, monkeypatch):
    base, tuned, _ = saved_pair(tmp_path)
    rows, page = tmp_path / "rows.jsonl", tmp_path / "page.html"
    rows.write_text('{"prompt": "1 + 1 =", "answer": " 2"}\n' * 3)

    def diverged(*_, **options):
        raise ValueError("its loss is NaN")

    monkeypatch.setattr(cuts, "score_pair", diverged)
    call = ["inspect", base, tuned, "--task", rows, "--html", page]
    status, told, errors = said(capsys, *call)
    assert status == 2 and errors == "deltarank: its loss is NaN\n"
    assert told.startswith("Of the squared update of") and page.exists()


@pytest.fixture
def to_heal(store, tmp_path, monkeypatch):
    """A call that heals the cut of a small run at rank 1, with short answers; its folder."""
    base, tuned, _ = saved_pair(tmp_path)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"prompt": "Ask {i}:"}}\n' for i in range(8)))
    monkeypatch.setattr(healing, "HEAL_ROOM", 4)
    out = tmp_path / "out"
    return ["extract", base, tuned, out, "--rank", "1", "--heal", rows, "--steps", "3"], out


def test_extract_heals_and_says_from_where_to_where(to_heal, capsys):
    call, out = to_heal
    status, told, errors = said(capsys, *call, "--lr", "1e-2", "--dtype", "bfloat16")
    assert status == 0 and errors == "", errors
    assert f"{out} holds 14 matrices at rank 1, " in told
    assert re.search(r"The cut that was healed keeps .*; rounding to bfloat16 loses 0\.000", told)
    line = re.search(r"Healed for 3 steps on 8 prompts: .*", told)[0]
    after, before = map(
        float, re.search(r"by (\S+) nats a token, the cut by (\S+) ", line).groups()
    )
    assert 0 < after < before and line.endswith("(the same prompts).")
    kinds = {W.dtype for W in load_file(out / "adapter_model.safetensors").values()}
    assert kinds == {torch.bfloat16} and said(capsys, "inspect", out)[0] == 0


def test_an_interrupt_of_healing_says_that_nothing_was_written(to_heal, capsys, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    call, out = to_heal
    monkeypatch.setattr(healing, "distil", interrupted)
    status, told, errors = said(capsys, *call)
    assert (
        status == 130 and told == "" and errors == "deltarank: interrupted; nothing was written\n"
    )
    assert not out.exists() and [path.name for path in out.parent.glob(".*")] == []


def test_healing_needs_the_extra_and_says_so(to_heal, capsys, monkeypatch):
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    status, _, errors = said(capsys, *to_heal[0])
    assert status == 2 and ".[study]" in errors and errors.count("\n") == 1


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """A file of rows that a model of bytes learns something of in a few steps."""
    monkeypatch.setattr(advice, "FITTED", PROFILES["smoke"])
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f'{{"prompt": "{n} is", "answer": "odd"}}\n' for n in range(40)))
    return file


def test_plan_says_what_rows_teach_and_which_rank_is_enough(rows, store, capsys):
    status, told, errors = said(capsys, "plan", rows)
    assert status == 0 and errors == "", errors
    lines = told.splitlines()
    assert lines[0].startswith("rows.jsonl: 40 rows, ")
    assert any("trained parameters" in line for line in lines)
    assert re.fullmatch(r"Take rank \d+( on all linear layers:|,) .*\.", lines[-1])


def test_plan_says_the_same_whatever_profile_and_model_are_at_work(rows, capsys, monkeypatch):
    before = said(capsys, "plan", rows)
    monkeypatch.setenv("PROFILE", "none of ours")
    monkeypatch.setenv("MODEL", "nowhere")
    assert said(capsys, "plan", rows) == before and before[0] == 0


def test_plan_has_the_sizes_that_the_forecast_is_fitted_to():
    probe = rivals.probe("facts", advice.FITTED)
    assert (probe.rank, probe.steps, probe.batch_size) == (8, PLAN_STEPS, 16)
    assert f"for {probe.steps} steps" in " ".join(SAID["plan"]["description"].split())


def test_plan_refuses_bad_rows_in_one_line(tmp_path, capsys):
    file = tmp_path / "bad.jsonl"
    file.write_text('{"prompt": "x"}\n')
    status, told, errors = said(capsys, "plan", file)
    assert status == 2 and told == "" and errors.count("\n") == 1
    assert "bad.jsonl, line 1: a row lacks answer" in errors


def test_plan_refuses_an_adapter_as_base_as_inspect_does(rows, lora, capsys):
    status, told, errors = said(capsys, "plan", rows, "--model", lora)
    assert status == 2 and told == "" and errors.count("\n") == 1
    assert f"{lora} is an adapter, not a model: inspect it alone, or merge it" in errors


def test_a_base_that_cannot_be_had_is_one_line(rows, capsys, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "Traceback:\nOSError: no network\n")
    monkeypatch.setitem(convert.EMBEDDED, "far", None)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    status, told, errors = said(capsys, "plan", rows, "--model", "far")
    assert status == 2 and told == ""
    assert errors == "deltarank: far cannot be converted: OSError: no network\n"


def test_an_interrupt_of_plan_says_that_nothing_was_written(rows, store, capsys, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(own_rows, "train", interrupted)
    rows.write_text(rows.read_text().replace("odd", "even"))  # measured by no other test
    status, told, errors = said(capsys, "plan", rows)
    assert status == 130 and told == ""
    assert errors == "deltarank: interrupted; nothing was written\n"


def test_plan_needs_the_extra_and_says_so(rows, capsys, monkeypatch):
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    status, _, errors = said(capsys, "plan", rows)
    assert status == 2 and ".[study]" in errors and errors.count("\n") == 1


@pytest.mark.parametrize("command", [[], ["inspect"], ["extract"], ["plan"]])
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([*command, "--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and "examples:\n  deltarank " in out
    if command in (["inspect"], ["extract"]):
        assert f"usage: deltarank {command[0]} [options] BASE TUNED" in out
        assert f"\n       deltarank {command[0]} [options] ADAPTER" in out
    if command == ["inspect"]:
        assert "help(deltarank.compare.compare_checkpoints)" in out
        assert "near_rounding" in compare.compare_checkpoints.__doc__


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


def test_make_refuses_a_model_whose_name_has_a_space():
    done = subprocess.run(
        ["make", "-C", ROOT, "-n", "MODEL=a model"], capture_output=True, text=True
    )
    assert done.returncode == 2 and "MODEL=a model has a space" in done.stderr


@pytest.mark.parametrize("option", ["--html", "--json"])
def test_a_target_that_cannot_be_written_is_refused_before_any_work(
    pair, tmp_path, capsys, monkeypatch, option
):
    monkeypatch.setattr(alignment, "open_pair", lambda *a, **k: pytest.fail("the pair was opened"))
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
    status, told, _ = said(capsys, "inspect", base, tuned, "--allow-pickle")
    assert status == 0 and told.rstrip().endswith("OUT --energy 0.9 --allow-pickle")


def test_the_version_is_told_without_loading_torch():
    code = "import sys; from deltarank import cli; cli.main(['--version'])"
    lists = f"import atexit, sys; atexit.register(lambda: print(*sys.modules)); {code}"
    done = subprocess.run([sys.executable, "-c", lists], capture_output=True, text=True)
    version, loaded = done.stdout.split("\n", 1)
    assert done.returncode == 0 and version == f"deltarank {__version__}"
    assert not {"torch", "pandas", "transformers", "jinja2"} & set(loaded.split())


@pytest.mark.parametrize("adapter", [False, True])
def test_inspect_loads_neither_transformers_nor_the_page_it_does_not_write(pair, lora, adapter):
    code = "import sys; from deltarank import cli; cli.main(sys.argv[1:]); print(*sys.modules)"
    command = [sys.executable, "-c", code, "inspect", *([lora] if adapter else pair)]
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
