"""What the notebooks show, for papers: python notebooks/site/export.py figures | tables FOLDER OUT.

figures FOLDER OUT: the list of all figures, with caption, alt text, notebook and data, as Markdown.
tables FOLDER OUT: every table of the executed notebooks in FOLDER as LaTeX (booktabs) in OUT.
"""

import re
import sys
from pathlib import Path

import nbformat
import pandas as pd
from bs4 import BeautifulSoup

LATEX = {"σ": r"$\sigma$", "Σ": r"$\Sigma$", "²": r"$^2$", "₁": r"$_1$", "→": r"$\to$",
         "≥": r"$\ge$", "≤": r"$\le$", "−": r"$-$", "×": r"$\times$", "…": r"\ldots{}"}  # fmt: skip


def notebooks(folder: Path) -> dict[str, list]:
    """The cells of every notebook by its file name."""
    files = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    return {file.name: nbformat.read(file, as_version=4)["cells"] for file in files}


def figure_list(folder: Path) -> str:
    """One section a figure; the caption is the cell below it, up to the end of its emphasis."""
    lines = ["# Figures", "", "Each as PDF, SVG and PNG, with the plotted data as CSV.", ""]
    for file, cells in notebooks(folder).items():
        for cell, below in zip(cells, cells[1:], strict=False):
            for output in cell.get("outputs", []):
                found = re.fullmatch(r"<(\d\d_\w+)>", output.get("data", {}).get("text/plain", ""))
                caption = re.search(r"^\*(Figure .+?)\*", below["source"], re.DOTALL | re.MULTILINE)
                if found is None:
                    continue
                if caption is None:
                    sys.exit(f"{file}: no caption *Figure …* below figure {found.group(1)}")
                name, alt = found.group(1), output["metadata"]["image/png"]["alt"]
                lines += [f"## {name}", "", " ".join(caption.group(1).split()), ""]
                lines += [f"- alt text: {alt}", f"- notebook: [{file}](../notebooks/{file})"]
                lines += [f"- data: [{name}.csv]({name}.csv)", ""]
    return "\n".join(lines)


def cells_of(row) -> list[str]:
    """The texts of a row of an HTML table, a cell over several columns once in each."""
    cells = row.find_all(["th", "td"])
    return [cell.get_text().strip() for cell in cells for _ in range(int(cell.get("colspan", 1)))]


def read_table(html: str) -> pd.DataFrame:
    """A table that pandas drew, as text: the header's lines joined, the index as columns."""
    table = BeautifulSoup(html, "html.parser").table
    lines = zip(*map(cells_of, table.thead.find_all("tr")), strict=True)
    header = [" ".join(filter(None, dict.fromkeys(words))) for words in lines]
    rows = [cells_of(row) for row in table.tbody.find_all("tr")]
    full = [[""] * (len(header) - len(row)) + row for row in rows]  # below a cell of several lines
    return pd.DataFrame(full, columns=header)


def latex(table: pd.DataFrame, caption: str, label: str) -> str:
    """A booktabs table; cells, headers and caption escaped."""
    numbers = table.map(lambda text: re.fullmatch(r"(-?[\d.]+%?|nan|inf|)", text) is not None).all()
    styled = table.style.hide(axis="index").format(escape="latex")
    styled = styled.format_index(escape="latex", axis=1)
    caption = re.sub(r"([%&#_$])", r"\\\1", caption)
    text = styled.to_latex(
        hrules=True,
        caption=caption,
        label=label,
        position_float="centering",
        column_format="".join("r" if right else "l" for right in numbers),
    )
    return "".join(LATEX.get(letter, letter) for letter in text)


def write_tables(folder: Path, out: Path) -> None:
    """NN_k.tex for the k-th table of notebook NN; the caption is the heading above it."""
    out.mkdir(parents=True, exist_ok=True)
    for file, cells in notebooks(folder).items():
        heading, count = "", 0
        for cell in cells:
            if cell["cell_type"] == "markdown":
                headings = re.findall(r"^#+ (.+)$", cell["source"], re.MULTILINE)
                heading = headings[-1] if headings else heading
            for output in cell.get("outputs", []):
                html = output.get("data", {}).get("text/html", "")
                if "<table" not in html:
                    continue
                count += 1
                label = f"{file[:2]}_{count}"
                text = latex(read_table(html), heading, f"tab:{label}")
                (out / f"{label}.tex").write_text(text, encoding="utf8")


if __name__ == "__main__":
    kind, folder, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    if kind == "tables":
        write_tables(folder, out)
    else:
        out.write_text(figure_list(folder), encoding="utf8")
