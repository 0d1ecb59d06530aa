"""Checkpoint pairs: planted updates come back, adapters merge to the cut, bad input has a name."""

import dataclasses
import gc
import json
import shutil
import subprocess
import sys
import threading

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import utils

SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "vocab_size": 64}
LLAMA_LIKE = SMALL | {"intermediate_size": 48, "num_key_value_heads": 1, "head_dim": 16}
ARCHITECTURES = {
    "llama": (transformers.LlamaForCausalLM, LLAMA_LIKE),
    "gemma": (transformers.Gemma3ForCausalLM, LLAMA_LIKE),
    "qwen": (transformers.Qwen2ForCausalLM, LLAMA_LIKE | {"tie_word_embeddings": True}),
    "gpt2": (
        transformers.GPT2LMHeadModel,
        {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 64, "n_positions": 64},
    ),
    "bert": (transformers.BertForMaskedLM, SMALL | {"intermediate_size": 48}),
    "gpt-oss": (
        transformers.GptOssForCausalLM,
        LLAMA_LIKE | {"num_local_experts": 3, "num_experts_per_tok": 2},
    ),
}
RANK, SIGMA = 3, torch.tensor([4.0, 2.0, 1.0]) * 1e-2


def build(architecture):
    """A random model of two small layers, the same at every call."""
    model_class, sizes = ARCHITECTURES[architecture]
    torch.manual_seed(0)
    config = model_class.config_class(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return model_class(config).float()


def plant(weight, generator, sigma=SIGMA):
    """Add an update with the singular values `sigma` to a weight (..., m, n) in place."""
    *experts, m, n = weight.shape
    k = min(len(sigma), m, n)
    U, V = (torch.linalg.qr(torch.randn(*experts, d, k, generator=generator)).Q for d in (m, n))
    weight += (U * sigma[:k]) @ V.transpose(-1, -2)


def is_layer_matrix(name, weight):
    return weight.dim() >= 2 and (".layers." in name or ".layer." in name or ".h." in name)


@pytest.fixture
def save(tmp_path):
    """A function that saves base and tuned of an architecture and returns their folders."""

    def write(architecture="llama", *, dtype=torch.float32, norms=True, **saving):
        model, generator = build(architecture), torch.Generator().manual_seed(1)
        model.to(dtype).save_pretrained(tmp_path / "base", **saving)
        model.float()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if is_layer_matrix(name, weight):
                    plant(weight, generator)
                elif norms and "norm" in name.lower():
                    weight += 0.01
        model.to(dtype).save_pretrained(tmp_path / "tuned", **saving)
        return str(tmp_path / "base"), str(tmp_path / "tuned")

    return write


def edit(folder, change):
    """Change the tensors of a folder with one file."""
    file = f"{folder}/model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


Q = "model.layers.0.self_attn.q_proj.weight"

# What comes back


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_planted_spectra_come_back(save, architecture):
    table = utils.compare_checkpoints(*save(architecture)).set_index("name")
    inner = table[table["kind"] != "vocabulary"]
    assert len(inner) >= 8
    for name in inner.index[inner["min_dim"] >= RANK]:
        S = table.attrs["spectra"][name][:RANK]
        torch.testing.assert_close(S, SIGMA, rtol=1e-4, atol=0)
    wide = inner[inner["min_dim"] >= 16]
    assert (wide["r90"] == 2).all()  # (16 + 4) / 21 = 0.95
    assert (wide["stable_rank"] - 21 / 16).abs().max() < 1e-3
    assert (wide["changed_share"] > 0.9).all()
    assert not wide["near_rounding"].any()
    vocabulary = table[table["kind"] == "vocabulary"]
    assert len(vocabulary) and (vocabulary["squared_norm"] == 0).all()


def test_experts_are_matrices_of_their_own(save):
    table = utils.compare_checkpoints(*save("gpt-oss"))
    experts = table[table["kind"] == "expert"]
    assert len(experts) == 2 * 2 * 3  # layers, gate_up and down, experts
    assert experts["name"].str.endswith(("[0]", "[1]", "[2]")).all()


def test_the_table_says_what_singular_values_say(save):
    base, tuned = save()
    table = utils.compare_checkpoints(base, tuned).set_index("name")
    W0, W1 = (load_file(f"{folder}/model.safetensors") for folder in (base, tuned))
    for name in table.index:
        dW = W1[name] - W0[name]
        torch.testing.assert_close(
            table.attrs["spectra"][name], utils.singular_values(dW).float(), rtol=1e-5, atol=1e-9
        )
        assert table.loc[name, "relative_size"] == pytest.approx(
            float(dW.norm() / W0[name].norm()), rel=1e-5
        )
    norm = "model.norm.weight"
    assert table.attrs["rest"][norm] == pytest.approx(float((W1[norm] - W0[norm]).norm() ** 2))


def test_slices_change_nothing(save, monkeypatch):
    """Streaming equals in-memory: slices of a few rows give the spectra of whole matrices."""
    base, tuned = save()
    pair = utils.open_pair(base, tuned)
    whole = next(iter(pair.parts(Q)))
    monkeypatch.setattr(utils, "SLICE_ENTRIES", 100)
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
    single = utils.compare_checkpoints(base, tuned)
    model = transformers.AutoModelForCausalLM.from_pretrained(tuned)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    sharded = utils.compare_checkpoints(base, str(tmp_path / "sharded"))
    assert sharded.equals(single)


def test_a_killed_comparison_goes_on(save, monkeypatch):
    base, tuned = save()
    measured, stop_at = [], 5
    original = utils._compare_matrix

    def compare(*arguments):
        measured.append(arguments[1])
        if len(measured) == stop_at:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(utils, "_compare_matrix", compare)
    with pytest.raises(KeyboardInterrupt):
        utils.compare_checkpoints(base, tuned)
    resumed = utils.compare_checkpoints(base, tuned)
    assert len(measured) == len(resumed) + 1  # only the interrupted one was measured twice
    shutil.rmtree(utils.cache_folder() / "pairs")
    assert utils.compare_checkpoints(base, tuned).equals(resumed)


# Half precision


def rounded_pair(relative_size, rank=8, n=256):
    """A rank-8 update of a given relative size, both sides rounded to bfloat16: W0, W1."""
    generator = torch.Generator().manual_seed(0)
    W0 = torch.randn(n, n, generator=generator) * 0.02
    W0 = W0.bfloat16().float()
    B, A = torch.randn(n, rank, generator=generator), torch.randn(rank, n, generator=generator)
    dW = B @ A
    dW *= relative_size * W0.norm() / dW.norm()
    return W0.bfloat16(), (W0 + dW).bfloat16()


@pytest.mark.parametrize("relative_size", [1e-1, 1e-2, 1e-3])
def test_rounding_is_told_from_rank(save, relative_size):
    base, tuned = save("llama", dtype=torch.bfloat16)
    W0, W1 = rounded_pair(relative_size)
    edit(base, lambda t: t.update(extra=W0))
    edit(tuned, lambda t: t.update(extra=W1))
    table = utils.compare_checkpoints(base, tuned).set_index("name")
    row, S = table.loc["extra"], table.attrs["spectra"]["extra"].double()
    beyond = float(S[8:].square().sum() / S.square().sum())  # what is not the planted rank 8
    if relative_size < 5e-3:  # smaller than the spacing of bfloat16: half of what is left is not
        assert row["near_rounding"] and row["rounding_share"] > beyond > 0.4
        assert row["r90"] > 80
    else:
        assert not row["near_rounding"] and row["above_rounding"] == 8 and row["r90"] in (7, 8)
        assert beyond == pytest.approx(row["rounding_share"] * (1 - 8 / 256) ** 2, rel=0.25)


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "BF16"), (torch.float16, "F16")])
def test_the_rounding_variance_is_that_of_rounding(dtype, name):
    W = torch.randn(400, 400, generator=torch.Generator().manual_seed(0))
    W[:5] *= 1e-6  # below float16's smallest normal number
    error = float((W.to(dtype).float() - W).square().sum())
    assert utils._rounding_variance(W.to(dtype).float(), name) == pytest.approx(error, rel=0.03)
    assert utils._rounding_variance(W, "F32") == 0


