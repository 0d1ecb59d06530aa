"""Shares of a fine-tune's gain: kept by a cut, reached by a LoRA, regained on the way."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import TypeVar

import numpy as np
import pandas as pd

from deltarank.checks import require, require_share
from deltarank.spectra import common_energy, rank_measures
from deltarank.study.configs import GROWTH_ROWS, RunConfig
from deltarank.study.models import load_tokenizer
from deltarank.study.profiles import base_of
from deltarank.study.runs import Result, run
from deltarank.study.search import full_of
from deltarank.study.tasks import answer_tokens, encode, load_split, task_sha256

Measured = TypeVar("Measured", float, pd.Series)  # one number, or one a rank


def gain_kept(value: Measured, base: float, full: float) -> Measured:
    """How far `value` goes from the base model's towards the full fine-tune's; NaN without a gain.

    >>> gain_kept(2.0, base=5.0, full=1.0)
    0.75
    """
    return (value - base) / (full - base if full != base else float("nan"))


def ends(config: RunConfig) -> tuple[Result, Result]:
    """Base model and full_of, between which the gain of a run is measured."""
    return run(base_of(config)), run(full_of(config))


def gain(result: Result) -> float:
    """The share of its full fine-tune's loss gain that a run reaches on test rows."""
    base, full = ends(result.config)
    return gain_kept(result.loss(), base.loss(), full.loss())


def needed_rank(kept: pd.Series, share: float) -> float:
    """The rank from which on `kept`, a share of the gain by ascending rank, is `share` or more.

    Read off between two ranks of the grid, linearly over log r; inf where the last falls short.

    >>> needed_rank(pd.Series({1: 0.0, 4: 1.0, 16: 1.0}), 0.5)
    2.0
    """
    low, high = needed_bracket(kept, share)
    if low < 1 or math.isinf(high) or math.isnan(kept[low]):
        return high
    part = (share - kept[low]) / (kept[high] - kept[low])
    return float(low * (high / low) ** part)


def needed_bracket(kept: pd.Series, share: float) -> tuple[float, float]:
    """The ranks between which needed_rank lies: the last that falls short, and the one after it.

    The first is 0 where no rank falls short, the second inf where the last one does.  Raises
    ValueError for a share that is not above 0 and at most 1.

    >>> needed_bracket(pd.Series({1: 0.2, 8: 0.9, 64: 1.0}), 0.95)
    (8.0, 64.0)
    """
    require_share(share)
    low = max(kept.index[~(kept >= share)], default=0)
    return float(low), float(min(kept.index[kept.index > low], default=math.inf))


def bracket_text(low: float, high: float) -> str:
    """A needed_bracket as text: "8 to 64", "> 64", and "2" where 1 falls short and 2 does not.

    >>> bracket_text(8, 64)
    '8 to 64'
    """
    if math.isinf(high):
        return f"> {low:,.0f}"
    return f"{high:,.0f}" if high - low <= 1 else f"{max(low, 1):,.0f} to {high:,.0f}"


def median_bracket(kept: Iterable[pd.Series], share: float) -> str:
    """The needed_bracket of several seeds as text: the medians of its lower and its upper ends.

    >>> median_bracket([pd.Series({1: kept, 8: 1.0}) for kept in (0.8, 0.9, 1.0)], 0.95)
    '1 to 8'
    """
    return bracket_text(*np.median([needed_bracket(seed, share) for seed in kept], axis=0))


def at_gain(result: Result, base: Result, share: float) -> dict[str, float]:
    """Where a full run had first regained `share` of its fall in loss, as at_loss has it.

    A share that the first note exceeds gives that note.  The runs must have scored as many rows
    (eval_rows).  Raises ValueError for a share that is not above 0 and at most 1.
    """
    require_share(share)
    start, end = map(growth_loss, (base, result))
    return at_loss(result, end + (1 - share) * (start - end))


