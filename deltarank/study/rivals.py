"""Rivals: what rules are told of a task, the size that they say it needs, and what that costs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pandas as pd

from deltarank.checks import require
from deltarank.study.configs import RunConfig
from deltarank.study.floors import skill_gain
from deltarank.study.forecast import forecast, middle_of, rank_by_rows
from deltarank.study.gains import first_epoch_kbit, taught_kbit
from deltarank.study.gradients import first_gradients
from deltarank.study.profiles import Profile, middle, profile
from deltarank.study.runs import Result, run
from deltarank.study.search import tuned
from deltarank.study.sizes import (
    SHARES,
    ladder,
    needed_size,
    parameters_of,
    sized,
    trained_parameters,
    tried_runs,
)
from deltarank.study.tasks import load_split

LEAST_KBIT = 0.001  # of what rows teach: a measure has a logarithm


def probe(task: str, sizes: Profile) -> RunConfig:
    """The short training that tells a task's bits: LoRA of the middle rank, at the common rate."""
    return sizes.config(task, "lora", rank=middle(sizes.lora_ranks))


def taught(told: Result) -> float:
    """The kbit that a probe says the rows of its task teach, LEAST_KBIT at the least.

    Raises ValueError where it diverged.
    """
    require(told.status == "finished", f"{told.config.key} diverged: it tells no bits")
    return max(taught_kbit(told, len(load_split(told.config.task, "train"))), LEAST_KBIT)


def read_of(tasks: Sequence[str]) -> pd.DataFrame:
    """What each rule reads of a task, a line a task; runs what is not stored, with the first seed.

    bits: what the probe says is taught; code length: its first_epoch_kbit;
    gradient: the median stable rank of the first gradients; stable rank, n steps: the median of the
    update of full fine-tuning after so many steps, at the common rate, so that none is searched.
    Raises ValueError where the probe diverged.
    """
    rows = {}
    for task in tasks:
        told, full = run(probe(task, profile())), run(profile().config(task))
        row = {"bits": taught(told), "code length": first_epoch_kbit(told)}
        first = first_gradients(profile().config(task, "base"))
        row["gradient"] = first["stable_rank"].median()
        for note in full.record["growth"]:
            row[f"stable rank, {note['step']} steps"] = pd.Series(note["stable_rank"]).median()
        rows[task] = row
    return pd.DataFrame(rows).T


def known_sizes(tasks: Sequence[str], share: float) -> pd.Series:
    """What each task needs, as one number of trained parameters: the middle of its bracket."""
    counts = [parameters_of(size) for size in ladder().values()]
    least, most = min(counts), max(counts)
    ends = {task: needed_size(task, share) for task in tasks}
    return pd.Series({t: middle_of(*pair, least=least, most=most) for t, pair in ends.items()})


def forecasts(known: Sequence[str], asked: Sequence[str], share: float) -> pd.DataFrame:
    """What each rule says that tasks need, in trained parameters; a line a task, a column a rule.

    Those that read_of has are fitted to the known tasks, without the one that is asked.  always:
    the middle rank of the profile for every task; by rows: rank_by_rows.
    """
    needed, before, now = known_sizes(known, share), read_of(known), read_of(asked)
    table = pd.DataFrame({name: forecast(before[name], needed, now[name]) for name in before})
    one = parameters_of({"method": "lora", "rank": 1})
    table["always"] = one * middle(profile().lora_ranks)
    table["by rows"] = [one * rank_by_rows(len(load_split(t, "train"))) for t in table.index]
    return table


def paid(task: str, *, shares: Sequence[float] = SHARES) -> pd.DataFrame:
    """What adapters cost on a task, a line a size, by ascending number of trained parameters.

    The sizes are those that tried_runs has for the shares and the usual rank, without runs that
    diverged.  lost: held-out loss above that of full fine-tuning, in nats a token; kept:
    skill_gain.  Raises ValueError where all diverged.
    """
    always = sized(task, {"method": "lora", "rank": middle(profile().lora_ranks)})
    tried = tried_runs(task, shares=shares) | {trained_parameters(always): run(always)}
    results = {count: r for count, r in sorted(tried.items()) if r.status == "finished"}
    require(bool(results), f"{task}: every size that was tried diverged")
    full = run(tuned(task)).loss()
    rows = {count: (r.loss() - full, skill_gain(r)) for count, r in results.items()}
    return pd.DataFrame.from_dict(rows, orient="index", columns=["lost", "kept"])


