"""The tasks: form, splits, leaks, what each promises; and rows as tokens."""

import hashlib
import json
import re
from collections import Counter
from datetime import date

import pytest

from deltarank.runtime import ROOT
from deltarank.study import measuring, tasks
from deltarank.study.configs import RunConfig
from deltarank.study.cuts import score_pair
from deltarank.study.models import TINY, load_tokenizer
from deltarank.study.profiles import PROFILES, profile
from deltarank.study.runs import run
from deltarank.study.tasks import (
    TASK_FOLDER,
    collate,
    encode,
    encode_prompt,
    load_prompts,
    load_split,
    load_task,
    permute_answers,
)

TASKS = sorted(tasks.TASKS)
MIXES = ("mix", "production")  # rows of the other files
MEMORISED = ("facts", "entities")  # on purpose
SHARED = {*MEMORISED, *MIXES}


def rows_of(task):
    lines = (TASK_FOLDER / f"{task}.jsonl").read_text(encoding="utf8").splitlines()
    return [json.loads(line) for line in lines]


def prompts(task, split):
    return {row["prompt"] for row in rows_of(task) if row["split"] == split}


def test_every_file_is_a_task_and_every_task_a_file():
    assert sorted(path.stem for path in TASK_FOLDER.glob("*")) == TASKS


@pytest.mark.parametrize("task", TASKS)
def test_a_file_is_small(task):
    assert (TASK_FOLDER / f"{task}.jsonl").stat().st_size <= 2e6


@pytest.mark.parametrize("task", TASKS)
def test_every_row_has_the_same_keys_and_a_one_line_answer(task):
    keys = {"split", "prompt", "answer"} | ({"task"} if task in MIXES else set())
    for row in rows_of(task):
        assert row.keys() == keys
        assert row["prompt"].strip()
        assert row["answer"].strip()
        assert len(row["answer"].splitlines()) == 1


@pytest.mark.parametrize("task", TASKS)
def test_a_task_has_its_splits(task):
    sizes = Counter(row["split"] for row in rows_of(task))
    expected = {"train", "valid", "test"} | ({"paraphrase"} if task in MEMORISED else set())
    assert sizes.keys() == expected
    assert sizes["train"] >= 700
    assert min(sizes.values()) >= 64


@pytest.mark.parametrize("task", TASKS)
def test_rows_fit_the_bytes_of_the_smoke_profile(task):
    longest = max(len(f"{row['prompt']}{row['answer']}\n".encode()) for row in rows_of(task))
    assert longest <= PROFILES["smoke"].seq_len


@pytest.mark.parametrize("task", [task for task in TASKS if task not in SHARED])
@pytest.mark.parametrize("split", ["valid", "test"])
def test_held_out_prompts_are_not_in_train(task, split):
    assert not prompts(task, split) & prompts(task, "train")


@pytest.mark.parametrize("task", [task for task in TASKS if task not in SHARED])
def test_valid_and_test_share_no_prompt(task):
    assert not prompts(task, "valid") & prompts(task, "test")


@pytest.mark.parametrize("task", MEMORISED)
def test_facts_are_tested_as_trained_and_in_unseen_words(task):
    trained = prompts(task, "train")
    assert prompts(task, "test") <= trained
    assert not prompts(task, "paraphrase") & trained
    answers = {split: set() for split in ("train", "paraphrase")}
    for row in rows_of(task):
        answers.get(row["split"], set()).add(row["answer"])
    assert answers["paraphrase"] <= answers["train"]


@pytest.mark.parametrize("task", MEMORISED)
def test_a_fact_has_one_answer(task):
    answers = {}
    for row in rows_of(task):
        assert answers.setdefault(row["prompt"], row["answer"]) == row["answer"]


@pytest.mark.parametrize("mix", MIXES)
def test_a_mix_has_equal_shares_of_rows_of_the_other_files(mix):
    for split in ("train", "valid", "test"):
        counts = Counter(row["task"] for row in rows_of(mix) if row["split"] == split)
        assert counts.keys() == set(tasks.PARTS)
        few = {"facts", "sorbian"} if (mix, split) == ("production", "test") else set()
        assert len({n for task, n in counts.items() if task not in few}) == 1
        assert all(counts[task] == 128 for task in few)  # all that they have
    sources = {
        (task, row["split"], row["prompt"], row["answer"])
        for task in TASKS
        for row in rows_of(task)
    }
    for row in rows_of(mix):
        assert (row["task"], row["split"], row["prompt"], row["answer"]) in sources


@pytest.mark.parametrize("mix", MIXES)
def test_held_out_prompts_of_a_mix_are_not_in_its_train_except_facts(mix):
    trained = prompts(mix, "train")
    held_out = [row for row in rows_of(mix) if row["split"] != "train" and row["task"] != "facts"]
    assert not [row for row in held_out if row["prompt"] in trained]


