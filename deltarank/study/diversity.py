"""Diversity: mixes of one part to all of them, and the size that each part needs in them."""

from __future__ import annotations

import dataclasses
import math
import random

import pandas as pd

from deltarank.study.configs import RunConfig
from deltarank.study.floors import floors
from deltarank.study.gains import gain_kept, needed_rank
from deltarank.study.plan import production_configs
from deltarank.study.profiles import profile
from deltarank.study.runs import Result, sweep
from deltarank.study.search import best_lr
from deltarank.study.sizes import sparse, trained_parameters
from deltarank.study.tables import by_part
from deltarank.study.tasks import PARTS, mix_of, mix_parts


def nested_mixes() -> dict[tuple[int, int], str]:
    """The profile's mixes of fewer than all parts, {(order, number of parts): task}.

    An order is drawn at random, and a mix of few parts is within that of more.
    """
    grid = profile().mixes
    drawn = {order: random.Random(order).sample(PARTS, len(PARTS)) for order in grid.orders}
    return {(order, n): mix_of(parts[:n]) for order, parts in drawn.items() for n in grid.counts}


def long_mix(*, twice: bool = False) -> dict[int, Result]:
    """Of each rank of production_configs the run at its best_lr; full fine-tuning is rank 0."""
    by_rank: dict[int, list[RunConfig]] = {}
    for config in production_configs(twice=twice):
        by_rank.setdefault(config.rank, []).append(config)
    return dict(zip(by_rank, _best_runs([*by_rank.values()]), strict=True))


def _best_runs(groups: list[list[RunConfig]]) -> list[Result]:
    """Of each group, runs that differ in their rate, the one at its best_lr."""
    results = iter(sweep([config for configs in groups for config in configs]))
    tried = [{config.lr: next(results) for config in configs} for configs in groups]
    return [runs[best_lr([*runs.values()])] for runs in tried]


def mix_configs(task: str) -> list[list[RunConfig]]:
    """What is trained on a mix, with the first seed: of each size a run at each of its rates.

    Full fine-tuning comes first, then adapters by ascending number of trained parameters; a mix of
    many parts has none below rank 1.
    """
    grid = profile().mixes
    sizes: list[tuple[dict, tuple[float, ...]]] = [
        ({"method": "lora" if rank else "full", "rank": rank}, lrs) for rank, lrs in grid.lrs
    ]
    if len(mix_parts(task)) <= grid.sparse_parts:
        sizes += [(sparse("spread", count), lrs) for count, lrs in grid.sparse]
    trained = [[profile().config(task, lr=lr, **size) for lr in lrs] for size, lrs in sizes]
    return sorted(trained, key=lambda c: (c[0].adapter, trained_parameters(c[0])))


def higher_configs() -> list[RunConfig]:
    """The first of nested_mixes at a rate above those of mix_configs; rank 0 is full."""
    task = next(iter(nested_mixes().values()))
    return [
        profile().config(task, "lora" if rank else "full", rank=rank, lr=lr)
        for rank, lr in profile().mixes.higher_lrs
    ]


def mix_runs(task: str) -> list[Result]:
    """Of each size of mix_configs the run at its best_lr; runs what is not stored."""
    return _best_runs(mix_configs(task))


def part_losses(task: str, *, own_rates: bool = False) -> pd.DataFrame:
    """The loss of each part's test rows, in nats a token, by each size trained on the mix.

    One line a number of trained parameters, ascending, full fine-tuning's last; one column a part.
    All parts share the rate of mix_runs; with own_rates each has the one that is best on its rows.
    """
    groups, shared = mix_configs(task), mix_runs(task)
    tried = [sweep(group) for group in groups] if own_rates else [[run] for run in shared]
    sizes = [trained_parameters(group[0]) for group in groups]
    losses = dict(zip(sizes, map(_least_losses, tried), strict=True))
    return pd.DataFrame(losses).T.sort_index()


def _least_losses(runs: list[Result]) -> pd.Series:
    """The loss of each part in the run that is best for it, of those that did not diverge."""
    finished = [by_part(run)["loss_nats"] for run in runs if run.status == "finished"]
    return pd.DataFrame(finished).min()


