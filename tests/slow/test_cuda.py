"""What must hold on a GPU, on the tiny model beside the same on the CPU.

pytest tests/slow/test_cuda.py shows it on a machine that has one.
"""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from deltarank import adapters, compare, runtime
from deltarank.adapters import extract_adapter
from deltarank.compare import compare_checkpoints
from deltarank.gram import leading_factors
from deltarank.spectra import singular_values
from deltarank.study import evaluation, models, training
from deltarank.study.cuts import CUT_PARTS, cut
from deltarank.study.measuring import delta_file, kept_spectra, measure
from deltarank.study.models import TINY, load_model
from deltarank.study.profiles import profile
from deltarank.study.runs import run, save_model
from deltarank.study.training import prepare, train

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device: these tests are for a GPU machine"
)
LOSS = {"float32": 1e-3, "bfloat16": 2e-2}  # relative; bfloat16 has eight bits


@pytest.fixture
def on_cpu(monkeypatch):
    """A function that keeps what follows on the CPU, as on a machine without a GPU."""

    def keep():
        for module in (runtime, compare, adapters, models, training):
            monkeypatch.setattr(module, "device", lambda: torch.device("cpu"))

    return keep


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    """A function that sets store and cache to empty ones of a name."""

    def go(name):
        monkeypatch.setenv("BUILD", str(tmp_path / name / "build"))
        monkeypatch.setenv("LOWRANK_CACHE", str(tmp_path / name / "cache"))

    return go


def small(method="full", **changes):
    """A run of a few steps."""
    recipe = {} if method == "base" else {"steps": 4, "lr": 1e-3}
    recipe |= {"rank": 4} if method == "lora" else {}
    return profile().config("sentiment", method, **(recipe | changes))


def test_the_model_is_on_the_gpu(store):
    assert load_model(TINY).device.type == "cuda"
    assert {p.device.type for p in prepare(small()).parameters()} == {"cuda"}


@pytest.mark.parametrize("dtype", LOSS)
@pytest.mark.parametrize("method", ["full", "lora"])
def test_training_has_the_losses_of_the_cpu(store, on_cpu, method, dtype):
    config = small(method, dtype=dtype)
    found = train(config, prepare(config))
    on_cpu()
    assert found == pytest.approx(train(config, prepare(config)), rel=LOSS[dtype])
    assert len(found) == 4 and found[-1] < found[0]


def test_training_with_compiled_layers_has_the_losses_of_the_cpu(store, on_cpu):
    config = small(compile=True)
    found = train(config, prepare(config))
    on_cpu()
    config = dataclasses.replace(config, compile=False)
    assert found == pytest.approx(train(config, prepare(config)), rel=LOSS["bfloat16"])


@pytest.mark.parametrize("method", ["base", "full", "lora"])
def test_a_measured_run_is_that_of_the_cpu(elsewhere, on_cpu, method):
    config = small(method, dtype="float32")
    found = []
    for name in ("gpu", "cpu"):
        elsewhere(name)
        record = measure(config)
        names = record["shapes"]
        found.append((record, kept_spectra(config, names) if names else {}))
        on_cpu()
    (record, spectra), (expected, oracle) = found
    assert record["provenance"]["device"] == torch.cuda.get_device_name()
    for split, scores in expected["evaluation"].items():
        assert record["evaluation"][split]["loss_nats"] == pytest.approx(
            scores["loss_nats"], rel=LOSS["float32"]
        )
    assert spectra.keys() == oracle.keys() and len(spectra) == (0 if method == "base" else 14)
    for name, S in spectra.items():
        assert S.device.type == "cpu"
        torch.testing.assert_close(S, oracle[name], rtol=1e-2, atol=float(1e-2 * oracle[name][0]))


