"""Exported figures and tables: stable bytes, sizes, fonts, alt text; what LaTeX shows."""

import math
import re
import struct
import subprocess
import sys

import matplotlib as mpl
import pandas as pd
import pytest
from matplotlib import pyplot

from deltarank.runtime import ROOT, build_folder
from deltarank.study.figures import (
    VENUE_WIDTHS,
    figure_width,
    label_points,
    plot_by_task,
    plot_seeds,
    save_figure,
    save_table,
    set_style,
)
from deltarank.study.profiles import profile

WIDTHS = {"default": 5.5, "neurips": 5.5, "icml": 6.75, "acl": 6.3, "nature": 7.2}  # inches
KINDS = ["csv", "pdf", "png", "svg"]


@pytest.fixture(autouse=True)
def backend(store):
    mpl.use("Agg")
    yield
    pyplot.close("all")
    mpl.rcdefaults()


def save(name="01_line", alt="A rising line.", venue="neurips"):
    """Export a small figure; return its files by kind."""
    set_style(venue)
    fig, ax = pyplot.subplots()
    ax.plot([0, 1], [0.1, 2 / 3], label="energy")
    ax.set_xlabel(r"rank $r$")
    ax.legend()
    save_figure(fig, name, data=pd.DataFrame({"x": [0, 1], "y": [0.1, 2 / 3]}), alt=alt)
    paths = profile().figures.glob(f"{name}.*")
    return {path.suffix[1:]: path.read_bytes() for path in paths}


