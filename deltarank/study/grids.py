"""Grids: the sizes of a profile's adapters, mixes, heals and codes, and of its optimizers."""

from __future__ import annotations

from dataclasses import dataclass

from deltarank.study.tasks import PARTS

Size = tuple[tuple[int, ...], tuple[str, ...], int]  # layers, modules, rank


@dataclass(frozen=True)
class LadderGrid:
    """Adapters of tasks below rank 1 on all layers, and rates of TinyLoRA (see sizes.ladder).

    TinyLoRA of these many numbers, and LoRA of rank 1 on so many layers, evenly spaced, and on one
    module of every layer.
    """

    tiny_rank: int = 4
    tiny_vectors: tuple[int, ...] = (16, 128, 1024)
    tiny_lrs: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    layers: tuple[int, ...] = (1, 3, 6, 9)
    modules: tuple[str, ...] = ("q_proj",)
    # Tasks with a LoRA of rank 1 on so many layers, in turn at each of sizes.PLACES.
    place_runs: tuple[tuple[str, int], ...] = (("kjv", 3), ("arithmetic", 3))
    # Tasks whose needed size is bracketed with every seed (see sizes.bracket_gains).
    seed_tasks: tuple[str, ...] = ()
    # Tasks whose size just short of it has other budgets of steps, too (see sizes.longer_gains).
    longer_tasks: tuple[str, ...] = ()
    # Tasks of which these sizes alone are trained yet, by their names.
    begun: tuple[tuple[str, tuple[str, ...]], ...] = ()


USUAL = ("rank 1 on 3 layers", "rank 1", "rank 8")
LADDER = LadderGrid(  # the paper's
    seed_tasks=(*PARTS, "mix"),
    longer_tasks=("pirate", "json", "kjv", "arithmetic", "sentiment", "code", "mix"),
    begun=(
        ("dates", ("TinyLoRA of 16", "TinyLoRA of 128", "TinyLoRA of 1,024", *USUAL)),
        ("sorting", ("rank 1 on 1 layer", "rank 1 on q_proj", *USUAL)),
    ),
)


@dataclass(frozen=True)
class MixGrid:
    """Mixes of some parts, each trained until its parts are learned (see diversity).

    Sizes are those a part: steps, held-out rows scored, and rows answered by free generation.
    """

    steps: int = 60
    eval_rows: int = 256
    generate_rows: int = 80
    # Ranks of LoRA on all layers (0: full fine-tuning), each at these rates: the mix's best two.
    lrs: tuple[tuple[int, tuple[float, ...]], ...] = (
        (0, (3e-5, 1e-4)),
        (1, (3e-4, 1e-3)),
        (8, (3e-4, 1e-3)),
    )
    # ... and those of the long mix at twice the steps: the ones that were not clearly worse.
    twice_lrs: tuple[tuple[int, tuple[float, ...]], ...] = (
        (0, (3e-5,)),
        (1, (3e-4,)),
        (8, (3e-4, 1e-3)),
    )
    # ... and those above them that the first of the nested mixes is tried at.
    higher_lrs: tuple[tuple[int, float], ...] = ((0, 3e-4), (1, 3e-3), (8, 3e-3))
    # Numbers of layers, evenly spaced, with a LoRA of rank 1, each at these rates, in mixes of at
    # most so many parts.
    sparse: tuple[tuple[int, tuple[float, ...]], ...] = ((1, (1e-3, 3e-3)), (3, (1e-3, 3e-3)))
    sparse_parts: int = 2
    orders: tuple[int, ...] = (0, 1, 2)  # in which parts are added at random ...
    counts: tuple[int, ...] = (1, 2, 4)  # ... to mixes of so many parts
    # Mixes, order and number of parts, that have a second seed, as the first part alone has.
    again: tuple[tuple[int, int], ...] = ((0, 4), (1, 4))

    def sizes(self, parts: int) -> dict[str, int]:
        """The fields of RunConfig that a mix of so many parts has; none of what is no mix."""
        fields = ("steps", "eval_rows", "generate_rows")
        return {field: parts * getattr(self, field) for field in fields} if parts else {}


@dataclass(frozen=True)
class HealGrid:
    """Cuts of full runs, and what heals them (see heals.heal_configs).

    The tasks' cuts at these ranks are healed for these steps on so many training rows, beside LoRA
    from nothing and LoRA trained at a wide rank and squeezed to a narrow one; each start takes its
    best rate.
    """

    tasks: tuple[str, ...] = ("facts", "sorbian", "json")
    ranks: tuple[int, ...] = (4, 8, 16)
    steps: tuple[int, ...] = (15, 30, 60)
    rows: int = 960
    squeezes: tuple[tuple[int, int], ...] = ((64, 8),)
    lrs: tuple[tuple[str, tuple[float, ...]], ...] = (
        ("cut", (1e-4, 3e-4, 1e-3, 3e-3)),
        ("nothing", (3e-5, 1e-4, 3e-4, 1e-3)),
        ("squeezed", (3e-5, 1e-4, 3e-4, 1e-3)),
    )


@dataclass(frozen=True)
class CodeGrid:
    """Codes learned by a few layers (see loads.code_configs).

    What is trained: no modules are all linear ones, rank 0 all parameters of the layers.  The loads
    are bits of codes a trained parameter, as far as codes are not more than `most`, or those that a
    size has of its own; `steps` are at most.  A size takes the best of these rates or of its own;
    rank 0 has others.
    """

    sizes: tuple[Size, ...] = (
        ((14,), ("down_proj",), 1),
        ((14,), (), 1),
        ((14,), (), 4),
        ((14, 15, 16, 17), (), 1),
        ((14, 15, 16, 17), (), 8),
        ((14,), (), 0),
    )
    digits: int = 6
    loads: tuple[float, ...] = (0.05, 0.2, 0.5, 1.0, 2.0, 5.0, 20.0)
    own_loads: tuple[tuple[Size, tuple[float, ...]], ...] = (
        (((14,), (), 0), (0.001, 0.01)),
        (((14, 15, 16, 17), (), 8), (0.05, 0.2)),
    )
    most: int = 5300
    steps: int = 4000
    lrs: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
    full_lrs: tuple[float, ...] = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)
    own_lrs: tuple[tuple[Size, tuple[float, ...]], ...] = ((((14, 15, 16, 17), (), 8), (1e-3,)),)
    seed_size: Size = ((14,), (), 1)  # that has all seeds ...
    seed_loads: tuple[float, ...] = (0.2, 1.0, 2.0, 5.0)  # ... at these loads
    longer_loads: tuple[float, ...] = (2.0, 5.0)  # at which it is trained once more ...
    longer: int = 4  # ... for so many times the steps


@dataclass(frozen=True)
class OptimizerGrid:
    """Tasks that other optimizers learn (see signatures), and rates of those that need their own.

    Full fine-tuning by each of `names`, and LoRA of a rank on some tasks by Muon.
    """

    tasks: tuple[str, ...] = ("facts", "sorbian", "kjv", "arithmetic")
    once: tuple[str, ...] = ("sorbian", "kjv")  # of these, those whose second seed is to come
    names: tuple[str, ...] = ("muon", "sign", "sgd_momentum")
    lora_tasks: tuple[str, ...] = ("facts", "sorbian")
    rank: int = 8
    lrs: tuple[tuple[str, tuple[float, ...]], ...] = (
        ("sgd_momentum", (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0, 30.0, 100.0)),
    )

    @property
    def again(self) -> tuple[str, ...]:
        """The tasks that have a second seed of each optimizer."""
        return tuple(task for task in self.tasks if task not in self.once)
