"""Small runs on disk and the oracle of their loss: what tests of the study share."""

import dataclasses

import torch
import torch.nn.functional as F

from deltarank.store import save_entry
from deltarank.study.models import TINY, load_tokenizer
from deltarank.study.profiles import entry_folder, profile
from deltarank.study.runs import run, save_model
from deltarank.study.tasks import collate, encode

Q = "model.layers.0.self_attn.q_proj.weight"
ROWS = [{"prompt": "Say it:", "answer": " yes"}, {"prompt": "And now the other:", "answer": " no"}]


def small(**changes):
    """A float32 run on the small task."""
    sizes = {"seq_len": 16, "batch_size": 4, "dtype": "float32", "eval_rows": 8}
    return profile().config("sentiment", **(sizes | changes))


def batch_of(rows, seq_len=32):
    """Rows as a padded batch of the tiny model's tokens."""
    tokenizer = load_tokenizer(TINY)
    return collate([encode(row, tokenizer, seq_len) for row in rows], seq_len)


def plain_loss(model, batch, dtype):
    """Cross-entropy over the logits of all positions, in float32."""
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        logits = model(input_ids=batch["input_ids"]).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch["labels"][:, 1:].flatten())


def three_methods():
    """Configurations of a full, a LoRA and a base run."""
    sizes, changes = profile(), {"steps": 2, "eval_rows": 4}
    return [
        sizes.config("sentiment", **changes),
        sizes.config("facts", "lora", rank=2, **changes),
        sizes.config("json", "base", eval_rows=4),
    ]


def saved_pair(folder):
    """Base and tuned folder of a small run of the smoke profile, and its configuration."""
    config = profile().config("facts", steps=4, lr=1e-2)
    run(config)
    for name, which in {"base": profile().config("facts", "base"), "tuned": config}.items():
        save_model(which, folder / name)
    return str(folder / "base"), str(folder / "tuned"), config


def same(first, second):
    """Whether two {name: tensor} agree in every bit."""
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def results_of(config):
    """The files of the stored run, by name."""
    return {path.name: path for path in entry_folder(config, "runs").iterdir()}


def flip(path, at):
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def with_spectra(result, spectra):
    """The result with these spectra in the store, as if they had been asked for."""
    save_entry(entry_folder(result.config, "spectra"), {"run": result.config.key}, spectra)
    shapes = {name: [len(S), len(S)] for name, S in spectra.items()}
    return dataclasses.replace(result, record={"shapes": shapes} | result.record)
