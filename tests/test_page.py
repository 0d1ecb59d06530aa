"""The page of a pair: one file that needs nothing else and shows the numbers of the table."""

import dataclasses
import json
import re

import pandas as pd
import pytest
import torch
from bs4 import BeautifulSoup
from loras import planted

from deltarank.compare import compare_checkpoints
from deltarank.drawing import color, heat_map
from deltarank.lora import open_lora
from deltarank.page import Inspection, as_html, as_json, as_text, from_json
from deltarank.ranks import TRAINING_ADVICE, recommend_ranks
from deltarank.spectra import null_energy, spectrum_measures

RULE = {"energy": 0.9}


@pytest.fixture
def found(save):
    """What is found of a small pair, with a task's losses."""
    table = compare_checkpoints(*save())
    losses = pd.DataFrame(
        {"model": ["base", "tuned"], "rank": [0, None], "loss_nats": [2.0, 1.0], "score": [0, 50.0]}
    )
    return Inspection("base", "tuned", RULE, table, recommend_ranks(table, **RULE), losses)


def inspected(names, size=lambda layer: 0.1, kind="matrix"):
    """What is found of matrices of these names, (layer, name), in this order."""
    S = torch.tensor([3.0, 2.0, 1.0, 0.5])
    rows = [{"name": name, "layer": layer, "relative_size": size(layer)} for layer, name in names]
    table = pd.DataFrame(rows).assign(kind=kind, S=[S] * len(rows), shape=[(4, 6)] * len(rows))
    table = table.assign(**spectrum_measures(S, (4, 6)), rounding_share=0.0, near_rounding=False)
    table = table.assign(dtype_tuned="F32", module="m")
    table.attrs = {"rest": {}}
    lora = recommend_ranks(table, **RULE) if kind == "matrix" else None
    return Inspection("base", "tuned", RULE, table, lora)


def parsed(found):
    return BeautifulSoup(as_html(found), "html.parser")


def seen(node):
    """The text of a page or a part of it, with single spaces."""
    return " ".join(node.get_text(" ").split())


def titles(picture):
    return [title.get_text() for title in picture.find_all("title")]


# The file


def test_the_page_loads_nothing_and_runs_nothing(found):
    html = as_html(found)
    assert re.findall(r"(?:src|href|srcset|data)\s*=", html) == []
    assert re.findall(r"@import|url\(|<script|<link|https?:", html) == []


def test_it_has_a_title_a_language_and_names_for_its_pictures(found):
    page = parsed(found)
    assert page.html["lang"] == "en" and page.title.get_text() == "tuned against base · deltarank"
    pictures = page.select("figure svg:not([aria-hidden])")
    assert len(pictures) == 3 + 7, "three heat maps, and a panel of curves a module"
    for picture in pictures:
        assert picture["role"] == "img" and len(picture["aria-label"]) > 40


def test_a_name_is_text_and_not_markup():
    name = "model.layers.0.<b>q</b>.weight"
    strange = inspected([(0, name)])
    html = as_html(Inspection("<b>base", "<b>tuned", RULE, strange.table, strange.lora))
    assert "<b>" not in html and "&lt;b&gt;tuned" in html and "&lt;b&gt;q" in html


def test_the_same_findings_give_the_same_bytes(found):
    again = Inspection("base", "tuned", RULE, found.table, found.lora, found.losses)
    assert as_html(found) == as_html(again) and as_json(found) == as_json(again)


def test_the_json_makes_the_same_page_again(found, adapter):
    found = dataclasses.replace(found, warnings=("a warning",), versions={"deltarank": "0.0.1"})
    for each in (found, adapter, dataclasses.replace(found, allow_pickle=True)):
        again = from_json(as_json(each))
        assert as_html(again) == as_html(each) and as_json(again) == as_json(each)
    page = seen(parsed(from_json(as_json(found))))
    assert page.endswith("deltarank 0.0.1.") and "Warning: a warning" in page


# What it says


