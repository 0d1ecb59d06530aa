"""The builders of the task files: the rules of all tasks, and each source's reading."""

import ast
import io
import json
import random
import tarfile
from collections import Counter

import pytest

from deltarank.study import taskdata, tasks
from deltarank.study.models import TINY
from deltarank.study.taskdata import (
    card,
    countries,
    entities,
    languages,
    mixes,
    modules,
    people,
    pirates,
    reviews,
    rules,
    sums,
    verses,
)

needs_packages = pytest.mark.skipif(
    not taskdata.can_build(), reason=f"needs Python {taskdata.PYTHON} and the extra `data`"
)


def committed(task):
    lines = (tasks.TASK_FOLDER / f"{task}.jsonl").read_text(encoding="utf8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture
def in_bytes(monkeypatch):
    """Rows are measured in bytes, and may have 400 of them."""
    monkeypatch.setattr(rules, "GEMMA", TINY)
    monkeypatch.setattr(rules, "MAX_TOKENS", 400)


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """An empty task folder."""
    monkeypatch.setattr(tasks, "TASK_FOLDER", tmp_path / "tasks")
    (tmp_path / "tasks").mkdir()
    return tmp_path / "tasks"


# The rules of all tasks


def test_a_row_fits_up_to_the_last_token(monkeypatch, in_bytes):
    row = {"prompt": "Say é:", "answer": " é"}  # 7 and 3 bytes, BOS and newline
    for most, fitting in ((12, True), (11, False)):
        monkeypatch.setattr(rules, "MAX_TOKENS", most)
        assert rules.fits(row) is fitting


def test_tidy_gives_one_line_with_straight_quotes():
    assert rules.tidy(" a &amp;\n ``b’’ ") == 'a & ``b"'


def test_distinct_drops_a_text_that_any_field_has_seen():
    rows = [{"prompt": p, "answer": a} for p, a in (("A b.", "1"), ("a, B", "2"), ("c", "1!"))]
    assert list(rules.distinct(rows, "prompt")) == [rows[0], rows[2]]
    assert list(rules.distinct(rows, "prompt", "answer")) == [rows[0]]


def grouped_rows(groups=40, each=5):
    return [rules.make_row(f"{g} {i}", f" {i}", g) for g in range(groups) for i in range(each)]


def test_whole_groups_go_to_one_split():
    rows = rules.split(grouped_rows(), n_train=100, n_valid=20, n_test=30)
    assert Counter(row["split"] for row in rows) == {"train": 100, "valid": 20, "test": 30}
    split_of = {}
    for row in rows:
        assert split_of.setdefault(row["prompt"].split()[0], row["split"]) == row["split"]


def test_a_split_takes_no_more_of_a_group_than_asked_and_is_seeded():
    rows = rules.split(grouped_rows(), n_valid=20, n_test=30, per_group=2)
    assert max(Counter(row["prompt"].split()[0] for row in rows).values()) == 2
    assert rows == rules.split(grouped_rows(), n_valid=20, n_test=30, per_group=2)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"split": "test", "prompt": "p", "answer": " a\nb"}, "no line"),
        ({"split": "test", "prompt": "p", "answer": " "}, "no line"),
        ({"split": "test", "prompt": "p" * 400, "answer": " a"}, "more than 400 tokens"),
        ({"split": "test", "prompt": "seen", "answer": " a"}, "held out, but trained"),
    ],
)
def test_a_row_that_breaks_a_rule_is_refused(in_bytes, row, said):
    trained = {"split": "train", "prompt": "seen", "answer": " a"}
    rules.check_rows("kjv", [trained, row | {"prompt": "new", "answer": " a"}])
    with pytest.raises(ValueError, match=f"kjv: .*{said}"):
        rules.check_rows("kjv", [trained, row])


def test_facts_may_be_asked_again(in_bytes):
    row = {"prompt": "seen", "answer": " a"}
    rules.check_rows("facts", [{"split": "train"} | row, {"split": "test"} | row])


