"""Refusals: one line that names the thing and the cure, before any work is done."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor


def require(condition: bool, message: str) -> None:
    """Raise ValueError(message) where the condition does not hold."""
    if not condition:
        raise ValueError(message)


def require_share(share: float) -> None:
    """Raise ValueError for a share that is not above 0 and at most 1."""
    require(0 < share <= 1, f"share={share}: must be above 0 and at most 1, such as 0.9")


def require_rows(file: str, fields: str) -> None:
    """Raise ValueError for what is no file of JSON lines, with these fields in each."""
    path, cure = Path(file).expanduser(), f"give a .jsonl file with {fields} in each line"
    require(not path.is_dir(), f"{file} is a folder: {cure}")
    require(path.is_file(), f"{file}: there is no such file")
    require(file.endswith(".jsonl"), f"{file}: {cure}")


def all_finite(X: Tensor) -> bool:
    """Whether no entry is NaN or infinite: the extremes tell, thirty times as fast as each."""
    return not X.numel() or all(math.isfinite(extreme) for extreme in X.aminmax())


def listed(names: Sequence[str], *, most: int = 3) -> str:
    """The first names, and how many more there are.

    >>> listed(["a", "b", "c"], most=2)
    'a, b and 1 more'
    """
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def counted(count: int, one: str, many: str = "") -> str:
    """How many there are of a thing, `many` being its plural where that is not one with an s.

    >>> counted(1, "step"), counted(2, "step"), counted(3, "matrix", "matrices")
    ('1 step', '2 steps', '3 matrices')
    """
    return f"{count} {one if count == 1 else many or f'{one}s'}"


def first_line(error: Exception) -> str:
    """What an error says, without the advice and traces that libraries append."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def require_writable(folder: Path, what: str, *, cure: str) -> None:
    """Raise OSError where no file can be made in a folder, into which `what` is to be written."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(f"{what} cannot be written ({error.strerror}): {cure}") from error


def require_disk(
    folder: Path, gigabytes: float, *, cure: str = "make room, or move the cache with LOWRANK_CACHE"
) -> None:
    """Raise OSError before any work when `folder` has no room for so much or is not writable."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{folder} cannot be written ({error.strerror}): {cure}") from error
    require_writable(folder, str(folder), cure=cure)
    free = shutil.disk_usage(folder).free / 1e9
    if free < gigabytes:
        told = f"{folder.name} has {free:.2g} GB free and needs {gigabytes:.2g} GB"
        raise OSError(f"{told}: {cure}")
