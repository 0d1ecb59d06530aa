"""First gradients: those of the plain loss, measured once and stored."""

import pytest
import torch
from small_runs import plain_loss

from deltarank.spectra import rank_measures
from deltarank.study import gradients
from deltarank.study.gradients import first_gradients, gradient_spectra
from deltarank.study.models import TINY, load_model, load_tokenizer, matrices
from deltarank.study.profiles import profile
from deltarank.study.tasks import collate, encode, load_split
from deltarank.study.training import prepare


@pytest.fixture
def base(monkeypatch):
    """A base run in float32, of whose rows some are taken, in more than one batch."""
    monkeypatch.setattr(gradients, "GRADIENT_ROWS", 40)
    return profile().config("facts", "base", dtype="float32")


def test_they_are_those_of_the_plain_loss_of_all_rows_at_once(base):
    tokenizer = load_tokenizer(TINY)
    rows = [encode(row, tokenizer) for row in load_split("facts", "train")[:40]]
    model = load_model(TINY)
    plain_loss(
        model, collate(rows, max(len(row["labels"]) for row in rows)), torch.float32
    ).backward()
    found = gradient_spectra(prepare(base), base)
    assert found.keys() == matrices(model).keys()
    for name, W in matrices(model).items():
        plain = torch.linalg.svdvals(W.grad.double())
        torch.testing.assert_close(found[name], plain, rtol=1e-3, atol=1e-4 * plain[0].item())


def test_they_are_measured_once(base, store, monkeypatch):
    spectra = {"one": torch.ones(16), "two": torch.tensor([1.0, 0.0])}
    monkeypatch.setattr(gradients, "gradient_spectra", lambda model, config: spectra)
    first = first_gradients(base)
    assert first.T.to_dict() == {name: rank_measures(S) for name, S in spectra.items()}
    monkeypatch.setattr(gradients, "gradient_spectra", None)
    assert first_gradients(base).equals(first)
