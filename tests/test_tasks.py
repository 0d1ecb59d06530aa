"""The committed task data: form, splits, leaks, and what each task promises."""

import hashlib
import json
import re
from collections import Counter

import pytest

import utils

TASKS = sorted(utils.TASKS)
SHARED = {"facts", "mix"}  # memorised on purpose; mix holds rows of facts


def rows_of(task):
    lines = (utils.TASK_FOLDER / f"{task}.jsonl").read_text(encoding="utf8").splitlines()
    return [json.loads(line) for line in lines]


def prompts(task, split):
    return {row["prompt"] for row in rows_of(task) if row["split"] == split}


def test_every_file_is_a_task_and_every_task_a_file():
    assert sorted(path.stem for path in utils.TASK_FOLDER.glob("*")) == TASKS


@pytest.mark.parametrize("task", TASKS)
def test_a_file_is_small(task):
    assert (utils.TASK_FOLDER / f"{task}.jsonl").stat().st_size <= 2e6


@pytest.mark.parametrize("task", TASKS)
def test_every_row_has_the_same_keys_and_a_one_line_answer(task):
    keys = {"split", "prompt", "answer"} | ({"task"} if task == "mix" else set())
    for row in rows_of(task):
        assert row.keys() == keys
        assert row["prompt"].strip()
        assert row["answer"].strip()
        assert len(row["answer"].splitlines()) == 1


@pytest.mark.parametrize("task", TASKS)
def test_a_task_has_its_splits(task):
    sizes = Counter(row["split"] for row in rows_of(task))
    expected = {"train", "valid", "test"} | ({"paraphrase"} if task == "facts" else set())
    assert sizes.keys() == expected
    assert sizes["train"] >= 700
    assert min(sizes.values()) >= 64


@pytest.mark.parametrize("task", TASKS)
def test_rows_fit_the_bytes_of_the_smoke_profile(task):
    longest = max(len(f"{row['prompt']}{row['answer']}\n".encode()) for row in rows_of(task))
    assert longest <= utils.PROFILES["smoke"].seq_len


@pytest.mark.parametrize("task", [task for task in TASKS if task not in SHARED])
@pytest.mark.parametrize("split", ["valid", "test"])
def test_held_out_prompts_are_not_in_train(task, split):
    assert not prompts(task, split) & prompts(task, "train")


@pytest.mark.parametrize("task", TASKS)
def test_valid_and_test_share_no_prompt(task):
    if task not in SHARED:
        assert not prompts(task, "valid") & prompts(task, "test")


def test_facts_are_tested_as_trained_and_in_unseen_words():
    trained = prompts("facts", "train")
    assert prompts("facts", "test") <= trained
    assert not prompts("facts", "paraphrase") & trained
    answers = {split: set() for split in ("train", "paraphrase")}
    for row in rows_of("facts"):
        answers.get(row["split"], set()).add(row["answer"])
    assert answers["paraphrase"] <= answers["train"]


def test_a_fact_has_one_answer():
    answers = {}
    for row in rows_of("facts"):
        assert answers.setdefault(row["prompt"], row["answer"]) == row["answer"]


def test_mix_has_equal_shares_of_rows_of_the_other_files():
    for split in ("train", "valid", "test"):
        counts = Counter(row["task"] for row in rows_of("mix") if row["split"] == split)
        assert counts.keys() == set(TASKS) - {"mix", "shuffled"}
        assert len(set(counts.values())) == 1
    sources = {
        (task, row["split"], row["prompt"], row["answer"])
        for task in TASKS
        for row in rows_of(task)
    }
    for row in rows_of("mix"):
        assert (row["task"], row["split"], row["prompt"], row["answer"]) in sources


def test_held_out_prompts_of_mix_are_not_in_its_train_except_facts():
    trained = prompts("mix", "train")
    held_out = [row for row in rows_of("mix") if row["split"] != "train" and row["task"] != "facts"]
    assert not [row for row in held_out if row["prompt"] in trained]


def test_shuffled_is_sentiment_with_half_of_its_train_labels_changed():
    labels, shuffled = (
        {(row["split"], row["prompt"]): row["answer"] for row in rows_of(task)}
        for task in ("sentiment", "shuffled")
    )
    assert labels.keys() == shuffled.keys()
    train = [(labels[row], shuffled[row]) for row in labels if row[0] == "train"]
    changed = sum(a != b for a, b in train) / len(train)
    assert changed == pytest.approx(0.5, abs=0.035)  # three standard errors of 2000 coins
    assert Counter(a for a, _ in train) == Counter(b for _, b in train)


@pytest.mark.parametrize("task", ["sentiment", "shuffled"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_the_two_sentiments_are_about_balanced(task, split):
    counts = Counter(row["answer"] for row in rows_of(task) if row["split"] == split)
    assert counts.keys() == {" positive", " negative"}
    assert min(counts.values()) >= 0.45 * sum(counts.values())


def test_arithmetic_is_right():
    for row in rows_of("arithmetic"):
        question = re.fullmatch(
            r"Compute (\d+) ([+-]) (\d+) ([+-]) (\d+)\.\nAnswer:", row["prompt"]
        )
        a, first, b, second, c = question.groups()
        signs = {"+": 1, "-": -1}
        step = int(a) + signs[first] * int(b)
        result = step + signs[second] * int(c)
        assert row["answer"] == f" {a} {first} {b} = {step}, {step} {second} {c} = {result}"


def test_json_answers_hold_the_values_of_their_prompt():
    for row in rows_of("json"):
        prompt = re.sub(r"(?<=\d),(?=\d{3})", "", row["prompt"])  # 30,528 -> 30528
        for value in json.loads(row["answer"]).values():
            parts = value if isinstance(value, list) else [value]
            assert parts
            assert all(str(part) in prompt for part in parts)


@pytest.mark.parametrize("task", TASKS)
def test_the_sizes_and_the_sha256_in_the_readme_are_those_of_the_file(task):
    line = re.search(rf"^\| {task} \|.*$", (utils.ROOT / "data/README.md").read_text(), re.M)[0]
    content = (utils.TASK_FOLDER / f"{task}.jsonl").read_bytes()
    assert hashlib.sha256(content).hexdigest() in line
    sizes = Counter(row["split"] for row in rows_of(task))
    splits = ["train", "valid", "test"] + (["paraphrase"] if task == "facts" else [])
    assert f"| {'/'.join(str(sizes[split]) for split in splits)} |" in line
