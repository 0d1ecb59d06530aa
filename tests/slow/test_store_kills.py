"""A process that is killed while it writes an entry leaves the old one or none."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch

from deltarank.store import load_entry, save_entry

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4)}


@pytest.mark.parametrize(  # an intact entry stays: nothing is renamed over it
    ("at", "before"),
    [("os.fsync", b) for b in ("nothing", "torn", "intact")]
    + [("os.rename", b) for b in ("nothing", "torn")],
)
@pytest.mark.filterwarnings("ignore:entry is torn")
def test_a_kill_while_writing_leaves_the_old_entry_or_none(tmp_path, at, before):
    folder = tmp_path / "store" / "entry"
    if before != "nothing":
        save_entry(folder, {"loss": 1.5}, TENSORS)
    if before == "torn":
        os.truncate(folder / "tensors.safetensors", 100)
    code = f"""
        import os, pathlib, torch
        from deltarank.store import save_entry
        {at} = lambda *a, **k: os.kill(os.getpid(), 9)
        save_entry(pathlib.Path({str(folder)!r}), {{"loss": 9}}, {{"a": torch.ones(3)}})
    """
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    if before == "intact":
        assert load_entry(folder)[0]["loss"] == 1.5
    elif folder.exists():
        assert load_entry(folder) is None
    save_entry(folder, {"loss": 3.5}, TENSORS)  # the next run is not in its way
    assert load_entry(folder)[0]["loss"] == (1.5 if before == "intact" else 3.5)
