"""An adapter as input: spectra of PEFT's own merge, and a name for all that is no plain LoRA."""

import dataclasses
import json
import math
import warnings

import pairs
import pytest
import torch
from loras import CONFIGS, edit_lora, merged_updates, planted, write_lora
from pairs import LLAMA_LIKE, Q, build
from peft import BOFTConfig, LoHaConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file

from deltarank.compare import compare_checkpoints
from deltarank.lora import STARTS, VARIANTS, open_lora
from deltarank.ranks import ranks_of, recommend_ranks

QA, QB = (f"base_model.model.{Q.removesuffix('weight')}lora_{side}.weight" for side in "AB")


@pytest.fixture(autouse=True)
def qwen_3(monkeypatch):
    more = {"qwen 3": ("Qwen3ForCausalLM", LLAMA_LIKE)}
    monkeypatch.setattr(pairs, "ARCHITECTURES", pairs.ARCHITECTURES | more)


# What is read


@pytest.mark.parametrize("name", CONFIGS)
def test_spectra_are_those_of_the_merge_of_peft(tmp_path, name):
    table = open_lora(planted(tmp_path / "lora", name)).spectra().set_index("name")
    updates = merged_updates(tmp_path / "lora", CONFIGS[name][0])
    assert set(table.index) == set(updates)
    for weight, dW in updates.items():
        S, row = torch.linalg.svdvals(dW), table.loc[weight]
        assert row["shape"] == tuple(dW.shape)
        torch.testing.assert_close(
            row["S"].double(), S[: len(row["S"])], rtol=0, atol=float(1e-6 * S[0])
        )
        assert S[len(row["S"]) :].sum() < 1e-6 * S[0], "all that the update has"
        assert row["squared_norm"] == pytest.approx(float(dW.square().sum()), rel=1e-5)


