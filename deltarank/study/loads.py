"""Loads: code runs from few bits a trained parameter to many, by what is trained."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import pandas as pd

from deltarank.checks import require
from deltarank.study.capacity import CodeResult, code_sweep
from deltarank.study.code_runs import CodeRun, code_parameters
from deltarank.study.codes import DIGIT_BITS
from deltarank.study.grids import Size
from deltarank.study.profiles import LORA_ALPHA, middle, profile
from deltarank.study.search import climb

RATE_LOAD = 1.0  # bits a parameter: a size tries its rates at the load nearest to this


def sized_codes(size: Size, load: float, *, lr: float, seed: int) -> CodeRun:
    """The run that trains `size` on as many codes as make this load, in bits a parameter.

    Raises as CodeRun and code_matrices do.
    """
    least = _smallest(size, lr, seed)
    return dataclasses.replace(least, codes=round(load * _codes_a_bit(least)))


def _smallest(size: Size, lr: float, seed: int) -> CodeRun:
    """The run of a size by the profile, with the fewest codes."""
    sizes, (layers, modules, rank) = profile(), size
    scale: dict[str, Any] = {"rank": rank, "alpha": LORA_ALPHA} if rank else {"method": "full"}
    budget: dict[str, Any] = {"lr": lr, "steps": sizes.codes.steps, "seed": seed}
    trained = scale | {"model": sizes.model, "layers": layers, "modules": modules}
    return CodeRun(codes=2, digits=sizes.codes.digits, **trained | budget)


def _codes_a_bit(config: CodeRun) -> float:
    """How many codes make a load of one bit a trained parameter."""
    return code_parameters(config) / (config.digits * DIGIT_BITS)


def loads_of(size: Size) -> list[float]:
    """The profile's loads of a size, its own or all, of 2 codes or more and no more than its most.

    Raises ValueError where there are none.
    """
    grid, each = profile().codes, _codes_a_bit(_smallest(size, 1.0, 0))
    given = dict(grid.own_loads).get(size, grid.loads)
    found = [load for load in given if 2 <= round(load * each) <= grid.most]
    cure = f"none of {given} makes 2 to {grid.most} codes"
    require(bool(found), f"the loads of {size}: {cure}")
    return found


def best_code_lr(size: Size) -> float:
    """The rate of the profile at which a size learns most, by a climb over them from the middle.

    At one load, with the first seed, each rate with all the steps, as what is measured has.
    """
    sizes, load = profile(), min(loads_of(size), key=lambda load: abs(load - RATE_LOAD))
    usual = sizes.codes.lrs if size[-1] else sizes.codes.full_lrs
    rates = sorted(dict(sizes.codes.own_lrs).get(size, usual))

    def tried(lrs: list[float]) -> list[CodeResult]:
        return code_sweep([sized_codes(size, load, lr=lr, seed=sizes.seeds[0]) for lr in lrs])

    return _most_learned(climb(tried, rates, middle(rates), best_of=_most_learned))


def _most_learned(results: Sequence[CodeResult]) -> float:
    """The rate of the run that learned most bits; raises ValueError where all diverged."""
    finished = [result for result in results if result.status == "finished"]
    rates = [result.config.lr for result in results]
    require(
        bool(finished), f"{results[0].config.key}: diverged at every rate of {rates}; lower them"
    )
    return max(finished, key=lambda result: result.last("learned_bits")).config.lr


def code_configs() -> list[CodeRun]:
    """The profile's code runs, each size at its best rate; runs what of their search is not stored.

    Every size at each of its loads with the first seed; the grid's seed_size at its seed_loads with
    the others too.
    """
    grid, (first, *others) = profile().codes, profile().seeds
    points = [(size, load, first) for size in grid.sizes for load in loads_of(size)]
    if grid.sizes:
        points += list(itertools.product([grid.seed_size], grid.seed_loads, others))
    rates = {size: best_code_lr(size) for size in dict.fromkeys(size for size, _, _ in points)}
    return [sized_codes(size, load, lr=rates[size], seed=seed) for size, load, seed in points]


def longer_configs() -> list[CodeRun]:
    """The runs of the grid's seed_size at its longer_loads, with `longer` times the steps.

    Beside those of code_configs they tell whether bits were short of room, or of steps.
    """
    grid, (seed, *_) = profile().codes, profile().seeds
    if not grid.sizes:
        return []
    size, lr = grid.seed_size, best_code_lr(grid.seed_size)
    usual = [sized_codes(size, load, lr=lr, seed=seed) for load in grid.longer_loads]
    return [dataclasses.replace(config, steps=grid.longer * grid.steps) for config in usual]


def capacity_table(configs: Sequence[CodeRun]) -> pd.DataFrame:
    """One line a code run, and runs what is not stored.

    Columns: trained ("rank 1 on 1 layer"), parameters, codes, seed, lr, status; load: bits
    that the codes hold, a trained parameter; learned: bits learned, a trained parameter, and share
    of the codes' bits; recall: share of codes with every digit right; steps, and passes over all
    codes; plateau: whether they ended at one; passes_90: until 90 % of what is learned at all.  NaN
    where a run diverged.
    """
    return pd.DataFrame(_line(result) for result in code_sweep(configs))


def curves_table(configs: Sequence[CodeRun]) -> pd.DataFrame:
    """What was learned on the way, one line a note of every run; runs what is not stored.

    Columns: run, its key; trained, load and seed, as in capacity_table; passes over all codes;
    learned, in bits a trained parameter.
    """
    return pd.concat(
        pd.DataFrame(
            {
                "run": result.config.key,
                "trained": trained_text(result.config),
                "load": result.config.bits / result.parameters,
                "seed": result.config.seed,
                "passes": result.passes,
                "learned": result.curve("learned_bits") / result.parameters,
            }
        )
        for result in code_sweep(configs)
    )


def _line(result: CodeResult) -> dict[str, Any]:
    """The line of one run in capacity_table."""
    config, bits = result.config, result.last("learned_bits")
    return {
        "trained": trained_text(config),
        "parameters": result.parameters,
        "codes": config.codes,
        "seed": config.seed,
        "lr": config.lr,
        "status": result.status,
        "load": config.bits / result.parameters,
        "learned": bits / result.parameters,
        "share": bits / config.bits,
        "recall": result.last("recall"),
        "steps": int(result.curve("step")[-1]),
        "passes": float(result.passes[-1]),
        "plateau": result.record["plateau"] is not None,
        "passes_90": result.passes_until(0.9),
    }


def trained_text(config: CodeRun) -> str:
    """What a run trains, in words."""
    count = len(config.layers)
    where = f"{count} layer{'s' * (count > 1)}"
    if config.method == "full":
        return f"all of {where}"
    modules = f"{', '.join(config.modules)} of " if config.modules else ""
    return f"rank {config.rank} on {modules}{where}"
