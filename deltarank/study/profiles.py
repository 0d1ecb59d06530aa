"""Profiles: one size of the whole report, and the folders it may write."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from deltarank.checks import require
from deltarank.runtime import ROOT, build_folder, own_model, profile_name, venue
from deltarank.study.configs import RunConfig
from deltarank.study.convert import GEMMA, SMOLLM
from deltarank.study.grids import LADDER, CodeGrid, HealGrid, LadderGrid, MixGrid, OptimizerGrid
from deltarank.study.models import TINY, load_tokenizer
from deltarank.study.tasks import PARTS, encode, load_task, mix_of, mix_parts

Number = TypeVar("Number", int, float)

ALL_TASKS = (*PARTS, "mix")
LORA_ALPHA = 32.0  # at all ranks, but in the alpha_tasks of a profile
LARGE_ALPHA = 8 * LORA_ALPHA  # by which the facts are learned best at a low rank


@dataclass(frozen=True)
class Profile:
    """One size of the whole report: model, tasks, grids, and where results go; default: paper."""

    name: str
    model: str = GEMMA
    tasks: tuple[str, ...] = (*ALL_TASKS, "shuffled")
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 120
    batch_size: int = 16  # rows
    seq_len: int = 48  # tokens a row at most
    eval_rows: int = 256  # held-out rows scored
    generate_rows: int = 64  # of those, rows answered by free generation where the metric needs it
    cut_ranks: tuple[int, ...] = (0, 1, 8, 64)  # 0 keeps only what is outside the matrices
    # Each part of CUT_PARTS, and in the lora_tasks of LENGTH_PARTS, is cut to these, first seed.
    control_ranks: tuple[int, ...] = (8,)
    lora_tasks: tuple[str, ...] = ALL_TASKS
    lora_ranks: tuple[int, ...] = (1, 8, 64)  # of every task, first seed; lora_until has others
    # Tasks whose needed size is forecast by that of the lora_tasks before they are trained.
    forecast_tasks: tuple[str, ...] = ("danish", "dates", "entities", "sorting", "naming")
    # Tasks in which the directions of LoRA are compared with those of full fine-tuning.
    direction_tasks: tuple[str, ...] = ("kjv", "sentiment", "facts", "arithmetic", "sorbian")
    reading_tasks: tuple[str, ...] = ("facts", "sorbian")  # ... on real inputs, with tuned rates
    # A task, and of LoRA each of its lora_ranks, takes the rate of the lowest held-out loss.
    full_lrs: tuple[float, ...] = (3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
    lora_lrs: tuple[float, ...] = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
    ladder: LadderGrid = LadderGrid()
    trials: int = 6  # settings of a method that are tried on a task (see trials)
    # Tasks with the size, that of a LoRA of this rank, at which methods compete on them.
    # To come: King James at size 1, Sorbian at size 8.
    contests: tuple[tuple[str, int], ...] = (("facts", 1), ("facts", 8), ("sorbian", 1))
    forget_tasks: tuple[str, ...] = ("facts", "sorbian", "arithmetic", "kjv")  # see forgetting
    fine_tasks: tuple[str, ...] = ()  # whose rates are searched finer, once those runs are stored
    # Tasks in which a low rank falls short: their LoRAs take the best of these alphas.
    alpha_tasks: tuple[str, ...] = ()
    lora_alphas: tuple[float, ...] = (LORA_ALPHA, LARGE_ALPHA)
    # Tasks whose full fine-tuning is tried with and without warm-up, each at these rates.
    warmup_lrs: tuple[tuple[str, tuple[float, float, float]], ...] = (
        ("facts", (1e-4, 1.7e-4, 3e-4)),
        ("sorbian", (5.5e-5, 1e-4, 1.7e-4)),
    )
    warmups: tuple[float, ...] = (0.0, 0.1)  # shares of the steps
    mixes: MixGrid = MixGrid()
    embedding_tasks: tuple[str, ...] = ("sorbian",)  # run once more with a trained embedding
    again_tasks: tuple[str, ...] = ("sorbian", "kjv")  # once more, their whole test split scored
    scaling_ranks: tuple[int, ...] = (1, 8, 64)  # LoRA of the facts by each of SCALES ...
    scaling_lrs: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3)  # ... at each of these rates
    # Tasks in which a low rank falls short, by LoRA of this rank (0: full fine-tuning) ...
    budget_runs: tuple[tuple[str, int], ...] = (
        *itertools.product(("facts", "kjv", "sorbian"), (0, 1)),
    )
    budgets: tuple[int, ...] = (1, 2)  # ... with so many times the steps
    heals: HealGrid = HealGrid()
    codes: CodeGrid = CodeGrid()
    optimizers: OptimizerGrid = OptimizerGrid()
    compile: bool = True
    committed: bool = False  # whether its results belong to the repository
    second: str = ""  # the profile of another model, on which what is found is looked for again
    seed_tasks: tuple[str, ...] = ()  # of a second model: those with every seed

    @property
    def folder(self) -> Path:
        """Where this profile may write: the repository for paper, a git-ignored build otherwise.

        What another model does than the report's stays out of the repository, too.
        """
        if own_model():
            return build_folder() / f"{self.name}-{Path(own_model()).name}"
        return ROOT if self.name == "paper" else build_folder() / self.name

    @property
    def store(self) -> Path:
        """The results store: the repository's where what it holds is committed."""
        return (ROOT if self.committed and not own_model() else self.folder) / "data"

    @property
    def figures(self) -> Path:
        """The figure folder: of the profile, or of the venue whose figures are made."""
        return build_folder() / "figures" / venue() if venue() else self.folder / "figures"

    def config(self, task: str, method: str = "full", **changes) -> RunConfig:
        """The configuration of one run of this profile; `changes` override single fields.

        The learning rate is the middle one of the method's, common to all tasks.  Of a variant all
        is to be given.
        """
        fields = ["model", "steps", "batch_size", "seq_len", "eval_rows", "generate_rows"]
        sizes = {field: getattr(self, field) for field in [*fields, "compile"]}
        sizes |= {"profile": self.name} | self.mixes.sizes(len(mix_parts(task)))
        recipes: dict[str, dict] = {
            "base": {"steps": 0},
            "full": {"lr": middle(self.full_lrs)},
            "lora": {"lr": middle(self.lora_lrs), "alpha": LORA_ALPHA},
            "tinylora": {"lr": middle(self.ladder.tiny_lrs)},
        }
        return RunConfig(task=task, method=method, **(sizes | recipes.get(method, {}) | changes))