# Names and shapes that differ rightly


def test_a_grown_vocabulary_is_compared_on_common_rows(save, tmp_path):
    base, tuned = save("qwen")
    model = transformers.AutoModelForCausalLM.from_pretrained(tuned)
    model.resize_token_embeddings(80, mean_resizing=False)
    model.save_pretrained(tmp_path / "grown")
    table = utils.compare_checkpoints(base, str(tmp_path / "grown")).set_index("name")
    assert table.attrs["added_rows"] == {"model.embed_tokens.weight": 16}
    assert table.loc["model.embed_tokens.weight", "squared_norm"] == 0
    assert table.loc["model.embed_tokens.weight", "shape"] == "64x32"


def test_a_prefix_on_one_side_is_seen_through(save):
    base, tuned = save("gpt2")

    def strip(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)

    before = utils.compare_checkpoints(base, tuned)
    edit(base, strip)
    after = utils.compare_checkpoints(base, tuned)
    assert after.drop(columns="name").equals(before.drop(columns="name"))


def test_a_tied_head_may_be_missing_on_one_side(save):
    base, tuned = save("qwen")
    assert not any("lm_head" in name for name in load_file(f"{tuned}/model.safetensors"))

    def alias(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    before = utils.compare_checkpoints(base, tuned)
    edit(base, alias)
    assert utils.compare_checkpoints(base, tuned).equals(before)


def test_a_new_head_is_reported(save, tmp_path):
    base, tuned = save("bert")
    model = transformers.BertForSequenceClassification.from_pretrained(tuned, num_labels=2)
    model.save_pretrained(tmp_path / "classifier")
    table = utils.compare_checkpoints(base, str(tmp_path / "classifier"))
    assert "classifier.weight" in table.attrs["only_tuned"]
    assert any(name.startswith("cls.") for name in table.attrs["only_base"])
    assert not any(name.startswith("cls.") for name in table["name"])


def test_scales_and_thin_matrices(save):
    base, tuned = save()
    generator = torch.Generator().manual_seed(0)
    extra = {
        "tiny": torch.randn(20, 20, generator=generator) * 1e-30,
        "huge": torch.randn(20, 20, generator=generator) * 1e30,
        "row": torch.randn(1, 20, generator=generator),
        "column": torch.randn(20, 1, generator=generator),
        "vector": torch.randn(20, generator=generator),
        "scalar": torch.tensor(1.0),
        "empty": torch.zeros(0, 20),
    }
    edit(base, lambda t: t.update(extra))
    edit(tuned, lambda t: t.update({name: 2 * W for name, W in extra.items()}))
    table = utils.compare_checkpoints(base, tuned).set_index("name")
    for name in ("tiny", "huge", "row", "column"):
        exact = torch.linalg.svdvals(extra[name].double())
        torch.testing.assert_close(
            table.attrs["spectra"][name].double(), exact, rtol=1e-3, atol=float(exact[0]) * 1e-6
        )
    assert table.loc["row", "r90"] == table.loc["column", "r90"] == 1
    assert table.attrs["rest"]["scalar"] == 1.0
    assert table.attrs["rest"]["empty"] == 0.0


def test_identical_and_unrelated_pairs_are_named(save):
    base, tuned = save()
    with pytest.warns(UserWarning, match="identical"):
        table = utils.compare_checkpoints(base, base)
    assert (table["r90"] == 0).all() and (table["relative_size"] == 0).all()
    with pytest.raises(ValueError, match="no matrix was changed"):
        utils.recommend_ranks(table, energy=0.9)

    def redraw(tensors):
        for weight in tensors.values():
            weight.normal_(std=0.02)

    edit(tuned, redraw)
    with pytest.warns(UserWarning, match="is .*base really the base"):
        utils.compare_checkpoints(base, tuned)


# Bad input


def refuse(base, tuned, *parts, error=ValueError):
    """The pair is refused with one line that holds all `parts`, before any matrix is measured."""
    with pytest.raises(error) as raised:
        utils.compare_checkpoints(base, tuned)
    for part in parts:
        assert part in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_name_file_and_tensor(save, value):
    base, tuned = save()
    edit(tuned, lambda t: t[Q].view(-1)[7:8].fill_(value))
    refuse(base, tuned, "tuned/model.safetensors", Q, "repair")


@pytest.mark.parametrize("side", [0, 1])
def test_another_depth_is_refused(save, side):
    folders = save()
    edit(folders[side], lambda t: [t.pop(n) for n in list(t) if ".layers.1." in n])
    refuse(*folders, "model.layers.1.", "fine-tune of")


def test_another_width_names_both_shapes(save):
    base, tuned = save()
    edit(tuned, lambda t: t.update({Q: torch.zeros(48, 32)}))
    refuse(base, tuned, Q, "(32, 32)", "(48, 32)")


def test_a_missing_tensor_of_a_layer_is_refused(save):
    base, tuned = save()
    edit(tuned, lambda t: t.pop(Q))
    refuse(base, tuned, Q)


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
    file = f"{tuned}/model.safetensors"
    with open(file, "rb") as opened:
        whole = opened.read()
    content = {None: whole[:-100], "trailing": whole + b"more"}.get(content, content)
    with open(file, "wb") as opened:
        opened.write(content)
    refuse(base, tuned, "tuned/model.safetensors", problem)


def test_a_missing_shard_is_named(save):
    base, tuned = save(max_shard_size="20KB")
    shard = sorted(utils.Path(tuned).glob("*.safetensors"))[1]
    shard.unlink()
    refuse(base, tuned, shard.name, error=FileNotFoundError)


def test_pickles_are_read_only_when_it_is_said(save):
    base, tuned = save()
    before = utils.compare_checkpoints(base, tuned)
    file = utils.Path(tuned) / "model.safetensors"
    torch.save(load_file(file), utils.Path(tuned) / "pytorch_model.bin")
    file.unlink()
    refuse(base, tuned, "pickles", "allow_pickle=True")
    assert utils.compare_checkpoints(base, tuned, allow_pickle=True).equals(before)


def test_a_pickle_that_runs_code_is_refused_even_then(save):
    class Bomb:
        def __reduce__(self):
            return (print, ("boom",))

    base, tuned = save()
    (utils.Path(tuned) / "model.safetensors").unlink()
    torch.save({"a": Bomb()}, utils.Path(tuned) / "pytorch_model.bin")
    with pytest.raises(ValueError, match="torn"):
        utils.compare_checkpoints(base, tuned, allow_pickle=True)


def test_quantised_weights_are_refused(save):
    base, tuned = save()
    edit(tuned, lambda t: t.update({Q: t[Q].to(torch.float8_e4m3fn)}))
    refuse(base, tuned, Q, "F8_E4M3", "dequantise")
    edit(tuned, lambda t: t.update({Q: torch.zeros(32, 32, dtype=torch.int8)}))
    refuse(base, tuned, Q, "I8", "dequantise")
    config = json.loads((utils.Path(tuned) / "config.json").read_text())
    (utils.Path(tuned) / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "gptq"}})
    )
    refuse(base, tuned, "quantised")


