"""Training, against plain cross-entropy and PEFT's products."""

import pytest
import torch
from small_runs import ROWS, Q, batch_of, plain_loss, small

from deltarank.study import measuring, training
from deltarank.study.losses import answer_loss
from deltarank.study.models import TINY, load_model, load_tokenizer, matrices
from deltarank.study.profiles import profile
from deltarank.study.runs import run
from deltarank.study.tasks import collate, encode, pack
from deltarank.study.training import prepare, train


def test_a_packed_batch_has_the_loss_and_gradient_of_one_row_a_line(small_task):
    tokenizer = load_tokenizer(TINY)
    rows = [encode(row, tokenizer, 64) for row in (*ROWS, *small_task[:7])]
    packed, found = pack(rows), []
    assert packed["labels"].shape == (3, 37)  # nine rows, no longer than the longest three need
    assert sorted(packed["labels"].flatten().tolist()) == sorted(
        sum((row["labels"] for row in rows), [-100] * int((packed["input_ids"] == 0).sum()))
    )
    for batch in (packed, collate(rows, 64)):
        model = load_model(TINY)
        head = model.get_output_embeddings().weight.detach()
        loss = answer_loss(model, head, batch, dtype=torch.float32)
        loss.backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        found.append((loss.item(), torch.cat(gradients)))
    (loss, gradient), (plain, oracle) = found
    assert loss == pytest.approx(plain, rel=1e-6)
    assert (gradient - oracle).norm() < 1e-5 * oracle.norm()


@pytest.mark.parametrize("trained_head", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance", "gradient_tolerance"),
    [(torch.float32, 1e-5, 1e-5), (torch.bfloat16, 1e-2, 3e-2)],
    ids=str,
)
def test_answer_loss_is_plain_cross_entropy(trained_head, dtype, tolerance, gradient_tolerance):
    batch, found = batch_of(ROWS), []
    for loss_of in (answer_loss, plain_loss):
        model = load_model(TINY)
        head = model.get_output_embeddings().weight.requires_grad_(trained_head)
        if loss_of is plain_loss:
            loss = plain_loss(model, batch, dtype)
        else:
            head = head if trained_head else head.detach().to(dtype)
            loss = answer_loss(model, head, batch, dtype=dtype)
        loss.backward()
        gradients = [p.grad.float().flatten() for p in model.parameters() if p.grad is not None]
        found.append((loss.item(), torch.cat(gradients)))
    (loss, gradient), (plain, oracle) = found
    assert loss == pytest.approx(plain, rel=tolerance)
    assert (gradient - oracle).norm() < gradient_tolerance * oracle.norm()


def test_the_loss_ignores_prompt_and_padding():
    model = load_model(TINY)
    head = model.get_output_embeddings().weight.detach()
    batch = batch_of(ROWS)
    loss = answer_loss(model, head, batch, dtype=torch.float32)
    padding = (batch["labels"] == -100) & (batch["input_ids"] == 0)
    other = batch | {"input_ids": batch["input_ids"].masked_fill(padding, 77)}
    assert torch.equal(loss, answer_loss(model, head, other, dtype=torch.float32))
    everything = batch["input_ids"].masked_fill(padding, -100)
    counted = answer_loss(model, head, batch | {"labels": everything}, dtype=torch.float32)
    assert loss.item() == pytest.approx(plain_loss(model, batch, torch.float32).item(), rel=1e-5)
    assert loss.item() != pytest.approx(counted.item(), rel=1e-5)


def test_a_rank_above_the_smallest_matrix_stops_before_training(store, monkeypatch):
    monkeypatch.setattr(measuring, "train", lambda *a, **k: pytest.fail("trained"))
    with pytest.raises(ValueError, match=r"rank=17.*16"):
        run(profile().config("sentiment", "lora", rank=17))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"layers": (1, 2)}, r"^layers=\(1, 2\): the model has layers 0 to 1$"),
        ({"modules": ("q",)}, r"^modules=\('q',\): choose from down_proj, gate_proj, k_"),
        (
            {"method": "tinylora", "layers": (1,), "vector": 29},
            r"^vector=29: 7 matrices at rank 2 tell 28 numbers apart; choose at most 28$",
        ),
    ],
)
def test_a_place_that_the_model_lacks_stops_before_training(store, monkeypatch, changes, told):
    monkeypatch.setattr(measuring, "train", lambda *a, **k: pytest.fail("trained"))
    with pytest.raises(ValueError, match=told):
        run(profile().config("sentiment", **{"method": "lora", "rank": 2} | changes))


