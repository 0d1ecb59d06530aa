"""Findings of a pair or an adapter for readers: the lines of a terminal, one HTML file, JSON."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import platform
import pprint
import re
import shlex
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from deltarank import __version__
from deltarank.columns import COLUMNS, LOSSES, losses_text, number
from deltarank.drawing import curve_panel, heat_map
from deltarank.ranks import TRAINING_ADVICE, adapter_verdict, changed_matrices, ranks_of, verdict
from deltarank.spectra import energy, null_energy
from deltarank.store import compact_json

IN_TERMINAL = ["relative_size", "r90", "r90_over_null", "energy_8", "energy_64", "rank"]
IN_TERMINAL += ["near_rounding"]
HEAT_MAPS = {
    "relative_size": "Size of the update, |dW| / |W0|",
    "r90_over_null": "Rank for 90 %, over noise’s",
    "rank": "Rank to cut at",
}


def versions() -> dict[str, str]:
    """What measured: the versions of this package and of what it computes with."""
    return {
        "deltarank": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "pandas": pd.__version__,
    }


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What was found: the table of compare_checkpoints or Lora.spectra, ranks, and losses."""

    base: str | None  # None: `tuned` is an adapter, and its base was not needed
    tuned: str
    rule: dict[str, float]  # as recommend_ranks takes it: {"energy": 0.9}
    table: pd.DataFrame
    lora: dict | None  # from recommend_ranks; None where no matrix was changed
    losses: pd.DataFrame | None = None  # from score_pair
    warnings: tuple[str, ...] = ()
    versions: dict[str, str] = dataclasses.field(default_factory=versions)
    allow_pickle: bool = False  # as it was read, and is to be read again

    @property
    def sources(self) -> list[str]:
        """What was inspected: base and tuned model, or the adapter."""
        return [*filter(None, [self.base]), self.tuned]

    @functools.cached_property
    def lines(self) -> list[str]:
        """The verdict."""
        return (verdict if self.base else adapter_verdict)(self.table, self.lora)

    @functools.cached_property
    def shown(self) -> pd.DataFrame:
        """The table by layer, with label, energy_64 and rank; NaN for measures of no update."""
        table = self.table.assign(label=_labels(self.table))
        table = table.sort_values("layer", kind="stable")  # in files layer 10 comes before 2
        table["energy_64"] = [float(energy(S)[:64][-1]) for S in table["S"]]
        ranks = ranks_of(self.lora, table["name"]) if self.lora else {}
        table["rank"] = table["name"].map(ranks).astype(float).replace(0, math.nan)
        measures = [column for column in COLUMNS if column not in ("relative_size", "rank")]
        table = table.astype(dict.fromkeys(measures, float))
        table.loc[table["squared_norm"] == 0, measures] = math.nan
        return table

    def by_module(self) -> pd.DataFrame:
        """Median over the layers by module: `matrices` in all, COLUMNS of the changed ones."""
        changed = self.shown["squared_norm"] > 0
        shown = self.shown.assign(relative_size=self.shown["relative_size"].where(changed))
        groups = shown.groupby(["kind", "label"], sort=False)
        median = groups[list(COLUMNS)].median()
        median["near_rounding"] = groups["near_rounding"].sum(min_count=1)
        median.insert(0, "matrices", groups.size())
        return median.reset_index()

    def rule_text(self) -> str:
        """The rule for ranks as an option of the command."""
        option, value = next(iter(self.rule.items()))
        return f"--{option} {value:.12g}"

    def command(self) -> str:
        """The command that writes the adapter of these ranks."""
        pickles = " --allow-pickle" if self.allow_pickle else ""
        return f"deltarank extract {shlex.join(self.sources)} OUT {self.rule_text()}{pickles}"


