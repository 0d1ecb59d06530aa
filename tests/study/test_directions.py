"""Input directions, by length and as the inputs come, against responses to inputs one by one."""

import dataclasses

import pandas as pd
import pytest
import torch
from matrices import gaussian, planted
from small_runs import Q, small

from deltarank.study import directions
from deltarank.study.directions import DRAWS, input_moments
from deltarank.study.models import TINY, load_model, load_tokenizer, matrices
from deltarank.study.profiles import profile
from deltarank.study.runs import run
from deltarank.study.tasks import encode

K, OUT, DOWN = (
    f"model.layers.1.{name}.weight"
    for name in ("self_attn.k_proj", "self_attn.o_proj", "mlp.down_proj")
)
SIDES = ("", "_initial", "_other")


def compared(a, a0, dW, other, M):
    """The columns of one matrix; the random directions and the random matrix are seeded."""
    lines = torch.cat([torch.stack([a, a0], 1), gaussian(len(a), DRAWS, seed=7)], 1)
    noise = gaussian(*dW.shape, seed=8)
    return pd.DataFrame(directions._compare(lines, dW, other, noise, M)).set_index("rank")


def share(answer, answers, r):
    """Share of a response, (tokens,), along the r leading ones of several, (tokens, m)."""
    U = torch.linalg.svd(answers, full_matrices=False).U[:, :r]
    return float((U.T @ answer).square().sum() / answer.square().sum())


# One matrix


@pytest.mark.parametrize("shape", [(40, 30), (20, 30)])
@pytest.mark.parametrize("spread", [0, 2], ids=["isotropic", "anisotropic"])
def test_shares_are_those_of_the_responses_to_inputs(shape, spread):
    dW, other = gaussian(*shape, seed=1), gaussian(*shape, seed=2)
    a, a0 = gaussian(30, seed=3), gaussian(30, seed=4)
    scales = torch.logspace(0, -spread, 30, dtype=torch.float64)
    X = torch.linalg.qr(gaussian(500, 30, seed=5)).Q * scales @ planted([1.0] * 30, (30, 30))
    found = compared(a, a0, dW, other, X.T @ X / 500)
    for column, inputs in {"right": torch.eye(30).double(), "right_inputs": X}.items():
        leading = torch.linalg.svd(inputs @ other.T).U[:, 0]
        answers = inputs @ a, inputs @ a0, leading
        for side, answer in zip(SIDES, answers, strict=True):
            expected = [share(answer, inputs @ dW.T, r) for r in (1, 8)]
            assert found[column + side].tolist() == pytest.approx(expected, abs=1e-8)
    random = gaussian(30, DRAWS, seed=7).T
    for r, line in found.iterrows():
        chance = [share(X @ g, X @ dW.T, r) for g in random]
        assert line["right_inputs_chance"] == pytest.approx(sum(chance) / DRAWS, abs=1e-8)
        assert line["right_chance"] == pytest.approx(r / 30)
    noise = torch.linalg.svd(X @ gaussian(*shape, seed=8).T).U[:, 0]
    expected = [share(noise, X @ dW.T, r) for r in (1, 8)]
    assert found["right_inputs_other_chance"].tolist() == pytest.approx(expected, abs=1e-8)
    turned = [share(X @ g, (X @ a0)[:, None], 1) for g in random]
    moved = share(a, a0[:, None], 1), share(X @ a, (X @ a0)[:, None], 1), sum(turned) / DRAWS
    columns = ["moved", "moved_inputs", "moved_inputs_chance"]
    assert found.loc[8, columns].tolist() == pytest.approx(moved, abs=1e-8)


def test_with_inputs_alike_in_all_directions_both_metrics_agree():
    vectors, updates = gaussian(2, 30), gaussian(2, 40, 30, seed=1)
    found = compared(*vectors, *updates, 5 * torch.eye(30, dtype=torch.float64))
    for column in ("right", "right_initial", "right_other", "moved"):
        inputs = column.replace("right", "right_inputs").replace("moved", "moved_inputs")
        assert found[inputs].tolist() == pytest.approx(found[column].tolist(), abs=1e-9)
    assert found["right_inputs_chance"].tolist() == pytest.approx([1 / 30, 8 / 30], abs=0.05)


def test_directions_that_look_random_may_answer_alike_to_the_inputs_there_are():
    u, *others = torch.linalg.qr(gaussian(30, 4)).Q.T
    a, a0, v = (u + 3 * w for w in others)  # a tenth along the inputs, the rest each its own
    M = torch.outer(u, u) + 1e-6 * torch.eye(30, dtype=torch.float64)
    dW = torch.outer(gaussian(40, seed=1), v) + 1e-3 * gaussian(40, 30, seed=2)
    found = compared(a, a0, dW, dW, M).loc[1]
    assert found["right"] == pytest.approx(0.01, abs=2e-3) and found["right_inputs"] > 0.999
    assert found["moved"] == pytest.approx(0.01) and found["moved_inputs"] > 0.999
    assert found["right_inputs_chance"] > 0.9 > 0.1 > found["right_chance"]