def test_each_matrix_and_seed_of_a_tinylora_has_random_matrices_of_its_own(store):
    found = []
    for seed in (0, 1):
        model = prepare(profile().config("facts", "tinylora", rank=2, vector=3, seed=seed))
        found += [P for n, P in model.named_buffers() if "tinylora_P" in n]
    assert len(found) == 2 * len(matrices(load_model(TINY)))
    assert len({tuple(P.flatten().tolist()) for P in found}) == len(found)


def test_the_largest_possible_rank_is_accepted(store):
    prepare(profile().config("sentiment", "lora", rank=16))


def test_training_lowers_the_loss_and_reports_every_step(small_task):
    config = small(steps=30, lr=1e-2)
    losses = train(config, prepare(config))
    assert len(losses) == 30
    assert losses[-1] < losses[0] - 0.4  # the frozen, tied head of random bytes allows no more


def test_the_first_loss_is_that_of_the_untrained_model(small_task):
    config = small(steps=1)  # one batch holds all four training rows
    model = prepare(config)
    expected = plain_loss(model, batch_of(small_task[:4], 16), torch.float32).item()
    assert train(config, model) == pytest.approx([expected], rel=1e-5)


def test_a_permuted_run_sees_each_prompt_with_other_answers(small_task):
    rows = training._training_rows(small(steps=12, permuted=True))
    plain = training._training_rows(small(steps=12))
    assert len(rows) == 12 * len(plain)  # a batch is all four rows
    answers = {}
    for row in rows:
        prompt = sum(label == -100 for label in row["labels"])
        ids = tuple(row["input_ids"])
        answers.setdefault(ids[:prompt], set()).add(ids[prompt:])
    assert min(map(len, answers.values())) > 1


def test_a_seeds_second_epoch_has_the_order_of_the_next_seeds_first(small_task, monkeypatch):
    """As accelerate draws it; notebook 2 says so among its limitations."""
    seen = []

    def noted(rows):
        seen.append([tuple(row["input_ids"]) for row in rows])
        return pack(rows)

    monkeypatch.setattr(training, "pack", noted)
    for seed in (3, 4, 9):
        config = small(steps=8, batch_size=1, seed=seed)  # of four rows: two epochs
        train(config, prepare(config))
    first, second, third = (seen[i : i + 8] for i in (0, 8, 16))
    assert first[4:] == second[:4] != first[:4] and third[:4] not in (first[4:], second[4:])


def test_a_warm_up_starts_at_no_rate_and_ends_at_the_whole(small_task):
    arguments = training._training_arguments(small(steps=30, warmup=0.1, lr=1e-2), "scratch")
    assert arguments.get_warmup_steps(30) == 3
    first = [
        train(config, prepare(config))[1]  # after one step, at rates of 0 and 1e-2
        for config in (small(steps=2, warmup=0.5, lr=1e-2), small(steps=2, lr=1e-2))
    ]
    assert first[0] > first[1]


def test_the_alpha_of_rslora_is_divided_by_the_root_of_the_rank(store):
    norms = []
    for rslora in (False, True):
        config = profile().config("sentiment", "lora", rank=4, rslora=rslora)
        model = prepare(config)
        layer = model.get_base_model().get_submodule(Q.removesuffix(".weight"))
        torch.nn.init.ones_(layer.lora_B["default"].weight)
        norms.append(layer.get_delta_weight("default").detach().norm().item())
    assert norms[1] / norms[0] == pytest.approx(2)


def test_lora_trains_factors_only_and_covers_every_matrix(store):
    model = prepare(profile().config("sentiment", "lora", rank=4))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * len(matrices(load_model(TINY)))
    assert all("lora_" in name for name in trained)


def test_a_batch_larger_than_the_task_is_refused(small_task, store):
    with pytest.raises(ValueError, match="batch_size"):
        run(small(batch_size=5))  # four training rows
