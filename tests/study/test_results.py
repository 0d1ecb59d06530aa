"""The committed results: whole, of the present code and data, and each curve of one machine."""

import contextlib
import dataclasses
import itertools
import runpy

import pytest

from deltarank import store
from deltarank.runtime import ROOT
from deltarank.study import (
    capacity,
    contest,
    cuts,
    directions,
    diversity,
    forgetting,
    heals,
    loads,
    overlaps,
    plan,
    runs,
    search,
    signatures,
    treatments,
    trials,
)
from deltarank.study.capacity import code_folder
from deltarank.study.code_runs import CodeRun
from deltarank.study.configs import RunConfig
from deltarank.study.floors import floors
from deltarank.study.profiles import PROFILES, entry_folder, profile
from deltarank.study.rivals import paid, read_of
from deltarank.study.sizes import (
    bracket_gains,
    longer_gains,
    lora_by_skill,
    place_table,
    size_gains,
)
from deltarank.study.tables import by_part

EXAMPLES = runpy.run_path(str(ROOT / "notebooks/site/inspect_examples.py"))["EXAMPLES"]
STORE = PROFILES["paper"].store
ENTRIES = sorted(path.parent for path in STORE.rglob("result.json"))
RUNS = [folder for folder in ENTRIES if folder.is_relative_to(STORE / "runs")]
SPECTRA = [folder for folder in ENTRIES if folder.is_relative_to(STORE / "spectra")]
PAIRS = [folder for folder in ENTRIES if folder.parents[1].name in ("overlaps", "directions")]
CUTS = [folder for folder in ENTRIES if folder.is_relative_to(STORE / "cuts")]
HEALS = [folder for folder in ENTRIES if folder.is_relative_to(STORE / "heals")]
FORGOTTEN = [folder for folder in ENTRIES if folder.is_relative_to(STORE / "forgetting")]
TREATED = [folder for folder in ENTRIES if folder.is_relative_to(STORE / "treatments")]
CODES = [folder for folder in ENTRIES if folder.is_relative_to(STORE / "capacity")]


@pytest.fixture(scope="module")
def records():
    """The record of every entry, None where it is not whole."""
    entries = {folder: store.load_entry(folder) for folder in ENTRIES}
    return {folder: entry and entry[0] for folder, entry in entries.items()}


def test_every_entry_is_whole(records):
    assert len(RUNS) > 200 and len(CUTS) > 150 and len(PAIRS) > 60
    assert [folder.name for folder in ENTRIES if records[folder] is None] == []


def test_an_entry_lies_at_kind_task_key():
    both = RUNS + SPECTRA + CUTS
    assert [folder for folder in both if folder.parents[2] != STORE] == []
    kept = {folder.parent.name: folder.name.partition("-")[0] for folder in both}
    assert {task: first for task, first in kept.items() if task != first} == {}


def config_of(record):
    """The configuration of a stored run."""
    fields = dict(record["config"])
    fields["rank_pattern"] = tuple(map(tuple, fields.get("rank_pattern", ())))
    fields |= {name: tuple(fields.get(name, ())) for name in ("layers", "modules")}
    return RunConfig(**fields, profile="paper")


def test_every_run_is_of_the_present_code_and_data(records):
    folders = {folder: entry_folder(config_of(records[folder]), "runs") for folder in RUNS}
    assert [folder.name for folder, found in folders.items() if found != folder] == []


def test_what_is_forgotten_is_of_the_present_code_text_and_rules(records, monkeypatch):
    monkeypatch.setenv("PROFILE", "paper")
    for folder in FORGOTTEN:
        assert entry_folder(config_of(records[folder]), "forgetting") == folder
        assert forgetting.forget_run(config_of(records[folder])) == records[folder]
    named = {config.key: config for _, config in treatments.treated_configs()}
    for folder in TREATED:
        assert entry_folder(named[folder.name], "treatments") == folder
        assert len(treatments.treated(named[folder.name])) == len(records[folder]["rows"])
    assert FORGOTTEN and TREATED


def test_every_heal_is_of_the_present_code_and_of_a_stored_run(records):
    strange, full_runs = [], {folder.name: folder for folder in RUNS}
    for folder in HEALS:
        told = records[folder]["heal"]
        full = config_of(records[full_runs[told["full"]]])
        names = ("start", "rank", "steps", "rows", "lr", "wide")
        heal = heals.Heal(full=full, **{name: told[name] for name in names})
        strange += [] if entry_folder(full, "heals", heal.key) == folder else [folder.name]
        assert told == heal.identity
    assert HEALS and strange == []


def test_the_heals_of_one_run_come_from_one_machine(records):
    devices = {}
    for folder in HEALS:
        found = records[folder]["provenance"]["processor"]
        devices.setdefault(records[folder]["heal"]["full"], set()).add(found)
    assert {full: found for full, found in devices.items() if len(found) > 1} == {}


def test_every_code_run_is_of_the_present_code(records):
    strange = []
    for folder in CODES:
        fields = records[folder]["config"]
        named = {name: tuple(fields[name]) for name in ("layers", "modules")}
        config = CodeRun(**fields | named, profile="paper")
        strange += [] if code_folder(config) == folder else [folder.name]
    assert CODES and strange == []


