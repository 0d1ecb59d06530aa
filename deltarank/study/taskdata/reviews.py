"""Reviews: the snippets with human ratings of Hutto and Gilbert (2014), and task `sentiment`."""

from __future__ import annotations

import random
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from deltarank.runtime import cache_folder
from deltarank.study.taskdata.rules import distinct, fits, make_row, split, tidy

VERSION = "3.3.2"  # of vaderSentiment, whose source archive alone holds the ratings
CLEAR = 1.5  # mean rating, of -4 to 4, from which a snippet counts as clear, either way
SIZES = {"train": 2000, "valid": 128, "test": 256}  # rows


def source_archive() -> Path:
    """The source archive of vaderSentiment, downloaded into the cache when it is missing."""
    path = cache_folder() / f"vaderSentiment-{VERSION}.tar.gz"
    if not path.exists():
        download = f"-m pip download -q --no-deps --no-binary :all: vaderSentiment=={VERSION} -d"
        subprocess.run([sys.executable, *download.split(), path.parent], check=True)
    return path


def member(archive: tarfile.TarFile, path: str) -> IO[bytes]:
    """A file of an archive; raises KeyError when it is missing."""
    file = archive.extractfile(path)
    assert file is not None, f"{path} is a folder"
    return file


def review_snippets(name: str) -> Iterator[tuple[str, float, str]]:
    """Yield (id, mean human rating, text) of the "movie" or the "amazon" snippets."""
    inner = f"vaderSentiment-{VERSION}/additional_resources/hutto_ICWSM_2014.tar.gz"
    path = f"hutto_ICWSM_2014/{name}ReviewSnippets_GroundTruth.txt"
    with (
        tarfile.open(source_archive()) as outer,
        tarfile.open(fileobj=member(outer, inner)) as archive,
    ):
        text = member(archive, path).read().decode()
    for line in text.splitlines():
        number, rating, snippet = line.split("\t")
        yield number, float(rating), tidy(re.sub(" {3,}", " - ", snippet))


def build_sentiment() -> list[dict]:
    """Film-review snippet -> positive or negative, in equal shares.

    The ids name neither film nor review, so ten neighbouring snippets are a group.
    """
    rows: dict[str, list[dict]] = {"positive": [], "negative": []}
    for number, rating, text in review_snippets("movie"):
        if abs(rating) >= CLEAR and not re.search("[`*=½]|Retard", text):
            label = "positive" if rating > 0 else "negative"
            prompt, block = f"Review: {text}\nSentiment:", int(number) // 10
            rows[label].append(make_row(prompt, f" {label}", block))
    found = filter(fits, distinct(rows["positive"] + rows["negative"], "prompt"))
    return balanced(split(found, n_train=10**9, n_valid=500, n_test=1000))


def balanced(rows: Sequence[dict]) -> list[dict]:
    """The first rows of each split, with equal numbers of both answers, shuffled by seed."""
    picked = []
    for name, size in SIZES.items():
        for label in (" positive", " negative"):
            same = [r for r in rows if (r["split"], r["answer"]) == (name, label)]
            picked += same[: size // 2]
    return random.Random(0).sample(picked, len(picked))
