"""Own rows: told by kind, split once, and their bits those of a run of the report."""

import json

import pytest
import torch

from deltarank.runtime import cache_folder
from deltarank.study import models, own_rows
from deltarank.study.gains import first_epoch_kbit, learned_kbit, taught_kbit
from deltarank.study.own_rows import HELD_OUT, adaptable_modules, count_tokens, holding, own_probe
from deltarank.study.profiles import PROFILES
from deltarank.study.tasks import load_split

SMOKE = PROFILES["smoke"]
RULE = [{"prompt": f"{n} is", "answer": "even" if n % 2 == 0 else "odd"} for n in range(80)]
NOISE = [{"prompt": f"{n} is", "answer": f"{(n * 7919 + 13) % 9973:04d}"} for n in range(80)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_an_eighth_of_rows_without_splits_is_held_out(tmp_path):
    config, _ = own_probe(write(tmp_path / "mine.jsonl", RULE), SMOKE)
    trained, held = (load_split(config.task, split) for split in ("train", "test"))
    assert (len(trained), len(held)) == (70, 10)
    assert sorted(row["prompt"] for row in trained + held) == sorted(r["prompt"] for r in RULE)
    assert config.key.startswith("mine-lora")


def test_named_splits_are_kept(tmp_path):
    rows = [row | {"split": "train"} for row in RULE] + [NOISE[0] | {"split": "test"}]
    config, _ = own_probe(write(tmp_path / "mine.jsonl", rows), SMOKE)
    assert [row["answer"] for row in load_split(config.task, "test")] == [NOISE[0]["answer"]]
    assert len(load_split(config.task, "train")) == len(RULE)


def test_of_named_splits_only_train_is_trained_on(store, tmp_path):
    others = [row | {"split": split} for split in ("valid", "paraphrase") for row in NOISE]
    trained = [row | {"split": "train"} for row in RULE]
    config, counted = own_probe(write(tmp_path / "mine.jsonl", others + trained), SMOKE)
    kept = [row["answer"] for split in ("train", "test") for row in load_split(config.task, split)]
    assert set(kept) == {"odd", "even"} and len(kept) == len(counted) == len(RULE)


def test_without_a_split_of_training_all_but_tests_are_trained_on(store, tmp_path):
    rows = [row | {"split": "mine"} for row in RULE] + [NOISE[0] | {"split": "test"}]
    _, counted = own_probe(write(tmp_path / "mine.jsonl", rows), SMOKE)
    assert len(counted) == len(RULE)


def test_rows_without_a_split_are_trained_on_beside_named_ones(store, tmp_path):
    rows = RULE + [row | {"split": "valid"} for row in NOISE]
    _, counted = own_probe(write(tmp_path / "mine.jsonl", rows), SMOKE)
    assert len(counted) == len(RULE)


def test_rows_that_are_trained_on_and_held_out_are_warned_of(store, tmp_path):
    rows = [row | {"split": split} for split in ("train", "test") for row in RULE[:40]]
    with pytest.warns(UserWarning, match="40 of the 40 rows held out of mine.jsonl are trained on"):
        own_probe(write(tmp_path / "mine.jsonl", rows), SMOKE)


def test_a_named_split_of_tests_is_held_out_by_chance_and_not_counted(store, tmp_path):
    held = [row | {"split": "test", "kind": kind} for kind in "ab" for row in RULE * 2]
    trained = [row | {"split": "train"} for row in RULE]
    config, counted = own_probe(write(tmp_path / "mine.jsonl", trained + held), SMOKE)
    kept = load_split(config.task, "test")
    assert len(kept) == HELD_OUT and {row["kind"] for row in kept} == {"a", "b"}
    assert len(counted) == len(RULE) == len(load_split(config.task, "train"))


def test_many_rows_hold_out_no_more_than_the_most(tmp_path):
    config, _ = own_probe(write(tmp_path / "mine.jsonl", RULE * 20), SMOKE)
    assert len(load_split(config.task, "test")) == HELD_OUT


def test_tokens_are_counted_by_row_and_told_by_kind(store, tmp_path):
    rows = [
        {"prompt": "ab", "answer": "c", "kind": "x"},
        {"prompt": "a", "answer": "bcd", "kind": "x"},
        {"prompt": "a", "answer": "b", "kind": None},
    ]
    table = count_tokens(rows, SMOKE.model)  # bytes are tokens, a newline ends a row
    assert table.to_dict("list") == {
        "kind": ["x", "x", "rows"],
        "prompt_tokens": [2, 1, 1],
        "answer_tokens": [2, 4, 2],
    }
    named = [row | {"kind": "odd"} if i % 2 else row for i, row in enumerate(RULE)]
    told = holding(write(tmp_path / "mine.jsonl", named), SMOKE).by_kind
    assert told["rows"].to_dict() == {"odd": 40, "rows": 40}
    assert (told > 0).all(axis=None)


def test_noise_holds_more_than_a_rule_and_bits_are_those_of_the_run(store, tmp_path):
    files = {n: write(tmp_path / f"{n}.jsonl", r) for n, r in (("rule", RULE), ("noise", NOISE))}
    found = {name: holding(file, SMOKE) for name, file in files.items()}
    assert found["noise"].code_kbit > found["rule"].code_kbit > 0
    for name, held in found.items():
        result = own_rows._probed(own_probe(files[name], SMOKE)[0])
        assert held.code_kbit == first_epoch_kbit(result)
        assert held.learned_kbit == learned_kbit(result) < held.code_kbit
        seen = result.config.steps * result.config.batch_size  # less than an epoch
        assert (held.rows, held.seen) == (80, seen)
        assert held.all_kbit == taught_kbit(result, 80) >= held.learned_kbit


def test_what_was_measured_is_kept(store, tmp_path, monkeypatch):
    file = write(tmp_path / "mine.jsonl", RULE)
    first = holding(file, SMOKE)
    monkeypatch.setattr(own_rows, "train", lambda *a, **k: pytest.fail("trained again"))
    assert holding(file, SMOKE).learned_kbit == first.learned_kbit
    assert list((cache_folder() / "plans").glob("mine-lora-*"))


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (RULE[:5], "mine.jsonl has 5 rows to train on: give 8 or more"),
        (
            [*RULE, {"prompt": "x" * 3000, "answer": "y"}],
            "a row has 3,002 tokens, tiny-gemma3 takes 2,048 here",
        ),
        ([{"prompt": "x"}], "mine.jsonl, line 1: a row lacks answer"),
    ],
)
def test_bad_rows_are_named_before_any_work(tmp_path, monkeypatch, rows, told):
    monkeypatch.setattr(own_rows, "prepare", lambda config: pytest.fail("worked"))
    with pytest.raises(ValueError, match=told):
        holding(write(tmp_path / "mine.jsonl", rows), SMOKE)


