"""Configurations: what cannot run is refused, and what differs has another key."""

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest

from deltarank.runtime import ROOT
from deltarank.study import configs, tasks
from deltarank.study.configs import RunConfig
from deltarank.study.convert import GEMMA
from deltarank.study.models import TINY, load_model, model_sha256
from deltarank.study.profiles import profile
from deltarank.study.tasks import TASK_FOLDER
from deltarank.study.training import lora_layers, prepare

FULL = {"task": "sentiment", "model": TINY, "lr": 1e-4, "steps": 6}
LORA = FULL | {"method": "lora", "rank": 4, "alpha": 8.0}
TINY_LORA = FULL | {"method": "tinylora", "rank": 2, "vector": 8}
LORA_PLUS = LORA | {"method": "loraplus", "knob": 16.0}


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("task", {"task": "poetry"}),
        ("task", {"task": "a file.jsonl"}),
        ("method", {"method": "prompt"}),
        ("steps", {"steps": 0}),
        ("steps", {"steps": -1}),
        ("steps", {"method": "base"}),
        ("lr", {"lr": 0.0}),
        ("lr", {"lr": -1e-4}),
        ("lr", {"lr": float("nan")}),
        ("lr", {"lr": float("inf")}),
        ("rank", {"rank": 4}),
        ("rank", {"method": "base", "lr": 0.0, "steps": 0, "rank": 4}),
        ("rank", {**LORA, "rank": 0}),
        ("rank", {**LORA, "rank": -1}),
        ("rank", {**LORA, "rank": 8.5}),
        ("seed", {"seed": 0.5}),
        ("alpha", {"alpha": 8.0}),
        ("alpha", {"method": "base", "lr": 0.0, "steps": 0, "alpha": 8.0}),
        ("rslora", {"rslora": True}),
        ("alpha", {**LORA, "alpha": 0.0}),
        ("alpha", {**LORA, "alpha": float("nan")}),
        ("alpha", {**LORA, "alpha": float("inf")}),
        ("batch_size", {"batch_size": 0}),
        ("seq_len", {"seq_len": 0}),
        ("eval_rows", {"eval_rows": 0}),
        ("generate_rows", {"generate_rows": -1}),
        ("rank_pattern", {"rank_pattern": (("q_proj", 2),)}),
        ("layers", {"layers": (1,)}),
        ("layers", {**LORA, "layers": (1, 0)}),
        ("layers", {**LORA, "layers": (1, 1)}),
        ("layers", {**LORA, "layers": (-1,)}),
        ("modules", {"modules": ("q_proj",)}),
        ("modules", {**LORA, "modules": ("q_proj", "k_proj")}),
        ("vector", {**LORA, "vector": 8}),
        ("vector", {**TINY_LORA, "vector": 0}),
        ("rank", {**TINY_LORA, "rank": 0}),
        ("alpha", {**TINY_LORA, "alpha": 8.0}),
        ("rslora", {**TINY_LORA, "rslora": True}),
        ("train_embedding", {**LORA, "train_embedding": True}),
        ("dtype", {"dtype": "float16"}),
        ("schedule", {"schedule": "sometimes"}),
        ("optimizer", {"optimizer": "magic"}),
        ("weight_decay", {"weight_decay": float("nan")}),
    ],
)
def test_a_value_that_cannot_run_is_refused_by_name(field, changes):
    with pytest.raises(ValueError, match=f"^{field}="):
        RunConfig(**(FULL | changes))


@pytest.mark.parametrize("record", [FULL, LORA, TINY_LORA, {"task": "kjv", "method": "base"}])
def test_a_value_that_can_run_is_accepted(record):
    assert RunConfig(**record).task == record["task"]


CHANGES = {
    "task": "json",
    "model": GEMMA,
    "rank": 5,
    "alpha": 9.0,
    "rslora": True,
    "rank_pattern": (("layers.0.mlp.up_proj", 2),),
    "layers": (1,),
    "modules": ("q_proj",),
    "vector": 9,
    "knob": 9.0,
    "lr": 2e-4,
    "schedule": "constant",
    "steps": 7,
    "batch_size": 17,
    "seq_len": 49,
    "optimizer": "sgd",
    "weight_decay": 0.1,
    "train_embedding": True,
    "permuted": True,
    "warmup": 0.1,
    "max_grad_norm": 0.5,
    "seed": 1,
    "dtype": "float32",
    "compile": False,
    "eval_rows": 257,
    "generate_rows": 65,
}


