"""Pairs to inspect: two folders of a reader's, or a run of the report; the same three questions."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from deltarank.adapters import extract_adapter
from deltarank.compare import compare_checkpoints
from deltarank.runtime import ROOT, at_profile, cache_folder
from deltarank.store import digest
from deltarank.study.configs import RunConfig
from deltarank.study.cuts import score_pair
from deltarank.study.profiles import base_of
from deltarank.study.runs import save_model
from deltarank.study.tables import keep_table

# Of `RECORD=yes make bench`, for notebook 14: what pairs take, what tools say of a planted rank.
PAIR_TIMES = ROOT / "data" / "bench_pairs.csv"
PLANTED_RANKS = ROOT / "data" / "bench_planted.csv"


@dataclass(frozen=True)
class FolderPair:
    """Two folders (or hub ids) of weights, and the task that cuts are scored on, if any."""

    base: str
    tuned: str
    task: str = ""
    out: str = "adapter"  # the folder for the adapter

    def compare(self) -> pd.DataFrame:
        """compare_checkpoints of the pair."""
        return compare_checkpoints(self.base, self.tuned)

    def extract(self, ranks: dict) -> pd.DataFrame:
        """extract_adapter of the pair, by what recommend_ranks returned."""
        return extract_adapter(self.base, self.tuned, self.out, ranks=ranks)

    def score(self, ranks: tuple[int, ...], by_matrix: dict[str, int]) -> pd.DataFrame:
        """What the task loses, a line a model as score_pair has it; none without a task."""
        if not self.task:
            return pd.DataFrame(columns=["model", "rank", "loss_nats", "score"])
        return score_pair(self.base, self.tuned, self.task, ranks, by_matrix=by_matrix)


@dataclass(frozen=True)
class RunPair:
    """A full run of the report beside its base model; what is found of it is stored."""

    config: RunConfig
    dtype: str = "float32"  # in which the tuned model is saved

    def folders(self) -> tuple[str, str]:
        """Base and tuned model as folders in the cache, written when they are missing."""
        kinds = {base_of(self.config): "float32", self.config: self.dtype}
        places = {c: cache_folder() / "checkpoints" / f"{c.key}-{d}" for c, d in kinds.items()}
        for config, folder in places.items():
            if not folder.exists():
                folder.parent.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
                    save_model(config, Path(scratch) / "whole", dtype=kinds[config])
                    (Path(scratch) / "whole").rename(folder)
        base, tuned = map(str, places.values())
        return base, tuned

    def compare(self) -> pd.DataFrame:
        """compare_checkpoints of the pair."""
        name = f"{self.config.key}-{self.dtype}"
        return self._kept(name, lambda: compare_checkpoints(*self.folders()))

    def extract(self, ranks: dict) -> pd.DataFrame:
        """extract_adapter of the pair in PEFT's richer form, by what recommend_ranks returned."""
        name = f"{self.config.key}-adapter-{digest(ranks)[:12]}"
        out = str(cache_folder() / "adapters" / name)

        def extracted() -> pd.DataFrame:
            return extract_adapter(*self.folders(), out, ranks=ranks, patterns=True, norms=True)

        return self._kept(name, extracted)

    def score(self, ranks: tuple[int, ...], by_matrix: dict[str, int]) -> pd.DataFrame:
        """What the task loses on the run's held-out rows, a line a model as score_pair has it."""
        asked = digest({"ranks": ranks, "by_matrix": by_matrix})[:12]
        name, task = f"{self.config.key}-{self.dtype}-scores-{asked}", self.config.task

        def scored() -> pd.DataFrame:
            base, tuned = self.folders()
            rows = self.config.eval_rows
            return score_pair(base, tuned, task, ranks, by_matrix=by_matrix, eval_rows=rows)

        return self._kept(name, scored)

    def _kept(self, name: str, compute: Callable[[], pd.DataFrame]) -> pd.DataFrame:
        """keep_table in the store of the profile that made the run."""
        with at_profile(self.config.profile):
            return keep_table(name, compute)