@pytest.mark.parametrize("part", CUT_PARTS)
def test_a_cut_has_the_losses_of_the_cpu(elsewhere, on_cpu, part):
    config = small(dtype="float32")
    elsewhere("gpu")
    found = cut(config, [0, 2, 8], part=part)["loss_nats"].tolist()
    update = delta_file(config).read_bytes()
    elsewhere("cpu")
    delta_file(config).parent.mkdir(parents=True)
    delta_file(config).write_bytes(update)
    on_cpu()
    expected = cut(config, [0, 2, 8], part=part)["loss_nats"].tolist()
    assert found == pytest.approx(expected, rel=LOSS["float32"])


def test_free_generation_is_that_of_the_cpu(store, on_cpu):
    config = profile().config("kjv", "base", dtype="float32")
    prompts = ["zz", "the sea", "x: 1"]
    found = evaluation.generate(load_model(TINY).eval(), config, prompts, max_new_tokens=8)
    on_cpu()
    expected = evaluation.generate(load_model(TINY).eval(), config, prompts, max_new_tokens=8)
    assert found == expected and any(found)


@pytest.mark.parametrize("shape", [(300, 200), (200, 300)], ids=str)
def test_spectra_and_factors_of_a_matrix_are_those_of_the_cpu(shape):
    torch.manual_seed(0)
    dW = torch.randn(shape[0], 20) @ torch.randn(20, shape[1]) + 0.1 * torch.randn(shape)
    S = singular_values(dW)
    torch.testing.assert_close(singular_values(dW.cuda()).cpu(), S, rtol=0, atol=1e-6 * float(S[0]))
    (B, A, best), (B_gpu, A_gpu, best_gpu) = leading_factors(dW, 8), leading_factors(dW.cuda(), 8)
    assert B_gpu.device.type == "cuda"
    torch.testing.assert_close((B_gpu @ A_gpu).cpu(), B @ A, rtol=0, atol=1e-3 * float(S[0]))
    assert best_gpu == pytest.approx(best, rel=1e-4)


@pytest.fixture
def folders(store, tmp_path):
    """Base and tuned folder of a run that was trained on the GPU."""
    config = small(lr=1e-2)
    run(config)
    for name, which in {"base": profile().config("sentiment", "base"), "tuned": config}.items():
        save_model(which, tmp_path / name)
    return str(tmp_path / "base"), str(tmp_path / "tuned")


@pytest.mark.filterwarnings("ignore:the update is")
def test_a_pair_is_compared_as_on_the_cpu(folders, elsewhere, on_cpu):
    tables = []
    for name in ("gpu", "cpu"):
        elsewhere(name)
        tables.append(compare_checkpoints(*folders))
        on_cpu()
    found, expected = tables
    assert found["name"].tolist() == expected["name"].tolist()
    assert found["r90"].tolist() == pytest.approx(expected["r90"].tolist(), abs=1)
    for S, oracle in zip(found["S"], expected["S"], strict=True):
        torch.testing.assert_close(S.cpu(), oracle, rtol=0, atol=float(1e-4 * oracle[0]))


def test_an_adapter_has_the_products_of_the_cpu(folders, on_cpu, tmp_path):
    products, reports = [], []
    for name in ("gpu", "cpu"):
        reports.append(extract_adapter(*folders, str(tmp_path / name), rank=4))
        tensors = load_file(tmp_path / name / "adapter_model.safetensors")
        ends = [key.removesuffix("lora_A.weight") for key in tensors if "lora_A" in key]
        products.append(
            {at: tensors[f"{at}lora_B.weight"] @ tensors[f"{at}lora_A.weight"] for at in ends}
        )
        on_cpu()
    assert products[0].keys() == products[1].keys() and len(products[0]) == 14
    for at, product in products[0].items():
        oracle = products[1][at]
        torch.testing.assert_close(product, oracle, rtol=0, atol=float(1e-3 * oracle.norm()))
    assert reports[0]["kept"].tolist() == pytest.approx(reports[1]["kept"].tolist(), abs=1e-3,
                                                        nan_ok=True)  # fmt: skip
