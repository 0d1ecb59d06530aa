"""A training step of the report's recipe, as the benchmark sees it."""

import contextlib
import statistics
import threading
import time

import psutil

from deltarank.study import training
from deltarank.study.configs import RunConfig


@contextlib.contextmanager
def peak_memory():
    """Yield a list that holds, at the end, the peak resident memory of the block in GB."""
    peak, done = [0.0], threading.Event()

    def watch():
        while not done.wait(0.02):
            peak[0] = max(peak[0], psutil.Process().memory_info().rss / 1e9)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


class Stamps(list):
    """A progress bar that only notes the time of every step."""

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return False

    def update(self):
        self.append(time.perf_counter())

    def seconds_per_step(self):
        return statistics.median(b - a for a, b in zip(self[3:], self[4:], strict=False))


def our_step(config: RunConfig) -> tuple[float, float]:
    """Seconds and peak GB of a step of the report's recipe."""
    stamps = Stamps()
    training.progress, bar = lambda total, label: stamps, training.progress
    with peak_memory() as peak:
        training.train(config, training.prepare(config))
    training.progress = bar
    return stamps.seconds_per_step(), peak[0]
