"""README's Python runs as it stands there and leaves the store alone; its times are the bench's."""

import dataclasses
import re

import pandas as pd
import pytest
from timing import PLAN_TIMES, REPORT_TIMES

from deltarank.runtime import ROOT, build_folder
from deltarank.store import load_entry
from deltarank.study.advice import FORECAST
from deltarank.study.models import TINY
from deltarank.study.pairs import PAIR_TIMES
from deltarank.study.profiles import PROFILES
from deltarank.study.runs import Result

README = (ROOT / "README.md").read_text(encoding="utf8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
WHOLE = [snippet for snippet in SNIPPETS if re.match("import|from", snippet)]


def files_of(folder):
    """Size and time of each file, by path."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


@pytest.fixture
def reader(store, save, monkeypatch, tmp_path):
    """A reader's shell: a pair of models in the folder, PROFILE not set; quick is tiny here."""
    save()  # base and tuned
    monkeypatch.chdir(tmp_path)
    sizes = {"model": TINY, "seq_len": 320, "steps": 2, "eval_rows": 4, "generate_rows": 1}
    monkeypatch.setitem(PROFILES, "quick", dataclasses.replace(PROFILES["quick"], **sizes))
    monkeypatch.delenv("PROFILE")


@pytest.mark.parametrize("snippet", WHOLE, ids=range(len(WHOLE)))
def test_a_snippet_runs_and_leaves_the_committed_results_alone(reader, snippet):
    before, names = files_of(ROOT / "data"), {}
    assert len(before) > 800
    exec(compile(snippet, "a snippet of README.md", "exec"), names)
    results = [value for value in names.values() if isinstance(value, Result)]
    assert all(result.status == "finished" for result in results)
    kept = {path.name for path in (build_folder() / "quick" / "data" / "runs").glob("*/*")}
    assert kept == {result.config.key for result in results}
    assert files_of(ROOT / "data") == before


def test_a_run_and_a_pair_are_among_the_snippets_and_all_are_python():
    assert [sum(word in s for s in WHOLE) for word in ("run(", "compare_checkpoints(")] == [1, 1]
    for snippet in SNIPPETS:
        compile(snippet, "a snippet of README.md", "exec")


def test_the_times_of_a_pair_are_those_of_the_bench():
    times = pd.read_csv(PAIR_TIMES)
    large = times[times["pair"].str.startswith("1.5 B parameters")]
    found = large.groupby("program")[["seconds", "GB"]].median()
    told = " ".join(README.split())
    assert {*large["threads"]} == {2} and "on two cores an adapter of rank 128" in told
    for name, program in {"took": "adapter", "mergekit-extract-lora": "mergekit"}.items():
        seconds, memory = found.loc[program]
        assert f"{name} {seconds:.0f} s and {memory:.1f} GB" in told
    inspected = f"`inspect` took {found.loc['spectra', 'seconds']:.0f} s for 1.5 B parameters"
    largest = times[times["pair"].str.startswith("3.2 B parameters")].groupby("program")
    ours, theirs = (largest[["seconds", "GB"]].median().loc[p] for p in ("spectra", "modeldelta"))
    told_of = [f"{inspected} and {ours['seconds']:.0f} s and {ours['GB']:.1f} GB for 3.2 B"]
    told_of.append(f"modeldelta {theirs['seconds']:.0f} s and {theirs['GB']:.1f} GB")
    assert [words for words in told_of if words not in told] == []


def test_what_the_report_takes_is_what_the_bench_measured():
    [took] = pd.read_csv(REPORT_TIMES).to_dict("records")
    cores = {2: "two"}[took["threads"]]
    told = f"On {cores} {took['device']} cores without a GPU `make report` took "
    told += f"{took['minutes']:.0f} minutes and {took['GB']:.1f} GB of memory"
    assert told in " ".join(README.split())


def test_what_plan_says_and_takes_is_what_the_bench_measured():
    [took] = pd.read_csv(PLAN_TIMES).to_dict("records")
    shown = f"$ deltarank plan data/tasks/entities.jsonl\n{took['said']}```"
    assert shown in README and took["threads"] == 2
    told = "On two cores, from an empty cache, this took "
    told += f"{took['minutes']} minutes and {took['GB']} GB"
    assert told in " ".join(README.split())
    record, _ = load_entry(ROOT / "data" / "tables" / "forecasts")
    sealed = dict(zip(record["columns"]["task"], record["columns"]["bits"], strict=True))[
        "entities"
    ]
    now = float(re.search(r"Forecast: ([\d,]+)", took["said"])[1].replace(",", ""))
    assert f"sealed as {sealed:,.0f}." in README and 0.9 < now / sealed < 1.1
    kbit = float(re.search(r"([\d.]+) kbit", took["said"])[1])
    assert FORECAST.size(kbit) == pytest.approx(now, rel=0.02)  # kbit are said to one digit