def part_gains(task: str) -> pd.DataFrame:
    """The share of each part's loss gain that an adapter trained on the mix has.

    As part_losses, without full fine-tuning: a gain is from the floor of the part as a task of its
    own to full fine-tuning of the mix.
    """
    losses = part_losses(task)
    best = losses.iloc[-1]
    return losses.iloc[:-1].apply(
        lambda nats: gain_kept(nats, _floor(str(nats.name)), best[nats.name])
    )


def exchange(alone: pd.Series, mixed: pd.Series, size: int) -> float:
    """How many times the parameters of `size` a part needs in a mix to lose what it loses alone.

    alone, mixed: the losses of one part by ascending number of trained parameters.  Read off as
    needed_rank is: linearly in the loss over the log of the parameters; inf where no size of the
    mix loses as little, and at most that of its smallest where all do.  1 is a part that the others
    do not touch.  Raises KeyError for a size that was not trained alone.

    >>> exchange(pd.Series({4: 3.0}), pd.Series({4: 3.5, 16: 2.5}), 4)
    2.0
    """
    return needed_rank(1 + alone[size] - mixed, 1) / size


def exchange_table() -> pd.DataFrame:
    """The losses of the parts that nested_mixes have alone, and what rank 1 exchanges for in mixes.

    One line a part, a number of parts (ascending; all in as many steps a part) and their mix.
    Columns: loss_nats by number of trained parameters as part_losses has it (NaN where a mix lacks
    a size), exchange, of rank 1 on all layers, own_rates, the same with each part's best rate, and
    second_seed, the same with another seed where the profile has one.
    """
    shared, own = _losses_of_solos(own_rates=False), _losses_of_solos(own_rates=True)
    found = shared.assign(exchange=_exchanges(shared), own_rates=_exchanges(own))
    found["second_seed"] = math.nan
    mixes = nested_mixes()
    for order, count in profile().mixes.again:
        (part,), mix = mix_parts(mixes[order, 1]), mixes[order, count]
        found.loc[(part, count, mix), "second_seed"] = exchange_again(part, mix)
    return found


def _losses_of_solos(*, own_rates: bool) -> pd.DataFrame:
    """The columns of exchange_table that are losses."""
    mixes = [*nested_mixes().values(), mix_of(PARTS)]
    each = {(len(mix_parts(mix)), mix): part_losses(mix, own_rates=own_rates).T for mix in mixes}
    losses = pd.concat(each, names=["parts", "mix", "part"]).sort_index(axis=1)
    losses = losses.reorder_levels(["part", "parts", "mix"]).sort_index()
    return losses.loc[[*losses.xs(1, level="parts").index.unique("part")]]


def _exchanges(losses: pd.DataFrame) -> pd.Series:
    """The exchange of rank 1 in each line of _losses_of_solos."""
    adapters = losses.iloc[:, :-1]  # the last column is full fine-tuning's
    alone = adapters.xs(1, level="parts").droplevel("mix")
    rank_1 = int(adapters.columns[-2])  # of which rank 8 is the last
    beside = alone.reindex(adapters.index.get_level_values("part"))
    lines = zip(beside.iterrows(), adapters.iterrows(), strict=True)
    found = [exchange(one, mixed.dropna(), rank_1) for (_, one), (_, mixed) in lines]
    return pd.Series(found, losses.index)


def exchange_again(part: str, mix: str) -> float:
    """The exchange of rank 1 in a part of a mix with the second seed, at the rates of the first.

    Read off between rank 1 and rank 8 on all layers, the last two sizes of mix_configs.
    """
    alone, mixed = (_losses_again(part, task) for task in (mix_of([part]), mix))
    return exchange(alone, mixed, alone.index[0])


def _losses_again(part: str, task: str) -> pd.Series:
    """The loss of a part of a mix by the numbers of trained parameters of rank 1 and rank 8."""
    seed = profile().seeds[1]
    again = [dataclasses.replace(run.config, seed=seed) for run in mix_runs(task)[-2:]]
    losses = [by_part(run)["loss_nats"][part] for run in sweep(again)]
    return pd.Series(losses, [*map(trained_parameters, again)])


def _floor(part: str) -> float:
    """The lowest loss on test rows without the skill of a part, as a task of its own."""
    return floors(part)["loss_nats"].min()
