"""make test-browser: the page of a pair in headless Chromium, as a reader meets it.

Screenshots, light and dark, wide and narrow, and the print land in build/screenshots for a human.
"""

import re

import pandas as pd
import pytest
import torch
from axe_playwright_python.sync_playwright import Axe

from deltarank.page import Inspection, as_html
from deltarank.ranks import recommend_ranks
from deltarank.runtime import ROOT
from deltarank.spectra import spectrum_measures

SHOTS = ROOT / "build" / "screenshots"
WIDE, NARROW = {"width": 1200, "height": 900}, {"width": 360, "height": 740}
MODULES = {"mlp.down_proj": 2.0, "mlp.gate_proj": 1.4, "self_attn.q_proj": 1.0}
CELLS = "[aria-label='Table of all matrices']"


def row(layer, module, size):
    """A line of compare_checkpoints: a spectrum that falls faster in later layers."""
    S = size * torch.arange(1, 65).double() ** -(0.5 + layer / 40)
    part = module.split(".")[-1]
    line = {"name": f"model.layers.{layer}.{module}.weight", "layer": layer, "module": part}
    line |= {"kind": "matrix", "shape": (96, 64), "S": S, "dtype_tuned": "BF16"}
    line |= {"relative_size": size / 20, "rounding_share": 0.02, "near_rounding": layer == 3}
    return line | spectrum_measures(S, (96, 64))


def inspected(layers):
    """What is found of a model of so many layers, with all that a page can hold."""
    table = pd.DataFrame(
        row(i, name, size) for i in range(layers) for name, size in MODULES.items()
    )
    table.attrs = {"rest": {"model.norm.weight": 0.1}}
    rule = {"energy": 0.9}
    losses = pd.DataFrame(
        {"model": ["base", "tuned"], "rank": [0, None], "loss_nats": 1.0, "score": 9}
    )
    pair = (
        "/home/someone/a-rather-long-folder-name-of-a-checkpoint/base",
        "organisation/tuned-1.5B",
    )
    told = ("the update is 1.3 times as large as the weights (median)",)
    return Inspection(*pair, rule, table, recommend_ranks(table, **rule), losses, told)


@pytest.fixture(scope="session", params=[18, 80], ids="{} layers".format)
def file(request, tmp_path_factory):
    """A page on disk."""
    path = tmp_path_factory.mktemp("page") / f"{request.param}.html"
    path.write_text(as_html(inspected(request.param)), encoding="utf8")
    SHOTS.mkdir(parents=True, exist_ok=True)
    return path


@pytest.fixture
def open_page(file, browser):
    """A function that opens the page; nothing may fail, and nothing else may be asked for."""
    contexts, problems = [], []

    def go(*, viewport=WIDE, scheme="light"):
        context = browser.new_context(viewport=viewport, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda m: m.type in ("error", "warning") and problems.append(m.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda r: r.url == file.as_uri() or problems.append(r.url))
        page.goto(file.as_uri())
        return page

    yield go
    for context in contexts:
        context.close()
    assert problems == []


def unfold(page):
    for summary in page.locator("summary").all():
        summary.click()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_has_no_serious_accessibility_violation(open_page, file, scheme):
    page = open_page(scheme=scheme)
    page.screenshot(path=SHOTS / f"pair-{file.stem}-{scheme}.png", full_page=True)
    unfold(page)
    found = Axe().run(page, options={"preload": False}).response["violations"]
    serious = [v for v in found if v["impact"] in ("serious", "critical")]
    assert [(v["id"], v["nodes"][0]["html"][:200]) for v in serious] == []


def test_it_is_dark_where_the_reader_wants_it(open_page):
    paper = "getComputedStyle(document.body).backgroundColor"
    shades = [open_page(scheme=scheme).evaluate(paper) for scheme in ("light", "dark")]
    light, dark = (int(re.findall(r"\d+", shade)[0]) for shade in shades)
    assert light > 240 and dark < 30


@pytest.mark.parametrize("viewport", [NARROW, WIDE], ids=["phone", "wide"])
def test_the_page_fits_and_wide_things_scroll_in_their_boxes(open_page, file, viewport):
    page = open_page(viewport=viewport)
    page.screenshot(path=SHOTS / f"pair-{file.stem}-{viewport['width']}.png", full_page=True)
    unfold(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    cut_off = page.evaluate("""() => [...document.querySelectorAll("table, .maps svg")].filter(
        node => !node.closest(".scroll")).length""")
    assert cut_off == 0


def test_labels_are_within_their_pictures_and_large_enough(open_page):
    page = open_page(viewport=NARROW)
    outside = page.evaluate("""() => [...document.querySelectorAll("svg text")].filter(text => {
        const box = text.getBoundingClientRect();
        const frame = text.closest("svg").getBoundingClientRect();
        return box.left < frame.left - 1 || box.right > frame.right + 1
            || box.bottom > frame.bottom + 1 || box.height < 11;
    }).map(text => text.textContent)""")
    assert outside == []


def test_labels_of_a_picture_do_not_overlap(open_page):
    page = open_page()
    overlaps = page.evaluate("""() => [...document.querySelectorAll("figure svg")].flatMap(svg => {
        const texts = [...svg.querySelectorAll("text")];
        const boxes = texts.map(text => text.getBoundingClientRect());
        return texts.flatMap((text, i) => texts.slice(i + 1).filter((other, k) => {
            const a = boxes[i], b = boxes[i + 1 + k];
            const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
            const down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
            return across > 0 && down > 3;
        }).map(other => [text.textContent, other.textContent]));
    })""")
    assert overlaps == []


def test_a_cell_that_is_pointed_at_says_its_value(open_page):
    page = open_page()
    cell = page.locator(".maps svg").first.locator("rect:has(title)").nth(3)
    cell.hover()
    hit = page.evaluate("""() => {
        const box = document.querySelectorAll(".maps svg rect")[3].getBoundingClientRect();
        const at = document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2);
        return at.querySelector("title")?.textContent;
    }""")
    assert hit == "down, layer 3: 10 %"


def test_print_has_all_tables_whole_and_no_dark_paper(open_page, file):
    page = open_page(viewport={"width": 680, "height": 960}, scheme="dark")  # A4 within margins
    unfold(page)
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    hidden = page.evaluate("""() => [...document.querySelectorAll(".scroll, pre")].filter(
        node => node.scrollWidth > 682 || getComputedStyle(node).overflowX != "visible"
    ).map(node => node.getAttribute("aria-label") || node.textContent)""")
    assert hidden == []
    page.pdf(path=SHOTS / f"pair-{file.stem}.pdf", format="A4")
