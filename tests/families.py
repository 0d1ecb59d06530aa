"""Tiny models of four families as base and fine-tune, and their cut: for tests of serving."""

import torch

from deltarank.cli import main

SIZES = {
    "hidden_size": 64,  # so small that the cut is exact: an update of noise has no gap
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,  # k_proj and v_proj have rank 32 at most, the others 64
    "vocab_size": 96,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,  # logits of size 1
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WIDE = {"head_dim": 32, "num_key_value_heads": 1}  # heads that are wider together than the model
GEMMA = {"query_pre_attn_scalar": 16, "num_hidden_layers": 6}  # of which the last sees everything
FAMILIES = {  # class of transformers, sizes of its own
    "Llama": ("LlamaForCausalLM", {}),
    "Qwen 3": ("Qwen3ForCausalLM", WIDE | {"tie_word_embeddings": True}),
    "Gemma 3": ("Gemma3ForCausalLM", GEMMA),
    "Mistral": ("MistralForCausalLM", WIDE),
}
TOKENS = [3, 90, 17, 17, 64, 5, 41, 88, 2, 29, 73, 11]


def build(family):
    """A random model, the same at every call; no two entries of a norm are alike."""
    import transformers

    name, sizes = FAMILIES[family]
    model_class = getattr(transformers, name)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**(SIZES | sizes))).float().eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight += 0.1 * torch.randn(weight.shape)
    return model


def save(home, family):
    """Save base and tuned below `home`: noise on every matrix and norm of the layers."""
    model, generator = build(family), torch.Generator().manual_seed(1)
    model.save_pretrained(home / "base")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".layers." in name:
                weight += 0.03 * torch.randn(weight.shape, generator=generator)
    model.save_pretrained(home / "tuned")
    return str(home / "base"), str(home / "tuned")


def extract(folders, out, *options):
    """Run `deltarank extract` on base and tuned; return the adapter's folder."""
    assert main(["extract", *folders, str(out), *map(str, options)]) == 0
    return out


@torch.no_grad()
def logits(model):
    """The logits after every token of TOKENS, (token, entry of the vocabulary), in float64."""
    return model(torch.tensor([TOKENS])).logits[0].double()


@torch.no_grad()
def cut_logits(folders, rank, alpha=None):
    """Those of base + the best rank-r approximation of each matrix's update, all in float64.

    alpha: each approximation times alpha / its own rank, as a program has it that knows no
    patterns; without it times 1.
    """
    from transformers import AutoModelForCausalLM

    base, tuned = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float64) for f in folders)
    for (name, W0), W1 in zip(base.named_parameters(), tuned.parameters(), strict=True):
        if ".layers." in name and W0.dim() == 2:
            U, S, Vh = torch.linalg.svd(W1 - W0, full_matrices=False)
            U, S, Vh = U[:, :rank], S[:rank], Vh[:rank]
            W0 += (alpha / len(S) if alpha else 1) * (U * S) @ Vh
    return logits(base)
