"""The embedded SmolLM2 135M: about a minute for the download and the conversion, once."""

import time

import pytest
import torch

from deltarank.runtime import at_profile
from deltarank.study.convert import SMOLLM
from deltarank.study.models import load_model, load_tokenizer, matrices
from deltarank.study.sizes import ladder
from deltarank.study.tasks import TASKS, encode, load_task

ENGLISH = (
    "The house stood at the end of a narrow lane, and from its windows one could see the river. "
    "In the morning a boat came down with apples, and the children ran to meet it."
)


@pytest.fixture(scope="module")
def smollm():
    """The model, in the cache of the repository, so that it is converted once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("LOWRANK_CACHE", raising=False)
        load_model(SMOLLM)
        start = time.perf_counter()
        model = load_model(SMOLLM)
        assert time.perf_counter() - start < 5, "the second time it is only loaded"
        yield model, load_tokenizer(SMOLLM)


def test_it_is_llama_of_the_stated_size(smollm):
    model, _ = smollm
    assert type(model).__name__ == "LlamaForCausalLM"
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(134.5, abs=0.05)
    shapes = {tuple(weight.shape) for weight in matrices(model).values()}
    assert len(matrices(model)) == 7 * 30
    assert shapes == {(576, 576), (192, 576), (1536, 576), (576, 1536)}
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_its_ladder_is_as_written_down_before_the_runs(smollm):
    with at_profile("smollm2"):
        assert [*ladder()] == [
            "TinyLoRA of 16", "TinyLoRA of 128", "TinyLoRA of 1,024", "rank 1 on 2 layers",
            "rank 1 on q_proj", "rank 1 on 5 layers", "rank 1 on 10 layers", "rank 1 on 15 layers",
            "rank 1", "rank 8", "rank 64",
        ]  # fmt: skip


def test_it_knows_english_and_every_parameter_learns(smollm):
    model, tokenizer = smollm
    tokens = tokenizer(ENGLISH, return_tensors="pt").input_ids
    loss = model(tokens, labels=tokens).loss
    shuffled = tokens[:, torch.randperm(tokens.shape[1], generator=torch.manual_seed(0))]
    assert loss.item() < 3.5 < model(shuffled, labels=shuffled).loss.item()
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())


@pytest.mark.parametrize("task", TASKS)
def test_every_row_fits_60_of_its_tokens(smollm, task):
    for rows in load_task(task).values():
        for row in rows:
            assert sum(label != -100 for label in encode(row, smollm[1], 60)["labels"]) >= 2
