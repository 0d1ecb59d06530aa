"""The tasks: their rows, and rows as tokens."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from deltarank.checks import require, require_rows
from deltarank.runtime import ROOT
from deltarank.store import file_sha256

TASK_FOLDER = ROOT / "data" / "tasks"
IGNORED = -100  # the label of a token that no loss counts
BATCH = 32  # rows that pass through a model at once where it is not trained


@dataclass(frozen=True)
class Task:
    """A task's kind, the metric of its answers and the title that figures show."""

    kind: str
    metric: str  # "exact": greedy answer is right; "chrf": similarity of a rewriting
    title: str
    color: str  # apart under colour blindness and in grey, as tests/browser_figures.py checks
    marker: str

    @property
    def look(self) -> dict[str, str]:
        """Colour and marker, as ax.plot takes them."""
        return {"color": self.color, "marker": self.marker}


NEW = "#C1121F"  # tasks that the forecast is tested on: told apart by their markers
TASKS = {
    "pirate": Task("style: persona", "chrf", "pirate", "#A4A63B", "o"),
    "json": Task("style: format", "exact", "JSON", "#93523C", "s"),
    "kjv": Task("style: nuanced", "chrf", "King James", "#552903", "^"),
    "sentiment": Task("classification", "exact", "sentiment", "#2A36AE", "D"),
    "facts": Task("knowledge", "exact", "facts", "#3A9070", "v"),
    "arithmetic": Task("reasoning", "exact", "arithmetic", "#B77EB0", "P"),
    "sorbian": Task("language", "chrf", "Sorbian", "#A13FE6", "X"),
    "code": Task("code", "exact", "code", "#381A4B", "<"),
    "mix": Task("production mix", "by row", "mix", "#1B1B1B", "*"),
    "production": Task("production mix, longer", "by row", "long mix", "#1B1B1B", "*"),
    "shuffled": Task("control", "exact", "shuffled labels", "#555555", "h"),
    "danish": Task("language", "chrf", "Danish", NEW, "X"),
    "dates": Task("style: format", "exact", "dates", NEW, "s"),
    "entities": Task("knowledge", "exact", "entities", NEW, "v"),
    "sorting": Task("reasoning", "exact", "sorting", NEW, "P"),
    "naming": Task("code", "exact", "naming", NEW, "<"),
}

CHOICES = f"choose one of {', '.join(sorted(TASKS))}, production+json+facts or a file.jsonl"
PARTS = ("pirate", "json", "kjv", "sentiment", "facts", "arithmetic", "sorbian", "code")


def mix_of(parts: Iterable[str]) -> str:
    """The name of the mix of these parts: the long mix, without the rows of its other parts.

    >>> mix_of(["json", "facts"]), mix_of(PARTS)
    ('production+json+facts', 'production')
    """
    chosen = set(parts)
    name = "+".join(["production", *(part for part in PARTS if part in chosen)])
    return "production" if chosen == set(PARTS) else name


def mix_parts(task: str) -> tuple[str, ...]:
    """The parts of a mix that mix_of has named; () of another task.

    >>> mix_parts("production+json+facts"), mix_parts("production+facts+json"), mix_parts("json")
    (('json', 'facts'), (), ())
    """
    parts = PARTS if task == "production" else tuple(task.split("+")[1:])
    return parts if parts and mix_of(parts) == task else ()


def is_task(task: str) -> bool:
    """Whether this is a task of the report: one of TASKS, or a mix that mix_of has named."""
    return task in TASKS or bool(mix_parts(task))


def _task_file(task: str) -> Path:
    """The file of a task's rows; raises ValueError for an unknown task."""
    if task.endswith(".jsonl"):
        require_rows(task, "a prompt and an answer")
        return Path(task).expanduser()
    require(is_task(task), f"task={task!r}: unknown; {CHOICES}")
    path = TASK_FOLDER / f"{'production' if mix_parts(task) else task}.jsonl"
    if not path.exists():
        cure = "run 01_build_tasks.ipynb"
        if not TASK_FOLDER.is_dir():
            cure = "the report's tasks come with its repository alone: give a .jsonl file"
        raise FileNotFoundError(f"data/tasks/{path.name} is missing: {cure}")
    return path


