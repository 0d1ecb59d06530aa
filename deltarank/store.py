"""Stored results: whole entries or none."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from deltarank.checks import require, require_disk
from deltarank.runtime import cache_folder

LARGE = 1e6  # bytes of an entry from which on it is not kept in memory: runs have some 0.3 MB


def digest(record: dict) -> str:
    """The sha256 of a JSON-able record in canonical form."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """The sha256 of a file; read once as long as it stays as it is."""
    at = path.stat()
    return _sha256(path, at.st_ino, at.st_size, at.st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def _sha256(path: Path, *stamp: int) -> str:
    """The sha256 of a file that has this stamp."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def replace_text(path: Path, text: str) -> None:
    """Write a file whole or not at all, in place of what was there."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_text(text, encoding="utf8")
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def cached(
    folder: Path, compute: Callable[[], tuple[dict, dict[str, Tensor] | None]]
) -> tuple[dict, dict[str, Tensor]]:
    """Record and tensors of the entry at `folder`; computed and stored when it is missing.

    What is returned was read back, so that the first call and the next give the same.
    """
    entry = load_entry(folder)
    if entry is None:
        require_disk(folder.parent, 0.1)
        save_entry(folder, *compute())
        entry = load_entry(folder)
    assert entry is not None, f"{folder} was written a moment ago and cannot be read"
    return entry


def save_entry(folder: Path, record: dict, tensors: dict[str, Tensor] | None = None) -> None:
    """Write an entry whole or not at all: result.json with its own sha256, tensors.safetensors.

    The entry is built beside its place and renamed into it.  An intact entry that another
    process has put there meanwhile stays; a torn one is replaced.
    """
    from filelock import FileLock
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    require_disk(folder.parent, 0.1)
    cache_folder().mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".tmp-"))
    scratch.chmod(0o755)
    try:
        files = {}
        if tensors:
            save_file(tensors, scratch / "tensors.safetensors")
            (scratch / "tensors.safetensors").chmod(0o644)
            files["tensors.safetensors"] = file_sha256(scratch / "tensors.safetensors")
        record = record | {"files": files}
        record["sha256"] = digest(record)
        with open(scratch / "result.json", "w", encoding="utf8") as file:
            file.write(compact_json(record))
            file.flush()
            os.fsync(file.fileno())
        with FileLock(cache_folder() / "store.lock"):
            if load_entry(folder) is None:
                shutil.rmtree(folder, ignore_errors=True)
                os.rename(scratch, folder)
    except (OSError, SafetensorError) as error:
        cure = "make room, then run it again"
        raise OSError(f"{folder.name} could not be written: {error}; {cure}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def compact_json(record: dict) -> str:
    """JSON with one top-level field a line: light, and readable in a diff."""
    lines = (f"{json.dumps(k)}: {json.dumps(v, allow_nan=False)}" for k, v in record.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


def load_entry(folder: Path) -> tuple[dict, dict[str, Tensor]] | None:
    """Record and tensors of an intact entry; None if there is none; a torn one is named too.

    A small one is read and checked once as long as its files stay as they are: nothing in it is to
    be changed.
    """
    if not folder.exists():
        return None
    try:
        stamp = _stamp(folder)
        small = sum(size for _, _, size, _ in stamp) < LARGE
        record, tensors = (_remembered if small else _read_entry)(folder, stamp)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        warnings.warn(f"{folder.name} is torn or was edited: it is computed again", stacklevel=2)
        return None
    return dict(record), dict(tensors)


def _stamp(folder: Path) -> tuple:
    """What changes where a file of a folder does: names, places, sizes and times."""
    stats = ((file.name, file.stat()) for file in sorted(folder.iterdir()))
    return tuple((name, at.st_ino, at.st_size, at.st_mtime_ns) for name, at in stats)


def _read_entry(folder: Path, stamp: tuple) -> tuple[dict, dict[str, Tensor]]:
    """Record and tensors of an entry whose files have this stamp; ValueError where it is torn."""
    from safetensors.torch import load

    record = json.loads((folder / "result.json").read_text(encoding="utf8"))
    stated = record.pop("sha256")
    intact = stated == digest(record) and all(
        file_sha256(folder / name) == sha256 for name, sha256 in record["files"].items()
    )
    require(intact, f"{folder} is not intact")
    if not record["files"]:
        return record, {}
    # Not load_file, which makes a ValueError of Ctrl-C: the entry would count as torn.
    data = (folder / "tensors.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    tensors = load(data)  # in no order, unlike the file
    return record, {name: tensors[name] for name in header if name in tensors}


_remembered = functools.lru_cache(maxsize=2048)(_read_entry)  # a notebook asks for a run often
