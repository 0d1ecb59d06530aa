"""The command `deltarank`: inspect checkpoints or an adapter, extract an adapter, plan one."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import io
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deltarank.options import EXTRA, parse, rule

if TYPE_CHECKING:  # what the command needs is imported when it is at work
    from deltarank.page import Inspection

CUT_RANKS = (4, 16, 64)  # the cuts that are scored when a task is given
SCORES = ("transformers", "sacrebleu")  # the packages by which a task is scored ...
TRAINS = ("transformers", "accelerate", "peft")  # ... and an adapter trained
FORM = ("dtype", "patterns", "allow_pickle")  # what both kinds of extraction take


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, 2 for bad input (named in one line on stderr), 130 for Ctrl-C.

    What ends a job (SIGTERM) or a terminal (SIGHUP) ends it as Ctrl-C does: nothing half-written is
    left.
    """
    arguments = parse(argv)
    for stream in (sys.stdout, sys.stderr):  # none fails for a sign that it cannot show
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    interrupted = _interruptible()
    try:
        {"inspect": _inspect, "extract": _extract, "plan": _plan}[arguments.command](arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return _interrupted(arguments)
    except BrokenPipeError:  # `deltarank inspect ... | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except ImportError as error:
        return _failed(f"{error}: {EXTRA}", 2)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        if interrupted:
            return _interrupted(arguments)
        return _failed(str(error).replace("pass allow_pickle=True", "give --allow-pickle"), 2)
    return 0


def _interruptible() -> list[int]:
    """Have what ends the command raise KeyboardInterrupt; returns the signals that came, a list.

    What reads tensors may turn the exception into one of its own.
    """
    came: list[int] = []

    def interrupt(number: int, _) -> None:
        came.append(number)
        raise KeyboardInterrupt

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP, and nohup ignores it
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, interrupt)
    return came


def _interrupted(arguments: argparse.Namespace) -> int:
    """Say that it was interrupted, and what is left; returns the exit status."""
    kept = "what was measured is kept: the same command goes on"
    told = kept if _keeps(arguments) else "nothing was written"
    return _failed(f"interrupted; {told}", 130)


def _keeps(arguments: argparse.Namespace) -> bool:
    """Whether the command measures two checkpoints matrix by matrix, each of which it keeps."""
    if arguments.command == "inspect":
        return len(arguments.paths) == 2
    whole = arguments.command == "extract" and len(arguments.paths) == 3
    return whole and arguments.rank is None and not arguments.heal


def _failed(message: str, status: int) -> int:
    """Say in one line on stderr what is wrong; returns the exit status."""
    line = (message.strip().splitlines() or ["failed"])[0]
    print(f"deltarank: {line}", file=sys.stderr)
    return status


