"""The results store: whole entries or none, through edits, kills, races, interrupts, full disks."""

import ast
import dataclasses
import hashlib
import inspect
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import warnings
from types import SimpleNamespace

import joblib
import pandas as pd
import pytest
import torch

import utils

RECORD = {"loss": 1.5, "text": "Słowo", "list": [1, None]}
TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4)}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def results_of(config):
    """The files of the stored run."""
    folder = utils.profile().store / "runs" / config.key
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture
def entry(tmp_path):
    utils.save_entry(tmp_path / "store" / "entry", RECORD, TENSORS)
    return tmp_path / "store" / "entry"


# --- one entry --------------------------------------------------------------------------


def test_an_entry_loads_as_it_was_saved(entry):
    record, tensors = utils.load_entry(entry)
    assert {key: record[key] for key in RECORD} == RECORD
    assert same(tensors, TENSORS)


def test_an_entry_without_tensors_loads_as_it_was_saved(tmp_path):
    utils.save_entry(tmp_path / "entry", RECORD)
    record, tensors = utils.load_entry(tmp_path / "entry")
    assert record["loss"] == 1.5
    assert tensors == {}


def test_a_missing_entry_is_none_without_a_warning(tmp_path, recwarn):
    assert utils.load_entry(tmp_path / "nothing") is None
    assert not recwarn


def test_saving_leaves_nothing_beside_the_entry(entry):
    assert [path.name for path in entry.parent.iterdir()] == ["entry"]


def test_an_intact_entry_is_not_overwritten(entry):
    utils.save_entry(entry, {"loss": 2.5}, {})
    assert utils.load_entry(entry)[0]["loss"] == 1.5


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "json edited": lambda f: (f / "result.json").write_text(
        (f / "result.json").read_text("utf8").replace("1.5", "1.4"), "utf8"
    ),
    "json byte flipped": lambda f: flip(f / "result.json", 20),
    "json truncated": lambda f: os.truncate(f / "result.json", 40),
    "json empty": lambda f: os.truncate(f / "result.json", 0),
    "json missing": lambda f: (f / "result.json").unlink(),
    "json a list": lambda f: (f / "result.json").write_text("[]"),
    "tensor byte flipped": lambda f: flip(f / "tensors.safetensors", -1),
    "tensors truncated": lambda f: os.truncate(f / "tensors.safetensors", 100),
    "tensors missing": lambda f: (f / "tensors.safetensors").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_named_and_not_loaded(entry, damage):
    DAMAGES[damage](entry)
    with pytest.warns(UserWarning, match="entry"):
        assert utils.load_entry(entry) is None


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.filterwarnings("ignore:entry")
def test_a_damaged_entry_is_replaced(entry, damage):
    DAMAGES[damage](entry)
    utils.save_entry(entry, {"loss": 2.5}, TENSORS)
    record, tensors = utils.load_entry(entry)
    assert record["loss"] == 2.5
    assert same(tensors, TENSORS)


