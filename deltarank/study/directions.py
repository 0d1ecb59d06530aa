"""Directions: how far a rank-1 LoRA reads its inputs along what full updates read most."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltarank.checks import require
from deltarank.gram import gram_matrix, leading_factors
from deltarank.runtime import product_dtype
from deltarank.store import cached
from deltarank.study.configs import RunConfig
from deltarank.study.losses import answer_hidden, autocast, on_device, scoring
from deltarank.study.models import load_model, load_tokenizer, matrices
from deltarank.study.profiles import entry_folder
from deltarank.study.runs import updates
from deltarank.study.tasks import a_line_each, batches, encode, load_split
from deltarank.study.training import lora_layers, prepare

DIRECTION_RANKS = (1, 8, 128)
MOMENT_ROWS = 256  # training rows that tell what a layer's inputs are
DRAWS = 64  # random directions, whose mean is chance
JITTER = 1e-12  # of the trace, added to a moment's diagonal: few tokens leave it singular


def input_moments(model: nn.Module, config: RunConfig, rows: Sequence[dict]) -> dict[str, Tensor]:
    """E[x x^T] of the inputs x that each matrix's layer gets on `rows`, (n, n), float64, by name.

    The mean over the tokens of prompt and answer, without padding and without the first of a row:
    the start token is the same in all rows, and its huge activations (Sun et al. 2024, arXiv
    2402.17762) would hide the others.  The forward pass is that of score_rows.  Layers that read
    the same tensor (q, k and v; gate and up) share one moment.
    """
    sums: dict[str, Tensor] = {}
    source: dict[str, str] = {}  # of every matrix the first that reads the same
    tokens = 0
    for inputs, real in _layer_inputs(model, config, rows):
        first: dict[int, str] = {}
        source |= {name: first.setdefault(id(x), name) for name, x in inputs.items()}
        for name in first.values():
            part = gram_matrix(inputs[name][real].double()).cpu()  # (tokens, n) -> (n, n)
            sums[name] = sums[name] + part if name in sums else part
        tokens += int(real.sum())
    means = {name: total / tokens for name, total in sums.items()}
    return {name: means[same] for name, same in source.items()}


def _layer_inputs(
    model: nn.Module, config: RunConfig, rows: Sequence[dict]
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Yield some of the rows as every matrix's layer gets them, (rows, length, n), by name.

    Beside them (rows, length): False for the first token and where there is padding.
    """
    tokenizer = load_tokenizer(config.model)
    encoded = [encode(row, tokenizer, config.seq_len) for row in rows]
    dtype, place = product_dtype(config.dtype), model.get_input_embeddings().weight.device
    with scoring(model), _watched(model) as inputs:
        for picked in batches([len(row["labels"]) for row in encoded]):
            part = [encoded[i] for i in picked]
            batch = on_device(model, a_line_each(part))
            lengths = torch.tensor([len(row["labels"]) for row in part], device=place)
            with autocast(place, dtype):
                answer_hidden(model, **batch)
            place_of = torch.arange(int(lengths.max()), device=place)
            yield inputs, (place_of > 0) & (place_of < lengths[:, None])


