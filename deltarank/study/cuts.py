"""Cuts: what is left of a task when the update of every matrix is cut to rank r."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence

import pandas as pd
import torch
from torch import Tensor

from deltarank.checks import require
from deltarank.gram import leading_factors
from deltarank.runtime import device_name, progress
from deltarank.store import cached, digest, load_entry, save_entry
from deltarank.study.configs import RunConfig
from deltarank.study.evaluation import evaluate
from deltarank.study.losses import require_own_loss
from deltarank.study.models import load_model, load_tokenizer, matrices
from deltarank.study.profiles import entry_folder
from deltarank.study.runs import update_setter, updates
from deltarank.study.tasks import encode, load_split

CUT_PARTS = ("head", "tail", "rotated", "sign")  # which directions?
LENGTH_PARTS = ("shrunk", "stretched", "tail-scaled")  # or only how long an update?


def cut(config: RunConfig, ranks: Sequence[int], *, part: str = "head") -> pd.DataFrame:
    """What is left of a run when the update of every matrix is cut to rank r.

    part "head" keeps the r leading directions.  Controls of direction: "tail" keeps all but these,
    "rotated" puts their singular values along random directions, "sign" is the head of
    sign(dW) mean|dW| (BitDelta, Liu et al. 2024).  Controls of length: "shrunk" is the whole update
    at the head's Frobenius norm, "tail-scaled" the tail at that norm, "stretched" the head at the
    whole update's.  Parameters outside the matrices keep their full update, so that r = 0 is what
    they do alone.
    Returns one line a rank: rank, loss_nats, score, row_nats, row_score; each is stored.  Raises
    ValueError for an unknown part and for a rank that no matrix has, before a run is trained for
    it, and as `updates` does.
    """
    parts = (*CUT_PARTS, *LENGTH_PARTS)
    require(part in parts, f"part={part!r} is unknown; choose one of {', '.join(parts)}")
    stem = config.key if part == "head" else f"{config.key}-{part}"
    folders = {r: entry_folder(config, "cuts", f"{stem}-r{r}") for r in ranks}
    missing = [r for r in ranks if load_entry(folders[r]) is None]
    # Random directions are drawn for each rank alone, whatever other ranks are asked for.
    groups = [[r] for r in missing] if part == "rotated" else [missing] if missing else []
    for group in groups:
        dW = functools.partial(updates, config)
        cuts = _evaluate_cuts(config, dW, group, part, f"cuts of {stem}")
        for r, evaluation in zip(group, cuts, strict=True):
            record = {"run": config.key, "part": part, "rank": r, "device": device_name()}
            save_entry(folders[r], record | {"test": evaluation})
    found = {r: entry[0]["test"] for r, at in folders.items() if (entry := load_entry(at))}
    return pd.DataFrame([{"rank": r} | found[r] for r in ranks])


def stored_cuts(config: RunConfig) -> pd.DataFrame:
    """One line a cut of the run that is stored: rank, loss_nats, score; nothing is computed."""
    folders = entry_folder(config, "cuts").parent.glob(f"{config.key}-r[0-9]*")
    records = [entry[0] for folder in folders if (entry := load_entry(folder))]
    rows = [{"rank": record["rank"]} | record["test"] for record in records]
    return pd.DataFrame(rows, columns=["rank", "loss_nats", "score"]).sort_values("rank")


def cut_by_matrix(config: RunConfig, ranks: dict[str, int]) -> dict:
    """Evaluation of a full run whose matrices are cut to ranks of their own, {matrix: rank}."""

    def compute() -> tuple[dict, None]:
        dW = functools.partial(updates, config)
        found = next(_evaluate_cuts(config, dW, [ranks], "head", "cut by matrix"))
        record = {"run": config.key, "ranks": ranks, "device": device_name()}
        return record | {"test": found}, None

    name = f"{config.key}-by-matrix-{digest(ranks)[:12]}"
    return cached(entry_folder(config, "cuts", name), compute)[0]["test"]


def _evaluate_cuts(
    config: RunConfig,
    update: Callable[[], dict[str, Tensor]],
    ranks: Sequence[int | dict[str, int]],
    part: str,
    label: str,
) -> Iterator[dict]:
    """Yield, rank by rank, the test split's evaluation of config's model with the cut dW added.

    update(): dW; asked for when the ranks are known to be such as the matrices have.
    """
    model = load_model(config.model)
    names = matrices(model)
    limit = max(min(weight.shape) for weight in names.values())
    by_matrix = [r if isinstance(r, dict) else dict.fromkeys(names, r) for r in ranks]
    given = sorted({k for each in by_matrix for k in each.values()})
    require(given[0] >= 0 and given[-1] <= limit, f"ranks={given}: must be 0 to {limit}")
    dW, generator = update(), torch.Generator().manual_seed(0)
    most = {name: max(each.get(name, 0) for each in by_matrix) for name in names if name in dW}
    factors = {n: _cut_factors(dW[n], r, part, generator) for n, r in most.items()}

    def cut_to(each: dict[str, int], name: str) -> Tensor:
        k = each.get(name, 0)
        B, A = factors[name]
        return _part(dW[name], B[:, :k] @ A[:k], part)

    put = update_setter(model, dW)
    with progress(len(ranks), label) as bar:
        for each in by_matrix:
            put(functools.partial(cut_to, each))
            yield evaluate(model, config, "test")
            bar.update()


def _part(dW: Tensor, head: Tensor, part: str) -> Tensor:
    """What is added to a matrix (m, n) of a part of its update dW, whose cut is `head`."""
    if part in LENGTH_PARTS:
        source = {"shrunk": dW, "stretched": head, "tail-scaled": dW - head}[part]
        norm = (dW if part == "stretched" else head).norm()
        return source * (norm / source.norm()) if source.any() else source
    return dW - head if part == "tail" else head


def _cut_factors(
    dW: Tensor, r: int, part: str, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """B (m, k) and A (k, n), k = min(r, m, n): B[:, :j] @ A[:j] is what the cut to rank j adds.

    Of the parts that are made of a tail, what they leave out.
    """
    source = dW.sign() * dW.abs().mean() if part == "sign" else dW
    B, A, _ = leading_factors(source, min(r, *dW.shape))
    if part != "rotated":
        return B, A
    S = B.norm(dim=0) * A.norm(dim=1)  # one of them is 1
    Q_left, Q_right = (
        torch.linalg.qr(torch.randn(X.shape, generator=generator)).Q for X in (B, A.T)
    )
    return Q_left * S, Q_right.T


def score_pair(
    base: str,
    tuned: str,
    task: str,
    ranks: Sequence[int],
    *,
    by_matrix: dict[str, int] | None = None,
    eval_rows: int | None = None,
) -> pd.DataFrame:
    """What a task loses when tuned - base is cut: base, tuned, and the cut at every rank.

    task: as load_task takes it; its test rows are scored, the first `eval_rows` or all.  As in
    `cut`, what is outside the matrices keeps its full update.  by_matrix: one more cut, to ranks of
    their own, {matrix: rank}, left out with a warning where transformers names the matrices
    otherwise than the files do.  Both models are held in memory until the cuts begin.  Warns where
    tuned is no better than base.
    Returns one line a model: model ("base", "cut", "cut by matrix" or "tuned"), rank of the cut,
    loss_nats, score.
    """
    rows, tokenizer = load_split(task, "test")[:eval_rows], load_tokenizer(base)
    length = max(len(encode(row, tokenizer)["input_ids"]) for row in rows)
    config = RunConfig(task=task, method="base", model=base, seq_len=length, eval_rows=len(rows))
    dW, ends = _update_and_ends(config, tuned)
    names: list[tuple] = [("cut", r) for r in ranks]
    wanted: list[int | dict[str, int]] = [*ranks]
    if by_matrix and _known(by_matrix, dW):
        names.append(("cut by matrix", None))
        wanted.append(by_matrix)
    if not ends["tuned"]["loss_nats"] < ends["base"]["loss_nats"]:
        cure = 'do answers end as it ends them? A row may name its "end"'
        warnings.warn(f"{tuned} does no better on {task} than {base}: {cure}", stacklevel=2)
    cuts = _evaluate_cuts(config, lambda: dW, wanted, "head", "score cuts")
    found: list[tuple] = [("base", 0, ends["base"])]
    found += [(*name, scored) for name, scored in zip(names, cuts, strict=True)]
    found += [("tuned", None, ends["tuned"])]
    columns = ("loss_nats", "score")
    return pd.DataFrame(
        {"model": model, "rank": r} | {column: scored[column] for column in columns}
        for model, r, scored in found
    )


def _known(ranks: dict[str, int], dW: dict[str, Tensor]) -> bool:
    """Whether ranks name parameters of the loaded model; warns of the first that they do not."""
    strange = [name for name in ranks if name not in dW]
    if strange:
        told = f"{strange[0]} has another name in the model that transformers loads"
        warnings.warn(f"{told}: the cut by matrix is not scored", stacklevel=2)
    return not strange


def _update_and_ends(config: RunConfig, tuned: str) -> tuple[dict[str, Tensor], dict[str, dict]]:
    """dW of every parameter and the evaluations of "base" and "tuned"; both models are let go."""
    models = {"base": load_model(config.model), "tuned": load_model(tuned)}
    for model in models.values():
        require_own_loss(model)
    W0, W1 = (dict(model.named_parameters()) for model in models.values())
    strange = [n for n in W0 if n not in W1 or W0[n].shape != W1[n].shape]
    told = f"{config.model} and {tuned} differ in {strange[:1]}: they cannot be scored"
    require(not strange, told)
    ends = {name: evaluate(model, config, "test") for name, model in models.items()}
    with torch.no_grad():  # in the tuned model's place: a third copy would not fit so soon
        return {name: W1[name].sub_(W0[name]).detach().cpu() for name in W0}, ends
