"""What every test shares: the smoke profile in temporary folders, and a guard over the results."""

import functools
import json
import os
import shutil
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny matrices: more threads only spin

import pairs
import pytest
import torch

from deltarank.study import search, tasks
from deltarank.study.profiles import profile
from deltarank.study.runs import Result

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)
COMMITTED = tuple(str(ROOT / folder) + os.sep for folder in ("data", "figures"))
WRITES = {
    "open": lambda path, mode, flags: flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT),
    "os.mkdir": lambda *_: True,
    "os.rename": lambda *_: True,
    "os.remove": lambda *_: True,
    "os.rmdir": lambda *_: True,
    "os.truncate": lambda *_: True,
    "shutil.rmtree": lambda *_: True,
}


def _guard(event: str, arguments: tuple) -> None:
    """Refuse to change what is committed under data/ and figures/."""
    if event in WRITES and WRITES[event](*arguments):
        for path in arguments:
            if isinstance(path, str | os.PathLike) and os.path.abspath(path).startswith(COMMITTED):
                raise AssertionError(f"a test tried to change {path}: {event}")


sys.addaudithook(_guard)


def pytest_collection_modifyitems(items):
    """Everything under tests/slow is slow."""
    for item in items:
        if item.path.is_relative_to(ROOT / "tests" / "slow"):
            item.add_marker("slow")


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory):
    """The session's LOWRANK_CACHE and BUILD, with PROFILE=smoke and no progress bars."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PROFILE", "smoke")
        patch.setenv("PROGRESS", "off")
        patch.setenv("MODEL", "")  # the reader's own, if he has set one
        patch.setenv("VENUE", "")
        patch.setenv("BUILD", str(tmp_path_factory.mktemp("build")))
        patch.setenv("LOWRANK_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield Path(os.environ["LOWRANK_CACHE"])


@pytest.fixture
def store(monkeypatch, tmp_path):
    """An empty results store."""
    monkeypatch.setenv("BUILD", str(tmp_path / "build"))
    return profile().store


@pytest.fixture
def config(store):
    """A small full run of the smoke profile, in an empty store."""
    return profile().config("sentiment", steps=2, eval_rows=4)


@pytest.fixture
def save(tmp_path):
    """A function that saves base and tuned of an architecture and returns their folders."""
    return functools.partial(pairs.save, tmp_path)


@pytest.fixture
def qwen(tmp_path):
    """A folder with a random Qwen 3 of two layers over bytes, whose head is not its embedding."""
    from transformers import ByT5Tokenizer, Qwen3Config, Qwen3ForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 384}
    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(**sizes)).save_pretrained(tmp_path / "tiny-qwen3")
    ByT5Tokenizer().save_pretrained(tmp_path / "tiny-qwen3")
    return tmp_path / "tiny-qwen3"


@pytest.fixture(scope="session")
def browser():
    """Debian's Chromium, one for all tests of pages."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    assert chromium, "no chromium on this machine: apt-get install chromium"
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


ANSWERS = ("red", "blue", "red", "green", "blue", "red", "green", "blue")


@pytest.fixture
def write_task(monkeypatch, tmp_path):
    """A function that puts rows where the task `sentiment` is read; returns the file."""
    monkeypatch.setattr(tasks, "TASK_FOLDER", tmp_path / "tasks")

    def write(rows):
        path = tmp_path / "tasks" / "sentiment.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf8")
        return path

    return write


@pytest.fixture
def small_task(write_task):
    """Eight rows of 9 to 12 bytes in every split; the first four train."""
    rows = [{"prompt": f"p{i}:", "answer": f" {a}"} for i, a in enumerate(ANSWERS)]
    splits = {"train": rows[:4], "valid": rows[:2], "test": rows}
    write_task([{"split": name} | row for name, part in splits.items() for row in part])
    return rows


@pytest.fixture
def losses(monkeypatch):
    """A table {(rank, lr): held-out loss} that stands in for the runs of every grid.

    {(rank, lr, seed): loss} is that of one seed, {(rank, lr, alpha): loss} of one alpha; None: it
    diverges.
    """
    table = {}

    def result(config):
        at = (config.rank, config.lr)
        keys = [key for key in ((*at, config.seed), (*at, config.alpha), at) if key in table]
        loss = table[keys[0]] if keys else None
        finished = {"status": "finished", "evaluation": {"valid": {"loss_nats": loss}}}
        record = {"status": "diverged", "evaluation": {}} if loss is None else finished
        return Result(config, record)

    monkeypatch.setattr(search, "sweep", lambda configs: [result(c) for c in configs])
    return table
