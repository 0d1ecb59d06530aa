"""The upper part of a model on cached states, against the whole model."""

import families
import pytest
import torch
import torch.nn.functional as F
from small_codes import small_codes, stir

from deltarank.runtime import product_dtype
from deltarank.study.code_runs import code_model
from deltarank.study.codes import digit_tokens, draw_codes, encode_codes
from deltarank.study.models import TINY, load_tokenizer
from deltarank.study.tasks import collate
from deltarank.study.upper import ROWS, Skip, decoder_layers, upper_part


def plain_logits(config, model, rows):
    """Logits (codes, digits, vocabulary) of the whole model, as it computes them itself."""
    batch, digits = encode_codes(rows, load_tokenizer(config.model))
    dtype = product_dtype(config.dtype)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        hidden = model.get_decoder()(input_ids=batch["input_ids"]).last_hidden_state
    logits = hidden.float() @ model.get_output_embeddings().weight.T
    return logits[:, :-1][batch["labels"][:, 1:] != -100].view(*digits.shape, -1), digits


IDS = digit_tokens(load_tokenizer(TINY))
CODES = draw_codes(8, 2, seed=0)
RUNS = {
    "LoRA on the upper layer": {},
    "on one of its modules": {"modules": ("down_proj",), "rank": 1},
    "LoRA on all layers": {"layers": (0, 1)},
    "LoRA on the lower layer": {"layers": (0,)},
    "the upper layer itself": {"method": "full"},
}


def small_upper(config, rows):
    """The upper part of the run's model, stirred, with these rows."""
    batch, digits = encode_codes(rows, load_tokenizer(config.model))
    dtype = product_dtype(config.dtype)
    model, first = code_model(config), config.layers[0]
    upper = upper_part(model, first, batch, ids=IDS, targets=digits, dtype=dtype)
    stir(upper.model)
    return upper


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("changes", RUNS.values(), ids=RUNS)
def test_cached_states_give_the_hidden_states_of_the_whole_model_to_the_last_bit(changes, dtype):
    config = small_codes(dtype=dtype, **changes)
    upper, whole = small_upper(config, CODES), stir(code_model(config))
    tokens = encode_codes(CODES, load_tokenizer(TINY))[0]["input_ids"][:, :-1]
    kind = product_dtype(dtype)
    with torch.autocast("cpu", kind, enabled=kind != torch.float32):
        plain = whole.get_decoder()(input_ids=tokens).last_hidden_state
    assert torch.equal(upper.hidden(inputs_embeds=upper.states), plain)
    skipped = [isinstance(layer, Skip) for layer in decoder_layers(upper.model)]
    assert skipped == [i < config.layers[0] for i in range(2)]


@pytest.mark.parametrize("changes", RUNS.values(), ids=RUNS)
def test_the_logits_are_those_of_the_whole_model_at_the_ten_digits(changes):
    """Up to rounding: the head makes ten columns in one product, there the whole vocabulary."""
    config = small_codes(**changes)
    upper, whole = small_upper(config, CODES), stir(code_model(config))
    plain, digits = plain_logits(config, whole, CODES)
    assert torch.equal(upper.targets, digits)
    assert torch.allclose(upper.logits(slice(None)), plain[..., IDS], atol=1e-5)
    untrained, _ = plain_logits(config, code_model(config), CODES)
    assert not torch.allclose(plain[..., IDS], untrained[..., IDS], atol=1e-2)


@pytest.mark.parametrize("changes", RUNS.values(), ids=RUNS)
def test_a_step_has_the_gradient_of_the_whole_model(changes):
    config, picked = small_codes(**changes), [5, 1, 2]
    upper, whole = small_upper(config, CODES), stir(code_model(config))
    upper.nats(torch.tensor(picked)).mean().backward()
    logits, digits = plain_logits(config, whole, [CODES[i] for i in picked])
    F.cross_entropy(logits[..., IDS].flatten(0, 1), digits.flatten()).backward()
    ours = {n: p.grad for n, p in upper.model.named_parameters() if p.requires_grad}
    theirs = {n: p.grad for n, p in whole.named_parameters() if p.requires_grad}
    assert ours.keys() == theirs.keys() and len(ours) >= 2
    for name, gradient in theirs.items():
        assert gradient.norm() > 0, name
        assert (ours[name] - gradient).norm() <= 1e-4 * gradient.norm(), name


def test_the_loss_over_the_vocabulary_is_that_of_the_digits_and_that_there_is_one():
    config, ids = small_codes(), torch.tensor(IDS)
    logits, digits = plain_logits(config, stir(code_model(config)), CODES)
    whole = F.cross_entropy(logits.movedim(-1, 1), ids[digits], reduction="none")
    form = logits.logsumexp(-1) - logits[..., ids].logsumexp(-1)
    ours = small_upper(config, CODES).nats(slice(None))
    assert torch.allclose(ours + form, whole, atol=1e-5) and form.mean() > 1


def test_scores_are_of_every_row_whatever_the_batch():
    upper = small_upper(small_codes(), draw_codes(ROWS + 3, 2, seed=0))
    nats, right = upper.scores()
    assert nats.shape == right.shape == upper.targets.shape == (ROWS + 3, 2)
    last = slice(ROWS + 1, None)
    with torch.no_grad():
        assert torch.allclose(nats[last], upper.nats(last), atol=1e-5)
        assert torch.equal(right[last], upper.logits(last).argmax(-1) == upper.targets[last])


def test_prompts_of_several_lengths_are_told_apart_from_their_padding():
    config = small_codes()
    rows = [{"prompt": p, "answer": a} for p, a in (("a:", "12"), ("longer:", "34"))]
    upper, whole = small_upper(config, rows), stir(code_model(config))
    for i, row in enumerate(rows):
        alone, _ = plain_logits(config, whole, [row])
        assert torch.allclose(upper.logits(slice(i, i + 1)), alone[..., IDS], atol=1e-5)


def family_upper(family):
    """The last layer of a tiny model of a family, on two rows, and the whole model's logits."""
    rows = [{"input_ids": [3, 9, 4, 7], "labels": [-100, -100, 4, 7]}] * 2
    batch, ids = collate(rows, 4), [4, 7, 11]
    with torch.no_grad():
        plain = families.build(family)(input_ids=batch["input_ids"]).logits[:, 1:3][..., ids]
    upper = upper_part(
        families.build(family), 2, batch, ids=ids,
        targets=torch.tensor([[0, 1]] * 2), dtype=torch.float32,
    )  # fmt: skip
    return upper, plain


@pytest.mark.parametrize("family", families.FAMILIES)
def test_other_families_go_on_from_their_states_too(family):
    upper, plain = family_upper(family)
    assert torch.allclose(upper.logits(slice(None)), plain, atol=1e-5)


def test_a_family_that_does_more_to_embeddings_than_its_layers_is_refused(monkeypatch):
    """Such as Granite, which multiplies what it is given by a number first."""
    sizes = {"embedding_multiplier": 3.0}
    monkeypatch.setitem(families.FAMILIES, "Granite", ("GraniteForCausalLM", sizes))
    with pytest.raises(ValueError, match="^GraniteForCausalLM does not go on from the states"):
        family_upper("Granite")


def test_a_family_whose_layers_are_elsewhere_is_refused():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=384))
    with pytest.raises(ValueError, match="^GPT2LMHeadModel keeps its layers where"):
        decoder_layers(model)