def test_a_figure_is_written_in_four_kinds_with_the_same_bytes_again(monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1")  # matplotlib takes "now" from here
    first = save()
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1000000000")
    second = save()
    assert sorted(first) == KINDS
    assert [kind for kind in KINDS if first[kind] != second[kind]] == []


def test_a_figure_is_what_its_kind_says():
    files = save()
    assert files["pdf"].startswith(b"%PDF")
    assert files["png"].startswith(b"\x89PNG")
    assert b"<svg" in files["svg"]
    assert files["csv"] == b"x,y\n0,0.1\n1,0.666667\n"


@pytest.mark.parametrize("alt", ["", "  \n"])
def test_a_figure_without_alt_text_is_refused_by_name_and_not_written(alt):
    with pytest.raises(ValueError, match="01_line.*alt"):
        save(alt=alt)
    assert not profile().figures.exists()


def test_the_alt_text_reaches_the_notebook(monkeypatch):
    import IPython.display

    shown = []
    monkeypatch.setattr(IPython.display, "display", lambda *a, **k: shown.append((a, k)))
    save(alt="A rising line.")
    ((data,), options) = shown[0]
    assert data["image/png"].startswith(b"\x89PNG")
    assert options["metadata"] == {"image/png": {"alt": "A rising line."}}


def test_fonts_are_embedded_as_outlines_that_venues_accept():
    pdf = save()["pdf"]
    assert b"/Type3" not in pdf
    assert b"/FontFile2" in pdf


@pytest.mark.parametrize("venue", VENUE_WIDTHS)
def test_a_figure_is_as_wide_as_the_page_of_its_venue(venue):
    files = save(venue=venue)
    box = re.search(rb"/MediaBox \[ ?0 0 ([\d.]+)", files["pdf"])
    assert float(box.group(1)) / 72 == pytest.approx(WIDTHS[venue], abs=0.01)
    assert struct.unpack(">I", files["png"][16:20])[0] == pytest.approx(WIDTHS[venue] * 300, abs=1)


def test_a_venue_in_the_environment_sets_width_and_folder(monkeypatch):
    monkeypatch.setenv("VENUE", "icml")
    set_style()
    assert figure_width() == WIDTHS["icml"]
    assert profile().figures == build_folder() / "figures" / "icml"


def test_no_figure_stays_open():
    save()
    assert pyplot.get_fignums() == []


def test_an_unknown_venue_lists_the_known_ones():
    with pytest.raises(ValueError, match="poster.*neurips.*icml.*acl.*nature"):
        set_style("poster")


def test_the_style_replaces_what_was_set_before():
    mpl.rcParams["lines.linewidth"] = 9
    mpl.rcParams["axes.facecolor"] = "black"
    set_style()
    assert mpl.rcParams["lines.linewidth"] < 2
    assert mpl.rcParams["axes.facecolor"] == "white"


@pytest.mark.slow
def test_importing_utils_changes_no_style_and_no_warning():
    code = """
import matplotlib, numpy, pandas, torch, warnings  # which change some themselves
before = dict(matplotlib.rcParams), list(warnings.filters)
import utils
assert (dict(matplotlib.rcParams), list(warnings.filters)) == before
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_line_a_task_is_named_at_its_end_and_names_do_not_overlap():
    fig, ax = pyplot.subplots()
    lines = pd.DataFrame({"facts": [0.0, 0.50], "code": [0.1, 0.51], "kjv": [0.2, 0.9]}, [1, 64])
    plot_by_task(ax, lines)
    assert [list(line.get_ydata()) for line in ax.lines] == lines.T.values.tolist()
    assert [(text.get_text(), text.xy) for text in ax.texts] == [
        ("facts", (64, 0.50)),
        ("code", (64, 0.51)),
        ("King James", (64, 0.9)),
    ]
    heights = [text.xyann[1] for text in ax.texts]
    assert min(b - a for a, b in zip(heights, heights[1:], strict=False)) >= 0.045 - 1e-9
    assert len({line.get_color() for line in ax.lines}) == 3


def latex_of(table, **options):
    """The lines that save_table writes, and the table that it returns."""
    shown = save_table(table, "03_some", caption="100 % of a_b", **options)
    return (profile().figures / "03_some.tex").read_text(encoding="utf8").splitlines(), shown


def test_seeds_are_marks_around_the_line_of_their_means():
    fig, ax = pyplot.subplots()
    runs = pd.DataFrame({"steps": [30, 15, 15, 30], "kept": [3.0, 0.0, 1.0, 2.0]})
    assert plot_seeds(ax, runs, "steps", "kept", "o-", color="black") == (30, 2.5)
    marks, line = ax.lines
    assert (marks.get_linestyle(), marks.get_xydata().tolist()) == (
        "None", [[30, 3], [15, 0], [15, 1], [30, 2]],
    )  # fmt: skip
    assert (line.get_linestyle(), line.get_xydata().tolist()) == ("-", [[15, 0.5], [30, 2.5]])


def test_a_table_becomes_latex_with_its_texts_as_shown():
    rows = {"r90_over_null": [0.1, 0.25], "kind": ["a & b", "50 %"]}
    written, shown = latex_of(pd.DataFrame(rows, index=pd.Index(["x_1", "σ²"], name="task")))
    assert written == [
        r"\begin{table}",
        r"\centering",
        r"\caption{100 \% of a\_b}",
        r"\label{tab:03_some}",
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
    assert shown["r90_over_null"].tolist() == ["0.10", "0.25"]


def test_a_table_with_levels_keeps_every_cell_in_its_column():
    index = pd.MultiIndex.from_product([["a", "b"], [1, 8]], names=["task", "rank"])
    columns = pd.MultiIndex.from_product([["loss"], ["cut", "full"]])
    written, _ = latex_of(pd.DataFrame([[1, 2], [3, 4], [5, 6], [7, 8]], index, columns))
    cells = [line.rstrip("\\ ").split(" & ") for line in written if "&" in line]
    assert cells == [
        ["task", "rank", "loss cut", "loss full"],
        ["a", "1", "1", "2"],
        ["a", "8", "3", "4"],
        ["b", "1", "5", "6"],
        ["b", "8", "7", "8"],
    ]


def test_numbers_of_a_table_are_shown_as_asked():
    table = pd.DataFrame({"rank": [1, 64], "r95": [math.inf, 2.5], "gain": [-0.001, math.nan]})
    written, shown = latex_of(table, digits={"r95": 1, "gain": 2})
    assert shown.values.tolist() == [["1", "inf", "0.00"], ["64", "2.5", "–"]]
    assert r"0 & 1 & inf & 0.00 \\" in written
    assert r"1 & 64 & 2.5 & -- \\" in written


def test_a_table_has_the_same_bytes_again():
    table = pd.DataFrame({"gain": [0.5, 0.25]})
    assert latex_of(table)[0] == latex_of(table)[0]


def test_points_are_named_on_the_first_free_side_and_where_a_value_is_missing():
    fig, ax = pyplot.subplots()
    ax.set(xlim=(0, 1), ylim=(0, 1))
    y = pd.Series({"json": 0.5, "facts": math.nan})
    label_points(ax, pd.Series({"json": 0.3, "facts": 0.6}), y)
    first, missing = ax.texts
    assert (first.get_text(), missing.get_text()) == ("JSON", "facts")
    assert first.xyann == (6, -4)  # to the right
    pyplot.close(fig)


def test_a_name_leaves_other_points_free():
    fig, ax = pyplot.subplots()
    ax.set(xlim=(0, 1), ylim=(0, 1))
    x = pd.Series({"json": 0.3, "facts": 0.33})  # at the right of the first
    label_points(ax, x, pd.Series({"json": 0.5, "facts": 0.5}))
    assert ax.texts[0].xyann[0] < 0
    pyplot.close(fig)