def test_bad_rows_are_named_before_a_model_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(own_rows, "require_memory", lambda *_, **__: pytest.fail("a model"))
    monkeypatch.setattr(own_rows, "load_tokenizer", lambda name: pytest.fail("a tokenizer"))
    with pytest.raises(ValueError, match="line 1: a row lacks answer"):
        holding(write(tmp_path / "mine.jsonl", [{"prompt": "x"}]), SMOKE)


def test_a_model_too_large_for_the_memory_is_named_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(own_rows, "prepare", lambda config: pytest.fail("worked"))
    monkeypatch.setattr(models, "memory", lambda: 1)
    with pytest.raises(ValueError, match="^tiny-gemma3 takes .*: name a smaller one with --model$"):
        holding(write(tmp_path / "mine.jsonl", RULE), SMOKE)


@pytest.mark.parametrize("file", ["missing.jsonl", "facts"])
def test_a_file_that_is_not_there_is_named(file):
    with pytest.raises(ValueError, match=f"^{file}: there is no such file$"):
        holding(file, SMOKE)


def test_a_folder_in_place_of_rows_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"^{tmp_path} is a folder: give a .jsonl file"):
        holding(str(tmp_path), SMOKE)


def test_another_kind_of_file_is_named(tmp_path):
    (tmp_path / "rows.csv").write_text("prompt,answer\n")
    with pytest.raises(ValueError, match="rows.csv: give a .jsonl file with a prompt and"):
        holding(str(tmp_path / "rows.csv"), SMOKE)


def test_a_lora_is_put_on_no_module_of_fewer_rows_than_its_rank(monkeypatch):
    """As of the gate of a shared expert, of one row."""
    assert adaptable_modules(SMOKE.model, 4) == ()
    weights = {"layers.0.mlp.gate.weight": (1, 32), "layers.0.mlp.up.weight": (64, 32)}
    found = {name: torch.zeros(shape) for name, shape in weights.items()}
    monkeypatch.setattr(own_rows, "matrices", lambda model: found)
    assert (adaptable_modules(SMOKE.model, 1), adaptable_modules(SMOKE.model, 4)) == ((), ("up",))


def test_few_held_out_rows_are_told(tmp_path):
    rows = [{"prompt": f"{n} is", "answer": "odd", "split": "train"} for n in range(40)]
    file = write(tmp_path / "rows.jsonl", [*rows, rows[0] | {"prompt": "41 is", "split": "test"}])
    with pytest.warns(UserWarning, match="only 1 rows of rows.jsonl are held out"):
        own_rows._split_rows(file, 16)


def test_a_training_that_breaks_in_its_last_step_says_so(store, tmp_path, monkeypatch):
    monkeypatch.setattr(own_rows, "mean_loss", lambda *a: float("nan"))
    with pytest.raises(ValueError, match="training diverged at step"):
        holding(write(tmp_path / "mine.jsonl", NOISE[::-1]), SMOKE)


def test_a_training_that_diverges_says_so(store, tmp_path, monkeypatch):
    monkeypatch.setattr(own_rows, "train", lambda *a, **k: [1.0, float("nan")])
    with pytest.raises(ValueError, match="diverged at step 2"):
        holding(write(tmp_path / "mine.jsonl", RULE[::-1]), SMOKE)
