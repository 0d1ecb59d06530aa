"""Healing, from pair to folder: the cut where nothing is trained, nearer where something is."""

import dataclasses
import json
import warnings
from pathlib import Path

import pytest
import torch
from pairs import plant, save
from peft import PeftModel
from safetensors.torch import load_file

from deltarank import adapters
from deltarank.adapters import extract_adapter
from deltarank.options import HEAL_BATCH, HEAL_RATE, HEAL_ROOM, HEAL_STEPS, parse
from deltarank.study import healing, models, training
from deltarank.study.distillation import divergence, lessons
from deltarank.study.healing import extract_healed
from deltarank.study.losses import head_of
from deltarank.study.models import TINY, load_model, load_tokenizer, matrices
from deltarank.study.tasks import load_prompts, load_task

STILL = 1e-300  # a rate below what float32 can add


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    """Answers of at most six bytes."""
    monkeypatch.setattr(healing, "HEAL_ROOM", 6)


@pytest.fixture
def planted(tmp_path):
    """Folders of the tiny model and of one whose matrices have updates of rank 3, nothing else."""
    model, generator = load_model(TINY), torch.Generator().manual_seed(1)
    model.save_pretrained(tmp_path / "base")
    load_tokenizer(TINY).save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for weight in matrices(model).values():
            plant(weight, generator, torch.tensor([0.5, 0.45, 0.4]))
    model.save_pretrained(tmp_path / "tuned")
    return str(tmp_path / "base"), str(tmp_path / "tuned")


@pytest.fixture
def rows(tmp_path):
    """A file of 24 prompts, without answers."""
    prompts = [row["prompt"] for row in load_task("facts")["train"][:24]]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return str(path)


def factors_of(folder):
    return load_file(Path(folder) / "adapter_model.safetensors")


def settings_of(folder):
    return json.loads((Path(folder) / "adapter_config.json").read_text())


@pytest.mark.parametrize("form", [{}, {"patterns": True}, {"dtype": "bfloat16"}], ids=str)
def test_what_is_not_trained_is_the_cut(planted, rows, tmp_path, form):
    cut, out = str(tmp_path / "cut"), str(tmp_path / "out")
    plain = extract_adapter(*planted, cut, budget=1500, **form)
    rule = {"budget": 1500}
    report = extract_healed(*planted, out, rows=rows, rule=rule, steps=1, lr=STILL, **form)
    assert settings_of(out) == settings_of(cut) and plain["rank"].nunique() > 1
    expected, found = factors_of(cut), factors_of(out)
    assert found.keys() == expected.keys()
    for name, factor in found.items():
        assert factor.dtype == expected[name].dtype
        torch.testing.assert_close(
            factor, expected[name], rtol=1e-2 if form.get("dtype") else 1e-5, atol=1e-7
        )
    assert report["kept"].tolist() == pytest.approx(plain["kept"].tolist(), abs=1e-5)
    healed = report.attrs["healed"]
    assert healed["after"] == healed["before"] > 1e-3


def test_an_update_of_the_rank_leaves_nothing_to_heal(planted, rows, tmp_path):
    report = extract_healed(
        *planted, str(tmp_path / "out"), rows=rows, rule={"rank": 3}, steps=1, lr=STILL
    )
    low = extract_healed(
        *planted, str(tmp_path / "low"), rows=rows, rule={"rank": 1}, steps=1, lr=STILL
    )
    assert report.attrs["healed"]["before"] < 1e-4
    assert low.attrs["healed"]["before"] > 5e-3


def test_healing_brings_the_cut_nearer_and_writes_what_it_trained(planted, rows, tmp_path):
    base, tuned = planted
    out = str(tmp_path / "out")
    report = extract_healed(base, tuned, out, rows=rows, rule={"rank": 1}, steps=20, lr=1e-2)
    healed = report.attrs["healed"]
    assert (healed["steps"], healed["rows"], healed["held_out"]) == (20, 21, 3)
    assert healed["after"] < 0.7 * healed["before"]
    teacher, every = load_model(tuned), load_prompts(rows)["train"]
    config = healing.RunConfig(task=rows, method="base", model=base)
    told = lessons(teacher, config, every[::10], room=6, ends=[1])
    served = PeftModel.from_pretrained(load_model(base), out)
    found = divergence(served, config, told, head_of(teacher))
    assert found == pytest.approx(healed["after"], rel=2e-2)
    assert settings_of(out)["r"] == 1 and settings_of(out)["lora_alpha"] == 1
    assert (report["rounding"] == 0).all()