def _labels(table: pd.DataFrame) -> list[str]:
    """The shortest end of each name within its layer that no other module shares.

    Before it what tells its stack of layers from others (encoder, decoder); the experts of a layer
    are one module.
    """
    names = table["name"].str.replace(r"\[\d+\]$|(?<=\bexperts)\.\d+", "", regex=True)
    parts = names.str.removesuffix(".weight").str.extract(r"(?:(.*?)\.\d+\.)?(.*)").fillna("")
    stacked, ends = ([tuple(filter(None, x.split("."))) for x in parts[i]] for i in (0, 1))
    places = list(zip(stacked, ends, strict=True))  # () outside of the layers
    known = set(places)
    stacks = [set(stack) for stack, _ in known if stack]
    common = set.intersection(*stacks) if stacks else set()

    def label(stack: tuple[str, ...], end: tuple[str, ...]) -> str:
        rivals = [other for where, other in known if where in (stack, ()) or not stack]
        tails = (end[-k:] for k in range(1, len(end) + 1))
        alone = (tail for tail in tails if sum(r[-len(tail) :] == tail for r in rivals) == 1)
        told = [word for word in stack if word not in common]
        # "c" alone would be no name for the c_proj of GPT-2
        return re.sub(r"(?<!\bc)_proj$", "", ".".join([*told, *next(alone, end)]))

    found = {place: label(*place) for place in known}
    return [found[place] for place in places]


def as_text(found: Inspection) -> str:
    """The verdict and a table by module, at most 100 columns wide."""
    paragraphs = [_wrapped(line) for line in found.lines]
    headings = ["module", "matrices", *(COLUMNS[c].heading for c in IN_TERMINAL)]
    rows = [[heading.replace("cut rank", "rank").replace("’", "'") for heading in headings]]
    for row in found.by_module().to_dict("records"):
        label = row["label"] if row["kind"] == "matrix" else f"{row['label']} ({row['kind']})"
        label = label if len(label) <= 26 else f"…{label[-25:]}"
        rows.append([label, str(row["matrices"])])
        rows[-1] += [COLUMNS[column].show(row[column]) for column in IN_TERMINAL]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )
    of = " (of what exceeds noise)" if "energy" in found.rule else ""
    legend = (
        "Medians over the layers (near rounding: a count). size: |dW| / |W0|. r90: rank that keeps "
        "90 % of the squared update; of noise's: over that of a random matrix. E(r): share that "
        f"rank r keeps. rank: to cut at, by {found.rule_text()}{of}. near rounding: its ranks mean "
        "little."
    )
    scored = found.losses
    losses = [] if scored is None else [losses_text(scored), _wrapped(LOSSES)]
    adapter = [f"To write the adapter: {found.command()}"] if found.lora else []
    return "\n\n".join([*paragraphs, table, _wrapped(legend), *losses, *adapter])


def _wrapped(text: str) -> str:
    """Text in lines of at most 100 columns; a number stays with its "%"."""
    kept = text.replace(" %", "\N{NO-BREAK SPACE}%")
    return textwrap.fill(kept, 100, break_on_hyphens=False).replace("\N{NO-BREAK SPACE}", " ")


def as_json(found: Inspection) -> str:
    """All numbers: sources, options, verdict, ranks, versions; a matrix a record, S to six digits.

    What is no number (a size over zero weights, the base of an adapter) is null.
    """
    ranks = found.lora and {
        "use": "extraction of the update, not training of a LoRA",
        "training": TRAINING_ADVICE,
        "LoraConfig": found.lora,
    }
    table = found.shown.drop(columns="label").assign(near_rounding=found.table["near_rounding"])
    record = {
        "base": found.base,
        "tuned": found.tuned,
        "rule": found.rule,
        "allow_pickle": found.allow_pickle,
        "verdict": found.lines,
        "warnings": found.warnings,
        "ranks": ranks,
        "matrices": table.to_dict("records"),
        "other_tensors": table.attrs,
        "losses": found.losses.to_dict("records") if found.losses is not None else None,
        "versions": found.versions,
    }
    return compact_json(_plain(record))


