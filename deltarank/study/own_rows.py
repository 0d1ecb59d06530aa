"""Own rows: the bits that a reader's training rows hold, by a short training of a model."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from deltarank.checkpoints import layer_and_module
from deltarank.checks import require, require_disk, require_rows
from deltarank.runtime import cache_folder
from deltarank.store import cached, file_sha256, replace_text
from deltarank.study.configs import RunConfig
from deltarank.study.evaluation import mean_loss
from deltarank.study.gains import epoch_rows, first_epoch_kbit, learned_kbit, taught_kbit
from deltarank.study.losses import CHUNK
from deltarank.study.measuring import provenance
from deltarank.study.models import (
    load_tokenizer,
    matrices,
    require_memory,
    require_short,
    skeleton,
)
from deltarank.study.profiles import Profile
from deltarank.study.rivals import probe
from deltarank.study.runs import Result
from deltarank.study.tasks import answer_tokens, encode, load_split, load_task
from deltarank.study.training import prepare, train

HELD_OUT = 128  # rows at most, and an eighth of those given where they name no split "test"
TOKENS = ["prompt_tokens", "answer_tokens"]


@dataclass(frozen=True)
class Holding:
    """What rows hold: kbit of code length and of what was learned; by_kind, rows and tokens.

    code_kbit and learned_kbit are of the `seen` rows that the training's first epoch saw, all_kbit,
    what is taught, and by_kind of all rows to train on, those held out among them.
    """

    seen: int
    code_kbit: float
    learned_kbit: float
    all_kbit: float
    by_kind: pd.DataFrame  # one line a kind; rows, prompt_tokens, answer_tokens

    @property
    def rows(self) -> int:
        """How many rows there are to train on."""
        return int(self.by_kind["rows"].sum())


def holding(file: str, sizes: Profile) -> Holding:
    """What the rows of a JSON-lines file hold beyond the model of `sizes`.

    Each line has prompt and answer, and may name its kind ("kind") and its split: those to train on
    are the rows of "train", or all but those of "test" where there is none.  Of "test", or else of
    the rows to train on, some are held out.  A LoRA is trained on the others as rivals.probe says,
    and what was measured is kept in the cache.  Raises ValueError, before any work, for a file
    without prompts and answers, with too few rows, or with one that is too long; and for a training
    that diverged.
    """
    config, counted = own_probe(file, sizes)
    result = _probed(config)
    bits = first_epoch_kbit(result), learned_kbit(result), taught_kbit(result, len(counted))
    by_kind = counted.assign(rows=1).groupby("kind").sum()
    return Holding(epoch_rows(result), *bits, by_kind[["rows", *TOKENS]])


def own_probe(file: str, sizes: Profile) -> tuple[RunConfig, pd.DataFrame]:
    """The run that tells the bits of a file's rows, and count_tokens of those to train on.

    Writes the split that the run is trained on.  Raises ValueError as `holding` does.
    """
    require_rows(file, "a prompt and an answer")
    told = probe(file, sizes)
    model = told.model
    rows, to_train = _split_rows(file, told.batch_size)
    counted = count_tokens(rows, model)
    lengths = counted[TOKENS].sum(axis=1)
    require_short(model, lengths.tolist(), [row["prompt"] for row in rows])
    answers = min(CHUNK, told.batch_size * int(counted["answer_tokens"].max()))
    require_memory(model, answers=answers, cure="name a smaller one with --model")
    task, modules = _written(file, rows), adaptable_modules(model, told.rank)
    seq_len = int(lengths.max())
    config = dataclasses.replace(told, task=task, modules=modules, seq_len=seq_len)
    return config, counted[:to_train]


def adaptable_modules(model: str, rank: int) -> tuple[str, ...]:
    """The modules of a model that a LoRA of this rank is put on; none are named where all are.

    Left out are those of a few rows, as the gate of a shared expert has.
    """
    sides = [(layer_and_module(n)[1], min(W.shape)) for n, W in matrices(skeleton(model)).items()]
    small = {module for module, side in sides if side < rank}
    return tuple(sorted({module for module, _ in sides} - small)) if small else ()


def _warn_of_known(name: str, rows: list[dict], held: list[dict]) -> None:
    """Warn of rows that are held out and trained on, too: they tell what is known by heart."""
    known = {(row["prompt"], row["answer"]) for row in rows}
    count = sum((row["prompt"], row["answer"]) in known for row in held)
    if count:
        told = f"{count} of the {len(held)} rows held out of {name} are trained on, too"
        warnings.warn(f"{told}: the bits learned are what is known by heart", stacklevel=2)


def _split_rows(file: str, batch_size: int) -> tuple[list[dict], int]:
    """The rows of a file, each with its split, "train" before "test", and how many are to train on.

    Those held out of the rows to train on are among these.
    """
    given, rng = load_task(file, unnamed="train"), random.Random(0)
    held = given.pop("test", []) if len(given) > 1 else []
    rows = given.get("train") or [row for split in given.values() for row in split]
    to_train = len(rows)
    rng.shuffle(held)
    if not held:
        rng.shuffle(rows)
        count = min(HELD_OUT, len(rows) // 8)
        held, rows = rows[:count], rows[count:]
    require(
        len(rows) >= batch_size and bool(held),
        f"{Path(file).name} has {to_train} rows to train on: give {2 * batch_size} or more",
    )
    if len(held) < batch_size:
        told = f"only {len(held)} rows of {Path(file).name} are held out"
        warnings.warn(f"{told}: what is said of bits hangs on them", stacklevel=2)
    _warn_of_known(Path(file).name, rows, held[:HELD_OUT])
    named = (rows, "train"), (held[:HELD_OUT], "test")
    return [row | {"split": split} for part, split in named for row in part], to_train


def _written(file: str, rows: list[dict]) -> str:
    """The file in the cache with these rows of another, whose name it keeps."""
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    folder = cache_folder() / "plans" / file_sha256(Path(file).expanduser())[:12]
    require_disk(folder, 0.1)
    path = folder / Path(file).name
    replace_text(path, lines)
    return str(path)


def count_tokens(rows: list[dict], model: str) -> pd.DataFrame:
    """The tokens of each row, by a model's tokenizer: kind, prompt_tokens, answer_tokens.

    A row's kind is what it names in "kind", or else in "task"; those that name none are "rows".
    """
    tokenizer, counts = load_tokenizer(model), []
    for row in rows:
        encoded = encode(row, tokenizer)
        answer = answer_tokens(encoded)
        kind = str(row.get("kind") or row.get("task") or "rows")
        counts.append((kind, len(encoded["labels"]) - answer, answer))
    return pd.DataFrame(counts, columns=["kind", *TOKENS])


def _probed(config: RunConfig) -> Result:
    """The losses of the probe, of its steps and of what is held out; from the cache if there."""

    def measured() -> tuple[dict, None]:
        start, model = time.perf_counter(), prepare(config)
        losses = train(config, model, label="bits")
        told = f"training diverged at step {len(losses)}: do the answers fit their prompts?"
        require(math.isfinite(losses[-1]), told)
        left = mean_loss(model, config, load_split(config.task, "test"))
        require(math.isfinite(left), told)
        record = {"train_loss_nats": losses, "evaluation": {"test": {"loss_nats": left}}}
        return record | {"provenance": provenance(time.perf_counter() - start)}, None

    record, _ = cached(cache_folder() / "plans" / config.key, measured)
    return Result(config, record)
