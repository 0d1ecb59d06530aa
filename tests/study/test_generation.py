"""Free generation: room for the longest answer that is asked for, and no more than before."""

import json

import pytest

from deltarank.study import evaluation
from deltarank.study.evaluation import evaluate
from deltarank.study.models import TINY, load_model
from deltarank.study.profiles import profile
from deltarank.study.training import prepare, train

SEQ_LEN = 16  # bytes, so that 8 tokens are generated at least
SHORT = [" red", " blue"]
LONG = [" red and blue", " green rose"]  # 13 and 11 bytes


@pytest.fixture
def task(tmp_path):
    """A function that writes rewritings with these answers and returns a run of them."""

    def write(answers, **changes):
        rows = [{"prompt": f"{i}:", "answer": a, "task": "pirate"} for i, a in enumerate(answers)]
        path = tmp_path / "own.jsonl"
        lines = (row | {"split": split} for split in ("train", "test") for row in rows)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf8")
        sizes = {"batch_size": 2, "seq_len": SEQ_LEN, "generate_rows": 2, "dtype": "float32"}
        return profile().config(str(path), **(sizes | changes))

    return write


def rooms(monkeypatch, config):
    """The numbers of new tokens that evaluating the untrained model asks for."""
    asked = []

    def generate(model, config, prompts, *, max_new_tokens):
        asked.append(max_new_tokens)
        return [""] * len(prompts)

    monkeypatch.setattr(evaluation, "generate", generate)
    evaluate(load_model(TINY), config, "test")
    return asked


def test_a_long_answer_is_generated_to_its_end(task, store):
    config = task(LONG, steps=60, lr=1e-2)
    model = prepare(config)
    train(config, model)
    assert evaluate(model, config, "test")["row_score"] == [100.0, 100.0]


def test_there_is_room_for_the_longest_answer_asked_for(task, store, monkeypatch):
    assert rooms(monkeypatch, task([*SHORT, *LONG], generate_rows=4)) == [13]


def test_short_answers_have_the_room_that_they_had(task, store, monkeypatch):
    assert rooms(monkeypatch, task(SHORT)) == [SEQ_LEN // 2]
    assert rooms(monkeypatch, task([*SHORT, *LONG])) == [SEQ_LEN // 2]  # two rows are asked