def from_json(text: str) -> Inspection:
    """What as_json wrote, to make its page again: to six digits, infinite sizes as NaN."""
    record = json.loads(text)
    table = pd.DataFrame(record["matrices"])
    table["S"] = pd.Series([torch.tensor(S) for S in table["S"]], dtype=object)
    table["shape"] = table["shape"].map(tuple)
    measures = [column for column in COLUMNS if column != "near_rounding"]
    table = table.astype(dict.fromkeys(measures, float))  # null is NaN
    table.attrs = record["other_tensors"]
    return Inspection(
        base=record["base"],
        tuned=record["tuned"],
        rule=record["rule"],
        table=table,
        lora=record["ranks"] and record["ranks"]["LoraConfig"],
        losses=None if record["losses"] is None else pd.DataFrame(record["losses"]),
        warnings=tuple(record["warnings"]),
        versions=record["versions"],
        allow_pickle=record.get("allow_pickle", False),  # which earlier versions did not write
    )


def _plain(value: Any) -> Any:
    """A value as JSON has it: spectra as lists of six digits, null for what is no number."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, torch.Tensor):
        return [float(f"{x:.6g}") for x in value.tolist()]
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def as_html(found: Inspection) -> str:
    """One HTML page that needs nothing else: verdict, heat maps, curves, tables, ranks."""
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html.j2").render(
        found=found,
        names=[Path(name).name or name for name in reversed(found.sources)],
        columns=COLUMNS,
        modules=found.by_module().to_dict("records"),
        matrices=found.shown[found.shown["kind"] != "expert"].to_dict("records"),
        experts=int((found.shown["kind"] == "expert").sum()),
        maps=_heat_maps(found),
        panels=_curve_panels(found),
        config=lora_text(found.lora) if found.lora else "",
        advice=TRAINING_ADVICE,
        losses=found.losses.to_dict("records") if found.losses is not None else [],
        number=number(".3f"),
    )


def lora_text(lora: dict) -> str:
    """The arguments of recommend_ranks as code to paste.

    >>> print(lora_text({"r": 2, "rank_pattern": {}}))
    LoraConfig(
        r=2,
        rank_pattern={},
    )
    """
    shown = (
        f"    {key}=" + pprint.pformat(value).replace("\n", "\n" + " " * (len(key) + 5))
        for key, value in lora.items()
    )
    return "LoraConfig(\n" + "".join(f"{line},\n" for line in shown) + ")"


def _heat_maps(found: Inspection) -> list[tuple[str, str]]:
    """Title and SVG of each heat map over the matrices of the layers."""
    inner = found.shown[found.shown["kind"] == "matrix"]
    if inner.empty:
        return []
    order = list(dict.fromkeys(inner["label"]))
    grids = {
        column: inner.pivot_table(column, "label", "layer", sort=False, dropna=False)
        .reindex(order)
        .sort_index(axis=1)
        for column in HEAT_MAPS
    }
    return [
        (title, heat_map(grids[column].astype(float), title, COLUMNS[column].show))
        for column, title in HEAT_MAPS.items()
        if grids[column].notna().any(axis=None)
    ]


def _curve_panels(found: Inspection) -> list[str]:
    """One SVG a module: energy against rank, median over the layers, beside noise's."""
    inner = changed_matrices(found.shown)
    last = 2 ** int(math.log2(max(inner["min_dim"], default=1)))
    panels = []
    for label, rows in inner.groupby("label", sort=False):
        smallest = int(rows["min_dim"].min())
        ranks = [2**k for k in range(int(math.log2(smallest)) + 1)]
        curves = [[float(energy(S)[:r][-1]) for r in ranks] for S in rows["S"]]
        noise = [[float(null_energy(shape)[r - 1]) for r in ranks] for shape in rows["shape"]]
        held, flat = (np.median(each, axis=0).tolist() for each in (curves, noise))
        panels.append(curve_panel(str(label), ranks, held, flat, rows["rank"].median(), last))
    return panels
