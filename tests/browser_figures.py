"""make test-browser: the figures as a venue's checker and a colour-blind reader see them."""

import itertools
import re
import warnings
import zlib

import pytest
from matplotlib.colors import to_rgb

import utils
from deltarank.study.figures import VENUE_WIDTHS

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of optional parts that are not installed
    import colour

FOLDERS = {  # the committed figures, and those of every venue that `make figures` built
    venue: utils.build_folder() / "figures" / venue for venue in VENUE_WIDTHS
} | {"default": utils.ROOT / "figures"}
FIGURES = [
    pytest.param(venue, path, id=f"{venue}-{path.stem}")
    for venue, folder in FOLDERS.items()
    for path in sorted(folder.glob("*.pdf"))
]
DRAWN = {task: utils.TASKS[task] for task in utils.PROFILES["paper"].tasks}  # in one figure
BLINDNESS = (None, "Protanomaly", "Deuteranomaly", "Tritanomaly")


def contents(pdf):
    """The decompressed streams of a PDF."""
    for stream in re.findall(rb"stream\r?\n(.*?)\r?\nendstream", pdf, re.DOTALL):
        try:
            yield zlib.decompressobj().decompress(stream)  # its last byte may look like a line end
        except zlib.error:
            continue


@pytest.mark.parametrize(("venue", "path"), FIGURES)
def test_text_and_lines_are_large_enough_and_fonts_embedded(venue, path):
    pdf = path.read_bytes()
    drawn = b"\n".join(contents(pdf))
    sizes = {float(size) for size in re.findall(rb"/F\d+ ([\d.]+) Tf", drawn)}
    assert sizes and min(sizes) >= (5 if venue == "nature" else 6)  # pt
    widths = {float(width) for width in re.findall(rb"(?<!\S)([\d.]+) w(?!\S)", drawn)}
    assert min(widths - {0.0}) >= 0.25  # pt
    assert b"/Type3" not in pdf and b"/FontFile2" in pdf


@pytest.mark.parametrize(("venue", "path"), FIGURES)
def test_a_figure_fits_the_page(venue, path):
    box = re.search(rb"/MediaBox \[ ?0 0 ([\d.]+) ([\d.]+)", path.read_bytes())
    width, height = (float(side) / 72 for side in box.groups())
    assert width <= VENUE_WIDTHS[venue] + 0.01 and height <= 4.5


def as_seen(color, blindness):
    """CIELAB of a colour as a reader with this colour blindness sees it (Machado et al. 2009)."""
    linear = colour.models.eotf_sRGB(to_rgb(color))
    if blindness:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the range of its table
            linear = colour.blindness.matrix_cvd_Machado2009(blindness, 1.0) @ linear
    shown = colour.models.eotf_inverse_sRGB(linear.clip(0, 1))
    return colour.XYZ_to_Lab(colour.sRGB_to_XYZ(shown))


@pytest.mark.parametrize("blindness", BLINDNESS, ids=str)
def test_tasks_differ_by_colour_for_every_reader(blindness):
    seen = {task: as_seen(look.color, blindness) for task, look in DRAWN.items()}
    for one, other in itertools.combinations(seen, 2):
        assert colour.delta_E(seen[one], seen[other], method="CIE 2000") > 10, (one, other)


def test_tasks_differ_in_grey_and_by_marker():
    lightness = sorted(as_seen(look.color, None)[0] for look in DRAWN.values())
    assert min(b - a for a, b in itertools.pairwise(lightness)) > 5
    assert lightness[-1] < 70  # a name in this colour is readable on white
    assert len({look.marker for look in DRAWN.values()}) == len(DRAWN)
