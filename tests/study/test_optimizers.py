"""Optimizers, against what a step of each is known to do."""

import math

import pytest
import torch
from torch import nn

from deltarank.study.configs import OWN_OPTIMIZERS
from deltarank.study.models import TINY, load_model, matrices
from deltarank.study.optimizers import own_optimizer
from deltarank.study.profiles import profile
from deltarank.study.training import prepare, train


class Two(nn.Module):
    """A matrix and a vector, with gradients of very different sizes."""

    def __init__(self, smallest=1e-12):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.W = nn.Parameter(torch.randn(12, 8, generator=generator))
        self.b = nn.Parameter(torch.randn(8, generator=generator))
        sizes = torch.logspace(math.log10(smallest), 1, 8)
        self.W.grad = torch.randn(12, 8, generator=generator) * sizes
        self.b.grad = torch.randn(8, generator=generator) * sizes


def config(optimizer, **changes):
    return profile().config("sentiment", optimizer=optimizer, lr=1e-2, steps=4, **changes)


def moved(optimizer, model, steps=1, **changes):
    """By how much the parameters of a model are moved."""
    before = [p.detach().clone() for p in model.parameters()]
    made = own_optimizer(config(optimizer, **changes), model)
    for _ in range(steps):
        made.step()
    return [p.detach() - old for p, old in zip(model.parameters(), before, strict=True)]


@pytest.mark.parametrize("smallest", [1e-12, 1e-30])  # whose square no float32 holds
def test_sign_moves_every_entry_by_the_rate_against_its_gradient(smallest):
    steps = moved("sign", Two(smallest))
    for step, parameter in zip(steps, Two(smallest).parameters(), strict=True):
        assert torch.allclose(step, -1e-2 * parameter.grad.sign(), rtol=1e-4)


def test_sign_decays_weights_by_the_rate_apart_from_their_gradient():
    steps = moved("sign", Two(), weight_decay=0.5)
    for step, parameter in zip(steps, Two().parameters(), strict=True):
        expected = -1e-2 * (parameter.grad.sign() + 0.5 * parameter.detach())
        assert torch.allclose(step, expected, atol=1e-6)


def test_momentum_adds_nine_tenths_of_the_step_before():
    once, twice = moved("sgd_momentum", Two()), moved("sgd_momentum", Two(), steps=2)
    for first, both, parameter in zip(once, twice, Two().parameters(), strict=True):
        assert torch.allclose(first, -1e-2 * parameter.grad, atol=1e-6)
        assert torch.allclose(both, 2.9 * first, atol=1e-5)


def test_muon_moves_all_directions_of_a_matrix_alike_and_a_vector_as_adamw():
    model = Two()
    U, V = (torch.linalg.qr(torch.randn(d, 3, generator=torch.manual_seed(d))).Q for d in (12, 8))
    model.W.grad = U @ torch.diag(torch.tensor([9.0, 3.0, 1.0])) @ V.T
    W, b = (p.detach().clone() for p in model.parameters())
    own_optimizer(config("muon"), model).step()
    moves = U.T @ (model.W.detach() - W) @ V  # along the directions of the gradient
    along = moves.diagonal().abs()
    assert along.max() < 1.7 * along.min()
    assert (moves - torch.diag(moves.diagonal())).abs().max() < 0.02 * along.min()
    assert torch.allclose((model.b.detach() - b).abs()[4:], torch.tensor(1e-2), rtol=1e-2)


def test_the_other_optimizers_are_those_of_transformers():
    assert own_optimizer(config("adamw_torch_fused"), Two()) is None


@pytest.mark.parametrize("optimizer", OWN_OPTIMIZERS)
def test_a_schedule_reaches_every_parameter(optimizer):
    model = Two()
    made = own_optimizer(config(optimizer), model)
    made.load_state_dict(made.state_dict())  # as accelerate does, which makes other groups
    torch.optim.lr_scheduler.LambdaLR(made, lambda step: 0.0)
    before = [p.detach().clone() for p in model.parameters()]
    made.step()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("optimizer", OWN_OPTIMIZERS)
def test_a_run_learns_by_it(optimizer, method, store):
    sizes = {"rank": 4} if method == "lora" else {}
    lr = {"muon": 1e-2, "sign": 3e-3, "sgd_momentum": 0.3}[optimizer]
    fields = {"optimizer": optimizer, "lr": lr, "steps": 12, "dtype": "float32"}
    run = profile().config("sentiment", method, **sizes | fields)
    losses = train(run, prepare(run))
    assert len(losses) == 12 and sum(losses[-3:]) / 3 < losses[0] - 0.15


def test_the_update_of_muon_is_flatter_than_that_of_momentum(store):
    ranks = {}
    for optimizer, lr in {"muon": 1e-2, "sgd_momentum": 0.3}.items():
        run = profile().config("sentiment", optimizer=optimizer, lr=lr, steps=2, dtype="float32")
        model, before = prepare(run), matrices(load_model(TINY))
        train(run, model)
        dW = [W.detach() - before[name].detach() for name, W in matrices(model).items()]
        S = [torch.linalg.svdvals(update) for update in dW]
        ranks[optimizer] = sum(float(s.square().sum() / s[0].square()) for s in S) / len(S)
    assert ranks["muon"] > 2 * ranks["sgd_momentum"]
