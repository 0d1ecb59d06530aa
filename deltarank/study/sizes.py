"""Sizes: a ladder of adapters by trained parameters, from a few numbers to LoRA of high rank."""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Sequence

import pandas as pd

from deltarank.checkpoints import layer_and_module
from deltarank.checks import require
from deltarank.lora import pattern_value
from deltarank.study.configs import VARIANTS, RunConfig
from deltarank.study.floors import has_floor, skill_gain
from deltarank.study.gains import gain, needed_bracket
from deltarank.study.models import matrices, skeleton
from deltarank.study.profiles import profile
from deltarank.study.runs import Result, run, sweep
from deltarank.study.search import at_best_rate, scale_of, tuned
from deltarank.study.training import adapted_matrices
from deltarank.study.variants import PARAMETERS, lora_parameters

SHARES = (0.9, 0.95, 0.99)  # of the skill gain, whose needed sizes are looked for
PLACES = ("spread", "first", "middle", "last")  # where the layers of a sparse LoRA lie


def trained_parameters(config: RunConfig) -> int:
    """How many numbers a run trains, told by the shapes of its model; 0 of a base run.

    Raises as adapted_matrices does.
    """
    model = skeleton(config.model)
    if config.method == "full":
        frozen = 0 if config.train_embedding else model.get_input_embeddings().weight.numel()
        return sum(parameter.numel() for parameter in model.parameters()) - frozen
    adapted = adapted_matrices(config, model)
    if config.method == "tinylora":
        return config.vector
    if config.method in VARIANTS:
        count = PARAMETERS[config.method]
        return sum(count(len(W), W.shape[1], config.rank) for W in adapted.values())
    own = dict(config.rank_pattern)
    ranks = {n: pattern_value(own, n.removesuffix(".weight"), config.rank) for n in adapted}
    return sum(lora_parameters(len(W), W.shape[1], ranks[name]) for name, W in adapted.items())


