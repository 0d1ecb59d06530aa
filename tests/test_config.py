"""Configurations: what cannot run is refused, and what differs has another key."""

import dataclasses
import os
import subprocess
import sys

import pytest

import utils

FULL = {"task": "sentiment", "model": utils.TINY, "lr": 1e-4, "steps": 6}
LORA = FULL | {"method": "lora", "rank": 4, "alpha": 8.0}


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("task", {"task": "poetry"}),
        ("method", {"method": "prompt"}),
        ("steps", {"steps": 0}),
        ("steps", {"steps": -1}),
        ("steps", {"method": "base"}),
        ("lr", {"lr": 0.0}),
        ("lr", {"lr": -1e-4}),
        ("lr", {"lr": float("nan")}),
        ("lr", {"lr": float("inf")}),
        ("rank", {"rank": 4}),
        ("rank", {**LORA, "rank": 0}),
        ("rank", {**LORA, "rank": -1}),
        ("alpha", {**LORA, "alpha": 0.0}),
        ("alpha", {**LORA, "alpha": float("nan")}),
        ("alpha", {**LORA, "alpha": float("inf")}),
        ("batch_size", {"batch_size": 0}),
        ("seq_len", {"seq_len": 0}),
        ("eval_rows", {"eval_rows": 0}),
        ("generate_rows", {"generate_rows": -1}),
        ("rank_pattern", {"rank_pattern": (("q_proj", 2),)}),
        ("train_embedding", {**LORA, "train_embedding": True}),
        ("dtype", {"dtype": "float16"}),
        ("schedule", {"schedule": "sometimes"}),
        ("optimizer", {"optimizer": "magic"}),
        ("weight_decay", {"weight_decay": float("nan")}),
    ],
)
def test_a_value_that_cannot_run_is_refused_by_name(field, changes):
    with pytest.raises(ValueError, match=field):
        utils.RunConfig(**(FULL | changes))


@pytest.mark.parametrize("record", [FULL, LORA, {"task": "kjv", "method": "base"}])
def test_a_value_that_can_run_is_accepted(record):
    assert utils.RunConfig(**record).task == record["task"]


CHANGES = {
    "task": "json",
    "model": utils.GEMMA,
    "rank": 5,
    "alpha": 9.0,
    "rslora": True,
    "rank_pattern": (("layers.0.mlp.up_proj", 2),),
    "lr": 2e-4,
    "schedule": "constant",
    "steps": 7,
    "batch_size": 17,
    "seq_len": 49,
    "optimizer": "sgd",
    "weight_decay": 0.1,
    "train_embedding": True,
    "seed": 1,
    "dtype": "float32",
    "compile": False,
    "eval_rows": 257,
    "generate_rows": 65,
}


def test_every_field_that_determines_a_run_is_tried():
    assert {"method", *CHANGES} == {field.name for field in dataclasses.fields(utils.RunConfig)}


@pytest.mark.parametrize("field", CHANGES)
def test_the_key_changes_with_every_field(field):
    start = FULL if field == "train_embedding" else LORA
    assert utils.RunConfig(**start).key != utils.RunConfig(**(start | {field: CHANGES[field]})).key


def test_the_hash_changes_with_the_method():
    full, lora = utils.RunConfig(**FULL), utils.RunConfig(**LORA)
    assert full.key[-12:] != lora.key[-12:]
    assert lora.identity["method"] == "lora"


def test_the_key_ignores_the_order_and_the_defaults():
    record = dict(reversed(LORA.items())) | {"weight_decay": 0.0}
    assert utils.RunConfig(**record).key == utils.RunConfig(**LORA).key


def test_the_key_says_what_the_run_is():
    assert utils.RunConfig(**LORA, seed=3).key.startswith("sentiment-lora-r4-s3-")


def test_the_key_changes_with_the_bytes_of_the_task(monkeypatch, tmp_path):
    before = utils.RunConfig(**FULL).key
    content = (utils.TASK_FOLDER / "sentiment.jsonl").read_bytes()
    monkeypatch.setattr(utils, "TASK_FOLDER", tmp_path)
    (tmp_path / "sentiment.jsonl").write_bytes(content)
    assert utils.RunConfig(**FULL).key == before
    (tmp_path / "sentiment.jsonl").write_bytes(content.replace(b"negative", b"Negative", 1))
    assert utils.RunConfig(**FULL).key != before


