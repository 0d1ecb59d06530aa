"""Loads: as many codes as make a load, the rate of a size, the grid and its table."""

import dataclasses
import math

import pytest
from small_codes import result_of, small_codes

from deltarank.study import loads
from deltarank.study.code_runs import code_parameters
from deltarank.study.loads import (
    best_code_lr,
    capacity_table,
    code_configs,
    curves_table,
    loads_of,
    longer_configs,
    sized_codes,
    trained_text,
)
from deltarank.study.profiles import PROFILES, profile

ONE_LAYER = ((1,), (), 1)  # 512 parameters of the tiny model


def test_codes_are_as_many_as_make_the_load(store):
    for size, load in ((ONE_LAYER, 0.1), (ONE_LAYER, 1.0), (((1,), (), 0), 0.01)):
        config = sized_codes(size, load, lr=1e-2, seed=1)
        assert config.bits / code_parameters(config) == pytest.approx(load, rel=0.2)
        assert (config.layers, config.modules, config.rank) == size and config.seed == 1
    assert sized_codes(ONE_LAYER, 1.0, lr=1e-2, seed=0).codes == round(512 / (4 * math.log2(10)))
    assert sized_codes(((1,), (), 0), 0.1, lr=1e-2, seed=0).method == "full"


def test_a_size_has_the_loads_that_make_neither_too_few_codes_nor_too_many(store, monkeypatch):
    def allow(most):
        grid = dataclasses.replace(profile().codes, loads=(0.01, 0.1, 1.0, 2.0), most=most)
        monkeypatch.setitem(PROFILES, "smoke", dataclasses.replace(profile(), codes=grid))

    allow(64)
    assert loads_of(ONE_LAYER) == [0.1, 1.0], "0 codes, 4, 39, 77"
    allow(3)
    with pytest.raises(ValueError, match="^the loads of .*: none of .* makes 2 to 3 codes$"):
        loads_of(ONE_LAYER)


@pytest.fixture
def graded(monkeypatch, store):
    """Runs that learn most at the last rate but one of two; what was asked for, in order."""
    asked = []

    def sweep(configs):
        asked.extend(configs)
        best = {profile().codes.lrs[0], profile().codes.full_lrs[1]}
        return [result_of(c, 10.0 if c.lr in best else 5.0) for c in configs]

    monkeypatch.setattr(loads, "code_sweep", sweep)
    return asked


def test_a_size_takes_the_rate_at_which_it_learns_most(graded, monkeypatch):
    assert best_code_lr(ONE_LAYER) == profile().codes.lrs[0]
    assert best_code_lr(((1,), (), 0)) == profile().codes.full_lrs[1]
    tried = {(c.seed, c.codes, c.steps) for c in graded if c.rank}
    assert tried == {(0, 39, 40)}, "at a load of one, in all the steps"
    diverged = {"status": "diverged"}
    monkeypatch.setattr(loads, "code_sweep", lambda c: [result_of(x, **diverged) for x in c])
    with pytest.raises(ValueError, match="diverged at every rate"):
        best_code_lr(ONE_LAYER)


def test_a_size_with_rates_of_its_own_takes_the_best_of_these(graded, monkeypatch):
    smoke = PROFILES["smoke"]
    codes = dataclasses.replace(smoke.codes, own_lrs=((ONE_LAYER, (2e-3,)),))
    monkeypatch.setitem(PROFILES, "smoke", dataclasses.replace(smoke, codes=codes))
    assert best_code_lr(ONE_LAYER) == 2e-3 and [c.lr for c in graded] == [2e-3]


def test_the_search_for_a_rate_goes_on_from_an_edge(graded, monkeypatch):
    smoke = PROFILES["smoke"]
    codes = dataclasses.replace(smoke.codes, lrs=(1e-2, 3e-2, 1e-1, 3e-1))
    monkeypatch.setitem(PROFILES, "smoke", dataclasses.replace(smoke, codes=codes))
    assert best_code_lr(ONE_LAYER) == 1e-2
    assert [c.lr for c in graded] == [3e-2, 1e-1, 3e-1, 1e-2]


