"""Loading: what is accepted, and that everything else stops with its name."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from deltarank.study import models
from deltarank.study.models import (
    TINY,
    load_model,
    load_tokenizer,
    matrices,
    model_sha256,
    require_memory,
    require_short,
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The tiny model as a folder."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    load_model(TINY).save_pretrained(folder)
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
    shapes = {name: tuple(w.shape) for name, w in matrices(load_model("tiny-gemma3")).items()}
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
    model = load_model(TINY)
    parameters = dict(model.named_parameters())
    assert all(parameters[name] is weight for name, weight in matrices(model).items())


def test_the_tiny_model_is_the_same_at_every_call():
    torch.manual_seed(5)
    first = load_model(TINY).state_dict()
    second = load_model(TINY).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_loading_leaves_the_random_state_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    load_model(TINY)
    assert torch.equal(torch.rand(1), expected)


def test_a_saved_model_loads_bit_equal(saved):
    before, after = (load_model(name).state_dict() for name in (TINY, str(saved)))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_half_precision_folder_loads_as_float32(saved, broken):
    folder = broken(lambda w: w.update({k: v.bfloat16() for k, v in w.items()}))
    after = load_model(folder).state_dict()
    before = load_file(saved / "model.safetensors")
    assert all(after[k].dtype == torch.float32 for k in before)
    assert all(torch.equal(after[k], before[k].bfloat16().float()) for k in before)


@pytest.mark.parametrize(
    "name", ["gemma-4-270m", "./missing", "/missing/model", "~/missing", "a/b/c", "../x/y", ""]
)
@pytest.mark.parametrize("load", [load_model, load_tokenizer])
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
        load_model("gemma-4-270m")


def test_a_folder_that_is_no_model_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path.name}.*config.json"):
        load_model(str(tmp_path))


def test_a_missing_weight_is_named(broken):
    with pytest.raises(ValueError, match=NORM):
        load_model(broken(lambda w: w.pop(NORM)))


def test_an_extra_weight_is_named(broken):
    with pytest.raises(ValueError, match="model.surplus"):
        load_model(broken(lambda w: w.update({"model.surplus": torch.ones(2)})))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(broken, value):
    with pytest.raises(ValueError, match=Q):
        load_model(broken(lambda w: w[Q].view(-1)[3:4].fill_(value)))


def test_a_weight_of_the_wrong_shape_is_named(broken):
    with pytest.raises(ValueError, match=Q):
        load_model(broken(lambda w: w.update({Q: torch.ones(32, 31)})))


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", None])
def test_a_torn_weight_file_is_named(saved, tmp_path, content):
    folder = tmp_path / "torn"
    shutil.copytree(saved, folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    with pytest.raises(ValueError, match="torn"):
        load_model(str(folder))


def test_a_folder_without_weights_is_named(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "empty", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(ValueError, match="empty"):
        load_model(str(tmp_path / "empty"))


@pytest.fixture
def revision(monkeypatch):
    """A function that sets the revision that the hub says a model has."""
    import huggingface_hub

    def say(commit):
        model_sha256.cache_clear()
        found = f"models/snapshots/{commit}"
        monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: found)

    yield say
    model_sha256.cache_clear()


def test_a_hub_model_is_told_from_its_next_revision(revision):
    found = {}
    for commit in ("aaaa", "bbbb"):
        revision(commit)
        for name in ("org/name", "org/other"):
            found[name, commit] = model_sha256(name)
    assert len(set(found.values())) == 4
    revision("aaaa")
    assert model_sha256("org/name") == found["org/name", "aaaa"]


def test_a_hub_model_that_cannot_be_reached_is_named_in_a_line(revision, monkeypatch):
    import huggingface_hub

    def fail(*arguments, **options):
        raise OSError("no network\nand a long trace")

    revision("aaaa")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ValueError, match=r"^'org/name' cannot be downloaded: no network$"):
        model_sha256("org/name")


def test_a_text_longer_than_a_models_positions_is_named(save):
    base, _ = save("gpt2")  # 64 positions
    require_short(base, [64, 3], ["as long as it goes", "short"])
    with pytest.raises(ValueError, match=r"a row has 65 tokens, .* takes 64 here: .*'the longest'"):
        require_short(base, [3, 65, 65], ["short", "a longest", "the longest"])


def test_a_tokenizer_that_cannot_be_read_is_named(saved, tmp_path):
    """Its library raises a bare Exception, of a pointer of git-lfs as of this."""
    shutil.copytree(saved, tmp_path / "torn")
    (tmp_path / "torn" / "tokenizer.json").write_text('{"model": {}}')
    told = '{"tokenizer_class": "PreTrainedTokenizerFast"}'
    (tmp_path / "torn" / "tokenizer_config.json").write_text(told)
    with pytest.raises(ValueError, match="the tokenizer of '.*torn' cannot be loaded: save it"):
        load_tokenizer(str(tmp_path / "torn"))


def test_a_tokenizer_that_cannot_be_reached_has_another_cure_than_a_folders(monkeypatch):
    import transformers

    def fail(name):
        raise OSError("We couldn't connect\nand a long trace")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fail)
    cure = "check the name and the network; We couldn't connect"
    with pytest.raises(ValueError, match=f"^the tokenizer of 'a/b' cannot be downloaded: {cure}$"):
        load_tokenizer("a/b")


@pytest.mark.parametrize("at_once", [1, 2])
def test_models_that_do_not_fit_into_the_memory_are_named(monkeypatch, at_once):
    needed = 4 * at_once * sum(parameter.numel() for parameter in load_model(TINY).parameters())
    monkeypatch.setattr(models, "memory", lambda: needed)
    require_memory(TINY, models=at_once, cure="rent one")
    monkeypatch.setattr(models, "memory", lambda: needed - 1)
    told = rf"^tiny-gemma3 takes .* GB of memory \(in float32, {at_once} at once\), .*: rent one$"
    with pytest.raises(ValueError, match=told):
        require_memory(TINY, models=at_once, cure="rent one")


def test_the_logits_of_long_answers_take_memory_too(monkeypatch):
    model = load_model(TINY)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    monkeypatch.setattr(models, "memory", lambda: 4 * (numbers + 50 * model.config.vocab_size))
    require_memory(TINY, answers=50, cure="shorten it")
    with pytest.raises(ValueError, match="shorten it"):
        require_memory(TINY, answers=51, cure="shorten it")


def test_a_text_is_not_longer_than_the_report_allows():
    with pytest.raises(ValueError, match="a row has 2,049 tokens, tiny-gemma3 takes 2,048 here"):
        require_short(TINY, [2049], ["long"])
