"""The options of the command: what they accept, and what their help says."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from deltarank import __version__

ENERGY = 0.9  # the rule for ranks where none is given
HEAL_STEPS, HEAL_RATE = 30, 1e-3
HEAL_BATCH = 16  # rows a step, as in the report's runs
HEAL_ROOM = 64  # tokens that an answer of the tuned model may have
PLAN_STEPS = 120  # of the training that measures bits
DTYPES = ("float32", "bfloat16", "float16")  # as factors.DTYPES, which needs torch, has them
EXTRA = "pip install '.[study]' in its folder"
PATHS = {  # of each command: how many there may be, and which
    "inspect": ((1, 2), "BASE TUNED | ADAPTER"),
    "extract": ((2, 3), "BASE TUNED OUT | ADAPTER OUT"),
    "plan": ((1,), "ROWS"),
}
NAMED = ("html", "json", "task", "heal", "model")  # options that name something to read or write
SAID: dict[str, dict[str, Any]] = {  # in the help of each command
    "inspect": {
        "usage": "deltarank inspect [options] BASE TUNED\n"
        "       deltarank inspect [options] ADAPTER",
        "help": "say how low-rank the update is, where, and which ranks hold it",
        "description": "Say how low-rank TUNED - BASE is, where, and which ranks hold it; or what "
        "of its rank a LoRA uses.",
        "epilog": "examples:\n  deltarank inspect base tuned --html page.html --energy 0.95\n"
        "  deltarank inspect adapter",
    },
    "extract": {
        "usage": "deltarank extract [options] BASE TUNED OUT\n"
        "       deltarank extract [options] ADAPTER OUT",
        "help": "write the cut of the update as a PEFT adapter",
        "description": "Write the cut of TUNED - BASE, or of a LoRA, as a PEFT adapter into the "
        "folder OUT; one that deltarank wrote there is replaced, another is not.",
        "epilog": "examples:\n  deltarank extract base tuned out --rank 16\n"
        "  deltarank extract adapter out --rank 8 --dtype bfloat16\n"
        "  deltarank extract base tuned out --rank 8 --heal rows.jsonl --steps 60",
    },
    "plan": {
        "usage": "deltarank plan [options] ROWS",
        "help": "say, before training, which rank rows need",
        "description": f"Train a small adapter on ROWS for {PLAN_STEPS} steps, measure the bits "
        f"that it learns, and say which rank is enough for them (needs {EXTRA}).",
        "epilog": "examples:\n  deltarank plan rows.jsonl --model my-base",
    },
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options given: command, paths (in their order, also around options) and the rest.

    Exits with status 2 and one line on stderr where they make no sense.
    """
    parser, commands = _parsers()
    arguments, more = parser.parse_known_args(argv)
    command = commands[arguments.command]
    options = [text for text in more if text.startswith("-")]
    if options:
        command.error(f"unrecognized arguments: {' '.join(options)}")
    arguments.paths += more
    counts, names = PATHS[arguments.command]
    if len(arguments.paths) not in counts:
        base = "; the base goes to --model" if arguments.command == "plan" else ""
        given = f"{len(arguments.paths)} given{base}"
        command.error(f"give {names.replace(' | ', ', or ')}; {given}")
    named = [(f"--{option}", getattr(arguments, option, None)) for option in NAMED]
    for what, name in [*named, *((names, path) for path in arguments.paths)]:
        if name is not None:
            _require_name(command, what, name)
    return arguments


def _require_name(command: argparse.ArgumentParser, what: str, name: str) -> None:
    """Refuse a name that is empty, as an unset variable of a shell is, or of a user's home."""
    if not name.strip():
        command.error(f"{what}: the name is empty")
    if name.startswith("~") and os.path.expanduser(name) == name:
        command.error(f"{what}: {name} is in the home of a user who is not here")


def rule(arguments: argparse.Namespace) -> dict[str, Any]:
    """The rule for ranks, as recommend_ranks takes it."""
    given = {name: getattr(arguments, name) for name in ("energy", "rank", "budget")}
    return {name: value for name, value in given.items() if value is not None} or {"energy": ENERGY}


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"deltarank: {message}; see {self.prog} --help\n")