def costs(says: pd.DataFrame, *, shares: Sequence[float] = SHARES) -> pd.DataFrame:
    """What it costs to follow what every rule says of every task: a line a rule and task.

    says: as forecasts gives it; shares: as of paid.  Columns: parameters, the size that is
    named, but none below those of `paid`; lost and kept, read on straight lines between these over
    the logarithm of the parameters; a size above all of them has what the largest has.
    """
    lines = {}
    for task, sizes in says.iterrows():
        table = paid(str(task), shares=shares)
        logs, at = np.log(table.index), np.log(sizes.astype(float))
        read = {name: np.interp(at, logs, table[name]) for name in table}
        read["parameters"] = sizes.clip(lower=min(table.index)).to_numpy(float)
        lines[task] = pd.DataFrame(read, sizes.index)
    found = pd.concat(lines, names=["task", "rule"]).swaplevel()
    return found.loc[[*says], ["parameters", "lost", "kept"]]


def one_size(tasks: Sequence[str]) -> pd.DataFrame:
    """The rule that is no rule: a size for all tasks, a column each LoRA of the ladder.

    Named by its trained parameters ("237,312"); form as forecasts gives it.
    """
    counts = [parameters_of(size) for size in ladder().values() if size["method"] == "lora"]
    return pd.DataFrame({f"{n:,}": float(n) for n in counts}, index=[*tasks])


def summed_costs(
    says: pd.DataFrame, share: float, *, shares: Sequence[float] = SHARES
) -> pd.DataFrame:
    """What it costs to follow each rule over all its tasks: a line a rule, then one a size for all.

    says, shares: as of costs.  Columns: "lost, mean" and "lost, max"; short, the tasks that keep
    less than `share`; parameters, geometric mean; one size, what the line of one size for all tasks
    loses in the mean at as many.
    """
    alike = one_size([*says.index])
    by_rule = costs(says.join(alike), shares=shares).groupby("rule", sort=False)
    table = by_rule["lost"].agg(["mean", "max"]).add_prefix("lost, ")
    table["short"] = by_rule["kept"].agg(lambda kept: (kept < share).sum())
    logs = by_rule["parameters"].agg(lambda n: np.log(n).mean())
    line = np.interp(logs, logs[[*alike]], table.loc[[*alike], "lost, mean"])
    return table.assign(parameters=np.exp(logs), **{"one size": line})


def dealt(read: pd.DataFrame, needed: pd.Series, draws: int) -> pd.DataFrame:
    """What rules would say of known tasks if their readings were dealt to these at random, seed 0.

    read: as read_of gives it; one line a task, one column a rule and draw ("bits: 0").
    """
    rng, found = np.random.default_rng(0), {}
    for name, draw in itertools.product(read, range(draws)):
        x = pd.Series(rng.permutation(read[name]), read.index)
        found[f"{name}: {draw}"] = forecast(x, needed, x)
    return pd.DataFrame(found)


def against_chance(spent: pd.DataFrame, rules: Sequence[str], sizes: Sequence[str]) -> pd.DataFrame:
    """Rules beside their readings dealt at random, a line a rule, by the line of one size for all.

    spent: costs of the rules, of `dealt` and of sizes that are the same for all tasks, which draw
    the line: nats lost over the mean logarithm of the parameters.  Columns: nats, lost above it;
    dealt, the median of the draws; as low, the share of them that lies as low as the rule.
    """
    means = spent.assign(parameters=np.log(spent["parameters"])).groupby("rule").mean()
    line = means.loc[[*sizes]].sort_values("parameters")
    nats = means["lost"] - np.interp(means["parameters"], line["parameters"], line["lost"])
    draws = {name: nats[nats.index.str.startswith(f"{name}: ")] for name in rules}
    found = {"nats": nats[[*rules]], "dealt": {name: x.median() for name, x in draws.items()}}
    found["as low"] = {name: (x <= nats[name]).mean() for name, x in draws.items()}
    return pd.DataFrame(found)


def control(
    read: pd.DataFrame, needed: pd.Series, share: float, *, draws: int = 300
) -> pd.DataFrame:
    """against_chance of known tasks, each forecast by the others from what was read of them.

    read: as read_of gives it, a line a known task; needed: as known_sizes gives it of them for this
    share.
    """
    tasks, alike = [*read.index], one_size([*read.index])
    rules = forecasts(tasks, tasks, share)[[*read]]
    spent = costs(pd.concat([rules, alike, dealt(read, needed, draws)], axis=1))
    return against_chance(spent, [*read], [*alike])
