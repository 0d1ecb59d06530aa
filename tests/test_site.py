"""The report as a site, and the list of its figures, from executed notebooks."""

import re
import runpy
import shutil

import nbformat
import pytest
from bs4 import BeautifulSoup

import utils

SITE = utils.ROOT / "notebooks" / "site"
BUILD = runpy.run_path(str(SITE / "build.py"))
build = BUILD["build"]
figure_list = runpy.run_path(str(SITE / "list_figures.py"))["figure_list"]


def code_cell(source, output=None, *, tags=()):
    """An executed cell that shows `output`, {type: data}."""
    outputs = [nbformat.v4.new_output("display_data", data=output)] if output else []
    return nbformat.v4.new_code_cell(source, outputs=outputs, metadata={"tags": list(tags)})


def write_notebook(folder, *cells, name="03_some"):
    title = nbformat.v4.new_markdown_cell(f"# {int(name[:2])} · Some title")
    notebook = nbformat.v4.new_notebook(cells=[title, *cells])
    nbformat.write(notebook, folder / f"{name}.ipynb")


def built(folder, name="03_some", model=""):
    """A page of the site of the notebooks and figures in a folder."""
    build(folder, folder, folder / "out", model)
    return BeautifulSoup((folder / "out" / f"{name}.html").read_text("utf8"), "html.parser")


def test_the_list_of_figures_is_that_of_the_committed_notebooks():
    committed = (utils.ROOT / "figures" / "README.md").read_text(encoding="utf8")
    assert figure_list(utils.ROOT / "notebooks") == committed
    files = {path.stem for path in (utils.ROOT / "figures").glob("*.pdf")}
    assert {line[3:] for line in committed.splitlines() if line.startswith("## ")} == files


@pytest.mark.parametrize("below", [["No caption."], []], ids=["other text", "last cell"])
def test_a_figure_without_a_caption_is_named(tmp_path, below):
    figure = code_cell("f", {"text/plain": "<03_lone>", "image/png": "x"})
    write_notebook(tmp_path, figure, *map(nbformat.v4.new_markdown_cell, below))
    with pytest.raises(SystemExit, match="03_some.ipynb.*03_lone"):
        figure_list(tmp_path)


def test_claims_are_folded_under_the_count_of_their_lines_and_other_cells_are_not(tmp_path):
    three = {"a": (1.0, "1"), "b": (2.0, "2"), "c": (3.0, "3")}
    tables = {n: utils.assert_claims(dict([*three.items()][:n])).to_html() for n in (1, 3)}
    write_notebook(
        tmp_path,
        code_cell("utils.assert_claims(x)", {"text/html": tables[1]}, tags=["paper-only"]),
        code_cell("utils.assert_table(x)", {"text/html": tables[3]}, tags=["paper-only"]),
        code_cell("utils.assert_groups(x)", {"text/html": tables[3]}, tags=["paper-only"]),
        code_cell("utils.assert_claims(untagged)", {"text/html": tables[3]}),
        code_cell("no_claims", {"text/html": tables[3]}, tags=["paper-only"]),
    )
    page = built(tmp_path)
    summaries = [fold.find("summary").get_text() for fold in page.select("details.claims")]
    assert summaries == ["1 line of numbers checked", *["3 lines of numbers checked"] * 2]
    folded = [len(table.select("tbody tr")) for table in page.select("details.claims table")]
    assert folded == [1, 3, 3]
    assert len(page.select("table")) == 5  # the two others are shown as they are


def test_with_another_model_the_text_is_folded_and_headings_and_captions_stay(tmp_path):
    text = "Before.\n\n## Part\n\nGemma does.\n\n- so\n\n*Figure 3.1. A caption.*\n\nAfter."
    write_notebook(tmp_path, nbformat.v4.new_markdown_cell(text))
    assert built(tmp_path).select("details.prose, .notice") == []
    shutil.rmtree(tmp_path / "out")
    page = built(tmp_path, model="some/where/other-model")
    assert page.select_one("h1 + .notice").get_text().endswith("are those of other-model.")
    folded = [
        "".join(p.get_text() for p in f.select("p, ul")) for f in page.select("details.prose")
    ]
    assert [" ".join(text.split()) for text in folded] == ["Before.", "Gemma does. so", "After."]
    assert page.find("h2").find_parent("details") is None
    assert page.select_one("em:-soup-contains('Figure')").find_parent("details") is None


def test_a_figure_is_linked_to_those_of_its_files_that_exist(tmp_path):
    for kind in ("svg", "csv", "png"):
        (tmp_path / f"03_lone.{kind}").write_text(kind)
    figure = code_cell("f", {"text/plain": "<03_lone>", "image/png": "x"})
    figure["outputs"][0]["metadata"] = {"image/png": {"alt": 'a "line" & more'}}
    write_notebook(tmp_path, figure)
    page = built(tmp_path)
    assert page.select_one("img.figure")["alt"] == 'a "line" & more'
    links = {link.get_text(): link["href"] for link in page.select(".files a")}
    assert links == {"SVG": "figures/03_lone.svg", "CSV": "figures/03_lone.csv"}
    assert (tmp_path / "out" / links["CSV"]).read_text() == "csv"


DEFINED = """## Wide rank

How wide it is, e.g. by sight: more below. It is not high.

## The tall and the deep

The *tall* one is high; a *deep* one is low.

## Other words

| word | meaning |
|---|---|
| round | has [no](03_some.ipynb) corner |
"""


