"""Pairs to inspect: what is found of a run belongs to the profile that made it."""

from pathlib import Path

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
    monkeypatch.setattr(pairs, "save_model", lambda config, folder, dtype: folder.mkdir())
    monkeypatch.setenv("PROFILE", "paper")
    asked(RunPair(PROFILES["quick"].config("facts")))
    [entry] = (build_folder() / "quick" / "data" / "tables").iterdir()
    assert entry.name.startswith("quick-facts-full-s0-")


def test_a_folder_is_written_whole_or_not_at_all(store, monkeypatch):
    def interrupted(config, folder, dtype):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    pair = RunPair(PROFILES["quick"].config("pirate"))
    monkeypatch.setattr(pairs, "save_model", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pair.folders()
    monkeypatch.setattr(pairs, "save_model", lambda config, folder, dtype: folder.mkdir())
    assert all([*Path(folder).iterdir()] == [] for folder in pair.folders())
