"""The list of all figures of the notebooks: python notebooks/site/list_figures.py FOLDER OUT.

Markdown, one section a figure with caption, alt text, notebook and data.
"""

import itertools
import re
import sys
from pathlib import Path

import nbformat


def notebooks(folder: Path) -> dict[str, list]:
    """The cells of every notebook by its file name."""
    files = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    return {file.name: nbformat.read(file, as_version=4)["cells"] for file in files}


def figure_list(folder: Path) -> str:
    """One section a figure; the caption is the cell below it, up to the end of its emphasis."""
    lines = ["# Figures", "", "Each as PDF, SVG and PNG, with the plotted data as CSV.", ""]
    for file, cells in notebooks(folder).items():
        for cell, below in itertools.zip_longest(cells, cells[1:], fillvalue={"source": ""}):
            for output in cell.get("outputs", []):
                found = re.fullmatch(r"<(\d\d_\w+)>", output.get("data", {}).get("text/plain", ""))
                caption = re.search(r"^\*(Figure .+?)\*", below["source"], re.DOTALL | re.MULTILINE)
                if found is None:
                    continue
                if caption is None:
                    sys.exit(f"{file}: no caption *Figure …* below figure {found.group(1)}")
                name, alt = found.group(1), output["metadata"]["image/png"]["alt"]
                told = " ".join(caption.group(1).split()).replace("](#", f"](../notebooks/{file}#")
                lines += [f"## {name}", "", told, ""]
                lines += [f"- alt text: {alt}", f"- notebook: [{file}](../notebooks/{file})"]
                lines += [f"- data: [{name}.csv]({name}.csv)", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    folder, out = map(Path, sys.argv[1:])
    out.write_text(figure_list(folder), encoding="utf8")
