"""Tables as LaTeX and the list of figures, from executed notebooks."""

import sys

import nbformat
import pandas as pd
import pytest

import utils

sys.path.insert(0, str(utils.ROOT / "notebooks" / "site"))
import export  # noqa: E402


def test_the_list_of_figures_is_that_of_the_committed_notebooks():
    committed = (utils.ROOT / "figures" / "README.md").read_text(encoding="utf8")
    assert export.figure_list(utils.ROOT / "notebooks") == committed
    files = {path.stem for path in (utils.ROOT / "figures").glob("*.pdf")}
    assert {line[3:] for line in committed.splitlines() if line.startswith("## ")} == files


def write_notebook(folder, table, heading="100 % of a_b"):
    notebook = nbformat.v4.new_notebook()
    output = nbformat.v4.new_output("display_data", data={"text/html": table.to_html()})
    notebook.cells = [
        nbformat.v4.new_markdown_cell(f"# Title\n\n## {heading}"),
        nbformat.v4.new_code_cell("table", outputs=[output]),
    ]
    nbformat.write(notebook, folder / "03_some.ipynb")


def test_a_table_becomes_latex_with_its_texts_as_shown(tmp_path):
    rows = {"r90_over_null": [0.1, 0.25], "kind": ["a & b", "50 %"]}
    table = pd.DataFrame(rows, index=pd.Index(["x_1", "σ²"], name="task"))
    write_notebook(tmp_path, table)
    export.write_tables(tmp_path, tmp_path / "out")
    assert (tmp_path / "out" / "03_1.tex").read_text().splitlines() == [
        r"\begin{table}",
        r"\centering",
        r"\caption{100 \% of a\_b}",
        r"\label{tab:03_1}",
        r"\begin{tabular}{lrl}",
        r"\toprule",
        r"task & r90\_over\_null & kind \\",
        r"\midrule",
        r"x\_1 & 0.10 & a \& b \\",
        r"$\sigma$$^2$ & 0.25 & 50 \% \\",
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]


def test_a_table_with_levels_keeps_every_cell_in_its_column(tmp_path):
    index = pd.MultiIndex.from_product([["a", "b"], [1, 8]], names=["task", "rank"])
    columns = pd.MultiIndex.from_product([["loss"], ["cut", "full"]])
    values = pd.DataFrame([[1, 2], [3, 4], [5, 6], [7, 8]], index=index, columns=columns)
    table = export.read_table(values.to_html())
    assert list(table.columns) == ["task", "rank", "loss cut", "loss full"]
    assert table.values.tolist() == [
        ["a", "1", "1", "2"],
        ["", "8", "3", "4"],
        ["b", "1", "5", "6"],
        ["", "8", "7", "8"],
    ]


def test_a_figure_without_a_caption_is_named(tmp_path):
    notebook = nbformat.v4.new_notebook()
    data = {"text/plain": "<03_lone>", "image/png": "x"}
    output = nbformat.v4.new_output("display_data", data=data)
    cell = nbformat.v4.new_code_cell("f", outputs=[output])
    notebook.cells = [cell, nbformat.v4.new_markdown_cell("No caption.")]
    nbformat.write(notebook, tmp_path / "03_some.ipynb")
    with pytest.raises(SystemExit, match="03_some.ipynb.*03_lone"):
        export.figure_list(tmp_path)
