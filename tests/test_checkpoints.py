"""A folder of weights: what it holds is read, bad input has a name."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from pairs import Q, build, edit, refuse, same_tables
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from deltarank.alignment import open_pair
from deltarank.checkpoints import layer_and_module, open_checkpoint
from deltarank.compare import compare_checkpoints


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.17.mlp.down_proj.weight", (17, "down_proj")),
        ("model.embed_tokens.weight", (-1, "embed_tokens")),
    ],
)
def test_layer_and_module(name, expected):
    assert layer_and_module(name) == expected


# What is read

BUFFERS = {  # that a model computes anew when it is loaded, or never changes
    "model.layers.0.self_attn.rotary_emb.inv_freq": (torch.float32, (8,)),
    "transformer.h.0.attn.bias": (torch.float32, (1, 1, 8, 8)),
    "h.0.attn.bias": (torch.uint8, (1, 1, 8, 8)),
    "transformer.h.0.attn.causal_mask": (torch.bool, (1, 1, 8, 8)),
    "gpt_neox.layers.0.attention.masked_bias": (torch.float16, ()),
    "bert.embeddings.position_ids": (torch.int64, (1, 8)),
    "roberta.embeddings.position_ids": (torch.int32, (1, 8)),
    "final_logits_bias": (torch.float32, (1, 64)),
    "num_batches_tracked": (torch.int32, ()),
}


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("side", [0, 1])
def test_masks_and_positions_are_no_weights(save, side, pickled):
    folders = save()
    before = compare_checkpoints(*folders)
    more = {name: torch.ones(shape).to(dtype) for name, (dtype, shape) in BUFFERS.items()}
    edit(folders[side], lambda t: t.update(more))
    if pickled:
        to_pickle(folders[side])
    after = compare_checkpoints(*folders, allow_pickle=pickled)
    assert same_tables(after, before) and after.attrs == before.attrs


@pytest.mark.parametrize("stray", ["model.fp16.safetensors", "consolidated.safetensors"])
@pytest.mark.parametrize("saving", [{}, {"max_shard_size": "20KB"}])
def test_copies_beside_the_model_are_not_read(save, stray, saving):
    base, tuned = save(**saving)
    before = open_checkpoint(tuned).files
    save_file({Q: torch.zeros(32, 32), "more": torch.zeros(2, 2)}, f"{tuned}/{stray}")
    assert open_checkpoint(tuned).files == before and Q in before


def test_files_of_other_names_are_all_read(save):
    base, tuned = save()
    tensors = load_file(f"{tuned}/model.safetensors")
    Path(tuned, "model.safetensors").unlink()
    for i, part in enumerate((list(tensors)[:3], list(tensors)[3:])):
        save_file({name: tensors[name] for name in part}, f"{tuned}/part{i}.safetensors")
    assert open_checkpoint(tuned).files.keys() == tensors.keys()


# Bad input


def to_pickle(folder, **form):
    """Put a pickle in the place of a folder's one file of weights."""
    file = Path(folder) / "model.safetensors"
    torch.save(load_file(file), file.with_name("pytorch_model.bin"), **form)
    file.unlink()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs pointer"),
        (b"<!doctype html><html></html>", "web page"),
        (None, "torn"),  # cut short
        ("trailing", "torn"),
    ],
)
def test_broken_files_are_named(save, content, problem):
    base, tuned = save()
    file = Path(tuned) / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes({None: whole[:-100], "trailing": whole + b"more"}.get(content, content))
    refuse(base, tuned, "tuned/model.safetensors", problem)


def test_a_header_whose_length_reads_as_a_page_is_a_header(save):
    """Of 15,392 bytes: " <" in the file's first two."""
    base, tuned = save()
    file = Path(tuned) / "model.safetensors"
    before, whole = compare_checkpoints(base, tuned), file.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = whole[8 : 8 + size].ljust(0x3C20)
    file.write_bytes(len(header).to_bytes(8, "little") + header + whole[8 + size :])
    assert file.read_bytes()[:2] == b" <"
    assert same_tables(compare_checkpoints(base, tuned), before)


def test_a_name_that_a_terminal_would_obey_is_refused(save):
    base, tuned = save()
    for folder in (base, tuned):
        edit(folder, lambda t: t.update({"\x1b[31m.weight": t[Q].clone()}))
    refuse(base, tuned, "base/model.safetensors", "\\x1b", "rename it")


def test_a_file_in_place_of_a_folder_is_named(save):
    base, tuned = save()
    refuse(base, f"{tuned}/model.safetensors", "is a file: give the folder that holds it")


def test_a_gguf_is_named(save):
    base, tuned = save()
    Path(tuned, "model.safetensors").rename(Path(tuned, "model.gguf"))
    refuse(base, tuned, "tuned holds a GGUF, which is quantised: give the safetensors")


def test_a_missing_shard_is_named(save):
    base, tuned = save(max_shard_size="20KB")
    shard = sorted(Path(tuned).glob("*.safetensors"))[1]
    shard.unlink()
    refuse(base, tuned, shard.name, error=FileNotFoundError)


@pytest.mark.parametrize("text", ["{", "[1]", "", "{}", '{"weight_map": ["a"]}'])
def test_a_torn_index_is_named(save, text):
    base, tuned = save(max_shard_size="20KB")
    Path(tuned, "model.safetensors.index.json").write_text(text)
    refuse(base, tuned, "tuned/model.safetensors.index.json", "fetch it again")


