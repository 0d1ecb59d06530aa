"""Memorizing: the rule of the plateau, the order of rows, and a model that learns by heart."""

import itertools

import pytest
import torch
from small_codes import small_codes, sure_model

from deltarank.study import code_runs, memorizing
from deltarank.study.capacity import code_upper
from deltarank.study.code_runs import code_model
from deltarank.study.memorizing import Learned, _batches, _score_steps, memorize


@pytest.fixture
def sure(monkeypatch):
    """The tiny model, made able to be sure of a word."""
    monkeypatch.setattr(code_runs, "load_model", sure_model)


def learned(**bits):
    """What was learned by step, {"s30": 9.0}."""
    return Learned([{"step": int(s[1:]), "learned_bits": b} for s, b in bits.items()])


def test_a_plateau_is_a_rise_below_two_percent_over_the_last_quarter():
    assert learned(s0=0, s75=100, s100=101.9).levelled()
    assert not learned(s0=0, s75=100, s100=102.1).levelled()
    assert learned(s0=0, s50=100, s100=103.9).levelled(), "at step 75 it is 101.95"
    assert not learned(s0=0, s50=100, s100=104.1).levelled()
    assert learned(s0=0, s75=100, s100=90).levelled()


def test_a_relapse_is_no_plateau_until_it_has_lasted():
    assert not learned(s0=0, s60=80, s90=120, s100=50).levelled(), "it rose from 100 to 120"
    assert learned(s0=0, s60=80, s90=120, s100=50, s121=60).levelled()


def test_nothing_learned_is_no_plateau():
    assert not learned(s0=-5, s75=-4, s100=-4).levelled()
    assert not learned(s0=-5, s75=0, s100=1).levelled()
    stopped = learned(s0=0, s75=100, s100=100)
    stopped.diverged = True
    assert not stopped.levelled()


def test_a_flat_curve_before_learning_has_begun_is_no_plateau():
    flat = learned(s0=0, s75=9, s100=9)
    assert flat.levelled()
    flat.begun = 10.0
    assert not flat.levelled()
    few, many = small_codes(codes=4), small_codes(codes=400)
    size = code_runs.code_parameters(few)
    assert few.bits < size < many.bits
    for config, most in ((few, few.bits), (many, size)):
        learner = memorizing.Learner(config, code_upper(config), bar=None)
        assert learner.learned.begun == pytest.approx(memorizing.BEGUN * most)


def test_every_code_is_seen_as_often_as_the_others():
    config = small_codes(codes=10, batch_size=4)
    seen = [*itertools.islice(_batches(config), 10)]  # four epochs
    assert {len(batch) for batch in seen} == {4}
    rows = torch.cat(seen).view(4, 10)
    assert torch.equal(rows.sort(dim=1).values, torch.arange(10).expand(4, 10))
    assert not torch.equal(rows[0], rows[1])
    again = torch.cat([*itertools.islice(_batches(config), 10)])
    other = torch.cat([*itertools.islice(_batches(small_codes(codes=10, seed=1)), 10)])
    assert torch.equal(rows.flatten(), again) and not torch.equal(again, other)
    assert len(next(_batches(small_codes(codes=3, batch_size=64)))) == 3


def test_scores_lie_apart_by_a_share_of_the_steps():
    steps = [*_score_steps(small_codes(codes=100, batch_size=4, steps=600))]
    assert steps == [50, 100, 150, 200, 250, 300, 350, 403, 464, 534, 600]
    assert [*_score_steps(small_codes(codes=100, batch_size=4, steps=10))] == [10]


def test_a_model_learns_its_codes_and_the_others_by_chance(sure):
    config = small_codes(codes=12, steps=150, lr=3e-3, rank=8)
    both = code_upper(config)
    codes, shuffled = both.of(slice(12)), both.of(slice(12, None))
    found = memorize(config, codes)
    first, last = found.notes[0], found.notes[-1]
    assert first["learned_bits"] < 0 and first["recall"] == 0
    assert last["learned_bits"] > 0.8 * config.bits and last["recall"] > 0.8
    _, right = shuffled.scores()
    assert right[:, 0].double().mean() < 0.35, "chance is a tenth"


def test_only_what_is_to_be_trained_moves(sure):
    config = small_codes(steps=2)
    upper = code_upper(config)
    before = {name: p.clone() for name, p in upper.model.named_parameters()}
    memorize(config, upper.of(slice(config.codes)))
    after = dict(upper.model.named_parameters())
    moved = {name for name, p in before.items() if not torch.equal(p, after[name])}
    assert moved and all("lora_" in name and ".layers.1." in name for name in moved)
    untouched = dict(code_model(config).named_parameters())
    kept = before.keys() - moved
    assert kept and all(torch.equal(after[name], untouched[name]) for name in kept)


def test_training_ends_at_a_plateau_or_at_the_last_step_and_then_the_rate_falls(monkeypatch):
    config, rates = small_codes(codes=4, batch_size=4, steps=40), []
    train = memorizing.Learner._train

    def noted(self, picked):
        rates.append(self.optimizer.param_groups[0]["lr"])
        return train(self, picked)

    monkeypatch.setattr(memorizing.Learner, "_train", noted)
    upper = code_upper(config).of(slice(4))
    monkeypatch.setattr(Learned, "levelled", lambda self: False)
    found = memorize(config, upper)
    assert found.plateau is None and found.notes[-1]["step"] == len(rates) == 50
    assert rates[:40] == [config.lr] * 40
    assert rates[40:] == pytest.approx([config.lr * (1 - i / 10) for i in range(10)])
    monkeypatch.setattr(Learned, "levelled", lambda self: True)
    found = memorize(config, upper)
    assert found.plateau == 17, "not before each code was seen PASSES times"
    assert found.notes[-1]["step"] == 22


def test_a_plateau_is_seen_three_times_in_a_row(monkeypatch):
    config, looks = small_codes(codes=4, batch_size=4, steps=40), []
    level = iter([True] * 16 + [False, True, True] + [False, True, True, True])

    def levelled(self):
        looks.append(self.notes[-1]["step"])
        return next(level)

    monkeypatch.setattr(Learned, "levelled", levelled)
    monkeypatch.setattr(memorizing, "_score_steps", lambda config: iter(range(1, 41)))
    monkeypatch.setattr(memorizing, "PASSES", 17)
    assert memorize(config, code_upper(config).of(slice(4))).plateau == looks[-1] == 23


def test_a_rate_that_is_too_high_is_told(sure):
    config = small_codes(lr=1e30, steps=20)
    found = memorize(config, code_upper(config).of(slice(8)))
    assert found.diverged and found.plateau is None
    assert all(note["learned_bits"] == note["learned_bits"] for note in found.notes)


def test_a_seed_repeats_a_run(sure):
    config = small_codes(steps=5)
    first, again = (memorize(config, code_upper(config).of(slice(8))).notes for _ in range(2))
    assert first == again
    other = small_codes(steps=5, seed=1)
    assert memorize(other, code_upper(other).of(slice(8))).notes != first
