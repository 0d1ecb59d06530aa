"""Statistics over runs: bootstrap intervals, and a mix by its parts."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from matrices import gaussian
from small_runs import with_spectra

from deltarank.study import tables
from deltarank.study.gains import first_epoch_kbit
from deltarank.study.profiles import PROFILES, profile
from deltarank.study.runs import Result
from deltarank.study.tables import (
    bootstrap_interval,
    by_part,
    costs_table,
    cut_gains,
    joint_agreement,
    regained,
    scaling_table,
    score_intervals,
    spearman,
    spectrum_by_task,
    without_spectrum,
)
from deltarank.study.tasks import load_split


@pytest.fixture
def known(monkeypatch):
    """A base of 5 nats and 10 %, and its full run of 1 and 90."""
    scores = {"base": (5.0, 10.0), "full": (1.0, 90.0)}

    def run(config):
        nats, score = scores[config.method]
        test = {"loss_nats": nats, "score": score}
        return Result(config, {"status": "finished", "evaluation": {"test": test}})

    monkeypatch.setattr(tables, "run", run)


def test_a_cut_keeps_a_share_of_the_gain_in_loss_and_in_score(known, monkeypatch):
    monkeypatch.setattr(tables, "captured_energy", lambda result, rank: rank / 8)
    monkeypatch.setattr(tables, "skill_kept", lambda value, full, by="loss": -value)
    cuts = pd.DataFrame({"rank": [0, 8], "loss_nats": [4.0, 2.0], "score": [50.0, 70.0]})
    found = cut_gains(profile().config("facts"), cuts)
    assert found["kept_loss"].tolist() == [0.25, 0.75] and found["energy"].tolist() == [0, 1]
    assert found["kept_score"].tolist() == [0.5, 0.75]
    assert found["skill_loss"].tolist() == [-4, -2] and found["skill_score"].tolist() == [-50, -70]


def test_a_run_is_told_beside_its_scale(monkeypatch):
    groups = {
        scale: [profile().config("facts", "lora", rank=1, lr=lr, alpha=alpha) for lr in (1.0, 2.0)]
        for scale, alpha in (("32", 32.0), ("256", 256.0))
    }

    def result(config):
        loss = {"loss_nats": config.alpha + config.lr, "score": 0.0}
        record = {"status": "finished", "evaluation": {"valid": loss, "test": loss}}
        return Result(config, record | {"provenance": {"train_seconds": 1.0}})

    monkeypatch.setattr(tables, "scaling_configs", lambda: groups)
    monkeypatch.setattr(tables, "sweep", lambda configs: [result(config) for config in configs])
    found = scaling_table()
    told = found["scale"].astype(float) + found["lr"]
    assert len(found) == 4 and found["valid_nats"].tolist() == told.tolist()
    assert found["loss_nats"].tolist() == told.tolist()


def test_bootstrap_interval_covers_the_mean_of_normal_data():
    values = gaussian(400)
    low, high = bootstrap_interval(values.tolist())
    mean, error = float(values.mean()), float(values.std()) / 20
    assert low == pytest.approx(mean - 1.96 * error, abs=0.3 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.3 * error)


def test_bootstrap_interval_leaves_out_missing_values():
    assert bootstrap_interval([2.0, None, 2.0]) == (2.0, 2.0)


def test_the_interval_of_spearman_covers_what_normal_data_have():
    x, noise = gaussian(2, 400).numpy()
    found = spearman(pd.Series(x), pd.Series(x + noise))
    rho = found["spearman"]
    assert rho == pytest.approx(6 / math.pi * math.asin(math.sqrt(0.5) / 2), abs=0.1)
    error = (1 - rho**2) * math.sqrt((1 + rho**2 / 2) / 397)  # Bonett and Wright 2000
    assert found["low"] == pytest.approx(rho - 1.96 * error, abs=0.5 * error)
    assert found["high"] == pytest.approx(rho + 1.96 * error, abs=0.5 * error)


def test_measures_are_paired_by_the_names_of_tasks():
    x, y = pd.Series(range(6), list("abcdef")), pd.Series(range(6), list("fedcba"))
    assert spearman(x, y[::-1]) == spearman(x, y)
    assert [*spearman(x, y).values()] == pytest.approx([-1, -1, -1])
    both = (
        joint_agreement(x.to_frame(), y.to_frame()),
        joint_agreement(x[::-1].to_frame(), y.to_frame()),
    )
    assert both[0]["spearman"] == pytest.approx(-1) == both[1]["spearman"]


@pytest.mark.parametrize("needs", [[1.0, 1.0, 1.0], [1.0, math.nan, 2.0]])
def test_what_has_no_order_is_not_tested(needs):
    with pytest.raises(ValueError, match="it has no order"):
        joint_agreement(pd.DataFrame({"x": [1, 2, 3]}), pd.DataFrame({"y": needs}))


def test_spearman_leaves_out_draws_without_an_order():
    found = spearman(pd.Series([1, 2]), pd.Series([3, math.inf]))
    assert [*found.values()] == pytest.approx([1, 1, 1])


def test_the_joint_agreement_is_the_mean_of_all_pairs():
    x, y = (pd.DataFrame(gaussian(9, k).numpy()) for k in (3, 2))
    y.iloc[0, 0] = math.inf
    pairs = [spearman(x[i], y[j])["spearman"] for i in x for j in y]
    assert joint_agreement(x, y)["spearman"] == pytest.approx(sum(pairs) / 6)


def test_measures_that_are_copies_of_each_other_agree_no_more_surely_than_one():
    x, y = (pd.DataFrame(gaussian(9, 1, seed=s).numpy()) for s in (0, 1))
    copies = pd.concat([x] * 5, axis=1)
    assert joint_agreement(copies, y) == pytest.approx(joint_agreement(x, y))


def test_random_tables_agree_by_chance_as_often_as_p_says():
    tables = [pd.DataFrame(gaussian(7, 2, seed=s).numpy()) for s in range(200)]
    found = [joint_agreement(x, y)["p"] for x, y in zip(tables[::2], tables[1::2], strict=True)]
    assert 0.1 < sum(p <= 0.25 for p in found) / len(found) < 0.4


def test_a_mix_is_scored_part_by_part():
    rows = load_split("mix", "test")[:8]
    nats, scores = [float(i) for i in range(8)], [None, *[10.0 * i for i in range(1, 8)]]
    test = {"row_nats": nats, "row_tokens": [2] * 8, "row_score": scores}
    config = PROFILES["paper"].config("mix", eval_rows=8)
    found = by_part(Result(config, {"evaluation": {"test": test}}))
    assert found["rows"].sum() == 8
    for part, line in found.iterrows():
        mine = [i for i, row in enumerate(rows) if row["task"] == part]
        assert line["loss_nats"] == pytest.approx(sum(nats[i] for i in mine) / (2 * len(mine)))
        scored = [scores[i] for i in mine if scores[i] is not None]
        assert line["score"] == pytest.approx(sum(scored) / len(scored))


def test_each_rank_regains_a_share_of_what_full_fine_tuning_does_of_a_part(monkeypatch):
    scores = {0: {"a": 100.0, "b": 60.0}, 1: {"a": 55.0, "b": 10.0}, 8: {"a": 91.0, "b": 70.0}}
    monkeypatch.setattr(tables, "by_part", lambda rank: pd.DataFrame({"score": scores[rank]}))
    start = pd.Series({"a": 10.0, "b": 20.0})
    found = regained({rank: rank for rank in scores}, start, "score")
    assert [*found.columns] == [1, 8], "full fine-tuning has all of its own gain"
    assert found.loc["a"].tolist() == [0.5, 0.9] and found.loc["b"].tolist() == [-0.25, 1.25]


def test_the_share_of_a_score_has_an_interval_over_rows_that_both_runs_share():
    """Half of a score above the floor is half in every draw, if the rows go together."""
    parts = [row["task"] for row in load_split("mix", "test")[:64]]
    config = PROFILES["paper"].config("mix", eval_rows=64)
    rng, floor = np.random.default_rng(1), pd.Series(10.0, sorted({*parts}))
    whole = rng.uniform(20, 100, 64)

    def scored(scores):
        test = {"row_nats": [1.0] * 64, "row_tokens": [1] * 64, "row_score": [None, *scores[1:]]}
        return Result(config, {"evaluation": {"test": test}})

    half = score_intervals(scored(10 + (whole - 10) / 2), scored(whole), floor)
    assert [*half.index] == [*floor.index] and half.to_numpy() == pytest.approx(0.5)
    strange = score_intervals(scored(rng.permutation(whole)), scored(whole), floor)
    assert (strange["low"] < 0.99).all() and (strange["high"] > 1.01).all()
    nothing = score_intervals(scored(whole), scored(0 * whole), 0 * floor)  # full is at its floor
    assert nothing.isna().all(axis=None)


def test_what_orders_tasks_without_an_svd_is_the_median_of_their_runs():
    sizes = PROFILES["smoke"]
    results = [
        Result(
            sizes.config(task, lr=lr),
            {"train_loss_nats": [nats] * sizes.steps, "squared_norms": {"matrices": norm**2}}
            | {"status": "finished"},
        )
        for task, lr, nats, norm in [
            ("facts", 1e-4, 1.0, 2.0),
            ("code", 1e-5, 0.0, 1.0),
            ("facts", 3e-4, 3.0, 4.0),
            ("facts", 1e-3, 2.0, 8.0),
        ]
    ]
    found = without_spectrum(results)
    assert [*found.index] == ["facts", "code"]
    assert [*found["learning rate"]] == [3e-4, 1e-5]
    assert [*found["norm"]] == pytest.approx([4.0, 1.0])
    assert found["bits"]["facts"] == first_epoch_kbit(results[3]) > found["bits"]["code"] == 0


def test_measures_of_the_spectrum_are_medians_over_matrices_and_then_runs(store):
    """Of flat spectra, sigma = 1 in n of 12 directions, r50 is n / 2 and r90 0.9 n."""
    results = []
    for seed, sizes in enumerate([(10, 10, 4), (10, 6, 6), (2, 2, 10)]):
        spectra = {f"layers.{i}.a": (torch.arange(12) < n).float() for i, n in enumerate(sizes)}
        shapes = dict.fromkeys(spectra, (12, 20))
        one = Result(PROFILES["smoke"].config("facts", seed=seed), {"shapes": shapes})
        results.append(with_spectra(one, spectra))
    [line] = spectrum_by_task(results).to_dict("records")  # medians of 10, 6 and 2 directions
    assert line["r50"] == 3 and line["r90"] == 6
    assert line["stable_rank"] == pytest.approx(6) == line["entropy_rank"]


def test_a_step_costs_what_it_does_beside_the_reference_of_its_round(tmp_path):
    lines = ["0,1,LoRA,1.0,2.0", "0,1,DoRA,3.0,4.0", "1,1,LoRA,2.0,2.0", "1,1,DoRA,4.0,5.0"]
    lines += [line.replace(",1,", ",8,", 1) for line in lines]  # another size
    (tmp_path / "times.csv").write_text("\n".join(["round,size,method,seconds,GB", *lines]))
    costs = tables.step_costs(tmp_path / "times.csv", ["size", "method"], "LoRA")
    assert [*costs.index] == [(size, name) for size in (1, 8) for name in ("LoRA", "DoRA")]
    costs = costs.loc[1]
    assert (costs.loc["LoRA", ["times", "most"]] == 1).all()
    told = {"seconds": 3.5, "GB": 4.5, "times": 2.5, "least": 2.0, "most": 3.0}
    assert costs.loc["DoRA"].to_dict() == told


def test_costs_count_a_run_once_and_by_how_it_ended():
    def ran(method, nats, *, status="finished", **fields):
        cost = {"device": "A", "seconds": 1800, "train_seconds": 900}
        test = {"test": {"loss_nats": nats, "score": 0.0}} if status == "finished" else {}
        record = {"status": status, "evaluation": test, "provenance": cost}
        return Result(PROFILES["smoke"].config("facts", method, **fields), record)

    best, worse = ran("full", 1.0), ran("full", 3.0, lr=1e-2)
    diverged = ran("full", math.nan, status="diverged", lr=1e-1)
    found = costs_table([ran("base", 2.0), best, worse, best, diverged])
    assert [*found.index] == [("base", "A"), ("full", "A")]
    assert found.loc[("full", "A")].to_dict() == {
        "runs": 3,
        "diverged": 1,
        "ended worse": 1,
        "hours": 1.5,
    }
