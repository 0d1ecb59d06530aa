"""The report as a static site: python notebooks/site/build.py NOTEBOOKS FIGURES OUT [MODEL].

Every notebook becomes a page with the contents at its side; the README becomes the index.  Nothing
is loaded from the network: figures are files beside the pages, formulas are MathML, the style is
one file.  Where a page names what notebook 16 defines or notebook 17 cites, a hint says what it is.
The gallery shows pages of the tool, made from what it wrote of three runs (data/gallery).
With a MODEL the numbers are of that one, and the text, which speaks of the report's own, is folded.
The site is built beside OUT, then put in its place: an interrupted build leaves the last one.
"""

import functools
import html
import re
import shutil
import sys
import tempfile
from pathlib import Path

import jinja2
import nbformat
from bs4 import BeautifulSoup, Tag
from latex2mathml.converter import convert as to_mathml
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import markdown2html_mistune
from pygments.formatters import HtmlFormatter

from deltarank.page import Inspection, as_html, from_json

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
DEFINITIONS, WORKS = "16_define_the_ranks.html", "17_relate_to_prior_work.html"
GALLERY = ("gallery.html", "The tool in three examples")
EVERYDAY = {"base", "head", "loss", "score", "steps, rows", "tail", "the matrices", "tuned"}
SHORT = {"rank for 90 %": "r90"}  # the other spelling of a term


def title_of(file: Path, notebook: dict) -> str:
    """The heading of a notebook's first cell, with its number."""
    heading = re.search(r"^# (.+)$", notebook["cells"][0]["source"], re.MULTILINE).group(1)
    return heading if heading[0].isdigit() else f"{int(file.name[:2])} · Read the report"


def figure(name: str, alt: str, figures: Path, out: Path) -> str:
    """A figure of save_figure as a file that is sharp at any size, and links to all its files."""
    links = []
    for kind in ("svg", "pdf", "csv"):
        file = f"{name}.{kind}"
        if (figures / file).exists():
            shutil.copyfile(figures / file, out / "figures" / file)
            label = f"{kind.upper()} of figure {name}"
            links.append(f'<a href="figures/{file}" aria-label="{label}">{kind.upper()}</a>')
    image = f'<img class="figure" src="figures/{name}.svg" alt="{html.escape(alt)}">'
    return f'{image}<p class="files">{" · ".join(links)}</p>'


def with_figure_files(notebook: dict, figures: Path, out: Path) -> dict:
    """Replace every figure of save_figure by its files."""
    for output in (o for cell in notebook["cells"] for o in cell.get("outputs", [])):
        name = re.fullmatch(r"<(\d\d_\w+)>", output.get("data", {}).get("text/plain", ""))
        if name is None:
            continue
        alt = output["metadata"]["image/png"]["alt"]
        output["data"] = {"text/html": figure(name.group(1), alt, figures, out)}
    return notebook


def with_formulas(page: BeautifulSoup) -> None:
    """Turn $...$ and $$...$$ outside code into MathML."""
    for text in page.find_all(string=re.compile(r"\$[^$]+\$")):
        if text.find_parent(["pre", "code", "script", "style"]):
            continue
        formulas = re.sub(
            r"\$\$(.+?)\$\$|\$(.+?)\$",
            lambda m: to_mathml(m[1] or m[2], display="block" if m[1] else "inline"),
            str(text),
            flags=re.DOTALL,
        )
        text.replace_with(BeautifulSoup(formulas, "html.parser"))


def fold_claims(page: BeautifulSoup) -> None:
    """Fold each cell that holds the numbers of the prose against what was measured."""
    for cell in page.select("div[class*=celltag_paper-only]"):
        if not re.search(r"assert_(claims|groups|table)", cell.select_one("div.input").get_text()):
            continue
        count = len(cell.select("tbody tr"))
        fold = cell.wrap(page.new_tag("details", attrs={"class": "claims"}))
        summary = page.new_tag("summary")
        summary.string = f"{count} line{'s' * (count != 1)} of numbers checked"
        fold.insert(0, summary)


def step_back(page: BeautifulSoup, model: str) -> None:
    """Fold the text, which speaks of the report's own model, and say whose numbers these are.

    Headings and captions stay.
    """
    for part in page.select("div.text_cell_render") or [page]:
        fold = None
        for element in part.find_all(True, recursive=False):
            caption = element.select_one("em:-soup-contains('Figure')")
            if element.name in ("h1", "h2", "h3") or caption:
                fold = None
                continue
            if fold is None:
                fold = page.new_tag("details", attrs={"class": "prose"})
                element.insert_before(fold)
                summary = page.new_tag("summary")
                summary.string = "what the report says here, of its own model"
                fold.append(summary)
            fold.append(element.extract())
    notice = page.new_tag("p", attrs={"class": "notice", "role": "note"})
    notice.string = f"Numbers, tables and figures are those of {Path(model).name}."
    page.find("h1").insert_after(notice)


