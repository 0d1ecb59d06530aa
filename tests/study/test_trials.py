"""Trials: one rule for where to look next, and sizes that are alike."""

import dataclasses
import math

import pytest

from deltarank.study import trials
from deltarank.study.profiles import PROFILES
from deltarank.study.runs import Result
from deltarank.study.trials import METHODS, chosen
from deltarank.study.variants import PARAMETERS


def result(config, loss):
    """A run that ended at a loss, or diverged where that is None."""
    status = "diverged" if loss is None else "finished"
    return Result(config, {"status": status, "evaluation": {"valid": {"loss_nats": loss}}})


@pytest.fixture
def tried(monkeypatch):
    """trials() on a landscape: a function of the rate and the knob, as steps from the centre."""

    def search(method, landscape, count=6, size=1):
        centre, asked = METHODS[method].at("facts", size, (0.0, 0), seed=0), []

        def measured(config):
            rate = math.log(config.lr / centre.lr, trials.RATE_STEP)
            knob = METHODS[method].knob
            knob = getattr(config, knob) / getattr(centre, knob) if knob else 1.0
            asked.append((round(rate, 1), round(math.log(knob, trials.KNOB_STEP))))
            return result(config, landscape(*asked[-1]))

        monkeypatch.setitem(PROFILES, "smoke", dataclasses.replace(PROFILES["smoke"], trials=count))
        monkeypatch.setattr(trials, "run", measured)
        found = trials.trials("facts", method, size)
        assert len(found) == count
        return asked, found

    return search


@pytest.mark.parametrize(
    ("method", "landscape", "asked"),
    [
        ("LoRA", lambda r, k: abs(r) + k**2, [(0, 0), (1, 0), (-1, 0), (0, 1), (0, -1), (0.5, 0)]),
        ("LoRA", lambda r, k: abs(r - 9), [(i, 0) for i in range(6)]),
        ("LoRA", lambda r, k: abs(r + 9), [(0, 0), *[(i, 0) for i in (1, -1, -2, -3, -4)]]),
        (
            "LoRA",
            lambda r, k: abs(r - 1) - 5 * k,
            [(0, 0), (1, 0), (2, 0), (1, 1), (2, 1), (0, 1)],
        ),
        ("HiRA", lambda r, k: abs(r), [(0, 0), (1, 0), (-1, 0), (0.5, 0), (-0.5, 0), (0.3, 0)]),
        ("full", lambda r, k: (r - 1) ** 2, [(0, 0), (1, 0), (2, 0), (1.5, 0), (0.5, 0), (1.3, 0)]),
    ],
)
def test_one_rule_says_where_to_look_next(tried, method, landscape, asked):
    assert tried(method, landscape)[0] == asked


def test_a_setting_that_diverges_is_the_worst_and_counts(tried):
    asked, found = tried("LoRA", lambda r, k: None if r >= 1 else 9 - r)
    assert asked[:3] == [(0, 0), (1, 0), (-1, 0)] and len(found) == 6
    best = min((f for f in found if f.status == "finished"), key=lambda f: f.loss("valid"))
    assert chosen(found, seed=2) == dataclasses.replace(best.config, seed=2)


def test_where_all_diverge_the_rate_goes_down(tried):
    asked, found = tried("LoRA", lambda r, k: None)
    assert asked == [(0, 0), (1, 0), (-1, 0), (-2, 0), (-3, 0), (-4, 0)]
    assert chosen(found, seed=1) == dataclasses.replace(found[-1].config, seed=1)


# Of a layer of Gemma 3 270M: q, k, v, o, gate, up and down.
GEMMA = [(1024, 640), (256, 640), (256, 640), (640, 1024), (2048, 640), (2048, 640), (640, 2048)]


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"full", "LoRA", "rsLoRA"}))
def test_every_method_has_about_the_parameters_of_the_lora_of_its_size(method):
    for size, fields in METHODS[method].fields.items():
        count = PARAMETERS[fields["method"]]
        found = sum(count(m, n, fields["rank"]) for m, n in GEMMA)
        assert 0.7 < found / sum(size * (m + n) for m, n in GEMMA) < 1.55


def test_the_centres_are_what_is_documented():
    centre = {name: method.at("facts", 8, (0.0, 0), seed=1) for name, method in METHODS.items()
              if 8 in method.fields}  # fmt: skip
    assert centre["full"].method == "full" and centre["full"].lr == 1e-5
    assert (centre["LoRA"].alpha, centre["PiSSA"].alpha, centre["RandLoRA"].alpha) == (16, 8, 440)
    assert centre["rsLoRA"].rslora and centre["rsLoRA"].scale == pytest.approx(8 / math.sqrt(8))
    assert METHODS["VeRA"].at("facts", 1, (0.0, 0), seed=0).knob == 0.1
    assert METHODS["RandLoRA"].at("facts", 1, (0.0, 0), seed=0).alpha == 20 * 256
    assert METHODS["LoRA+"].at("facts", 1, (1.0, 1), seed=0).knob == 130.0  # 128, to two digits
    with pytest.raises(ValueError, match="^size=8: the method has the sizes 1"):
        METHODS["VeRA"].at("facts", 8, (0.0, 0), seed=0)