def test_the_zeros_that_fill_a_smaller_rank_stay(planted, rows, tmp_path):
    out = str(tmp_path / "out")
    report = extract_healed(
        *planted, out, rows=rows, rule={"budget": 1500}, steps=3, lr=1e-2, dtype="float16"
    )
    ranks = report.set_index("name")["rank"]
    for name, factor in factors_of(out).items():
        module, side = name.removeprefix("base_model.model.").split(".lora_")
        across = factor if side.startswith("A") else factor.T  # (stored rank, ...)
        assert int(across.any(dim=1).sum()) == ranks[f"{module}.weight"]
    assert (report["rounding"] > 0).any()


def test_few_prompts_are_held_out_and_splits_are_kept_apart():
    few = {"train": [f"p{i}" for i in range(19)]}
    learned, held = healing._parted(few, 1000)
    assert sorted(learned) == sorted(few["train"]) and held == []
    learned, held = healing._parted({"train": [f"p{i}" for i in range(40)]}, 16)
    assert len(learned) == 16 and held == ["p0", "p10", "p20", "p30"]
    assert not {*learned} & {*held}
    learned, held = healing._parted({"train": ["a", "b"], "valid": ["c"], "test": ["d"]}, 16)
    assert sorted(learned) == ["a", "b"] and held == ["c"]
    assert sorted(healing._parted({"test": ["d", "e"]}, 16)[0]) == ["d", "e"]
    again = {"train": ["a", "b", "a"], "valid": ["b", "c", "c"]}
    assert healing._parted(again, 16)[1] == ["c"] and len(healing._parted(again, 16)[0]) == 2


def stop(*arguments, **options):
    raise KeyboardInterrupt


@pytest.mark.parametrize("there", [False, True])
def test_an_interrupt_leaves_what_was_there(planted, rows, tmp_path, monkeypatch, there):
    out = tmp_path / "out"
    if there:
        extract_adapter(*planted, str(out), rank=1)
    before = factors_of(out) if there else None
    monkeypatch.setattr(training, "_training_arguments", stop)  # in the midst of it
    with pytest.raises(KeyboardInterrupt):
        extract_healed(*planted, str(out), rows=rows, rule={"rank": 2})
    names = {"base", "tuned", "rows.jsonl"} | ({"out"} if there else set())
    assert {path.name for path in tmp_path.iterdir()} == names
    assert not there or all(torch.equal(before[n], W) for n, W in factors_of(out).items())


def test_a_rate_that_diverges_is_named_and_nothing_is_written(planted, rows, tmp_path):
    with pytest.raises(ValueError, match="healing diverged at step .: choose a rate below 1e"):
        extract_healed(*planted, str(tmp_path / "out"), rows=rows, rule={"rank": 1}, lr=1e30)
    assert not (tmp_path / "out").exists()