def finished(body: str) -> BeautifulSoup:
    """The body of a page: formulas, folded code, tables that scroll, links between the pages."""
    page = BeautifulSoup(body, "html.parser")
    with_formulas(page)
    for style in page.select("style"):
        style.decompose()  # pandas writes one into every table
    for code in page.select("div.input_area"):
        lines = len(code.get_text().strip().splitlines())
        fold = code.wrap(page.new_tag("details", attrs={"class": "code"}))
        summary = page.new_tag("summary")
        summary.string = f"code, {lines} line{'s' * (lines != 1)}"
        fold.insert(0, summary)
    fold_claims(page)
    for prompt in page.select("div.prompt"):
        prompt.decompose()
    for table in page.select("table"):
        table.attrs.pop("border", None)
        table.wrap(page.new_tag("div", attrs={"class": "scroll", "tabindex": "0"}))
    for pre in page.select("pre"):
        pre["tabindex"] = "0"
    for anchor in page.select("a.anchor-link"):
        anchor.decompose()
    for anchor in page.select("a[href$='.ipynb']"):
        anchor["href"] = Path(anchor["href"]).with_suffix(".html").name
    return page


def readme_page(out: Path) -> BeautifulSoup:
    """The README as the body of the index; its figure becomes a file of the site."""
    text = (ROOT / "README.md").read_text(encoding="utf8")
    page = BeautifulSoup(markdown2html_mistune(text), "html.parser")
    for anchor in page.select("a[href]:not(.anchor-link)"):
        if anchor["href"] == "data/gallery":
            anchor["href"] = GALLERY[0]
        elif not anchor["href"].endswith(".ipynb") and "://" not in anchor["href"]:
            anchor.unwrap()  # files of the repository, which the site does not hold
    for image in page.select("img"):
        drawn = figure(Path(image["src"]).stem, image["alt"], ROOT / "figures", out)
        image.find_parent("p").replace_with(BeautifulSoup(drawn, "html.parser"))
    return finished(str(page))


@functools.cache
def example(file: Path) -> tuple[Inspection, str]:
    """What the tool found of an example of the gallery, and its page."""
    found = from_json(file.read_text(encoding="utf8"))
    return found, as_html(found)


def gallery_page(frames: jinja2.Environment, out: Path) -> BeautifulSoup:
    """The gallery as the body of a page; the examples' own pages become files of the site."""
    (out / "gallery").mkdir()
    examples = {}
    for file in sorted((ROOT / "data" / "gallery").glob("*.json")):
        examples[file.stem], page = example(file)
        (out / "gallery" / f"{file.stem}.html").write_text(page, encoding="utf8")
        shutil.copyfile(file, out / "gallery" / file.name)
    text = frames.get_template("gallery.md.j2").render(examples=examples)
    return finished(markdown2html_mistune(text))


def sentences(paragraph: Tag) -> list[str]:
    """The sentences of a paragraph; a clause that begins with a term in emphasis is its own."""
    ends = r"(?<=\.)\s+(?=[A-Z<])|(?<=;)\s+(?=(?:an? |the )?<em>)"
    return re.split(ends, paragraph.decode_contents())


def glossary(page: BeautifulSoup) -> dict[str, tuple[Tag, str]]:
    """Each term of notebook 16: the element that introduces it, and the sentence that defines it.

    A term is a rank in a heading, a word in emphasis, or a word of the table of other words; words
    that have an everyday meaning too are left out.
    """
    found = {}
    for heading in page.select("h2:has(+ p)"):
        if re.search(r"\brank\b", heading.get_text()):
            for term in re.findall(r"(?:^|, and the )([^:,]+)", heading.get_text()):
                found[term.lower()] = (heading, sentences(heading.find_next_sibling("p"))[0])
    for word in page.select("h2 ~ p em"):
        inside = [text for text in sentences(word.parent) if str(word) in text]
        if inside and inside[0].endswith((".", ";", ":")):  # else a formula goes on below
            found[word.get_text().lower()] = (word, inside[0])
    for row in page.select("table:has(th:-soup-contains('meaning')) tbody tr"):
        word, meaning = row.select("td")[:2]
        found[word.get_text()] = (word, meaning.decode_contents())
    return {term: place for term, place in found.items() if term not in EVERYDAY}


def works(page: BeautifulSoup) -> dict[str, str]:
    """Authors, year and title of each work in the tables of notebook 17, by its address."""
    links = page.select("td:first-child a[href*='arxiv.org/abs/']")
    return {a["href"]: a.parent.decode_contents().partition("<a ")[0].rstrip(", ") for a in links}


