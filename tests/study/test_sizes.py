"""Sizes: parameters counted as PEFT counts them, a ladder that ascends, and where it is enough."""

import dataclasses
import itertools
import math

import pytest

from deltarank.study import sizes
from deltarank.study.profiles import profile
from deltarank.study.runs import Result
from deltarank.study.search import tuned
from deltarank.study.sizes import (
    PLACES,
    SHARES,
    bracket_gains,
    ladder,
    longer_gains,
    lora_by_skill,
    needed_size,
    place_configs,
    place_layers,
    place_table,
    sized,
    trained_parameters,
)
from deltarank.study.training import prepare


@pytest.mark.parametrize(
    "fields",
    [
        {"method": "full"},
        {"method": "full", "train_embedding": True},
        {"method": "lora", "rank": 3},
        {"method": "lora", "rank": 3, "rank_pattern": (("layers.1.mlp.up_proj", 5), ("k_proj", 2))},
        {"method": "lora", "rank": 1, "layers": (1,)},
        {"method": "lora", "rank": 1, "modules": ("q_proj",)},
        {"method": "lora", "rank": 2, "layers": (0,), "modules": ("down_proj", "k_proj")},
        {"method": "tinylora", "rank": 2, "vector": 13},
        {"method": "tinylora", "rank": 1, "vector": 2, "modules": ("q_proj",)},
    ],
    ids=str,
)
def test_parameters_are_counted_as_they_are_trained(store, fields):
    config = profile().config("facts", **fields)
    model = prepare(config)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained_parameters(config) == trained > 0
    if fields["method"] != "full":
        assert model.get_nb_trainable_parameters()[0] == trained


def test_a_base_run_trains_nothing():
    assert trained_parameters(profile().config("facts", "base")) == 0


@pytest.mark.parametrize("changes", [{"layers": (2,)}, {"modules": ("q",)}])
def test_what_cannot_be_trained_is_not_counted(changes):
    with pytest.raises(ValueError, match="the model has layers 0 to 1|choose from down_proj"):
        trained_parameters(profile().config("facts", "lora", rank=1, **changes))


@pytest.mark.parametrize(
    ("where", "count", "layers"),
    [
        ("spread", 1, (9,)),
        ("spread", 6, (1, 4, 7, 10, 13, 16)),
        ("spread", 9, (1, 3, 5, 7, 9, 11, 13, 15, 17)),
        ("spread", 18, tuple(range(18))),
        ("first", 3, (0, 1, 2)),
        ("middle", 1, (9,)),
        ("middle", 6, (6, 7, 8, 9, 10, 11)),
        ("last", 3, (15, 16, 17)),
    ],
)
def test_where_the_layers_lie(where, count, layers):
    assert place_layers(where, count, 18) == layers


@pytest.mark.parametrize(
    ("where", "count", "told"),
    [("ends", 1, "^where='ends'"), ("first", 0, "^count=0"), ("first", 19, "^count=19: .* 18")],
)
def test_a_place_that_is_none_is_refused(where, count, told):
    with pytest.raises(ValueError, match=told):
        place_layers(where, count, 18)


def test_the_ladder_ascends_and_every_size_can_be_trained(store):
    configs = {name: profile().config("facts", **size) for name, size in ladder().items()}
    assert list(configs) == [
        "TinyLoRA of 8", "TinyLoRA of 32", "rank 1 on q_proj", "rank 1 on 1 layer",
        "rank 1", "rank 4", "rank 8",
    ]  # fmt: skip
    counts = [trained_parameters(config) for config in configs.values()]
    assert all(low < high for low, high in itertools.pairwise(counts))
    for config, count in zip(configs.values(), counts, strict=True):
        assert prepare(config).get_nb_trainable_parameters()[0] == count


def test_a_size_takes_its_own_best_rate(losses):
    losses |= {(r, lr): lr for r in (1, 4, 8) for lr in (1e-3, 1e-2)}
    losses |= {(2, lr): abs(lr - 0.1) for lr in (1e-2, 1e-1)}
    steps = ladder()
    tiny = sized("facts", steps["TinyLoRA of 8"], seed=1, steps=9)
    assert (tiny.method, tiny.vector, tiny.lr, tiny.seed, tiny.steps) == ("tinylora", 8, 0.1, 1, 9)
    sparse = sized("facts", steps["rank 1 on 1 layer"])
    assert (sparse.layers, sparse.modules, sparse.lr, sparse.alpha) == ((1,), (), 1e-3, 32)
    for rank in (1, 4, 8):  # the report's own runs
        assert sized("facts", steps[f"rank {rank}"], seed=1) == tuned(
            "facts", "lora", rank=rank, seed=1
        )


