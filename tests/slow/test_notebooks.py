"""Every notebook runs at the smoke profile, by the command that readers use."""

import json

import pytest
from reports import committed_bytes, make_report

from deltarank.runtime import ROOT


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    build, before = tmp_path_factory.mktemp("build"), committed_bytes()
    said = make_report(build)
    assert committed_bytes() == before, "only the paper profile writes to the repository"
    return build / "smoke", said


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=str)
def test_the_notebook_runs_without_errors_or_warnings(built, path):
    notebook = json.loads((built[0] / path.name).read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    said = ["".join(o["text"]) for o in outputs if o.get("name") == "stderr"]
    assert all("runs are stored; about" in text for text in said), said
    assert (built[0] / "html" / path.with_suffix(".html").name).exists()


def test_the_report_says_which_notebook_runs_and_what_to_open(built):
    folder, said = built
    count = len(list((ROOT / "notebooks").glob("*.ipynb")))
    assert f"notebook 1 of {count}: notebooks/01_build_tasks.ipynb" in said
    assert f"Open {folder / 'html' / '00_read_the_report.html'}" in said
    for path in (folder / "html").glob("*.html"):
        assert 'href="0' not in path.read_text() or '.ipynb"' not in path.read_text(), path


def test_every_figure_comes_with_its_data(built):
    kinds = {}
    for path in (built[0] / "figures").iterdir():
        assert path.stat().st_size > 0, path.name
        kinds.setdefault(path.stem, set()).add(path.suffix)
    figures = {stem: found - {".tex"} for stem, found in kinds.items()}  # a table is .tex alone
    assert sum(map(bool, figures.values())) >= 8
    whole = {".pdf", ".svg", ".png", ".csv"}
    assert {stem: found for stem, found in figures.items() if found and found != whole} == {}


def test_a_second_report_trains_nothing(built):
    runs = {p: p.stat().st_mtime_ns for p in (built[0] / "data").rglob("result.json")}
    figures = {p: p.read_bytes() for p in (built[0] / "figures").iterdir()}
    make_report(built[0].parent)
    assert {p: p.stat().st_mtime_ns for p in (built[0] / "data").rglob("result.json")} == runs
    assert {p: p.read_bytes() for p in (built[0] / "figures").iterdir()} == figures
