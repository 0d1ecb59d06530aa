"""Heat maps and energy curves as inline SVG, which needs no library and no script."""

from __future__ import annotations

import math
from collections.abc import Callable
from html import escape

import pandas as pd

# viridis (van der Walt and Smith 2015): even steps of lightness, also in grey and colour-blind
SCALE = ("440154", "472d7b", "3b528b", "2c728e", "21918c", "28ae80", "5ec962", "addc30", "fde725")
ROW, LETTER = 17, 7.5  # px: height of a heat map's row, width of a letter of its labels
PLOT = (30, 22, 112, 88)  # px: left, top, width and height of the plot within a panel of curves


def color(share: float) -> str:
    """The colour of a share of the scale, 0 dark to 1 light.

    >>> color(0), color(0.0625), color(1)
    ('#440154', '#461768', '#fde725')
    """
    place = min(max(share, 0.0), 1.0) * (len(SCALE) - 1)
    left = min(int(place), len(SCALE) - 2)
    ends = [[int(SCALE[i][k : k + 2], 16) for k in (0, 2, 4)] for i in (left, left + 1)]
    mixed = (round(a + (b - a) * (place - left)) for a, b in zip(*ends, strict=True))
    return "#" + "".join(f"{part:02x}" for part in mixed)


def heat_map(grid: pd.DataFrame, title: str, show: Callable[[float], str]) -> str:
    """An SVG of a grid (modules down, layers across); each cell says its value when pointed at.

    Colours go from 0 to the largest finite value; a cell without one is an empty box.
    """
    values = [x for x in grid.to_numpy().ravel() if math.isfinite(x)]
    top = max(values, default=0.0) or 1.0
    left = round(LETTER * max(len(str(module)) for module in grid.index)) + 8
    cell = max(8, min(15, 250 // len(grid.columns)))
    width, bottom = left + max(cell * len(grid.columns), 130) + 6, ROW * len(grid)
    body = []
    for y, (module, row) in enumerate(grid.iterrows()):
        body.append(_text(left - 6, ROW * y + 12.5, str(module), "end"))
        for x, (layer, value) in enumerate(row.items()):
            known = math.isfinite(value)
            look = f'fill="{color(value / top)}"' if known else 'class="none"'
            place = f'x="{left + cell * x}" y="{ROW * y}" width="{cell}" height="{ROW}"'
            name = f"{module}, {_layer(layer)}: {show(value)}"
            body.append(f"<rect {place} {look}><title>{escape(name)}</title></rect>")
    for x, layer in enumerate(grid.columns):
        if x % 5 == 0:
            body.append(_text(left + cell * (x + 0.5), bottom + 14, _layer(layer)[6:], "middle"))
    body.append(_text(left - 6, bottom + 14, "layer", "end"))
    label = f"Heat map, {len(grid)} modules by {len(grid.columns)} layers: {title}"
    label += f"; from {show(min(values, default=0.0))} to {show(top)}."
    return _svg(width, bottom + 52, label, [*body, *_legend(left, bottom + 24, top, show)])


def _layer(number: object) -> str:
    """The name of a layer; matrices outside the layers have the number -1."""
    return "layer –" if number == -1 else f"layer {number}"


def _legend(left: float, top: float, largest: float, show: Callable[[float], str]) -> list[str]:
    """The scale of a heat map, with its ends and its middle."""
    step, parts = 130 / 26, []
    for i in range(26):
        place = f'x="{left + step * i:g}" y="{top}" width="{step + 0.3:g}" height="9"'
        parts.append(f'<rect {place} fill="{color(i / 25)}"/>')
    ticks = ((0.0, "start"), (0.5, "middle"), (1.0, "end"))
    return parts + [_text(left + 130 * x, top + 23, show(largest * x), at) for x, at in ticks]


def curve_panel(
    module: str, ranks: list[int], held: list[float], noise: list[float], chosen: float, last: int
) -> str:
    """An SVG of one module: energy against rank (log axis to `last`), dotted that of noise.

    A thin vertical line marks the rank that was chosen; a point says its value when pointed at.
    """
    left, top, width, height = PLOT

    def at(rank: float) -> float:
        return left + width * math.log2(max(1.0, rank)) / max(1.0, math.log2(last))

    body = [_text(left, 13, module, "start", "name")]
    for share in (0.0, 0.5, 1.0):
        y = top + height * (1 - share)
        body.append(f'<path class="grid" d="M{left} {y:g}h{width}"/>')
        body.append(_text(left - 5, y + 4, f"{share:g}", "end"))
    for r in [r for r in (1, 16, 256, 4096) if r <= last]:
        body.append(_text(at(r), top + height + 15, str(r), "middle"))
    if math.isfinite(chosen):
        mark = f'<path class="chosen" d="M{at(chosen):.1f} {top}v{height}">'
        body.append(f"{mark}<title>rank to cut at, median: {chosen:g}</title></path>")
    for style, shares in (("noise", noise), ("energy", held)):
        points = [(at(r), top + height * (1 - E)) for r, E in zip(ranks, shares, strict=True)]
        body.append(f'<path class="{style}" d="M{_points(points)}"/>')
        for r, E, (x, y) in zip(ranks, shares, points, strict=True):
            name = f"{style} at rank {r}: {E:.2f}".replace("noise", "energy of noise", 1)
            body.append(f'<circle class="{style}" cx="{x:.1f}" cy="{y:.1f}" r="2.2">')
            body.append(f"<title>{name}</title></circle>")
    ends = f"at rank {ranks[0]} {held[0]:.2f}, noise {noise[0]:.2f}"
    ends += f"; at rank {ranks[-1]} {held[-1]:.2f}, noise {noise[-1]:.2f}"
    return _svg(150, 130, f"Energy against rank of {module}: {ends}.", body)


def _points(points: list[tuple[float, float]]) -> str:
    """Points as the data of an SVG path."""
    return "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _text(x: float, y: float, text: str, anchor: str, look: str = "") -> str:
    """A label; anchor: which of its ends stands at x."""
    style = f' class="{look}"' if look else ""
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}"{style}>{escape(text)}</text>'


def _svg(width: float, height: float, label: str, body: list[str]) -> str:
    """An image that says in `label` what it shows, to who cannot see it."""
    size = f'viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}"'
    return f'<svg {size} role="img" aria-label="{escape(label)}">{"".join(body)}</svg>'