def task_sha256(task: str) -> str:
    """The sha256 of a task's file."""
    return file_sha256(_task_file(task))


def load_task(task: str, *, unnamed: str = "test") -> dict[str, list[dict]]:
    """The rows of a task by split; each has prompt, answer and the metric of its answer.

    task: one of TASKS, a mix that mix_of has named, or a JSON-lines file with prompt and answer in
    each line, scored by exact match unless a row names one of TASKS; unnamed: the split of its rows
    that name none.
    """
    splits: dict[str, list[dict]] = {}
    parts = mix_parts(task)
    for row in _rows(_task_file(task), ("prompt", "answer")):
        if parts and row["task"] not in parts:
            continue
        known = TASKS.get(row.get("task", task))
        row["metric"] = known.metric if known else "exact"
        splits.setdefault(row.get("split", unnamed), []).append(row)
    return splits


def _rows(file: Path, fields: Sequence[str]) -> Iterator[dict]:
    """Yield the rows of a JSON-lines file, without what is null in them.

    Raises ValueError naming the line that lacks a field, in which what is to be text is none, or
    that is not UTF-8.
    """
    with open(file, encoding="utf-8-sig", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{file.name}, line {number}"
            cure = f"write a JSON object with {' and '.join(fields)} there"
            told = f"{where} holds what is no character, or half of one: save it as UTF-8"
            require(_is_text(line), told)
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{where} is no JSON: {cure}") from error
            require(isinstance(row, dict), f"{where} is no JSON object: {cure}")
            require(_is_text(row), told)
            row = {name: value for name, value in row.items() if value is not None}
            texts = {name: row.get(name, "") for name in ("split", "task", "end", *fields)}
            wrong = ", ".join(n for n, text in texts.items() if not isinstance(text, str))
            require(not wrong, f"{where}: {wrong} must be text")
            lacks = [n for n in fields if n not in row or (n == "prompt" and not row[n].strip())]
            asked = "answer" in fields and "answer" in row
            lacks += ["answer"] * (asked and not row["answer"] + row.get("end", "\n"))
            require(not lacks, f"{where}: a row lacks {', '.join(lacks)}: {cure}")
            yield row


def _is_text(found: dict | str) -> bool:
    """Whether a row or its line can be written as UTF-8: no stray byte, no lone surrogate."""
    try:
        json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def load_prompts(file: str) -> dict[str, list[str]]:
    """The prompts of a JSON-lines file by split; those of rows that name none are of "train".

    Answers are not needed.  Raises ValueError for another kind of file, one without rows, and a
    row without a prompt, naming its line.
    """
    require_rows(file, "a prompt")
    splits: dict[str, list[str]] = {}
    for row in _rows(Path(file).expanduser(), ("prompt",)):
        splits.setdefault(row.get("split", "train"), []).append(row["prompt"])
    require(bool(splits), f"{file} is empty: write a JSON object with a prompt in each line")
    return splits


def load_split(task: str, split: str) -> list[dict]:
    """The rows of one split of a task; raises ValueError naming split and file where it has none.

    A file's rows are its split "test" unless they name another.
    """
    splits = load_task(task)
    found = ", ".join(sorted(splits))
    require(
        split in splits,
        f'{_task_file(task).name} has no rows of split "{split}", only of {found}: '
        f'give some lines "split": "{split}"',
    )
    return splits[split]


def permute_answers(rows: Sequence[dict], seed: int) -> list[dict]:
    """The rows with their answers permuted at random: each keeps its form and loses its sense.

    In a mix, rows change answers only with rows of their own task.
    """
    generator = random.Random(seed)
    by_task: dict[str, list[dict]] = {}
    for row in rows:
        by_task.setdefault(row.get("task", ""), []).append(row)
    answers = {task: generator.sample(group, len(group)) for task, group in by_task.items()}
    return [row | {"answer": answers[row.get("task", "")].pop()["answer"]} for row in rows]


def show_row(row: dict) -> None:
    """Print a row of a task as a model reads it: the prompt, and after a bar the answer."""
    print(f"{row['prompt']} |{row['answer']}")


def encode_prompt(prompt: str, tokenizer) -> list[int]:
    """Token ids of a prompt, after the token that begins a text where the tokenizer has one.

    Once: a prompt of a chat template may begin with it.
    """
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return ids if start and ids[:1] == start else start + ids


def encode(row: dict, tokenizer, seq_len: int | None = None) -> dict[str, list[int]]:
    """Token ids of prompt, answer and what ends it, and the labels of the answer with its end.

    A newline ends an answer, or what the row names as its "end": none, or a model's end of turn.
    Both lists have one entry a token; prompt tokens carry the label IGNORED.
    Raises ValueError for a row that does not fit `seq_len` tokens, where that is given.
    """
    prompt = encode_prompt(row["prompt"], tokenizer)
    answer = tokenizer(row["answer"] + row.get("end", "\n"), add_special_tokens=False)["input_ids"]
    length = len(prompt) + len(answer)
    if seq_len is not None and length > seq_len:
        raise ValueError(
            f"a row has {length} tokens, more than seq_len={seq_len}: {row['prompt'][:60]!r}"
        )
    return answered(prompt, answer)


def answered(prompt: list[int], answer: list[int]) -> dict[str, list[int]]:
    """A row of token ids: its prompt and its answer, of which the latter alone counts in a loss.

    >>> answered([1, 2], [3])
    {'input_ids': [1, 2, 3], 'labels': [-100, -100, 3]}
    """
    return {"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer}


def answer_tokens(row: dict[str, list[int]]) -> int:
    """How many tokens of a row, as encode gives it, count in a loss."""
    return sum(label != IGNORED for label in row["labels"])


def batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yield the numbers of rows, BATCH at a time, the shortest first: alike rows need less padding.

    >>> list(batches([5, 3, 4]))
    [[1, 2, 0]]
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    for start in range(0, len(order), BATCH):
        yield order[start : start + BATCH]


def collate(rows: Sequence[dict], length: int) -> dict[str, Tensor]:
    """Rows padded on the right to `length`: a tensor (rows, length) of each of their lists.

    No attention mask is needed: attention is causal and padding comes last.
    """
    fill = {"labels": IGNORED}  # 0 in the others
    return {
        key: torch.tensor(
            [row[key] + [fill.get(key, 0)] * (length - len(row[key])) for row in rows]
        )
        for key in rows[0]
    }


def a_line_each(rows: Sequence[dict]) -> dict[str, Tensor]:
    """Rows padded to the longest: a tensor (rows, length) of each of their lists."""
    return collate(rows, max(len(row["labels"]) for row in rows))


def pack(rows: Sequence[dict]) -> dict[str, Tensor]:
    """Rows end to end, about four a line: their lists and position_ids, each (lines, length).

    Far less padding than with a line a row, and the same loss: positions start again at 0 in
    every row, by which most models of transformers keep attention within it (see losses.packs).
    """
    lines: list[list[dict]] = [[] for _ in range(math.ceil(len(rows) / 4))]
    for row in sorted(rows, key=lambda row: -len(row["labels"])):
        shortest = min(lines, key=lambda line: sum(len(r["labels"]) for r in line))
        shortest.append(row | {"position_ids": [*range(len(row["labels"]))]})
    joined: list[dict] = [
        {key: sum((row[key] for row in line), []) for key in line[0]} for line in lines
    ]
    return a_line_each(joined)