def test_it_shows_verdict_ranks_and_losses(found):
    page = parsed(found)
    text = seen(page)
    assert [line for line in found.lines if line not in text] == []
    assert text.index(found.lines[0]) < text.index("Where the update is")
    extraction, training = page.select(".uses > section")
    assert f"LoraConfig(\n    r={found.lora['r']},\n" in extraction.get_text()
    assert "For extraction" in seen(extraction) and "deltarank extract base tuned OUT" in seen(
        extraction
    )
    assert TRAINING_ADVICE in seen(training) and "r=8, lora_alpha=32" in seen(training)
    losses = page.find(attrs={"aria-label": "Table of losses"})
    assert "base 0 2.000 0.000 tuned – 1.000 50.000" in seen(losses)
    told = " ".join(as_text(found).split())
    assert "base – 2.0 0.0 tuned – 1.0 50.0 On the task's test rows. rank: of the cut." in told


def test_the_size_of_a_module_is_that_of_its_changed_matrices(save):
    table = compare_checkpoints(*save())
    table.loc[table["layer"] == 0, ["squared_norm", "relative_size"]] = 0.0
    rows = Inspection("base", "tuned", RULE, table, None).by_module().set_index("label")
    last = table[(table["layer"] == 1) & (table["module"].str.contains("q_proj"))]
    assert rows.loc["q", "relative_size"] == last["relative_size"].item() > 0


def test_every_matrix_has_its_line(found):
    table = parsed(found).find(attrs={"aria-label": "Table of all matrices"})
    names = [cell.get_text() for cell in table.select("th[scope=row]")]
    assert sorted(names) == sorted(found.table["name"].str.removesuffix(".weight"))


def test_every_column_is_explained(found):
    page = parsed(found)
    explained = {term.get_text() for term in page.find_all("dt")}
    explained |= {"module", "matrices", "matrix", "shape", "type"}  # in the sentences
    heads = {h.get_text() for h in page.select("[aria-label^='Table by'] th[scope=col]")}
    heads |= {h.get_text() for h in page.select("[aria-label^='Table of all'] th[scope=col]")}
    assert len(heads) == 16 and heads - explained == set()


def test_nan_and_infinity_are_dashes_and_null(found):
    table = found.table.assign(relative_size=float("inf"))
    strange = Inspection("base", "tuned", RULE, table, found.lora)
    for text in (as_text(strange), seen(parsed(strange))):
        assert re.findall(r"\b(nan|inf)\b", text) == [] and "the update is – of the weights" in text
    matrices = json.loads(as_json(strange), parse_constant=pytest.fail)["matrices"]
    assert {matrix["relative_size"] for matrix in matrices} == {None}


def test_a_pair_without_an_update_has_a_page(save):
    base, _ = save()
    with pytest.warns(UserWarning, match="identical"):
        table = compare_checkpoints(base, base)
    nothing = Inspection("base", "base", RULE, table, None, warnings=("they are identical",))
    text = seen(parsed(nothing))
    assert "Warning: they are identical" in text and nothing.lines[0] in text
    assert "LoraConfig" not in text and json.loads(as_json(nothing))["ranks"] is None
    assert as_html(from_json(as_json(nothing))) == as_html(nothing)


@pytest.fixture
def adapter(tmp_path):
    """What is found of an adapter."""
    table = open_lora(planted(tmp_path / "lora", "patterns")).spectra()
    return Inspection(None, "lora", RULE, table, recommend_ranks(table, **RULE))


def test_an_adapter_has_a_page_without_a_base(adapter):
    page = parsed(adapter)
    text = seen(page)
    assert page.title.get_text() == "lora · deltarank" and "against" not in page.h1.get_text()
    assert "Adapter: lora" in text and "Base:" not in text and "dW = scale · B A" in text
    assert [line for line in adapter.lines if line not in text] == []
    assert adapter.lines[0].startswith("Of its ranks of 2 to 6 (median 5) in 6 matrices")
    assert "deltarank extract lora OUT --energy 0.9" in text
    assert re.findall(r"\b(nan|None|inf)\b", text) == []


def test_an_adapter_has_no_map_of_sizes_and_curves_that_end_at_1(adapter):
    page = parsed(adapter)
    assert [title.get_text() for title in page.select(".maps h3")] == [
        "Rank to cut at",
    ]
    said = titles(page.select_one(".panels svg"))
    assert "energy at rank 16: 1.00" in said, "beyond its rank there is no more to keep"


BERT = ("attention.self.query", "attention.output.dense", "output.dense", "mlp.down_proj")
T5 = ("SelfAttention.q", "EncDecAttention.q", "DenseReluDense.wi")


