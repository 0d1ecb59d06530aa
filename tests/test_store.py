"""One entry of the store: whole or none, through edits, full disks and two writers."""

import multiprocessing
import os
import resource

import pytest
import torch

from deltarank import store
from deltarank.store import cached, load_entry, save_entry

RECORD = {"loss": 1.5, "text": "Słowo", "list": [1, None]}
TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4)}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.fixture
def entry(tmp_path):
    save_entry(tmp_path / "store" / "entry", RECORD, TENSORS)
    return tmp_path / "store" / "entry"


def test_an_entry_loads_as_it_was_saved(entry):
    record, tensors = load_entry(entry)
    assert {key: record[key] for key in RECORD} == RECORD
    assert same(tensors, TENSORS)


def test_an_entry_without_tensors_loads_as_it_was_saved(tmp_path):
    save_entry(tmp_path / "entry", RECORD)
    record, tensors = load_entry(tmp_path / "entry")
    assert record["loss"] == 1.5
    assert tensors == {}


def test_a_missing_entry_is_none_without_a_warning(tmp_path, recwarn):
    assert load_entry(tmp_path / "nothing") is None
    assert not recwarn


def test_saving_leaves_nothing_beside_the_entry(entry):
    assert [path.name for path in entry.parent.iterdir()] == ["entry"]


def test_an_intact_entry_is_not_overwritten(entry):
    save_entry(entry, {"loss": 2.5}, {})
    assert load_entry(entry)[0]["loss"] == 1.5


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "json edited": lambda f: (f / "result.json").write_text(
        (f / "result.json").read_text("utf8").replace("1.5", "1.4"), "utf8"
    ),
    "json byte flipped": lambda f: flip(f / "result.json", 20),
    "json truncated": lambda f: os.truncate(f / "result.json", 40),
    "json empty": lambda f: os.truncate(f / "result.json", 0),
    "json missing": lambda f: (f / "result.json").unlink(),
    "json a list": lambda f: (f / "result.json").write_text("[]"),
    "tensor byte flipped": lambda f: flip(f / "tensors.safetensors", -1),
    "tensors truncated": lambda f: os.truncate(f / "tensors.safetensors", 100),
    "tensors missing": lambda f: (f / "tensors.safetensors").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_named_and_not_loaded(entry, damage):
    DAMAGES[damage](entry)
    with pytest.warns(UserWarning, match="entry"):
        assert load_entry(entry) is None


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.filterwarnings("ignore:entry")
def test_a_damaged_entry_is_replaced(entry, damage):
    DAMAGES[damage](entry)
    save_entry(entry, {"loss": 2.5}, TENSORS)
    record, tensors = load_entry(entry)
    assert record["loss"] == 2.5
    assert same(tensors, TENSORS)


@pytest.mark.parametrize("limit", [64, 4096], ids=["json", "tensors"])
def test_a_disk_that_fills_during_a_write_leaves_what_was_there(entry, limit):
    """A limit on the size of a file stands in for the full disk: the write stops half way."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    tensors = {} if limit == 64 else {"a": torch.ones(10_000)}
    try:
        with pytest.raises(OSError, match=r"second could not be written.*make room"):
            save_entry(entry.parent / "second", {"text": 100 * "long "}, tensors)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert [path.name for path in entry.parent.iterdir()] == ["entry"]
    assert load_entry(entry)[0]["loss"] == 1.5
    save_entry(entry.parent / "second", {"loss": 2.5}, tensors)
    assert load_entry(entry.parent / "second")[0]["loss"] == 2.5


def write_rounds(root, barrier, torn, loss, errors):
    """Write every round's entry at the same moment as the other process."""
    for i in range(25):
        folder = root / str(i)
        if torn and loss == 0:
            folder.mkdir(parents=True)
            (folder / "result.json").write_text("{")
        barrier.wait(30)
        try:
            save_entry(folder, {"loss": loss}, {"a": torch.full((50,), float(loss))})
        except Exception as error:
            errors.put(f"round {i}: {error!r}")


@pytest.mark.parametrize("torn", [False, True])
@pytest.mark.filterwarnings("ignore:\\d+ is torn")
def test_two_writers_leave_one_intact_entry_and_no_litter(tmp_path, torn):
    fork = multiprocessing.get_context("fork")
    barrier, errors = fork.Barrier(2), fork.SimpleQueue()
    root = tmp_path / "store"
    writers = [
        fork.Process(target=write_rounds, args=(root, barrier, torn, loss, errors))
        for loss in range(2)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert errors.empty(), errors.get()
    assert sorted(path.name for path in root.iterdir()) == sorted(str(i) for i in range(25))
    for folder in root.iterdir():
        record, tensors = load_entry(folder)
        assert tensors["a"].tolist() == [record["loss"]] * 50


@pytest.mark.parametrize(("numbers", "kept"), [(1_000, 1), (250_000, 0)])
def test_only_small_entries_stay_in_memory(tmp_path, numbers, kept):
    save_entry(tmp_path / "entry", RECORD, {"a": torch.ones(numbers)})
    store._remembered.cache_clear()
    for _ in range(2):
        assert len(load_entry(tmp_path / "entry")[1]["a"]) == numbers
    assert store._remembered.cache_info().currsize == kept


# Load, compute, save, reload


def test_what_is_cached_is_computed_once_and_read_back(tmp_path):
    calls = []

    def compute():
        calls.append(1)
        return {"pair": (1, 2)}, {"a": torch.ones(2)}

    first = cached(tmp_path / "below" / "entry", compute)
    again = cached(tmp_path / "below" / "entry", compute)
    assert calls == [1]
    for record, tensors in (first, again):
        assert record["pair"] == [1, 2]  # as JSON has it: the first call and the next are equal
        assert same(tensors, {"a": torch.ones(2)})
    assert first[0] == again[0]


def test_a_damaged_entry_is_computed_again(entry):
    DAMAGES["tensor byte flipped"](entry)
    with pytest.warns(UserWarning, match="entry is torn or was edited: it is computed again"):
        record, _ = cached(entry, lambda: ({"loss": 3.5}, TENSORS))
    assert record["loss"] == 3.5


def test_nothing_is_stored_of_a_computation_that_fails(tmp_path):
    def fail():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path / "store" / "entry", fail)
    assert list((tmp_path / "store").iterdir()) == []