def at_loss(result: Result, nats: float) -> dict[str, float]:
    """Where the loss of a full run had first fallen to `nats`: step, loss_nats, rank_measures.

    From its notes on the way, with the loss of GROWTH_ROWS rows of "valid", linearly between the
    last that lies above and the first that does not; medians over the matrices.  Raises ValueError
    for a loss below the run's last.
    """
    last: dict = {"step": result.config.steps, "loss_nats": growth_loss(result)}
    last |= pd.DataFrame(rank_measures(S) for S in result.spectra.values()).to_dict("list")
    notes = [
        {name: float(np.median(values)) for name, values in note.items()}
        for note in [*result.record["growth"], last]
    ]
    low = [i for i, note in enumerate(notes) if note["loss_nats"] <= nats]
    require(bool(low), f"{result.config.key} never comes down to {nats:g} nats")
    before, after = notes[max(low[0] - 1, 0)], notes[low[0]]
    fall = after["loss_nats"] - before["loss_nats"]
    way = (nats - before["loss_nats"]) / fall if low[0] else 0.0
    return {name: before[name] + way * (after[name] - before[name]) for name in after}


def growth_loss(result: Result) -> float:
    """The loss of the rows that notes on the way are of, in nats a token."""
    scores = result.record["evaluation"]["valid"]
    nats, tokens = (sum(scores[f"row_{what}"][:GROWTH_ROWS]) for what in ("nats", "tokens"))
    return nats / tokens


def first_epoch_kbit(result: Result) -> float:
    """The prequential code length of a run's rows, in kbit: what they hold beyond the base at most.

    Over its first epoch a run sees each row once, and its loss before it learns from a batch is
    what the batch costs to send to who has learned the batches before (Dawid 1984; Voita and Titov
    2020, arXiv 2003.12298).  Batches have the mean number of answer tokens.  A run of less than an
    epoch gives the code length of the rows that it saw.
    """
    steps = epoch_rows(result) // result.config.batch_size
    return _kbit(sum(result.record["train_loss_nats"][:steps]) * _batch_tokens(result))


def learned_kbit(result: Result) -> float:
    """The bits that training put into the model over its first epoch, in kbit.

    The code length of the first epoch less what the trained model still loses on as many held-out
    tokens (split "test"): the surplus that is no noise of the answers (Whitney et al. 2020, arXiv
    2009.07368).
    """
    batches = epoch_rows(result) / result.config.batch_size
    return first_epoch_kbit(result) - _kbit(result.loss() * batches * _batch_tokens(result))


def taught_kbit(result: Result, rows: int) -> float:
    """learned_kbit of as many training rows as there are, also of those that a run did not come to.

    Each of these teaches what one of the last quarter of the first epoch did: its loss before it is
    learned from, above that of held-out rows after training, if it is above.  So many rows of a
    rule that is learned by then teach no more than few, and as many facts teach so much more.
    """
    seen, losses = epoch_rows(result), result.record["train_loss_nats"]
    batches = seen // result.config.batch_size
    last = losses[batches - max(batches // 4, 1) : batches]
    nats = max(sum(last) / len(last) - result.loss(), 0.0)
    a_row = _kbit(nats * _batch_tokens(result)) / result.config.batch_size
    return learned_kbit(result) + max(rows - seen, 0) * a_row


def epoch_rows(result: Result) -> int:
    """The rows that a run saw in its first epoch, whole batches, as far as it went."""
    config, (rows, _) = result.config, _rows_and_tokens(result)
    return config.batch_size * min(rows // config.batch_size, config.steps)


def _batch_tokens(result: Result) -> float:
    """The mean number of answer tokens of a batch of a run."""
    rows, tokens = _rows_and_tokens(result)
    return result.config.batch_size * tokens / rows


def _rows_and_tokens(result: Result) -> tuple[int, int]:
    """The numbers of a run's training rows and of the answer tokens in them."""
    config = result.config
    return _counted(config.task, config.model, config.seq_len, task_sha256(config.task))


@functools.lru_cache(maxsize=64)
def _counted(task: str, model: str, seq_len: int, sha256: str) -> tuple[int, int]:
    """_rows_and_tokens of a task whose file has this sha256."""
    rows, tokenizer = load_split(task, "train"), load_tokenizer(model)
    return len(rows), sum(answer_tokens(encode(row, tokenizer, seq_len)) for row in rows)


def _kbit(nats: float) -> float:
    return nats / math.log(2) / 1000


def captured_energy(result: Result, ranks: int | dict[str, int]) -> float:
    """Share of the squared update of all matrices together that their cut keeps.

    ranks: one for all, or that of each matrix by name.
    """
    S = result.spectra
    return common_energy(S.values(), [ranks[n] for n in S] if isinstance(ranks, dict) else ranks)
