"""Time and memory of a training step of each method and optimizer, each in a fresh process."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pandas as pd
from timing import record
from training_steps import our_step

from deltarank.study.configs import OWN_OPTIMIZERS, RunConfig
from deltarank.study.contest import METHOD_TIMES
from deltarank.study.profiles import PROFILES
from deltarank.study.signatures import ADAMW, STEP_TIMES
from deltarank.study.sizes import trained_parameters
from deltarank.study.trials import METHODS

STEPS = 12  # the first four warm up and compile
ROUNDS = 3  # interleaved: of one round alone a step has been off by a factor of two
TASK = "facts"


def bench_variants() -> None:
    """Print seconds a step and peak GB by method and round, at the sizes of the contests."""
    sizes = sorted({size for _, size in PROFILES["paper"].contests})
    configs = {
        (name, size): PROFILES["paper"].config(TASK, **fields, lr=method.lr, steps=STEPS)
        for name, method in METHODS.items()
        for size, fields in method.fields.items()
        if size in sizes
    }
    rows = [
        {"round": i, "method": name, "size": size, "parameters": trained_parameters(config)}
        | step_costs(f"{name}, size {size}", config)
        for i in range(ROUNDS)
        for (name, size), config in configs.items()
    ]
    record(pd.DataFrame(rows), METHOD_TIMES)


def bench_optimizers() -> None:
    """Print seconds a step and peak GB of full fine-tuning by each optimizer and round."""
    rows = [
        {"round": i, "optimizer": name}
        | step_costs(name, PROFILES["paper"].config(TASK, optimizer=name, lr=1e-5, steps=STEPS))
        for i in range(ROUNDS)
        for name in (ADAMW, *OWN_OPTIMIZERS)
    ]
    record(pd.DataFrame(rows), STEP_TIMES)


def step_costs(name: str, config: RunConfig) -> dict[str, float]:
    """Seconds and peak GB of a training step in a process of its own, printed."""
    seconds, memory = in_fresh_process(our_step, config)
    print(f"  {name}: {seconds:.2f} s, {memory:.1f} GB")
    return {"seconds": round(seconds, 3), "GB": round(memory, 2)}


def in_fresh_process(function, *arguments):
    """What a function returns that runs in a process of its own: nothing is left of the others."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()