@pytest.mark.parametrize("zipped", [True, False])  # False: as torch wrote before 1.6
def test_pickles_are_read_only_when_it_is_said(save, zipped):
    base, tuned = save()
    before = compare_checkpoints(base, tuned)
    to_pickle(tuned, _use_new_zipfile_serialization=zipped)
    refuse(base, tuned, "pickles", "allow_pickle=True")
    with pytest.raises(ValueError, match="allow_pickle=True"):
        compare_checkpoints(base, tuned)
    assert same_tables(compare_checkpoints(base, tuned, allow_pickle=True), before)


def test_a_pickle_of_parameters_is_read_as_one_of_tensors(save):
    base, tuned = save()
    before = compare_checkpoints(base, tuned)
    file = Path(tuned) / "model.safetensors"
    parameters = {name: torch.nn.Parameter(tensor) for name, tensor in load_file(file).items()}
    torch.save(parameters, file.with_name("pytorch_model.bin"))
    file.unlink()
    assert same_tables(compare_checkpoints(base, tuned, allow_pickle=True), before)


def test_a_pickle_that_runs_code_is_refused_even_then(save):
    class Bomb:
        def __reduce__(self):
            return (print, ("boom",))

    base, tuned = save()
    (Path(tuned) / "model.safetensors").unlink()
    torch.save({"a": Bomb()}, Path(tuned) / "pytorch_model.bin")
    with pytest.raises(ValueError, match="torn"):
        open_pair(base, tuned, allow_pickle=True)


@pytest.mark.parametrize("content", [b"\x80\x02", b"hello", b"P", [1, 2], torch.ones(2)], ids=str)
def test_a_pickle_of_anything_else_is_named_without_advice_to_trust_it(save, content):
    base, tuned = save()
    (Path(tuned) / "model.safetensors").unlink()
    file = Path(tuned) / "pytorch_model.bin"
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    with pytest.raises(ValueError, match=r"^tuned/pytorch_model\.bin (is torn|holds no)") as told:
        open_pair(base, tuned, allow_pickle=True)
    assert "weights_only" not in str(told.value) and "safetensors" in str(told.value)


ENDS = ("safetensors", "json", "bin")


@pytest.mark.parametrize("allow_pickle", [False, True])
def test_pickles_of_the_hub_are_fetched_only_when_they_are_allowed(save, monkeypatch, allow_pickle):
    folder, asked = Path(save()[1]), []
    to_pickle(folder)

    def download(source, *, allow_patterns, ignore_patterns):
        asked.append((source, allow_patterns))
        listed = {f"{place}model.{end}": end for place in ("", "onnx/") for end in ENDS}
        listed |= {"consolidated.safetensors": "", "consolidated-00001-of-2.bin": ""}
        kinds = {"allow_patterns": allow_patterns, "ignore_patterns": ignore_patterns}
        fetched = {*filter_repo_objects(listed, **kinds)}
        assert fetched == {f"model.{end}" for end in ENDS[: 2 + allow_pickle]}
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    if allow_pickle:
        assert Q in open_checkpoint("someone/model", allow_pickle=True).shapes
    else:
        with pytest.raises(ValueError, match="allow_pickle=True"):
            open_checkpoint("someone/model")
    [(source, patterns)] = asked
    assert source == "someone/model" and {"*.safetensors", "*.json"} <= set(patterns)
    assert ("*.bin" in patterns) == allow_pickle


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.float8_e4m3fn, "F8_E4M3"),
        (torch.int8, "I8"),
        (torch.uint8, "U8"),
        (torch.int32, "I32"),  # as GPTQ and AWQ pack them
    ],
)
def test_quantised_weights_are_refused(save, dtype, name):
    base, tuned = save()
    edit(tuned, lambda t: t.update({Q: t[Q].to(dtype)}))
    refuse(base, tuned, Q, name, "dequantise")
    to_pickle(tuned)
    with pytest.raises(ValueError, match=f"{Q} is stored as .*: dequantise it, then compare"):
        open_pair(base, tuned, allow_pickle=True)


def test_a_config_that_tells_of_quantised_weights_is_refused(save):
    base, tuned = save()
    config = json.loads((Path(tuned) / "config.json").read_text())
    (Path(tuned) / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "gptq"}})
    )
    refuse(base, tuned, "quantised")


def test_a_missing_path_is_never_looked_up(save, monkeypatch):
    base, tuned = save()

    def no_network(*arguments, **named):
        raise AssertionError("a path was looked up on the hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", no_network)
    for path in (f"{tuned}-2", "./nowhere", "nowhere"):
        refuse(base, path, "nowhere" if "nowhere" in path else "tuned-2")


def test_an_adapter_is_no_checkpoint(save, tmp_path):
    base, _ = save()
    get_peft_model(build("llama"), LoraConfig(r=2)).save_pretrained(tmp_path / "adapter")
    refuse(
        base, str(tmp_path / "adapter"), "adapter is an adapter", "inspect it alone, or merge it"
    )
    refuse(str(tmp_path / "adapter"), base, "adapter is an adapter", "merge it")


def test_an_adapter_of_the_hub_is_no_checkpoint(save, tmp_path, monkeypatch):
    base, _ = save()
    get_peft_model(build("llama"), LoraConfig(r=2)).save_pretrained(tmp_path / "adapter")
    found = str(tmp_path / "adapter")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: found)
    refuse(base, "someone/lora", "someone/lora is an adapter, not a model")


@pytest.mark.parametrize("text", ["{", "[1]", ""])
def test_a_torn_config_is_named(save, text):
    base, tuned = save()
    (Path(tuned) / "config.json").write_text(text)
    refuse(base, tuned, "tuned/config.json")
