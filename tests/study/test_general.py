"""General text: what is committed, how it is built, and the loss of it against the model's own."""

import ast
import json
import platform

import numpy as np
import pandas as pd
import pytest
import torch

from deltarank.study import general, taskdata
from deltarank.study.general import GENERAL, general_loss, general_text, word_loss
from deltarank.study.models import TINY, load_model, load_tokenizer
from deltarank.study.profiles import profile
from deltarank.study.taskdata.general import (
    PASSAGES,
    bare_code,
    build_general,
    passages,
)
from deltarank.study.taskdata.modules import PACKAGE
from deltarank.study.tasks import TASKS, load_task


def test_the_committed_sample_is_in_no_task():
    found = general_text()
    assert {kind: len(texts) for kind, texts in found.items()} == {
        "prose": PASSAGES,
        "code": PASSAGES,
    }
    whole = " ".join(" ".join(text for texts in found.values() for text in texts).split())
    tasks = [t for t in TASKS if t not in ("code", "sorting", "arithmetic")]
    rows = [row for task in tasks for part in load_task(task).values() for row in part]
    lines = {line.partition(": ")[2] for row in rows for line in row["prompt"].splitlines()}
    said = {" ".join(words.split()) for words in lines if len(words) > 30}
    assert len(said) > 5000 and not [words for words in said if words in whole]


def test_passages_are_whole_lines_up_to_the_last_that_fits(monkeypatch):
    monkeypatch.setattr(taskdata.general, "n_tokens", len)
    monkeypatch.setattr(taskdata.general, "TOKENS", 7)
    text = "one\ntwo\nthree\nfar too long\nfour\nfive\nrest"
    assert list(passages(text)) == ["one\ntwo", "three", "four", "five"]


@pytest.mark.slow
@pytest.mark.skipif(platform.python_version() != taskdata.PYTHON, reason="needs that Python")
def test_the_committed_sample_is_what_is_built():
    assert [json.loads(line) for line in GENERAL.read_text("utf8").splitlines()] == build_general()


def test_code_has_no_docstrings_and_is_of_no_task(monkeypatch):
    source = '"""Said."""\nx = 1\ndef f():\n    "said"\nclass A:\n    "said"\n    y = 2\n' * 20
    trees = [(name, ast.parse(source)) for name in ("json", f"{PACKAGE}.ttk")]
    monkeypatch.setattr(taskdata.general, "syntax_trees", lambda root: trees)
    monkeypatch.setattr(taskdata.general, "n_tokens", len)
    (code,) = bare_code()
    assert code.startswith("x = 1\n\ndef f():\n    pass\n\nclass A:\n    y = 2")


def test_a_model_of_word_frequencies_loses_the_entropy_of_the_tokens(monkeypatch):
    monkeypatch.setattr(general, "general_text", lambda: {"prose": ["a", "a a a"], "code": [""]})
    tokenizer = load_tokenizer(TINY)
    ids = [tokenizer(f"{text}\n", add_special_tokens=False)["input_ids"] for text in ("a", "a a a")]
    first = tokenizer.bos_token_id is None  # then the first token of a passage is not scored
    shares = pd.Series([token for row in ids for token in row[first:]]).value_counts(normalize=True)
    assert len(shares) > 1 and word_loss(TINY)["code"] == 0
    assert word_loss(TINY)["prose"] == pytest.approx(-(shares * np.log(shares)).sum())


def test_the_loss_is_the_models_own_over_all_tokens(monkeypatch):
    texts = {"prose": ["One line.\nAnd two.", "Short", "Three."], "code": ["x = 1"]}
    monkeypatch.setattr(general, "general_text", lambda: texts)
    config, model = profile().config("facts", "base", dtype="float32"), load_model(TINY)
    tokenizer, found = load_tokenizer(TINY), general_loss(model, config)
    for kind, given in texts.items():
        nats, count = 0.0, 0
        for text in given:
            start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
            ids = start + tokenizer(text + "\n", add_special_tokens=False)["input_ids"]
            ids = torch.tensor([ids])
            counted = ids.shape[1] - 1
            nats += counted * model(input_ids=ids, labels=ids).loss.item()
            count += counted
        assert found[kind] == pytest.approx(nats / count, rel=1e-5)


def test_the_sample_is_written_a_json_object_a_line(monkeypatch, tmp_path):
    rows = [{"kind": "prose", "text": "č\nb"}, {"kind": "code", "text": "x"}]
    monkeypatch.setattr(taskdata, "build_general", lambda: rows)
    monkeypatch.setattr(taskdata, "GENERAL", tmp_path / "general.jsonl")
    monkeypatch.setattr(general, "GENERAL", taskdata.write_general())
    assert general_text() == {"prose": ["č\nb"], "code": ["x"]}