def test_spectra_cuts_and_overlaps_are_of_stored_runs(records):
    names = {folder.name for folder in RUNS}
    of_runs = {folder: [records[folder]["run"]] for folder in SPECTRA + CUTS}
    of_runs |= {folder: records[folder]["runs"] for folder in PAIRS}
    assert [folder.name for folder, found in of_runs.items() if not names.issuperset(found)] == []


def test_the_cuts_of_one_update_come_from_one_machine(records):
    """Another processor gives another update: its cuts do not belong on the same curve."""
    machines = {folder.name: records[folder]["provenance"]["device"] for folder in RUNS}
    devices = {}
    for folder in CUTS:
        record = records[folder]
        curve = folder.name.rpartition("-")[0]  # the run, and the part or that ranks differ
        devices.setdefault(curve, set()).add(record.get("device", machines[record["run"]]))
    assert {curve: found for curve, found in devices.items() if len(found) > 1} == {}


def test_the_data_are_under_100_megabytes():
    assert sum(path.stat().st_size for path in STORE.rglob("*") if path.is_file()) < 100e6


@pytest.fixture
def no_training(monkeypatch):
    """Whatever would train is refused by name, in each module that asks for it."""

    def refuse(config, *_, **__):
        raise AssertionError(f"{config.key} is not stored")

    owners = {"measure": [runs], "_require_update": [runs]}
    owners |= {"measure_heal": [heals], "measure_codes": [capacity]}
    for name, module in ((name, module) for name, found in owners.items() for module in found):
        monkeypatch.setattr(module, name, refuse)


ASKED = {
    "run": lambda config: runs.run(config),
    "sweep": lambda config: runs.sweep([config]),
    "spectra": lambda config: runs.Result(config, {"shapes": {"some.weight": [1, 1]}}).spectra,
    "cut": lambda config: cuts.cut(config, [1]),
    "cut by matrix": lambda config: cuts.cut_by_matrix(config, {"some.weight": 1}),
    "overlaps": lambda config: overlaps.overlaps(config, dataclasses.replace(config, seed=9)),
    "directions": lambda config: directions.directions(
        dataclasses.replace(config, method="lora", rank=1, alpha=32.0), config, config
    ),
    "cut until": lambda config: plan.cut_until(config, 0.95),
    "lora until": lambda config: plan.lora_until(config, 0.95),
    "heal": lambda config: heals.heal_run(
        heals.Heal(full=config, start="cut", rank=1, steps=0, rows=config.batch_size)
    ),
    "search": lambda config: search.lr_search(config.task),
    "example": lambda config: runs.example_update(config),
    "model": lambda config: runs.save_model(config, entry_folder(config, "models")),
}


@pytest.mark.parametrize("what", ASKED)
def test_what_is_not_stored_is_refused_by_the_guard_over_training(config, no_training, what):
    with pytest.raises(AssertionError, match=r"^sentiment-\S+ is not stored$"):
        ASKED[what](config)


def ask_for_runs_and_cuts(full):
    """Ask for what the report shows of a full run, its cuts and its LoRAs."""
    plan.cut_until(full, 0.95)
    if full.task in profile().lora_tasks:
        plan.lora_until(full, 0.95)
        for by in ("loss", "score"):
            lora_by_skill(full, 0.95, by=by)


def ask_for_controls():
    """Ask for the warm-up, the floors, the same runs on one processor, and the long mix."""
    permuted = [config for task in profile().lora_tasks for config in plan.floor_configs(task)]
    again = [config for pair in plan.again_configs() for config in pair]
    long_mix = [profile().config("production", "base"), *plan.production_configs()]
    long_mix += plan.production_configs(twice=True)
    runs.sweep([*plan.warmup_configs(), *permuted, *again, *long_mix])
    diversity.exchange_table()
    runs.sweep(diversity.higher_configs())


def ask_for_ladders():
    """Ask for the runs of which notebook 7 tells needed sizes, and notebook 9 what rules read."""
    for task in profile().lora_tasks:
        size_gains(task)
    for task in profile().ladder.seed_tasks:
        bracket_gains(task, 0.95)
    for task in profile().ladder.longer_tasks:
        longer_gains(task, 0.95)
    place_table()
    read_of([*profile().lora_tasks, *profile().forecast_tasks])
    for task in profile().forecast_tasks:
        paid(task, shares=(0.95,))
    runs.sweep([config for configs in plan.entities_configs().values() for config in configs])


def ask_for_signatures():
    """Ask for the runs, spectra, cuts, overlaps and first steps of other optimizers."""
    signatures.tried_table()
    signatures.cuts_table(0.95)
    signatures.without_skill("facts")
    for task in profile().optimizers.tasks:
        signatures.at_equal_loss(task, seed=profile().seeds[0])
        signatures.first_steps(profile().config(task, "base"))
    for task in profile().optimizers.again:
        signatures.at_equal_loss(task, seed=signatures.second_seed())
        signatures.shared_directions(task)
    for task in profile().optimizers.lora_tasks:
        runs.sweep([*signatures.lora_configs(task).values()])


