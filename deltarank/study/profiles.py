"""Profiles: one size of the whole report, and the folders it may write."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from deltarank.checks import require
from deltarank.runtime import ROOT, build_folder, own_model, profile_name, venue
from deltarank.study.configs import RunConfig
from deltarank.study.convert import GEMMA
from deltarank.study.models import TINY, load_tokenizer
from deltarank.study.tasks import encode, load_task

Number = TypeVar("Number", int, float)

# Written by `RECORD=yes make bench`: time and memory of pairs, what tools say of a planted rank
# (both in notebook 8), and time and memory of `make report`.
PAIR_TIMES = ROOT / "data" / "bench_pairs.csv"
PLANTED_RANKS = ROOT / "data" / "bench_planted.csv"
REPORT_TIMES = ROOT / "data" / "bench_report.csv"
ALL_TASKS = ("pirate", "json", "kjv", "sentiment", "facts", "arithmetic", "sorbian", "code", "mix")
LORA_ALPHA = 32.0  # at all ranks, but in the alpha_tasks of a profile


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
    # Tasks in which the directions of LoRA are compared with those of full fine-tuning.
    direction_tasks: tuple[str, ...] = ("kjv", "sentiment", "facts", "arithmetic", "sorbian")
    reading_tasks: tuple[str, ...] = ("facts", "sorbian")  # ... on real inputs, with tuned rates
    # A task, and of LoRA each of its lora_ranks, takes the rate of the lowest held-out loss.
    full_lrs: tuple[float, ...] = (3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
    lora_lrs: tuple[float, ...] = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
    # Adapters below rank 1 on all layers (see sizes.ladder): TinyLoRA of these many numbers, and
    # LoRA of rank 1 on so many layers, evenly spaced, and on one module of every layer.
    tiny_rank: int = 4
    tiny_vectors: tuple[int, ...] = (16, 128, 1024)
    tiny_lrs: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    sparse_layers: tuple[int, ...] = (1, 3, 6, 9)
    sparse_modules: tuple[str, ...] = ("q_proj",)
    # Tasks with a LoRA of rank 1 on so many layers, in turn at each of sizes.PLACES.
    place_runs: tuple[tuple[str, int], ...] = (("kjv", 3), ("arithmetic", 3))
    trials: int = 6  # settings of a method that are tried on a task (see trials)
    fine_tasks: tuple[str, ...] = ()  # whose rates are searched finer, once those runs are stored
    # Tasks in which a low rank falls short: their LoRAs take the best of these alphas.
    alpha_tasks: tuple[str, ...] = ()
    lora_alphas: tuple[float, ...] = (LORA_ALPHA, 8 * LORA_ALPHA)
    # Tasks whose full fine-tuning is tried with and without warm-up, each at these rates.
    warmup_lrs: tuple[tuple[str, tuple[float, float, float]], ...] = (
        ("facts", (1e-4, 1.7e-4, 3e-4)),
        ("sorbian", (5.5e-5, 1e-4, 1.7e-4)),
    )
    warmups: tuple[float, ...] = (0.0, 0.1)  # shares of the steps
    # Tasks with sizes of their own: the long mix is trained until its parts are learned, and all of
    # its held-out rows are scored.
    own_sizes: tuple[tuple[str, tuple[tuple[str, int], ...]], ...] = (
        ("production", (("steps", 480), ("eval_rows", 2048), ("generate_rows", 640))),
    )
    # Ranks of LoRA on the long mix (0: full fine-tuning), each at these rates: the mix's best two.
    production_lrs: tuple[tuple[int, tuple[float, ...]], ...] = (
        (0, (3e-5, 1e-4)),
        (1, (3e-4, 1e-3)),
        (8, (3e-4, 1e-3)),
    )
    embedding_tasks: tuple[str, ...] = ("sorbian",)  # run once more with a trained embedding
    again_tasks: tuple[str, ...] = ("sorbian",)  # run once more on one processor, whole test split
    scaling_ranks: tuple[int, ...] = (1, 8, 64)  # LoRA of the facts by each of SCALES ...
    scaling_lrs: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3)  # ... at each of these rates
    # Tasks in which a low rank falls short, by LoRA of this rank (0: full fine-tuning) ...
    budget_runs: tuple[tuple[str, int], ...] = (
        ("facts", 0),
        ("facts", 1),
        ("kjv", 1),
        ("sorbian", 1),
    )
    budgets: tuple[int, ...] = (1, 2)  # ... with so many times the steps
    # Tasks whose cuts at these ranks are healed for these steps on so many training rows, beside
    # LoRA from nothing and LoRA trained at a wide rank and squeezed to a narrow one; each start
    # takes the best of three rates.
    heal_tasks: tuple[str, ...] = ("facts", "sorbian", "json")
    heal_ranks: tuple[int, ...] = (4, 8, 16)
    heal_steps: tuple[int, ...] = (15, 30, 60)
    heal_rows: int = 960
    heal_squeezes: tuple[tuple[int, int], ...] = ((64, 8),)
    heal_lrs: tuple[tuple[str, tuple[float, float, float]], ...] = (
        ("cut", (3e-4, 1e-3, 3e-3)),
        ("nothing", (1e-4, 3e-4, 1e-3)),
        ("squeezed", (1e-4, 3e-4, 1e-3)),
    )
    # Codes learned by a few layers (see loads): what is trained, as (layers, modules, rank), no
    # modules being all linear ones and rank 0 all parameters of the layers; bits of codes a trained
    # parameter, as far as codes are not too many; steps at most.  A size takes the best of these
    # rates; rank 0 has rates and loads of its own.  One size has all seeds at some loads.
    code_sizes: tuple[tuple[tuple[int, ...], tuple[str, ...], int], ...] = (
        ((14,), ("down_proj",), 1),
        ((14,), (), 1),
        ((14,), (), 4),
        ((14, 15, 16, 17), (), 1),
        ((14, 15, 16, 17), (), 8),
        ((14,), (), 0),
    )
    code_digits: int = 6
    code_loads: tuple[float, ...] = (0.05, 0.2, 0.5, 1.0, 2.0, 5.0, 20.0)
    code_full_loads: tuple[float, ...] = (0.001, 0.01)
    code_most: int = 5000  # codes
    code_steps: int = 4000
    code_lrs: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    code_full_lrs: tuple[float, ...] = (3e-5, 1e-4, 3e-4)
    code_seed_size: tuple[tuple[int, ...], tuple[str, ...], int] = ((14,), (), 1)
    code_seed_loads: tuple[float, ...] = (0.2, 1.0, 2.0, 5.0)
    compile: bool = True

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
        """The results store."""
        return self.folder / "data"

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
        sizes |= {"profile": self.name}
        sizes |= dict(dict(self.own_sizes).get(task, ()))
        recipes: dict[str, dict] = {
            "base": {"steps": 0},
            "full": {"lr": middle(self.full_lrs)},
            "lora": {"lr": middle(self.lora_lrs), "alpha": LORA_ALPHA},
            "tinylora": {"lr": middle(self.tiny_lrs)},
        }
        return RunConfig(task=task, method=method, **(sizes | recipes.get(method, {}) | changes))


def middle(values: Sequence[Number]) -> Number:
    """The middle one; of two the larger."""
    return sorted(values)[len(values) // 2]


PROFILES = {
    "smoke": Profile(
        "smoke",
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
        direction_tasks=("sentiment", "facts"),
        reading_tasks=("facts",),
        full_lrs=(1e-4, 1e-3),
        seeds=(0, 1),
        lora_lrs=(1e-3, 1e-2),
        tiny_rank=2,
        tiny_vectors=(8, 32),
        tiny_lrs=(1e-2, 1e-1),
        sparse_layers=(1,),
        place_runs=(("facts", 1),),
        trials=3,
        own_sizes=(),
        production_lrs=(),
        warmup_lrs=(("facts", (1e-4, 1e-3, 1e-2)),),
        embedding_tasks=("facts",),
        again_tasks=("facts",),
        scaling_ranks=(1, 8),
        scaling_lrs=(1e-3, 1e-2),
        budget_runs=(("facts", 0), ("facts", 1)),
        heal_tasks=("facts", "json"),
        heal_ranks=(2, 4),
        heal_steps=(2, 4),
        heal_rows=16,
        heal_squeezes=((8, 2),),
        code_sizes=(((1,), (), 1), ((1,), ("down_proj",), 4), ((0, 1), (), 1), ((1,), (), 0)),
        code_digits=4,
        code_loads=(0.1, 1.0),
        code_full_loads=(0.02,),
        code_most=64,
        code_steps=40,
        code_lrs=(1e-2, 3e-2),
        code_full_lrs=(1e-3, 1e-2),
        code_seed_size=((1,), (), 1),
        code_seed_loads=(0.1,),
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
        direction_tasks=(),
        reading_tasks=(),
        full_lrs=(1e-4,),
        lora_lrs=(1e-3,),
        tiny_vectors=(128,),
        tiny_lrs=(1e-2,),
        sparse_layers=(3,),
        sparse_modules=(),
        place_runs=(),
        seeds=(0,),
        own_sizes=(),
        production_lrs=(),
        warmup_lrs=(),
        embedding_tasks=(),
        again_tasks=(),
        scaling_ranks=(),
        budgets=(),
        heal_tasks=(),
        code_sizes=(),
        compile=False,  # takes longer than it saves on so few steps
    ),
    "paper": Profile(
        "paper",
        fine_tasks=("facts", "sorbian", "sentiment", "json"),
        alpha_tasks=("facts", "sorbian"),
    ),
}


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
    longest = longest_row(model, (*found.tasks, *dict(found.own_sizes)))
    return dataclasses.replace(found, model=model, seq_len=longest)


@functools.lru_cache
def longest_row(model: str, tasks: tuple[str, ...]) -> int:
    """The tokens of these tasks' longest row by a model's tokenizer, up to a multiple of 8."""
    tokenizer = load_tokenizer(model)
    rows = (row for task in tasks for split in load_task(task).values() for row in split)
    longest = max(len(encode(row, tokenizer)["input_ids"]) for row in rows)
    return 8 * math.ceil(longest / 8)
