"""An adapter cut to ranks: PEFT's merge of the cut is the cut of PEFT's merge, and its own cut."""

import json
import subprocess
import sys
from pathlib import Path

import pairs
import pytest
import torch
from loras import CONFIGS, edit_lora, merged_updates, planted, write_lora
from pairs import LLAMA_LIKE, Q, build
from peft import PeftModel, convert_to_lora
from safetensors.torch import load_file

from deltarank import shrink
from deltarank.lora import Lora, open_lora
from deltarank.shrink import shrink_adapter
from deltarank.spectra import truncate

QB = f"base_model.model.{Q.removesuffix('weight')}lora_B.weight"


@pytest.fixture(autouse=True)
def qwen_3(monkeypatch):
    more = {"qwen 3": ("Qwen3ForCausalLM", LLAMA_LIKE)}
    monkeypatch.setattr(pairs, "ARCHITECTURES", pairs.ARCHITECTURES | more)


def config_of(folder):
    return json.loads((Path(folder) / "adapter_config.json").read_text())


def factors_of(folder):
    return load_file(Path(folder) / "adapter_model.safetensors")


# What PEFT makes of it


@pytest.mark.parametrize("patterns", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_merge_of_the_cut_is_the_cut_of_the_merge(tmp_path, name, patterns):
    folder, out, architecture = tmp_path / "lora", tmp_path / "out", CONFIGS[name][0]
    report = shrink_adapter(planted(folder, name), str(out), rank=3, patterns=patterns)
    report, before = report.set_index("name"), merged_updates(folder, architecture)
    after = merged_updates(out, architecture)
    assert set(after) == set(before) == set(report.index)
    for weight, dW in before.items():
        row, S = report.loc[weight], torch.linalg.svdvals(dW)
        cut = truncate(dW, row["rank"])
        torch.testing.assert_close(after[weight], cut, rtol=0, atol=float(1e-6 * S[0]))
        kept = float(S[: row["rank"]].square().sum() / S.square().sum())
        assert (row["kept"], row["best"]) == pytest.approx((kept, kept), rel=1e-6)
        assert row["squared_norm"] == pytest.approx(float(dW.square().sum()), rel=1e-6)
    config = config_of(out)
    assert config["r"] == config["lora_alpha"] == 3 and config["use_rslora"] is False
    assert config["fan_in_fan_out"] == (name == "turned")
    assert bool(config["rank_pattern"]) == (patterns and name == "patterns")  # its layer of rank 2


@pytest.mark.parametrize("rule", [{"rank": 2}, {"energy": 0.6}, {"energy": 0.95}])
@pytest.mark.parametrize("name", ["plain", "rslora", "patterns"])
@pytest.mark.filterwarnings("ignore:Converting a PEFT adapter")
def test_it_agrees_with_peft(tmp_path, name, rule):
    folder, out = planted(tmp_path / "lora", name), tmp_path / "out"
    report = shrink_adapter(folder, str(out), **rule).set_index("name")
    model = PeftModel.from_pretrained(build("llama"), folder)
    theirs = convert_to_lora(model, rank=next(iter(rule.values())))[1]
    ours = factors_of(out)
    assert ours.keys() == theirs.keys()
    for at in [key.removesuffix("lora_A.weight") for key in theirs if "lora_A" in key]:
        A, B = (f"{at}lora_{side}.weight" for side in "AB")
        rank = report.loc[f"{at.removeprefix('base_model.model.')}weight", "rank"]
        assert len(theirs[A]) == rank
        torch.testing.assert_close(ours[B] @ ours[A], theirs[B] @ theirs[A], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["plain", "qwen 3"])
def test_the_adapted_model_computes_the_logits_of_the_cut(tmp_path, name):
    folder, out = planted(tmp_path / "lora", name), tmp_path / "out"
    shrink_adapter(folder, str(out), rank=2)
    architecture, tokens = CONFIGS[name][0], torch.arange(64)[None]
    cut, model = build(architecture).eval(), build(architecture).eval()
    with torch.no_grad():
        for weight, dW in merged_updates(folder, architecture).items():
            cut.get_parameter(weight).add_(truncate(dW, 2))
        expected, before = cut(tokens).logits, model(tokens).logits
        found = PeftModel.from_pretrained(model, out)(tokens).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (expected - before).abs().max() > 1e-2


# What is written


def test_the_base_the_task_and_more_are_carried_over(tmp_path):
    folder = write_lora(tmp_path / "lora", r=4, task_type="CAUSAL_LM", target_modules=["q_proj"])
    mapping = {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers"}
    more = {"revision": "v2", "auto_mapping": mapping}
    edit_lora(folder, base_model_name_or_path="someone/model", **more)
    shrink_adapter(folder, str(tmp_path / "out"), rank=2)
    config = config_of(tmp_path / "out")
    assert config["auto_mapping"] == mapping
    assert config["task_type"] == "CAUSAL_LM" and config["revision"] == "v2"
    assert config["base_model_name_or_path"] == "someone/model"
    PeftModel.from_pretrained(build("llama"), tmp_path / "out")


def test_a_budget_is_spent_where_it_keeps_most(tmp_path):
    folder = planted(tmp_path / "lora", "patterns")
    report = shrink_adapter(folder, str(tmp_path / "out"), budget=700, patterns=True)
    assert report["rank"].nunique() > 1
    parameters = sum(W.numel() for W in factors_of(tmp_path / "out").values())
    assert 600 < parameters <= 700
    with pytest.raises(ValueError, match="budget=3"):
        shrink_adapter(folder, str(tmp_path / "none"), budget=3)
    assert not (tmp_path / "none").exists()


def test_matrices_that_a_budget_leaves_out_are_not_chosen(tmp_path):
    folder = planted(tmp_path / "lora", "plain")
    report = shrink_adapter(folder, str(tmp_path / "out"), budget=80).set_index("name")
    assert report["part"].value_counts().to_dict() == {"not_chosen": 5, "lora": 1}
    written = {name.partition(".lora_")[0] for name in factors_of(tmp_path / "out")}
    (chosen,) = report.index[report["part"] == "lora"]
    assert written == {f"base_model.model.{chosen.removesuffix('.weight')}"}


def test_at_its_own_rank_it_is_the_same_adapter_in_the_portable_form(tmp_path):
    folder = planted(tmp_path / "lora", "patterns of rslora")
    report = shrink_adapter(folder, str(tmp_path / "out"), rank=7)
    assert report["kept"].tolist() == pytest.approx([1.0] * len(report))
    before, after = merged_updates(folder), merged_updates(tmp_path / "out")
    for weight, dW in before.items():
        torch.testing.assert_close(after[weight], dW, rtol=0, atol=1e-6)
    assert {W.shape[0] for n, W in factors_of(tmp_path / "out").items() if "lora_A" in n} == {7}


@pytest.mark.parametrize(("dtype", "most"), [("bfloat16", 1e-5), ("float16", 2e-7)])
def test_what_rounding_loses_is_measured(tmp_path, dtype, most):
    folder = planted(tmp_path / "lora", "plain")
    report = shrink_adapter(folder, str(tmp_path / "out"), rank=4, dtype=dtype)
    assert report["rounding"].between(0, most, inclusive="neither").all()
    before, after = merged_updates(folder), merged_updates(tmp_path / "out")
    for row in report.itertuples():
        lost = (before[row.name] - after[row.name]).square().sum() / row.squared_norm
        assert float(lost) == pytest.approx(row.rounding, rel=1e-2)
        assert 1 - row.kept == pytest.approx(row.rounding, rel=1e-2)


@pytest.mark.filterwarnings("ignore:.* keeps")
def test_embeddings_and_biases_are_dropped_with_their_share(tmp_path):
    folder = write_lora(tmp_path / "lora", r=4, target_modules=["q_proj", "embed_tokens"])
    bias = QB.replace("weight", "bias")
    edit_lora(folder, lambda t: t.update({bias: torch.ones(32)}))
    report = shrink_adapter(folder, str(tmp_path / "out"), rank=2).set_index("name")
    dropped = report[report["part"] == "dropped"]
    assert set(dropped.index) == {"model.embed_tokens.weight", Q.replace("weight", "bias")}
    assert dropped.loc[Q.replace("weight", "bias"), "squared_norm"] == 128
    assert (dropped["kept"] == 0).all() and (report["part"] == "lora").sum() == 2
    assert all("q_proj" in name for name in factors_of(tmp_path / "out"))


def test_a_module_that_changes_nothing_gets_no_factors(tmp_path):
    folder = planted(tmp_path / "lora", "plain")
    edit_lora(folder, lambda t: t[QB].zero_())
    report = shrink_adapter(folder, str(tmp_path / "out"), rank=2)
    assert len(report) == 5 and Q not in set(report["name"])
    assert QB not in factors_of(tmp_path / "out")
    edit_lora(folder, lambda t: [W.zero_() for W in t.values()])
    with pytest.raises(ValueError, match="nothing to adapt"):
        shrink_adapter(folder, str(tmp_path / "none"), rank=2)


def test_neither_transformers_nor_peft_is_imported(tmp_path):
    code = (
        "import sys; from deltarank.shrink import shrink_adapter; shrink_adapter(*sys.argv[1:],"
        " energy=0.9); print(*{name.split('.')[0] for name in sys.modules})"
    )
    folder = planted(tmp_path / "lora", "plain")
    command = [sys.executable, "-c", code, folder, str(tmp_path / "out")]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert (tmp_path / "out" / "adapter_config.json").exists() and "torch" in loaded
    assert {"transformers", "peft", "accelerate", "matplotlib"}.isdisjoint(loaded)


# Whole or not at all


def test_it_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    folder, home, calls = planted(tmp_path / "lora", "plain"), tmp_path / "home", []
    home.mkdir()
    original = shrink.factor_svd

    def fail(*factors):
        calls.append(factors)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return original(*factors)

    monkeypatch.setattr(shrink, "factor_svd", fail)
    with pytest.raises(OSError, match="No space"):
        shrink_adapter(folder, str(home / "out"), rank=2)
    assert list(home.iterdir()) == []


def test_a_folder_of_mine_and_the_adapter_itself_stay(tmp_path, monkeypatch):
    folder = planted(tmp_path / "lora", "plain")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    before = {path: path.read_bytes() for path in Path(folder).iterdir()}
    with pytest.raises(ValueError, match="is the adapter that is to be cut: name another folder"):
        shrink_adapter(folder, f"{tmp_path}/mine/../lora", rank=2)
    monkeypatch.setattr(Lora, "factors", lambda *a: pytest.fail("factors were read"))
    with pytest.raises(FileExistsError, match="exists and is no adapter: name another"):
        shrink_adapter(folder, str(tmp_path / "mine"), rank=2)
    assert {path: path.read_bytes() for path in Path(folder).iterdir()} == before
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep me"


@pytest.mark.parametrize("rule", [{}, {"rank": 2, "energy": 0.9}])
def test_one_rule_is_to_be_given(tmp_path, rule):
    with pytest.raises(ValueError, match="give one of rank"):
        shrink_adapter(planted(tmp_path / "lora", "plain"), str(tmp_path / "out"), **rule)


def test_what_was_cut_can_be_cut_again(tmp_path):
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    shrink_adapter(planted(tmp_path / "lora", "patterns"), first, rank=3)
    shrink_adapter(first, second, rank=1)
    once = open_lora(str(tmp_path / "lora")).spectra().set_index("name")["S"]
    again = open_lora(second).spectra().set_index("name")["S"]
    for name, S in again.items():
        torch.testing.assert_close(S[0], once[name][0], rtol=1e-5, atol=0)