def test_mixed_types_are_compared(save):
    base, tuned = save()
    before = utils.compare_checkpoints(base, tuned).set_index("name")
    edit(tuned, lambda t: t.update({Q: t[Q].double()}))
    after = utils.compare_checkpoints(base, tuned).set_index("name")
    assert after.loc[Q, "dtype_tuned"] == "F64"
    assert after.loc[Q, "stable_rank"] == pytest.approx(before.loc[Q, "stable_rank"])


def test_a_missing_path_is_never_looked_up(save, monkeypatch):
    base, tuned = save()

    def no_network(*arguments, **named):
        raise AssertionError("a path was looked up on the hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", no_network)
    for path in (f"{tuned}-2", "./nowhere", "nowhere"):
        refuse(base, path, "nowhere" if "nowhere" in path else "tuned-2")


def test_an_adapter_is_no_checkpoint(save, tmp_path):
    base, tuned = save()
    get_peft_model(build("llama"), LoraConfig(r=2)).save_pretrained(tmp_path / "adapter")
    refuse(base, str(tmp_path / "adapter"), "adapter", "merge")


# Ranks


@pytest.mark.parametrize("share", [0.5, 0.8, 0.95])
def test_energy_agrees_with_peft(share):
    """convert_to_lora gives a layer the rank that energy_rank gives the same update."""
    from peft import LoHaConfig, convert_to_lora

    torch.manual_seed(0)
    targets = ["q_proj", "down_proj"]
    loha = get_peft_model(build("llama"), LoHaConfig(r=6, alpha=6, target_modules=targets))
    for name, parameter in loha.named_parameters():
        if "hada" in name:
            torch.nn.init.normal_(parameter)
    layers = {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach()
        for name, module in loha.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    _, factors = convert_to_lora(loha, rank=share)
    for name, dW in layers.items():
        theirs = next(len(A) for key, A in factors.items() if name in key and "lora_A" in key)
        assert utils.energy_rank(utils.singular_values(dW), share) == theirs


def test_ranks_by_energy_find_the_planted_rank(save):
    table = utils.compare_checkpoints(*save())
    ranks = utils.recommend_ranks(table, energy=0.999)
    assert ranks["r"] == RANK and ranks["rank_pattern"] == {} and ranks["lora_alpha"] == RANK
    assert len(ranks["target_modules"]) == 14


def test_noise_gets_no_rank_that_energy_would_give_it():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(128, 96, generator=generator)
    plant(noise, generator, sigma=torch.tensor([60.0, 50.0]))
    S = utils.singular_values(noise)
    assert utils.energy_rank(S, 0.9) > 40
    assert utils.energy_rank(utils._above_noise(S, (128, 96)), 0.9) == 2


def test_a_budget_is_spent_best():
    """The greedy allocation keeps as much energy as the best of all, by enumeration."""
    import itertools

    spectra = {
        "a.weight": [3.0, 2.0, 0.5],
        "b.weight": [2.5, 2.4, 0.1],
        "c.weight": [1.0, 0.9, 0.8],
    }
    shape, budget = "3x3", 6 * 4
    table = utils.pd.DataFrame({"name": list(spectra), "shape": shape})
    table = table.assign(kind="matrix", squared_norm=1.0)
    table.attrs["spectra"] = {name: torch.tensor(S) for name, S in spectra.items()}
    lora = utils.recommend_ranks(table, budget=budget)
    got = {n: utils.rank_of(lora, n) for n in spectra}

    def kept(ranks):
        return sum(sum(s**2 for s in spectra[n][:r]) for n, r in ranks.items())

    every = [
        dict(zip(spectra, ranks, strict=True)) for ranks in itertools.product(range(4), repeat=3)
    ]
    best = max((ranks for ranks in every if sum(ranks.values()) * 6 <= budget), key=kept)
    assert got == best
    with pytest.raises(ValueError, match="budget=5"):
        utils.recommend_ranks(table, budget=5)


# Adapters


@pytest.mark.parametrize("architecture", ["llama", "gemma", "qwen", "gpt2", "bert", "gpt-oss"])
@pytest.mark.parametrize("rank", [2, 8])
def test_an_adapter_merges_to_the_cut_model(save, tmp_path, architecture, rank):
    base, tuned = save(architecture)
    out = tmp_path / "adapter"
    report = utils.extract_adapter(base, tuned, str(out), rank=rank).set_index("name")
    model = build(architecture)
    W0 = {name: weight.clone() for name, weight in model.named_parameters()}
    W1 = dict(type(model).from_pretrained(tuned).named_parameters())
    merged = PeftModel.from_pretrained(model, out).merge_and_unload()
    adapted = set(report.index[report["part"] == "lora"])
    for name, weight in merged.named_parameters():
        dW = W1[name] - W0[name]
        if name in adapted:
            dW = utils.truncate(dW, min(rank, *dW.shape))
        elif report["part"].get(name, "dropped") == "dropped":
            dW = torch.zeros_like(dW)
        torch.testing.assert_close(weight, W0[name] + dW, rtol=0, atol=1e-6)
    assert len(adapted) >= 8
    kept = report.loc[list(adapted), "kept"]
    expected = float(SIGMA[:rank].square().sum() / SIGMA.square().sum())
    assert (kept - expected).abs().max() < 1e-4
    if architecture == "gpt-oss":
        assert (report["part"] == "dropped").any()  # experts: said, not silent
    if architecture in ("llama", "gemma"):
        assert report.loc["model.norm.weight", "part"] == "modules_to_save"


def test_an_adapter_recovers_a_merged_lora(tmp_path):
    model = build("llama")
    model.save_pretrained(tmp_path / "base")
    torch.manual_seed(3)
    lora = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    products = {}
    with torch.no_grad():
        for name, layer in utils.lora_layers(lora).items():
            layer.lora_B["default"].weight.normal_(std=0.02)
            products[name] = layer.get_delta_weight("default").clone()
    lora.merge_and_unload().save_pretrained(tmp_path / "tuned")
    folders = str(tmp_path / "base"), str(tmp_path / "tuned")
    report = utils.extract_adapter(*folders, str(tmp_path / "out"), energy=0.9999)
    assert set(report["rank"]) == {4} and set(report["part"]) == {"lora"}
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for name, product in products.items():
        at = f"base_model.model.{name.removesuffix('.weight')}"
        found = tensors[f"{at}.lora_B.weight"] @ tensors[f"{at}.lora_A.weight"]
        torch.testing.assert_close(found, product, rtol=0, atol=1e-6)


def test_ranks_differ_by_matrix(save, tmp_path):
    base, tuned = save()
    table = utils.compare_checkpoints(base, tuned)
    lora = utils.recommend_ranks(table, budget=1500)
    report = utils.extract_adapter(base, tuned, str(tmp_path / "out"), ranks=lora)
    used = report[report["part"] == "lora"].set_index("name")
    sizes = table.set_index("name").loc[used.index, "shape"].str.split("x")
    cost = sum(r * sum(map(int, shape)) for r, shape in zip(used["rank"], sizes, strict=True))
    assert 0.9 * 1500 < cost <= 1500
    assert used["rank"].nunique() > 1
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path / "out")
    assert {m.r["default"] for m in utils.lora_layers(loaded).values()} == set(used["rank"])


