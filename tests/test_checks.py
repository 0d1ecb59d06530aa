"""Refusals: one line, before any work."""

import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from deltarank.checks import all_finite, first_line, require, require_disk, require_writable


def test_a_condition_that_does_not_hold_is_an_error_with_its_message():
    require(True, "never said")
    with pytest.raises(ValueError, match="^r=9: at most 8$"):
        require(False, "r=9: at most 8")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_one_entry_that_is_not_finite_is_found(value, dtype):
    X = torch.arange(30.0, dtype=dtype).reshape(5, 6)
    assert all_finite(X)
    X[3, 2] = value
    assert not all_finite(X)


def test_nothing_is_finite():
    assert all_finite(torch.zeros(0, 4))


def test_the_first_line_of_an_error_is_what_it_says():
    assert first_line(OSError("\n no such model\nSee https://example.org for help")) == (
        "no such model"
    )
    assert first_line(ConnectionError()) == "ConnectionError"


def test_a_full_disk_is_named_with_what_it_lacks(monkeypatch, tmp_path):
    full = SimpleNamespace(total=10**12, used=10**12, free=10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(OSError, match=r"store has 0\.001 GB free and needs 0\.5 GB.*LOWRANK_CACHE"):
        require_disk(tmp_path / "store", 0.5)
    with pytest.raises(OSError, match=r"needs 0\.002 GB: name another folder$"):
        require_disk(tmp_path / "store", 0.002, cure="name another folder")
    require_disk(tmp_path / "store", 0.0005)


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no folder that is never writable")
def test_a_folder_that_cannot_be_written_is_named_with_a_cure():
    with pytest.raises(OSError, match=r"^/proc/cache cannot be written \(.*\): .*LOWRANK_CACHE"):
        require_disk(Path("/proc/cache"), 0.1)
    with pytest.raises(OSError, match=r"^/proc/out cannot be written \(.*\): name another$"):
        require_writable(Path("/proc"), "/proc/out", cure="name another")
