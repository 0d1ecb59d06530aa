"""Figures: one style, four files and alt text each, direct labels."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import pandas as pd

from deltarank.checks import require
from deltarank.runtime import venue as wanted_venue
from deltarank.study.profiles import profile
from deltarank.study.tasks import TASKS

if TYPE_CHECKING:  # matplotlib is imported where it draws
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

VENUE_WIDTHS = {  # inches, over the full width of a page; from the venues' style files
    "default": 5.5,
    "neurips": 5.5,
    "icml": 6.75,
    "acl": 6.3,
    "nature": 7.2,
}

CLEAR = {"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8}  # behind names


def set_style(venue: str = "") -> None:
    """Matplotlib settings of every figure: white, 8 pt sans (7 pt for Nature), embedded fonts.

    The width is the venue's full width; without a venue, that of the environment variable VENUE,
    or the report's own.  Raises ValueError for an unknown venue.
    """
    import matplotlib as mpl

    style, known = venue or wanted_venue() or "default", ", ".join(VENUE_WIDTHS)
    require(style in VENUE_WIDTHS, f"venue {style!r} is unknown; choose one of {known}")
    size = 7 if style == "nature" else 8
    mpl.rcdefaults()
    mpl.rcParams.update(
        {
            "font.family": "DejaVu Sans",
            "font.size": size,
            "axes.titlesize": size,
            "axes.labelsize": size,
            "figure.labelsize": size,
            "xtick.labelsize": size - 1,
            "ytick.labelsize": size - 1,
            "legend.fontsize": size - 1,
            "legend.frameon": False,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "lines.linewidth": 1.2,
            "lines.markersize": 4,
            "lines.solid_capstyle": "butt",  # a bar ends where its range does
            "figure.figsize": (VENUE_WIDTHS[style], 2.8),
            "figure.constrained_layout.use": True,
            "figure.facecolor": "white",
            "pdf.fonttype": 42,
            "ps.fonttype": 42,
            "svg.hashsalt": "how-low-rank",
        }
    )


def figure_width() -> float:
    """Width in inches of a figure over the full width of the venue that set_style took."""
    import matplotlib as mpl

    return mpl.rcParams["figure.figsize"][0]


def save_figure(fig, name: str, *, data: pd.DataFrame, alt: str) -> None:
    """Write figures/<name>.pdf, .svg, .png and the plotted data as .csv; show it with alt text.

    A rerun leaves the bytes unchanged.  Raises ValueError when the alt text is empty.
    """
    import io

    import matplotlib.pyplot as plt
    from IPython.display import display

    require(bool(alt.strip()), f"figure {name} needs an alt text that says what it shows")
    folder = profile().figures
    folder.mkdir(parents=True, exist_ok=True)
    fig.savefig(folder / f"{name}.pdf", metadata={"CreationDate": None})
    fig.savefig(folder / f"{name}.svg", metadata={"Date": None})
    fig.savefig(folder / f"{name}.png", dpi=300)
    data.to_csv(folder / f"{name}.csv", index=False, float_format="%.6g", lineterminator="\n")
    inline = io.BytesIO()
    fig.savefig(inline, dpi=140)
    plt.close(fig)
    display(
        {"image/png": inline.getvalue(), "text/plain": f"<{name}>"},
        metadata={"image/png": {"alt": alt}},
        raw=True,
    )


def save_table(
    table: pd.DataFrame, name: str, *, caption: str, digits: int | dict = 2
) -> pd.DataFrame:
    """Write figures/<name>.tex (booktabs) and return the table as it is to be shown, as text.

    digits: of all numbers or by column; a column that is not named keeps its own.  NaN is shown as
    a dash.
    """
    shown = table.copy().astype(object)
    for column in table:
        places = digits.get(column) if isinstance(digits, dict) else digits
        shown[column] = [_as_text(value, places) for value in table[column]]
    folder = profile().figures
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.tex").write_text(_latex(shown, caption, f"tab:{name}"), encoding="utf8")
    return shown


def _as_text(value, places: int | None) -> str:
    """A cell as it is shown: integers as they are, other numbers with so many decimal places."""
    if not isinstance(value, float):
        return str(value)
    if math.isnan(value):
        return "–"
    return f"{value:g}" if places is None else f"{value:z.{places}f}"


LATEX = {"σ": r"$\sigma$", "Σ": r"$\Sigma$", "α": r"$\alpha$", "²": r"$^2$", "₁": r"$_1$",
         "→": r"$\to$", "≥": r"$\ge$", "≤": r"$\le$", "−": r"$-$", "×": r"$\times$",
         "√": r"$\surd$", "–": "--", ">": r"$>$", "…": r"\ldots{}"}  # fmt: skip


def _latex(table: pd.DataFrame, caption: str, label: str) -> str:
    """A booktabs table of texts, its index as first columns; cells, headers, caption escaped."""
    flat = table.reset_index() if any(table.index.names) else table.reset_index(names="")
    flat.columns = [
        " ".join(filter(None, map(str, c if isinstance(c, tuple) else [c]))) for c in flat
    ]
    numbers = [flat[c].map(lambda text: bool(NUMBER.fullmatch(str(text)))).all() for c in flat]
    styled = flat.style.hide(axis="index").format(escape="latex")
    text = styled.format_index(escape="latex", axis=1).to_latex(
        hrules=True,
        caption=re.sub(r"([%&#_$])", r"\\\1", caption),
        label=label,
        position_float="centering",
        column_format="".join("r" if right else "l" for right in numbers),
    )
    return "".join(LATEX.get(letter, letter) for letter in text)


NUMBER = re.compile(r"(> ?)?-?[\d.]+%?|–|")


def rank_axis(ax, *ticks: int) -> None:
    """A logarithmic axis of ranks, marked at these."""
    ax.set_xscale("log", base=2)
    ax.set_xticks(ticks, ticks)


def plot_by_task(ax, lines: pd.DataFrame, *, label_at: float | None = None, **options) -> None:
    """A line a task, labelled at the right: lines has x as its index and a column a task.

    label_at: the x whose heights place the labels, the last by default; options go to ax.plot.
    """
    for task in lines:
        ax.plot(lines.index, lines[task], **(TASKS[str(task)].look | options))
    x = lines.index[-1] if label_at is None else label_at
    label_lines(ax, lines.T[x], x=x)


def plot_seeds(ax, runs: pd.DataFrame, x: str, y: str, look: str, **options) -> tuple[float, float]:
    """The mean of column y by column x as a line, and each run as a faint mark.

    Returns the line's last point; options go to ax.plot.
    """
    ax.plot(runs[x], runs[y], look[0], alpha=0.4, markersize=2, **options)
    mean = runs.groupby(x)[y].mean()
    ax.plot(mean, look, markersize=4, **options)
    return mean.index[-1], mean.iloc[-1]


def plot_marks(
    ax, table: pd.DataFrame, looks: dict[str, tuple[str, str, str]]
) -> dict[str, list[float]]:
    """A line a task of `table`, a mark a column, each named where a task's marks lie far apart.

    looks: {column: (what it says, marker, colour)}; the first task is drawn lowest.  The marks of a
    task stand one below the other, so that none hides another: returns their heights by column.
    """
    values, places = table[[*looks]], range(len(table))
    ax.hlines(places, values.min(axis=1), values.max(axis=1), color="#DDDDDD", zorder=0)
    clear = values.apply(lambda row: row.sort_values().diff().min(), axis=1).argmax()
    step = 0.6 / len(looks)
    shift = {column: step * ((len(looks) - 1) / 2 - i) for i, column in enumerate(looks)}
    for side, column in enumerate(values.iloc[clear].sort_values().index):
        words, marker, color = looks[column]
        ax.plot(values[column], [y + shift[column] for y in places], marker, color=color, zorder=4)
        place = values[column].iloc[clear], clear + (0.5 if side % 2 else -0.5)
        ax.annotate(words, place, color=color, ha="center", va="center", bbox=CLEAR)
    ax.set_yticks(places, [TASKS[task].title for task in values.index])
    return {column: [y + up for y in places] for column, up in shift.items()}


def task_grid(tasks: Sequence[str], *, height: float = 1.2) -> tuple[Figure, dict[str, Axes]]:
    """A figure with one small panel a task, titled with it; returns it and {task: ax}."""
    import matplotlib.pyplot as plt

    columns = min(5, len(tasks))
    rows = -(-len(tasks) // columns)
    fig, grid = plt.subplots(
        rows,
        columns,
        figsize=(figure_width(), 0.4 + height * rows),
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    for ax in grid.flat[len(tasks) :]:
        ax.set_axis_off()
    axes = dict(zip(tasks, grid.flat, strict=False))
    for ax in grid.flat[len(tasks) - columns : len(tasks)]:  # the lowest of each column
        ax.tick_params(labelbottom=True)
    for task, ax in axes.items():
        ax.set_title(TASKS[task].title, color=TASKS[task].color, pad=3)
    return fig, axes


def line_key(fig, formats: dict[str, str]) -> None:
    """One key above all panels: {what a line is: its matplotlib format}, in grey."""
    from matplotlib.lines import Line2D

    handles = []
    for text, fmt in formats.items():
        look: dict = {"marker": fmt.strip("-:"), "linestyle": fmt.lstrip("os.")}
        face = "white" if fmt == "o:" else "#555555"
        handles.append(Line2D([], [], color="#555555", mfc=face, label=text, **look))
    fig.legend(handles=handles, loc="outside upper center", ncols=len(handles))


def label_lines(ax, heights: pd.Series, *, x: float, gap: float = 0.045) -> None:
    """Name the line of each task at x, {task: y}, at the right, at least `gap` apart in y."""
    ordered = heights.sort_values()
    places = list(ordered)
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + gap)
    shift = (sum(places) - ordered.sum()) / len(places)
    leader = {"arrowstyle": "-", "lw": 0.4, "ls": ":", "relpos": (0, 0.5), "shrinkA": 1}
    for task, y, place in zip(ordered.index, ordered, places, strict=True):
        ax.annotate(
            TASKS[task].title,
            (x, y),
            xytext=(1.02, place - shift),
            textcoords=("axes fraction", "data"),
            color=TASKS[task].color,
            va="center",
            arrowprops=leader | {"color": TASKS[task].color},
            annotation_clip=False,
        )


def label_points(ax, x: pd.Series, y: pd.Series) -> None:
    """Name each task's point on the side where the name covers least; set the limits before."""
    ax.figure.draw_without_rendering()
    places = (
        ax.transData.transform([*zip(x[y.index], y, strict=True)]) * 72 / ax.figure.dpi
    )  # in pt
    points = dict(zip(y.index, places, strict=True))
    taken = [(px - 5, py - 5, px + 5, py + 5) for px, py in places]
    frame = tuple(ax.get_window_extent().extents * 72 / ax.figure.dpi)
    for task, (px, py) in points.items():
        width, height = 4.6 * len(TASKS[task].title), 8
        sides = [(6, -height / 2), (-6 - width, -height / 2), (-width / 2, 6), (-width / 2, -14)]
        sides += [(dx, dy) for dx in (5, -5 - width) for dy in (3, -3 - height)]  # the corners
        boxes = [(px + dx, py + dy, px + dx + width, py + dy + height) for dx, dy in sides]
        covered = [sum(_common_area(box, other) for other in taken) for box in boxes]
        covered = [  # rounded, so that of sides that are as free the first is taken
            round(area - _common_area(box, frame), 3)
            for area, box in zip(covered, boxes, strict=True)
        ]
        best = covered.index(min(covered))
        taken.append(boxes[best])
        ax.annotate(
            TASKS[task].title,
            (x[task], y[task]),
            xytext=sides[best],
            textcoords="offset points",
            color=TASKS[task].color,
            fontsize="small",
            bbox=CLEAR,
        )


def _common_area(a: tuple, b: tuple) -> float:
    """Area that two boxes (left, bottom, right, top) share."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0) * max(height, 0)
