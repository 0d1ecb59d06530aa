"""Capacity: how many bits of codes a number of trained parameters learns, measured and stored."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deltarank.runtime import product_dtype
from deltarank.store import cached
from deltarank.study.code_runs import CodeRun, code_model
from deltarank.study.codes import code_scores, digit_tokens, draw_codes, encode_codes
from deltarank.study.measuring import provenance
from deltarank.study.memorizing import memorize
from deltarank.study.models import load_tokenizer
from deltarank.study.profiles import profile
from deltarank.study.runs import in_parallel
from deltarank.study.training import compile_layers
from deltarank.study.upper import Upper, decoder_layers, upper_part

CONTROL = 256  # codes, at most, of which each is asked for with the digits of another


@dataclass(frozen=True)
class CodeResult:
    """A stored code run: its configuration and what was measured."""

    config: CodeRun
    record: dict

    @property
    def status(self) -> str:
        """ "finished" or "diverged"."""
        return self.record["status"]

    @property
    def parameters(self) -> int:
        """How many numbers were trained."""
        return self.record["parameters"]

    def curve(self, name: str) -> np.ndarray:
        """step, learned_bits, recall or digits_right of every note, in the order of steps."""
        return np.array(self.record["curve"][name])

    @property
    def passes(self) -> np.ndarray:
        """How often all codes were trained on by every note: a step takes a batch, or all."""
        of_a_step = min(self.config.batch_size / self.config.codes, 1.0)
        return self.curve("step") * of_a_step

    def last(self, name: str) -> float:
        """learned_bits, recall or digits_right at the end; NaN for a diverged run."""
        return float(self.curve(name)[-1]) if self.status == "finished" else float("nan")

    def passes_until(self, share: float) -> float:
        """The passes over all codes after which `share` of what is learned at the end was learned.

        Read off linearly between two notes; NaN where nothing was learned.
        """
        bits = self.curve("learned_bits")
        wanted = share * self.last("learned_bits")
        if not wanted > 0:
            return float("nan")
        after = int(np.argmax(bits >= wanted))
        part = slice(max(after - 1, 0), after + 1)
        return float(np.interp(wanted, bits[part], self.passes[part]))


def code_folder(config: CodeRun) -> Path:
    """Where a run is stored, by the profile that made it."""
    return profile(config.profile).store / "capacity" / config.key


def code_run(config: CodeRun) -> CodeResult:
    """The result of `config`: loaded when it is stored, otherwise trained, scored and stored."""
    record, _ = cached(code_folder(config), lambda: (measure_codes(config), None))
    return CodeResult(config, record)


def code_sweep(configs: Sequence[CodeRun]) -> list[CodeResult]:
    """The results of `configs`, in order; through joblib, each stored as soon as it is measured."""
    return in_parallel(code_run, configs)


def measure_codes(config: CodeRun) -> dict:
    """Train and score one run; its record.

    learned_bits are of the ten digits alone (see code_scores): who is sent the codes knows that
    digits come, and whether the model knows it too is no information on the codes.  Over the whole
    vocabulary the base model would start with less than nothing, and learn first that digits come.
    shuffled: the scores at the end when codes are asked for with the digits of others, which is
    chance, below 0 bits, unless the digits leak.
    """
    started = time.perf_counter()
    both = code_upper(config)
    if profile(config.profile).compile:
        compile_layers(decoder_layers(both.model)[config.layers[0] :])
    codes, others = both.of(slice(config.codes)), both.of(slice(config.codes, None))
    clock = time.perf_counter()
    learned = memorize(config, codes, label=config.key)
    train_seconds = time.perf_counter() - clock
    shuffled = {} if learned.diverged else code_scores(*others.scores())
    return {
        "config": config.recipe,
        "identity": config.identity,
        "status": "diverged" if learned.diverged else "finished",
        "parameters": sum(p.numel() for p in both.model.parameters() if p.requires_grad),
        "bits": round(config.bits, 3),
        "plateau": learned.plateau,
        "curve": {n: [round(x, 5) for x in learned.curve(n)] for n in learned.notes[0]},
        "shuffled": {name: round(value, 5) for name, value in shuffled.items()},
        "provenance": provenance(time.perf_counter() - started)
        | {"train_seconds": round(train_seconds, 1)},
    }


def code_upper(config: CodeRun) -> Upper:
    """The upper part of a run's model with its codes, and after them the shuffled ones."""
    rows = draw_codes(config.codes, config.digits, config.seed)
    tokenizer = load_tokenizer(config.model)
    answers = [row["answer"] for row in rows]
    shuffled = [
        row | {"answer": answer}
        for row, answer in zip(rows[:CONTROL], answers[1:] + answers[:1], strict=False)
    ]
    batch, digits = encode_codes(rows + shuffled, tokenizer)
    return upper_part(
        code_model(config),
        config.layers[0],
        batch,
        ids=digit_tokens(tokenizer),
        targets=digits,
        dtype=product_dtype(config.dtype),
        label=f"{config.key}: states",
    )
