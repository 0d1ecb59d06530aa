"""One GPU trains where several are visible, and a line says so."""

import warnings

import pytest
import torch
from small_runs import small

from deltarank.study import training
from deltarank.study.models import TINY, load_model


@pytest.fixture
def gpus(monkeypatch):
    """A function that makes Trainer believe in so many GPUs; there is none, so the CPU trains."""

    def see(count):
        monkeypatch.setattr(training, "device", lambda: torch.device("cuda"))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return see


def test_one_of_several_gpus_trains(gpus, small_task, store):
    config, plain, model = small(steps=3, lr=1e-2), load_model(TINY), load_model(TINY)
    expected = training.train(config, plain)
    gpus(2)
    with pytest.warns(UserWarning, match="2 GPUs are visible, one is used"):
        losses = training.train(config, model)
    assert losses == expected
    assert all(map(torch.equal, model.parameters(), plain.parameters()))


@pytest.mark.parametrize(("visible", "used"), [(0, 0), (1, 1), (2, 1), (8, 1)])
def test_trainer_is_told_of_one_gpu_at_most(gpus, visible, used, store, tmp_path):
    gpus(visible)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        arguments = training._training_arguments(small(steps=1, lr=1e-3), str(tmp_path))
    assert arguments.n_gpu == used
    assert arguments.parallel_mode.value == "not_parallel"
    assert arguments.train_batch_size == 4
    assert sum("visible" in str(warning.message) for warning in said) == (visible > 1)
