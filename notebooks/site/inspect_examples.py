"""The examples of the gallery: python notebooks/site/inspect_examples.py OUT.

Three runs of the report, written as checkpoints (trained again where the cache has lost them), are
inspected by the command, in a folder that holds nothing else; OUT keeps what it wrote with --json.
"""

import dataclasses
import subprocess
import sys
import tempfile
from pathlib import Path

from safetensors.torch import load_file

from deltarank.runtime import cache_folder
from deltarank.study.configs import RunConfig
from deltarank.study.measuring import delta_file
from deltarank.study.profiles import PROFILES, base_of
from deltarank.study.runs import save_model, updates
from deltarank.study.training import plant, prepare

config = PROFILES["paper"].config
BASE = "gemma-3-270m"
EXAMPLES = {  # name of the JSON: folder of the checkpoint, its run, more options of the command
    "facts": ("gemma-facts", config("facts", lr=1.7e-4), ("--task", "facts")),
    "mix": ("gemma-mix", config("production", lr=3e-5), ()),
    "lora": ("gemma-mix-lora", config("production", "lora", rank=8, lr=1e-3), ()),
}


def save_adapter(run: RunConfig, folder: Path) -> None:
    """Write the LoRA of a run as PEFT does."""
    updates(run)  # trained again if need be
    kept = load_file(delta_file(run))
    model = prepare(dataclasses.replace(run, compile=False))
    plant(model, lambda name: (kept[f"{name}.B"], kept[f"{name}.A"]))  # B is times the scale
    model.save_pretrained(folder)


def inspect(name: str, out: Path) -> None:
    """Write the checkpoints of an example, and what the command says of them as OUT/name.json."""
    tuned, run, options = EXAMPLES[name]
    folders = [tuned] if run.method == "lora" else [BASE, tuned]
    with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
        for folder in folders:
            save = save_adapter if run.method == "lora" else save_model
            save(base_of(run) if folder == BASE else run, Path(scratch) / folder)
        file = out.resolve() / f"{name}.json"
        command = ["inspect", *folders, *options, "--json", str(file)]
        print("deltarank", *command[:-1], file.name, flush=True)
        main = "from deltarank.cli import main; raise SystemExit(main())"
        subprocess.run([sys.executable, "-c", main, *command], cwd=scratch, check=True)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    for example in sys.argv[2:] or EXAMPLES:
        inspect(example, target)
