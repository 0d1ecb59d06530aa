"""The committed results: whole, of the present code and data, and each curve of one machine."""

import itertools

import pytest

import utils

STORE = utils.PROFILES["paper"].store
ENTRIES = sorted(path.parent for path in STORE.glob("*/*/result.json"))
RUNS = [folder for folder in ENTRIES if folder.parent.name == "runs"]


@pytest.mark.parametrize("folder", ENTRIES, ids=lambda folder: folder.name)
def test_an_entry_is_whole(folder):
    assert utils.load_entry(folder) is not None


@pytest.mark.parametrize("folder", RUNS, ids=lambda folder: folder.name)
def test_a_run_is_of_the_present_code_and_data(folder):
    config = utils.load_entry(folder)[0]["config"]
    config["rank_pattern"] = tuple(map(tuple, config.get("rank_pattern", ())))
    assert utils.RunConfig(**config).key == folder.name


def test_the_cuts_of_one_update_come_from_one_machine():
    """Another processor gives another update: its cuts do not belong on the same curve."""
    runs = {folder.name: utils.load_entry(folder)[0]["provenance"]["device"] for folder in RUNS}
    devices = {}
    for folder in (STORE / "cuts").iterdir():
        record, _ = utils.load_entry(folder)
        curve = folder.name.rpartition("-")[0]  # the run, and the part or that ranks differ
        devices.setdefault(curve, set()).add(record.get("device", runs[record["run"]]))
    assert {curve: found for curve, found in devices.items() if len(found) > 1} == {}


def lora_by_score(full):
    """Ask for LoRA at the profile's ranks up to the first that keeps 95 % of the gain in score."""
    base, whole = utils.run(utils.profile().config(full.task, "base")), utils.run(full)
    for rank in utils.profile().lora_ranks:
        score = utils.run(utils.tuned(full.task, "lora", rank=rank, seed=full.seed)).score()
        if utils.gain_kept(score, base.score(), whole.score()) >= 0.95:
            return


def test_the_paper_is_rendered_without_training(monkeypatch):
    """Every run, cut and overlap that the paper profile asks for is stored."""
    monkeypatch.setenv("PROFILE", "paper")

    def refuse(config, *_):
        raise AssertionError(f"{config.key} is not stored")

    for name in ("measure", "updates"):
        monkeypatch.setattr(utils, name, refuse)
    profile = utils.profile()
    utils.sweep([*utils.base_configs(), *utils.full_configs(), *utils.lora_configs()])
    utils.sweep([*utils.embedding_configs(), *utils.budget_configs()])
    utils.sweep([config for grid in utils.scaling_configs().values() for config in grid])
    for config in utils.full_configs():
        utils.cut_until(config, 0.95)
        if config.task in profile.lora_tasks:
            utils.lora_until(config, 0.95)
            lora_by_score(config)
        if config.task == "facts":
            utils.lora_until(config, 0.95, recipe=utils.larger_scale)
            scaled = [(rank, config.seed) for rank in profile.scaling_ranks]
            utils.sweep([utils.larger_scale(rank=rank, seed=seed) for rank, seed in scaled])
        if config.task == "sentiment":
            control = utils.tuned("shuffled", seed=config.seed)
            utils.lora_until(config, 0.95, start=control)
    for config in utils.full_configs()[: len(profile.tasks)]:
        for part in utils.CUT_PARTS:
            utils.cut(config, profile.control_ranks, part=part)
    groups = [[utils.tuned(t, seed=seed) for seed in profile.seeds] for t in profile.lora_tasks]
    groups.append([utils.tuned(task) for task in profile.lora_tasks])
    adapters = [(task, min(profile.lora_ranks)) for task in profile.direction_tasks]
    groups += [[utils.tuned(t, "lora", rank=rank), utils.tuned(t)] for t, rank in adapters]
    for group in groups:
        for pair in itertools.combinations(group, 2):
            utils.overlaps(*pair)