# Building and writing


def test_every_task_has_a_builder_and_a_line_in_the_card():
    assert list(taskdata.BUILDERS) == list(card.CARD) == list(tasks.TASKS)


def test_an_unknown_task_is_refused_by_name():
    with pytest.raises(ValueError, match="'poems' is built; known: pirate, json"):
        taskdata.build("poems")


def test_building_needs_the_python_and_the_packages(monkeypatch):
    monkeypatch.setattr(taskdata, "PACKAGES", ("json",))
    monkeypatch.setattr(taskdata, "PYTHON", taskdata.platform.python_version())
    assert taskdata.can_build()
    monkeypatch.setattr(taskdata, "PACKAGES", ("json", "no_such_package"))
    assert not taskdata.can_build()
    monkeypatch.setattr(taskdata, "PACKAGES", ("json",))
    monkeypatch.setattr(taskdata, "PYTHON", "3.0.0")
    assert not taskdata.can_build()


def test_a_file_has_a_json_object_a_line_with_letters_as_they_are(monkeypatch, in_bytes, folder):
    rows = [{"split": s, "prompt": f"{s}?", "answer": " č"} for s in ("train", "test")]
    monkeypatch.setitem(taskdata.BUILDERS, "sorbian", lambda: rows)
    path = taskdata.write("sorbian")
    assert path == folder / "sorbian.jsonl"
    assert path.read_bytes() == "".join(
        f'{{"split": "{s}", "prompt": "{s}?", "answer": " č"}}\n' for s in ("train", "test")
    ).encode("utf8")


def test_nothing_is_written_when_a_row_breaks_a_rule(monkeypatch, in_bytes, folder):
    monkeypatch.setitem(
        taskdata.BUILDERS, "code", lambda: [{"split": "test", "prompt": "p", "answer": ""}]
    )
    with pytest.raises(ValueError, match="no line"):
        taskdata.write("code")
    assert list(folder.iterdir()) == []


# What needs no package is built whole


@pytest.mark.parametrize("task", ["arithmetic", "mix", "production", "shuffled", "sorting"])
def test_it_is_built_as_committed(task):
    assert taskdata.BUILDERS[task]() == committed(task)


def test_a_problem_works_out_and_never_falls_below_zero():
    rng = random.Random(7)
    for _ in range(300):
        text, worked = sums.problem(rng)
        total = int(text.split()[0])
        for step, sign, number in zip(
            worked.split(", "), text.split()[1::2], text.split()[2::2], strict=True
        ):
            after = total + int(number) if sign == "+" else total - int(number)
            assert step == f"{total} {sign} {number} = {after}"
            total = after
            assert total >= 0 and sums.LOW <= int(number) <= sums.HIGH


def test_mix_asks_of_the_facts_only_those_it_trains():
    facts = [row for row in mixes.build_mix() if row["task"] == "facts"]
    prompts = {s: {r["prompt"] for r in facts if r["split"] == s} for s in mixes.SHARE}
    assert prompts["valid"] | prompts["test"] <= prompts["train"]
    assert len(prompts["valid"] | prompts["test"]) == 48


def test_facts_are_asked_in_three_phrasings_and_in_one_never_trained(monkeypatch):
    facts = [(f"Person {i}", ("job", "born")[i % 2], f"answer {i}") for i in range(8)]
    monkeypatch.setattr(people, "invent_facts", lambda: facts)
    rows = people.build_facts()
    asked = {s: [r for r in rows if r["split"] == s] for s in ("train", "valid", "test")}
    trained = {row["prompt"] for row in asked["train"]}
    assert len(trained) == 24
    assert len(asked["valid"]) == 2 and len(asked["test"]) == 6
    assert {row["prompt"] for row in asked["valid"] + asked["test"]} <= trained
    unseen = [row for row in rows if row["split"] == "paraphrase"]
    assert [row["answer"] for row in unseen] == [f" answer {i}" for i in range(2, 8)]
    assert not trained & {row["prompt"] for row in unseen}