@contextlib.contextmanager
def _watched(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """By matrix, what its layer got in the latest forward pass."""
    inputs: dict[str, Tensor] = {}

    def keep(name: str, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs[name] = args[0]

    with contextlib.ExitStack() as hooks:
        for name in matrices(model):
            layer = model.get_submodule(name.removesuffix(".weight"))
            hook = layer.register_forward_pre_hook(functools.partial(keep, name))
            hooks.callback(hook.remove)
        yield inputs


def directions(adapter: RunConfig, full: RunConfig, other: RunConfig) -> pd.DataFrame:
    """How far a rank-1 LoRA's input direction lies in the leading ones of a full update; stored.

    One line a matrix and rank r of DIRECTION_RANKS.  a = A[0] (n,) is the LoRA's direction, a0 what
    it was before training; V (n, r) the r leading right singular vectors of the full update dW.

    right: |V^T a|^2 / |a|^2; right_initial: of a0; right_other: of the leading right singular
    vector of `other`, a full run with another seed; right_chance: r / n.
    right_inputs and so on: the same in the metric of the inputs, with R^T a for a and dW R for dW,
    where R R^T = E[x x^T] of the base model on the first MOMENT_ROWS training rows.  With x = R z
    and E[z z^T] = I the LoRA answers to R^T a alone: it is the share of its response to real inputs
    that lies along the full update's leading responses.  right_inputs_chance: the mean of DRAWS
    Gaussian directions, as PEFT draws a0; right_inputs_other_chance: of the leading response of a
    Gaussian matrix in `other`'s place, which shares nothing with dW but the inputs.
    moved: squared cosine of a and a0, 1 where training left it; moved_inputs: of R^T a and R^T a0;
    moved_inputs_chance: of R^T a0 and Gaussian directions (1 / n is moved's chance).
    Raises ValueError for an adapter that is no LoRA of rank 1.
    """
    one = adapter.method == "lora" and adapter.rank == 1
    require(one, f"{adapter.key}: a LoRA of rank 1 has one direction, other adapters have more")
    keys = [adapter.key, full.key, other.key]

    def compute() -> tuple[dict, None]:
        moments, a0, tables = _base_moments(full), _initial_directions(adapter), []
        lora, dW, dW_other = (updates(config) for config in (adapter, full, other))
        generator = torch.Generator().manual_seed(0)
        for name in [n for n in moments if n in a0]:
            M = moments[name]
            random = torch.randn(len(M), DRAWS, generator=generator)
            lines = torch.cat([torch.stack([_one_direction(lora[name]), a0[name]], 1), random], 1)
            noise = torch.randn(dW[name].shape, generator=generator)
            found = _compare(lines, dW[name], dW_other[name], noise, M)
            tables.append(pd.DataFrame({"name": name} | found))
        return {"runs": keys, "columns": pd.concat(tables).round(6).to_dict("list")}, None

    folder = entry_folder(adapter, "directions", f"{adapter.key}--{full.key}")
    record, _ = cached(folder, compute)
    require(record["runs"] == keys, f"{folder.name} is stored beside {record['runs'][-1]}")
    return pd.DataFrame(record["columns"])


def _base_moments(config: RunConfig) -> dict[str, Tensor]:
    """input_moments of a run's base model on its first training rows."""
    rows = load_split(config.task, "train")[:MOMENT_ROWS]
    return input_moments(load_model(config.model), config, rows)


def _initial_directions(config: RunConfig) -> dict[str, Tensor]:
    """A[0] of every matrix before training, (n,): PEFT draws it anew from the run's seed."""
    layers = lora_layers(prepare(config))
    return {n: layer.lora_A["default"].weight.detach()[0].cpu() for n, layer in layers.items()}


def _one_direction(dW: Tensor) -> Tensor:
    """A[0] of a rank-1 update, (n,), up to its length: every row is a multiple of it.

    >>> _one_direction(torch.tensor([[0.0, 1.0], [0.0, -2.0]])).tolist()
    [0.0, -2.0]
    """
    return dW[dW.norm(dim=1).argmax()]


def _compare(
    lines: Tensor, dW: Tensor, other: Tensor, noise: Tensor, M: Tensor
) -> dict[str, list[float] | float]:
    """The columns of `directions` for one matrix; those that no rank changes are one number.

    lines: (n, 2 + DRAWS), a, a0 and random directions; dW, other, noise: (m, n); M: (n, n).  In
    float64 where M is: what it makes large hides what it makes small from a Gram matrix in float32.
    """
    ranks = torch.tensor([r for r in DIRECTION_RANKS if r <= min(dW.shape)])
    R = _root(M)
    plain, felt = (F.normalize(Z, dim=0) for Z in (lines, R.T @ lines.double()))
    first = [_leading_right(other.double() @ R, 1), _leading_right(noise.double() @ R, 1)]
    right = _shares(torch.cat([_leading_right(other, 1), plain], 1), dW, ranks)
    inputs = _shares(torch.cat([*first, felt], 1), dW.double() @ R, ranks)
    turned = (felt[:, 1] @ felt).square()  # of a0 with a, itself and random directions
    columns = {
        "rank": ranks,
        "right": right[:, 1],
        "right_initial": right[:, 2],
        "right_other": right[:, 0],
        "right_chance": ranks / len(M),
        "right_inputs": inputs[:, 2],
        "right_inputs_initial": inputs[:, 3],
        "right_inputs_other": inputs[:, 0],
        "right_inputs_other_chance": inputs[:, 1],
        "right_inputs_chance": inputs[:, 4:].mean(1),
        "moved": (plain[:, 0] @ plain[:, 1]).square(),
        "moved_inputs": turned[0],
        "moved_inputs_chance": turned[2:].mean(),
    }
    return {name: column.tolist() for name, column in columns.items()}


def _root(M: Tensor) -> Tensor:
    """R (n, n), lower triangular, with R @ R.T = M but for JITTER.

    >>> _root(torch.diag(torch.tensor([4.0, 9.0]))).diagonal().tolist()
    [2.0, 3.0]
    """
    return torch.linalg.cholesky(M + JITTER * M.trace() * torch.eye(len(M)).to(M))


def _shares(lines: Tensor, dW: Tensor, ranks: Tensor) -> Tensor:
    """Squared cosines of lines (n, k), each of length 1, with dW's r leading rows, (ranks, k)."""
    V = _leading_right(dW, int(ranks[-1]))
    return (V.T @ lines).square().cumsum(0)[ranks - 1]


def _leading_right(dW: Tensor, r: int) -> Tensor:
    """Orthonormal (n, r), whose first k columns span dW's k leading right singular vectors."""
    return torch.linalg.qr(leading_factors(dW, r)[1].T).Q