def test_the_key_changes_with_the_measurement(monkeypatch):
    before = utils.RunConfig(**FULL).key
    monkeypatch.setattr(utils, "MEASUREMENT", utils.MEASUREMENT + 1)
    assert utils.RunConfig(**FULL).key != before


def test_the_key_changes_with_the_weights_of_a_folder(tmp_path):
    model = utils.load_model(utils.TINY)
    keys = []
    for name in ("a", "b"):
        model.save_pretrained(tmp_path / name)
        keys.append(utils.RunConfig(**(FULL | {"model": str(tmp_path / name)})).identity)
        model.get_input_embeddings().weight.data += 1
    assert keys[0]["model_sha256"] != keys[1]["model_sha256"]


@pytest.mark.parametrize("hash_seed", ["0", "1"])
def test_the_key_is_the_same_in_every_process(hash_seed):
    code = f"import utils; print(utils.RunConfig(**{LORA!r}).key)"
    environment = os.environ | {"PYTHONHASHSEED": hash_seed}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=utils.ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == utils.RunConfig(**LORA).key


def test_an_unknown_profile_lists_the_known_ones(monkeypatch):
    monkeypatch.setenv("PROFILE", "huge")
    with pytest.raises(ValueError, match="huge.*smoke.*quick.*paper"):
        utils.profile()


def test_paper_is_the_default_profile(monkeypatch):
    monkeypatch.delenv("PROFILE")
    assert utils.profile().name == "paper"


@pytest.mark.parametrize("name", utils.PROFILES)
def test_every_run_of_a_profile_has_its_own_key(monkeypatch, name):
    monkeypatch.setenv("PROFILE", name)
    profile = utils.profile()
    configs = utils.base_configs()
    configs += [profile.config(task, lr=lr) for task in profile.tasks for lr in profile.full_lrs]
    lora = [(task, rank) for task in profile.lora_tasks for rank in profile.lora_ranks]
    configs += [
        profile.config(task, "lora", rank=rank, lr=lr)
        for task, rank in lora
        for lr in profile.lora_lrs
    ]
    runs = len(profile.tasks) * (1 + len(profile.full_lrs)) + len(lora) * len(profile.lora_lrs)
    assert len({config.key for config in configs}) == runs


@pytest.fixture
def losses(monkeypatch):
    """A table {(rank, lr): held-out loss} that stands in for the runs of every grid."""
    table = {}

    def result(config):
        loss = table[config.rank, config.lr]
        finished = {"status": "finished", "evaluation": {"valid": {"loss_nats": loss}}}
        record = {"status": "diverged", "evaluation": {}} if loss is None else finished
        return utils.Result(config, record, {})

    monkeypatch.setattr(utils, "sweep", lambda configs: [result(c) for c in configs])
    return table


@pytest.mark.parametrize(("low", "high", "lr"), [(1.0, 2.0, 1e-4), (2, 1, 1e-3), (3, None, 1e-4)])
def test_a_task_takes_the_learning_rate_of_the_lowest_held_out_loss(losses, low, high, lr):
    losses |= {(0, 1e-4): low, (0, 1e-3): high}
    assert utils.tuned("facts", seed=3) == utils.profile().config("facts", lr=lr, seed=3)


@pytest.mark.parametrize(
    ("by_rate", "tried", "best"),
    [
        ({1e-4: 2, 1e-3: 1, 1e-2: 2}, [1e-4, 1e-3, 1e-2], 1e-3),  # in the middle at once
        ({1e-6: 4, 1e-5: 3, 1e-4: 4, 1e-3: 5, 1e-2: 5}, [1e-6, 1e-5, 1e-4, 1e-3], 1e-5),
        ({1e-5: 9, 1e-4: 5, 1e-3: 4, 1e-2: 3, 1e-1: None}, [1e-4, 1e-3, 1e-2, 1e-1], 1e-2),
        ({1e-4: 3, 1e-3: 2, 1e-2: 1}, [1e-4, 1e-3, 1e-2], 1e-2),  # at the edge of what is there
    ],
)
def test_the_search_climbs_until_both_neighbours_are_no_better(
    monkeypatch, losses, by_rate, tried, best
):
    wide = dataclasses.replace(utils.PROFILES["smoke"], full_lrs=tuple(by_rate))
    monkeypatch.setitem(utils.PROFILES, "smoke", wide)
    losses |= {(0, lr): loss for lr, loss in by_rate.items()}
    results = utils.lr_search("facts")
    assert [result.config.lr for result in results] == tried
    assert utils.best_lr(results) == best


