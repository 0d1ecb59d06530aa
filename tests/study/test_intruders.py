"""Intruders: counted as PEFT counts them, and where one was planted."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.intruders import reduce_intruder_dimension

from deltarank.study.intruders import (
    THRESHOLDS,
    TOP,
    base_directions,
    intruder_cosines,
    intruder_counts,
)
from deltarank.study.models import TINY, load_model, matrices
from deltarank.study.training import lora_layers, quiet_peft


@pytest.fixture(autouse=True)
def forgotten():
    """Nothing is kept between tests."""
    base_directions.cache_clear()
    yield
    base_directions.cache_clear()


def test_a_planted_direction_is_the_one_intruder():
    torch.manual_seed(0)
    W0 = torch.randn(64, 40)
    U0 = torch.linalg.svd(W0, full_matrices=False).U
    u = torch.randn(64)
    u -= U0 @ (U0.T @ u)  # outside all that the base has
    W1 = W0 + 1000 * torch.outer(u / u.norm(), torch.ones(40) / 40**0.5)
    cosines = intruder_cosines(W1, U0)
    assert cosines[0] < 0.05 and cosines.shape == (TOP,)
    assert torch.allclose(intruder_cosines(W0, U0), torch.ones(TOP), atol=1e-4)


def test_they_are_as_many_as_peft_finds():
    torch.manual_seed(0)
    names = [name.removesuffix(".weight") for name in matrices(load_model(TINY))]
    with quiet_peft():
        model = get_peft_model(load_model(TINY), LoraConfig(r=4, target_modules=names))
    W1 = {}
    for name, layer in lora_layers(model).items():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.3)
        W1[name] = layer.get_base_layer().weight + layer.get_delta_weight("default")
    counts = intruder_counts({name: W.detach() for name, W in W1.items()}, TINY)
    assert list(counts) == [f"{threshold:g}" for threshold in THRESHOLDS]
    assert 0 < counts["0.5"] < counts["0.9"]
    said = []
    with quiet_peft():
        reduce_intruder_dimension(model, threshold_epsilon=0.5, logging_sink=said.append)
    assert sum(int(line.split()[-1]) for line in said if "Intruders:" in line) == counts["0.5"]


def test_the_base_has_none():
    W0 = {name: W.detach() for name, W in matrices(load_model(TINY)).items()}
    assert set(intruder_counts(W0, TINY).values()) == {0}