def middle(values: Sequence[Number]) -> Number:
    """The middle one; of two the larger."""
    return sorted(values)[len(values) // 2]


WITHOUT: dict[str, Any] = {  # what a profile has that is without the paper's side questions
    "forecast_tasks": (),
    "contests": (),
    "forget_tasks": (),
    "direction_tasks": (),
    "reading_tasks": (),
    "mixes": MixGrid(lrs=(), twice_lrs=(), sparse=()),
    "warmup_lrs": (),
    "embedding_tasks": (),
    "again_tasks": (),
    "scaling_ranks": (),
    "heals": HealGrid(tasks=()),
    "optimizers": OptimizerGrid(tasks=(), lora_tasks=()),
}
PROFILES = {
    "smoke": Profile(
        "smoke",
        second="smoke",  # the same model: it is to run, and nothing is read off it
        seed_tasks=("facts",),
        model=TINY,
        tasks=("sentiment", "pirate", "facts", "json"),
        steps=6,
        batch_size=4,
        seq_len=320,
        eval_rows=8,
        generate_rows=2,
        cut_ranks=(0, 1, 8, 16),
        lora_tasks=("sentiment", "facts"),
        lora_ranks=(1, 4, 8),
        forecast_tasks=("dates",),
        direction_tasks=("sentiment", "facts"),
        reading_tasks=("facts",),
        full_lrs=(1e-4, 1e-3),
        seeds=(0, 1),
        lora_lrs=(1e-3, 1e-2),
        ladder=LadderGrid(
            2, tiny_vectors=(8, 32), tiny_lrs=(1e-2, 1e-1), layers=(1,), place_runs=(("facts", 1),)
        ),
        trials=3,
        contests=(("facts", 1),),
        forget_tasks=("facts",),
        mixes=MixGrid(
            steps=2,
            eval_rows=4,
            generate_rows=1,
            lrs=((0, (1e-3,)), (1, (1e-3, 1e-2)), (8, (1e-3,))),
            twice_lrs=((0, (1e-3,)), (1, (1e-3, 1e-2)), (8, (1e-3,))),
            sparse=((1, (1e-2,)),),
            orders=(0, 1),
            counts=(1, 2),
            again=((0, 2),),
        ),
        warmup_lrs=(("facts", (1e-4, 1e-3, 1e-2)),),
        embedding_tasks=("facts",),
        again_tasks=("facts",),
        scaling_ranks=(1, 8),
        scaling_lrs=(1e-3, 1e-2),
        budget_runs=(("facts", 0), ("facts", 1)),
        heals=HealGrid(
            tasks=("facts", "json"), ranks=(2, 4), steps=(2, 4), rows=16, squeezes=((8, 2),)
        ),
        codes=CodeGrid(
            sizes=(((1,), (), 1), ((1,), ("down_proj",), 4), ((0, 1), (), 1), ((1,), (), 0)),
            digits=4,
            loads=(0.1, 1.0),
            own_loads=((((1,), (), 0), (0.02,)),),
            most=64,
            steps=40,
            lrs=(1e-2, 3e-2),
            full_lrs=(1e-3, 1e-2),
            seed_size=((1,), (), 1),
            seed_loads=(0.1,),
            longer_loads=(1.0,),
        ),
        optimizers=OptimizerGrid(
            tasks=("facts",), lora_tasks=("facts",), rank=4, lrs=(("sgd_momentum", (0.1, 1.0)),)
        ),
        compile=False,
    ),
    "quick": Profile(
        "quick",
        tasks=("sentiment", "pirate", "facts", "json"),
        steps=24,
        batch_size=8,
        eval_rows=64,
        generate_rows=8,
        cut_ranks=(0, 1, 8, 64),
        control_ranks=(),
        lora_tasks=("facts",),
        lora_ranks=(8,),
        full_lrs=(1e-4,),
        lora_lrs=(1e-3,),
        ladder=LadderGrid(
            tiny_vectors=(128,), tiny_lrs=(1e-2,), layers=(3,), modules=(), place_runs=()
        ),
        seeds=(0,),
        budgets=(),
        codes=CodeGrid(sizes=()),
        compile=False,  # takes longer than it saves on so few steps
        **WITHOUT,
    ),
    "paper": Profile(
        "paper",
        second="smollm2",
        committed=True,
        fine_tasks=("facts", "sorbian", "sentiment", "json", "code", "mix"),
        alpha_tasks=("facts", "sorbian", "kjv", "arithmetic", "code", "mix", "entities"),
        ladder=LADDER,
    ),
    "smollm2": Profile(
        "smollm2",
        model=SMOLLM,
        committed=True,
        tasks=ALL_TASKS,
        seeds=(0, 100, 200),  # neighbours share the order of an epoch
        seed_tasks=("facts", "kjv", "arithmetic", "json"),
        alpha_tasks=("facts",),
        seq_len=64,
        ladder=LadderGrid(layers=(2, 5, 10, 15), place_runs=()),  # of 30, as 1 to 9 of 18
        budget_runs=(),
        codes=CodeGrid(
            sizes=(((24,), (), 1),),  # as deep, of 30 layers, as the first model's of 18
            loads=(0.5, 1.0, 2.0),
            seed_size=((24,), (), 1),
            seed_loads=(0.5, 2.0),
            longer_loads=(),
        ),
        **WITHOUT,
    ),
}


def base_of(config: RunConfig) -> RunConfig:
    """The base run that a run is measured by: its task and model, by the sizes of its profile."""
    return profile(config.profile).config(config.task, "base", model=config.model)


def entry_folder(config: RunConfig, kind: str, name: str = "") -> Path:
    """Where what is known of a run is stored, by the profile that made it: kind/task/name.

    The name is the run's key unless it is given.
    """
    return profile(config.profile).store / kind / Path(config.task).stem / (name or config.key)


def profile(name: str = "") -> Profile:
    """The profile of this name, or the one that the environment variable PROFILE names, or paper.

    With MODEL it is of that model, and as long as the tasks' longest row is by its tokenizer.
    Raises ValueError for an unknown name, and as load_tokenizer does.
    """
    name = name or profile_name()
    known = ", ".join(PROFILES)
    require(name in PROFILES, f"PROFILE={name!r} is unknown; choose one of {known}")
    found, model = PROFILES[name], own_model()
    if not model:
        return found
    mixes = [mix_of(PARTS)] * bool(found.mixes.lrs)
    longest = longest_row(model, (*found.tasks, *mixes))
    return dataclasses.replace(found, model=model, seq_len=longest, second="")


@functools.lru_cache
def longest_row(model: str, tasks: tuple[str, ...]) -> int:
    """The tokens of these tasks' longest row by a model's tokenizer, up to a multiple of 8."""
    tokenizer = load_tokenizer(model)
    rows = (row for task in tasks for split in load_task(task).values() for row in split)
    longest = max(len(encode(row, tokenizer)["input_ids"]) for row in rows)
    return 8 * math.ceil(longest / 8)
