"""Runs: loaded when they are stored, measured and stored when they are not."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pandas as pd
import torch
from torch import Tensor, nn

from deltarank.checks import require, require_disk
from deltarank.store import cached, load_entry
from deltarank.study.configs import FACTORED, RunConfig
from deltarank.study.measuring import (
    delta_file,
    estimated_seconds,
    keep_update,
    kept_spectra,
    measure,
    prepared,
    rounded,
)
from deltarank.study.models import load_model, load_tokenizer, matrices, quiet_transformers
from deltarank.study.profiles import entry_folder
from deltarank.study.training import train

_ALONE = threading.RLock()  # what is computed may sweep for its own
Given = TypeVar("Given", bound=Hashable)
Found = TypeVar("Found")


@dataclass(frozen=True)
class Result:
    """A stored run: its configuration and what was measured."""

    config: RunConfig
    record: dict

    @property
    def status(self) -> str:
        """ "finished" or "diverged"."""
        return self.record["status"]

    def loss(self, split: str = "test") -> float:
        """Answer loss in nats a token; NaN for a diverged run."""
        return self._scored(split).get("loss_nats", float("nan"))

    def score(self, split: str = "test") -> float:
        """Metric, 0 to 100; NaN for a diverged run."""
        score = self._scored(split).get("score")
        return float("nan") if score is None else score

    def _scored(self, split: str) -> dict:
        """What was measured on a split, nothing of a diverged run; ValueError for an unknown."""
        evaluation = self.record["evaluation"]
        told = f"split={split!r} is unknown; choose one of {', '.join(evaluation)}"
        require(split in evaluation or not evaluation, told)
        return evaluation.get(split, {})

    def shape(self, name: str) -> tuple[int, int]:
        """Shape of a matrix."""
        return tuple(self.record["shapes"][name])

    @property
    def matrices(self) -> list[str]:
        """The names of the matrices whose update is kept; none of a base or diverged run."""
        return [*self.record.get("shapes", {})]

    @property
    def spectra(self) -> dict[str, Tensor]:
        """S of every matrix's update, float32, descending; stored when first asked for."""

        def compute() -> tuple[dict, dict[str, Tensor]]:
            _require_update(self.config)
            return {"run": self.config.key}, kept_spectra(self.config, self.matrices)

        if not self.matrices:
            return {}
        return cached(entry_folder(self.config, "spectra"), compute)[1]


def stored(config: RunConfig) -> Result | None:
    """The stored result of `config`, or None."""
    entry = load_entry(entry_folder(config, "runs"))
    return Result(config, entry[0]) if entry else None


def run(config: RunConfig) -> Result:
    """The result of `config`: loaded when it is stored, otherwise trained, measured and stored."""
    folder = entry_folder(config, "runs")
    return Result(config, cached(folder, lambda: (measure(config, config.key), None))[0])


def sweep(configs: Sequence[RunConfig]) -> list[Result]:
    """The results of `configs`, in order; what is missing is computed and stored as it comes.

    Prints how many runs are stored and missing and about how long they take.  Goes through
    joblib: inside `with joblib.parallel_config(backend=..., n_jobs=...)` the same call runs on
    several processes or on a cluster; workers compute, this process stores.
    """
    from joblib import Parallel, delayed

    wanted = dict.fromkeys(configs)
    results = {c: result for c in wanted if (result := stored(c))}
    missing = [c for c in wanted if c not in results]
    if missing:
        require_disk(entry_folder(missing[0], "runs").parent, 0.1)
        minutes = sum(estimated_seconds(c) for c in missing) / 60
        print(
            f"{len(results)} of {len(wanted)} runs are stored; about "
            f"{minutes:.0f} min for the rest",
            file=sys.stderr,
        )
    jobs = [
        delayed(_measure_one)(c, f"run {i} of {len(missing)}: {c.key}")
        for i, c in enumerate(missing, start=1)
    ]
    for config, outcome in Parallel(return_as="generator_unordered", pre_dispatch="n_jobs")(jobs):
        folder = entry_folder(config, "runs")
        kept = cached(folder, lambda found=outcome: (found, None))  # type: ignore[misc]  # default
        results[config] = Result(config, kept[0])
    return [results[c] for c in configs]


def _measure_one(config: RunConfig, label: str) -> tuple[RunConfig, dict]:
    """The configuration beside its outcome: a sweep takes them as they come."""
    return config, _alone(measure, config, label)


def in_parallel(compute: Callable[[Given], Found], wanted: Sequence[Given]) -> list[Found]:
    """compute(x) of each that is wanted, in order, of equal ones once; `compute` stores it.

    Goes through joblib, as `sweep` does.
    """
    from joblib import Parallel, delayed

    once = list(dict.fromkeys(wanted))
    found = dict(zip(once, Parallel()(delayed(_alone)(compute, x) for x in once), strict=True))
    return [found[x] for x in wanted]


def _alone(compute: Callable[..., Found], *given) -> Found:
    """compute(*given), one at a time in a process: its threads share what training draws from."""
    with _ALONE:
        return compute(*given)