def test_the_table_has_the_columns_of_a_pair_that_apply(tmp_path, save):
    pair = compare_checkpoints(*save())
    table = open_lora(planted(tmp_path / "lora", "patterns")).spectra()
    lacks = {"dtype_base", "changed_share", "above_rounding", "base_rounding_share"}
    assert set(pair.columns) - set(table.columns) == lacks
    assert set(table.columns) - set(pair.columns) == {"lora_rank", "scale"}
    assert table.attrs.keys() == pair.attrs.keys()
    row = table.set_index("name").loc[Q]
    assert (row["layer"], row["module"], row["kind"]) == (0, "q_proj", "matrix")
    assert (row["lora_rank"], row["scale"], row["dtype_tuned"]) == (6, 2.0, "F32")
    unknown = table[["relative_size", "near_rounding", "above_edge", "r90_over_null"]]
    assert unknown.isna().all(axis=None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_factors_of_half_precision_are_read_as_they_are(tmp_path, dtype):
    folder = write_lora(tmp_path / "lora", dtype=dtype, r=4, target_modules=["q_proj"])
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert tensors[QA].dtype == dtype
    S = torch.linalg.svdvals(2 * tensors[QB].double() @ tensors[QA].double())  # alpha 8, rank 4
    row = open_lora(folder).spectra().set_index("name").loc[Q]
    torch.testing.assert_close(row["S"].double(), S[:4], rtol=1e-6, atol=0)


def test_a_rank_beyond_a_matrix_has_no_more_directions_than_it(tmp_path):
    folder = write_lora(tmp_path / "lora", r=24, target_modules=["k_proj"])  # (16, 32)
    table = open_lora(folder).spectra()
    assert [len(S) for S in table["S"]] == [16, 16] and set(table["lora_rank"]) == {24}
    assert recommend_ranks(table, rank=16)["r"] == 16


def test_embeddings_are_vocabulary_and_biases_are_the_rest(tmp_path):
    folder = write_lora(tmp_path / "lora", r=4, target_modules=["q_proj", "embed_tokens"])
    edit_lora(folder, lambda t: t.update({QB.replace("weight", "bias"): torch.ones(32)}))
    saved = load_file(f"{folder}/adapter_model.safetensors")
    (own,) = [W for name, W in saved.items() if name.endswith("embed_tokens.base_layer.weight")]
    assert torch.equal(own, build("llama").get_input_embeddings().weight)
    with warnings.catch_warnings(action="error"):  # it is the base's
        table = open_lora(folder).spectra()
    assert table.attrs["rest"] == {Q.replace("weight", "bias"): 4.0 * 32}  # scale 8 / 4
    row = table.set_index("name").loc["model.embed_tokens.weight"]
    assert row["kind"] == "vocabulary" and row["shape"] == (64, 32)
    edit_lora(folder, lambda t: [t.pop(n) for n in list(t) if "base_layer" in n or "bias" in n])
    dW = merged_updates(folder)["model.embed_tokens.weight"]
    torch.testing.assert_close(row["S"].double(), torch.linalg.svdvals(dW)[:4], rtol=1e-5, atol=0)
    assert ranks_of(recommend_ranks(table, rank=2), ["model.embed_tokens"]) == {
        "model.embed_tokens": 0
    }


@pytest.mark.parametrize("more", [{"modules_to_save": ["norm"]}, {"bias": "all"}])
def test_what_is_kept_whole_is_left_out_and_said(tmp_path, more):
    architecture = "gpt2" if "bias" in more else "llama"
    target = ["c_attn"] if "bias" in more else ["q_proj"]
    folder = write_lora(tmp_path / "lora", architecture, r=2, target_modules=target, **more)
    with pytest.warns(UserWarning, match=f"^{folder} keeps .* and .* more whole.*merge it") as told:
        table = open_lora(folder).spectra()
    assert len(table) == 2 and len(told) == 1 and "\n" not in str(told[0].message)


def test_a_pickle_is_read_only_when_it_is_said(tmp_path):
    folder = planted(tmp_path / "lora", "plain")
    before, file = open_lora(folder).spectra(), tmp_path / "lora" / "adapter_model.safetensors"
    torch.save(load_file(file), tmp_path / "lora" / "adapter_model.bin")
    file.unlink()
    refuse(folder, "adapter_model.bin", "allow_pickle=True")
    after = open_lora(folder, allow_pickle=True).spectra()
    assert all(map(torch.equal, before["S"], after["S"]))


def test_a_pickle_beside_safetensors_is_not_read_even_then(tmp_path):
    folder = planted(tmp_path / "lora", "plain")
    before, file = open_lora(folder).spectra(), tmp_path / "lora" / "adapter_model.safetensors"
    zeros = {name: torch.zeros_like(W) for name, W in load_file(file).items()}
    torch.save(zeros, tmp_path / "lora" / "adapter_model.bin")
    after = open_lora(folder, allow_pickle=True).spectra()
    assert all(map(torch.equal, before["S"], after["S"]))


def test_a_config_without_rank_and_alpha_has_those_of_peft(tmp_path):
    folder = write_lora(tmp_path / "lora", target_modules=["q_proj"])
    before, file = open_lora(folder).spectra(), tmp_path / "lora" / "adapter_config.json"
    config = json.loads(file.read_text())
    assert (config.pop("r"), config.pop("lora_alpha")) == (8, 8)
    file.write_text(json.dumps(config))
    after = open_lora(folder).spectra()
    assert {*after["scale"]} == {*before["scale"]} == {1.0} and {*after["lora_rank"]} == {8}


def test_an_adapter_of_the_hub_is_fetched_without_the_model_beside_it(tmp_path, monkeypatch):
    folder, asked = planted(tmp_path / "lora", "plain"), []

    def download(source, *, allow_patterns, ignore_patterns):
        asked.append((source, allow_patterns))
        assert "*/*" in ignore_patterns
        return folder

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert len(open_lora("someone/lora").spectra()) == 6
    assert asked == [("someone/lora", ["adapter_config.json", "adapter_model.safetensors"])]


# What is refused


def refuse(folder, *parts, error=ValueError):
    """The adapter is refused with one line that holds all `parts`."""
    with pytest.raises(error) as raised:
        open_lora(folder).spectra()
    for part in parts:
        assert part in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_dora_is_refused_by_name(tmp_path):
    folder = write_lora(tmp_path / "lora", r=2, use_dora=True, target_modules=["q_proj"])
    refuse(folder, "DoRA (use_dora)", "merge it (merge_and_unload), then give BASE and TUNED")
    edit_lora(folder, use_dora=False)
    refuse(folder, "lora_magnitude_vector is no factor of a plain LoRA", "merge it")


def test_all_variants_that_peft_knows_are_refused(tmp_path):
    fields = {f.name: f.metadata for f in dataclasses.fields(LoraConfig)}
    variants = {name for name, data in fields.items() if data.get("is_lora_variant")}
    assert variants <= set(VARIANTS) <= set(fields)
    assert set(fields["init_lora_weights"]["lora_variants"]).isdisjoint(STARTS)
    folder = planted(tmp_path / "lora", "plain")
    for field, name in VARIANTS.items():
        edit_lora(folder, **{field: {"some": "thing"}})
        refuse(folder, f"is a {name} ({field})", "merge it")
        edit_lora(folder, **{field: None})
    assert len(open_lora(folder).spectra()) == 6


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "mica"])
def test_a_start_that_changes_the_base_is_refused(tmp_path, start):
    edit_lora(planted(tmp_path / "lora", "plain"), init_lora_weights=start)
    refuse(str(tmp_path / "lora"), f"started by {start}, which changes the base", "merge it")


