"""vLLM takes what extract writes: by its rules, listed here, and by its own reader if it is there.

The rules are those of vLLM 0.33.0, in the files that are named.
"""

import dataclasses
import importlib.util
import json
import re
import shutil
from pathlib import Path

import families
import pytest
import torch
from families import FAMILIES, extract
from loras import edit_lora
from safetensors.torch import load_file

from deltarank.summary import _served

LINEAR = {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}  # of all four
MAX_RANK = 64  # of the server here: --max-lora-rank, 16 without it
MOST = 512  # vllm/config/lora.py: the largest that --max-lora-rank takes
STARTS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")  # that leave the base as it is
FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_[AB]\.weight")


@dataclasses.dataclass
class Adapter:
    """What vLLM reads of a folder, with the server's --max-lora-rank."""

    config: dict
    names: list[str]  # of the tensors
    max_rank: int = MAX_RANK

    def gives(self, *fields):
        return any(self.config.get(field) for field in fields)

    def ranks(self):
        return [self.config.get("r", 8), *(self.config.get("rank_pattern") or {}).values()]

    def modules(self):
        """The modules with factors, and None for each tensor that is no factor."""
        return [(m := FACTOR.fullmatch(name)) and m[1] for name in self.names]


PEFT_HELPER = {  # vllm/lora/peft_helper.py
    "r, lora_alpha and target_modules are there": lambda a: (
        {"r", "lora_alpha", "target_modules"} <= a.config.keys()
    ),
    "no rank is 0": lambda a: min(a.ranks()) > 0,
    "no rank is above that of the server": lambda a: max(a.ranks()) <= min(a.max_rank, MOST),
    "no module is saved whole, but a classifier": lambda a: (
        set(a.config.get("modules_to_save") or []) <= {"classifier", "score"}
    ),
    "no bias is trained": lambda a: a.config.get("bias", "none") == "none",
    "B has no bias": lambda a: not a.gives("lora_bias"),
    "it is no DoRA": lambda a: not a.gives("use_dora"),
    "it is no aLoRA": lambda a: not a.gives("alora_invocation_tokens"),
    "it is no BD-LoRA": lambda a: not a.gives("use_bdlora"),
    "it is no QALoRA": lambda a: not a.gives("use_qalora"),
    "no layer is replicated": lambda a: not a.gives("layer_replication"),
    "its start left the base as it is": lambda a: (
        not isinstance(start := a.config.get("init_lora_weights", True), str) or start in STARTS
    ),
}
UTILS = {  # vllm/lora/utils.py
    "every tensor is named as a factor": lambda a: all(a.modules()),
}
LORA_MODEL = {  # vllm/lora/lora_model.py
    "the model has a linear layer of every name": lambda a: (
        {module.rpartition(".")[2] for module in a.modules() if module} <= LINEAR
    ),
}
RULES = PEFT_HELPER | UTILS | LORA_MODEL


def broken(folder, max_rank=MAX_RANK):
    """The rules that an adapter breaks."""
    config = json.loads((Path(folder) / "adapter_config.json").read_text())
    names = [*load_file(Path(folder) / "adapter_model.safetensors")]
    adapter = Adapter(config, names, max_rank)
    return [rule for rule, holds in RULES.items() if not holds(adapter)]


def read_by_vllm(folder, max_rank=MAX_RANK):
    """{module: scale * B @ A} as vLLM itself reads a folder for a server; ValueError if refused."""
    from vllm.config.lora import LoRAConfig
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    helper = PEFTHelper.from_local_dir(str(folder), families.SIZES["max_position_embeddings"])
    helper.validate_legal(LoRAConfig(max_lora_rank=max_rank))
    kind = {"lora_model_id": 1, "device": "cpu", "dtype": torch.float32}
    read = LoRAModel.from_local_checkpoint(str(folder), LINEAR, helper, **kind).loras
    return {module: lora.scaling * lora.lora_b @ lora.lora_a for module, lora in read.items()}


vllm_is_here = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None,
    reason="vLLM is not installed: its rules were tested as they are listed, not by its reader",
)


@pytest.fixture(scope="module", params=FAMILIES)
def folders(request, tmp_path_factory):
    """Base and tuned folder of a family."""
    return families.save(tmp_path_factory.mktemp("family"), request.param)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """An adapter that breaks no rule."""
    home = tmp_path_factory.mktemp("plain")
    return extract(families.save(home, "Llama"), home / "adapter", "--rank", 8)


@pytest.fixture
def copy(plain, tmp_path):
    """A copy of it, to be changed."""
    return shutil.copytree(plain, tmp_path / "adapter")


# What extract writes


@pytest.mark.parametrize("options", [["--rank", 8], ["--rank", 40], ["--energy", 0.5]], ids=str)
def test_what_extract_writes_breaks_no_rule(folders, tmp_path, options):
    assert broken(extract(folders, tmp_path / "out", *options)) == []


@pytest.mark.parametrize("max_rank", [16, 32])
def test_a_rank_beyond_the_server_is_refused(folders, tmp_path, max_rank):
    out = extract(folders, tmp_path / "out", "--rank", 40)
    assert broken(out, max_rank) == ["no rank is above that of the server"]


@pytest.mark.parametrize(("rank", "needed"), [(8, 16), (16, 16), (17, 32), (40, 64)])
def test_extract_names_the_rank_that_the_server_has_to_take(
    folders, tmp_path, capsys, rank, needed
):
    out = extract(folders, tmp_path / "out", "--rank", rank)
    said = f" --max-lora-rank {needed}.\n" in capsys.readouterr().out
    assert broken(out, needed) == [] and said == (needed > 16)


