"""Profiles: sizes by name, and each run in the store of the profile that made it."""

import dataclasses

import pytest

from deltarank.runtime import ROOT, build_folder
from deltarank.study.configs import RunConfig
from deltarank.study.models import TINY, load_model, load_tokenizer
from deltarank.study.plan import base_configs
from deltarank.study.profiles import PROFILES, base_of, entry_folder, profile
from deltarank.study.runs import run, stored
from deltarank.study.tasks import encode, load_task


def test_an_unknown_profile_lists_the_known_ones(monkeypatch):
    monkeypatch.setenv("PROFILE", "huge")
    with pytest.raises(ValueError, match="huge.*smoke.*quick.*paper"):
        profile()


def test_paper_is_the_default_profile(monkeypatch):
    monkeypatch.delenv("PROFILE")
    assert profile().name == "paper"


@pytest.mark.parametrize("name", PROFILES)
def test_every_run_of_a_profile_has_its_own_key(monkeypatch, name):
    monkeypatch.setenv("PROFILE", name)
    sizes = profile()
    configs = base_configs()
    configs += [sizes.config(task, lr=lr) for task in sizes.tasks for lr in sizes.full_lrs]
    lora = [(task, rank) for task in sizes.lora_tasks for rank in sizes.lora_ranks]
    configs += [
        sizes.config(task, "lora", rank=rank, lr=lr) for task, rank in lora for lr in sizes.lora_lrs
    ]
    runs = len(sizes.tasks) * (1 + len(sizes.full_lrs)) + len(lora) * len(sizes.lora_lrs)
    assert len({config.key for config in configs}) == runs


@pytest.mark.parametrize("name", ["smoke", "quick"])
def test_only_the_paper_profile_writes_into_the_repository(name):
    sizes = PROFILES[name]
    for folder in (sizes.store, sizes.figures):
        assert not folder.is_relative_to(ROOT)  # BUILD is a temporary folder here
    assert PROFILES["paper"].store == ROOT / "data"


@pytest.fixture
def another(tmp_path, monkeypatch):
    """A model that a reader brings, in the place of the report's."""
    from transformers import ByT5Tokenizer

    load_model(TINY).save_pretrained(tmp_path / "another")
    ByT5Tokenizer().save_pretrained(tmp_path / "another")
    monkeypatch.setenv("MODEL", str(tmp_path / "another"))
    return str(tmp_path / "another")


@pytest.mark.parametrize("name", PROFILES)
def test_another_model_has_a_folder_of_its_own_and_room_for_its_words(monkeypatch, another, name):
    monkeypatch.setenv("PROFILE", name)
    found = profile()
    own = {"model": another, "seq_len": found.seq_len, "second": ""}
    assert found == dataclasses.replace(PROFILES[name], **own)
    assert found.model == another and found.config("facts").model == another
    folder = build_folder() / f"{name}-another"
    assert entry_folder(found.config("facts"), "runs").is_relative_to(folder / "data")
    assert found.figures == folder / "figures"
    rows = [row for split in load_task("json").values() for row in split]
    longest = max(len(encode(row, load_tokenizer(another))["input_ids"]) for row in rows)
    assert longest <= found.seq_len and found.seq_len % 8 == 0


def test_a_model_that_is_none_is_named_at_once(monkeypatch):
    monkeypatch.setenv("MODEL", "./nowhere")
    with pytest.raises(ValueError, match="nowhere"):
        profile()


@pytest.mark.parametrize("asked", ["smoke", "quick", "paper", None])
@pytest.mark.parametrize("made", ["smoke", "quick", "paper"])
def test_an_entry_belongs_to_the_profile_that_made_its_run(monkeypatch, asked, made):
    config = PROFILES[made].config("facts")
    monkeypatch.setenv("PROFILE", asked) if asked else monkeypatch.delenv("PROFILE")
    store = ROOT / "data" if made == "paper" else build_folder() / made / "data"
    assert entry_folder(config, "cuts") == store / "cuts" / "facts" / config.key
    assert dataclasses.replace(config, seed=1).profile == made


def test_a_run_asked_for_without_a_profile_belongs_to_the_one_at_work(monkeypatch):
    for name in PROFILES:
        monkeypatch.setenv("PROFILE", name)
        assert RunConfig(task="facts", method="base").profile == name


def test_a_quick_run_is_stored_as_quick_though_paper_is_at_work(store, monkeypatch):
    sizes = dataclasses.replace(PROFILES["quick"], model=TINY, seq_len=320, eval_rows=4)
    monkeypatch.setitem(PROFILES, "quick", sizes)
    monkeypatch.delenv("PROFILE")
    config = PROFILES["quick"].config("facts", steps=1)
    result = run(config)
    (folder,) = (build_folder() / "quick" / "data" / "runs").glob("*/*")
    assert folder.name == config.key
    assert stored(config).record == result.record
    assert stored(dataclasses.replace(config, profile="paper")) is None


def test_the_base_beside_a_run_is_of_its_profile_and_model():
    quick = PROFILES["quick"]
    assert base_of(quick.config("facts", lr=1e-2, seed=3)) == quick.config("facts", "base")
    other = quick.config("facts", model=TINY)
    assert base_of(other) == quick.config("facts", "base", model=TINY)
