"""Adapters that PEFT writes, with planted factors: what tests of adapters as input share."""

import json
import warnings
from pathlib import Path

import torch
from pairs import build
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

LLAMA = ["q_proj", "k_proj", "down_proj"]
CONFIGS = {  # what PEFT is asked for: architecture, LoraConfig
    "plain": ("llama", {"r": 4, "lora_alpha": 12, "target_modules": LLAMA}),
    "rslora": ("llama", {"r": 4, "lora_alpha": 12, "use_rslora": True, "target_modules": LLAMA}),
    "patterns": (
        "llama",
        {
            "r": 4,
            "lora_alpha": 12,
            "target_modules": LLAMA,
            "rank_pattern": {"1.self_attn.q_proj": 2, "[kq]_proj": 6},  # the first one counts
            "alpha_pattern": {"down": 99, "down_proj": 5, r"layers\.\d.self_attn.k_proj": 3},
        },
    ),
    "patterns of rslora": (
        "llama",
        {"r": 4, "use_rslora": True, "target_modules": LLAMA, "rank_pattern": {"q_proj": 7}},
    ),
    "turned": (
        "gpt2",
        {"r": 4, "lora_alpha": 8, "fan_in_fan_out": True, "target_modules": ["c_attn", "c_fc"]},
    ),
    "qwen 3": ("qwen 3", {"r": 4, "lora_alpha": 12, "target_modules": "all-linear"}),
}


def write_lora(folder, architecture="llama", *, dtype=torch.float32, **config):
    """Save an adapter of PEFT whose factors are random; return the folder's name."""
    torch.manual_seed(7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of embeddings that are saved too
        model = get_peft_model(build(architecture), LoraConfig(**config))
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_" in name:
                    weight.copy_(0.05 * torch.randn(weight.shape))
        model.to(dtype).save_pretrained(folder)
    return str(folder)


def planted(folder, name):
    """Save the adapter of CONFIGS; return the folder's name."""
    architecture, config = CONFIGS[name]
    return write_lora(folder, architecture, **config)


def merged_updates(folder, architecture="llama"):
    """{weight: what PEFT's merge adds to it}, float64, of weights that it changes."""
    before = {n: W.detach().clone() for n, W in build(architecture).double().named_parameters()}
    model = PeftModel.from_pretrained(
        build(architecture).double(), folder, autocast_adapter_dtype=False
    )
    after = dict(model.double().merge_and_unload().named_parameters())
    updates = {name: (after[name] - W).detach() for name, W in before.items()}
    return {name: dW for name, dW in updates.items() if dW.any()}


def edit_lora(folder, change=None, **config):
    """Change the tensors and the config of an adapter's folder."""
    file, settings = (
        Path(folder) / "adapter_model.safetensors",
        Path(folder) / "adapter_config.json",
    )
    if change:
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})
    settings.write_text(json.dumps(json.loads(settings.read_text()) | config))