@pytest.mark.parametrize(
    ("asked", "ranks"),
    [
        ({"share": 0.5}, [1]),
        ({"share": 0.5, "by": "score"}, [1, 4]),
        ({"share": 0.95}, [1, 4]),  # as much is enough
        ({"share": 0.99}, [1, 4, 8]),
        ({"share": 2}, [1, 4, 8]),
    ],
    ids=str,
)
def test_lora_by_skill_ends_at_the_first_rank_that_is_enough(monkeypatch, asked, ranks):
    gains = {("loss", 1): 0.6, ("loss", 4): 0.95, ("loss", 8): 0.99}
    gains |= {("score", 1): 0.4, ("score", 4): 0.6}
    monkeypatch.setattr(sizes, "run", lambda config: Result(config, {}))
    monkeypatch.setattr(sizes, "skill_gain", lambda r, by: gains[by, r.config.rank])
    monkeypatch.setattr(sizes, "tuned", profile().config)
    found = lora_by_skill(profile().config("facts", seed=1), **asked)
    assert [run.config.rank for run in found] == ranks
    assert {(run.config.task, run.config.seed) for run in found} == {("facts", 1)}


def test_places_differ_in_their_layers_alone(losses):
    losses |= {(1, lr): lr for lr in (1e-3, 1e-2)}
    found = place_configs()
    assert list(found) == [("facts", where) for where in PLACES]
    layers = [config.layers for config in found.values()]
    assert layers == [(1,), (0,), (1,), (1,)]  # of two layers


def test_what_places_have_learned_is_read_from_their_runs(losses, monkeypatch):
    losses |= {(1, lr): lr for lr in (1e-3, 1e-2)}
    monkeypatch.setattr(sizes, "sweep", lambda configs: [Result(c, {}) for c in configs])
    monkeypatch.setattr(sizes, "gain", lambda result: 0.9 + result.config.layers[0])
    monkeypatch.setattr(sizes, "skill_gain", lambda result: 0.7 + result.config.layers[0])
    monkeypatch.setattr(Result, "score", lambda result: 10.0 * result.config.layers[0])
    table = place_table()
    assert [*table.index] == [("facts", where) for where in PLACES]
    assert [*table.loc[("facts", "first")]] == ["1", 1e-3, 0.9, 0.7, 0.0]
    assert [*table.loc[("facts", "last")]] == ["2", 1e-3, 1.9, 1.7, 10.0]


def unsearched(task, size, **changes):
    """What `sized` gives, at the profile's own rate."""
    return profile().config(task, **size, **changes)


@pytest.mark.parametrize(
    ("gains", "bracket"),
    [
        ([0.1, 0.5, 0.9, 0.96, 1, 1, 1], (128, 512)),
        ([0.1, 0.5, 0.96, 0.94, 1, 1, 1], (512, 1024)),  # the last shortfall counts
        ([0.95, 1, 1, 1, 1, 1, 1], (0, 8)),
        ([0.1, 0.5, 0.9, math.nan, 1, 1, 1], (512, 1024)),  # a run that diverged
        ([0.1, 0.5, 0.9, 0.9, 0.9, 0.9, 0.9], (8192, math.inf)),
    ],
)
def test_the_needed_size_lies_between_two_that_were_tried(monkeypatch, gains, bracket):
    by_size = dict(zip((8, 32, 128, 512, 1024, 4096, 8192), gains, strict=True))
    asked = []

    def result(config):
        asked.append(config.seed)
        return Result(config, {})

    monkeypatch.setattr(sizes, "tried_sizes", lambda task, **fields: ladder())
    monkeypatch.setattr(sizes, "sized", unsearched)
    monkeypatch.setattr(sizes, "sweep", lambda configs: [result(config) for config in configs])
    monkeypatch.setattr(sizes, "skill_gain", lambda r, by: by_size[trained_parameters(r.config)])
    assert needed_size("facts", 0.95) == bracket
    assert asked == [0] * 7


