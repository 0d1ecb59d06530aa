"""The embedded Gemma 3 270M.  Slow: about 50 s for the first conversion, then about 30 s."""

import pytest
import torch

import utils

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(scope="module", autouse=True)
def default_cache(cache):
    """The cache of the repository, so that the model is converted once for all sessions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("LOWRANK_CACHE")
        yield


@pytest.fixture(scope="module")
def gemma():
    return utils.load_model(utils.GEMMA)


def test_slow_gemma_has_the_stated_size_and_matrices(gemma):
    shapes = {tuple(weight.shape) for weight in utils.matrices(gemma).values()}
    assert len(utils.matrices(gemma)) == 126
    assert shapes == {(1024, 640), (256, 640), (640, 1024), (2048, 640), (640, 2048)}
    assert sum(p.numel() for p in gemma.parameters()) / 1e6 == pytest.approx(268.1, abs=0.05)
    assert all(p.dtype == torch.float32 for p in gemma.parameters())


@pytest.mark.parametrize("task", utils.TASKS)
def test_slow_every_row_fits_48_gemma_tokens(task):
    tokenizer = utils.load_tokenizer(utils.GEMMA)
    for rows in utils.load_task(task).values():
        for row in rows:
            tokens = utils.encode(row, tokenizer, 48)
            assert tokens["input_ids"][0] == tokenizer.bos_token_id
            assert sum(label != -100 for label in tokens["labels"]) >= 2


def test_slow_a_few_steps_on_sentiment_lower_the_loss(store):
    config = utils.PROFILES["paper"].config("sentiment", steps=6, compile=False)
    losses = utils.train(config, utils.prepare(config))
    assert sum(losses[-2:]) < 0.5 * sum(losses[:2])
