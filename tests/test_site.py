"""The report as a site, and the list of its figures, from executed notebooks."""

import runpy

import nbformat
import pytest
from bs4 import BeautifulSoup

import utils

SITE = utils.ROOT / "notebooks" / "site"
build = runpy.run_path(str(SITE / "build.py"))["build"]
figure_list = runpy.run_path(str(SITE / "list_figures.py"))["figure_list"]


def code_cell(source, output=None, *, tags=()):
    """An executed cell that shows `output`, {type: data}."""
    outputs = [nbformat.v4.new_output("display_data", data=output)] if output else []
    return nbformat.v4.new_code_cell(source, outputs=outputs, metadata={"tags": list(tags)})


def write_notebook(folder, *cells):
    title = nbformat.v4.new_markdown_cell("# 3 · Some title")
    notebook = nbformat.v4.new_notebook(cells=[title, *cells])
    nbformat.write(notebook, folder / "03_some.ipynb")


def test_the_list_of_figures_is_that_of_the_committed_notebooks():
    committed = (utils.ROOT / "figures" / "README.md").read_text(encoding="utf8")
    assert figure_list(utils.ROOT / "notebooks") == committed
    files = {path.stem for path in (utils.ROOT / "figures").glob("*.pdf")}
    assert {line[3:] for line in committed.splitlines() if line.startswith("## ")} == files


def test_a_figure_without_a_caption_is_named(tmp_path):
    figure = code_cell("f", {"text/plain": "<03_lone>", "image/png": "x"})
    write_notebook(tmp_path, figure, nbformat.v4.new_markdown_cell("No caption."))
    with pytest.raises(SystemExit, match="03_some.ipynb.*03_lone"):
        figure_list(tmp_path)


def test_claims_are_folded_under_the_count_of_their_lines_and_other_cells_are_not(tmp_path):
    three = {"a": (1.0, "1"), "b": (2.0, "2"), "c": (3.0, "3")}
    tables = {n: utils.assert_claims(dict([*three.items()][:n])).to_html() for n in (1, 3)}
    write_notebook(
        tmp_path,
        code_cell("utils.assert_claims(x)", {"text/html": tables[1]}, tags=["paper-only"]),
        code_cell("utils.assert_table(x)", {"text/html": tables[3]}, tags=["paper-only"]),
        code_cell("utils.assert_claims(untagged)", {"text/html": tables[3]}),
        code_cell("no_claims", {"text/html": tables[3]}, tags=["paper-only"]),
    )
    build(tmp_path, tmp_path, tmp_path / "out")
    page = BeautifulSoup((tmp_path / "out" / "03_some.html").read_text("utf8"), "html.parser")
    summaries = [fold.find("summary").get_text() for fold in page.select("details.claims")]
    assert summaries == ["1 line of numbers checked", "3 lines of numbers checked"]
    folded = [len(table.select("tbody tr")) for table in page.select("details.claims table")]
    assert folded == [1, 3]
    assert len(page.select("table")) == 4  # the two others are shown as they are
