"""Sums: generated chains of sums and differences, and task `arithmetic`."""

from __future__ import annotations

import random

from deltarank.study.taskdata.rules import GENERATED, split_in_turn

LOW, HIGH = 2, 20  # the numbers, so small that a short fine-tune has a chance
STEPS = 2  # a chain


def problem(rng: random.Random) -> tuple[str, str]:
    """A random chain of sums and differences, never below zero: its text and its working.

    >>> problem(random.Random(1))
    ('6 + 20 - 4', '6 + 20 = 26, 26 - 4 = 22')
    """
    total = rng.randint(LOW, HIGH)
    text, worked = str(total), []
    for _ in range(STEPS):
        number = rng.randint(LOW, HIGH)
        sign = rng.choice("+-") if number <= total else "+"
        result = total + number if sign == "+" else total - number
        text += f" {sign} {number}"
        worked.append(f"{total} {sign} {number} = {result}")
        total = result
    return text, ", ".join(worked)


def build_arithmetic() -> list[dict]:
    """A chain of sums and differences -> its working; every problem occurs once."""
    rng = random.Random(0)
    problems: dict[str, str] = {}
    while len(problems) < sum(GENERATED.values()):
        text, worked = problem(rng)
        problems[text] = worked
    return split_in_turn(
        (f"Compute {text}.\nAnswer:", f" {worked}") for text, worked in problems.items()
    )