@pytest.mark.parametrize(
    ("ends", "labels"),
    [
        (
            [f"bert.encoder.layer.{{}}.{end}" for end in BERT],
            ["query", "attention.output.dense", "output.dense", "down"],
        ),
        (
            [f"encoder.block.{{}}.layer.{i}.{T5[2 * i]}" for i in (0, 1)]
            + [f"decoder.block.{{}}.layer.{i}.{end}" for i, end in enumerate(T5)],
            [
                *("encoder.q", "encoder.wi"),
                *("decoder.SelfAttention.q", "decoder.EncDecAttention.q", "decoder.wi"),
            ],
        ),
        (
            ["model.encoder.layers.{}.fc1", "model.decoder.layers.{}.fc1"],
            ["encoder.fc1", "decoder.fc1"],
        ),
        (["h.{}.mlp.fc", "h.{}.attn.0.fc"], ["mlp.fc", "0.fc"]),
        (["model.layers.{}.mlp.up_proj", "lm_head"], ["up", "lm_head"]),
        (
            [f"h.{{}}.{end}" for end in ("attn.c_attn", "attn.c_proj", "mlp.c_proj", "mlp.c_fc")],
            ["c_attn", "attn.c_proj", "mlp.c_proj", "c_fc"],
        ),
    ],
)
def test_modules_are_named_by_the_shortest_end_that_tells_them_apart(ends, labels):
    """Of encoder and decoder the stack is told too: a median over both would be of nothing."""
    names = [(i if "{}" in end else -1, f"{end.format(i)}.weight") for i in (0, 1) for end in ends]
    by_module = inspected(names).by_module().set_index("label")["matrices"]
    assert sorted(by_module.index) == sorted(labels) and set(by_module) == {2}


@pytest.mark.parametrize("name", ["experts.up_proj[{}]", "experts.{}.up_proj.weight"])
def test_experts_are_counted_and_not_listed(name):
    names = [(3, f"model.layers.3.mlp.{name.format(i)}") for i in range(5)]
    experts = inspected(names, kind="expert")
    assert "(5 more, of experts and routers, are in the JSON only)" in seen(parsed(experts))
    assert experts.by_module()[["label", "matrices"]].to_numpy().tolist() == [["up", 5]]


# What it draws


def test_layers_stand_in_their_order_with_their_values():
    """In a file layer 10 comes before layer 2."""
    order = sorted(range(12), key=str)
    names = [(i, f"model.layers.{i}.mlp.down_proj.weight") for i in order]
    page = parsed(inspected(names, size=lambda layer: (1 + layer) / 100))
    said = titles(page.select_one(".maps svg"))
    sizes = ["1.0", "2.0", "3.0", "4.0", "5.0", "6.0", "7.0", "8.0", "9.0", "10", "11", "12"]
    assert said == [f"down, layer {i}: {size} %" for i, size in enumerate(sizes)]


def test_colours_grow_lighter_with_the_value_also_in_grey():
    parts = [[int(color(i / 20)[k : k + 2], 16) for k in (1, 3, 5)] for i in range(21)]
    grey = [0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in parts]
    assert min(later - earlier for earlier, later in zip(grey, grey[1:], strict=False)) > 3


def test_a_cell_without_a_value_is_an_empty_box():
    grid = pd.DataFrame([[1.0, float("nan")]], index=["q"], columns=[0, 1])
    one, other = BeautifulSoup(heat_map(grid, "sizes", str), "html.parser").select("rect")[:2]
    assert one["fill"] == color(1.0) and "fill" not in other.attrs and other["class"] == ["none"]


def test_curves_show_the_energy_and_that_of_noise():
    page = parsed(inspected([(0, "model.layers.0.mlp.down_proj.weight")]))
    said = titles(page.select_one(".panels svg"))
    held = [9 / 14.25, 13 / 14.25, 1.0]
    noise = [float(null_energy((4, 6))[r - 1]) for r in (1, 2, 4)]
    for name, shares in (("energy", held), ("energy of noise", noise)):
        expected = [f"{name} at rank {r}: {E:.2f}" for r, E in zip((1, 2, 4), shares, strict=True)]
        assert [title for title in said if title.startswith(f"{name} at")] == expected