def test_every_field_that_determines_a_run_is_tried():
    assert {"method", *CHANGES} == RunConfig(**FULL).recipe.keys()
    assert {field.name for field in dataclasses.fields(RunConfig)} == {
        *RunConfig(**FULL).recipe,
        "profile",
    }


@pytest.mark.parametrize("record", [FULL, LORA])
def test_the_profile_that_asks_for_a_run_is_no_part_of_its_key(record):
    quick, paper = (RunConfig(**record, profile=name) for name in ("quick", "paper"))
    assert quick.key == paper.key
    assert quick.identity == paper.identity and "profile" not in quick.identity


@pytest.mark.parametrize("field", CHANGES)
def test_the_key_changes_with_every_field(field):
    start = {"train_embedding": FULL, "vector": TINY_LORA, "knob": LORA_PLUS}.get(field, LORA)
    assert RunConfig(**start).key != RunConfig(**(start | {field: CHANGES[field]})).key


def test_the_hash_changes_with_the_method():
    full, lora = RunConfig(**FULL), RunConfig(**LORA)
    assert full.key[-12:] != lora.key[-12:]
    assert lora.identity["method"] == "lora"


def test_the_key_ignores_the_order_and_the_defaults():
    record = dict(reversed(LORA.items())) | {"weight_decay": 0.0}
    assert RunConfig(**record).key == RunConfig(**LORA).key


def test_the_key_is_the_same_however_a_number_is_written():
    whole = LORA | {"alpha": 8, "lr": 1, "max_grad_norm": 1, "warmup": 0}
    assert RunConfig(**whole).key == RunConfig(**(LORA | {"lr": 1.0})).key
    drawn = {"rank": np.int64(4), "alpha": np.float64(8), "seed": np.int64(3)}
    assert RunConfig(**(LORA | drawn)).key == RunConfig(**(LORA | {"seed": 3})).key


def test_the_key_says_what_the_run_is():
    assert RunConfig(**LORA, seed=3).key.startswith("sentiment-lora-r4-s3-")


def test_the_key_changes_with_the_bytes_of_the_task(monkeypatch, tmp_path):
    before = RunConfig(**FULL).key
    content = (TASK_FOLDER / "sentiment.jsonl").read_bytes()
    monkeypatch.setattr(tasks, "TASK_FOLDER", tmp_path)
    (tmp_path / "sentiment.jsonl").write_bytes(content)
    assert RunConfig(**FULL).key == before
    (tmp_path / "sentiment.jsonl").write_bytes(content.replace(b"negative", b"Negative", 1))
    assert RunConfig(**FULL).key != before


def test_the_key_changes_with_the_measurement(monkeypatch):
    before = RunConfig(**FULL).key
    monkeypatch.setattr(configs, "MEASUREMENT", configs.MEASUREMENT + 1)
    assert RunConfig(**FULL).key != before


def test_the_key_changes_with_the_weights_of_a_folder(tmp_path):
    model = load_model(TINY)
    keys = []
    for name in ("a", "b"):
        model.save_pretrained(tmp_path / name)
        keys.append(RunConfig(**(FULL | {"model": str(tmp_path / name)})).identity)
        model.get_input_embeddings().weight.data += 1
    assert keys[0]["model_sha256"] != keys[1]["model_sha256"]


def test_the_key_changes_with_what_else_a_folder_computes_by(tmp_path):
    keys = []
    for name in ("a", "b"):
        load_model(TINY).save_pretrained(tmp_path / name)
        keys.append(RunConfig(**(FULL | {"model": str(tmp_path / name)})).identity["model_sha256"])
    (tmp_path / "b" / "config.json").write_text("{}")
    model_sha256.cache_clear()
    other = RunConfig(**(FULL | {"model": str(tmp_path / "b")})).identity["model_sha256"]
    assert keys[0] == keys[1] != other


@pytest.mark.slow
@pytest.mark.parametrize("hash_seed", ["0", "1"])
def test_the_key_is_the_same_in_every_process(hash_seed):
    code = f"from deltarank.study.configs import RunConfig; print(RunConfig(**{LORA!r}).key)"
    environment = os.environ | {"PYTHONHASHSEED": hash_seed}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == RunConfig(**LORA).key


def test_the_scale_of_a_lora_is_that_of_peft():
    for changes in ({}, {"rslora": True}, {"alpha": 256.0}):
        config = profile().config("facts", "lora", rank=8, **changes)
        layer = next(iter(lora_layers(prepare(config)).values()))
        assert layer.scaling["default"] == pytest.approx(config.scale)


def test_the_scale_of_a_run_without_a_lora_is_zero():
    assert RunConfig(**FULL).scale == 0
    assert RunConfig(task="kjv", method="base").scale == 0
