"""Evaluation: the loss and the score of held-out rows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltarank.runtime import product_dtype
from deltarank.study.configs import RunConfig
from deltarank.study.losses import (
    CHUNK,
    Head,
    answer_hidden,
    autocast,
    head_of,
    on_device,
    scoring,
)
from deltarank.study.models import load_tokenizer
from deltarank.study.tasks import (
    a_line_each,
    answer_tokens,
    batches,
    encode,
    encode_prompt,
    load_split,
)


@torch.no_grad()
def score_rows(model: nn.Module, config: RunConfig, rows: Sequence[dict]) -> pd.DataFrame:
    """Score every row by teacher forcing; one line a row: nats, tokens, right.

    nats: cross-entropy summed over the answer's tokens, float32 logits.  right: every token is
    the most likely one given those before it, which is when greedy decoding gives the answer.
    """
    tokenizer = load_tokenizer(config.model)
    encoded = [encode(row, tokenizer, config.seq_len) for row in rows]
    head, dtype = head_of(model), product_dtype(config.dtype)
    scores: list[dict] = [{}] * len(rows)
    for picked in batches([len(row["labels"]) for row in encoded]):
        batch = on_device(model, a_line_each([encoded[i] for i in picked]))
        with autocast(head.weight.device, dtype):
            hidden, target = answer_hidden(model, **batch)
        chunks = zip(hidden.split(CHUNK), target.split(CHUNK), strict=True)
        judged = [_judged(h, t, head) for h, t in chunks]
        nats, right = (torch.cat(part) for part in zip(*judged, strict=True))
        lengths = [answer_tokens(encoded[i]) for i in picked]
        for i, n, r in zip(picked, nats.split(lengths), right.split(lengths), strict=True):
            scores[i] = {"nats": n.sum().item(), "tokens": len(n), "right": bool(r.all())}
    return pd.DataFrame(scores)


def _judged(hidden: Tensor, target: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """Of some answer tokens: the nats of each, and whether it is the most likely one."""
    logits = head.logits(hidden.float())  # (tokens, vocabulary)
    nats = F.cross_entropy(logits, target, reduction="none")
    return nats, logits.argmax(-1) == target


def mean_loss(model: nn.Module, config: RunConfig, rows: Sequence[dict]) -> float:
    """The mean loss of the rows' answers, in nats a token, of a model that may be in training.

    NaN where that of a row is.
    """
    with scoring(model):
        scores = score_rows(model, config, rows)
    return _mean_nats(scores)


def _mean_nats(scores: pd.DataFrame) -> float:
    """The mean loss of the rows of score_rows, in nats a token."""
    return float(scores["nats"].sum(skipna=False) / scores["tokens"].sum())


@torch.no_grad()
def continuations(
    model: nn.Module,
    config: RunConfig,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    ends: Sequence[int],
) -> list[list[int]]:
    """The tokens that greedy decoding puts after each prompt, of token ids.

    Up to and with the first of the tokens `ends`, or to `max_new_tokens`.
    """
    length, place = max(map(len, prompts)), model.get_output_embeddings().weight.device
    missing = [length - len(prompt) for prompt in prompts]  # padded on the left
    padded = [[0] * n + prompt for n, prompt in zip(missing, prompts, strict=True)]
    mask = [[0] * n + [1] * (length - n) for n in missing]
    ids, seen = (torch.tensor(part, device=place) for part in (padded, mask))
    dtype = product_dtype(config.dtype)
    with autocast(place, dtype):
        tokens = model.generate(
            input_ids=ids,
            attention_mask=seen,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=list(ends),
            pad_token_id=0,
        )
    found = tokens[:, length:].tolist()
    stops = [next((i for i, t in enumerate(row) if t in ends), len(row)) for row in found]
    return [row[: stop + 1] for row, stop in zip(found, stops, strict=True)]


def newline(tokenizer) -> int:
    """The token that ends a line."""
    return tokenizer("\n", add_special_tokens=False)["input_ids"][-1]


def generate(
    model: nn.Module, config: RunConfig, prompts: Sequence[str], *, max_new_tokens: int
) -> list[str]:
    """Greedy answers to `prompts`, each up to its newline or to `max_new_tokens` tokens."""
    tokenizer = load_tokenizer(config.model)
    encoded, end = [encode_prompt(prompt, tokenizer) for prompt in prompts], newline(tokenizer)
    tokens = continuations(model, config, encoded, max_new_tokens=max_new_tokens, ends=[end])
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return [text.split("\n")[0] for text in texts]


def _generate_answers(model: nn.Module, config: RunConfig, rows: Sequence[dict]) -> list[str]:
    """Greedy answers to the rows' prompts, with room for the longest of their answers.

    That is seq_len / 2 tokens or as many as that answer has.  Its newline needs no room, for it is
    cut off, and so none is left: more would let a model that never ends its answers write more.
    """
    tokenizer = load_tokenizer(config.model)
    answers = tokenizer([row["answer"] for row in rows], add_special_tokens=False)["input_ids"]
    room = max(config.seq_len // 2, *map(len, answers))
    return generate(model, config, [row["prompt"] for row in rows], max_new_tokens=room)


def evaluate(model: nn.Module, config: RunConfig, split: str) -> dict:
    """Loss and metric of `model` on the first `eval_rows` rows of a split.

    Returns loss_nats (mean over answer tokens), score (mean over rows, 0 to 100) and the
    values of each row: nats, tokens, score.  A row's score is 100 or 0 for an exact answer,
    sentence chrF (sacrebleu) for a rewriting; only the first `generate_rows` rewritings of the
    test split are generated and scored (None otherwise).
    """
    from sacrebleu import sentence_chrf

    rows = load_split(config.task, split)[: config.eval_rows]
    with scoring(model):
        scores = score_rows(model, config, rows)
        scores["score"] = 100.0 * scores["right"]
        rewritings = [i for i, row in enumerate(rows) if row["metric"] == "chrf"]
        scores.loc[rewritings, "score"] = float("nan")
        picked = rewritings[: config.generate_rows] if split == "test" else []
        texts = _generate_answers(model, config, [rows[i] for i in picked]) if picked else []
    for i, text in zip(picked, texts, strict=True):
        scores.loc[i, "score"] = sentence_chrf(text.strip(), [rows[i]["answer"].strip()]).score
    scored = scores["score"].dropna()
    return {
        "loss_nats": _mean_nats(scores),
        "score": float(scored.mean()) if len(scored) else None,
        "row_nats": scores["nats"].round(5).tolist(),
        "row_tokens": scores["tokens"].tolist(),
        "row_score": [None if math.isnan(s) else round(s, 3) for s in scores["score"]],
    }
