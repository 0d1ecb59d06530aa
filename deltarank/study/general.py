"""General text: what a model loses on prose and code that it was not tuned on."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from deltarank.checks import require
from deltarank.runtime import ROOT, product_dtype
from deltarank.store import cached, file_sha256
from deltarank.study.configs import RunConfig
from deltarank.study.losses import answer_loss, on_device, scoring
from deltarank.study.models import load_tokenizer
from deltarank.study.tasks import IGNORED, a_line_each, encode

GENERAL = ROOT / "data" / "general.jsonl"
PASSAGES_AT_ONCE = 2  # long ones, whose logits take much memory


def general_text() -> dict[str, list[str]]:
    """The passages of the committed sample by kind, "prose" and "code"."""
    found: dict[str, list[str]] = {}
    for line in GENERAL.read_text("utf8").splitlines():
        row = json.loads(line)
        found.setdefault(row["kind"], []).append(row["text"])
    return found


def word_loss(model: str) -> dict[str, float]:
    """Mean loss by kind, in nats a token, of what knows of the sample only how often tokens occur.

    The entropy of their shares: a model that loses more has less than the frequencies of words.
    model: whose tokens.
    """
    found, tokenizer = {}, load_tokenizer(model)
    for kind, texts in general_text().items():
        rows = [encode({"prompt": "", "answer": text}, tokenizer) for text in texts]
        tokens = Counter(label for row in rows for label in row["labels"][1:] if label != IGNORED)
        shares = torch.tensor([*tokens.values()], dtype=torch.float64) / tokens.total()
        found[kind] = float(-(shares * shares.log()).sum())
    return found


def kept_by(folder: Path, rules: dict, compute: Callable[[], dict]) -> dict:
    """The record at `folder`, measured on this sample by these rules; computed where missing.

    Raises ValueError for one that was measured on other text or by other rules.
    """
    rules = rules | {"general_sha256": file_sha256(GENERAL)}
    record, _ = cached(folder, lambda: (compute() | {"rules": rules}, None))
    require(record["rules"] == rules, f"{folder} is of other text or rules: delete it")
    return record


@torch.no_grad()
def general_loss(model: nn.Module, config: RunConfig) -> dict[str, float]:
    """Mean loss on each kind of general text, in nats a token; products in config's autocast type.

    Passages begin with the token that begins a text, and the newline that ends one counts.
    """
    tokenizer, dtype = load_tokenizer(config.model), product_dtype(config.dtype)
    head = model.get_output_embeddings().weight.to(dtype)

    def mean(texts: list[str]) -> float:
        rows = [encode({"prompt": "", "answer": text}, tokenizer) for text in texts]
        nats, tokens = 0.0, 0
        for start in range(0, len(rows), PASSAGES_AT_ONCE):
            batch = on_device(model, a_line_each(rows[start : start + PASSAGES_AT_ONCE]))
            count = int((batch["labels"][:, 1:] != IGNORED).sum())
            nats += count * answer_loss(model, head, batch, dtype=dtype).item()
            tokens += count
        return nats / tokens

    with scoring(model):
        return {kind: mean(texts) for kind, texts in general_text().items()}
