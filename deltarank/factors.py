"""Factors as an adapter stores them: balanced, of one rank, in a type, and what rounding loses."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from deltarank.checks import all_finite, require
from deltarank.ranks import lora_arguments
from deltarank.runtime import by_core, progress

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PREFIX = "base_model.model."  # that PEFT has before the name of a module
Cut = tuple[Tensor, Tensor, dict[str, float]]  # B, A; squared_norm, kept and best of their update


@dataclass(frozen=True)
class Form:
    """How factors are stored; the default asks least of the program that serves.

    dtype: float32 is what PEFT itself writes, and rounds nothing that a cut has kept; programs
    that serve cast to their own type.  patterns: each matrix at its own rank, told by
    rank_pattern, which PEFT and vLLM read and llama.cpp does not: it scales by alpha over each
    own rank; else all at the largest, the smaller padded with zeros.
    """

    dtype: str = "float32"
    patterns: bool = False

    def __post_init__(self) -> None:
        require(self.dtype in DTYPES, f"dtype={self.dtype!r}: choose one of {', '.join(DTYPES)}")


@dataclass(frozen=True)
class Factors:
    """The factors of an adapter: of which modules, of which ranks, in which form."""

    shapes: dict[str, tuple[int, int]]  # (out, in) of the update of each module, by its name
    ranks: dict[str, int]  # in the order of the file
    form: Form

    def arguments(self) -> dict:
        """The arguments of LoraConfig that say where the factors go."""
        return lora_arguments(self.ranks, patterns=self.form.patterns)

    def stored_rank(self, module: str) -> int:
        """The rank that the factors of a module have in the file."""
        return self.ranks[module] if self.form.patterns else self._largest

    @functools.cached_property
    def _largest(self) -> int:
        return max(self.ranks.values())

    def layout(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Name in the adapter's file, type and shape of every factor, in the order of `tensors`."""
        found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for module in self.ranks:
            (rows, columns), r = self.shapes[module], self.stored_rank(module)
            for factor, shape in (("A", (r, columns)), ("B", (rows, r))):
                name = f"{PREFIX}{module}.lora_{factor}.weight"
                found[name] = DTYPES[self.form.dtype], shape
        return found

    def tensors(
        self, cut: Callable[[str], Cut], notes: dict[str, dict[str, float]]
    ) -> Iterator[Tensor]:
        """Yield A and B of every module as stored; note what they hold of its update.

        cut: module -> B (out, r), A (r, in), and its notes; what is noted also has `rounding`,
        the share of the squared update that the type loses, and `kept` is less by it.
        """

        def stored(module: str) -> Cut:
            B, A, note = cut(module)
            B, A, lost = self.stored(module, B, A)
            share = lost / note["squared_norm"]
            return B, A, note | {"kept": note["kept"] - share, "rounding": share}

        sizes = {module: math.prod(self.shapes[module]) for module in self.ranks}
        with progress(sum(sizes.values()), "extract adapter") as bar:
            found = by_core(stored, self.ranks)
            for module, (B, A, notes[module]) in zip(self.ranks, found, strict=True):
                yield A
                yield B
                bar.update(sizes[module])

    def report(
        self,
        notes: dict[str, dict[str, float]],
        names: dict[str, str],
        rest: dict[str, tuple[str, float]],
    ) -> pd.DataFrame:
        """The table of extract_adapter: what was noted of the modules, and what gets no factors.

        names: of the modules' weights; rest: {tensor: (part, |dW|^2)}.
        """
        rows = [
            {"name": names[module], "part": "lora", "rank": self.ranks[module]} | note
            for module, note in notes.items()
        ]
        for name, (part, norm) in rest.items():
            kept = float(part == "modules_to_save")
            row = {"name": name, "part": part, "rank": 0, "squared_norm": norm}
            rows.append(row | {"kept": kept, "best": kept, "rounding": 0.0})
        table = pd.DataFrame(rows)
        table.attrs["lora"] = self.arguments()
        return table

    def stored(self, module: str, B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, float]:
        """B and A in the form, and the squared norm of what rounding them loses of B @ A.

        Raises ValueError where an entry is beyond the type.
        """
        dtype, more = DTYPES[self.form.dtype], self.stored_rank(module) - len(A)
        B, A = balanced(B, A)
        rounded = B.to(dtype), A.to(dtype)
        require(
            all(map(all_finite, rounded)),
            f"{module}: its factors exceed the range of {self.form.dtype}: choose the dtype "
            "bfloat16 or float32",
        )
        lost = rounding_loss(B, A, *rounded) if dtype != B.dtype else 0.0
        return F.pad(rounded[0], (0, more)), F.pad(rounded[1], (0, 0, 0, more)), lost


def balanced(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """The same product of factors whose columns (of B) and rows (of A) have equal norms.

    For directions that are orthogonal both are sqrt(sigma) long.  bfloat16 rounds any scale alike
    (6e-6 of the squared update is lost); in float16 small entries lose their digits: of an update
    of 2048 x 1024 with sigma_1 = 1e-4 a B that holds all of sigma loses 1e-3, a balanced one 1e-7.

    >>> balanced(torch.tensor([[8.0], [0.0]]), torch.tensor([[0.0, 2.0]]))
    (tensor([[4.],
            [0.]]), tensor([[0., 4.]]))
    """
    of_B, of_A = (torch.linalg.vector_norm(X, dim=dim, dtype=torch.float64)
                  for X, dim in ((B, 0), (A, 1)))  # fmt: skip
    scale = torch.where((of_A > 0) & (of_B > 0), (of_A / of_B).sqrt(), 1)
    return (B * scale).to(B.dtype), (A / scale[:, None]).to(A.dtype)


def rounding_loss(B: Tensor, A: Tensor, B_rounded: Tensor, A_rounded: Tensor) -> float:
    """|B @ A - B_rounded @ A_rounded|^2 (Frobenius), without forming a product.

    The difference is (B - B_rounded) @ A + B_rounded @ (A - A_rounded), of rank 2 r.
    """
    B, A, B_rounded, A_rounded = (X.double() for X in (B, A, B_rounded, A_rounded))
    left = torch.cat([B - B_rounded, B_rounded], dim=1)  # (m, 2 r)
    right = torch.cat([A, A - A_rounded])  # (2 r, n)
    return float(((left.T @ left) * (right @ right.T)).sum().clamp_min(0))
