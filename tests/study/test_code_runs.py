"""Code runs: values that cannot run, keys, and what is trained, counted as PEFT counts it."""

import dataclasses
import math

import pytest
from small_codes import small_codes

from deltarank.study.code_runs import CodeRun, code_model, code_parameters
from deltarank.study.profiles import PROFILES

BAD = {
    "codes": {"codes": 1},
    "digits": {"digits": 0},
    "method": {"method": "dora"},
    "dtype": {"dtype": "float16"},
    "layers": {"layers": ()},
    "layers again": {"layers": (1, 0)},
    "layers below": {"layers": (-1,)},
    "modules": {"modules": ("up_proj", "down_proj")},
    "modules of full": {"method": "full", "modules": ("up_proj",)},
    "rank": {"rank": 0},
    "rank of full": {"method": "full", "rank": 1},
    "alpha": {"alpha": 0.0},
    "alpha of full": {"method": "full", "alpha": 1.0},
    "lr": {"lr": 0.0},
    "lr again": {"lr": math.nan},
    "steps": {"steps": 0},
    "batch_size": {"batch_size": 0},
}


@pytest.mark.parametrize(("name", "changes"), BAD.items(), ids=BAD)
def test_values_that_cannot_run_are_refused_in_one_line(name, changes):
    with pytest.raises(ValueError, match=f"^{name.split()[0]}=[^\n]*: [^\n]+$"):
        small_codes(**changes)


LACKS = {
    "layers": ({"layers": (0, 2)}, r"^layers=\(0, 2\): the model has layers 0 to 1$"),
    "modules": ({"modules": ("c_attn",)}, r"^modules=\('c_attn',\): choose from down_proj, .*"),
    "rank": ({"rank": 17}, r"^rank=17 is above the smallest matrix \(16, 32\); choose at most 16$"),
}


@pytest.mark.parametrize(("changes", "message"), LACKS.values(), ids=LACKS)
def test_what_the_model_lacks_is_named(changes, message):
    config = small_codes(**changes)
    for refuses in (code_model, code_parameters):
        with pytest.raises(ValueError, match=message):
            refuses(config)


COUNTS = {  # sums of both sides of the matrices: (32, 32), (16, 32), (64, 32)
    "all modules": ({"rank": 1}, 64 + 48 + 48 + 64 + 3 * 96),
    "one module": ({"rank": 2, "modules": ("down_proj",)}, 2 * 96),
    "two layers": ({"rank": 3, "layers": (0, 1)}, 2 * 3 * 512),
    "full": ({"method": "full"}, 2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32 + 4 * 32 + 2 * 16),
}


@pytest.mark.parametrize(("changes", "count"), COUNTS.values(), ids=COUNTS)
def test_the_trained_parameters_are_counted_as_peft_counts_them(changes, count):
    config = small_codes(**changes)
    model = code_model(config)
    assert code_parameters(config) == count
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
    if config.method == "lora":
        assert model.get_nb_trainable_parameters()[0] == count


def test_only_the_named_layers_and_modules_are_trained():
    trained = {
        name
        for name, p in code_model(small_codes(modules=("down_proj", "q_proj"))).named_parameters()
        if p.requires_grad
    }
    assert len(trained) == 4
    assert all(".layers.1." in n and ("down_proj" in n or "q_proj" in n) for n in trained)
    full = [*code_model(small_codes(method="full")).named_parameters()]
    assert {n for n, p in full if p.requires_grad} == {n for n, _ in full if ".layers.1." in n}


CHANGES = {
    "codes": 9,
    "layers": (0,),
    "lr": 1e-3,
    "steps": 41,
    "modules": ("q_proj",),
    "rank": 3,
    "alpha": 16.0,
    "digits": 3,
    "batch_size": 8,
    "seed": 1,
    "dtype": "bfloat16",
}


def test_the_key_changes_with_every_field_but_the_profile():
    config, fields = small_codes(), {field.name for field in dataclasses.fields(CodeRun)}
    assert fields - CHANGES.keys() == {"method", "model", "profile"}
    others = [dataclasses.replace(config, **{name: value}) for name, value in CHANGES.items()]
    others.append(small_codes(method="full"))
    assert len({one.key for one in [config, *others]}) == len(CHANGES) + 2
    elsewhere = [dataclasses.replace(config, profile=name) for name in PROFILES]
    assert {one.key for one in elsewhere} == {config.key}
    assert config.key.startswith("codes-lora-r4-l1-n8-s0-")


def test_the_bits_of_a_run_are_those_of_its_digits():
    assert small_codes(codes=256, digits=6).bits == pytest.approx(5102.48, abs=0.01)
