"""The command `deltarank`: inspect a pair of checkpoints, extract its adapter."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from deltarank import __version__

ENERGY = 0.9  # the rule for ranks where none is given
CUT_RANKS = (4, 16, 64)  # the cuts that are scored when a task is given
EXTRA = "pip install 'deltarank[study]'"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, 2 for bad input (named in one line on stderr), 130 for Ctrl-C."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return _failed("interrupted; what was measured is kept: the same command goes on", 130)
    except BrokenPipeError:  # `deltarank inspect ... | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except ImportError as error:
        return _failed(f"{error}: {EXTRA}", 2)
    except (ValueError, OSError) as error:
        return _failed(str(error).replace("pass allow_pickle=True", "give --allow-pickle"), 2)
    return 0


def _failed(message: str, status: int) -> int:
    """Say in one line on stderr what is wrong; returns the exit status."""
    line = (message.strip().splitlines() or ["failed"])[0]
    print(f"deltarank: {line}", file=sys.stderr)
    return status


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"deltarank: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    """The options of the command."""
    look = argparse.RawDescriptionHelpFormatter
    parser = _Parser(
        prog="deltarank",
        description="How low-rank is a fine-tune?  Spectra, ranks and adapters of two checkpoints.",
        epilog="example:\n  deltarank inspect base tuned --html page.html",
        formatter_class=look,
    )
    parser.add_argument("--version", action="version", version=f"deltarank {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    inspect = commands.add_parser(
        "inspect",
        help="say how low-rank the update is, where, and which ranks hold it",
        description="Say how low-rank TUNED - BASE is, where, and which ranks hold it.",
        epilog="example:\n  deltarank inspect base tuned --html page.html --energy 0.95",
        formatter_class=look,
    )
    inspect.set_defaults(run=_inspect)
    inspect.add_argument("--html", metavar="FILE", help="write one self-contained page")
    inspect.add_argument("--json", metavar="FILE", help="write all numbers, spectra included")
    inspect.add_argument(
        "--task",
        help="score what the cut loses: a task of the report, or a .jsonl file with a prompt and "
        f"an answer in each line (needs {EXTRA})",
    )
    extract = commands.add_parser(
        "extract",
        help="write the cut of the update as a PEFT adapter",
        description="Write the cut of TUNED - BASE as a PEFT adapter into the folder OUT; an "
        "adapter that is there is replaced.",
        epilog="example:\n  deltarank extract base tuned adapter --rank 16",
        formatter_class=look,
    )
    extract.set_defaults(run=_extract)
    for command in (inspect, extract):
        _add_pair(command)
    extract.add_argument("out", metavar="OUT", help="folder for the adapter")
    return parser


def _add_pair(parser: argparse.ArgumentParser) -> None:
    """The arguments of both commands: the pair, and one rule for the ranks."""
    parser.add_argument("base", metavar="BASE", help="folder or hub id of the base model")
    parser.add_argument("tuned", metavar="TUNED", help="folder or hub id of its full fine-tune")
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
        type=_count,
        metavar="N",
        help="this many parameters, spent where they keep most",
    )
    parser.add_argument(
        "--allow-pickle", action="store_true", help="read .bin files too, if you trust them"
    )


def _share(text: str) -> float:
    """A share above 0 and at most 1."""
    with contextlib.suppress(ValueError):
        if 0 < float(text) <= 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not above 0 and at most 1, such as 0.9")


def _count(text: str) -> int:
    """A whole number of at least 1."""
    with contextlib.suppress(ValueError):
        if int(text) >= 1:
            return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0, such as 16")


def _rule(arguments: argparse.Namespace) -> dict[str, Any]:
    """The rule for ranks, as recommend_ranks takes it."""
    given = {name: getattr(arguments, name) for name in ("energy", "rank", "budget")}
    return {name: value for name, value in given.items() if value is not None} or {"energy": ENERGY}


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
    """Measure a pair; write the page and the numbers; print verdict and table."""
    html, numbers = (_writable(path) for path in (arguments.html, arguments.json))
    if arguments.task:
        _require_task(arguments.task)
    from deltarank.compare import compare_checkpoints
    from deltarank.page import Inspection, as_html, as_json, as_text
    from deltarank.ranks import changed_matrices, recommend_ranks

    rule, pair = _rule(arguments), (arguments.base, arguments.tuned)
    with _one_line_warnings() as caught:
        table = compare_checkpoints(*pair, allow_pickle=arguments.allow_pickle)
        lora = None if changed_matrices(table).empty else recommend_ranks(table, **rule)
        losses = _losses(arguments, table) if arguments.task else None
        found = Inspection(*pair, rule, table, lora, losses, _lines(caught))
        for path, text in ((html, as_html), (numbers, as_json)):
            if path:
                _replace(path, text(found))
    print(as_text(found))
    for path in filter(None, (html, numbers)):
        print(f"Written: {path}")


def _require_task(task: str) -> None:
    """Refuse, before any work, a task that cannot be scored."""
    if importlib.util.find_spec("transformers") is None:
        raise ImportError("--task needs transformers")
    from deltarank.study.tasks import load_split

    load_split(task, "test")


def _losses(arguments: argparse.Namespace, table):
    """What the task loses at CUT_RANKS, as score_pair has it."""
    from deltarank.study.cuts import score_pair

    possible = [r for r in CUT_RANKS if r <= table["min_dim"].max()]
    return score_pair(arguments.base, arguments.tuned, arguments.task, possible)


def _extract(arguments: argparse.Namespace) -> None:
    """Write the adapter; print what it holds, what was dropped, and how to load it."""
    out = Path(arguments.out).expanduser()
    from deltarank.adapters import extract_adapter
    from deltarank.compare import compare_checkpoints
    from deltarank.ranks import recommend_ranks

    rule, base, tuned = _rule(arguments), arguments.base, arguments.tuned
    pickle = arguments.allow_pickle
    with _one_line_warnings():
        if "budget" in rule:
            table = compare_checkpoints(base, tuned, allow_pickle=pickle)
            rule = {"ranks": recommend_ranks(table, **rule)}
        report = extract_adapter(base, tuned, str(out), allow_pickle=pickle, **rule)
    print(_what_it_holds(out, report))


def _what_it_holds(out: Path, report) -> str:
    """The lines that extract prints."""
    from deltarank.ranks import percent

    total = report["squared_norm"].sum()
    lora, norms, dropped = (
        report[report["part"] == part] for part in ("lora", "modules_to_save", "dropped")
    )
    held = (report["squared_norm"] * report["kept"]).sum() / total
    size = sum(file.stat().st_size for file in out.iterdir()) / 1e6
    low, middle, high = lora["rank"].min(), lora["rank"].median(), lora["rank"].max()
    ranks = f"rank {low}" if low == high else f"rank {low} to {high} (median {middle:.0f})"
    lines = [
        f"{out} holds {len(lora)} matrices at {ranks} and {len(norms)} norms whole, {size:.1f} MB.",
        f"It keeps {percent(held)} of the squared update.",
        "Dropped: nothing.",
    ]
    if len(dropped):
        most = dropped.sort_values("squared_norm", ascending=False)["name"]
        lines[2] = (
            f"Dropped, since a LoRA cannot hold them: {', '.join(most[:3])}"
            f"{f' and {len(most) - 3} more' if len(most) > 3 else ''}, "
            f"{percent(dropped['squared_norm'].sum() / total)} of the squared update."
        )
    load = f"PeftModel.from_pretrained(base_model, {str(out)!r})"
    return "\n".join([*lines, f"Load it: model = {load}"])


def _writable(name: str | None) -> Path | None:
    """The file to write to; raises OSError, before any work, where that is not possible."""
    if not name:
        return None
    path = Path(name).expanduser().resolve()
    if path.exists() and not path.is_file():
        raise OSError(f"{name} cannot be written: it is no file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{name} cannot be written: there is no folder {path.parent}")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise OSError(f"{name} cannot be written: {error.strerror}") from error
    return path


def _replace(path: Path, text: str) -> None:
    """Write a file whole or not at all, in place of what was there."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_text(text, encoding="utf8")
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
