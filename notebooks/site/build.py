"""The report as a static site: python notebooks/site/build.py NOTEBOOKS FIGURES OUT.

Every notebook becomes a page with the contents at its side; the README becomes the index.  Nothing
is loaded from the network: figures are files beside the pages, formulas are MathML, the style is
one file.  The site is built beside OUT and then put in its place, so that an interrupted build
leaves the last one.
"""

import re
import shutil
import sys
import tempfile
from pathlib import Path

import jinja2
import nbformat
from bs4 import BeautifulSoup
from latex2mathml.converter import convert as to_mathml
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import markdown2html_mistune
from pygments.formatters import HtmlFormatter

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


def title_of(file: Path, notebook: dict) -> str:
    """The heading of a notebook's first cell, with its number."""
    heading = re.search(r"^# (.+)$", notebook["cells"][0]["source"], re.MULTILINE).group(1)
    return heading if heading[0].isdigit() else f"{int(file.name[:2])} · Read the report"


def with_figure_files(notebook: dict, figures: Path, out: Path) -> dict:
    """Replace every figure of save_figure by a file that is sharp at any size, with alt text."""
    for output in (o for cell in notebook["cells"] for o in cell.get("outputs", [])):
        name = re.fullmatch(r"<(\d\d_\w+)>", output.get("data", {}).get("text/plain", ""))
        if name is None:
            continue
        file = f"{name.group(1)}.svg"
        shutil.copyfile(figures / file, out / "figures" / file)
        alt = output["metadata"]["image/png"]["alt"].replace('"', "&quot;")
        output["data"] = {"text/html": f'<img class="figure" src="figures/{file}" alt="{alt}">'}
    return notebook


def with_formulas(page: BeautifulSoup) -> None:
    """Turn $...$ and $$...$$ outside code into MathML."""
    for text in page.find_all(string=re.compile(r"\$[^$]+\$")):
        if text.find_parent(["pre", "code", "script", "style"]):
            continue
        html = re.sub(
            r"\$\$(.+?)\$\$|\$(.+?)\$",
            lambda m: to_mathml(m[1] or m[2], display="block" if m[1] else "inline"),
            str(text),
            flags=re.DOTALL,
        )
        text.replace_with(BeautifulSoup(html, "html.parser"))


def fold_claims(page: BeautifulSoup) -> None:
    """Fold each cell that holds the numbers of the prose against what was measured."""
    for cell in page.select("div[class*=celltag_paper-only]"):
        if not re.search(r"assert_(claims|table)", cell.select_one("div.input").get_text()):
            continue
        count = len(cell.select("tbody tr"))
        fold = cell.wrap(page.new_tag("details", attrs={"class": "claims"}))
        summary = page.new_tag("summary")
        summary.string = f"{count} line{'s' * (count != 1)} of numbers checked"
        fold.insert(0, summary)


def finished(html: str) -> str:
    """The body of a page: formulas, folded code, tables that scroll, links between the pages."""
    page = BeautifulSoup(html, "html.parser")
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
    for link in page.select("a[href$='.ipynb']"):
        link["href"] = Path(link["href"]).with_suffix(".html").name
    return str(page)


def readme_page(out: Path) -> str:
    """The README as the body of the index; its figure becomes a file of the site."""
    text = (ROOT / "README.md").read_text(encoding="utf8")
    page = BeautifulSoup(markdown2html_mistune(text), "html.parser")
    for image in page.select("img"):
        file = Path(image["src"]).with_suffix(".svg")
        shutil.copyfile(ROOT / file, out / "figures" / file.name)
        image["src"], image["class"] = f"figures/{file.name}", "figure"
    for link in page.select("a[href]"):
        if not link["href"].endswith(".ipynb") and "://" not in link["href"]:
            link.unwrap()  # files of the repository, which the site does not hold
    return finished(str(page))


def build(notebooks: Path, figures: Path, out: Path) -> None:
    """Write the whole site into `out`."""
    (out / "figures").mkdir(parents=True)
    files = sorted(notebooks.glob("[0-9][0-9]_*.ipynb"))
    read = {file: nbformat.read(file, as_version=4) for file in files}
    contents = [("index.html", "The finding")]
    contents += [(f"{file.stem}.html", title_of(file, notebook)) for file, notebook in read.items()]
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(HERE), autoescape=False)
    frame = environment.get_template("page.html.j2")
    bodies = {"index.html": readme_page(out)}
    explorer = (HERE / "explorer.js").read_text(encoding="utf8")
    exporter = HTMLExporter(template_name="basic")
    for file, notebook in read.items():
        html, _ = exporter.from_notebook_node(with_figure_files(notebook, figures, out))
        bodies[f"{file.stem}.html"] = body = finished(html)
        if 'id="explorer-data"' in body:  # notebook 9 holds the data, the script draws them
            bodies[f"{file.stem}.html"] += f"<script>\n{explorer}</script>"
    for place, (name, title) in enumerate(contents):
        around = {"before": contents[place - 1] if place else None}
        around["after"] = contents[place + 1] if place + 1 < len(contents) else None
        page = frame.render(name=name, title=title, body=bodies[name], contents=contents, **around)
        (out / name).write_text(page, encoding="utf8")
    style = (HERE / "style.css").read_text(encoding="utf8")
    for selector, theme in ((":root", "default"), (":root.dark", "github-dark")):
        style += HtmlFormatter(style=theme).get_style_defs(f"{selector} .highlight") + "\n"
    (out / "style.css").write_text(style, encoding="utf8")


def main(notebooks: str, figures: str, target: str) -> None:
    """Build beside `target`, then put the new site in its place."""
    final = Path(target)
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=final.parent, prefix=".site-") as scratch:
        build(Path(notebooks), Path(figures), Path(scratch) / "new")
        if final.exists():
            final.rename(Path(scratch) / "old")
        (Path(scratch) / "new").rename(final)


if __name__ == "__main__":
    main(*sys.argv[1:])
