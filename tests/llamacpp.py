"""llama.cpp, built once from the source that PyPI has, and what it makes of a model and a LoRA."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from deltarank.runtime import ROOT

LLAMA_CPP = "llama-cpp-python==0.3.36"  # in an environment of its own; never a dependency
HOME = ROOT / "build" / "llama.cpp"
NO_COMMON = HOME / "no_common.cmake"  # the half of the source that the library does not need
OPTIONS = (
    "-DGGML_NATIVE=OFF -DGGML_OPENMP=OFF -DGGML_LLAMAFILE=OFF -DGGML_CPU_REPACK=OFF "
    "-DLLAVA_BUILD=OFF -DCMAKE_C_FLAGS_RELEASE=-O1 -DCMAKE_CXX_FLAGS_RELEASE=-O1 "
    f"-DCMAKE_PROJECT_INCLUDE={NO_COMMON}"
)
TESTS = Path(__file__).parent


def python():
    """The Python that has llama-cpp-python; built on first use, in two minutes of one core.

    Skips the test where it cannot be built.  A build that breaks is an error.
    """
    found, done = HOME / "venv" / "bin" / "python", HOME / "done.txt"
    if not done.exists() or done.read_text() != f"{LLAMA_CPP} {OPTIONS}":
        _build(found)
        done.write_text(f"{LLAMA_CPP} {OPTIONS}")
    return found


def sources():
    """The folder of llama.cpp itself, which has its converters."""
    return next(HOME.glob("llama_cpp_python-*/vendor/llama.cpp"))


def _build(target):
    """Download the source, unpack it, and install it into a virtual environment."""
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("llama.cpp cannot be built here: no C++ compiler (apt-get install g++)")
    shutil.rmtree(HOME, ignore_errors=True)
    HOME.mkdir(parents=True)
    pip = ["-m", "pip", "--disable-pip-version-check", "-q"]
    only_source = ["--no-deps", "--no-binary", "llama-cpp-python", "--retries", "1"]
    download = [sys.executable, *pip, "download", *only_source, "-d", HOME, LLAMA_CPP]
    done = subprocess.run(download, capture_output=True, text=True)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
        pytest.skip(f"llama.cpp cannot be built here: {LLAMA_CPP} was not downloaded: {why}")
    with tarfile.open(next(HOME.glob("*.tar.gz"))) as archive:
        archive.extractall(HOME, filter="data")
    NO_COMMON.write_text("set(LLAMA_BUILD_COMMON OFF)\n")
    subprocess.run([sys.executable, "-m", "venv", HOME / "venv"], check=True)
    jobs = {"CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count())}  # ninja's own takes more memory
    settings = jobs | os.environ | {"CMAKE_ARGS": OPTIONS}
    install = [target, *pip, "install", sources().parent.parent]
    subprocess.run(install, check=True, env=settings)


def convert(base, *adapters):
    """Convert a base model, and adapters of it, each folder to FOLDER.gguf in float32.

    By llama.cpp's own converters; raises RuntimeError with what they say where they stop.
    """
    _run([sys.executable, TESTS / "llamacpp_convert.py", sources(), base, *adapters])


def logits(base, adapter=None, *, tokens):
    """The logits of a converted base after every token, with a converted adapter if one is given.

    (token, entry of the vocabulary), in float64.
    """
    out = base.with_suffix(".npy")
    models = [folder.with_suffix(".gguf") for folder in (base, adapter) if folder]
    _run([python(), TESTS / "llamacpp_logits.py", json.dumps(tokens), out, *models])
    return torch.from_numpy(np.load(out)).double()


def _run(command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
