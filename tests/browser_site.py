"""make test-browser: the built site in headless Chromium, as a reader meets it.

Screenshots of every page, light and dark, wide and narrow, land in build/screenshots for a human.
"""

import json
import re
import shutil
import subprocess
import sys

import pytest
from axe_playwright_python.sync_playwright import Axe

import utils

SHOTS = utils.ROOT / "build" / "screenshots"
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 360, "height": 740}
PAGES = ["index.html"] + [
    f"{path.stem}.html" for path in sorted((utils.ROOT / "notebooks").glob("*.ipynb"))
]
PAGES += ["gallery.html"]


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The site of the committed notebooks."""
    out = tmp_path_factory.mktemp("site") / "html"
    folders = [utils.ROOT / "notebooks", utils.ROOT / "figures", out]
    command = [sys.executable, utils.ROOT / "notebooks" / "site" / "build.py", *folders]
    subprocess.run([str(part) for part in command], check=True)
    SHOTS.mkdir(parents=True, exist_ok=True)
    return out


@pytest.fixture
def open_page(site, browser):
    """A function that opens a page; afterwards nothing may have failed or left the disk."""
    contexts, problems = [], []

    def go(name, *, viewport=WIDE, scheme="light"):
        context = browser.new_context(viewport=viewport, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda m: m.type in ("error", "warning") and problems.append(m.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("requestfailed", lambda request: problems.append(f"failed: {request.url}"))
        page.on("request", lambda r: r.url.startswith(("file:", "data:")) or problems.append(r.url))
        page.goto((site / name).as_uri())
        return page

    yield go
    for context in contexts:
        context.close()
    assert problems == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_a_page_has_no_serious_accessibility_violation(open_page, name, scheme):
    page = open_page(name, scheme=scheme)
    page.screenshot(path=SHOTS / f"{name.removesuffix('.html')}-{scheme}.png", full_page=True)
    page.locator("#unfold").click() if page.locator("#unfold").is_visible() else None
    page.locator(".hint > a").first.focus() if page.locator(".hint").count() else None
    options = {"preload": False, "iframes": False}  # pages in frames have tests of their own
    found = Axe().run(page, options=options).response["violations"]
    serious = [v for v in found if v["impact"] in ("serious", "critical")]
    assert [(v["id"], v["nodes"][0]["html"][:200]) for v in serious] == []


@pytest.mark.parametrize("name", PAGES)
def test_a_page_fits_a_phone(open_page, name):
    page = open_page(name, viewport=NARROW)
    page.screenshot(path=SHOTS / f"{name.removesuffix('.html')}-phone.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= NARROW["width"]


@pytest.mark.parametrize("name", PAGES)
def test_images_load_and_say_what_they_show(open_page, name):
    for image in open_page(name).locator("img").all():
        assert image.evaluate("image => image.complete && image.naturalWidth > 0")
        assert len(image.get_attribute("alt")) > 40


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_to_pages_of_the_site_or_the_web(open_page, site, name):
    page = open_page(name)
    for link in page.locator("a[href]").all():
        href = link.get_attribute("href")
        if "://" not in href:
            file, _, place = href.partition("#")
            target = site / (file or name)
            assert target.exists() and (not place or f'id="{place}"' in target.read_text()), href


@pytest.mark.parametrize("name", PAGES)
def test_each_figure_has_links_to_its_svg_pdf_and_csv(open_page, site, name):
    for image in open_page(name).locator("img.figure").all():
        figure = image.get_attribute("src").removesuffix(".svg")
        links = image.locator("xpath=following-sibling::p[1]").locator("a").all()
        files = [link.get_attribute("href") for link in links]
        assert files == [f"{figure}.{kind}" for kind in ("svg", "pdf", "csv")]
        for file in files:
            assert (site / file).read_bytes() == (utils.ROOT / file).read_bytes()


ON_TOP = """hint => {
    const { left, right, top, bottom } = hint.getBoundingClientRect();
    return [left + 5, right - 5].every((x) => [top + 5, bottom - 5].every(
        (y) => hint.contains(document.elementFromPoint(x, y))));
}"""  # nothing cuts it off or covers it


@pytest.mark.parametrize("viewport", [WIDE, NARROW], ids=["wide", "phone"])
@pytest.mark.parametrize("name", PAGES)
def test_hints_show_whole_on_focus(open_page, name, viewport):
    page = open_page(name, viewport=viewport)
    for hint in page.locator(".hint").all():
        assert not hint.get_by_role("tooltip").is_visible()
        hint.locator("> a").focus()
        shown = hint.get_by_role("tooltip")
        box = shown.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= viewport["width"]
        assert box["y"] >= 0 and box["y"] + box["height"] <= viewport["height"]
        assert shown.evaluate("hint => hint.scrollWidth <= hint.clientWidth")
        assert shown.evaluate(ON_TOP)
        assert page.locator("[role=tooltip]:visible").count() == 1


def test_a_term_shows_its_definition_on_hover(open_page):
    stable = "How many directions as strong as the first would hold the whole sum of squares"
    assert stable in open_page("16_define_the_ranks.html").locator("main").inner_text()
    page = open_page("03_measure_spectra.html")
    hint = page.locator(".hint", has=page.get_by_role("link", name="stable rank"))
    hint.locator("> a").hover()
    assert hint.get_by_role("tooltip").inner_text() == stable
    hint.get_by_role("tooltip").hover()  # it stays while it is read
    assert hint.get_by_role("tooltip").is_visible()
    page.mouse.move(0, 0)
    assert not hint.get_by_role("tooltip").is_visible()


def test_a_citation_shows_the_title_of_its_work_on_hover(open_page):
    title = "LoRA Learns Less and Forgets Less"
    row = open_page("17_relate_to_prior_work.html").locator("td", has_text="arXiv 2405.09673")
    assert title in row.inner_text()
    link = open_page("03_measure_spectra.html").get_by_role("link", name="arXiv 2405.09673")
    link.hover()
    assert title in link.locator("xpath=..").get_by_role("tooltip").inner_text()


@pytest.mark.parametrize("name", ["index.html", "16_define_the_ranks.html"])
def test_the_contents_are_folded_on_a_phone_and_open_beside_the_text(open_page, name):
    phone, last = open_page(name, viewport=NARROW), "17 · Relate to prior work"
    link = phone.locator("nav.contents").get_by_role("link", name=last)
    assert not link.is_visible()
    assert phone.locator("h1").bounding_box()["y"] < NARROW["height"] / 3
    phone.locator("nav.contents summary").click()
    assert link.is_visible()
    phone.locator("nav.contents summary").click()
    phone.set_viewport_size(WIDE)
    link.wait_for(state="visible")
    assert not phone.locator("nav.contents summary").is_visible()
    assert open_page(name).locator("nav.contents").get_by_role("link", name=last).is_visible()


@pytest.mark.parametrize("name", PAGES)
def test_titles_have_no_pilcrow(open_page, name):
    page = open_page(name)
    headings = page.locator("h1, h2, h3").all_inner_texts()
    assert headings and not [text for text in [page.title(), *headings] if "¶" in text]


def test_formulas_are_drawn(open_page):
    page = open_page("03_measure_spectra.html")
    assert page.locator("math[display=block] mfrac").count() >= 1
    assert page.locator("math").first.bounding_box()["height"] > 15
    assert not re.search(r"\$\$|\\frac", page.locator("main").inner_text())


def test_code_is_folded_and_opens_with_one_click(open_page):
    page = open_page("03_measure_spectra.html")
    code = page.locator("details.code pre").first
    assert not code.is_visible()
    page.locator("details.code summary").first.click()
    assert code.is_visible()
    page.locator("#unfold").click()
    assert page.locator("details.code:not([open])").count() == 0


def slide(page, label, place):
    """Move a slider of the explorer to its n-th value."""
    slider = page.get_by_label(label, exact=True)
    slider.evaluate(
        "(input, value) => { input.value = value; input.dispatchEvent(new Event('input')); }", place
    )


def test_the_explorer_shows_the_numbers_of_the_store(open_page, monkeypatch):
    monkeypatch.setenv("PROFILE", "paper")
    page = open_page("15_explore_spectra.html")
    ranks = json.loads(page.locator("#explorer-data").text_content())["ranks"]
    page.get_by_label("first task").select_option("json")
    page.get_by_label("module", exact=True).select_option("v_proj")
    slide(page, "layer", 3)
    slide(page, "rank", ranks.index(64))
    panel = page.locator("section.panel").first
    result = utils.stored(utils.tuned("json"))
    table = utils.spectra_table([result]).set_index(["layer", "module"])
    name = table.loc[(3, "v_proj"), "name"]
    E = float(utils.energy(result.spectra[name])[63])
    null = float(utils.null_energy(result.shape(name))[63])
    assert panel.locator(".number").inner_text() == f"E(64) = {E:.2f}, noise {null:.2f}"
    shown = [float(box.get_attribute("data-value")) for box in panel.locator("[data-value]").all()]
    assert sum(shown) / len(shown) == pytest.approx(table["excess_64"].mean(), abs=1e-3)
    cut = utils.stored_cuts(result.config).set_index("rank").loc[64]
    assert f"{cut['loss_nats']:.2f} nats" in panel.locator(".cut").inner_text()
    assert f"score {cut['score']:.1f} (" in panel.locator(".cut").inner_text()


def test_the_explorer_says_what_was_not_measured(open_page):
    page = open_page("15_explore_spectra.html")
    slide(page, "rank", 0)
    slide(page, "rank", 18)
    text = page.locator("section.panel .cut").first.inner_text()
    assert text == 'Cut to rank 640: not measured. utils.cut(utils.tuned("facts"), [640])'


def test_the_explorer_answers_at_once(open_page):
    page = open_page("15_explore_spectra.html")
    took = page.evaluate("""() => {
        const slider = document.getElementById("explorer-rank"), start = performance.now();
        for (let i = 0; i < 10; i++) { slider.value = i; slider.dispatchEvent(new Event("input")); }
        document.body.getBoundingClientRect();
        return (performance.now() - start) / 10;
    }""")
    assert took < 300  # ms


def test_previous_and_next_walk_through_all_pages(open_page):
    page = open_page("index.html")
    walked = [page.url.rpartition("/")[2]]
    while page.locator("nav.around a[rel=next]").count():
        with page.expect_navigation():  # a click alone returns before the next page has its links
            page.locator("nav.around a[rel=next]").click()
        walked.append(page.url.rpartition("/")[2])
    assert walked == PAGES


def test_print_shows_text_and_figures_only(open_page):
    page = open_page("03_measure_spectra.html")
    page.emulate_media(media="print")
    assert not page.locator("nav.contents").is_visible()
    assert page.locator("img.figure").first.is_visible()


def test_an_interrupted_build_leaves_the_last_site(site, tmp_path):
    shutil.copytree(site, tmp_path / "html")
    broken = tmp_path / "notebooks"
    broken.mkdir()
    (broken / "00_broken.ipynb").write_text("{")
    command = [sys.executable, str(utils.ROOT / "notebooks" / "site" / "build.py"), str(broken)]
    done = subprocess.run([*command, str(utils.ROOT / "figures"), str(tmp_path / "html")])
    assert done.returncode
    assert (tmp_path / "html" / "index.html").read_text() == (site / "index.html").read_text()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
