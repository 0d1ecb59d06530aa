"""Pairs to inspect: what is found of a run belongs to the profile that made it."""

import pandas as pd
import pytest

from deltarank.runtime import build_folder
from deltarank.study import pairs
from deltarank.study.pairs import RunPair
from deltarank.study.profiles import PROFILES


@pytest.mark.parametrize(
    "asked",
    [RunPair.compare, lambda pair: pair.extract({}), lambda pair: pair.score((1,), {})],
    ids=["compare", "extract", "score"],
)
def test_what_is_found_of_a_quick_run_is_stored_as_quick_while_paper_is_at_work(
    store, monkeypatch, asked
):
    for name in ("compare_checkpoints", "extract_adapter", "score_pair"):
        monkeypatch.setattr(pairs, name, lambda *args, **options: pd.DataFrame({"rank": [1]}))
    monkeypatch.setattr(pairs, "save_model", lambda config, folder, dtype: None)
    monkeypatch.setenv("PROFILE", "paper")
    asked(RunPair(PROFILES["quick"].config("facts")))
    [entry] = (build_folder() / "quick" / "data" / "tables").iterdir()
    assert entry.name.startswith("quick-facts-full-s0-")