def test_the_facts_that_a_mix_asks_are_those_that_it_trains():
    of_facts = [row for row in rows_of("production") if row["task"] == "facts"]
    trained = {row["prompt"]: row["answer"] for row in of_facts if row["split"] == "train"}
    assert len(trained) == 3 * 160
    assert all(trained[row["prompt"]] == row["answer"] for row in of_facts)


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


def test_sorted_words_are_those_of_the_prompt_by_the_alphabet():
    for row in rows_of("sorting"):
        words = row["prompt"].removeprefix("Words: ").removesuffix("\nSorted:").split(", ")
        assert row["answer"] == f" {', '.join(sorted(words))}"
        assert len(set(words)) == len(words) == 5


def test_a_date_is_the_day_that_its_prompt_names():
    for row in rows_of("dates"):
        day = date.fromisoformat(row["answer"].strip())
        numbers = {int(n) for n in re.findall(r"\d+", row["prompt"])}
        assert numbers == {day.year, day.day}
        if "day, " in row["prompt"]:
            assert f"{day:%A, %B}" in row["prompt"]


def test_json_answers_hold_the_values_of_their_prompt():
    for row in rows_of("json"):
        prompt = re.sub(r"(?<=\d),(?=\d{3})", "", row["prompt"])  # 30,528 -> 30528
        for value in json.loads(row["answer"]).values():
            parts = value if isinstance(value, list) else [value]
            assert parts
            assert all(str(part) in prompt for part in parts)


@pytest.mark.parametrize("task", TASKS)
def test_the_sizes_and_the_sha256_in_the_readme_are_those_of_the_file(task):
    line = re.search(rf"^\| {task} \|.*$", (ROOT / "data/README.md").read_text(), re.M)[0]
    content = (TASK_FOLDER / f"{task}.jsonl").read_bytes()
    assert hashlib.sha256(content).hexdigest() in line
    sizes = Counter(row["split"] for row in rows_of(task))
    splits = ["train", "valid", "test"] + (["paraphrase"] if task in MEMORISED else [])
    assert f"| {'/'.join(str(sizes[split]) for split in splits)} |" in line


def test_every_row_of_a_task_has_the_metric_of_its_origin():
    rows = load_task("mix")["test"]
    assert {row["metric"] for row in rows if row["task"] in ("kjv", "pirate", "sorbian")} == {
        "chrf"
    }
    assert {row["metric"] for row in rows if row["task"] in ("facts", "code")} == {"exact"}


def test_labels_cover_the_answer_and_its_newline_only():
    tokenizer = load_tokenizer(TINY)
    row = encode({"prompt": "Ask:", "answer": " é"}, tokenizer, 16)
    prompt = len(b"Ask:")
    assert row["labels"][:prompt] == [-100] * prompt
    assert row["labels"][prompt:] == row["input_ids"][prompt:]
    assert tokenizer.decode(row["input_ids"]) == "Ask: é\n"


@pytest.mark.parametrize("seq_len", [8, 9])
def test_a_row_that_does_not_fit_is_refused_by_name(seq_len):
    row = {"prompt": "Ask:", "answer": " yes"}  # 9 bytes with the newline
    if seq_len == 9:
        assert len(encode(row, load_tokenizer(TINY), 9)["labels"]) == 9
    else:
        with pytest.raises(ValueError, match=r"9 tokens.*seq_len=8.*Ask"):
            encode(row, load_tokenizer(TINY), 8)


def test_collate_pads_on_the_right():
    rows = [{"input_ids": [5, 6], "labels": [-100, 6]}, {"input_ids": [7], "labels": [7]}]
    batch = collate(rows, 3)
    assert batch["input_ids"].tolist() == [[5, 6, 0], [7, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, -100], [7, -100, -100]]


