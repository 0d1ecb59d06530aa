"""Runs: stored, damaged, diverged, swept; updates lost and trained again; models saved."""

import dataclasses
import shutil
import warnings
from types import SimpleNamespace

import pytest
import torch
from small_runs import flip, results_of, same, saved_pair, three_methods

from deltarank.compare import compare_checkpoints
from deltarank.study import measuring, runs
from deltarank.study.cuts import cut
from deltarank.study.evaluation import evaluate
from deltarank.study.measuring import delta_file, measure
from deltarank.study.models import load_model
from deltarank.study.profiles import entry_folder, profile
from deltarank.study.runs import repeated, run, save_model, stored, sweep, updates
from deltarank.study.tables import runs_table, spectra_table
from deltarank.study.tasks import TASKS


def test_a_stored_run_is_loaded_and_not_measured_again(config, monkeypatch):
    first = run(config)
    monkeypatch.setattr(runs, "measure", lambda *a, **k: pytest.fail("measured again"))
    again = run(config)
    assert again.record == first.record
    assert again.config == config


def test_a_repeated_run_says_how_far_its_spectra_are_from_the_stored_ones(config, monkeypatch):
    result, kept, grown = run(config), runs.kept_spectra, iter([1.0, 1.1])
    assert result.spectra, "stored"

    def some(*arguments):
        factor = next(grown)
        return {name: factor * S for name, S in kept(*arguments).items()}

    monkeypatch.setattr(runs, "kept_spectra", some)
    found = repeated(result)
    assert found["gap_stored"].tolist() == found["gap_first"].tolist() == pytest.approx([0, 10])
    assert found["loss_nats"].tolist() == [result.loss()] * 2, "the stored weights, trained alike"
    assert found[["device", "threads"]].notna().all(axis=None)


@pytest.mark.parametrize("there", [True, False])
def test_a_repetition_leaves_the_update_in_the_cache_as_it_was(config, there):
    result, file = run(config), delta_file(config)
    assert result.spectra
    file.write_bytes(b"that of the stored run") if there else file.unlink()
    repeated(result)
    assert file.read_bytes() == b"that of the stored run" if there else not file.exists()


def test_a_split_that_was_not_scored_is_refused_by_name(config):
    result = run(config)
    for measured in (result.loss, result.score):
        with pytest.raises(ValueError, match="split='tset'.*valid, test"):
            measured("tset")


def test_a_run_that_is_not_stored_is_none(config):
    assert stored(config) is None


def test_a_damaged_run_is_computed_again(config):
    first = run(config)
    flip(results_of(config)["result.json"], -20)
    with pytest.warns(UserWarning, match=config.key):
        again = run(config)
    assert again.record["train_loss_nats"] == first.record["train_loss_nats"]
    assert again.loss() == first.loss()


@pytest.mark.parametrize("name", ["result.json", "tensors.safetensors"])
def test_damaged_spectra_are_computed_again(config, name):
    first = run(config).spectra
    flip(entry_folder(config, "spectra") / name, -20)
    with pytest.warns(UserWarning, match=config.key):
        assert same(run(config).spectra, first)


def test_spectra_are_stored_when_they_are_asked_for_and_loaded_from_then_on(config, monkeypatch):
    result, at = run(config), entry_folder(config, "spectra")
    assert not at.exists()
    first = result.spectra
    assert at.exists() and {*first} == {*result.matrices}
    delta_file(config).unlink()
    monkeypatch.setattr(runs, "train", lambda *a, **k: pytest.fail("trained again"))
    assert same(stored(config).spectra, first)
    shutil.rmtree(at)
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        _ = stored(config).spectra


@pytest.fixture
def configs(store):
    return three_methods()


