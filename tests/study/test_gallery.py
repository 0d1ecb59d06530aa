"""The examples of the gallery are runs of the store, and what the tool writes of them now."""

import json
import runpy

import pytest
import torch

from deltarank.page import as_json, from_json
from deltarank.runtime import ROOT
from deltarank.study.profiles import PROFILES
from deltarank.study.runs import stored

SITE = ROOT / "notebooks" / "site"
EXAMPLES = runpy.run_path(str(SITE / "inspect_examples.py"))["EXAMPLES"]
TEXTS = {name: (ROOT / "data" / "gallery" / f"{name}.json").read_text("utf8") for name in EXAMPLES}
PROSE = (SITE / "gallery.md.j2").read_text("utf8")


def test_nothing_else_is_stored():
    files = {path.name for path in (ROOT / "data" / "gallery").iterdir()}
    assert files == {f"{name}.json" for name in EXAMPLES}
    assert max(map(len, TEXTS.values())) < 1e6


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_what_the_tool_writes_now(name):
    """Where only words changed: data/gallery/<name>.json becomes as_json(from_json(text))."""
    records = [json.loads(text) for text in (as_json(from_json(TEXTS[name])), TEXTS[name])]
    again, before = ([m.pop("energy_64") or 0 for m in record["matrices"]] for record in records)
    assert again == pytest.approx(before, abs=2e-6)  # it is of spectra, which have six digits
    assert records[0] == records[1]


@pytest.mark.parametrize("name", EXAMPLES)
def test_its_spectra_are_those_of_the_run(name):
    tuned, run, _ = EXAMPLES[name]
    found, result = from_json(TEXTS[name]), stored(run)
    spectra = dict(zip(found.table["name"], found.table["S"], strict=True))
    for matrix, S in result.spectra.items():
        torch.testing.assert_close(spectra[matrix], S, rtol=2e-5, atol=1e-6 * float(S[0]))
    assert found.tuned == tuned and found.base in (None, "gemma-3-270m")


def scores(*runs):
    return [f"{stored(run).score():.1f}" for run in runs]


def test_the_scores_that_the_gallery_names_are_those_of_the_store():
    mix, lora = EXAMPLES["mix"][1], EXAMPLES["lora"][1]
    words = " ".join(PROSE.split())
    lora, full, base = scores(lora, mix, PROFILES["paper"].config("production", "base"))
    assert f"scores {lora} on the mix, the full fine-tune {full}, the base {base} " in words
    found = from_json(TEXTS["facts"]).losses.set_index("rank")["score"].round(1)
    assert f"rank 16 the model recalls {found[16]} % of the facts, at rank 64 {found[64]}" in words
    assert [f"{found.iloc[-1]:.1f}"] == scores(EXAMPLES["facts"][1])
    assert f"uncut {found.iloc[-1]} %" in words


def test_the_update_of_the_mix_is_smaller_and_more_spread_out_and_none_is_near_rounding():
    facts, mix = (
        from_json(TEXTS[name]).by_module().set_index("label") for name in ("facts", "mix")
    )
    inner = facts["kind"] == "matrix"
    assert (mix["relative_size"] < facts["relative_size"])[inner].all()
    assert (mix["r90_over_null"] > facts["r90_over_null"])[inner].all()
    assert not mix["near_rounding"].any()
