"""Adapters: PEFT reads and merges them to the cut, names alone tell where, a folder is whole."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pairs
import pytest
import torch
import transformers
from loras import planted
from pairs import LLAMA_LIKE, SIGMA, SMALL, Q, build, edit
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from deltarank import adapters, peft_format
from deltarank.adapters import extract_adapter
from deltarank.alignment import open_pair
from deltarank.compare import compare_checkpoints
from deltarank.peft_format import find_places
from deltarank.ranks import ranks_of, recommend_ranks
from deltarank.spectra import truncate

T5 = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_heads": 2, "vocab_size": 64, "num_layers": 2}
MORE = {
    "bart": ("BartForConditionalGeneration", {"d_model": 32, "vocab_size": 64}),
    "bert classifier": ("BertForSequenceClassification", SMALL | {"intermediate_size": 48}),
    "bert base": ("BertModel", SMALL | {"intermediate_size": 48}),
    "bloom": ("BloomForCausalLM", {"hidden_size": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64}),
    "cohere": ("CohereForCausalLM", LLAMA_LIKE | {"use_qk_norm": True}),
    "distilbert": (
        "DistilBertForMaskedLM",
        {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48, "vocab_size": 64},
    ),
    "falcon": ("FalconForCausalLM", SMALL),
    "gemma 2": ("Gemma2ForCausalLM", LLAMA_LIKE),
    "gpt_neox": ("GPTNeoXForCausalLM", SMALL | {"intermediate_size": 48}),
    "granite": ("GraniteForCausalLM", LLAMA_LIKE),
    "llama base": ("LlamaModel", LLAMA_LIKE),
    "mistral": ("MistralForCausalLM", LLAMA_LIKE),
    "olmo2": ("Olmo2ForCausalLM", LLAMA_LIKE),
    "opt": ("OPTForCausalLM", SMALL | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "phi": ("PhiForCausalLM", SMALL | {"intermediate_size": 48}),
    "qwen 3": ("Qwen3ForCausalLM", LLAMA_LIKE),
    "qwen 3 mixture": (
        "Qwen3MoeForCausalLM",
        LLAMA_LIKE | {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
    ),
    "roberta": ("RobertaForMaskedLM", SMALL | {"intermediate_size": 48}),
    "t5": ("T5ForConditionalGeneration", T5),
}
BART = {f"{side}_{size}": n for side in ("encoder", "decoder") for size, n in
        {"layers": 2, "attention_heads": 2, "ffn_dim": 48}.items()}  # fmt: skip
MORE["bart"] = (MORE["bart"][0], MORE["bart"][1] | BART)
ALL = pairs.ARCHITECTURES | MORE


@pytest.fixture(autouse=True)
def more_architectures(monkeypatch):
    monkeypatch.setattr(pairs, "ARCHITECTURES", ALL)


# What PEFT makes of them


RICHER = {"patterns": True, "norms": True}


def config_of(folder):
    return json.loads((Path(folder) / "adapter_config.json").read_text())


def factors_of(folder):
    return load_file(Path(folder) / "adapter_model.safetensors")


def product(tensors, module):
    """B @ A of a module as a file holds them, in float64."""
    at = f"base_model.model.{module}"
    return tensors[f"{at}.lora_B.weight"].double() @ tensors[f"{at}.lora_A.weight"].double()


def merges_to_the_cut(architecture, folders, out, rank, **form):
    """Write the adapter; the merged model is the base plus what the report says; the report."""
    report = extract_adapter(*folders, str(out), rank=rank, **form).set_index("name")
    model = build(architecture)
    W0 = {name: weight.clone() for name, weight in model.named_parameters()}
    W1 = dict(type(model).from_pretrained(folders[1]).named_parameters())
    merged = PeftModel.from_pretrained(model, out).merge_and_unload()
    for name, weight in merged.named_parameters():
        dW = W1[name] - W0[name]
        part = report["part"].get(name, "unchanged")
        if part == "lora":
            dW = truncate(dW, min(rank, *dW.shape))
        elif part != "modules_to_save":
            dW = torch.zeros_like(dW)
        torch.testing.assert_close(weight, W0[name] + dW, rtol=0, atol=1e-6)
    return report


@pytest.mark.filterwarnings("error:Found missing adapter keys")
@pytest.mark.parametrize(
    ("architecture", "rank"),
    [*((name, rank) for name in pairs.ARCHITECTURES for rank in (2, 8)), *((n, 8) for n in MORE)],
)
def test_an_adapter_merges_to_the_cut_model(save, tmp_path, architecture, rank):
    folders, out = save(architecture), tmp_path / "adapter"
    report = merges_to_the_cut(architecture, folders, out, rank)
    lora = report[report["part"] == "lora"]
    assert len(lora) >= 8
    W0 = dict(build(architecture).named_parameters())
    kept = lora.loc[[name for name in lora.index if min(W0[name].shape) > 2], "kept"]
    expected = float(SIGMA[:rank].square().sum() / SIGMA.square().sum())
    assert (kept - expected).abs().max() < 1e-4
    if architecture in ("gpt-oss", "mixtral"):
        assert (report["part"] == "dropped").any()  # experts: said, not silent
    if architecture in ("llama", "gemma"):
        assert report.loc["model.norm.weight", "part"] == "left_out"


@pytest.mark.parametrize("architecture", ["llama", "gemma", "gpt2", "bert"])
def test_one_rank_and_no_pattern_is_what_other_programs_read(save, tmp_path, architecture):
    """llama.cpp scales a tensor by alpha over its own rank, vLLM refuses modules_to_save."""
    folders, out = save(architecture), tmp_path / "adapter"
    report = merges_to_the_cut(architecture, folders, out, 20)
    ranks = set(report.loc[report["part"] == "lora", "rank"])
    assert ranks == ({16, 20} if architecture in ("llama", "gemma") else {20})
    config = config_of(out)
    assert config["r"] == config["lora_alpha"] == 20
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["modules_to_save"] is None and config["bias"] == "none"
    tensors = factors_of(out)
    assert {re.sub(r".*lora_", "", name) for name in tensors} == {"A.weight", "B.weight"}
    stored = {W.shape[0] if "lora_A" in name else W.shape[1] for name, W in tensors.items()}
    assert stored == {20}


@pytest.mark.filterwarnings("error:Found missing adapter keys")
@pytest.mark.parametrize("architecture", ["llama", "gemma", "gpt2", "bert"])
def test_the_richer_form_of_peft_keeps_ranks_and_norms(save, tmp_path, architecture):
    folders, out = save(architecture), tmp_path / "adapter"
    report = merges_to_the_cut(architecture, folders, out, 20, **RICHER)
    norms = [name for name in report.index if "norm" in name.lower() and "bias" not in name]
    assert norms or architecture == "gpt2"  # ln_1, ln_f: left as they were
    assert set(report.loc[norms, "part"]) <= {"modules_to_save"}
    tensors = factors_of(out)
    for module in report.attrs["lora"]["target_modules"]:
        at, rank = f"base_model.model.{module}", ranks_of(report.attrs["lora"], [module])[module]
        assert tensors[f"{at}.lora_A.weight"].shape[0] == rank
        assert tensors[f"{at}.lora_B.weight"].shape[1] == rank
    assert bool(config_of(out)["rank_pattern"]) == (architecture in ("llama", "gemma"))


@pytest.mark.parametrize("form", [{}, RICHER])
@pytest.mark.parametrize("architecture", ["llama", "gemma", "gpt2", "bert"])
def test_the_config_is_the_one_that_peft_writes(save, tmp_path, architecture, form):
    base, tuned = save(architecture)
    report = extract_adapter(base, tuned, str(tmp_path / "ours"), rank=20, **form)
    saved = {n.rpartition(".")[0] for n in report.query("part == 'modules_to_save'")["name"]}
    config = LoraConfig(
        **report.attrs["lora"],
        task_type="CAUSAL_LM" if architecture != "bert" else None,
        fan_in_fan_out=architecture == "gpt2",
        modules_to_save=sorted(saved) or None,
        base_model_name_or_path=base,
        inference_mode=True,
    )
    config.save_pretrained(tmp_path / "theirs")
    ours, theirs = (LoraConfig.from_pretrained(tmp_path / name) for name in ("ours", "theirs"))
    assert ours.to_dict() == theirs.to_dict()


@pytest.mark.parametrize(
    ("architecture", "causal"),
    [
        ("Qwen3ForCausalLM", True),
        ("OpenAIGPTLMHeadModel", True),
        ("T5WithLMHeadModel", False),
        ("BertForMaskedLM", False),
    ],
)
def test_the_name_of_the_class_tells_whether_a_model_is_causal(save, architecture, causal):
    pair = open_pair(*save())
    pair.base.config["architectures"] = [architecture]
    assert pair.is_causal() == causal


@pytest.mark.parametrize("architecture", ["llama", "qwen 3"])
def test_the_adapted_model_computes_the_logits_of_the_cut(save, tmp_path, architecture):
    folders, out = save(architecture, norms=False), tmp_path / "adapter"
    extract_adapter(*folders, str(out), rank=20)
    model, tokens = build(architecture).eval(), torch.arange(64)[None]
    cut = build(architecture).eval()
    W1 = dict(type(model).from_pretrained(folders[1]).named_parameters())
    with torch.no_grad():
        for name, weight in cut.named_parameters():
            if weight.dim() == 2:
                weight += truncate(W1[name] - weight, min(20, *weight.shape))
        expected, before = cut(tokens).logits, model(tokens).logits
        found = PeftModel.from_pretrained(model, out)(tokens).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert (expected - before).abs().max() > 1e-3


def test_a_base_of_the_hub_is_named_by_its_id(save, tmp_path, monkeypatch):
    base, tuned = save()
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: base)
    extract_adapter("someone/model", tuned, str(tmp_path / "out"), rank=2)
    assert config_of(tmp_path / "out")["base_model_name_or_path"] == "someone/model"
    extract_adapter(base, tuned, str(tmp_path / "out"), rank=2)
    assert config_of(tmp_path / "out")["base_model_name_or_path"] == base


@pytest.mark.filterwarnings("error:Found missing adapter keys")
def test_norms_whose_names_end_alike_are_saved_together(save, tmp_path):
    """PEFT takes the norm of a model without a head for every module whose name ends in norm."""
    base, tuned = save("llama base", norms=False)
    edit(tuned, lambda t: t["norm.weight"].add_(0.5))
    report = extract_adapter(base, tuned, str(tmp_path / "out"), rank=2, norms=True)
    assert report.query("part == 'modules_to_save'")["name"].tolist() == ["norm.weight"]
    merged = PeftModel.from_pretrained(build("llama base"), tmp_path / "out").merge_and_unload()
    after = (
        merged.get_parameter("norm.weight"),
        merged.get_parameter("layers.0.input_layernorm.weight"),
    )
    assert [float(weight[0]) for weight in after] == [1.5, 1.0]


def test_neither_transformers_nor_peft_is_imported(save, tmp_path):
    base, tuned = save()
    code = (
        "import sys; from deltarank.adapters import extract_adapter; extract_adapter(*sys.argv[1:],"
        " energy=0.9); print(*{name.split('.')[0] for name in sys.modules})"
    )
    command = [sys.executable, "-c", code, base, tuned, str(tmp_path / "out")]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert (tmp_path / "out" / "adapter_config.json").exists() and "torch" in loaded
    assert {"transformers", "peft", "accelerate", "matplotlib"}.isdisjoint(loaded)


def test_an_adapter_recovers_a_merged_lora(tmp_path):
    model = build("llama")
    model.save_pretrained(tmp_path / "base")
    torch.manual_seed(3)
    lora = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    products = {}
    with torch.no_grad():
        for name, layer in lora.named_modules():
            if hasattr(layer, "get_delta_weight"):
                layer.lora_B["default"].weight.normal_(std=0.02)
                products[name] = layer.get_delta_weight("default").clone()
    assert len(products) == 14
    lora.merge_and_unload().save_pretrained(tmp_path / "tuned")
    folders = str(tmp_path / "base"), str(tmp_path / "tuned")
    report = extract_adapter(*folders, str(tmp_path / "out"), energy=0.9999)
    assert set(report["rank"]) == {4} and set(report["part"]) == {"lora"}
    tensors = factors_of(tmp_path / "out")
    for name, update in products.items():
        found = tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
        torch.testing.assert_close(found, update, rtol=0, atol=1e-6)


def test_ranks_differ_by_matrix(save, tmp_path):
    base, tuned = save()
    table = compare_checkpoints(base, tuned)
    lora = recommend_ranks(table, budget=1500)
    report = extract_adapter(base, tuned, str(tmp_path / "out"), ranks=lora, patterns=True)
    used = report[report["part"] == "lora"].set_index("name")
    sides = table.set_index("name").loc[used.index, "shape"].map(sum)
    assert 0.9 * 1500 < (used["rank"] * sides).sum() <= 1500
    assert used["rank"].nunique() > 1
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path / "out")
    ranks = {m.r["default"] for m in loaded.modules() if hasattr(m, "get_delta_weight")}
    assert ranks == set(used["rank"])


def test_a_head_of_classes_is_adapted_by_every_rule(tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**pairs.LLAMA_LIKE, num_labels=4, pad_token_id=0)
    model = transformers.LlamaForSequenceClassification(config)
    model.save_pretrained(tmp_path / "base")
    for name, weight in model.named_parameters():
        if pairs.is_layer_matrix(name, weight) or name == "score.weight":
            pairs.plant(weight.data, torch.Generator().manual_seed(1))
    model.save_pretrained(tmp_path / "tuned")
    folders = str(tmp_path / "base"), str(tmp_path / "tuned")
    for rule in ({"rank": 2}, {"energy": 0.9}):
        report = extract_adapter(*folders, str(tmp_path / "out"), **rule).set_index("name")
        assert {*report["part"]} == {"lora"} and report.loc["score.weight", "rank"] > 0


def test_a_budget_is_spent_on_what_the_adapter_holds(save, tmp_path):
    """Not on what is dropped: experts, and what is a matrix and no linear layer."""
    folders = save("mixtral")
    for folder, scale in zip(folders, (0, 1), strict=True):
        A_log = scale * torch.eye(32)
        edit(folder, lambda t, A_log=A_log: t.update({"model.layers.0.A_log": A_log}))
    report = extract_adapter(*folders, str(tmp_path / "out"), budget=1000, patterns=True)
    tensors = factors_of(tmp_path / "out")
    assert 900 < sum(W.numel() for W in tensors.values()) <= 1000
    dropped = report[report["name"].str.contains("experts|gate|A_log")]
    assert len(dropped) == 2 * (3 * 3 + 1) + 1 and set(dropped["part"]) == {"dropped"}


def test_the_largest_rank_is_that_of_all_and_changes_no_product(save, tmp_path):
    base, tuned = save()
    lora = recommend_ranks(compare_checkpoints(base, tuned), budget=1100)
    own = extract_adapter(base, tuned, str(tmp_path / "own"), ranks=lora, patterns=True)
    one = extract_adapter(base, tuned, str(tmp_path / "one"), ranks=lora)
    assert own["rank"].tolist() == one["rank"].tolist()
    assert one.attrs["lora"]["r"] == own["rank"].max() > own.attrs["lora"]["r"]
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path / "one")
    layers = [m for m in loaded.modules() if hasattr(m, "get_delta_weight")]
    assert {m.r["default"] for m in layers} == {own["rank"].max()}
    assert {m.scaling["default"] for m in layers} == {1.0}
    before, after = (factors_of(tmp_path / name) for name in ("own", "one"))
    for module in one.attrs["lora"]["target_modules"]:
        assert torch.equal(product(before, module), product(after, module))


def test_ranks_beyond_a_matrix_give_all_it_has(save, tmp_path):
    base, tuned = save()
    lora = {"r": 20, "lora_alpha": 20, "rank_pattern": {}, "alpha_pattern": {}}
    lora["target_modules"] = ["model.layers.0.self_attn.k_proj"]
    report = extract_adapter(base, tuned, str(tmp_path / "out"), ranks=lora).set_index("name")
    assert report.loc["model.layers.0.self_attn.k_proj.weight", "rank"] == 16
    assert (report["part"] == "lora").sum() == 1


# What the names tell

LLAMA_CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 64}


def what_transformers_says(model):
    """Places of a model's tensors by the classes of its modules, {tensor: kind}."""
    kinds, head = {}, model.get_output_embeddings()
    for name, weight in model.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, nn.Linear | Conv1D):
            if module is not head and weight.dim() == 2:
                kinds[name] = "conv1d" if isinstance(module, Conv1D) else "linear"
        elif all(p.dim() == 1 for p in module.parameters()):
            kinds[name] = "norm"
    return kinds