def test_a_rate_that_leads_away_is_warned_of(planted, rows, tmp_path):
    options = {"rows": rows, "rule": {"rank": 3}, "steps": 4}
    with pytest.warns(UserWarning, match="led away.*choose a rate below 1"):
        extract_healed(*planted, str(tmp_path / "out"), lr=1.0, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        extract_healed(*planted, str(tmp_path / "out"), lr=1e-4, **options)


def test_what_cannot_be_healed_is_refused_before_any_work(planted, rows, tmp_path, monkeypatch):
    for module, name in ((healing, "load_model"), (adapters, "differences")):
        monkeypatch.setattr(module, name, lambda *a, **k: pytest.fail("work was done"))
    monkeypatch.setattr(adapters.AdapterPlan, "write", lambda *a: pytest.fail("a cut was written"))
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("keep me")
    lone, other = save(tmp_path / "llama")  # without a tokenizer
    long = tmp_path / "long.jsonl"
    long.write_text('{"prompt": "' + "x" * 2048 + '"}\n')  # no room for an answer
    calls = {
        "tokenizer": ((lone, other, "new"), {}),
        "exists and is no adapter": ((*planted, "mine"), {}),
        "choose one from 1 to": ((*planted, "new"), {"rule": {"rank": 400}}),
        "dtype='int8'": ((*planted, "new"), {"dtype": "int8"}),
        "nowhere.jsonl": ((*planted, "new"), {"rows": str(tmp_path / "nowhere.jsonl")}),
        "takes 2,048 here: shorten it": ((*planted, "new"), {"rows": str(long)}),
    }
    for word, ((base, tuned, out), changes) in calls.items():
        options = {"rows": rows, "rule": {"rank": 1}} | changes
        with pytest.raises((ValueError, OSError), match=word) as refused:
            extract_healed(base, tuned, str(tmp_path / out), **options)
        assert "\n" not in str(refused.value)
    monkeypatch.setattr(models, "memory", lambda: 1)
    with pytest.raises(ValueError, match="1 at once.*: extract without healing"):
        extract_healed(*planted, str(tmp_path / "new"), rows=rows, rule={"rank": 1})
    assert not (tmp_path / "new").exists() and (mine / "notes.txt").read_text() == "keep me"


@pytest.mark.parametrize("which", ["base", "tuned"])
def test_a_pair_that_does_not_share_its_vocabulary_is_refused(planted, rows, tmp_path, which):
    folder = dict(zip(("base", "tuned"), planted, strict=True))[which]
    model = load_model(folder)
    model.resize_token_embeddings(390)
    model.save_pretrained(folder)
    with pytest.raises(ValueError, match="differ in vocabulary"):
        extract_healed(*planted, str(tmp_path / "out"), rows=rows, rule={"rank": 1})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "rows.jsonl is empty: write a JSON object with a prompt in each line"),
        ("\n\n", "is empty"),
        ('{"prompt": "a"}\n{"answer": "b"}\n', "rows.jsonl, line 2: a row lacks prompt: write"),
        ('{"prompt": "a"}\n\n{"prompt": " "}\n', "line 3: a row lacks prompt"),
        ('{"prompt": 7}\n', "line 1: prompt must be text"),
        ('{"prompt": "a"}\n'.encode("utf-16"), "line 1 holds what is no character.*: save it as"),
        ("[1]\n", "line 1 is no JSON object: write a JSON object with prompt there"),
        ('{"prompt": "a"}\nhello\n', "line 2 is no JSON: write"),
        ('{"prompt": "a"}\n{"prompt": "half \\ud83d"}\n', "line 2 holds what is no character"),
        (b'{"prompt": "caf\xe9"}\n', "line 1 holds what is no character.*: save it as UTF-8"),
    ],
)
def test_a_file_without_prompts_is_named_with_its_line(tmp_path, text, said):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=said) as refused:
        load_prompts(str(path))
    assert "\n" not in str(refused.value)


def test_another_kind_of_file_is_refused(tmp_path):
    (tmp_path / "rows.csv").write_text("prompt\n")
    with pytest.raises(ValueError, match="rows.csv: give a .jsonl file with a prompt in each"):
        load_prompts(str(tmp_path / "rows.csv"))


def test_the_batch_is_that_of_the_reports_runs():
    fields = {field.name: field.default for field in dataclasses.fields(healing.RunConfig)}
    assert fields["batch_size"] == HEAL_BATCH


def test_the_help_names_the_recipe(capsys):
    with pytest.raises(SystemExit):
        parse(["extract", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert f"of healing, {HEAL_BATCH} prompts each (default {HEAL_STEPS})" in told
    assert f"learning rate of healing (default {HEAL_RATE})" in told
    assert f"answers of up to {HEAL_ROOM} tokens" in told
