"""One run measured: trained, scored, its update kept; the spectra of an update that is kept."""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Iterable
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from deltarank.checkpoints import is_vocabulary
from deltarank.checks import all_finite, require_disk
from deltarank.runtime import cache_folder, commit, device_name, processor, progress
from deltarank.spectra import factor_singular_values, rank_measures, singular_values
from deltarank.study.configs import FACTORED, GROWTH_ROWS, RunConfig
from deltarank.study.evaluation import evaluate, mean_loss
from deltarank.study.models import TINY, load_model, matrices
from deltarank.study.tasks import load_split, load_task
from deltarank.study.training import has_compiler, lora_factors, lora_layers, prepare, train


def provenance(seconds: float) -> dict:
    """Where, when and with which versions a result was computed."""
    import peft
    import transformers

    return {
        "seconds": round(seconds, 1),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "device": device_name(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "compiler": has_compiler(),
        "commit": commit(),
    }


def _squared_norms(dW: dict[str, Tensor], names: Iterable[str]) -> dict[str, float]:
    """|dW|_F^2 summed over the matrices, embedding and head, and the rest (norms, biases)."""
    parts = {"matrices": 0.0, "embedding": 0.0, "rest": 0.0}
    names = set(names)
    for name, update in dW.items():
        part = "matrices" if name in names else "embedding" if is_vocabulary(name) else "rest"
        parts[part] += float(update.double().square().sum())
    return parts


def delta_file(config: RunConfig) -> Path:
    """Where the update of a run is cached: it can be trained again."""
    return cache_folder() / "deltas" / f"{config.key}.safetensors"


def measure(config: RunConfig, label: str = "") -> dict:
    """Train and measure one run, whose update is kept in the cache.

    Returns its record: configuration, status, losses, evaluation, shapes, squared norms of the
    update by part, its growth, provenance.
    """
    started = time.perf_counter()
    model, W0 = prepared(config)
    growth: list[dict] = []

    def note_growth(step: int) -> None:
        if step in config.growth_steps and _whole(model):
            note = {"step": step} | _growth(config, model, W0)
            growth.extend([note] * math.isfinite(note["loss_nats"]))  # else the next step ends it

    clock = time.perf_counter()
    losses = []
    if config.method != "base":
        losses = train(config, model, label=label, after_step=note_growth)
    train_seconds = time.perf_counter() - clock
    finished = all(map(math.isfinite, losses))
    evaluation = evaluate_splits(config, model, label) if finished else {}
    finished &= all(math.isfinite(e["loss_nats"]) for e in evaluation.values())
    shapes, norms = keep_update(config, model, W0) if finished else ({}, {})
    return {
        "config": config.recipe,
        "identity": config.identity,
        "status": "finished" if finished else "diverged",
        "train_loss_nats": rounded(losses),
        "evaluation": evaluation if finished else {},
        "shapes": shapes,
        "squared_norms": norms,
        "growth": growth,
        "provenance": provenance(time.perf_counter() - started)
        | {"train_seconds": round(train_seconds, 1)},
    }


def rounded(losses: list[float]) -> list[float | None]:
    """The losses of the steps as they are stored: to five digits, None for one that is not finite.

    >>> rounded([0.1234567, math.inf])
    [0.12346, None]
    """
    return [round(loss, 5) if math.isfinite(loss) else None for loss in losses]


def prepared(config: RunConfig) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model before training, with room on the disk for its deltas, and what it trains, W0."""
    for split in ("test",) if config.method == "base" else ("train", "valid", "test"):
        load_split(config.task, split)  # named before any work is done
    delta_file(config).parent.mkdir(parents=True, exist_ok=True)
    require_disk(cache_folder(), 1.5)
    model = prepare(config)
    return model, {
        n: p.detach().cpu().clone() for n, p in model.named_parameters() if p.requires_grad
    }


def evaluate_splits(config: RunConfig, model: nn.Module, label: str) -> dict[str, dict]:
    """evaluate() on every held-out split."""
    splits, found = [split for split in load_task(config.task) if split != "train"], {}
    with progress(len(splits), f"{label}: score") as bar:
        for split in splits:
            found[split] = evaluate(model, config, split)
            bar.update()
    return found


def _whole(model: nn.Module) -> bool:
    """Whether no matrix has NaN or infinite entries, of which there is no spectrum."""
    return all(all_finite(W.detach()) for W in matrices(model).values())


def _growth(config: RunConfig, model: nn.Module, W0: dict[str, Tensor]) -> dict:
    """Held-out loss and the ranks of the update so far, one value a matrix, as in "shapes"."""
    rows = load_split(config.task, "valid")[:GROWTH_ROWS]
    spectra = {
        n: singular_values(W.detach() - W0[n].to(W.device)) for n, W in matrices(model).items()
    }
    ranks = pd.DataFrame(rank_measures(S) for S in spectra.values()).round(4)
    return {"loss_nats": mean_loss(model, config, rows)} | ranks.to_dict("list")


def keep_update(
    config: RunConfig, model: nn.Module, W0: dict[str, Tensor]
) -> tuple[dict[str, list[int]], dict[str, float]]:
    """Put the update into the cache; the shape of every matrix's, and a full run's squared norms.

    Of an adapter on some matrices only these have a shape: what was not trained has no spectrum,
    and zeros would pull every median over the matrices towards a rank that none of them has.
    """
    if config.method == "base":
        return {}, {}
    if config.method in FACTORED:
        factors = {name: lora_factors(layer) for name, layer in lora_layers(model).items()}
        scaled = {f"{n}.B": scale * B for n, (B, _, scale) in factors.items()}
        _write_update(config, scaled | {f"{n}.A": A for n, (_, A, _) in factors.items()})
        return {n: [len(B), A.shape[1]] for n, (B, A, _) in factors.items()}, {}
    if config.adapter:
        dW = _merged_update(config, model)
        _write_update(config, dW)
        return {name: list(update.shape) for name, update in dW.items()}, {}
    dW = {n: p.detach().cpu() - W0[n] for n, p in model.named_parameters() if n in W0}
    _write_update(config, dW)
    shapes = {name: list(dW[name].shape) for name in matrices(model)}
    return shapes, _squared_norms(dW, shapes)


def kept_spectra(config: RunConfig, names: Iterable[str]) -> dict[str, Tensor]:
    """S of these matrices' updates, float32, descending, from the update in the cache."""
    from safetensors.torch import load_file

    kept = load_file(delta_file(config))
    if config.method in FACTORED:
        return {n: factor_singular_values(kept[f"{n}.B"], kept[f"{n}.A"]).float() for n in names}
    return {name: singular_values(kept[name]).float() for name in names}


def _merged_update(config: RunConfig, model: nn.Module) -> dict[str, Tensor]:
    """dW (m, n) of every matrix that has an adapter: what PEFT merges, minus the base model's.

    The model's own weights before training will not do: PiSSA takes its factors out of them.
    """
    W0 = matrices(load_model(config.model))
    return {n: W1 - W0[n].detach().cpu() for n, W1 in tuned_weights(config, model).items()}


@torch.no_grad()
def tuned_weights(config: RunConfig, model: nn.Module) -> dict[str, Tensor]:
    """W1 (m, n) of every matrix that is trained, by name: of an adapter what PEFT merges.

    On the CPU; the model stays as it is, to the bit.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not config.adapter:
        return {n: W.detach().cpu().clone() for n, W in matrices(model).items()}
    W1 = {}
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, BaseTunerLayer):
            weight = layer.get_base_layer().weight
            before = weight.detach().clone()
            layer.merge()
            W1[f"{name}.weight"] = layer.get_base_layer().weight.detach().cpu().clone()
            layer.unmerge()
            weight.copy_(before)
    return W1


def _write_update(config: RunConfig, update: dict[str, Tensor]) -> None:
    """Put an update into the cache, whole or not at all: dW of a full run, an adapter's factors."""
    from safetensors.torch import save_file

    part = delta_file(config).with_suffix(f".{os.getpid()}")
    try:
        save_file({name: X.cpu().contiguous() for name, X in update.items()}, part)
        os.replace(part, delta_file(config))
    finally:
        part.unlink(missing_ok=True)


def estimated_seconds(config: RunConfig) -> float:
    """A rough cost on two cores, to plan by: seconds a step by method, and the evaluation."""
    if config.model == TINY:
        return 1.0 + 0.05 * config.steps
    step = {"base": 0.0, "full": 1.2}.get(config.method, 1.0)
    return 15 + 0.1 * config.eval_rows + step * config.steps * config.batch_size / 16