def _parsers() -> tuple[_Parser, dict[str, _Parser]]:
    """The parser of the whole command, and that of each command by its name."""
    look = argparse.RawDescriptionHelpFormatter
    parser = _Parser(
        prog="deltarank",
        description="How low-rank is a fine-tune?  Spectra, ranks and adapters of two checkpoints, "
        "or of one adapter.",
        epilog="examples:\n  deltarank inspect base tuned --html page.html\n"
        "  deltarank inspect adapter",
        formatter_class=look,
    )
    parser.add_argument("--version", action="version", version=f"deltarank {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    found = {name: commands.add_parser(name, formatter_class=look, **SAID[name]) for name in SAID}
    for name in ("inspect", "extract"):
        _add_paths_and_rule(found[name], PATHS[name][1])
    _add_reports(found["inspect"])
    _add_form(found["extract"])
    _add_healing(found["extract"])
    _add_rows(found["plan"])
    return parser, found


def _add_reports(parser: argparse.ArgumentParser) -> None:
    """The options of inspect: what is written beside the terminal, and what is scored."""
    parser.add_argument("--html", metavar="FILE", help="write one self-contained page")
    parser.add_argument(
        "--json",
        metavar="FILE",
        help="write all numbers, spectra included; help(deltarank.compare.compare_checkpoints) in "
        "Python says what its fields are",
    )
    parser.add_argument(
        "--task",
        help="score what cuts lose, to one rank and to those recommended: a task of the report, or "
        "a .jsonl file with a prompt and an answer a line, as the model is to see them: no chat "
        'template is added; a newline ends an answer, or what the line names as "end" (needs BASE '
        f"and TUNED, and {EXTRA})",
    )


def _add_form(parser: argparse.ArgumentParser) -> None:
    """The options of extract: the form of the adapter."""
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default=DTYPES[0],
        help=f"type of the factors (default {DTYPES[0]}); what rounding loses is said",
    )
    parser.add_argument(
        "--patterns",
        action="store_true",
        help="store each matrix at its own rank, by rank_pattern, which llama.cpp mis-scales; "
        "otherwise zeros bring all to the largest, beyond a --budget",
    )
    parser.add_argument(
        "--norms",
        action="store_true",
        help="keep norms that changed whole, in modules_to_save, for PEFT alone",
    )


def _add_healing(parser: argparse.ArgumentParser) -> None:
    """The options of extract by which the cut is trained further."""
    parser.add_argument(
        "--heal",
        metavar="FILE",
        help="train the factors of the cut to answer as TUNED does; FILE is a .jsonl with a prompt "
        "in each line, as the model is to see it (no chat template is added); answers of up to "
        f"{HEAL_ROOM} tokens are learned, and none need be given (needs BASE and TUNED, and "
        f"{EXTRA})",
    )
    parser.add_argument(
        "--steps",
        type=_count,
        metavar="N",
        help=f"of healing, {HEAL_BATCH} prompts each (default {HEAL_STEPS})",
    )
    parser.add_argument(
        "--lr",
        type=_rate,
        metavar="RATE",
        help=f"learning rate of healing (default {HEAL_RATE:g})",
    )


def _add_paths_and_rule(parser: argparse.ArgumentParser, metavar: str) -> None:
    """The arguments of inspect and extract: what is read, and one rule for the ranks."""
    parser.add_argument(
        "paths",
        nargs="+",
        metavar=metavar,
        help="folders or hub ids: of a base model and its full fine-tune, or of a PEFT LoRA"
        + ("; OUT is the folder to write" if "OUT" in metavar else ""),
    )
    rules = parser.add_mutually_exclusive_group()
    rules.add_argument(
        "--energy",
        type=_share,
        metavar="SHARE",
        help=f"each matrix gets the rank that keeps this share above noise (default {ENERGY})",
    )
    rules.add_argument("--rank", type=_count, metavar="R", help="all matrices get this rank")
    rules.add_argument(
        "--budget",
        type=_numbers,
        metavar="N",
        help="this many parameters, spent where they keep most (without --patterns zeros add some)",
    )
    parser.add_argument(
        "--allow-pickle", action="store_true", help="read .bin files too, if you trust them"
    )


def _add_rows(parser: argparse.ArgumentParser) -> None:
    """The arguments of plan: what is read, and on which base."""
    parser.add_argument(
        "paths",
        nargs="+",
        metavar=PATHS["plan"][1],
        help="a .jsonl file with a prompt and an answer in each line, and a kind if there are "
        'several; of lines that name a split those of "train" are trained on and some of "test" '
        "held out, or else an eighth of all; a newline ends an answer, or what the line names as "
        '"end"; of facts to be known by heart give some lines twice, once as of "test"',
    )
    parser.add_argument(
        "--model", help="folder or hub id of the base (default: that of the report)"
    )


def _checked(kind: Callable, holds: Callable[[Any], bool], told: str) -> Callable[[str], Any]:
    """What reads a number for which `holds` is true; any other text is said to be `told`."""

    def read(text: str) -> Any:
        with contextlib.suppress(ValueError):
            if holds(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is {told}")

    return read


_share = _checked(float, lambda x: 0 < x <= 1, "not above 0 and at most 1, such as 0.9")
_rate = _checked(float, lambda x: 0 < x < math.inf, "not above 0, such as 0.001")
_count = _checked(int, lambda n: n >= 1, "no whole number above 0, such as 16")
_numbers = _checked(int, lambda n: n >= 1, "no whole number of parameters, such as 1000000")
