"""Small models with a planted update, saved as base and tuned: what tests of pairs share."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from deltarank.alignment import open_pair

SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "vocab_size": 64}
LLAMA_LIKE = SMALL | {"intermediate_size": 48, "num_key_value_heads": 1, "head_dim": 16}
ARCHITECTURES = {  # class of transformers, sizes
    "llama": ("LlamaForCausalLM", LLAMA_LIKE),
    "gemma": ("Gemma3ForCausalLM", LLAMA_LIKE),
    "qwen": ("Qwen2ForCausalLM", LLAMA_LIKE | {"tie_word_embeddings": True}),
    "gpt2": (
        "GPT2LMHeadModel",
        {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 64, "n_positions": 64},
    ),
    "bert": ("BertForMaskedLM", SMALL | {"intermediate_size": 48}),
    "gpt-oss": (
        "GptOssForCausalLM",
        LLAMA_LIKE | {"num_local_experts": 3, "num_experts_per_tok": 2},
    ),
    "mixtral": ("MixtralForCausalLM", LLAMA_LIKE | {"num_local_experts": 3}),
}
RANK, SIGMA = 3, torch.tensor([4.0, 2.0, 1.0]) * 1e-2
Q = "model.layers.0.self_attn.q_proj.weight"  # (32, 32)


def build(architecture):
    """A random model of two small layers, the same at every call."""
    import transformers

    name, sizes = ARCHITECTURES[architecture]
    model_class = getattr(transformers, name)
    torch.manual_seed(0)
    config = model_class.config_class(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return model_class(config).float()


def plant(weight, generator, sigma=SIGMA):
    """Add an update with the singular values `sigma` to a weight (..., m, n) in place."""
    *experts, m, n = weight.shape
    k = min(len(sigma), m, n)
    U, V = (torch.linalg.qr(torch.randn(*experts, d, k, generator=generator)).Q for d in (m, n))
    weight += (U * sigma[:k]) @ V.transpose(-1, -2)


def is_layer_matrix(name, weight):
    return weight.dim() >= 2 and any(
        f".{stack}." in f".{name}" for stack in ("layers", "layer", "h")
    )


def save(home, architecture="llama", *, dtype=torch.float32, norms=True, **saving):
    """Save base and tuned below `home`; every matrix of a layer has an update, norms if asked."""
    model, generator = build(architecture), torch.Generator().manual_seed(1)
    model.to(dtype).save_pretrained(home / "base", **saving)
    model.float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if is_layer_matrix(name, weight):
                plant(weight, generator)
            elif norms and "norm" in name.lower():
                weight += 0.01
    model.to(dtype).save_pretrained(home / "tuned", **saving)
    return str(home / "base"), str(home / "tuned")


def edit(folder, change):
    """Change the tensors of a folder with one file."""
    file = f"{folder}/model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def same_tables(one, other):
    """Whether two tables of compare_checkpoints agree, spectra included."""
    spectra = zip(one["S"], other["S"], strict=True)
    rest = (table.drop(columns="S") for table in (one, other))
    return next(rest).equals(next(rest)) and all(torch.equal(*pair) for pair in spectra)


def refuse(base, tuned, *parts, error=ValueError):
    """The pair is refused by its headers, with one line that holds all `parts`."""
    with pytest.raises(error) as raised:
        open_pair(base, tuned)
    for part in parts:
        assert part in str(raised.value)
    assert "\n" not in str(raised.value)
