"""Files in PEFT's layout: every field that its processing reads is there, of its type."""

import json
import os

import pandas as pd
import peft
import pytest

from deltarank.study import peft_results
from deltarank.study.models import skeleton
from deltarank.study.peft_results import (
    LAST,
    contest_layouts,
    experiment,
    peft_layout,
    write_peft_layout,
)
from deltarank.study.profiles import profile
from deltarank.study.runs import Result, run

# What method_comparison/processing.py of PEFT 5d602fd reads of a file, and the types it casts to.
READ = {
    "run_info": {
        "experiment_name": str,
        "train_config": dict,
        "peft_config": dict | None,
        "total_time": float,
        "peft_branch": str,
        "created_at": str,
    },
    "train_info": {
        "status": str,
        "accelerator_memory_reserved_avg": int,
        "accelerator_memory_max": int,
        "accelerator_memory_reserved_99th": int,
        "train_time": float,
        "file_size": int,
        "num_trainable_params": int,
    },
    "meta_info": {"package_info": dict, "system_info": dict},
}
METRICS = ("train loss", "train samples", "test accuracy", "train total tokens", "forgetting")
PACKAGES = ("peft", "transformers", "datasets", "torch", "bitsandbytes")
RECIPES = {"full": {}, "lora": {"rank": 2}, "dora": {"rank": 2, "alpha": 4.0, "lr": 1e-3}}


@pytest.fixture(params=RECIPES)
def result(store, request):
    """A finished run of a method."""
    return run(profile().config("facts", request.param, **RECIPES[request.param]))


def test_all_that_peft_reads_is_there(result, tmp_path):
    write_peft_layout(tmp_path / "results", [peft_layout(result, forgotten=0.25, memory=3)])
    (file,) = (tmp_path / "results").iterdir()
    found = json.loads(file.read_text("utf8"))
    for part, fields in READ.items():
        for name, kind in fields.items():
            assert isinstance(found[part][name], kind), (part, name)
    (metrics,) = found["train_info"]["metrics"]
    assert all(isinstance(metrics[name], int | float) for name in METRICS)
    assert {f"{name}-version" for name in PACKAGES} <= found["meta_info"]["package_info"].keys()
    assert found["run_info"]["train_config"]["model_id"] == result.config.model
    assert file.name == f"{experiment(result).replace('/', '--')}.json"


def test_a_file_that_says_the_same_is_left_as_it_is(result, tmp_path):
    found = peft_layout(result, forgotten=0.25, memory=3)
    write_peft_layout(tmp_path / "results", [found])
    (file,) = (tmp_path / "results").iterdir()
    os.utime(file, ns=(0, 0))
    write_peft_layout(tmp_path / "results", [found])
    assert file.stat().st_mtime_ns == 0
    write_peft_layout(
        tmp_path / "results", [found | {"run_info": found["run_info"] | {"error_msg": "none"}}]
    )
    assert file.stat().st_mtime_ns > 0 and '"none"' in file.read_text("utf8")


def test_what_it_says_is_what_was_measured(result):
    found = peft_layout(result, forgotten=0.25, memory=3)
    (metrics,) = found["train_info"]["metrics"]
    assert metrics["test accuracy"] == result.score() / 100 and metrics["forgetting"] == 0.25
    trained, total = (found["train_info"][f"num_{what}_params"] for what in ("trainable", "total"))
    losses = result.record["train_loss_nats"][-LAST:]
    assert metrics["train loss"] == pytest.approx(sum(losses) / len(losses))
    whole = sum(p.numel() for p in skeleton(result.config.model).parameters())
    assert total == whole + trained * result.config.adapter
    method, told = result.config.method, found["run_info"]["peft_config"]
    if method == "full":
        assert told is None and trained > 10_000
    else:
        again = peft.LoraConfig(**{k: told[k] for k in ("r", "lora_alpha", "use_dora")})
        assert (again.r, again.use_dora) == (2, method == "dora")
        assert found["train_info"]["file_size"] == 4 * trained < 200_000


def test_a_rewriting_has_no_accuracy_where_it_was_not_scored(store, tmp_path):
    lora = run(profile().config("kjv", "lora", rank=2))
    write_peft_layout(tmp_path / "results", [peft_layout(lora, forgotten=0.0, memory=0)])
    [file] = (tmp_path / "results").iterdir()
    metrics = json.loads(file.read_text("utf8"))["train_info"]["metrics"][0]
    assert "valid accuracy" not in metrics and metrics["test accuracy"] == lora.score() / 100


def test_a_contest_has_a_result_of_every_method(store, monkeypatch):
    def best(tried, seed):
        return profile().config("facts", "lora", rank=1, seed=seed)

    looks = pd.DataFrame({"look": ["0.5", "end"], "prose": [1.0, 0.5]})
    names = ["full", "LoRA"]
    costs = pd.DataFrame({"GB": [3.0, 2.0]}, pd.MultiIndex.from_product([[1], names]))
    stubs = {"contestants": lambda *contest: names, "trials": lambda *key: []}
    stubs |= {"chosen": best, "tuned": profile().config, "forgotten_table": lambda configs: looks}
    for name, stub in (stubs | {"method_costs": lambda: costs}).items():
        monkeypatch.setattr(peft_results, name, stub)
    found = contest_layouts()
    told = [layout["train_info"]["metrics"][0]["forgetting"] for layout in found]
    assert told == [0.5, 0.5] and found[0]["run_info"]["peft_config"] is None
    memories = [layout["train_info"]["accelerator_memory_max"] for layout in found]
    assert memories == [3 * 10**9, 2 * 10**9]
    assert len({layout["run_info"]["experiment_name"] for layout in found}) == 2


def test_no_two_runs_have_one_name():
    fields = ({}, {"rslora": True}, {"alpha": 256.0}, {"modules": ("q_proj",)})
    runs = [profile().config("facts", "lora", rank=2, **changed) for changed in fields]
    assert len({experiment(Result(config, {})) for config in runs}) == 4


def test_a_run_that_diverged_has_no_result(store):
    config = profile().config("facts", "lora", rank=2, lr=1e30, max_grad_norm=1e30)
    with pytest.raises(ValueError, match="diverged: it has no result"):
        peft_layout(run(config), forgotten=0.0, memory=0)