@pytest.mark.parametrize("config", [LoHaConfig(r=2), BOFTConfig(boft_block_size=4)])
def test_another_tuner_is_refused_by_name(tmp_path, config):
    config.target_modules = {"q_proj"}
    get_peft_model(build("llama"), config).save_pretrained(tmp_path / "other")
    refuse(str(tmp_path / "other"), f"of type {config.peft_type.value}", "merge it")


def test_a_convolution_is_refused(tmp_path):
    folder = planted(tmp_path / "lora", "plain")
    edit_lora(folder, lambda t: t.update({QA: torch.ones(4, 32, 3, 3)}))
    refuse(folder, QA, "(4, 32, 3, 3)")


@pytest.mark.parametrize("shape", [(0, 32), (0,)])
def test_a_module_of_rank_0_is_refused(tmp_path, shape):
    """What DeepSpeed leaves when its shards were not gathered."""
    folder = planted(tmp_path / "lora", "plain")
    edit_lora(folder, lambda t: t.update({QA: torch.ones(shape)}))
    refuse(folder, QA, "empty", "shards gathered")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_name_file_and_tensor(tmp_path, value):
    folder = planted(tmp_path / "lora", "plain")
    edit_lora(folder, lambda t: t[QB].view(-1)[3:4].fill_(value))
    refuse(folder, f"lora/adapter_model.safetensors: {QB} holds NaN or infinite")


@pytest.mark.parametrize("scale", [1e22, 1e-30])
def test_an_update_out_of_the_range_of_float32_is_refused(tmp_path, scale):
    folder = planted(tmp_path / "lora", "plain")
    edit_lora(folder, lambda t: [t[name].mul_(scale) for name in (QA, QB)])
    refuse(folder, f"{Q}: the update is out of the range of float32", "lower its alpha")


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"r": 8}, "factors of rank 4, adapter_config.json says 8"),
        ({"r": 0}, "factors of rank 4, adapter_config.json says 0"),
        ({"rank_pattern": {"q_proj": 2}}, "q_proj has factors of rank 4, adapter_config.json says"),
    ],
)
def test_a_rank_that_the_config_contradicts_is_refused(tmp_path, config, problem):
    """PEFT could not load it either, and the scale would be wrong."""
    edit_lora(planted(tmp_path / "lora", "plain"), **config)
    refuse(str(tmp_path / "lora"), problem, "correct r or rank_pattern")


def test_factors_of_two_ranks_are_refused(tmp_path):
    folder = planted(tmp_path / "lora", "plain")
    edit_lora(folder, lambda t: t.update({QB: torch.ones(32, 6)}))
    refuse(folder, "q_proj has factors of rank 4 and 6, adapter_config.json says 4")


def test_factors_without_each_other_are_refused(tmp_path):
    folder = planted(tmp_path / "lora", "plain")
    edit_lora(folder, lambda t: t.pop(QB))
    refuse(folder, "model.layers.0.self_attn.q_proj has no lora_B")
    edit_lora(folder, lambda t: [t.pop(name) for name in list(t) if "lora" in name] + [
        t.update({"base_model.model.model.norm.weight": torch.ones(32)})])  # fmt: skip
    refuse(folder, "holds no factors")


@pytest.mark.parametrize(
    "config",
    [
        {"rank_pattern": {"*q_proj": 4}},
        {"lora_alpha": None},
        {"alpha_pattern": [4]},
        {"r": "abc"},
        {"r": math.inf},
        {"r": -2, "use_rslora": True},
        {"lora_alpha": "abc"},
        {"lora_alpha": math.inf},
    ],
    ids=str,
)
def test_a_config_of_no_numbers_and_no_patterns_is_named(tmp_path, config):
    folder = planted(tmp_path / "lora", "plain")
    edit_lora(folder, **config)
    refuse(folder, "adapter_config.json: the rank or alpha of", "correct r, lora_alpha")


def test_factors_that_are_no_floats_are_refused(tmp_path):
    folder = planted(tmp_path / "lora", "plain")
    edit_lora(folder, lambda t: t.update({QA: t[QA].to(torch.float8_e4m3fn)}))
    refuse(folder, QA, "F8_E4M3", "save it as float32")


def test_folders_and_files_that_are_not_there_are_named(tmp_path, save):
    base, _ = save()
    refuse(base, "base is no adapter", "give BASE and TUNED (and OUT to extract), or one adapter")
    refuse(str(tmp_path / "nowhere"), "nowhere", "folder or a hub id")
    folder = planted(tmp_path / "lora", "plain")
    (tmp_path / "lora" / "adapter_model.safetensors").unlink()
    refuse(folder, "lora holds no adapter_model.safetensors", error=FileNotFoundError)
    (tmp_path / "lora" / "adapter_config.json").write_text("{")
    refuse(folder, "lora/adapter_config.json is torn")