def hints(page):
    """What each link with a hint says: [(text of the link, text of the hint)]."""
    found = page.select(".hint")
    assert [h.a["aria-describedby"] for h in found] == [h.span["id"] for h in found]
    return [(h.a.get_text(), h.span.get_text()) for h in found]


def test_a_term_has_its_definition_at_its_first_place_in_the_prose(tmp_path):
    text = "## Tall\n\n`tall`: see [tall](x.html), tallest. Wide\nranks, a < b, Tall, deep & round."
    write_notebook(tmp_path, nbformat.v4.new_markdown_cell(text + "\n\nA tall wide rank."))
    definitions = nbformat.v4.new_markdown_cell(DEFINED)
    write_notebook(tmp_path, definitions, name="16_define_the_ranks")
    page = built(tmp_path)
    assert hints(page) == [
        ("Wide\nranks", "How wide it is, e.g. by sight: more below"),
        ("Tall", "The tall one is high"),
        ("deep", "a deep one is low"),
        ("round", "has no corner"),
    ]
    assert ", a < b, " in page.get_text()
    target = (tmp_path / "out" / "16_define_the_ranks.html").read_text("utf8")
    for link in page.select(".hint > a"):
        assert f'id="{link["href"].partition("#")[2]}"' in target
    assert hints(BeautifulSoup(target, "html.parser")) == []  # there they are defined


def test_a_citation_is_linked_and_has_the_title_of_its_work(tmp_path):
    work = "Doe 1999, *A Title*, [arXiv 9901.00001](https://arxiv.org/abs/9901.00001)"
    write_notebook(tmp_path, nbformat.v4.new_markdown_cell("(arXiv 9901.00001, arXiv 9902.00002)"))
    works = nbformat.v4.new_markdown_cell(f"| work |\n|---|\n| {work} |")
    write_notebook(tmp_path, works, name="17_relate_to_prior_work")
    page = built(tmp_path)
    assert hints(page) == [("arXiv 9901.00001", "Doe 1999, A Title")]
    addresses = [link["href"] for link in page.select("p a[href*=arxiv]")]
    assert addresses == [f"https://arxiv.org/abs/{n}" for n in ("9901.00001", "9902.00002")]


# The gallery

EXAMPLES = runpy.run_path(str(SITE / "inspect_examples.py"))["EXAMPLES"]
STORED = utils.ROOT / "data" / "gallery"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of a site of one notebook, which has the gallery too."""
    folder = tmp_path_factory.mktemp("site")
    write_notebook(folder)
    build(folder, folder, folder / "out")
    return folder / "out"


def parsed(file):
    return BeautifulSoup(file.read_text("utf8"), "html.parser")


def test_the_gallery_is_in_the_contents_and_where_the_readme_speaks_of_it(site):
    for name in ("index.html", "03_some.html", "gallery.html"):
        assert parsed(site / name).select("nav.contents a[href='gallery.html']")
    assert parsed(site / "index.html").select("main p a[href='gallery.html']")


def test_the_gallery_links_lead_to_its_places_its_examples_and_notebooks(site):
    page = parsed(site / "gallery.html")
    known = {path.stem for path in (utils.ROOT / "notebooks").glob("*.ipynb")}
    for link in page.select("main > :not(nav) a[href], main > a[href]"):
        file, _, place = link["href"].partition("#")
        assert not place or page.find(id=place), link
        assert not file or (site / file).exists() or file.removesuffix(".html") in known, link


def test_the_gallery_shows_each_example_whole_with_its_command_and_its_verdict(site):
    page = parsed(site / "gallery.html")
    frames = [frame["src"] for frame in page.select("iframe[title]")]
    assert frames == [f"gallery/{name}.html" for name in EXAMPLES]
    for name, (tuned, run, options) in EXAMPLES.items():
        words = " ".join([*([] if run.method == "lora" else ["gemma-3-270m"]), tuned, *options])
        assert f"deltarank inspect {words} --html page.html\n" in page.get_text()
        assert f"`{run.key}`" in (SITE / "gallery.md.j2").read_text("utf8")
        shown = parsed(site / "gallery" / f"{name}.html")
        assert shown.select_one("h1").get_text().startswith(tuned)
        quoted = page.select_one(f".cards li:has([href='#{name}']) q").get_text()
        assert shown.select_one(".lead").get_text().startswith(quoted)
        assert (site / "gallery" / f"{name}.json").read_bytes() == (
            STORED / f"{name}.json"
        ).read_bytes()


def test_the_gallery_and_its_examples_load_nothing_from_elsewhere(site):
    for file in (site / "gallery.html", *(site / "gallery").glob("*.html")):
        loaded = [node.get("src") or node["href"] for node in parsed(file).select("[src], link")]
        assert all((site / name).exists() for name in loaded if name != "data:,"), file
        assert not re.findall(r"@import|url\(|<object|<embed", file.read_text("utf8"))


def test_what_is_no_site_is_not_replaced(tmp_path):
    own = tmp_path / "html" / "thesis.txt"
    own.parent.mkdir()
    own.write_text("mine")
    with pytest.raises(SystemExit, match="is there and no site"):
        BUILD["main"]("notebooks", "figures", str(own.parent))
    assert own.read_text() == "mine"