@pytest.mark.parametrize(("rank", "told"), [(300, "--max-lora-rank 320."), (513, "than rank 512")])
def test_a_rank_between_those_of_servers_takes_the_next_if_there_is_one(rank, told):
    config = {"r": rank, "rank_pattern": {}, "task_type": "CAUSAL_LM"}
    line, other = _served(Path("my out"), config, norms=False)
    assert told in line and other.startswith("llama.cpp loads it")
    assert rank > 512 or "--lora-modules 'cut=my out' --" in line  # as a shell takes it


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"task_type": None}, "tried with models that adapter_config.json calls CAUSAL_LM alone."),
        ({"fan_in_fan_out": True}, "not tried with adapters of GPT-2's Conv1D."),
    ],
)
def test_nothing_is_said_of_models_that_were_not_tried(other, told):
    config = {"r": 8, "rank_pattern": {}, "task_type": "CAUSAL_LM"} | other
    assert _served(Path("out"), config, norms=False) == [f"vLLM and llama.cpp were {told}"]


def test_norms_are_refused(folders, tmp_path):
    found = broken(extract(folders, tmp_path / "out", "--rank", 8, "--norms"))
    whole, named = "no module is saved whole, but a classifier", "every tensor is named as a factor"
    assert found == [whole, named]


def test_patterns_are_read_and_have_the_scale_1_for_who_does_not(folders, tmp_path):
    """Versions that know no patterns scale all by lora_alpha / r."""
    out = extract(folders, tmp_path / "out", "--rank", 40, "--patterns")
    config = json.loads((out / "adapter_config.json").read_text())
    assert set(config["rank_pattern"].values()) == {32}
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert config["r"] == config["lora_alpha"] == 40
    assert broken(out) == []


# What each rule refuses

NORM = "base_model.model.model.norm.weight"
BIAS = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias"
OTHER = "base_model.model.model.layers.0.self_attn.qkv.lora_{}.weight"


def with_tensor(name):
    return lambda tensors: tensors.update({name: torch.ones(2)})


def with_module(tensors):
    tensors.update({OTHER.format("A"): torch.ones(8, 64), OTHER.format("B"): torch.ones(64, 8)})


BREAKS = [  # rule, change of the tensors, change of the config
    ("r, lora_alpha and target_modules are there", None, "lora_alpha"),  # taken away
    ("no rank is 0", None, {"r": 0}),
    ("no rank is 0", None, {"rank_pattern": {"q_proj": 0}}),
    ("no rank is above that of the server", None, {"r": 65}),
    ("no rank is above that of the server", None, {"rank_pattern": {"q_proj": 65}}),
    ("no module is saved whole, but a classifier", None, {"modules_to_save": ["norm"]}),
    ("no bias is trained", None, {"bias": "lora_only"}),
    ("B has no bias", None, {"lora_bias": True}),
    ("it is no DoRA", None, {"use_dora": True}),
    ("it is no aLoRA", None, {"alora_invocation_tokens": [1, 2]}),
    ("it is no BD-LoRA", None, {"use_bdlora": {"nblocks": 2}}),
    ("it is no QALoRA", None, {"use_qalora": True}),
    ("no layer is replicated", None, {"layer_replication": [[0, 2], [1, 3]]}),
    ("its start left the base as it is", None, {"init_lora_weights": "pissa"}),
    ("every tensor is named as a factor", with_tensor(NORM), {}),
    ("every tensor is named as a factor", with_tensor(BIAS), {}),
    ("the model has a linear layer of every name", with_module, {}),
]


def break_rule(folder, change, config):
    """Change the tensors and the config of a folder, or take a field of it away."""
    edit_lora(folder, change, **(config if isinstance(config, dict) else {}))
    if isinstance(config, str):
        file = folder / "adapter_config.json"
        held = json.loads(file.read_text())
        del held[config]
        file.write_text(json.dumps(held))


def test_every_rule_is_broken_once():
    assert {rule for rule, *_ in BREAKS} == RULES.keys()


@pytest.mark.parametrize(("rule", "change", "config"), BREAKS, ids=[rule for rule, *_ in BREAKS])
def test_a_rule_refuses_what_breaks_it(copy, rule, change, config):
    assert broken(copy) == []
    break_rule(copy, change, config)
    assert broken(copy) == [rule]


# What vLLM itself does


@vllm_is_here
def test_vllm_refuses_what_breaks_a_rule(plain, tmp_path):
    for at, (rule, change, config) in enumerate(BREAKS):
        folder = shutil.copytree(plain, tmp_path / str(at))
        break_rule(folder, change, config)
        with pytest.raises(ValueError):
            pytest.fail(f"{rule}: {len(read_by_vllm(folder))} modules were read")


@vllm_is_here
def test_vllm_reads_the_products(folders, tmp_path):
    for options in ([8], [40], [40, "--patterns"]):
        out = extract(folders, tmp_path / "out", "--rank", *options)
        tensors = load_file(out / "adapter_model.safetensors")
        found = read_by_vllm(out)
        assert len(found) == len(tensors) / 2
        for module, product in found.items():
            B, A = (tensors[f"base_model.model.{module}.lora_{side}.weight"] for side in "BA")
            torch.testing.assert_close(product, B @ A, rtol=0, atol=1e-6)


@vllm_is_here
def test_vllm_refuses_norms(folders, tmp_path):
    with pytest.raises(ValueError, match="modules_to_save"):
        read_by_vllm(extract(folders, tmp_path / "out", "--rank", 8, "--norms"))