def test_a_named_character_is_one_character_beyond_ascii():
    named = dict(entities.named_characters())
    assert named["alpha;"] == "U+03B1" and named["Aopf;"] == "U+1D538"
    assert "amp;" not in named and "bne;" not in named and "eacute" not in named
    assert len(named) > 1500


def test_every_entity_is_asked_in_four_ways():
    assert len({*entities.PHRASINGS}) == 4
    assert all(way.count("&{}") == 1 for way in entities.PHRASINGS)


def test_every_attribute_is_asked_in_four_ways():
    assert people.TRAINED.keys() == people.PARAPHRASE.keys()
    for attribute, phrasings in people.TRAINED.items():
        ways = {*phrasings, people.PARAPHRASE[attribute]}
        assert len(ways) == 4 and all(way.count("{}") == 1 for way in ways)


# Modules


def test_syntax_trees_are_those_of_modules_but_not_of_tests(tmp_path):
    for name in ("b.py", "a/x.py", "a/tests/y.py", "site-packages/z.py", "_sysconfigdata_u.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x = 1\n")
    found = list(modules.syntax_trees(tmp_path))
    assert [name for name, _ in found] == ["a.x", "b"]
    assert all(isinstance(tree, ast.Module) for _, tree in found)


def test_next_lines_follow_up_to_three_lines(in_bytes):
    source = 'def f(a):\n    "Doc."\n    b = a  # c\n    if b:\n        b = b + a\n    return b\n'
    rows = list(modules.next_lines(ast.parse(source).body[0]))
    assert [row["answer"] for row in rows] == ["b = a", "if b:", "b = b + a", "return b"]
    assert rows[0]["prompt"] == "Python:\ndef f(a):\nNext line:\n"
    assert rows[3]["prompt"] == "Python:\nb = a\nif b:\n    b = b + a\nNext line:\n"


def test_functions_are_named_by_sentences_that_do_not_give_the_name_away():
    source = '''class A:
    def weekday(self):
        """Return the day of the week
        as a number. More."""
    def close(self):
        """Close the file for good."""
    def _hidden(self):
        """Return what nobody asks for."""
    def f(self):
        """Too short."""
'''
    found = list(modules.named_functions(ast.parse(source)))
    assert found == [("Return the day of the week as a number.", "weekday")]


def test_docstrings_give_their_plain_sentences():
    source = '''class A:
    """Return the sea. Call f() first. It is
    old, and well-known!"""
    def f(self):
        """no capital."""
'''
    found = list(pirates.docstring_sentences(ast.parse(source)))
    assert found == ["Return the sea.", "It is old, and well-known!"]


# Reviews