def test_the_collector_passes_over_the_libraries_but_not_over_models():
    code = "import utils, gc; utils._import_peft(); print(gc.isenabled(), gc.get_freeze_count())"
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, cwd=utils.ROOT, capture_output=True, text=True, check=True)
    enabled, frozen = found.stdout.split()
    assert enabled == "True" and int(frozen) > 100_000
    before = gc.get_freeze_count()
    utils._import_peft()  # here transformers is loaded
    assert gc.isenabled() and gc.get_freeze_count() == before


def test_a_long_matrix_does_not_keep_the_cores_from_the_short_ones(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(utils, "device", lambda: torch.device("cpu"))
    later, taken = threading.Event(), []

    def work(item):
        if item == 6:
            later.set()
        return item, item > 0 or later.wait(20)

    def items():
        for item in range(40):
            taken.append(item)
            yield item

    found = utils._by_core(work, items())
    assert next(found) == (0, True)
    assert len(taken) < 15  # what waits to be taken stays in memory
    assert list(found) == [(item, True) for item in range(1, 40)]


def test_an_adapter_is_written_whole_or_not_at_all(save, tmp_path, monkeypatch):
    base, tuned = save()
    out, calls = tmp_path / "adapters" / "out", []
    out.parent.mkdir()
    original = utils.leading_eigenvectors

    def fail(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return original(*arguments, **options)

    monkeypatch.setattr(utils, "leading_eigenvectors", fail)
    with pytest.raises(OSError, match="No space"):
        utils.extract_adapter(base, tuned, str(out), rank=2)
    assert list(out.parent.iterdir()) == []
    utils.extract_adapter(base, tuned, str(out), rank=2)
    with pytest.raises(FileExistsError, match="delete it"):
        utils.extract_adapter(base, tuned, str(out), rank=2)


@pytest.mark.parametrize("side", ["base", "tuned"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_of_nan_and_inf_names_file_and_tensor(save, tmp_path, side, value):
    folders = save()
    edit(tmp_path / side, lambda t: t[Q].view(-1)[7:8].fill_(value))
    with pytest.raises(ValueError, match=f"{side}/model.safetensors: {Q} .*repair"):
        utils.extract_adapter(*folders, str(tmp_path / "out"), rank=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_an_adapter_is_the_same_at_any_scale(save, tmp_path, scale):
    folders = save()
    plain = utils.extract_adapter(*folders, str(tmp_path / "plain"), rank=2)
    for side in ("base", "tuned"):
        edit(tmp_path / side, lambda t: [W.mul_(scale) for W in t.values()])
    scaled = utils.extract_adapter(*folders, str(tmp_path / "scaled"), rank=2)
    used = plain["part"] == "lora"
    for column in ("kept", "best"):
        assert scaled[used][column].tolist() == pytest.approx(plain[used][column].tolist())
    found, exact = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("scaled", "plain")
    )
    at = f"base_model.model.{Q.removesuffix('.weight')}"
    scaled_product, product = (
        t[f"{at}.lora_B.weight"].double() @ t[f"{at}.lora_A.weight"].double()
        for t in (found, exact)
    )
    torch.testing.assert_close(scaled_product / scale, product, rtol=0, atol=1e-7)


def test_an_adapter_of_doubles_sees_an_update_below_the_rounding_of_floats(save, tmp_path):
    base, tuned = save()
    W0 = load_file(f"{base}/model.safetensors")[Q].double()
    update = 1e-11 * torch.outer(torch.arange(1.0, 33), torch.ones(32)).double()
    edit(base, lambda t: t.update({Q: W0}))
    edit(tuned, lambda t: t.update({Q: W0 + update}))
    report = utils.extract_adapter(base, tuned, str(tmp_path / "out"), rank=1).set_index("name")
    assert report.loc[Q, "squared_norm"] == pytest.approx(float(update.square().sum()), rel=1e-3)
    assert report.loc[Q, "kept"] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("scale", [1e60, 1e-60])
def test_an_update_of_doubles_out_of_the_range_of_floats_is_named(save, tmp_path, scale):
    base, tuned = save()
    update = scale * torch.ones(32, 32, dtype=torch.float64)
    edit(base, lambda t: t.update({Q: torch.zeros_like(update)}))
    edit(tuned, lambda t: t.update({Q: update}))
    with pytest.raises(ValueError, match=f"{Q}: .*float32: rescale"):
        utils.extract_adapter(base, tuned, str(tmp_path / "out"), rank=2)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=f"{Q}: .*float32: rescale"):
        utils.compare_checkpoints(base, tuned)


@pytest.mark.parametrize("rank", [0, 33])
def test_a_rank_out_of_range_is_refused(save, tmp_path, rank):
    with pytest.raises(ValueError, match=f"rank={rank}: choose one from 1 to 32"):
        utils.extract_adapter(*save(), str(tmp_path / "out"), rank=rank)


def test_a_smaller_matrix_gets_all_it_has(save, tmp_path):
    report = utils.extract_adapter(*save(), str(tmp_path / "out"), rank=20).set_index("name")
    assert report.loc["model.layers.0.self_attn.k_proj.weight", "rank"] == 16
    assert report.loc[Q, "rank"] == 20


# Scores and words


@pytest.fixture
def tiny_pair(store, tmp_path):
    """Base and tuned folder of a small run of the smoke profile, and its configuration."""
    config = utils.profile().config("facts", steps=4, lr=1e-2)
    base = dataclasses.replace(config, method="base", lr=0.0, steps=0)
    utils.run(config)
    for name, which in {"base": base, "tuned": config}.items():
        utils.save_model(which, tmp_path / name)
    return str(tmp_path / "base"), str(tmp_path / "tuned"), config


def test_saved_models_give_the_spectra_of_the_run(tiny_pair):
    base, tuned, config = tiny_pair
    table = utils.compare_checkpoints(base, tuned)
    spectra = utils.stored(config).spectra
    assert set(spectra) == set(table.loc[table["kind"] == "matrix", "name"])
    for name, S in spectra.items():
        torch.testing.assert_close(table.attrs["spectra"][name], S, rtol=1e-3, atol=1e-6)


def test_scores_of_a_pair_are_those_of_the_run(tiny_pair):
    base, tuned, config = tiny_pair
    rows = [
        {"prompt": r["prompt"], "answer": r["answer"]} for r in utils.load_task("facts")["test"]
    ]
    own = utils.Path(base).parent / "own.jsonl"
    own.write_text("".join(json.dumps(row) + "\n" for row in rows[: config.eval_rows]))
    scores = utils.score_pair(base, tuned, str(own), [1, 32]).set_index("model")
    tuned_loss = utils.run(config).loss()
    assert scores.loc["tuned", "loss_nats"] == pytest.approx(tuned_loss, rel=1e-3)
    assert scores.loc["base", "loss_nats"] > tuned_loss
    one, all_of_it = scores.loc["cut", "loss_nats"]
    assert all_of_it == pytest.approx(tuned_loss, rel=1e-3)
    assert one == pytest.approx(utils.cut(config, [1])["loss_nats"][0], rel=1e-3)


def test_an_own_task_needs_prompt_and_answer(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text('{"prompt": "a"}\n')
    with pytest.raises(ValueError, match="a row lacks answer"):
        utils.load_task(str(path))
    with pytest.raises(ValueError, match="nowhere.jsonl"):
        utils.RunConfig(task="nowhere.jsonl", method="base")


def test_a_cut_by_matrix_is_the_cut_where_all_ranks_are_one(tiny_pair):
    config = tiny_pair[2]
    names = utils.stored(config).spectra
    uniform = utils.cut(config, [2])["loss_nats"][0]
    assert utils.cut_by_matrix(config, dict.fromkeys(names, 2))["loss_nats"] == uniform
    ranks = dict.fromkeys(names, 2) | {next(iter(names)): 0}
    assert utils.cut_by_matrix(config, ranks)["loss_nats"] != uniform


def test_a_lora_takes_ranks_by_matrix(store):
    config = utils.profile().config("facts", "lora", rank=2, steps=1)
    config = dataclasses.replace(config, rank_pattern=(("model.layers.0.mlp.up_proj", 5),))
    spectra = utils.run(config).spectra
    lengths = {name: len(S) for name, S in spectra.items()}
    assert lengths.pop("model.layers.0.mlp.up_proj.weight") == 5
    assert set(lengths.values()) == {2}


def test_a_kept_table_is_computed_once(store):
    calls = []

    def compute():
        calls.append(1)
        table = utils.pd.DataFrame({"name": ["a"], "r90": [3]})
        table.attrs = {"spectra": {"a": torch.ones(3)}, "rest": {"norm": 0.5}}
        return table

    first, second = utils.keep_table("t", compute), utils.keep_table("t", compute)
    assert calls == [1] and first.equals(second) and second.attrs["rest"] == {"norm": 0.5}
    assert torch.equal(second.attrs["spectra"]["a"], torch.ones(3))


def test_the_verdict_names_the_matrix_that_needs_most(save):
    base, tuned = save()
    edit(tuned, lambda t: plant(t[Q], torch.Generator().manual_seed(5), sigma=torch.ones(9) / 50))
    table = utils.compare_checkpoints(base, tuned)
    lines = utils.verdict(table, utils.recommend_ranks(table, energy=0.99))
    assert len(lines) == 3
    assert "14 matrices" in lines[0] and "rank 64 keeps 100%" in lines[0]
    assert f"most of all {Q}" in lines[1]
    assert "F32" in lines[2] and "0 of 14 matrices are near rounding." in lines[2]
