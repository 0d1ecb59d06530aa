"""make inspect: a page, a verdict and an adapter from two folders, by the command readers use."""

import os
import subprocess

import pytest
import torch
from bs4 import BeautifulSoup

import utils


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The tiny model and a copy whose matrices have a planted update."""
    home, model = tmp_path_factory.mktemp("models"), utils.load_model(utils.TINY)
    tokenizer = utils.load_tokenizer(utils.TINY)
    model.save_pretrained(home / "base")
    tokenizer.save_pretrained(home / "base")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in utils.matrices(model).values():
            m, n = weight.shape
            B, A = torch.randn(m, 2, generator=generator), torch.randn(2, n, generator=generator)
            weight += 0.01 * B @ A
    model.save_pretrained(home / "tuned")
    tokenizer.save_pretrained(home / "tuned")
    return home


def make_inspect(*arguments, build):
    environment = os.environ | {"BUILD": str(build), "PROGRESS": "off"}
    command = ["make", "-C", str(utils.ROOT), "inspect", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_two_folders_become_a_page_and_an_adapter(folders, tmp_path):
    own = tmp_path / "rows.jsonl"
    own.write_text('{"prompt": "1 + 1 =", "answer": " 2"}\n' * 3)
    arguments = [f"BASE={folders}/base", f"TUNED={folders}/tuned", f"TASK={own}"]
    done = make_inspect(*arguments, build=tmp_path / "build")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Of the squared update of 14 matrices rank 8 keeps 100%" in done.stdout
    page = tmp_path / "build" / "inspect" / "08_inspect_your_checkpoints.html"
    assert f"Open {page}" in done.stdout
    text = BeautifulSoup(page.read_text(), "html.parser").get_text()
    assert "LoraConfig(\n    r=2,\n    lora_alpha=2,\n    rank_pattern={},\n" in text
    assert "The same fine-tune, saved in bfloat16" not in text  # the report's own sections
    adapter = tmp_path / "build" / "inspect" / "adapter"
    assert (adapter / "adapter_model.safetensors").exists()
    assert str(adapter) in text


def test_without_folders_it_says_which_are_needed(tmp_path):
    done = make_inspect("BASE=only-one", build=tmp_path / "build")
    assert done.returncode and "make inspect BASE=" in done.stdout


def test_a_folder_that_is_not_there_is_named(folders, tmp_path):
    done = make_inspect(
        f"BASE={folders}/base", f"TUNED={folders}/nowhere", build=tmp_path / "build"
    )
    assert done.returncode and "nowhere' is unknown" in done.stdout + done.stderr
