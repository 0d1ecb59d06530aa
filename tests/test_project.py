"""The project's own files: one list of requirements, notebooks without this machine's paths."""

import json
import re

import pytest
import yaml

import utils

NOTEBOOKS = sorted((utils.ROOT / "notebooks").glob("*.ipynb"))


def requirement_lines():
    lines = (utils.ROOT / "requirements.txt").read_text().splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def test_environment_yml_lists_python_pip_and_the_requirements_only():
    listed = yaml.safe_load((utils.ROOT / "environment.yml").read_text())["dependencies"]
    names = [re.match(r"\w+", line)[0] for line in listed if isinstance(line, str)]
    assert names == ["python", "pip"]
    assert [line for line in listed if not isinstance(line, str)] == [
        {"pip": ["-r requirements.txt"]}
    ]


def test_every_requirement_says_where_it_is_used():
    lines = requirement_lines()
    assert lines
    assert [line for line in lines if not re.search(r"\s# *\w", line)] == []


def test_every_requirement_has_a_version_and_none_is_local():
    for line in requirement_lines():
        requirement = line.partition("#")[0]
        assert re.search(r"[=<>~]=?\s*\d", requirement), line
        assert "+cpu" not in requirement


def test_there_are_notebooks_in_the_order_of_their_numbers():
    numbers = [path.name[:2] for path in NOTEBOOKS]
    assert numbers == sorted(set(numbers)) and numbers[:6] == [f"{i:02d}" for i in range(6)]
    assert numbers


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_names_no_absolute_path(path):
    notebook = json.loads(path.read_text(encoding="utf8"))
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            for kind in [k for k in output.get("data", {}) if k.startswith("image/")]:
                del output["data"][kind]
        absolute = r"(?<![\w./:<])/(?:home|root|work|tmp|Users|usr|opt|mnt|var)/|\b[A-Z]:\\\\"
        assert re.findall(absolute, json.dumps(cell)) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_under_one_megabyte(path):
    assert path.stat().st_size < 1e6


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_as_it_ran_in_cells_that_can_be_read(path):
    notebook = json.loads(path.read_text(encoding="utf8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    lines = ["".join(cell["source"]).splitlines() for cell in code]
    assert max(sum(map(bool, map(str.strip, cell))) for cell in lines) <= 25
    kinds = "".join(cell["cell_type"][0] for cell in notebook["cells"])
    assert "cccc" not in kinds, "four cells of code without a word between them"
    bars = [o for cell in code for o in cell["outputs"] if "widget" in " ".join(o.get("data", {}))]
    assert bars == [] and "widgets" not in notebook["metadata"]