@contextlib.contextmanager
def _one_line_warnings() -> Iterator[list[warnings.WarningMessage]]:
    """Yield what is warned of; said at the end, a line each, unless an error says it all."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield caught
    for line in _lines(caught):
        print(f"deltarank: warning: {line}", file=sys.stderr)


def _lines(caught: list[warnings.WarningMessage]) -> tuple[str, ...]:
    """The warnings for users, each once, by their first lines."""
    texts = [str(w.message).strip() for w in caught if w.category is UserWarning]
    return tuple(dict.fromkeys(text.splitlines()[0] for text in texts if text))


def _inspect(arguments: argparse.Namespace) -> None:
    """Measure a pair or an adapter; write the page and the numbers; print verdict and table."""
    read = [*arguments.paths, *filter(None, [arguments.task])]
    html, numbers = (_writable(path, read) for path in (arguments.html, arguments.json))
    if html and html == numbers:
        raise ValueError(f"--html and --json both name {arguments.html}: give two files")
    from deltarank.page import Inspection, as_text
    from deltarank.ranks import changed_matrices, recommend_ranks

    paths, ranks_by = arguments.paths, rule(arguments)
    with _one_line_warnings() as caught:
        if arguments.task:
            _require_task(arguments)
        table = _table(paths, ranks_by, arguments.allow_pickle)
        lora = None if changed_matrices(table).empty else recommend_ranks(table, **ranks_by)
        base = paths[0] if len(paths) == 2 else None
        found = Inspection(
            base,
            paths[-1],
            ranks_by,
            table,
            lora,
            warnings=_lines(caught),
            allow_pickle=arguments.allow_pickle,
        )
        _write(found, html, numbers)
        try:
            if arguments.task:
                losses = _losses(arguments, table, lora)
                found = dataclasses.replace(found, losses=losses, warnings=_lines(caught))
                _write(found, html, numbers)
        finally:  # a model that cannot be scored does not lose what was measured
            print(as_text(found))
    for path in filter(None, (html, numbers)):
        print(f"Written: {path}")


def _write(found: Inspection, html: Path | None, numbers: Path | None) -> None:
    """Write the page and the numbers, those that are asked for."""
    from deltarank.page import as_html, as_json
    from deltarank.store import replace_text

    for path, text in ((html, as_html), (numbers, as_json)):
        if path:
            replace_text(path, text(found))


def _table(paths: list[str], ranks_by: dict, allow_pickle: bool):
    """The table of an adapter, or of a pair for which the rule gives something."""
    if len(paths) == 1:
        from deltarank.lora import open_lora

        lora = open_lora(paths[0], allow_pickle=allow_pickle)
        lora.require_rule(**ranks_by)
        return lora.spectra()
    from deltarank.alignment import open_pair
    from deltarank.compare import compare_pair, matrix_kind
    from deltarank.ranks import require_rule

    pair = open_pair(*paths, allow_pickle=allow_pickle)
    kinds = {label: matrix_kind(label, name) for label, (name, _) in pair.matrices().items()}
    shapes = [pair.shape(label) for label, kind in kinds.items() if kind == "matrix"]
    if shapes:
        require_rule(map(min, shapes), shapes, **ranks_by)
    return compare_pair(pair)


def _require_task(arguments: argparse.Namespace) -> None:
    """Refuse, before any work, a task that cannot be scored."""
    if len(arguments.paths) == 1:
        raise ValueError("--task needs BASE and TUNED: merge the adapter (merge_and_unload) first")
    if arguments.allow_pickle:
        raise ValueError("--task runs both models, from safetensors: leave --allow-pickle out")
    _require_packages("--task", SCORES)
    from deltarank.alignment import open_pair
    from deltarank.study.models import load_tokenizer, require_memory, require_short
    from deltarank.study.tasks import encode, load_split

    rows, tokenizer = load_split(arguments.task, "test"), load_tokenizer(arguments.paths[0])
    open_pair(*arguments.paths).require_same_vocabulary("leave --task out")
    lengths = [len(encode(row, tokenizer)["labels"]) for row in rows]
    require_short(arguments.paths[0], lengths, [row["prompt"] for row in rows])
    require_memory(arguments.paths[0], models=2, cure="leave --task out")


def _losses(arguments: argparse.Namespace, table, lora: dict | None):
    """What the task loses at CUT_RANKS and at the ranks that are recommended, as of score_pair."""
    from deltarank.ranks import changed_matrices, ranks_of
    from deltarank.study.cuts import score_pair

    possible = [r for r in CUT_RANKS if r <= table["min_dim"].max()]
    own = ranks_of(lora, changed_matrices(table)["name"]) if lora else None
    base, tuned = arguments.paths
    return score_pair(base, tuned, arguments.task, possible, by_matrix=own)


def _extract(arguments: argparse.Namespace) -> None:
    """Write the adapter; print what it holds, what was left out, and how to load it."""
    *paths, out = arguments.paths
    if arguments.norms and len(paths) == 1:
        raise ValueError("--norms needs BASE and TUNED: an adapter does not tell which changed")
    _require_healing(arguments)
    options = {name: getattr(arguments, name) for name in FORM} | rule(arguments)
    from deltarank.adapters import extract_adapter
    from deltarank.shrink import shrink_adapter
    from deltarank.summary import summary

    folder = Path(out).expanduser()
    replaced = folder.is_dir() and any(folder.iterdir())
    with _one_line_warnings():
        if len(paths) == 1:
            report = shrink_adapter(paths[0], out, **options)
        elif arguments.heal:
            report = _healed(arguments)
        else:
            base, tuned = paths
            report = extract_adapter(base, tuned, out, norms=arguments.norms, **options)
    print(summary(folder, report, arguments.dtype))
    if replaced:
        print("It replaced the adapter that was there.")


def _require_healing(arguments: argparse.Namespace) -> None:
    """Refuse, before any work, options that do not go with healing."""
    if not arguments.heal:
        for name in ("steps", "lr"):
            if getattr(arguments, name) is not None:
                raise ValueError(f"--{name} needs --heal: say which prompts to heal on")
        return
    if len(arguments.paths) == 2:
        raise ValueError("--heal needs BASE and TUNED: the tuned model says what is to be answered")
    if arguments.norms:
        raise ValueError("--heal trains factors alone: leave --norms out")
    if arguments.allow_pickle:
        raise ValueError("--heal runs both models, from safetensors: leave --allow-pickle out")
    _require_packages("--heal", TRAINS)


def _healed(arguments: argparse.Namespace):
    """The report of the cut that was healed and written."""
    from deltarank.study.healing import extract_healed

    given = {name: getattr(arguments, name) for name in ("steps", "lr")}
    options = {name: value for name, value in given.items() if value is not None}
    options |= {name: getattr(arguments, name) for name in ("dtype", "patterns")}
    return extract_healed(*arguments.paths, rows=arguments.heal, rule=rule(arguments), **options)


def _plan(arguments: argparse.Namespace) -> None:
    """Measure rows on a base model, and print the rank that is enough for them."""
    _require_packages("plan", TRAINS)
    from deltarank.study.advice import advice

    with _one_line_warnings():
        told = advice(arguments.paths[0], arguments.model or "")
    print(told)


def _require_packages(what: str, packages: Sequence[str]) -> None:
    """Raise ImportError, before any work, where one of the packages is not installed."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"{what} needs {package}")


def _writable(name: str | None, read: Sequence[str]) -> Path | None:
    """The file to write to; raises OSError, before any work, where that is not possible.

    read: what is read: a file that is not replaced, or a folder of which none is but a page.
    """
    if not name:
        return None
    path, known = _resolved(name), {*map(_resolved, read)}
    inside = path.parent in known and path.suffix != ".html"
    if path.exists() and (inside or path in known):
        raise OSError(f"{name} cannot be written: it is a file of what is read; name another")
    if path.exists() and not path.is_file():
        raise OSError(f"{name} cannot be written: it is no file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{name} cannot be written: there is no folder {path.parent}")
    from deltarank.checks import require_writable

    require_writable(path.parent, name, cure="name another file")
    return path


def _resolved(name: str) -> Path:
    """Where a file or folder lies, whatever way leads there."""
    return Path(name).expanduser().resolve()
