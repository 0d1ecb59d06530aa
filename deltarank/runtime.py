"""The machine and its settings: the only reader of environment variables and of the device."""

from __future__ import annotations

import collections
import contextlib
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from pathlib import Path

import platformdirs
import torch
from tqdm import tqdm

from deltarank.checks import require

ROOT = Path(__file__).resolve().parent.parent  # the checkout, where the package runs from one


def _setting(name: str, default: str = "") -> str:
    """What the environment variable `name` says; the default when it is unset or empty."""
    return os.environ.get(name) or default


_AT_WORK: ContextVar[str] = ContextVar("at_work", default="")


def profile_name() -> str:
    """The name of the report's size that is at work: that of at_profile, PROFILE, or paper."""
    return _AT_WORK.get() or _setting("PROFILE", "paper")


@contextlib.contextmanager
def at_profile(name: str) -> Iterator[None]:
    """The profile that is at work within, in this thread, whatever PROFILE says."""
    require(bool(name), "at_profile needs the name of a profile")
    token = _AT_WORK.set(name)
    try:
        yield
    finally:
        _AT_WORK.reset(token)


def own_model() -> str:
    """The model that takes the place of the report's: MODEL, a name, folder or hub id; or none."""
    return _setting("MODEL")


def venue() -> str:
    """The venue whose figures are made: VENUE, or none."""
    return _setting("VENUE")


def cache_folder() -> Path:
    """The folder for what can be recomputed (converted model, deltas, measured pairs).

    LOWRANK_CACHE; without it .cache in a checkout and the user's cache folder elsewhere.
    """
    checkout = (ROOT / "pyproject.toml").exists()
    default = ROOT / ".cache" if checkout else platformdirs.user_cache_path("deltarank")
    return Path(_setting("LOWRANK_CACHE", str(default))).expanduser()


def build_folder() -> Path:
    """The git-ignored folder for everything that is built: BUILD or build."""
    return Path(_setting("BUILD", str(ROOT / "build"))).expanduser()


@contextlib.contextmanager
def progress(total: int, description: str) -> Iterator[tqdm]:
    """A progress bar over `total` steps with the time left, closed at the end.

    PROGRESS says where it goes: to a terminal's path (as make sets it), to nowhere ("off"),
    or, when it is not set, to the notebook or terminal that runs the code; elsewhere (a pipe, a
    log) there is none.
    """
    from tqdm.auto import tqdm as interactive_bar

    target = _setting("PROGRESS")
    watched = target or sys.stderr.isatty() or "ipykernel" in sys.modules
    with contextlib.ExitStack() as opened:
        if target == "off" or not watched:
            bar = tqdm(total=total, disable=True)
        elif not target:
            bar = interactive_bar(total=total, desc=description, leave=False)
        else:
            label = " ".join(filter(None, [_setting("NOTEBOOK"), description]))
            terminal = opened.enter_context(open(target, "w"))
            bar = tqdm(total=total, desc=label, file=terminal, ncols=110)
        yield opened.enter_context(bar)


def interactive() -> bool:
    """Whether somebody may be there to move a slider: make and the tests set PROGRESS."""
    return not _setting("PROGRESS")


def device() -> torch.device:
    """The accelerator if there is one, otherwise the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def memory() -> float:
    """Bytes of memory on `device`, of a container what it may take; infinite where none is told."""
    if device().type == "cuda":
        return torch.cuda.get_device_properties(0).total_memory
    try:
        there: float = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        there = math.inf
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):  # of cgroups, v2 and v1
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            there = min(there, int(Path("/sys/fs/cgroup", limit).read_text()))
    return there


def visible_gpus() -> int:
    """How many accelerators there are; the report's code uses one."""
    return torch.cuda.device_count()


def device_name() -> str:
    """What the accelerator or the processor calls itself."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    with contextlib.suppress(OSError):
        name = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        if name:
            return name.group(1)
    return platform.machine()


def processor() -> str:
    """What decides how the processor rounds: maker, family, model, stepping, vector width.

    Its name does not: two kinds call themselves "AMD EPYC".
    """
    fields = ("vendor_id", "cpu family", "model", "stepping")
    found = []
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text()
        found = re.findall(rf"^(?:{'|'.join(fields)})\s*: (.*)", text, re.MULTILINE)[: len(fields)]
    return " ".join([*found, torch.backends.cpu.get_cpu_capability()])


def product_dtype(name: str) -> torch.dtype:
    """The type of the products in a forward and backward pass: the named one, or float32.

    On an x86 CPU without AVX-512 PyTorch forms products in bfloat16 by plain loops, many times
    slower than in float32, which stands in for it there.
    """
    slow = torch.backends.cpu.get_cpu_capability() == "AVX2" and device().type == "cpu"
    return torch.float32 if slow else getattr(torch, name)


def commit() -> str:
    """The commit of the checkout, with "-dirty" where files differ; "unknown" outside one."""
    describe = ["describe", "--always", "--abbrev=12", "--exclude=*", "--dirty"]
    command = ["git", "-C", str(ROOT), *describe]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def by_core(function: Callable, items: Iterable) -> Iterator:
    """function(item) of every item, in order; on a CPU a few at a time, each on a core of its own.

    Two cores do two eigenvalue problems sooner than both do one after the other.  A few more wait
    than there are cores, or a long one would keep the others from going on with short ones; not
    all, so that what waits to be taken does not fill the memory.
    """
    from threadpoolctl import threadpool_limits

    threads = torch.get_num_threads()
    waiting: collections.deque[Future] = collections.deque()
    workers = min(threads, 4) if device().type == "cpu" else 1
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    with pool, threadpool_limits(1, user_api="blas"):
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > 4 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)
