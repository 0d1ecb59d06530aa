"""Loading: what is accepted, and that everything else stops with its name."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import utils


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The tiny model as a folder."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    utils.load_model(utils.TINY).save_pretrained(folder)
    return folder


@pytest.fixture
def broken(saved, tmp_path):
    """A function that copies the folder, changes its weights and returns the copy."""

    def change(edit):
        folder = tmp_path / "broken"
        shutil.copytree(saved, folder)
        weights = load_file(folder / "model.safetensors")
        edit(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return str(folder)

    return change


NORM = "model.layers.1.input_layernorm.weight"
Q = "model.layers.0.self_attn.q_proj.weight"


def test_matrices_of_the_tiny_model():
    shapes = {
        name: tuple(w.shape) for name, w in utils.matrices(utils.load_model("tiny-gemma3")).items()
    }
    expected = {
        "self_attn.q_proj": (32, 32),
        "self_attn.k_proj": (16, 32),
        "self_attn.v_proj": (16, 32),
        "self_attn.o_proj": (32, 32),
        "mlp.gate_proj": (64, 32),
        "mlp.up_proj": (64, 32),
        "mlp.down_proj": (32, 64),
    }
    layers = [f"model.layers.{i}." for i in range(2)]
    assert shapes == {f"{at}{name}.weight": s for at in layers for name, s in expected.items()}


def test_matrices_are_the_parameters_themselves():
    model = utils.load_model(utils.TINY)
    parameters = dict(model.named_parameters())
    assert all(parameters[name] is weight for name, weight in utils.matrices(model).items())


def test_the_tiny_model_is_the_same_at_every_call():
    torch.manual_seed(5)
    first = utils.load_model(utils.TINY).state_dict()
    second = utils.load_model(utils.TINY).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_loading_leaves_the_random_state_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    utils.load_model(utils.TINY)
    assert torch.equal(torch.rand(1), expected)


def test_a_saved_model_loads_bit_equal(saved):
    before, after = (utils.load_model(name).state_dict() for name in (utils.TINY, str(saved)))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_half_precision_folder_loads_as_float32(saved, broken):
    folder = broken(lambda w: w.update({k: v.bfloat16() for k, v in w.items()}))
    after = utils.load_model(folder).state_dict()
    before = load_file(saved / "model.safetensors")
    assert all(after[k].dtype == torch.float32 for k in before)
    assert all(torch.equal(after[k], before[k].bfloat16().float()) for k in before)


@pytest.mark.parametrize(
    "name", ["gemma-4-270m", "./missing", "/missing/model", "~/missing", "a/b/c", "../x/y", ""]
)
@pytest.mark.parametrize("load", [utils.load_model, utils.load_tokenizer])
def test_an_unknown_name_stops_without_a_hub_lookup(load, name, monkeypatch):
    import transformers

    def lookup(*args, **kwargs):
        pytest.fail(f"{name!r} was looked up")

    for auto in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer):
        monkeypatch.setattr(auto, "from_pretrained", lookup)
    with pytest.raises(ValueError, match="unknown|not a model folder"):
        load(name)


def test_an_unknown_name_is_named():
    with pytest.raises(ValueError, match="gemma-4-270m"):
        utils.load_model("gemma-4-270m")


def test_a_folder_that_is_no_model_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path.name}.*config.json"):
        utils.load_model(str(tmp_path))


def test_a_missing_weight_is_named(broken):
    with pytest.raises(ValueError, match=NORM):
        utils.load_model(broken(lambda w: w.pop(NORM)))


def test_an_extra_weight_is_named(broken):
    with pytest.raises(ValueError, match="model.surplus"):
        utils.load_model(broken(lambda w: w.update({"model.surplus": torch.ones(2)})))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(broken, value):
    with pytest.raises(ValueError, match=Q):
        utils.load_model(broken(lambda w: w[Q].view(-1)[3:4].fill_(value)))


def test_a_weight_of_the_wrong_shape_is_named(broken):
    with pytest.raises(ValueError, match=Q):
        utils.load_model(broken(lambda w: w.update({Q: torch.ones(32, 31)})))


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", None])
def test_a_torn_weight_file_is_named(saved, tmp_path, content):
    folder = tmp_path / "torn"
    shutil.copytree(saved, folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    with pytest.raises(ValueError, match="torn"):
        utils.load_model(str(folder))


def test_a_folder_without_weights_is_named(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "empty", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(ValueError, match="empty"):
        utils.load_model(str(tmp_path / "empty"))


def test_a_rank_above_the_smallest_matrix_stops_before_training(store, monkeypatch):
    monkeypatch.setattr(utils, "train", lambda *a, **k: pytest.fail("trained"))
    with pytest.raises(ValueError, match=r"rank=17.*16"):
        utils.run(utils.profile().config("sentiment", "lora", rank=17))


def test_the_largest_possible_rank_is_accepted(store):
    utils.prepare(utils.profile().config("sentiment", "lora", rank=16))
