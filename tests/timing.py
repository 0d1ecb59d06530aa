"""Programs as a benchmark sees them: installed apart, timed, recorded with their machine."""

import contextlib
import functools
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import psutil
import torch

from deltarank.runtime import ROOT, cache_folder, commit, device_name

# Written by `RECORD=yes make bench`: time and memory of a plan and of a report.
PLAN_TIMES = ROOT / "data" / "bench_plan.csv"
REPORT_TIMES = ROOT / "data" / "bench_report.csv"
RESERVE = 1e9  # bytes of memory that a program must leave to the machine
NO_MEMORY = re.compile(r"MemoryError|can't allocate memory|Cannot allocate memory")


def other(requirement: str, command: str) -> str:
    """The path of another project's command, installed beside the cache on first use.

    requirement: as pip takes it; the environment is its own, and never the report's.
    """
    home = cache_folder() / "others" / requirement
    path = home / "bin" / command
    if not path.exists():
        subprocess.run([sys.executable, "-m", "venv", home], check=True)
        subprocess.run([home / "bin" / "pip", "install", "-q", requirement], check=True)
    return str(path)


def timed(command: list[str], scratch: Path, *, limit: float = math.inf) -> dict:
    """Seconds and peak resident GB of a command and its children, and how it `ended`.

    limit: seconds after which it is stopped.  It ends "done", at the "time limit" or "out of
    memory" (stopped when the machine has less than RESERVE left); any other end stops the bench.
    """
    os.sync()  # or it waits for what another wrote
    environment = os.environ | {"LOWRANK_CACHE": str(scratch)}  # or a second round finds the first
    peak, ended = 0, None
    with tempfile.TemporaryFile("w+") as log:
        start = time.perf_counter()
        process = psutil.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        while process.poll() is None:
            peak = max(peak, resident(process))
            ended = ended or must_stop(time.perf_counter() - start, limit)
            if ended:
                stop(process)
            time.sleep(0.05)
        seconds = time.perf_counter() - start
        log.seek(0)
        ended = ended or how_it_ended(process.returncode, log.read())
    if not ended:
        sys.exit(f"{' '.join(command[:3])} ... failed with {process.returncode}")
    return {"seconds": round(seconds, 2), "GB": round(peak / 1e9, 2), "ended": ended}


def resident(process: psutil.Process) -> int:
    """Resident bytes of a process and its children; 0 when it has just ended."""
    with contextlib.suppress(psutil.Error):
        return sum(p.memory_info().rss for p in (process, *process.children(recursive=True)))
    return 0


def must_stop(seconds: float, limit: float) -> str | None:
    """Why a program that has run for so long must be stopped, if it must."""
    if seconds > limit:
        return "time limit"
    return "out of memory" if psutil.virtual_memory().available < RESERVE else None


def stop(process: psutil.Process) -> None:
    """End a process and its children at once."""
    for one in (*process.children(recursive=True), process):
        with contextlib.suppress(psutil.Error):
            one.kill()


def how_it_ended(status: int, said: str) -> str | None:
    """ "done" or "out of memory", by the exit status and what was printed; None: it failed."""
    if status == 0:
        return "done"
    killed = status == -signal.SIGKILL  # as the system does to what takes too much memory
    return "out of memory" if killed or NO_MEMORY.search(said) else None


def record(table: pd.DataFrame, path: Path) -> None:
    """Store what was measured, with the machine it was measured on, where RECORD asks for it."""
    if os.environ.get("RECORD"):
        table.assign(**machine()).to_csv(path, index=False)


@functools.cache
def machine() -> dict:
    """The machine and the commit, as at the first call: storing changes the checkout."""
    found = {"device": device_name(), "threads": torch.get_num_threads()}
    return found | {"torch": torch.__version__, "commit": commit()}