def test_ranks_between_the_profiles_interpolate_their_learning_rates(losses):
    searched = {1: 1e-3, 4: 1e-2, 8: 1e-2}
    losses |= {(r, lr): abs(lr - best) for r, best in searched.items() for lr in (1e-3, 1e-2)}
    found = {rank: utils.tuned("facts", "lora", rank=rank).lr for rank in (1, 2, 4, 8)}
    assert found == searched | {2: 3.2e-3}  # 10 ** -2.5, half way from rank 1 to rank 4


@pytest.fixture
def ladder(monkeypatch):
    """Runs whose loss falls from 5 (base) and 3 (shuffled labels) over LoRA's ranks towards 1."""
    lora = {1: 2.0, 2: 1.5, 4: 1.2, 8: 1.1}

    def result(config):
        others = {"base": 5.0, "full": 3.0 if config.task == "shuffled" else 1.0}
        loss = {"loss_nats": lora.get(config.rank) or others[config.method]}
        evaluation = {"valid": loss, "test": loss}
        return utils.Result(config, {"status": "finished", "evaluation": evaluation}, {})

    monkeypatch.setattr(utils, "run", result)
    monkeypatch.setattr(utils, "sweep", lambda configs: [result(c) for c in configs])


@pytest.mark.parametrize(
    ("share", "ranks"), [(0.5, [1]), (0.9, [1, 2, 4]), (0.96, [1, 2, 4, 8]), (1.1, [1, 2, 4, 8])]
)
def test_lora_doubles_its_rank_until_it_reaches_the_share(ladder, share, ranks):
    found = utils.lora_until(utils.profile().config("sentiment", seed=1), share)
    assert [run.config.rank for run in found] == ranks
    assert {run.config.seed for run in found} == {1}


def test_the_share_that_lora_is_to_reach_may_count_from_another_run(ladder):
    config = utils.profile().config
    found = utils.lora_until(config("sentiment"), 0.7, start=config("shuffled"))
    assert [run.config.rank for run in found] == [1, 2]  # 50 and 75 % of the way from 3 to 1


def test_lora_doubles_its_rank_by_another_recipe_too(ladder):
    def recipe(*, rank, seed):
        return utils.profile().config("facts", "lora", rank=rank, seed=seed, alpha=256.0)

    found = utils.lora_until(utils.profile().config("facts", seed=1), 0.8, recipe=recipe)
    assert [(run.config.rank, run.config.alpha) for run in found] == [(1, 256), (2, 256)]


def test_scales_that_are_equal_share_their_runs(store):
    found = {
        name: [(c.rank, c.alpha, c.rslora) for c in configs if c.lr == 1e-2]
        for name, configs in utils.scaling_configs().items()
    }
    assert found == {
        "α / r, α = 32": [(1, 32, False), (8, 32, False)],
        "α / √r, α = 32": [(1, 32, False), (8, 32, True)],
        "α / r, α = 256": [(1, 256, False), (8, 256, False)],
    }


def test_the_larger_scale_takes_the_best_rate_of_its_rank_or_one_between(losses):
    losses |= {(1, 1e-3): 1, (1, 1e-2): 2, (8, 1e-3): 2, (8, 1e-2): 1}
    found = [utils.larger_scale(rank=rank, seed=1) for rank in (1, 2, 8)]
    assert [config.lr for config in found] == [1e-3, 2.2e-3, 1e-2]
    assert {(config.alpha, config.seed) for config in found} == {(256, 1)}


def test_the_scale_of_a_lora_is_that_of_peft():
    for changes in ({}, {"rslora": True}, {"alpha": 256.0}):
        config = utils.profile().config("facts", "lora", rank=8, **changes)
        layer = next(iter(utils.lora_layers(utils.prepare(config)).values()))
        assert layer.scaling["default"] == pytest.approx(config.scale)


def test_a_grid_that_diverged_as_a_whole_is_named(losses):
    losses |= {(0, 1e-4): None, (0, 1e-3): None}
    with pytest.raises(ValueError, match=r"every learning rate diverged: facts-full.*lower"):
        utils.tuned("facts")


@pytest.mark.parametrize("name", ["smoke", "quick"])
def test_only_the_paper_profile_writes_into_the_repository(name):
    profile = utils.PROFILES[name]
    for folder in (profile.store, profile.figures):
        assert not folder.is_relative_to(utils.ROOT)  # BUILD is a temporary folder here
    assert utils.PROFILES["paper"].store == utils.ROOT / "data"