def what_the_names_say(config, shapes):
    places = find_places(config, shapes)
    kinds = {p: "conv1d" if n in places.conv1d else "linear" for n, p in places.linear.items()}
    return kinds | dict.fromkeys(places.norms.values(), "norm")


@pytest.mark.parametrize("architecture", ALL)
def test_names_tell_what_transformers_says(architecture):
    model = build(architecture)
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    told = what_transformers_says(model)
    assert {"linear", "conv1d"} & {*told.values()} and "norm" in told.values()
    assert what_the_names_say(config, shapes) == told


@pytest.mark.parametrize(
    ("architecture", "prefix"),
    [
        ("gpt2", "transformer."),
        ("bloom", "transformer."),
        ("falcon", "transformer."),
        ("bert", "bert."),
        ("bert classifier", "bert."),
        ("roberta", "roberta."),
        ("distilbert", "distilbert."),
        ("gpt_neox", "gpt_neox."),
        ("opt", "model."),
        ("bart", "model."),
        ("llama", "model."),
    ],
)
def test_a_prefix_that_the_file_lacks_is_put_back(architecture, prefix):
    model = build(architecture)
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    bare = {name.removeprefix(prefix): shape for name, shape in shapes.items()}
    assert bare.keys().isdisjoint(name for name in shapes if name.startswith(prefix))
    assert what_the_names_say(config, bare) == what_the_names_say(config, shapes)