def test_matrices_that_share_nothing_but_the_inputs_may_answer_alike_to_them():
    u, v, w = torch.linalg.qr(gaussian(30, 3)).Q.T
    M = torch.outer(u, u) + 1e-6 * torch.eye(30, dtype=torch.float64)
    dW, other = gaussian(2, 40, 30, seed=1)
    found = compared(v, w, dW, other, M).loc[1]
    assert found["right_other"] < 0.5
    assert found["right_inputs_other"] > 0.999 and found["right_inputs_other_chance"] > 0.999


def test_inputs_along_few_directions_are_enough():
    X, dW, a = gaussian(9, 30, seed=1), gaussian(40, 30, seed=2), gaussian(30, seed=3)
    found = compared(a, a, dW, dW, X.T @ X / 9)
    assert found["right_inputs"][8] == pytest.approx(share(X @ a, X @ dW.T, 8), abs=1e-6)


# The inputs' moments


@pytest.mark.parametrize("name", [Q, K, OUT, DOWN])
def test_moments_are_those_of_each_row_by_itself(name):
    rows = [{"prompt": "p" * (i % 37 + 1), "answer": f" {i}"} for i in range(70)]
    model, tokenizer, seen = load_model(TINY), load_tokenizer(TINY), []
    found = input_moments(model, small(seq_len=64), rows)
    layer = model.get_submodule(name.removesuffix(".weight"))
    layer.register_forward_hook(lambda layer, args, output: seen.append(args[0].detach()[0]))
    for row in rows:
        model(torch.tensor([encode(row, tokenizer, 64)["input_ids"]]))
    X = torch.cat([x[1:] for x in seen]).double()  # (tokens, n), none the first of its row
    assert len(X) == sum(len(encode(row, tokenizer, 64)["labels"]) - 1 for row in rows)
    torch.testing.assert_close(found[name], X.T @ X / len(X), rtol=1e-4, atol=1e-6)


def test_moments_of_every_matrix_and_the_model_as_it_was():
    model = load_model(TINY).train()
    found = input_moments(model, small(), [{"prompt": "p:", "answer": " a"}])
    assert {n: len(M) for n, M in found.items()} == {
        n: W.shape[1] for n, W in matrices(model).items()
    }
    assert found[Q] is found[Q.replace("q_proj", "v_proj")]
    assert model.training and not any(m._forward_pre_hooks for m in model.modules())


# Runs


@pytest.fixture
def pair(config):
    """Two stored full runs of the small task with different seeds."""
    both = config, dataclasses.replace(config, seed=1)
    for each in both:
        run(each)
    return both


def adapter(**changes):
    return profile().config("sentiment", "lora", steps=2, eval_rows=4, **({"rank": 1} | changes))


def test_an_adapter_that_hardly_trains_keeps_the_directions_that_it_starts_with(pair):
    still, trained = (directions.directions(adapter(lr=lr), *pair) for lr in (1e-8, 0.1))
    for column in ("moved", "moved_inputs"):
        assert still[column].min() > 0.9999 > 0.9 > trained[column].mean()
    assert still["right"].tolist() == pytest.approx(still["right_initial"].tolist(), abs=1e-3)
    assert trained["right_initial"].equals(still["right_initial"])
    start, again, other = (
        directions._initial_directions(adapter(seed=seed))[Q] for seed in (0, 0, 1)
    )
    assert torch.equal(start, again) and not torch.allclose(start, other)


def test_a_full_run_reads_along_its_own_directions(pair):
    first, second = pair
    same, other = (directions.directions(adapter(seed=i), first, pair[i]) for i in (0, 1))
    assert same["right_other"].tolist() == pytest.approx([1.0] * len(same), abs=1e-5)
    assert same["right_inputs_other"].tolist() == pytest.approx([1.0] * len(same), abs=1e-5)
    leading = other[other["rank"] == 1]
    assert leading["right_other"].mean() < 0.99 and leading["right_inputs_other"].mean() < 0.999
    assert set(same["name"]) == set(run(first).spectra) and set(same["rank"]) == {1, 8}


def test_directions_are_stored_with_the_adapter_and_of_these_runs_only(pair, monkeypatch):
    lora = adapter()
    found = directions.directions(lora, *pair)
    (folder,) = (profile().store / "directions").glob("*/*")
    assert (folder.parent.name, folder.name) == ("sentiment", f"{lora.key}--{pair[0].key}")
    monkeypatch.setattr(directions, "updates", lambda run: pytest.fail("computed again"))
    assert directions.directions(lora, *pair).equals(found)
    with pytest.raises(ValueError, match=f"is stored beside {pair[1].key}"):
        directions.directions(lora, pair[0], dataclasses.replace(pair[1], seed=2))


def test_an_adapter_on_one_layer_has_directions_there_only(pair):
    lora = adapter(layers=(1,))
    found = directions.directions(lora, *pair)
    assert set(found["name"]) == set(run(lora).matrices) == {n for n in found["name"] if ".1." in n}


@pytest.mark.parametrize("fields", [{"rank": 4}, {"method": "tinylora", "rank": 1, "vector": 8}])
def test_an_adapter_of_many_directions_is_refused(config, fields):
    other = profile().config("sentiment", **{"method": "lora"} | fields)
    with pytest.raises(ValueError, match="has one direction"):
        directions.directions(other, config, config)
