"""Every language model of the installed transformers: names tell what its modules are, or nothing.

About half a minute; no weights are made.  Where this fails after an upgrade, models came or were
renamed: add them to peft_format.RENAMED, or teach find_places their names.
"""

import re

import pytest
import torch
import transformers
from torch import nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D

from deltarank.peft_format import find_places

TASKS = (
    "CAUSAL_LM MASKED_LM SEQ_TO_SEQ_CAUSAL_LM SEQUENCE_CLASSIFICATION TOKEN_CLASSIFICATION "
    "QUESTION_ANSWERING IMAGE_TEXT_TO_TEXT"
)
DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "encoder_layers", "decoder_layers")
KNOWN_HEADS = {"lm_head", "decoder", "output_projection"}  # of the vocabulary, not given as such
LEFT_OUT = re.compile(  # modules that no adapter of ours is for, by the names that they have today
    r"embed|_emb\.|\b(wte|wpe|shared)\.|relative_attention_bias"  # of words and positions
    r"|\bexperts\.|\.(gate|router)\.(\w+\.)?$"  # experts, and what chooses them
)
pytestmark = pytest.mark.filterwarnings("ignore")


def architectures():
    """{architecture: model type} of all that reads or writes text."""
    found = {}
    for task in TASKS.split():
        names = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES")
        for kind, classes in names.items():
            found |= dict.fromkeys([classes] if isinstance(classes, str) else classes, kind)
    return found


def skeleton(architecture, kind):
    """A model of the default sizes but few layers, without memory; None if it cannot be built."""
    for depth in (2, None):
        try:
            config = transformers.CONFIG_MAPPING[kind]()
            for sizes in [config, *(getattr(config, name) for name in config.sub_configs)]:
                for name in DEPTHS:
                    if depth and isinstance(getattr(sizes, name, None), int):
                        setattr(sizes, name, depth)
            with torch.device("meta"):
                return getattr(transformers, architecture)(config)
        except Exception:  # defaults that do not fit each other, libraries that are not here
            continue
    return None


def is_vector_module(module):
    return module is not None and all(p.dim() == 1 for p in module.parameters())


def wrong_places(model, places):
    """Tensors to which names give a wrong place, or none though they are of linear layers."""
    modules = dict(model.named_modules())
    head = model.get_output_embeddings()
    for name, place in places.linear.items():
        module = modules.get(place.removesuffix(".weight"))
        kind = Conv1D if name in places.conv1d else nn.Linear
        if module is head or not isinstance(module, kind):
            yield name
    for name, place in places.norms.items():
        if not is_vector_module(modules.get(place.rpartition(".")[0])):
            yield name
    found = {place.removesuffix(".weight") for place in places.linear.values()}
    for name, module in modules.items():
        excused = LEFT_OUT.search(f"{name}.") or name.split(".")[-1] in KNOWN_HEADS
        excused = excused or module is head
        if isinstance(module, nn.Linear | Conv1D) and name not in found and not excused:
            yield f"no place for {name}"


def test_names_tell_the_modules_of_every_language_model_or_are_refused():
    told, refused, wrong = [], [], {}
    for architecture, kind in architectures().items():
        model = skeleton(architecture, kind)
        if model is None:
            continue
        config = model.config.to_dict() | {"architectures": [architecture]}
        tensors = revert_weight_conversion(model, model.state_dict())
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        try:
            places = find_places(config, shapes)
        except ValueError:
            refused.append(architecture)
            continue
        told.append(architecture)
        problems = [*wrong_places(model, places)]
        if any(name.startswith("model.language_model.") for name in places.linear):
            problems = [name for name in problems if "language_model." in name]
        if problems:
            wrong[architecture] = problems[:3]
    assert wrong == {}
    assert len(told) > 400 and len(refused) < 150
