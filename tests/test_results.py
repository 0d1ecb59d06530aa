"""The committed results: whole, of the present code and data, and each curve of one machine."""

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
