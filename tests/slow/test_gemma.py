"""The embedded Gemma 3 270M: about 50 s for the first conversion, then about 30 s."""

import math

import pytest
import torch

from deltarank.runtime import product_dtype
from deltarank.study.capacity import code_upper
from deltarank.study.code_runs import CodeRun, code_model, code_parameters
from deltarank.study.codes import WORDS, digit_tokens, draw_codes, encode_codes
from deltarank.study.convert import GEMMA
from deltarank.study.general import general_text
from deltarank.study.models import load_model, load_tokenizer, matrices
from deltarank.study.profiles import PROFILES
from deltarank.study.taskdata.general import TOKENS
from deltarank.study.taskdata.rules import n_tokens
from deltarank.study.tasks import TASKS, encode, load_task
from deltarank.study.training import prepare, train

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(scope="module", autouse=True)
def default_cache(cache):
    """The cache of the repository, so that the model is converted once for all sessions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("LOWRANK_CACHE")
        yield


@pytest.fixture(scope="module")
def gemma():
    return load_model(GEMMA)


def test_gemma_has_the_stated_size_and_matrices(gemma):
    shapes = {tuple(weight.shape) for weight in matrices(gemma).values()}
    assert len(matrices(gemma)) == 126
    assert shapes == {(1024, 640), (256, 640), (640, 1024), (2048, 640), (640, 2048)}
    assert sum(p.numel() for p in gemma.parameters()) / 1e6 == pytest.approx(268.1, abs=0.05)
    assert all(p.dtype == torch.float32 for p in gemma.parameters())


@pytest.mark.parametrize("task", TASKS)
def test_every_row_fits_48_gemma_tokens(task):
    tokenizer = load_tokenizer(GEMMA)
    for rows in load_task(task).values():
        for row in rows:
            tokens = encode(row, tokenizer, 48)
            assert tokens["input_ids"][0] == tokenizer.bos_token_id
            assert sum(label != -100 for label in tokens["labels"]) >= 2


def test_the_sample_of_general_text_has_64_k_tokens():
    lengths = [n_tokens(text) for texts in general_text().values() for text in texts]
    assert max(lengths) <= TOKENS and 62_000 <= sum(lengths) <= 66_000


def test_a_few_steps_on_sentiment_lower_the_loss(store):
    config = PROFILES["paper"].config("sentiment", steps=6, compile=False)
    losses = train(config, prepare(config))
    assert sum(losses[-2:]) < 0.5 * sum(losses[:2])


@pytest.mark.parametrize("task", ["pirate", "kjv", "sorbian", "mix"])
def test_the_answers_generated_for_the_report_fit_24_tokens(task):
    """So that evaluate asks for seq_len / 2 = 24 new tokens there, as when they were stored."""
    sizes, tokenizer = PROFILES["paper"], load_tokenizer(GEMMA)
    rows = [r for r in load_task(task)["test"][: sizes.eval_rows] if r["metric"] == "chrf"]
    answers = [row["answer"] for row in rows[: sizes.generate_rows]]
    longest = max(map(len, tokenizer(answers, add_special_tokens=False)["input_ids"]))
    assert longest <= sizes.seq_len // 2 == 24


def test_words_and_digits_of_codes_are_one_token_each():
    tokenizer = load_tokenizer(GEMMA)
    for words in (list(WORDS), [f" {word}" for word in WORDS]):
        assert {len(ids) for ids in tokenizer(words, add_special_tokens=False)["input_ids"]} == {1}
    assert len(set(digit_tokens(tokenizer))) == 10
    row = draw_codes(1, 6, seed=0)[0]
    batch, _ = encode_codes([row], tokenizer)
    text = tokenizer(row["prompt"] + row["answer"])["input_ids"]  # as it is read in one piece
    assert batch["input_ids"].tolist() == [text] and len(text) == 1 + 3 + 6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_upper_layers_on_cached_states_give_the_whole_model_to_the_last_bit(dtype):
    config = CodeRun(codes=8, layers=(14,), rank=1, alpha=32.0, lr=3e-3, steps=1, dtype=dtype)
    assert code_parameters(config) == 13_184
    upper = code_upper(config)  # of the codes, and of as many shuffled ones
    rows, _ = encode_codes(draw_codes(8, 6, seed=0), load_tokenizer(GEMMA))
    digits = rows["input_ids"][:, -6:]
    tokens = torch.cat([rows["input_ids"], rows["input_ids"]])
    tokens[8:, -6:] = digits.roll(-1, 0)
    decoder, kind = code_model(config).get_decoder(), product_dtype(dtype)
    with torch.no_grad(), torch.autocast("cpu", kind, enabled=kind != torch.float32):
        plain = decoder(input_ids=tokens[:, :-1]).last_hidden_state
        assert torch.equal(upper.hidden(inputs_embeds=upper.states), plain)
    nats, _ = upper.scores()
    assert -1 < math.log(10) - nats.mean().item() < 0.05, "digits are unknown, but not worse"
