"""Every notebook runs at the smoke profile, by the command that readers use."""

import json
import os
import subprocess

import pytest

from deltarank.runtime import ROOT

COMMITTED = [ROOT / "data", ROOT / "figures", ROOT / "notebooks"]


def committed_bytes():
    files = [path for folder in COMMITTED for path in folder.rglob("*") if path.is_file()]
    return {path: path.stat().st_mtime_ns for path in files}


def make_report(build, model=""):
    environment = os.environ | {"PROFILE": "smoke", "BUILD": str(build), "PROGRESS": "off"}
    environment |= {"MODEL": model}
    command = ["make", "-C", str(ROOT), "report"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


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


def test_the_whole_report_runs_on_a_model_of_another_family(qwen, tmp_path):
    before = committed_bytes()
    folder = tmp_path / "build" / "smoke-tiny-qwen3"
    assert f"Open {folder}" in make_report(tmp_path / "build", str(qwen))
    assert committed_bytes() == before
    records = [json.loads(path.read_text()) for path in folder.glob("data/runs/*/*/result.json")]
    assert len(records) > 50 and {record["config"]["model"] for record in records} == {str(qwen)}
    page = (folder / "html" / "04_truncate_updates.html").read_text()
    assert "are those of tiny-qwen3" in page and 'class="prose"' in page