def test_the_gains_of_sizes_are_those_of_their_losses_or_scores(monkeypatch):
    monkeypatch.setattr(sizes, "tried_runs", lambda task, shares: {8: None})
    monkeypatch.setattr(sizes, "skill_gain", lambda r, by: {"loss": 0.9, "score": 0.1}[by])
    assert sizes.size_gains("facts").to_dict() == {8: 0.9}
    assert sizes.size_gains("facts", by="score").to_dict() == {8: 0.1}


@pytest.mark.parametrize(
    ("gains", "shares", "tried"),
    [
        ([0.1, 0.5, 0.9, 0.96, 1, 1, 1], SHARES, [32, 128, 512, 1024, 4096]),  # 128, 512, 1,024
        ([0.1, 0.5, 0.9, 0.96, 1, 1, 1], (0.95,), [32, 128, 512]),
        ([1, 1, 1, 1, 1, 1, 1], SHARES, [8, 32, 512]),
        ([0.1] * 7, SHARES, [512, 4096, 8192]),
        ([0.1, 0.5, 0.9, math.nan, 1, 1, 1], SHARES, [512, 1024, 4096]),  # diverged: falls short
    ],
)
def test_halving_tries_what_each_share_needs(monkeypatch, gains, shares, tried):
    by_size = dict(zip((8, 32, 128, 512, 1024, 4096, 8192), gains, strict=True))
    asked = []

    def gain(config, split):
        asked.append((trained_parameters(config), split, config.steps))
        return by_size[asked[-1][0]]

    monkeypatch.setattr(sizes, "sized", unsearched)
    monkeypatch.setattr(sizes, "run", lambda config: config)
    monkeypatch.setattr(sizes, "skill_gain", gain)
    found = sizes.tried_sizes("facts", shares=shares, steps=9)
    configs = [profile().config("facts", **size) for size in found.values()]
    assert [trained_parameters(config) for config in configs] == tried
    assert sorted(asked) == [(count, "valid", 9) for count in tried], "each once"


@pytest.fixture
def bracketed(monkeypatch):
    """The profile with two seeds and budgets, and needed_size("facts", …) set to these ends."""

    def set_ends(ends):
        seeded = dataclasses.replace(profile(), seeds=(0, 2), budgets=(1, 3))
        monkeypatch.setattr(sizes, "profile", lambda: seeded)
        monkeypatch.setattr(sizes, "needed_size", lambda task, share: ends)
        monkeypatch.setattr(sizes, "sized", unsearched)
        monkeypatch.setattr(sizes, "run", lambda config: config)
        monkeypatch.setattr(sizes, "sweep", list)

    return set_ends


ENDS = [((128.0, 512.0), [128, 512]), ((0.0, 8.0), [8]), ((8192.0, math.inf), [8192])]


@pytest.mark.parametrize(("ends", "sizes_asked"), ENDS)
def test_every_seed_is_read_at_the_ends_of_the_bracket(monkeypatch, bracketed, ends, sizes_asked):
    bracketed(ends)
    monkeypatch.setattr(sizes, "skill_gain", lambda c: trained_parameters(c) + c.seed / 10)
    found = bracket_gains("facts", 0.95)
    assert [*found.index] == [0, 2] and [*found.columns] == sizes_asked
    assert found.to_numpy().tolist() == [[n + s / 10 for n in sizes_asked] for s in (0, 2)]


@pytest.mark.parametrize(("ends", "short"), [((128.0, 512.0), [128]), ((0.0, 8.0), [])])
def test_every_budget_is_read_at_the_size_that_falls_short(monkeypatch, bracketed, ends, short):
    bracketed(ends)
    monkeypatch.setattr(sizes, "skill_gain", lambda c: trained_parameters(c) + c.steps)
    found, steps = longer_gains("facts", 0.95), [profile().steps, 3 * profile().steps]
    assert [*found.index] == steps and [*found.columns] == short
    assert found.to_numpy().tolist() == [[n + many for n in short] for many in steps]


def test_of_a_task_that_is_begun_the_trained_sizes_are_taken(monkeypatch):
    names = ("TinyLoRA of 32", "rank 1")
    grid = dataclasses.replace(profile().ladder, begun=(("facts", names),))
    begun = dataclasses.replace(profile(), ladder=grid)
    monkeypatch.setattr(sizes, "profile", lambda: begun)
    assert sizes.tried_sizes("facts", shares=(0.95,)) == {name: ladder()[name] for name in names}


def test_a_task_without_a_floor_is_named(store):
    with pytest.raises(ValueError, match="shuffled has no floor"):
        needed_size("shuffled", 0.95)
