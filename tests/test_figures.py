"""Exported figures: stable bytes, sizes, fonts, alt text."""

import re
import struct
import subprocess
import sys

import matplotlib as mpl
import pandas as pd
import pytest
from matplotlib import pyplot

import utils

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
    utils.set_style(venue)
    fig, ax = pyplot.subplots()
    ax.plot([0, 1], [0.1, 2 / 3], label="energy")
    ax.set_xlabel(r"rank $r$")
    ax.legend()
    utils.save_figure(fig, name, data=pd.DataFrame({"x": [0, 1], "y": [0.1, 2 / 3]}), alt=alt)
    paths = utils.profile().figures.glob(f"{name}.*")
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
    assert not utils.profile().figures.exists()


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


@pytest.mark.parametrize("venue", utils.VENUE_WIDTHS)
def test_a_figure_is_as_wide_as_the_page_of_its_venue(venue):
    files = save(venue=venue)
    box = re.search(rb"/MediaBox \[ ?0 0 ([\d.]+)", files["pdf"])
    assert float(box.group(1)) / 72 == pytest.approx(WIDTHS[venue], abs=0.01)
    assert struct.unpack(">I", files["png"][16:20])[0] == pytest.approx(WIDTHS[venue] * 300, abs=1)


def test_a_venue_in_the_environment_sets_width_and_folder(monkeypatch):
    monkeypatch.setenv("VENUE", "icml")
    utils.set_style()
    assert utils.figure_width() == WIDTHS["icml"]
    assert utils.profile().figures == utils.build_folder() / "figures" / "icml"


def test_no_figure_stays_open():
    save()
    assert pyplot.get_fignums() == []


def test_an_unknown_venue_lists_the_known_ones():
    with pytest.raises(ValueError, match="poster.*neurips.*icml.*acl.*nature"):
        utils.set_style("poster")


def test_the_style_replaces_what_was_set_before():
    mpl.rcParams["lines.linewidth"] = 9
    mpl.rcParams["axes.facecolor"] = "black"
    utils.set_style()
    assert mpl.rcParams["lines.linewidth"] < 2
    assert mpl.rcParams["axes.facecolor"] == "white"


def test_importing_utils_changes_no_style_and_no_warning():
    code = """
import matplotlib, numpy, pandas, torch, warnings  # which change some themselves
before = dict(matplotlib.rcParams), list(warnings.filters)
import utils
assert (dict(matplotlib.rcParams), list(warnings.filters)) == before
"""
    subprocess.run([sys.executable, "-c", code], cwd=utils.ROOT, check=True)