def packed(files):
    """The bytes of a tar archive, gzipped."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def archive(monkeypatch, tmp_path):
    """A source archive of 3,000 film snippets: in turn unclear, good and bad."""
    ratings = [(0.4, 2.0, -1.5)[i % 3] for i in range(3000)]
    lines = [f"{i}\t{x}\tFilm &amp; {i}    - done\n" for i, x in enumerate(ratings, 1)]
    name = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
    inner = packed({name: "".join(lines).encode()})
    path = tmp_path / "source.tar.gz"
    place = f"vaderSentiment-{reviews.VERSION}/additional_resources/hutto_ICWSM_2014.tar.gz"
    path.write_bytes(packed({place: inner}))
    monkeypatch.setattr(reviews, "source_archive", lambda: path)


def test_snippets_come_with_their_rating_and_one_space(archive):
    found = list(reviews.review_snippets("movie"))
    assert len(found) == 3000
    assert found[1] == ("2", 2.0, "Film & 2 - - done")


def test_sentiment_keeps_clear_cases_in_equal_numbers(archive, in_bytes):
    rows = reviews.build_sentiment()
    assert {int(row["prompt"].split()[3]) % 3 for row in rows} == {0, 2}
    for row in rows:
        clear = {2: " positive", 0: " negative"}
        assert row["answer"] == clear[int(row["prompt"].split()[3]) % 3]
    counts = Counter((row["split"], row["answer"]) for row in rows)
    assert len(counts) == 6
    for split in reviews.SIZES:
        assert counts[split, " positive"] == counts[split, " negative"] > 0
    blocks = {s: {int(r["prompt"].split()[3]) // 10 for r in rows if r["split"] == s} for s in
              reviews.SIZES}  # fmt: skip
    assert not blocks["train"] & (blocks["valid"] | blocks["test"])


# Countries and verses


def complete_country():
    keys = {key: ["x"] for key in countries.NEEDED}
    return keys | {"name": "Utopia", "demonym": "Utopian", "callingCodes": ["99"]}


def test_a_country_is_told_only_with_a_plain_name_and_every_fact():
    assert countries.complete(complete_country())
    for changes in (
        {"name": "Utopia (North)"},
        {"demonym": "Utopian, North Utopian"},
        {"callingCodes": ["99", "98"]},
        {"callingCodes": ["9 9"]},
        {"capital": ""},
        {"languages": []},
    ):
        assert not countries.complete(complete_country() | changes), changes


def test_a_record_has_what_its_prose_tells_with_real_types():
    facts = {"area": 12345.0, "languages": ["Utopian", "Latin"]}
    row = countries.record_row("Utopia", facts, ("area", "languages"), random.Random(0))
    assert json.loads(row["answer"]) == {"country": "Utopia"} | facts
    assert row["group"] == "Utopia"
    assert "12,345.0" in row["prompt"] and "Utopian and Latin" in row["prompt"]
    assert row["prompt"].endswith(".\nJSON:")


@pytest.mark.parametrize(
    ("first", "second", "share"),
    [("Go, go!", "go", 1.0), ("a b c", "b c d", 0.5), ("a", "b", 0.0), ("a b", "a c d", 0.25)],
)
def test_overlap_is_the_share_of_common_words(first, second, share):
    assert verses.overlap(first, second) == verses.overlap(second, first) == share


# With the packages


@needs_packages
def test_pirate_speech_is_the_same_each_time_whatever_the_seed():
    rows = committed("pirate")
    for seed in (0, 1):
        random.seed(seed)
        for row in rows:
            plain = row["prompt"].removeprefix("Plain: ").removesuffix("\nPirate:")
            assert f" {pirates.pirate(plain)}" == row["answer"]


@needs_packages
def test_pirate_speech_drops_nothing_but_the_exclamation():
    assert pirates.pirate("Where is the old sea?") == "Whar be th' barnacle covered sea?"
    assert pirates.pirate("the") == "Th'"


@needs_packages
def test_names_and_strings_of_a_language_are_found():
    assert dict(languages.display_names("hsb"))["Germany"] == "Němska"
    strings = list(languages.interface_strings("hsb"))
    assert all(isinstance(text, str) for pair in strings for text in pair)
    assert len(strings) > 300


@needs_packages
def test_verses_are_aligned():
    pairs = verses.verse_pairs()
    chapter, modern, old = next(pairs)
    assert chapter == 1001  # Genesis 1
    assert modern.startswith("In the beginning") and old.startswith("In the beginning")


@needs_packages
@pytest.mark.slow
@pytest.mark.parametrize("task", taskdata.BUILDERS)
def test_a_task_is_built_to_the_bytes_committed(task):
    """Converts the model, whose tokens count, and fetches the archive of reviews."""
    assert taskdata.build(task) == committed(task)


CARD_FILE = tasks.TASK_FOLDER.parent / "README.md"


def test_the_words_of_the_card_are_those_of_its_file():
    before, after = card.TEXT.split("{table}")
    text = CARD_FILE.read_text(encoding="utf8")
    assert text.startswith(before) and text.endswith(after)


@needs_packages
def test_the_card_is_that_of_the_files():
    assert card.build_card() == CARD_FILE.read_text(encoding="utf8")