def ask_for_contests():
    """Ask for the trials of every method, the runs at its best setting, and their updates."""
    contest.trials_table()
    contest.finals_table()
    contest.updates_table()
    seed = profile().seeds[0] + contest.APART
    for task, size in profile().contests:
        runs.run(trials.chosen(trials.trials(task, "full", size), seed=seed))
    for (task, size), names in contest.TO_COME.items():
        for name in names:
            with contextlib.suppress(AssertionError):  # what is not stored
                for shift, seed in itertools.product((0, contest.APART), profile().seeds):
                    tried = trials.trials(task, name, size)
                    runs.run(trials.chosen(tried, seed=seed + shift))


def ask_for_spectra():
    """Ask for the spectra that notebooks show, and of the gallery's examples."""
    sizes = profile()
    searched = [result for task in sizes.tasks for result in search.coarse_search(task)]
    configs = [*plan.full_configs(), *plan.embedding_configs(), *map(sizes.config, sizes.tasks)]
    configs += [search.coarsely_tuned("facts", seed=seed) for seed in sizes.seeds]
    ranks = itertools.product(sizes.lora_tasks, sizes.lora_ranks)
    configs += [search.tuned(task, "lora", rank=rank) for task, rank in ranks]
    for result in [*searched, *runs.sweep(configs + [run for _, run, _ in EXAMPLES.values()])]:
        assert result.spectra or result.status == "diverged"


def pairs_to_compare():
    """The pairs of runs whose directions the report compares, at the rates of the coarse search."""
    sizes, run = profile(), search.coarsely_tuned
    groups = [[run(task, seed=seed) for seed in sizes.seeds] for task in sizes.lora_tasks]
    groups.append([run(task) for task in sizes.lora_tasks])
    for task in sizes.direction_tasks:
        groups.append([run(task, rank=min(sizes.lora_ranks)), run(task)])
    return [pair for group in groups for pair in itertools.combinations(group, 2)]


@pytest.fixture
def asked(monkeypatch):
    """The folders of the entries that are looked for from here on."""
    folders, load = set(), store.load_entry

    def noted(folder):
        folders.add(folder)
        return load(folder)

    for module in (store, runs, cuts):
        monkeypatch.setattr(module, "load_entry", noted)
    return folders


def test_full_fine_tuning_learns_every_part_of_every_mix(monkeypatch, no_training):
    """As notebook 2 has it: by 20 points or by 0.5 nats beyond the floor; no facts by heart."""
    monkeypatch.setenv("PROFILE", "paper")
    for mix in diversity.nested_mixes().values():
        for part, found in by_part(diversity.mix_runs(mix)[0]).iterrows():
            floor = floors(part)
            nats, score = floor["loss_nats"].min(), floor["score"].max()
            assert nats - found["loss_nats"] >= 0.5 or found["score"] - score >= 20, (mix, part)
            assert part != "facts" or found["score"] < 25


def test_the_paper_is_rendered_without_training(monkeypatch, no_training, records, asked):
    """Every run, cut, overlap and code run that the profile asks for is stored, and no others."""
    monkeypatch.setenv("PROFILE", "paper")
    full = plan.full_configs()
    runs.sweep([*plan.base_configs(), *full, *plan.lora_configs()])
    runs.sweep([*plan.embedding_configs(), *plan.budget_configs(), *plan.alpha_configs()])
    runs.run(plan.between_config())
    runs.sweep([config for grid in plan.scaling_configs().values() for config in grid])
    for config in full:
        ask_for_runs_and_cuts(config)
    for config in full[: len(profile().tasks)]:
        for part in cuts.CUT_PARTS:
            cuts.cut(config, profile().control_ranks, part=part)
        for part in cuts.LENGTH_PARTS if config.task in profile().lora_tasks else ():
            cuts.cut(config, profile().control_ranks, part=part)
    ask_for_controls()
    ask_for_ladders()
    ask_for_signatures()
    ask_for_contests()
    runs.sweep([search.full_of(config) for _, config in forgetting.repeat_configs()])
    ask_for_spectra()
    heals.heals_table(heals.heal_configs())
    loads.capacity_table([*loads.code_configs(), *loads.longer_configs()])
    pairs = pairs_to_compare()
    assert len(full) == 30 and len(pairs) > 60
    for pair in pairs:
        overlaps.overlaps(*pair)
    for task in profile().reading_tasks:
        full, other = (search.tuned(task, seed=seed) for seed in profile().seeds[:2])
        directions.directions(search.tuned(task, "lora", rank=1), full, other)
    asked_for = [folder for folder in RUNS + PAIRS if folder in asked]
    assert len(asked_for) > 300
    stored = RUNS + SPECTRA + PAIRS + HEALS + CODES
    others = [folder for folder in stored if folder not in asked]
    by_matrix = [
        folder for folder in others if records[folder].get("config", {}).get("rank_pattern")
    ]
    assert others == by_matrix, "no notebook reads these"  # notebook 14 has ranks by matrix
