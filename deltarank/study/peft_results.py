"""PEFT results: runs in the layout of PEFT's method comparison, as its table and app read them."""

from __future__ import annotations

import dataclasses
import json
import math
from enum import Enum
from pathlib import Path

from deltarank.checks import require
from deltarank.study.contest import contestants, method_costs
from deltarank.study.forgetting import forgotten_table
from deltarank.study.models import load_tokenizer, skeleton
from deltarank.study.profiles import profile
from deltarank.study.runs import Result, run
from deltarank.study.search import tuned
from deltarank.study.sizes import trained_parameters
from deltarank.study.tasks import encode, load_split
from deltarank.study.training import adapter_config
from deltarank.study.trials import chosen, trials

LAST = 10  # steps whose mean loss is the "train loss"


def peft_layout(result: Result, *, forgotten: float, memory: int) -> dict:
    """A finished run as method_comparison/MetaMathQA/utils.py of PEFT 5d602fd writes its own.

    forgotten: nats a token that general text has lost; memory: peak bytes of the training process,
    where PEFT has those of the accelerator.  "test accuracy" is the score as a share, and there is
    none of a split whose rewritings were not scored; file_size is that of the trained numbers
    alone, in float32.  Raises ValueError for a run that diverged.
    """
    config, told = result.config, result.record["provenance"]
    require(result.status == "finished", f"{config.key} diverged: it has no result")
    parameters = trained_parameters(config)
    memories = ("reserved_avg", "max", "reserved_99th")
    return {
        "run_info": {
            "created_at": f"{told['date']}T00:00:00+00:00",
            "total_time": told["seconds"],
            "experiment_name": experiment(result),
            "peft_branch": f"v{told['peft']}",
            "peft_worktree_is_dirty": False,
            "train_config": _train_config(result),
            "peft_config": _peft_config(result) if config.adapter else None,
            "error_msg": "",
        },
        "train_info": {f"accelerator_memory_{name}": memory for name in memories}
        | {
            "train_time": told["train_seconds"],
            "file_size": 4 * parameters,
            "num_trainable_params": parameters,
            "num_total_params": sum(p.numel() for p in skeleton(config.model).parameters())
            + parameters * config.adapter,
            "status": "success",
            "metrics": [_metrics(result) | {"forgetting": forgotten}],
        },
        "meta_info": _meta_info(told) | {"model_info": {"sha": config.identity["model_sha256"]}},
    }


def contest_layouts() -> list[dict]:
    """peft_layout of every method of the first contest at its best setting, first seed.

    What is forgotten in the others is to come.  Full fine-tuning is that of the report, whose rate
    was searched finer.
    """
    found, costs = [], method_costs()
    for task, size in profile().contests[:1]:
        for name in contestants(task, size):
            best = chosen(trials(task, name, size), seed=profile().seeds[0])
            config = tuned(task) if name == "full" else best
            lost = forgotten_table([(name, config)]).set_index("look")["prose"]["end"]
            memory = round(1e9 * costs["GB"][size, name])
            found.append(peft_layout(run(config), forgotten=float(lost), memory=memory))
    return found


def _metrics(result: Result) -> dict:
    """What a run ended at, by PEFT's names."""
    config, last = result.config, result.record["train_loss_nats"][-LAST:]
    samples = config.steps * config.batch_size
    shares = {split: result.score(split) / 100 for split in ("valid", "test")}
    found = {f"{name} accuracy": share for name, share in shares.items() if not math.isnan(share)}
    return found | {
        "step": config.steps,
        "train samples": samples,
        "train total tokens": _tokens_a_row(result) * samples,
        "train loss": sum(last) / len(last),
    }


def experiment(result: Result) -> str:
    """A run's name in PEFT's manner: method, then model and key, by which no two runs are alike."""
    config = result.config
    return f"{config.method}/{Path(config.model).name}--{config.key}"


def write_peft_layout(folder: Path, results: list[dict]) -> None:
    """Write a file a result of peft_layout, named as PEFT does; one that says so stays."""
    folder.mkdir(parents=True, exist_ok=True)
    for found in results:
        name = found["run_info"]["experiment_name"].replace("/", "--")
        path = folder / f"{name}.json"
        text = json.dumps(found, indent=2, sort_keys=True, allow_nan=False) + "\n"
        if not path.exists() or path.read_text("utf8") != text:
            path.write_text(text, encoding="utf8")


def _tokens_a_row(result: Result) -> float:
    """The mean tokens of a training row, prompt and answer."""
    config, tokenizer = result.config, load_tokenizer(result.config.model)
    rows = load_split(config.task, "train")
    return sum(len(encode(row, tokenizer)["input_ids"]) for row in rows) / len(rows)


def _train_config(result: Result) -> dict:
    """PEFT's names of what of the recipe is no adapter's."""
    config = result.config
    return {
        "model_id": config.model,
        "dtype": config.dtype,
        "max_seq_length": config.seq_len,
        "batch_size": config.batch_size,
        "max_steps": config.steps,
        "compile": config.compile,
        "seed": config.seed,
        "grad_norm_clip": config.max_grad_norm,
        "optimizer_type": config.optimizer,
        "optimizer_kwargs": {"lr": config.lr, "weight_decay": config.weight_decay},
        "lr_scheduler": config.schedule,
        "query_template": config.task,
    }


def _peft_config(result: Result) -> dict:
    """What PEFT was told of the adapter, as JSON holds it."""
    config = result.config

    def plain(value):
        if isinstance(value, Enum):
            return value.value
        if dataclasses.is_dataclass(value):
            return dataclasses.asdict(value)
        return sorted(value) if isinstance(value, set) else value

    told = adapter_config(config, skeleton(config.model)).to_dict()
    return {name: plain(value) for name, value in told.items()}


def _meta_info(told: dict) -> dict:
    """Versions and machine; of packages that are not used here, none."""
    versions = {f"{name}-version": told.get(name, "none") for name in ("transformers", "peft")}
    versions |= {f"{name}-version": "none" for name in ("datasets", "bitsandbytes")}
    versions["torch-version"] = told["torch"]
    system = {"accelerator": told["device"], "processor": told.get("processor", told["device"])}
    return {"dataset_info": {}, "package_info": versions, "system_info": system}