@pytest.mark.parametrize(  # an intact entry stays: nothing is renamed over it
    ("at", "before"),
    [("os.fsync", b) for b in ("nothing", "torn", "intact")]
    + [("os.rename", b) for b in ("nothing", "torn")],
)
@pytest.mark.filterwarnings("ignore:entry is torn")
def test_a_kill_while_writing_leaves_the_old_entry_or_none(tmp_path, at, before):
    folder = tmp_path / "store" / "entry"
    if before != "nothing":
        utils.save_entry(folder, RECORD, TENSORS)
    if before == "torn":
        DAMAGES["tensors truncated"](folder)
    code = f"""
        import os, pathlib, torch, utils
        {at} = lambda *a, **k: os.kill(os.getpid(), 9)
        utils.save_entry(pathlib.Path({str(folder)!r}), {{"loss": 9}}, {{"a": torch.ones(3)}})
    """
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)]
    done = subprocess.run(command, cwd=utils.ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    if before == "intact":
        assert utils.load_entry(folder)[0]["loss"] == 1.5
    elif folder.exists():
        assert utils.load_entry(folder) is None
    utils.save_entry(folder, {"loss": 3.5}, TENSORS)  # the next run is not in its way
    assert utils.load_entry(folder)[0]["loss"] == (1.5 if before == "intact" else 3.5)


@pytest.mark.parametrize("limit", [64, 4096], ids=["json", "tensors"])
def test_a_disk_that_fills_during_a_write_leaves_what_was_there(entry, limit):
    """A limit on the size of a file stands in for the full disk: the write stops half way."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    tensors = {} if limit == 64 else {"a": torch.ones(10_000)}
    try:
        with pytest.raises(OSError, match=r"second could not be written.*make room"):
            utils.save_entry(entry.parent / "second", {"text": 100 * "long "}, tensors)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert [path.name for path in entry.parent.iterdir()] == ["entry"]
    assert utils.load_entry(entry)[0]["loss"] == 1.5
    utils.save_entry(entry.parent / "second", {"loss": 2.5}, tensors)
    assert utils.load_entry(entry.parent / "second")[0]["loss"] == 2.5


def write_rounds(root, barrier, torn, loss, errors):
    """Write every round's entry at the same moment as the other process."""
    for i in range(25):
        folder = root / str(i)
        if torn and loss == 0:
            folder.mkdir(parents=True)
            (folder / "result.json").write_text("{")
        barrier.wait(30)
        try:
            utils.save_entry(folder, {"loss": loss}, {"a": torch.full((50,), float(loss))})
        except Exception as error:
            errors.put(f"round {i}: {error!r}")


@pytest.mark.parametrize("torn", [False, True])
@pytest.mark.filterwarnings("ignore:\\d+ is torn")
def test_two_writers_leave_one_intact_entry_and_no_litter(tmp_path, torn):
    fork = multiprocessing.get_context("fork")
    barrier, errors = fork.Barrier(2), fork.SimpleQueue()
    root = tmp_path / "store"
    writers = [
        fork.Process(target=write_rounds, args=(root, barrier, torn, loss, errors))
        for loss in range(2)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert errors.empty(), errors.get()
    assert sorted(path.name for path in root.iterdir()) == sorted(str(i) for i in range(25))
    for folder in root.iterdir():
        record, tensors = utils.load_entry(folder)
        assert tensors["a"].tolist() == [record["loss"]] * 50


# --- runs and sweeps --------------------------------------------------------------------


def test_a_stored_run_is_loaded_and_not_measured_again(config, monkeypatch):
    first = utils.run(config)
    monkeypatch.setattr(utils, "measure", lambda *a, **k: pytest.fail("measured again"))
    again = utils.run(config)
    assert again.record == first.record
    assert same(again.spectra, first.spectra)
    assert again.config == config


def test_a_run_that_is_not_stored_is_none(config):
    assert utils.stored(config) is None


@pytest.mark.parametrize("name", ["result.json", "tensors.safetensors"])
def test_a_damaged_run_is_computed_again(config, name):
    first = utils.run(config)
    spectra = {name: S.clone() for name, S in first.spectra.items()}  # off the file's memory map
    flip(results_of(config)[name], -20)
    with pytest.warns(UserWarning, match=config.key):
        again = utils.run(config)
    assert same(again.spectra, spectra)
    assert again.loss() == first.loss()


def test_a_record_holds_what_a_reader_needs(config):
    record = utils.run(config).record
    assert record["config"] == json.loads(json.dumps(dataclasses.asdict(config)))
    assert record["identity"]["task_sha256"] == utils.task_sha256("sentiment")
    assert {"torch", "transformers", "peft", "device", "commit"} <= record["provenance"].keys()
    assert len(record["train_loss_nats"]) == config.steps


@pytest.fixture
def configs(store):
    profile = utils.profile()
    changes = {"steps": 2, "eval_rows": 4}
    return [
        profile.config("sentiment", **changes),
        profile.config("facts", "lora", rank=2, **changes),
        profile.config("json", "base", eval_rows=4),
    ]


def test_an_interrupted_sweep_keeps_its_runs_and_resumes_to_the_same_bytes(
    configs, monkeypatch, tmp_path
):
    measure, calls = utils.measure, []

    def interrupted(config, *args, **kwargs):
        if calls:
            raise KeyboardInterrupt
        calls.append(config)
        return measure(config, *args, **kwargs)

    monkeypatch.setattr(utils, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        utils.sweep(configs)
    assert [utils.stored(config) is not None for config in configs] == [True, False, False]

    monkeypatch.setattr(utils, "measure", measure)
    first = results_of(configs[0])["result.json"].read_bytes()
    resumed = utils.sweep(configs)
    assert results_of(configs[0])["result.json"].read_bytes() == first
    files = [results_of(config) for config in configs]

    monkeypatch.setenv("BUILD", str(tmp_path / "other"))
    whole = utils.sweep(configs)
    assert [result.config for result in whole] == configs
    for config, one, other in zip(configs, files, resumed, strict=True):
        assert one.keys() == results_of(config).keys()
        assert utils.stored(config).record["evaluation"] == other.record["evaluation"]
        if "tensors.safetensors" in one:
            tensors = results_of(config)["tensors.safetensors"]
            assert tensors != one["tensors.safetensors"]
            assert tensors.read_bytes() == one["tensors.safetensors"].read_bytes()


def test_a_sweep_returns_its_results_in_order_and_runs_repeats_once(configs, monkeypatch):
    measure, calls = utils.measure, []
    monkeypatch.setattr(utils, "measure", lambda c, *a, **k: calls.append(c) or measure(c, *a, **k))
    order = [configs[2], configs[1], configs[2]]
    assert [result.config for result in utils.sweep(order)] == order
    assert len(calls) == 2


def test_a_sweep_over_processes_gives_the_same_spectra(configs, monkeypatch, tmp_path):
    alone = utils.sweep(configs)
    monkeypatch.setenv("BUILD", str(tmp_path / "parallel"))
    assert utils.stored(configs[0]) is None
    with joblib.parallel_config(backend="loky", n_jobs=2):
        together = utils.sweep(configs)
    for one, other in zip(alone, together, strict=True):
        assert one.config == other.config
        assert same(one.spectra, other.spectra)
        assert one.loss() == pytest.approx(other.loss(), rel=1e-6)


def test_a_full_disk_stops_a_run_before_it_trains(config, monkeypatch):
    full = SimpleNamespace(total=10**12, used=10**12, free=10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    monkeypatch.setattr(utils, "train", lambda *a, **k: pytest.fail("trained"))
    with pytest.raises(OSError, match="free"):
        utils.run(config)
    assert utils.stored(config) is None


# --- cuts -------------------------------------------------------------------------------


def tuned(config):
    """The tuned model, from the base and the updates."""
    model, dW = utils.load_model(config.model), utils.updates(config)
    return model, dW, dict(model.named_parameters())


def test_a_cut_to_rank_0_keeps_what_lies_outside_the_matrices(config):
    config = dataclasses.replace(config, lr=1e-2, dtype="float32")
    result = utils.run(config)
    model, dW, parameters = tuned(config)
    base = utils.evaluate(model, config, "test")["loss_nats"]
    with torch.no_grad():
        for name in dW.keys() - utils.matrices(model).keys():
            parameters[name] += dW[name]
    expected = utils.evaluate(model, config, "test")["loss_nats"]
    cut = utils.cut(config, [0])["loss_nats"].item()
    assert cut == pytest.approx(expected, abs=1e-6)
    assert abs(cut - base) > 1e-4
    assert abs(cut - result.loss()) > 1e-4


def test_a_cut_is_the_model_with_truncated_updates(config):
    config = dataclasses.replace(config, lr=1e-2, dtype="float32")
    model, dW, parameters = tuned(config)
    with torch.no_grad():
        for name, update in dW.items():
            cut = utils.truncate(update, 2) if name in utils.matrices(model) else update
            parameters[name] += cut
    expected = utils.evaluate(model, config, "test")["loss_nats"]
    assert utils.cut(config, [2])["loss_nats"].item() == pytest.approx(expected, abs=1e-5)


def test_a_cut_above_the_rank_of_the_update_is_the_tuned_model(small_task, store):
    # one step of plain gradient descent on one row of at most 16 tokens: rank(dW) <= 16
    sizes = {"steps": 1, "batch_size": 1, "seq_len": 16, "dtype": "float32"}
    config = utils.profile().config("sentiment", optimizer="sgd", lr=3.0, **sizes)
    result = utils.run(config)
    base = utils.run(utils.profile().config("sentiment", "base", seq_len=16, dtype="float32"))
    table = utils.cut(config, [0, 1, 16])
    assert table["rank"].tolist() == [0, 1, 16]
    assert table["loss_nats"].iloc[-1] == pytest.approx(result.loss(), abs=1e-4)
    assert abs(base.loss() - result.loss()) > 1e-2
    assert abs(table["loss_nats"].iloc[0] - result.loss()) > 1e-3


def test_cuts_are_stored(config, monkeypatch):
    first = utils.cut(config, [0, 1])
    monkeypatch.setattr(utils, "updates", lambda config: pytest.fail("cut again"))
    assert utils.cut(config, [1, 0])["loss_nats"].tolist() == first["loss_nats"].tolist()[::-1]


def test_lost_deltas_are_computed_again(config, cache, monkeypatch, tmp_path):
    dW = utils.updates(config)
    (lost,) = cache.rglob(f"{config.key}*")
    lost.unlink()
    assert same(utils.updates(config), dW)
    table = utils.cut(config, [1])
    (lost,) = cache.rglob(f"{config.key}*")
    lost.unlink()
    monkeypatch.setenv("BUILD", str(tmp_path / "other"))
    assert utils.cut(config, [1])["loss_nats"].item() == table["loss_nats"].item()


def test_an_update_trained_again_elsewhere_is_told_from_the_stored_one(config, cache, monkeypatch):
    first = utils.run(config)
    (lost,) = cache.rglob(f"{config.key}*")
    lost.unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        utils.updates(config)  # the same machine: the same update
    lost.unlink()
    other = dataclasses.replace(first, spectra={n: 1.1 * S for n, S in first.spectra.items()})
    monkeypatch.setattr(utils, "stored", lambda config: other)
    with pytest.warns(UserWarning, match=f"{config.key} was trained again.*10.0%"):
        utils.updates(config)


@pytest.mark.parametrize(
    ("nats", "ranks"),
    [
        ({0: 5.0, 1: 4.0, 8: 3.0, 16: 1.1}, [0, 1, 8, 16]),  # 97.5 % of the gain at once
        ({0: 5.0, 1: 4.0, 8: 3.0, 16: 2.0, 32: 1.0}, [0, 1, 8, 16, 32]),
        ({0: 5.0, 1: 4.0, 8: 3.0, 16: 2.0, 32: 1.5}, [0, 1, 8, 16, 32]),  # and 32 is the largest
    ],
)
def test_cuts_go_on_until_enough_is_kept(config, monkeypatch, nats, ranks):
    def result(asked):
        loss = 5.0 if asked.method == "base" else 1.0
        record = {"evaluation": {"test": {"loss_nats": loss}}, "shapes": {"one": [32, 48]}}
        return utils.Result(asked, record, {"one": torch.ones(32)})

    def fake_cut(_, asked):
        return pd.DataFrame({"rank": asked, "loss_nats": [nats[rank] for rank in asked]})

    monkeypatch.setattr(utils, "run", result)
    monkeypatch.setattr(utils, "cut", fake_cut)
    assert utils.cut_until(config, 0.95)["rank"].tolist() == ranks


def test_head_and_tail_of_a_cut_meet_at_the_ends(config):
    config = dataclasses.replace(config, lr=1e-2, dtype="float32")
    head, tail = (utils.cut(config, [0, 32], part=part)["loss_nats"] for part in ("head", "tail"))
    assert tail[0] == pytest.approx(utils.run(config).loss(), abs=1e-5)
    assert tail[1] == pytest.approx(head[0], abs=1e-5)
    assert abs(tail[0] - tail[1]) > 1e-3


def test_parts_of_a_cut_are_stored_apart(config):
    losses = {part: utils.cut(config, [4], part=part)["loss_nats"][0] for part in utils.CUT_PARTS}
    assert len(set(losses.values())) == 4
    assert losses == {part: utils.cut(config, [4], part=part)["loss_nats"][0] for part in losses}
    assert utils.stored_cuts(config)["loss_nats"].tolist() == [losses["head"]]
    with pytest.raises(ValueError, match="part='middle'.*head, tail"):
        utils.cut(config, [4], part="middle")


def test_overlaps_of_a_run_with_itself_and_with_another_seed(config, monkeypatch):
    runs = [config, dataclasses.replace(config, seed=1)]
    for run in runs:
        utils.run(run)
    same, other = utils.overlaps(config, config), utils.overlaps(*runs)
    assert same["left"].tolist() == pytest.approx([1.0] * len(same), abs=1e-4)
    assert (other["left"] < 0.999).mean() > 0.5
    assert set(other["name"]) == set(utils.stored(config).spectra)
    monkeypatch.setattr(utils, "updates", lambda run: pytest.fail("computed again"))
    assert utils.overlaps(*runs).equals(other)


def test_overlaps_with_lora_hold_all_its_directions_and_survive_a_lost_cache(config, cache):
    lora = utils.profile().config("sentiment", "lora", rank=4, steps=2, eval_rows=4)
    utils.run(config), utils.run(lora)
    with_full, with_itself = utils.overlaps(lora, config), utils.overlaps(lora, lora)
    assert with_full["rank"].max() > 4 == with_itself["rank"].max()
    assert with_itself["right"].tolist() == pytest.approx([1.0] * len(with_itself), abs=1e-4)
    for run in (config, lora):
        (lost,) = cache.rglob(f"{run.key}*")
        lost.unlink()
    shutil.rmtree(utils.profile().store / "overlaps")
    utils._leading_subspaces.cache_clear()
    assert utils.overlaps(lora, config).equals(with_full)


def test_a_saved_lora_is_its_run(store, tmp_path):
    config = utils.profile().config("sentiment", "lora", rank=4, steps=3, lr=1e-2, dtype="float32")
    utils.save_model(config, tmp_path / "merged")
    loss = utils.evaluate(utils.load_model(str(tmp_path / "merged")), config, "test")["loss_nats"]
    assert loss == pytest.approx(utils.run(config).loss(), abs=1e-4)
    assert abs(loss - utils.run(utils.profile().config("sentiment", "base")).loss()) > 1e-2


def test_a_run_without_an_update_says_why(config):
    with pytest.raises(ValueError, match="a base run has no update"):
        utils.updates(utils.profile().config("sentiment", "base"))
    with pytest.raises(ValueError, match="diverged: it has no deltas"):
        utils.updates(dataclasses.replace(config, lr=1e30))


@pytest.mark.parametrize("rank", [-1, 33])
def test_a_cut_refuses_a_rank_that_a_matrix_cannot_have(config, rank):
    with pytest.raises(ValueError, match="rank"):
        utils.cut(config, [1, rank])


# --- the measurement's fingerprint ------------------------------------------------------

MEASURING = [
    "answer_hidden",
    "HeadCrossEntropy",
    "answer_loss",
    "AnswerModel",
    "prepare",
    "train",
    "score_rows",
    "generate",
    "evaluate",
]
MEASURING += [
    "singular_values",
    "rank_measures",
    "factor_singular_values",
    "encode",
    "collate",
    "pack",
    "measure",
    "cut",
    "leading_factors",
    "leading_eigenvectors",
]
BESIDE = ("_require", "_require_disk", "_first_line", "_delta_file")  # no part of any number
FINGERPRINT = (2, "4adb18aab2529ab1")


def plain(node):
    """A syntax tree as nested lists, the same in every version of Python, without docstrings."""
    if isinstance(node, ast.AST):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
        fields = [(k, plain(v)) for k, v in ast.iter_fields(node) if v not in (None, [])]
        return [type(node).__name__, fields]
    return [plain(item) for item in node] if isinstance(node, list) else repr(node)


def fingerprint():
    """A hash of the code that determines results: MEASURING, its private helpers, the defaults."""
    trees = {node.name: node for node in ast.parse(inspect.getsource(utils)).body
             if isinstance(node, ast.FunctionDef | ast.ClassDef)}  # fmt: skip
    names, found = list(MEASURING), {}
    while names:
        name = names.pop()
        if name not in found and name not in BESIDE:
            used = {n.id for n in ast.walk(trees[name]) if isinstance(n, ast.Name)}
            names += [n for n in used if n.startswith("_") and n in trees]
            found[name] = plain(trees[name])
    fields = [
        f for f in dataclasses.fields(utils.RunConfig) if f.default is not dataclasses.MISSING
    ]
    found["defaults"] = [(f.name, repr(f.default)) for f in fields]
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]


def test_a_change_of_the_measuring_code_is_decided_on():
    new = (utils.MEASUREMENT, fingerprint())
    assert new == FINGERPRINT, (
        "the measuring code differs from the one that FINGERPRINT was taken of. Either it gives "
        "the same results: keep utils.MEASUREMENT. Or it gives others: raise utils.MEASUREMENT by "
        f"one, and every run is computed again. Then set FINGERPRINT = ({new[0]} or the raised "
        f'number, "{new[1]}") in tests/test_store.py.'
    )