def link(page: BeautifulSoup, words: str, address: str, *, once: bool) -> None:
    """Link words of the prose, a regular expression, to an address, at their first place or all."""
    pattern = re.compile(rf"(?<!\w){words}(?!\w)", re.IGNORECASE)
    for text in page.find_all(string=pattern):
        if not text.find_parent(["p", "li"]) or text.find_parent(["a", "code", "math", "td"]):
            continue
        linked = pattern.sub(rf'<a href="{address}">\g<0></a>', html.escape(text), count=once)
        text.replace_with(BeautifulSoup(linked, "html.parser"))
        if once:
            return


def with_hints(page: BeautifulSoup, hints: dict[str, str]) -> None:
    """Show the hint of each link that has one on hover and focus; tables say it themselves."""
    links = [a for a in page.select("a[href]") if a["href"] in hints and not a.find_parent("td")]
    for number, anchor in enumerate(links):
        anchor["aria-describedby"] = f"hint-{number}"
        place = anchor.wrap(page.new_tag("span", attrs={"class": "hint"}))
        hint = page.new_tag("span", attrs={"role": "tooltip", "id": f"hint-{number}"})
        hint.append(BeautifulSoup(hints[anchor["href"]], "html.parser"))
        place.append(hint)


def explain(pages: dict[str, BeautifulSoup]) -> None:
    """Link terms and citations of all pages, with a hint on what they are."""
    empty = BeautifulSoup("", "html.parser")
    hints, addresses = works(pages.get(WORKS, empty)), {}
    for term, (place, meaning) in glossary(pages.get(DEFINITIONS, empty)).items():
        place["id"] = place.get("id") or "term-" + re.sub(r"\W+", "-", term)
        addresses[term] = f"{DEFINITIONS}#{place['id']}"
        hints[addresses[term]] = re.sub(r"</?a\b.*?>|[.;:]$", "", meaning)  # without links
    for name, page in pages.items():
        link(page, r"arXiv (\d{4}\.\d{5})", r"https://arxiv.org/abs/\1", once=False)
        for term in sorted(addresses, key=len, reverse=True) if name != DEFINITIONS else ():
            words = re.escape(term).replace(r"\ ", r"\s+")
            link(page, rf"(?:{words}|{SHORT.get(term, words)})s?", addresses[term], once=True)
        with_hints(page, hints)


def build(notebooks: Path, figures: Path, out: Path, model: str = "") -> None:
    """Write the whole site into `out`; model: whose numbers they are, where not the report's."""
    (out / "figures").mkdir(parents=True)
    files = sorted(notebooks.glob("[0-9][0-9]_*.ipynb"))
    read = {file: nbformat.read(file, as_version=4) for file in files}
    contents = [("index.html", "The finding")]
    contents += [(f"{file.stem}.html", title_of(file, notebook)) for file, notebook in read.items()]
    contents.append(GALLERY)
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(HERE), autoescape=False)
    frame = environment.get_template("page.html.j2")
    pages = {"index.html": readme_page(out)}
    explorer = (HERE / "explorer.js").read_text(encoding="utf8")
    exporter = HTMLExporter(template_name="basic")
    for file, notebook in read.items():
        body, _ = exporter.from_notebook_node(with_figure_files(notebook, figures, out))
        pages[f"{file.stem}.html"] = finished(body)
    own = list(pages.values()) if model else []
    pages[GALLERY[0]] = gallery_page(environment, out)
    explain(pages)
    for page in own:
        step_back(page, model)
    bodies = {name: str(page) for name, page in pages.items()}
    for name, page in pages.items():
        if page.find(id="explorer-data"):  # notebook 15 holds the data, the script draws them
            bodies[name] += f"<script>\n{explorer}</script>"
    places = zip([None, *contents], contents, [*contents[1:], None], strict=False)
    for before, (name, title), after in places:
        around = {"before": before, "after": after, "contents": contents}
        page = frame.render(name=name, title=title, body=bodies[name], **around)
        (out / name).write_text(page, encoding="utf8")
    style = (HERE / "style.css").read_text(encoding="utf8")
    for selector, theme in ((":root", "default"), (":root.dark", "github-dark")):
        style += HtmlFormatter(style=theme).get_style_defs(f"{selector} .highlight") + "\n"
    (out / "style.css").write_text(style, encoding="utf8")


def main(notebooks: str, figures: str, target: str, model: str = "") -> None:
    """Build beside `target`, then put the new site in its place; nothing but a site is replaced."""
    final = Path(target)
    if final.exists() and not (final / "gallery.html").is_file():
        raise SystemExit(f"{target} is there and no site: name another folder")
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=final.parent, prefix=".site-") as scratch:
        build(Path(notebooks), Path(figures), Path(scratch) / "new", model)
        if final.exists():
            final.rename(Path(scratch) / "old")
        (Path(scratch) / "new").rename(final)


if __name__ == "__main__":
    main(*sys.argv[1:])
