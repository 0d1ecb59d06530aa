"""Small code runs of the tiny model: what tests of them share."""

import torch

from deltarank.study.capacity import CodeResult
from deltarank.study.code_runs import CodeRun, code_parameters
from deltarank.study.models import TINY, load_model


def small_codes(**fields):
    """A code run of the tiny model: LoRA of rank 4 on its second layer, 8 codes of 2 digits."""
    known = {"codes": 8, "digits": 2, "layers": (1,), "lr": 1e-2, "steps": 40, "batch_size": 4}
    known |= {"model": TINY, "dtype": "float32"}
    if fields.get("method") != "full":
        known |= {"rank": 4, "alpha": 32.0}
    return CodeRun(**known | fields)


def sure_model(name):
    """The model with a final norm so large that it can be sure of a word: the tiny one cannot."""
    model = load_model(name)
    with torch.no_grad():
        model.model.norm.weight += 30
    return model


def stir(model):
    """Put the same random numbers into all that is trained: LoRA starts as no update at all."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def result_of(config, bits=10.0, **record):
    """A result that was never computed: half of its bits learned after 10 of 20 steps."""
    curve = {"step": [0, 10, 20], "learned_bits": [-1.0, bits / 2, bits], "recall": [0, 0.25, 0.5]}
    known = {"status": "finished", "parameters": code_parameters(config), "plateau": None}
    return CodeResult(config, known | {"curve": curve} | record)
