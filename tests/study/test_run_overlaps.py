"""Overlaps of runs: with themselves, another seed, a LoRA; stored."""

import dataclasses
import shutil

import pytest

from deltarank.spectra import subspace_overlap
from deltarank.study import overlaps
from deltarank.study.measuring import delta_file
from deltarank.study.profiles import profile
from deltarank.study.runs import run, stored, updates


def test_overlaps_of_a_run_with_itself_and_with_another_seed(config, monkeypatch):
    both = [config, dataclasses.replace(config, seed=1)]
    for each in both:
        run(each)
    same, other = overlaps.overlaps(config, config), overlaps.overlaps(*both)
    assert same["left"].tolist() == pytest.approx([1.0] * len(same), abs=1e-4)
    assert (other["left"] < 0.999).mean() > 0.5
    assert set(other["name"]) == set(stored(config).matrices)
    overlaps._leading_subspaces.cache_clear()
    monkeypatch.setattr(overlaps, "updates", lambda run: pytest.fail("computed again"))
    assert overlaps.overlaps(*both).equals(other)


def test_overlaps_with_lora_hold_all_its_directions_and_survive_a_lost_cache(config):
    lora = profile().config("sentiment", "lora", rank=4, steps=2, eval_rows=4)
    run(config), run(lora)
    with_full, with_itself = overlaps.overlaps(lora, config), overlaps.overlaps(lora, lora)
    assert with_full["rank"].max() > 4 == with_itself["rank"].max()
    assert with_itself["right"].tolist() == pytest.approx([1.0] * len(with_itself), abs=1e-4)
    for each in (config, lora):
        delta_file(each).unlink()
    shutil.rmtree(profile().store / "overlaps")
    overlaps._leading_subspaces.cache_clear()
    assert overlaps.overlaps(lora, config).equals(with_full)


def test_overlaps_are_of_the_matrices_that_both_runs_changed(config):
    sparse = profile().config("sentiment", "lora", rank=1, layers=(1,), steps=2, eval_rows=4)
    full_first, sparse_first = overlaps.overlaps(config, sparse), overlaps.overlaps(sparse, config)
    for table in (full_first, sparse_first):
        assert set(table["name"]) == set(run(sparse).matrices)
    one, other = (updates(each)[table["name"][0]] for each in (config, sparse))
    assert table["left"][0] == pytest.approx(subspace_overlap(one, other, 1), abs=1e-4)


def test_an_overlap_is_stored_with_the_first_of_its_runs(config):
    lora = profile().config("facts", "lora", rank=4, steps=2, eval_rows=4)
    run(config), run(lora)
    overlaps.overlaps(lora, config)
    (folder,) = (profile().store / "overlaps").glob("*/*")
    assert folder.parent.name == "facts"
    assert folder.name == f"{lora.key}--{config.key}"
