"""First gradients: the spectra of what a task asks of each matrix before anything is trained."""

from __future__ import annotations

import time

import pandas as pd
import torch
from torch import Tensor, nn

from deltarank.runtime import product_dtype, progress
from deltarank.spectra import rank_measures, singular_values
from deltarank.store import cached
from deltarank.study.configs import RunConfig
from deltarank.study.losses import answer_loss, on_device, scoring
from deltarank.study.measuring import provenance
from deltarank.study.models import load_tokenizer, matrices
from deltarank.study.profiles import entry_folder
from deltarank.study.tasks import BATCH, a_line_each, answer_tokens, encode, load_split
from deltarank.study.training import prepare

GRADIENT_ROWS = 256  # training rows that the gradient is of


def first_gradients(base: RunConfig) -> pd.DataFrame:
    """rank_measures of the gradient of each matrix at the weights of a base run; stored.

    The gradient (m, n) is that of the mean answer loss of the task's first GRADIENT_ROWS training
    rows.  One line a matrix, by name; computed when it is not stored.
    """

    def compute() -> tuple[dict, None]:
        start, model = time.perf_counter(), prepare(base)
        found = {name: rank_measures(S) for name, S in gradient_spectra(model, base).items()}
        return {"run": base.key, "measures": found} | provenance(time.perf_counter() - start), None

    record, _ = cached(entry_folder(base, "gradients"), compute)
    return pd.DataFrame(record["measures"]).T.rename_axis("name")


def gradient_spectra(model: nn.Module, config: RunConfig) -> dict[str, Tensor]:
    """Singular values (min(m, n),) of the gradient of each matrix of `model`, by name.

    Of the mean answer loss of the first training rows of a run, a line each, in its autocast type.
    """
    tokenizer, dtype = load_tokenizer(config.model), product_dtype(config.dtype)
    rows = load_split(config.task, "train")[:GRADIENT_ROWS]
    encoded = [encode(row, tokenizer, config.seq_len) for row in rows]
    tokens = sum(map(answer_tokens, encoded))
    weights = matrices(model)
    head = model.get_output_embeddings().weight.detach().to(dtype)
    model.zero_grad()
    with scoring(model), torch.enable_grad(), progress(len(rows), config.key) as bar:
        for start in range(0, len(encoded), BATCH):
            part = encoded[start : start + BATCH]
            batch = on_device(model, a_line_each(part))
            share = sum(map(answer_tokens, part)) / tokens
            (share * answer_loss(model, head, batch, dtype=dtype)).backward()
            bar.update(len(part))
    return {name: singular_values(W.grad.detach()) for name, W in weights.items()}