def place_layers(where: str, count: int, depth: int) -> tuple[int, ...]:
    """The `count` layers of a model of `depth` layers at one of PLACES.

    "spread" is the middles of as many equal parts.  Raises ValueError for another place, and for
    a count that the model does not have.

    >>> place_layers("spread", 3, 18), place_layers("middle", 3, 18), place_layers("last", 1, 18)
    ((3, 9, 15), (8, 9, 10), (17,))
    """
    require(where in PLACES, f"where={where!r} is unknown; choose one of {', '.join(PLACES)}")
    require(
        1 <= count <= depth, f"count={count}: must be 1 to {depth}, as many as there are layers"
    )
    if where == "spread":
        return tuple((2 * i + 1) * depth // (2 * count) for i in range(count))
    start = {"first": 0, "middle": (depth - count + 1) // 2, "last": depth - count}[where]
    return tuple(range(start, start + count))


def sparse(where: str, count: int) -> dict:
    """The fields of RunConfig of a LoRA of rank 1 on `count` layers of the profile's model."""
    depth = 1 + max(layer_and_module(name)[0] for name in matrices(skeleton(profile().model)))
    return {"method": "lora", "rank": 1, "layers": place_layers(where, count, depth)}


def ladder() -> dict[str, dict]:
    """Adapters by ascending number of trained parameters, {name: fields of RunConfig}.

    TinyLoRA, LoRA of rank 1 on some layers or on one module, and LoRA of the profile's ranks.
    """
    sizes, grid, one = profile(), profile().ladder, {"method": "lora", "rank": 1}
    tiny = {"method": "tinylora", "rank": grid.tiny_rank}
    found: dict[str, dict] = {f"TinyLoRA of {n:,}": tiny | {"vector": n} for n in grid.tiny_vectors}
    for count in grid.layers:
        found[f"rank 1 on {count} layer{'s' * (count > 1)}"] = sparse("spread", count)
    found |= {f"rank 1 on {m}": one | {"modules": (m,)} for m in grid.modules}
    found |= {f"rank {r}": one | {"rank": r} for r in sizes.lora_ranks}
    return dict(sorted(found.items(), key=lambda item: parameters_of(item[1])))


def parameters_of(size: dict) -> int:
    """The trained parameters of a size of the ladder, which no task changes."""
    return trained_parameters(profile().config(profile().tasks[0], **size))


def sized(task: str, size: dict, **changes) -> RunConfig:
    """The configuration of an adapter of this size at its best rate; runs what is not stored.

    size: the fields of RunConfig that ladder gives; changes: other fields, such as seed and steps.
    The rate is that of coarse_search, so that no size has more trials than another.
    """
    recipe = size | scale_of(task, size["method"])
    return dataclasses.replace(at_best_rate(task, **recipe), **changes)


def place_configs() -> dict[tuple[str, str], RunConfig]:
    """A LoRA of rank 1 on as many layers at each of PLACES, {(task, place): configuration}."""
    return {
        (task, where): sized(task, sparse(where, count))
        for task, count in profile().ladder.place_runs
        for where in PLACES
    }


def place_table() -> pd.DataFrame:
    """What the adapters of place_configs have learned, a line a task and place, first seed.

    Columns: layers, counted from 1; lr, the best rate; the shares of full fine-tuning's gain in
    loss and of its skill_gain; score.
    """
    configs = place_configs()
    lines = {
        key: {
            "layers": ", ".join(str(layer + 1) for layer in result.config.layers),
            "lr": result.config.lr,
            "gain": gain(result),
            "skill": skill_gain(result),
            "score": result.score(),
        }
        for key, result in zip(configs, sweep([*configs.values()]), strict=True)
    }
    return pd.DataFrame(lines).T.rename_axis(["task", "place"])


def lora_by_skill(full: RunConfig, share: float, *, by: str = "loss") -> list[Result]:
    """LoRA of a full run's task and seed, up to the first rank with `share` of the skill gain.

    At the profile's ranks, ascending, each by `tuned`, read on test rows.  by: "loss" or "score".
    """
    found = []
    for rank in profile().lora_ranks:
        found.append(run(tuned(full.task, "lora", rank=rank, seed=full.seed)))
        if skill_gain(found[-1], by=by) >= share:
            break
    return found


def tried_sizes(task: str, *, shares: Sequence[float] = SHARES, **changes) -> dict[str, dict]:
    """The sizes of the ladder that a task is trained at, ascending: what halving needs for shares.

    Each half of the ladder is kept or left by the skill gain in loss of its middle on the rows that
    choose (split "valid"), as if a larger size never had less; of a task that the ladder's
    `begun` names, the sizes there.  changes: as of `sized`.  Raises ValueError for a task without a
    floor.
    """
    require(has_floor(task), f"{task} has no floor, from which a skill is read")
    if begun := dict(profile().ladder.begun).get(task):
        return {name: ladder()[name] for name in begun}
    steps, tried = list(ladder().items()), {}

    def kept(i: int) -> float:
        if i not in tried:
            reached = skill_gain(run(sized(task, steps[i][1], **changes)), split="valid")
            tried[i] = -math.inf if math.isnan(reached) else reached  # diverged: falls short
        return tried[i]

    for share in shares:
        bisect.bisect_left(range(len(steps)), share, key=kept)
    return dict(steps[i] for i in sorted(tried))


def tried_runs(task: str, *, shares: Sequence[float] = SHARES) -> dict[int, Result]:
    """The runs of tried_sizes by their numbers of trained parameters, ascending."""
    tried = tried_sizes(task, shares=shares)
    results = sweep([sized(task, size) for size in tried.values()])
    return {trained_parameters(result.config): result for result in results}


def size_gains(task: str, *, by: str = "loss", shares: Sequence[float] = SHARES) -> pd.Series:
    """skill_gain of the runs of tried_runs on test rows, by their numbers of trained parameters.

    by: "loss" or "score"; NaN where a run diverged; shares: as of tried_sizes.
    """
    results = tried_runs(task, shares=shares)
    return pd.Series({count: skill_gain(result, by=by) for count, result in results.items()})


def needed_size(task: str, share: float) -> tuple[float, float]:
    """The numbers of trained parameters between which a task's needed size lies.

    The second is the smallest of those tried from which on a run keeps `share` of the skill gain,
    inf where the largest falls short; the first, the one before it, is 0 where none falls short.
    """
    return needed_bracket(size_gains(task), share)


def bracket_gains(task: str, share: float) -> pd.DataFrame:
    """skill_gain of every seed at the sizes of needed_size: a row a seed, a column a size.

    The columns are numbers of trained parameters, as many as are on the ladder.  The first seed
    chose the sizes and their rates; each is read against full fine-tuning of its own seed.
    """
    rungs = _rungs()
    ends = [int(count) for count in needed_size(task, share) if count in rungs]
    configs = [[sized(task, rungs[n], seed=s) for n in ends] for s in profile().seeds]
    return pd.DataFrame(_gains(configs), profile().seeds, ends)


def longer_gains(task: str, share: float) -> pd.DataFrame:
    """skill_gain of the size short of needed_size: a row a budget of steps, the column the size.

    The column is a number of trained parameters, and there is none where no size falls short.  At
    the rate of one budget, with the first seed, over full fine-tuning with one budget.
    """
    rungs = _rungs()
    above = [int(count) for count in needed_size(task, share)[:1] if count in rungs]
    short = [sized(task, rungs[count]) for count in above]
    steps = [n * profile().steps for n in profile().budgets]
    configs = [[dataclasses.replace(config, steps=n) for config in short] for n in steps]
    return pd.DataFrame(_gains(configs), steps, above)


def _rungs() -> dict[int, dict]:
    """The sizes of the ladder by their numbers of trained parameters."""
    return {parameters_of(size): size for size in ladder().values()}


def _gains(configs: list[list[RunConfig]]) -> list[list[float]]:
    """skill_gain of a table of runs, in one sweep."""
    sweep([config for row in configs for config in row])
    return [[skill_gain(run(config)) for config in row] for row in configs]
