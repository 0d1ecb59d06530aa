"""Time and memory of a training step of each method and optimizer, each in a fresh process."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pandas as pd
from timing import record
from training_steps import our_step

from deltarank.study.configs import OWN_OPTIMIZERS
from deltarank.study.contest import METHOD_TIMES
from deltarank.study.profiles import PROFILES
from deltarank.study.signatures import ADAMW, STEP_TIMES
from deltarank.study.sizes import trained_parameters
from deltarank.study.trials import METHODS

STEPS = 10  # the first four warm up and compile
TASK = "facts"


def bench_variants() -> None:
    """Print seconds a step, peak GB and trained parameters by method and size."""
    rows = []
    for name, method in METHODS.items():
        for size, fields in method.fields.items():
            config = PROFILES["paper"].config(TASK, **fields, lr=method.lr, steps=STEPS)
            seconds, memory = in_fresh_process(our_step, config)
            row = {"method": name, "size": size, "parameters": trained_parameters(config)}
            rows.append(row | {"seconds": round(seconds, 3), "GB": round(memory, 2)})
            print("  {method}, size {size}: {seconds:.2f} s, {GB:.1f} GB".format(**rows[-1]))
    record(pd.DataFrame(rows), METHOD_TIMES)


def bench_optimizers() -> None:
    """Print seconds a step and peak GB of full fine-tuning by each optimizer."""
    rows = []
    for name in (ADAMW, *OWN_OPTIMIZERS):
        config = PROFILES["paper"].config(TASK, optimizer=name, lr=1e-5, steps=STEPS)
        seconds, memory = in_fresh_process(our_step, config)
        rows.append({"optimizer": name, "seconds": round(seconds, 3), "GB": round(memory, 2)})
        print("  {optimizer}: {seconds:.2f} s, {GB:.1f} GB".format(**rows[-1]))
    record(pd.DataFrame(rows), STEP_TIMES)


def in_fresh_process(function, *arguments):
    """What a function returns that runs in a process of its own: nothing is left of the others."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()