def test_the_grid_has_every_size_and_load_and_other_seeds_at_some(graded):
    sizes, found = profile(), code_configs()
    points = {(c.layers, c.modules, c.rank, c.codes, c.seed) for c in found}
    assert len(points) == len(found)
    first = sum(len(loads_of(size)) for size in sizes.codes.sizes)
    others = (len(sizes.seeds) - 1) * len(sizes.codes.seed_loads)
    assert len(found) == first + others
    assert sum(c.seed == sizes.seeds[0] for c in found) == first
    assert {(c.lr, c.steps) for c in found if c.rank} == {(sizes.codes.lrs[0], 40)}


def test_longer_runs_are_of_the_grid_but_for_their_steps(graded):
    found, grid = longer_configs(), profile().codes
    assert [c.steps for c in found] == [4 * grid.steps] * len(grid.longer_loads)
    assert {dataclasses.replace(c, steps=grid.steps) for c in found} <= {*code_configs()}


def test_a_profile_without_codes_has_no_runs(monkeypatch):
    monkeypatch.setenv("PROFILE", "quick")
    assert code_configs() == longer_configs() == [] and capacity_table([]).empty


def test_the_sizes_of_paper_have_the_parameters_that_are_compared():
    """Of the layers that Gemma 3 270M has, by its matrices: 13,184 at rank 1 on one layer."""
    one = [(1024, 640), (256, 640), (256, 640), (640, 1024), *[(2048, 640)] * 2, (640, 2048)]
    each = sum(map(sum, one))
    lora = [(len(layers) * rank, modules) for layers, modules, rank in
            PROFILES["paper"].codes.sizes if rank]  # fmt: skip
    counts = [2688 * n if modules == ("down_proj",) else each * n for n, modules in lora]
    assert counts == [2688, 13184, 52736, 52736, 421888]


def test_the_table_has_a_line_a_run(graded):
    config = small_codes(codes=8)
    line = capacity_table([config, small_codes(method="full")]).iloc[0].to_dict()
    assert line == {
        "trained": "rank 4 on 1 layer",
        "parameters": 2048,
        "codes": 8,
        "seed": 0,
        "lr": 1e-2,
        "status": "finished",
        "load": pytest.approx(8 * 2 * math.log2(10) / 2048),
        "learned": 10 / 2048,
        "share": pytest.approx(10 / config.bits),
        "recall": 0.5,
        "steps": 20,
        "passes": 10.0,  # half of the codes in each step
        "plateau": False,
        "passes_90": pytest.approx(9),
    }


def test_curves_end_where_the_table_has_its_line(graded):
    configs = [small_codes(codes=8), small_codes(codes=8, seed=1)]
    curves, table = curves_table(configs), capacity_table(configs)
    ends = curves.groupby("run", sort=False).last()
    assert [*ends.index] == [config.key for config in configs]
    for column in ("trained", "load", "seed", "passes", "learned"):
        assert ends[column].tolist() == table[column].tolist()
    assert curves.groupby("run")["passes"].is_monotonic_increasing.all()


def test_a_run_that_diverged_has_a_line_without_numbers(monkeypatch, store):
    config = small_codes()
    monkeypatch.setattr(loads, "code_sweep", lambda c: [result_of(x, status="diverged") for x in c])
    line = capacity_table([config]).iloc[0]
    assert line["status"] == "diverged" and line["load"] == config.bits / 2048
    assert line[["learned", "share", "recall", "passes_90"]].isna().all()


def test_what_is_trained_is_told_in_words():
    assert trained_text(small_codes(layers=(0, 1), rank=1)) == "rank 1 on 2 layers"
    words = "rank 4 on down_proj, up_proj of 1 layer"
    assert trained_text(small_codes(modules=("down_proj", "up_proj"))) == words
    assert trained_text(small_codes(method="full")) == "all of 1 layer"
