"""The answer loss of other families: the model's own, by its logits' rule, or refused by name."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from small_runs import ROWS, batch_of, small

from deltarank.study import evaluation, losses, training
from deltarank.study.evaluation import score_rows
from deltarank.study.losses import (
    HeadCrossEntropy,
    LogitRule,
    answer_loss,
    packs,
    require_own_loss,
    scoring,
)
from deltarank.study.models import TINY, load_model, load_tokenizer
from deltarank.study.tasks import a_line_each, encode, pack

VOCABULARY = {"vocab_size": 384, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2} | VOCABULARY
LLAMA_LIKE = SIZES | {"intermediate_size": 64, "num_key_value_heads": 1, "head_dim": 16}
GPT_LIKE = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64} | VOCABULARY
FAMILIES = {  # a causal model of transformers: sizes, and what its head does beside a product
    "Llama": LLAMA_LIKE,
    "Qwen2": SIZES | {"intermediate_size": 64, "num_key_value_heads": 1},
    "Qwen3": LLAMA_LIKE,
    "Gemma2": LLAMA_LIKE | {"final_logit_softcapping": 2.0},
    "Gemma3": LLAMA_LIKE,
    "Cohere": LLAMA_LIKE | {"logit_scale": 0.25},
    "Granite": LLAMA_LIKE | {"logits_scaling": 3.0},
    "Phi": SIZES | {"intermediate_size": 64},
    "Olmo2": SIZES | {"intermediate_size": 64, "num_key_value_heads": 1},
    "GPT2": GPT_LIKE,
    "GPTJ": GPT_LIKE | {"rotary_dim": 8},
    "Bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 2} | VOCABULARY,
    "OPT": SIZES | {"ffn_dim": 64, "max_position_embeddings": 64, "word_embed_proj_dim": 32},
}
LEAKING = {"Bloom", "OPT"}  # a row of a packed line sees those before it


def build(family):
    """A random model of two layers over bytes, biases and norms random too; no dropout."""
    name = f"{family}LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    model_class = getattr(transformers, name)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**FAMILIES[family]))
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    return model.eval()


def tokens_of(rows):
    return [encode(row, load_tokenizer(TINY), 64) for row in rows]


def loss_of(model, batch):
    head = model.get_output_embeddings().weight
    return answer_loss(model, head, batch, dtype=torch.float32)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_the_models_own(family):
    model, batch, found = build(family), a_line_each(tokens_of(ROWS)), []
    for loss in (loss_of(model, batch), model(**batch).loss):
        model.zero_grad()
        loss.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append((loss.item(), gradients))
    (ours, gradients), (own, oracle) = found
    assert ours == pytest.approx(own, rel=1e-5)
    assert gradients.keys() == oracle.keys()
    total = sum(gradient.square().sum() for gradient in oracle.values()).sqrt()
    assert all((gradients[n] - oracle[n]).norm() < 1e-5 * total for n in oracle)
    bias = "lm_head.bias"
    assert bias not in oracle or oracle[bias].norm() > 1e-2 * total  # so that one left out is seen


@pytest.mark.parametrize("family", FAMILIES)
def test_scored_rows_have_the_models_own_loss_without_padding(family):
    model = build(family)
    scores = score_rows(model, small(seq_len=64), ROWS)
    for row, nats, tokens in zip(tokens_of(ROWS), scores["nats"], scores["tokens"], strict=True):
        assert nats == pytest.approx(tokens * model(**a_line_each([row])).loss.item(), rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_packed_where_that_leaves_the_loss(family):
    model, rows = build(family), tokens_of(ROWS)
    require_own_loss(model)
    assert packs(model) == (family not in LEAKING)
    plain, packed = (loss_of(model, batch).item() for batch in (a_line_each(rows), pack(rows)))
    assert (packed == pytest.approx(plain, rel=1e-5)) == packs(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cap", [None, 0.7])
@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("biased", [False, True])
def test_gradients_of_every_rule_are_those_of_autograd(biased, scale, cap, dtype, monkeypatch):
    monkeypatch.setattr(HeadCrossEntropy, "SLICE", 7)  # three slices, the last one shorter
    torch.manual_seed(0)
    leaves = [torch.randn(5, 8), torch.randn(17, 8), torch.randn(17)][: 2 + biased]
    target, found = torch.tensor([0, 6, 7, 16, 7]), []
    for ours in (True, False):
        hidden, head, *bias = (leaf.clone().requires_grad_() for leaf in leaves)
        if ours:
            rule = (*bias, scale, cap) if biased else (None, scale, cap)
            loss = HeadCrossEntropy.apply(hidden.to(dtype), head, target, *rule)
        else:
            y = scale * (hidden @ head.T + (bias[0] if biased else 0))
            loss = F.cross_entropy(cap * torch.tanh(y / cap) if cap else y, target)
        (2 * loss).backward()
        found.append([loss, *(leaf.grad for leaf in (hidden, head, *bias))])
    exact = dtype == torch.float32
    for mine, oracle in zip(*found, strict=True):
        assert (mine - oracle).norm() < (1e-5 if exact else 2e-2) * oracle.norm()


def test_long_answers_pass_by_in_chunks(small_task, monkeypatch):
    config, model = small(), load_model(TINY)
    batch = batch_of(small_task, seq_len=16)
    found = []
    for chunk in (losses.CHUNK, 5):
        for module in (losses, evaluation):
            monkeypatch.setattr(module, "CHUNK", chunk)
        model.zero_grad()
        loss = losses.answer_loss(model, model.lm_head.weight, batch, dtype=torch.float32)
        loss.backward()
        scores = evaluation.score_rows(model, config, small_task)
        found.append((loss, model.model.layers[0].mlp.up_proj.weight.grad.clone(), scores))
    (whole, gradient, scores), (parts, of_parts, chunked) = found
    assert parts.item() == pytest.approx(whole.item(), rel=1e-6)
    assert (of_parts - gradient).norm() < 1e-5 * gradient.norm()
    assert chunked["nats"].tolist() == pytest.approx(scores["nats"].tolist(), rel=1e-5)
    assert chunked[["tokens", "right"]].equals(scores[["tokens", "right"]])


def test_a_rule_with_nothing_to_do_leaves_every_bit():
    z = torch.randn(3, 5)
    assert LogitRule().logits(z) is z
    assert LogitRule().slope(z) == 1.0


class DoubledLlamaForCausalLM(transformers.LlamaForCausalLM):
    """A family that no field of its configuration gives away."""

    def forward(self, labels=None, **inputs):
        output = super().forward(**inputs)
        output.logits = 2 * output.logits
        if labels is not None:
            output.loss = F.cross_entropy(output.logits[0, :-1], labels[0, 1:])
        return output


@pytest.fixture
def doubled():
    torch.manual_seed(0)
    return DoubledLlamaForCausalLM(transformers.LlamaConfig(**LLAMA_LIKE))


def test_an_unknown_rule_is_refused_by_name_before_training(doubled, store, monkeypatch):
    with pytest.raises(ValueError, match=r"DoubledLlama.* own loss .* nats, ours") as refusal:
        require_own_loss(doubled)
    assert "\n" not in str(refusal.value)
    monkeypatch.setattr(training, "load_model", lambda name: doubled)
    with pytest.raises(ValueError, match="DoubledLlama"):
        training.prepare(small(steps=1, lr=1e-3))


@pytest.mark.parametrize("family", ["Bloom", "Llama"])
def test_the_first_loss_of_training_is_the_models_own(family, small_task, store):
    """Of Bloom too, whose rows cannot be packed: it trains with a row a line."""
    model, config = build(family), small(steps=1, lr=1e-3)  # one batch holds all training rows
    expected = model(**batch_of(small_task[:4], 16)).loss.item()
    assert training.train(config, model) == pytest.approx([expected], rel=1e-5)


@pytest.mark.parametrize("mode", [True, False])
def test_the_checks_leave_mode_weights_and_random_state(mode):
    model = build("GPT2").train(mode)  # with dropout
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    require_own_loss(model)
    packs(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(part.training == mode for part in model.modules())
    assert all(torch.equal(weights[n], tensor) for n, tensor in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_model_is_trained_again_after_an_error_in_scoring():
    model = build("Llama").train()
    with pytest.raises(KeyError), scoring(model):
        assert not model.training
        raise KeyError
    assert model.training
    assert torch.is_grad_enabled()