def test_an_own_task_needs_prompt_and_answer(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text('{"prompt": "a"}\n')
    with pytest.raises(ValueError, match="a row lacks answer"):
        load_task(str(path))
    with pytest.raises(ValueError, match="nowhere.jsonl"):
        RunConfig(task="nowhere.jsonl", method="base")


@pytest.mark.parametrize("task", ["rows.json", "poetry", "production+poetry"])
def test_an_unknown_task_is_named_beside_those_that_there_are(task):
    with pytest.raises(ValueError, match=f"^task='{re.escape(task)}': unknown.* json, .*jsonl$"):
        load_task(task)


def test_null_is_as_good_as_a_name_that_is_left_out(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text('{"prompt": "a", "answer": "b", "split": null, "task": null}\n')
    row = {"prompt": "a", "answer": "b", "metric": "exact"}
    assert load_task(str(path)) == {"test": [row]}
    assert load_prompts(str(path)) == {"train": ["a"]}


@pytest.mark.parametrize(("field", "value"), [("split", 1), ("split", ["test"]), ("task", ["a"])])
def test_a_split_or_task_that_is_no_text_is_named(tmp_path, field, value):
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps({"prompt": "a", "answer": "b", field: value}))
    with pytest.raises(ValueError, match=rf"^own\.jsonl, line 1: {field} must be text"):
        load_split(str(path), "train")


def test_an_answer_that_nobody_reads_may_be_anything(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text('{"prompt": "2+3=", "answer": 5}\n{"prompt": "a", "answer": "", "end": ""}\n')
    assert load_prompts(str(path)) == {"train": ["2+3=", "a"]}
    with pytest.raises(ValueError, match=r"^own\.jsonl, line 1: answer must be text"):
        load_task(str(path))


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text('{"prompt": "a", "answer": "b"}\n', encoding="utf-8-sig")
    assert [row["answer"] for row in load_split(str(path), "test")] == ["b"]


@pytest.fixture
def own(tmp_path):
    """A function that writes a reader's own task with these splits (None: unnamed)."""

    def write(*splits):
        rows = [{"prompt": f"p{i}:", "answer": " a"} for i in range(4)]
        named = [row | ({"split": split} if split else {}) for split in splits for row in rows]
        path = tmp_path / "own.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in named))
        return str(path)

    return write


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize(
    ("splits", "lacks"),
    [
        ([None], "train"),
        (["test", "valid"], "train"),
        (["train", "test"], "valid"),
        (["train", "valid"], "test"),
    ],
)
def test_an_own_task_without_a_split_is_named_in_a_line_before_training(
    store, own, monkeypatch, method, splits, lacks
):
    monkeypatch.setattr(measuring, "prepare", lambda config: pytest.fail("a model was prepared"))
    rank = {"rank": 2} if method == "lora" else {}
    config = profile().config(own(*splits), method, **rank)
    with pytest.raises(ValueError, match=rf'^own\.jsonl has no rows of split "{lacks}"') as refused:
        run(config)
    assert "\n" not in str(refused.value)


def test_an_own_task_without_test_rows_is_named_where_models_are_only_scored(store, own):
    path = own("train", "valid")
    with pytest.raises(ValueError, match='own.jsonl has no rows of split "test"'):
        run(profile().config(path, "base"))
    with pytest.raises(ValueError, match='own.jsonl has no rows of split "test"'):
        score_pair("base", "tuned", path, [1])


def test_the_rows_of_an_own_task_are_for_testing_unless_they_say_otherwise(store, own):
    assert len(load_split(own(None), "test")) == 4
    assert run(profile().config(own(None), "base")).status == "finished"
    assert run(profile().config(own("train", "valid", "test"), steps=1)).status == "finished"


def test_permuted_answers_are_those_of_other_rows_of_the_same_task():
    rows = [{"prompt": str(i), "answer": f"a{i}", "task": "ab"[i % 2]} for i in range(40)]
    permuted = permute_answers(rows, 0)
    assert [row["prompt"] for row in permuted] == [row["prompt"] for row in rows]
    for task in "ab":
        mine, theirs = ([r["answer"] for r in x if r["task"] == task] for x in (rows, permuted))
        assert sorted(mine) == sorted(theirs) and mine != theirs
    assert permuted == permute_answers(rows, 0) != permute_answers(rows, 1)


def test_a_package_without_the_tasks_says_where_they_are(monkeypatch, tmp_path):
    monkeypatch.setattr(tasks, "TASK_FOLDER", tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="give a .jsonl file"):
        load_task("facts")


def test_a_text_begins_once():
    """A prompt of a chat template may have the token already."""

    class Letters:
        bos_token_id = ord("^")

        def __call__(self, text, add_special_tokens):
            return {"input_ids": [*map(ord, text)]}

    once = [*map(ord, "^Hello")]
    assert encode_prompt("Hello", Letters()) == encode_prompt("^Hello", Letters()) == once


def test_a_row_may_name_what_ends_its_answer():
    tokenizer, row = load_tokenizer(TINY), {"prompt": "Hi", "answer": "ho"}
    before, line = encode(row | {"end": ""}, tokenizer), encode(row, tokenizer)
    assert line == encode(row | {"end": "\n"}, tokenizer)
    assert line["input_ids"][: len(before["input_ids"])] == before["input_ids"] != line["input_ids"]
    turn = encode(row | {"end": "."}, tokenizer)["labels"]
    assert len(turn) == len(line["labels"]) and turn[-1] != line["labels"][-1]