def updates(config: RunConfig) -> dict[str, Tensor]:
    """dW of every trained parameter, float32; trained again when it is not in the cache.

    Of an adapter that is the update of every matrix that it is on, and no entry of the others: of
    FACTORED ones scale * B @ A.
    Another processor rounds otherwise, and training amplifies it: warns where what was trained
    again is not the update that was stored.  Raises ValueError for a run that has none.
    """
    from safetensors.torch import load_file

    _require_update(config)
    kept = load_file(delta_file(config))
    if config.method in FACTORED:
        return {
            n.removesuffix(".B"): B @ kept[f"{n[:-1]}A"] for n, B in kept.items() if n[-1] == "B"
        }
    return kept


@torch.no_grad()
def update_setter(
    model: nn.Module, dW: dict[str, Tensor]
) -> Callable[[Callable[[str], Tensor]], None]:
    """A function that puts other updates (m, n) into the matrices of dW, each given by its name.

    model: a base, which gets the update of what is outside the matrices here and keeps it.
    """
    parameters = dict(model.named_parameters())
    W0 = {n: W.detach().cpu().clone() for n, W in matrices(model).items() if n in dW}
    for name in dW.keys() - W0.keys():
        parameters[name].add_(dW[name].to(parameters[name].device))

    @torch.no_grad()
    def put(change: Callable[[str], Tensor]) -> None:
        for name, W in W0.items():
            parameters[name].copy_(W + change(name).cpu())

    return put


def _require_update(config: RunConfig) -> None:
    """Have the update of a run in the cache; raises as `updates` does."""
    require(config.method != "base", f"{config.key}: a base run has no update")
    before, told = stored(config), f"{config.key} diverged: it has no update; lower its rate"
    require(before is None or before.status == "finished", told)
    if not delta_file(config).exists():
        _train_again(config, before)
    require(delta_file(config).exists(), told)


def _train_again(config: RunConfig, before: Result | None) -> None:
    """Put the update of a run into the cache, unless it diverges; before: what is stored of it."""
    model, W0 = prepared(config)
    losses = rounded(train(config, model, label=f"deltas of {config.key}"))
    if None in losses:
        return
    keep_update(config, model, W0)
    if before and before.record["train_loss_nats"] != losses:
        warnings.warn(
            f"{config.key} was trained again, and its losses on the way differ from those stored: "
            "it is another run of the same configuration, whose cuts and spectra do not belong on "
            "one curve with stored ones",
            stacklevel=4,
        )


def sigma_shift(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """The largest difference of two runs' singular values, as a share of the first's sigma_1.

    >>> sigma_shift({"W": torch.tensor([4.0, 2.0])}, {"W": torch.tensor([4.0, 1.0])})
    0.25
    """
    return max(float((S - second[name]).abs().max() / S[0]) for name, S in first.items())


def repeated(result: Result) -> pd.DataFrame:
    """A run with an update trained anew twice, which is not stored, a line each.

    Columns: device and threads; loss_nats and score on test rows; gap_stored and gap_first:
    sigma_shift to the stored run and to the first repetition, in %.  The update in the cache,
    which training replaces, is put back.
    """
    kept = delta_file(result.config)
    aside = kept.with_suffix(".aside")
    if kept.exists():
        kept.replace(aside)
    try:
        return _repetitions(result)
    finally:
        kept.unlink(missing_ok=True)
        if aside.exists():
            aside.replace(kept)


def _repetitions(result: Result) -> pd.DataFrame:
    """What `repeated` returns."""
    lines, first = [], None
    for _ in range(2):
        record = measure(result.config)
        spectra = kept_spectra(result.config, result.matrices)
        first = first or spectra
        line = {name: record["provenance"][name] for name in ("device", "threads")}
        line |= {name: record["evaluation"]["test"][name] for name in ("loss_nats", "score")}
        line["gap_stored"] = 100 * sigma_shift(result.spectra, spectra)
        lines.append(line | {"gap_first": 100 * sigma_shift(first, spectra)})
    return pd.DataFrame(lines)


def example_update(config: RunConfig) -> tuple[str, Tensor]:
    """Name and dW of one small matrix of a full run, stored, to show computations on.

    The deltas of whole runs are too large to commit; one k_proj of the first layer is not.
    """

    def first_small_matrix() -> tuple[dict, dict[str, Tensor]]:
        name, dW = next((n, d) for n, d in updates(config).items() if n.endswith("k_proj.weight"))
        return {"run": config.key}, {name: dW}

    return next(iter(cached(entry_folder(config, "examples"), first_small_matrix)[1].items()))


def run_model(config: RunConfig) -> nn.Module:
    """The model of a run: the base with its update, an adapter's merged."""
    dW = updates(config) if config.method != "base" else {}
    model = load_model(config.model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in dW:
                parameter.add_(dW[name].to(parameter.device))
    return model


def save_model(config: RunConfig, folder: Path, *, dtype: str = "float32") -> None:
    """Write the model of a run as a folder that from_pretrained loads."""
    model = run_model(config)
    with quiet_transformers():
        model.to(getattr(torch, dtype)).save_pretrained(folder)
        load_tokenizer(config.model).save_pretrained(folder)