@pytest.mark.parametrize(
    ("architecture", "prefix"), [("bert base", "bert."), ("llama base", "model.")]
)
def test_a_prefix_that_the_model_lacks_is_taken_away(architecture, prefix):
    model = build(architecture)
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    longer = {prefix + name: shape for name, shape in shapes.items()}
    assert what_the_names_say(config, longer) == what_the_names_say(config, shapes)


@pytest.mark.parametrize("sides", [["base"], ["tuned"], ["base", "tuned"]])
def test_a_file_without_its_prefix_gives_the_same_adapter(save, tmp_path, sides):
    def strip(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)

    folders = save("gpt2")
    extract_adapter(*folders, str(tmp_path / "with"), rank=2)
    for side in sides:
        edit(tmp_path / side, strip)
    extract_adapter(*folders, str(tmp_path / "without"), rank=2)
    found, expected = (factors_of(tmp_path / name) for name in ("without", "with"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("rows", "head"),
    [
        ({"model.embed_tokens.weight": (64, 32)}, (64, 32)),  # as padded as the embedding
        ({"model.embed_tokens.weight": (64, 32)}, (60, 32)),  # as config.json says
        ({}, (60, 32)),
    ],
)
def test_the_head_of_the_vocabulary_gets_no_factors(rows, head):
    shapes = {Q: (32, 32), "lm_head.weight": head} | rows
    assert find_places(LLAMA_CONFIG | {"vocab_size": 60}, shapes).linear == {Q: Q}


PARTS = {"text_config": {"model_type": "gemma3_text", "vocab_size": 64}, "model_type": "gemma3"}


@pytest.mark.parametrize(
    ("change", "names", "problem"),
    [
        ({"model_type": "nemotron_h"}, [Q], "modules of nemotron_h are not named as in its file"),
        ({"architectures": None}, [Q], "names no architecture"),
        ({"vocab_size": None, "model_type": "vit"}, [Q], "vit is no language model"),
        ({"model_type": "novel"}, [Q.removeprefix("model.")], "lack the prefix"),
        (
            {"architectures": ["LlamaForQuestionAnswering"]},
            [Q.removeprefix("model.")],
            "lack the prefix that LlamaForQuestionAnswering gives them",
        ),
        (PARTS, [f"language_model.{Q}"], "modules of gemma3 are not named as in its file"),
    ],
)
def test_what_names_cannot_tell_is_refused(change, names, problem):
    config = {key: value for key, value in (LLAMA_CONFIG | change).items() if value is not None}
    with pytest.raises(ValueError, match=problem) as raised:
        find_places(config, dict.fromkeys(names, (32, 32)))
    assert "\n" not in str(raised.value)


def test_of_a_model_of_parts_the_language_model_is_adapted():
    config = PARTS | {"architectures": ["Gemma3ForConditionalGeneration"]}
    inner, seen = Q.replace("model.", "model.language_model."), "model.vision_tower.head.weight"
    shapes = dict.fromkeys([inner, seen], (32, 32)) | {"lm_head.weight": (64, 32)}
    assert find_places(config, shapes).linear == {inner: inner}


def test_old_names_of_norms_are_dropped(save, tmp_path):
    """A file of BERT's first years: its norms' gamma and beta are weight and bias in the model."""

    def age(tensors):
        for name in [n for n in tensors if "LayerNorm." in n]:
            old = name.replace("weight", "gamma").replace("bias", "beta")
            tensors[old] = tensors.pop(name)

    folders = save("bert")
    for side in ("base", "tuned"):
        edit(tmp_path / side, age)
    report = extract_adapter(*folders, str(tmp_path / "out"), rank=2)
    norms = report[report["name"].str.contains("gamma|beta")]
    assert len(norms) and set(norms["part"]) == {"dropped"}


# In which type


@pytest.mark.parametrize(("dtype", "most"), [("bfloat16", 1e-5), ("float16", 2e-7)])
def test_what_rounding_loses_is_measured(save, tmp_path, dtype, most):
    folders = save()
    exact = extract_adapter(*folders, str(tmp_path / "exact"), rank=2)
    rounded = extract_adapter(*folders, str(tmp_path / "rounded"), rank=2, dtype=dtype)
    assert set(exact["rounding"]) == {0.0}
    before, after = (factors_of(tmp_path / name) for name in ("exact", "rounded"))
    assert {W.dtype for W in after.values()} == {getattr(torch, dtype)}
    rows = zip(exact.itertuples(), rounded.itertuples(), strict=True)
    for one, other in [pair for pair in rows if pair[0].part == "lora"]:
        module = one.name.removesuffix(".weight")
        lost = (product(before, module) - product(after, module)).square().sum()
        assert other.rounding == pytest.approx(float(lost) / one.squared_norm, rel=1e-3)
        assert one.kept - other.kept == pytest.approx(other.rounding, rel=1e-3)
        assert 0 < other.rounding < most and other.best == one.best


@pytest.mark.parametrize("scale", [1e-3, 1e6])
def test_float16_keeps_small_and_large_updates(save, tmp_path, scale):
    """Factors of sqrt(sigma) each stay where float16 has all its digits."""
    folders = save()
    for side in ("base", "tuned"):
        edit(tmp_path / side, lambda t: [W.mul_(scale) for W in t.values()])
    report = extract_adapter(*folders, str(tmp_path / "out"), rank=2, dtype="float16")
    assert report["rounding"].max() < 2e-7


def test_what_float16_cannot_hold_is_refused(save, tmp_path):
    folders, out = save(), tmp_path / "adapters" / "out"
    for side in ("base", "tuned"):
        edit(tmp_path / side, lambda t: [W.mul_(1e15) for W in t.values()])
    with pytest.raises(ValueError, match="proj: its factors exceed .*float16: choose .*bfloat16"):
        extract_adapter(*folders, str(out), rank=2, dtype="float16")
    assert list(out.parent.iterdir()) == []
    report = extract_adapter(*folders, str(out), rank=2, dtype="bfloat16")
    assert report["rounding"].max() < 1e-5


def test_norms_are_not_rounded(save, tmp_path):
    folders = save()
    extract_adapter(*folders, str(tmp_path / "out"), rank=2, dtype="bfloat16", **RICHER)
    name = "model.norm.weight"
    found = factors_of(tmp_path / "out")[f"base_model.model.{name}"]
    assert torch.equal(found, load_file(f"{folders[1]}/model.safetensors")[name])


def test_a_type_that_is_none_of_the_three_is_refused_before_any_work(tmp_path):
    with pytest.raises(ValueError, match="dtype='int8': choose one of float32, bfloat16, float16"):
        extract_adapter("base", "tuned", str(tmp_path / "out"), rank=2, dtype="int8")


# Whole or not at all


def contents(folder):
    return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


def test_an_adapter_is_written_whole_or_not_at_all(save, tmp_path, monkeypatch):
    base, tuned = save()
    out, calls = tmp_path / "adapters" / "out", []
    out.parent.mkdir()
    original = adapters.leading_eigenvectors

    def fail(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return original(*arguments, **options)

    monkeypatch.setattr(adapters, "leading_eigenvectors", fail)
    with pytest.raises(OSError, match="No space"):
        extract_adapter(base, tuned, str(out), rank=2)
    assert list(out.parent.iterdir()) == []
    extract_adapter(base, tuned, str(out), rank=2)
    first = contents(out)
    calls.clear()
    with pytest.raises(OSError, match="No space"):
        extract_adapter(base, tuned, str(out), rank=1)
    assert contents(out) == first and list(out.parent.iterdir()) == [out]


def test_a_second_extraction_replaces_the_first(save, tmp_path):
    base, tuned = save()
    home = tmp_path / "adapters"
    home.mkdir()
    extract_adapter(base, tuned, str(home / "other"), rank=1)
    extract_adapter(base, tuned, str(home / "out"), rank=2)
    (home / "out" / "README.md").write_text("a card")
    extract_adapter(base, tuned, str(home / "out"), rank=1)
    assert (home / "out" / "README.md").read_text() == "a card"  # a reader's work, not ours
    (home / "out" / "README.md").unlink()
    assert contents(home / "out") == contents(home / "other")
    assert {file.name for file in home.iterdir()} == {"other", "out"}


def test_an_empty_folder_is_filled(save, tmp_path):
    out = tmp_path / "out"
    out.mkdir(mode=0o700)
    extract_adapter(*save(), str(out), rank=1)
    assert len(contents(out)) == 2 and {*tmp_path.glob(".*")} == set()


def test_an_adapter_can_be_read_by_others(save, tmp_path):
    extract_adapter(*save(), str(tmp_path / "out"), rank=1)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("stranger", ["notes.txt", "config.json", None])
def test_a_folder_that_is_no_adapter_stays(save, tmp_path, monkeypatch, stranger):
    base, tuned = save()
    out = tmp_path / "out"
    if stranger:
        extract_adapter(base, tuned, str(out), rank=1)
        (out / stranger).write_text("mine")
    else:
        out.mkdir()
        (out / "README.md").write_text("mine")
    before = contents(out)

    def work(*arguments, **options):
        raise AssertionError("work was done before the folder was refused")

    monkeypatch.setattr(adapters, "open_pair", work)
    with pytest.raises(FileExistsError, match=f"{out} exists and is no adapter: name another"):
        extract_adapter(base, tuned, str(out), rank=1)
    assert contents(out) == before


def test_an_adapter_that_was_trained_stays(save, tmp_path):
    """Not the command's own, nor what stands in its place without weights."""
    trained, own = planted(tmp_path / "trained", "plain"), str(tmp_path / "own")
    before, pair = contents(Path(trained)), save()
    with pytest.raises(FileExistsError, match="trained holds an adapter without the mark"):
        extract_adapter(*pair, trained, rank=1)
    assert contents(Path(trained)) == before
    for rank in (1, 2):
        extract_adapter(*pair, own, rank=rank)
    assert json.loads(Path(own, "adapter_config.json").read_text())["r"] == 2
    Path(own, "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(FileExistsError, match="name another folder, or delete it"):
        extract_adapter(*pair, own, rank=1)


def test_a_file_in_the_place_of_the_folder_stays(save, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(FileExistsError, match="name another folder"):
        extract_adapter(*save(), str(tmp_path / "out"), rank=1)
    assert (tmp_path / "out").read_text() == "mine"


def test_the_old_adapter_comes_back_when_the_new_one_cannot_be_put_there(
    save, tmp_path, monkeypatch
):
    base, tuned = save()
    out = tmp_path / "adapters" / "out"
    extract_adapter(base, tuned, str(out), rank=2)
    before, original = contents(out), os.rename

    def rename(source, target):
        if Path(target) == out and not str(source).endswith("-old"):
            raise OSError("the disk is gone")
        original(source, target)

    monkeypatch.setattr(peft_format.os, "rename", rename)
    with pytest.raises(OSError, match="disk is gone"):
        extract_adapter(base, tuned, str(out), rank=1)
    assert contents(out) == before and list(out.parent.iterdir()) == [out]


# Numbers at the edges


@pytest.mark.parametrize("side", ["base", "tuned"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_of_nan_and_inf_names_file_and_tensor(save, tmp_path, side, value):
    folders = save()
    edit(tmp_path / side, lambda t: t[Q].view(-1)[7:8].fill_(value))
    with pytest.raises(ValueError, match=f"{side}/model.safetensors: {Q} .*repair"):
        extract_adapter(*folders, str(tmp_path / "out"), rank=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_an_adapter_is_the_same_at_any_scale(save, tmp_path, scale):
    folders = save()
    plain = extract_adapter(*folders, str(tmp_path / "plain"), rank=2)
    for side in ("base", "tuned"):
        edit(tmp_path / side, lambda t: [W.mul_(scale) for W in t.values()])
    scaled = extract_adapter(*folders, str(tmp_path / "scaled"), rank=2)
    used = plain["part"] == "lora"
    for column in ("kept", "best"):
        assert scaled[used][column].tolist() == pytest.approx(plain[used][column].tolist())
    found, exact = (
        product(factors_of(tmp_path / name), Q.removesuffix(".weight"))
        for name in ("scaled", "plain")
    )
    torch.testing.assert_close(found / scale, exact, rtol=0, atol=1e-7)


def test_an_adapter_of_doubles_sees_an_update_below_the_rounding_of_floats(save, tmp_path):
    base, tuned = save()
    W0 = load_file(f"{base}/model.safetensors")[Q].double()
    update = 1e-11 * torch.outer(torch.arange(1.0, 33), torch.ones(32)).double()
    edit(base, lambda t: t.update({Q: W0}))
    edit(tuned, lambda t: t.update({Q: W0 + update}))
    report = extract_adapter(base, tuned, str(tmp_path / "out"), rank=1).set_index("name")
    assert report.loc[Q, "squared_norm"] == pytest.approx(float(update.square().sum()), rel=1e-3)
    assert report.loc[Q, "kept"] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("scale", [1e60, 1e-60])
def test_an_update_of_doubles_out_of_the_range_of_floats_is_named(save, tmp_path, scale):
    base, tuned = save()
    update = scale * torch.ones(32, 32, dtype=torch.float64)
    edit(base, lambda t: t.update({Q: torch.zeros_like(update)}))
    edit(tuned, lambda t: t.update({Q: update}))
    with pytest.raises(ValueError, match=f"{Q}: .*float32: rescale"):
        extract_adapter(base, tuned, str(tmp_path / "out"), rank=2)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=f"{Q}: .*float32: rescale"):
        compare_checkpoints(base, tuned)


@pytest.mark.parametrize("rank", [0, 33])
def test_a_rank_out_of_range_is_refused(save, tmp_path, rank):
    with pytest.raises(ValueError, match=f"rank={rank}: choose one from 1 to 32"):
        extract_adapter(*save(), str(tmp_path / "out"), rank=rank)


def test_a_smaller_matrix_gets_all_it_has(save, tmp_path):
    report = extract_adapter(*save(), str(tmp_path / "out"), rank=20).set_index("name")
    assert report.loc["model.layers.0.self_attn.k_proj.weight", "rank"] == 16
    assert report.loc[Q, "rank"] == 20


@pytest.mark.parametrize("named", [None, [], [None], "LlamaForCausalLM"])
def test_a_config_that_names_no_architecture_in_a_list_is_refused(save, named):
    base, tuned = save()
    config = Path(base, "config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"architectures": named}))
    with pytest.raises(ValueError, match="config.json of .* names no architecture in a list"):
        extract_adapter(base, tuned, f"{base}-out", rank=1)
