"""The embedded Gemma 3 270M: about 50 s for the first conversion, then about 30 s."""

import pytest
import torch

from deltarank.study.convert import GEMMA
from deltarank.study.models import load_model, load_tokenizer, matrices
from deltarank.study.profiles import PROFILES
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
