"""Two folders of weights: their tensors are aligned, slices are exact, strangers are refused."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from pairs import ARCHITECTURES, Q, edit, refuse, same_tables
from safetensors.torch import load_file

from deltarank import alignment
from deltarank.alignment import open_pair
from deltarank.compare import compare_checkpoints


def edit_config(folder, **changes):
    """Change what config.json of a folder says."""
    config = Path(folder, "config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))


# What is read


def test_slices_change_nothing(save, monkeypatch):
    """Streaming equals in-memory: slices of a few rows give the spectra of whole matrices."""
    base, tuned = save()
    pair = open_pair(base, tuned)
    whole = next(iter(pair.parts(Q)))
    monkeypatch.setattr(alignment, "SLICE_ENTRIES", 100)
    parts = list(pair.parts(Q))
    assert len(parts) > 5
    for i in range(2):
        assert torch.equal(torch.cat([part[i] for part in parts]), whole[i])
    down = "model.layers.0.mlp.down_proj.weight"  # wider than tall: sliced by columns
    parts = list(pair.parts(down))
    assert torch.equal(
        torch.cat([W1 for _, W1 in parts], 1), load_file(f"{tuned}/model.safetensors")[down]
    )


def test_shards_equal_one_file(save, tmp_path):
    base, tuned = save()
    single = compare_checkpoints(base, tuned)
    model = transformers.AutoModelForCausalLM.from_pretrained(tuned)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    sharded = compare_checkpoints(base, str(tmp_path / "sharded"))
    assert same_tables(sharded, single)


# Names and shapes that differ rightly


@pytest.mark.parametrize(
    ("architecture", "embedding", "more"),
    [
        ("qwen", "model.embed_tokens.weight", []),
        ("bert", "bert.embeddings.word_embeddings.weight", ["cls.predictions.bias"]),
    ],
)
def test_a_grown_vocabulary_is_compared_on_common_rows(
    save, tmp_path, architecture, embedding, more
):
    """Embedding, and a head's bias as BERT, Phi and GPT-J have it."""
    base, tuned = save(architecture)
    name, _ = ARCHITECTURES[architecture]
    model = getattr(transformers, name).from_pretrained(tuned)
    model.resize_token_embeddings(80, mean_resizing=False)
    model.save_pretrained(tmp_path / "grown")
    table = compare_checkpoints(base, str(tmp_path / "grown")).set_index("name")
    assert table.attrs["added_rows"] == dict.fromkeys([embedding, *more], 16)
    assert table.loc[embedding, "squared_norm"] == 0
    assert table.loc[embedding, "shape"] == (64, 32)
    assert [table.attrs["rest"][name] for name in more] == [0.0] * len(more)
    with pytest.warns(UserWarning, match=re.escape(f"has {embedding}[-16:]")) as told:
        compare_checkpoints(str(tmp_path / "grown"), base)
    assert any("what became of it is not measured" in str(w.message) for w in told)


@pytest.mark.parametrize(
    ("architecture", "side", "removed", "added"),
    [
        ("gpt2", 0, "transformer.", ""),
        ("gpt2", 1, "transformer.", ""),
        ("llama", 1, "", "base_model.model."),
        ("llama", 0, "", "base_model.model."),
    ],
)
def test_a_prefix_on_one_side_is_seen_through(save, architecture, side, removed, added):
    folders = save(architecture)

    def rename(tensors):
        for name in list(tensors):
            tensors[added + name.removeprefix(removed)] = tensors.pop(name)

    before = compare_checkpoints(*folders)
    edit(folders[side], rename)
    after = compare_checkpoints(*folders)
    assert same_tables(*(table.drop(columns="name") for table in (after, before)))