def test_an_interrupted_sweep_keeps_its_runs_and_resumes_to_the_same_bytes(
    configs, monkeypatch, tmp_path
):
    calls = []

    def interrupted(config, *args, **kwargs):
        if calls:
            raise KeyboardInterrupt
        calls.append(config)
        return measure(config, *args, **kwargs)

    monkeypatch.setattr(runs, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sweep(configs)
    assert [stored(config) is not None for config in configs] == [True, False, False]

    monkeypatch.setattr(runs, "measure", measure)
    first = results_of(configs[0])["result.json"].read_bytes()
    resumed = sweep(configs)
    assert results_of(configs[0])["result.json"].read_bytes() == first
    files = [results_of(config) for config in configs]
    spectra = [result.spectra for result in resumed]

    monkeypatch.setenv("BUILD", str(tmp_path / "other"))
    whole = sweep(configs)
    assert [result.config for result in whole] == configs
    for config, one, other, S in zip(configs, files, resumed, spectra, strict=True):
        assert one.keys() == results_of(config).keys()
        assert stored(config).record["evaluation"] == other.record["evaluation"]
        assert same(stored(config).spectra, S)


def test_a_sweep_returns_its_results_in_order_and_runs_repeats_once(configs, monkeypatch):
    calls = []
    monkeypatch.setattr(runs, "measure", lambda c, *a, **k: calls.append(c) or measure(c, *a, **k))
    order = [configs[2], configs[1], configs[2]]
    assert [result.config for result in sweep(order)] == order
    assert len(calls) == 2


def test_a_full_disk_stops_a_run_before_it_trains(config, monkeypatch):
    full = SimpleNamespace(total=10**12, used=10**12, free=10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    monkeypatch.setattr(measuring, "train", lambda *a, **k: pytest.fail("trained"))
    with pytest.raises(OSError, match="free"):
        run(config)
    assert stored(config) is None


@pytest.mark.parametrize("steps", [1, 6])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_run_that_diverges_is_stored_as_diverged(store, method, steps):
    changes = {"lr": 1e30, "steps": steps, "eval_rows": 4}
    changes |= {"rank": 2} if method == "lora" else {}
    result = run(profile().config("sentiment", method, **changes))
    assert result.status == "diverged"
    assert len(result.record["train_loss_nats"]) <= 2  # it stops, rather than training on NaN
    assert result.matrices == [] and result.spectra == {}
    assert result.loss() != result.loss()
    assert runs_table([result])["status"].tolist() == ["diverged"]
    assert spectra_table([result]).empty


@pytest.mark.slow
@pytest.mark.parametrize("method", ["base", "full"])
@pytest.mark.parametrize("task", TASKS)
def test_every_task_runs_to_a_stored_result(store, task, method):
    changes = {} if method == "base" else {"steps": 1}
    config = profile().config(task, method, eval_rows=6, **changes)
    result = run(config)
    assert result.status == "finished"
    assert 5 < result.loss() < 7  # log(384) = 5.95: a random model over 384 tokens
    assert 0 <= result.score() <= 100


def test_lost_deltas_are_computed_again(config, monkeypatch, tmp_path):
    dW = updates(config)
    delta_file(config).unlink()
    assert same(updates(config), dW)
    table = cut(config, [1])
    delta_file(config).unlink()
    monkeypatch.setenv("BUILD", str(tmp_path / "other"))
    assert cut(config, [1])["loss_nats"].item() == table["loss_nats"].item()


def test_an_update_trained_again_elsewhere_is_told_from_the_stored_one(config, monkeypatch):
    first = run(config)
    delta_file(config).unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        updates(config)  # the same machine: the same update
    delta_file(config).unlink()
    first_loss, *others = first.record["train_loss_nats"]
    record = first.record | {"train_loss_nats": [first_loss + 1e-5, *others]}
    monkeypatch.setattr(runs, "stored", lambda config: dataclasses.replace(first, record=record))
    with pytest.warns(UserWarning, match=f"{config.key} was trained again.*losses on the way"):
        updates(config)


def test_a_run_without_an_update_says_why(config):
    with pytest.raises(ValueError, match="a base run has no update"):
        updates(profile().config("sentiment", "base"))
    with pytest.raises(ValueError, match="diverged: it has no update"):
        updates(dataclasses.replace(config, lr=1e30))


def test_a_run_that_is_stored_as_diverged_is_not_trained_again(config, monkeypatch):
    diverged = dataclasses.replace(config, lr=1e30)
    assert run(diverged).status == "diverged"
    monkeypatch.setattr(runs, "train", lambda *a, **k: pytest.fail("trained again"))
    with pytest.raises(ValueError, match=f"^{diverged.key} diverged: it has no update"):
        updates(diverged)


def test_a_saved_lora_is_its_run(store, tmp_path):
    config = profile().config("sentiment", "lora", rank=4, steps=3, lr=1e-2, dtype="float32")
    save_model(config, tmp_path / "merged")
    loss = evaluate(load_model(str(tmp_path / "merged")), config, "test")["loss_nats"]
    assert loss == pytest.approx(run(config).loss(), abs=1e-4)
    assert abs(loss - run(profile().config("sentiment", "base")).loss()) > 1e-2


@pytest.mark.filterwarnings("ignore:the update is")
def test_saved_models_give_the_spectra_of_the_run(store, tmp_path):
    base, tuned, config = saved_pair(tmp_path)
    table = compare_checkpoints(base, tuned)
    spectra, measured = stored(config).spectra, table.set_index("name")["S"]
    assert set(spectra) == set(table.loc[table["kind"] == "matrix", "name"])
    for name, S in spectra.items():
        torch.testing.assert_close(measured[name], S, rtol=1e-3, atol=1e-6)
