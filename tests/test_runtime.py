"""The machine and its settings: folders, progress, the commit, work over the cores."""

import math
import subprocess
import sys
import threading
from pathlib import Path

import platformdirs
import psutil
import pytest
import torch

from deltarank import runtime
from deltarank.runtime import (
    build_folder,
    by_core,
    cache_folder,
    commit,
    product_dtype,
    progress,
)

# Folders


def test_a_setting_says_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("LOWRANK_CACHE", str(tmp_path / "mine"))
    for root in (runtime.ROOT, tmp_path):  # in a checkout and outside one
        monkeypatch.setattr(runtime, "ROOT", root)
        assert cache_folder() == tmp_path / "mine"
    monkeypatch.setenv("LOWRANK_CACHE", "~/mine")  # as a container's settings have it
    assert cache_folder() == Path.home() / "mine"


def test_a_checkout_keeps_its_cache(monkeypatch):
    monkeypatch.delenv("LOWRANK_CACHE")
    assert cache_folder() == runtime.ROOT / ".cache"


def test_outside_a_checkout_the_cache_is_the_users(monkeypatch, tmp_path):
    monkeypatch.delenv("LOWRANK_CACHE")
    monkeypatch.setattr(runtime, "ROOT", tmp_path)  # as where packages are installed
    assert cache_folder() == platformdirs.user_cache_path("deltarank")
    assert not cache_folder().is_relative_to(tmp_path)


def test_an_empty_setting_is_none(monkeypatch):
    for name in ("LOWRANK_CACHE", "BUILD"):
        monkeypatch.setenv(name, "")
    assert cache_folder() == runtime.ROOT / ".cache"
    assert build_folder() == runtime.ROOT / "build"


# Progress


def test_progress_is_silent_when_it_is_off(capfd):
    with progress(3, "comparing") as bar:
        bar.update(3)
    assert capfd.readouterr() == ("", "")


def test_progress_goes_to_the_terminal_that_make_names(monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("PROGRESS", str(tmp_path / "terminal"))
    monkeypatch.setenv("NOTEBOOK", "02_run")
    with progress(3, "comparing") as bar:
        bar.update(3)
    assert "02_run comparing: 100%" in (tmp_path / "terminal").read_text()
    assert bar.fp.closed
    assert capfd.readouterr() == ("", "")


def test_progress_goes_to_the_terminal_that_runs_the_code(monkeypatch, capfd):
    monkeypatch.delenv("PROGRESS")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress(3, "comparing") as bar:
        bar.update(3)
    assert "comparing" in capfd.readouterr().err


def test_progress_goes_to_the_notebook_that_runs_the_code(monkeypatch, capfd):
    monkeypatch.delenv("PROGRESS")
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    with progress(3, "comparing") as bar:
        bar.update(3)
    assert "comparing" in capfd.readouterr().err


def test_progress_is_silent_where_nobody_watches(monkeypatch, capfd):
    monkeypatch.delenv("PROGRESS")
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    with progress(3, "comparing") as bar:
        bar.update(3)
    assert capfd.readouterr() == ("", "")


# The type of products


@pytest.mark.parametrize(
    ("capability", "place", "expected"),
    [
        ("AVX2", "cpu", torch.float32),
        ("AVX2", "cuda", torch.bfloat16),
        ("AVX512", "cpu", torch.bfloat16),
    ],
)
def test_float32_stands_in_for_bfloat16_where_that_is_slow(
    monkeypatch, capability, place, expected
):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(runtime, "device", lambda: torch.device(place))
    assert product_dtype("bfloat16") == expected
    assert product_dtype("float32") == torch.float32


# The commit


@pytest.fixture
def checkout(monkeypatch, tmp_path):
    """A repository of one commit that holds one file; the file, and a function that runs git."""
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    folder = tmp_path / "checkout"
    folder.mkdir()
    monkeypatch.setattr(runtime, "ROOT", folder)

    def git(*arguments):
        settings = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(folder), *settings, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    (folder / "code.py").write_text("a = 1\n")
    git("add", "code.py")
    git("commit", "-q", "-m", "one")
    return folder / "code.py", git


def test_the_commit_is_marked_where_files_differ_from_it(checkout):
    file, git = checkout
    clean = git("rev-parse", "--short=12", "HEAD")
    assert len(clean) == 12 and commit() == clean
    file.write_text("a = 2\n")
    assert commit() == f"{clean}-dirty"
    git("add", "code.py")
    assert commit() == f"{clean}-dirty"


def test_a_tag_does_not_hide_the_commit(checkout):
    git = checkout[1]
    git("tag", "-a", "v1", "-m", "one")
    assert commit() == git("rev-parse", "--short=12", "HEAD")


def test_outside_a_checkout_the_commit_is_unknown(monkeypatch, tmp_path):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setattr(runtime, "ROOT", tmp_path)
    assert commit() == "unknown"


# Work over the cores


@pytest.fixture
def two_cores(monkeypatch):
    """As on a machine of two cores without an accelerator."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(runtime, "device", lambda: torch.device("cpu"))


def test_a_long_matrix_does_not_keep_the_cores_from_the_short_ones(two_cores):
    later, taken = threading.Event(), []

    def work(item):
        if item == 6:
            later.set()
        return item, item > 0 or later.wait(20)

    def items():
        for item in range(40):
            taken.append(item)
            yield item

    found = by_core(work, items())
    assert next(found) == (0, True)
    assert len(taken) < 15  # what waits to be taken stays in memory
    assert list(found) == [(item, True) for item in range(1, 40)]


def test_an_error_of_one_item_is_raised_and_the_rest_is_not_begun(two_cores):
    begun = []

    def work(item):
        begun.append(item)
        if item == 2:
            raise ValueError("item 2")
        return item

    found = by_core(work, range(1000))
    with pytest.raises(ValueError, match="item 2"):
        list(found)
    assert len(begun) < 30


def test_the_number_of_threads_is_afterwards_what_it_was():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert list(by_core(lambda _: torch.get_num_threads(), range(3))) == [1, 1, 1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


# Memory


def test_the_memory_is_that_of_the_machine(monkeypatch):
    monkeypatch.setattr(runtime, "device", lambda: torch.device("cpu"))
    monkeypatch.setattr(runtime.Path, "read_text", lambda file: "max\n")
    assert runtime.memory() == psutil.virtual_memory().total


def test_a_container_has_no_more_than_it_may_take(monkeypatch):
    monkeypatch.setattr(runtime, "device", lambda: torch.device("cpu"))
    monkeypatch.setattr(runtime.Path, "read_text", lambda file: "1000\n")
    assert runtime.memory() == 1000


def test_a_system_that_does_not_tell_its_memory_has_room(monkeypatch):
    monkeypatch.setattr(runtime, "device", lambda: torch.device("cpu"))
    monkeypatch.delattr(runtime.os, "sysconf")  # as on Windows
    monkeypatch.setattr(runtime.Path, "read_text", lambda file: "max\n")
    assert runtime.memory() == math.inf