def test_a_tied_head_may_be_missing_on_one_side(save):
    base, tuned = save("qwen")
    assert not any("lm_head" in name for name in load_file(f"{tuned}/model.safetensors"))

    def alias(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    before = compare_checkpoints(base, tuned)
    edit(base, alias)
    assert same_tables(compare_checkpoints(base, tuned), before)


def test_a_tied_head_that_both_sides_store_is_counted_once(save):
    base, tuned = save("qwen")
    before = compare_checkpoints(base, tuned)
    for folder in (base, tuned):
        edit(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert same_tables(compare_checkpoints(base, tuned), before)


@pytest.mark.parametrize("flag", [None, True])
def test_a_tie_counts_as_far_as_the_numbers_bear_it_out(save, flag):
    """Training may have untied the head, whatever config.json says; transformers loads both."""
    base, tuned = folders = save("qwen")
    for folder in folders:
        edit_config(folder, tie_word_embeddings=flag)
    edit(tuned, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    with pytest.warns(UserWarning, match="has lm_head.weight, which .* has not: no adapter holds"):
        assert open_pair(base, tuned).only_tuned == ["lm_head.weight"]
    edit(base, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert open_pair(base, tuned).names["lm_head.weight"] == "lm_head.weight"


def test_what_the_base_alone_has_is_warned_of(save):
    base, tuned = save()
    edit(tuned, lambda t: t.pop("lm_head.weight"))
    with pytest.warns(UserWarning, match="has lm_head.weight, which .* has not: what became of it"):
        assert open_pair(base, tuned).only_base == ["lm_head.weight"]


def test_three_dimensions_alone_make_no_experts(save):
    """Those of experts are in a layer, and neither vectors nor a convolution."""
    shapes = {"vision.cls_token": (1, 1, 32), "vision.positions": (2, 4, 32)}
    shapes |= {"layers.0.time_mix": (1, 1, 32), "layers.0.conv1d.weight": (8, 2, 4)}
    folders = save()
    for folder in folders:
        edit(folder, lambda t: t.update({n: torch.ones(shape) for n, shape in shapes.items()}))
    table = compare_checkpoints(*folders)
    assert "expert" not in {*table["kind"]}
    assert shapes.keys() <= table.attrs["rest"].keys()


@pytest.mark.parametrize("side", [0, 1])
def test_a_head_of_its_own_on_one_side_is_not_taken_for_tied(save, side):
    folders = save("qwen")
    edit_config(folders[side], tie_word_embeddings=False)
    edit(folders[side], lambda t: t.update({"lm_head.weight": torch.ones(64, 32)}))
    pair = open_pair(*folders)
    assert [pair.only_base, pair.only_tuned][side] == ["lm_head.weight"]
    assert [pair.only_base, pair.only_tuned][1 - side] == []


@pytest.mark.parametrize("side", [0, 1])
def test_a_head_that_one_side_says_is_not_tied_is_compared_though_it_is_the_embedding(save, side):
    folders = save("qwen")
    edit_config(folders[side], tie_word_embeddings=False)
    for folder in folders:
        edit(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert "lm_head.weight" in open_pair(*folders).names


HEADS = {
    "another last row": lambda E: torch.cat([E[:-1], E[-1:] + 1]),
    "more rows": lambda E: torch.cat([E, E[:6]]),
}


@pytest.mark.parametrize("head_of", HEADS.values(), ids=HEADS)
def test_a_head_is_tied_only_if_it_is_the_embedding_to_the_last_row(save, monkeypatch, head_of):
    monkeypatch.setattr(alignment, "SLICE_ENTRIES", 32 * 8)  # eight slices
    folders, embedding = save("qwen"), "model.embed_tokens.weight"
    for folder in folders:
        edit(folder, lambda t: t.update({"lm_head.weight": head_of(t[embedding])}))
    assert "lm_head.weight" in open_pair(*folders).names


def test_a_new_head_is_reported(save, tmp_path):
    base, tuned = save("bert")
    model = transformers.BertForSequenceClassification.from_pretrained(tuned, num_labels=2)
    model.save_pretrained(tmp_path / "classifier")
    table = compare_checkpoints(base, str(tmp_path / "classifier"))
    assert "classifier.weight" in table.attrs["only_tuned"]
    assert any(name.startswith("cls.") for name in table.attrs["only_base"])
    assert not any(name.startswith("cls.") for name in table["name"])


# Pairs that are none


@pytest.mark.parametrize("side", [0, 1])
def test_another_depth_is_refused(save, side):
    folders = save()
    edit(folders[side], lambda t: [t.pop(n) for n in list(t) if ".layers.1." in n])
    refuse(*folders, "model.layers.1.", "fine-tune of")


@pytest.mark.parametrize(
    ("name", "shape", "other"),
    [(Q, (32, 32), (48, 32)), ("model.embed_tokens.weight", (64, 32), (64, 48))],
)
def test_another_width_names_both_shapes(save, name, shape, other):
    base, tuned = save()
    edit(tuned, lambda t: t.update({name: torch.zeros(other)}))
    refuse(base, tuned, name, str(shape), str(other))


def test_a_missing_tensor_of_a_layer_is_refused(save):
    base, tuned = save()
    edit(tuned, lambda t: t.pop(Q))
    refuse(base, tuned, Q)
