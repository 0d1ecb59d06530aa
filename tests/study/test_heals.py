"""Heals, against models whose cuts are added by hand, and the tool's own cut and squeeze."""

import dataclasses

import pytest
import torch
from peft import PeftModel
from small_runs import saved_pair

from deltarank.adapters import extract_adapter
from deltarank.shrink import shrink_adapter
from deltarank.spectra import truncate
from deltarank.study import distillation, heals
from deltarank.study.distillation import distil
from deltarank.study.evaluation import evaluate
from deltarank.study.heals import Heal, heal_configs, heal_run, heals_table, measure_heal
from deltarank.study.losses import head_of
from deltarank.study.models import load_model, matrices
from deltarank.study.profiles import LARGE_ALPHA, PROFILES, entry_folder, profile
from deltarank.study.runs import Result, run_model, updates
from deltarank.study.training import prepare


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    """Answers of at most six bytes."""
    monkeypatch.setattr(heals, "ROOM", 6)


@pytest.fixture
def full(small_task, store):
    """A small full run in float32 whose update is large."""
    sizes = {"seq_len": 16, "batch_size": 4, "dtype": "float32", "eval_rows": 8}
    return profile().config("sentiment", steps=4, lr=3e-2, **sizes)


def heal_from(full, start="cut", rank=1, steps=6, lr=3e-3, **fields):
    return Heal(full=full, start=start, rank=rank, steps=steps, lr=lr, rows=4, **fields)


def with_update(full, update):
    """The base with update(name, dW) added to each matrix."""
    model, dW = load_model(full.model), updates(full)
    with torch.no_grad():
        for name, weight in matrices(model).items():
            weight += update(name, dW[name])
    return model


def test_no_steps_are_the_cut_without_norms(full):
    still = heal_run(heal_from(full, rank=2, steps=0, lr=0.0))
    cut = with_update(full, lambda name, dW: truncate(dW, 2))
    assert still.loss() == pytest.approx(evaluate(cut, full, "test")["loss_nats"], abs=1e-5)
    base = evaluate(load_model(full.model), full, "test")["loss_nats"]
    assert abs(still.loss() - base) > 1e-3
    record = still.record
    assert record["divergence_nats"] > 0 and record["train_divergence_nats"] == []


def test_healing_brings_the_cut_nearer_to_the_full_run(full):
    record = heal_run(heal_from(full, steps=20)).record
    still = heal_run(heal_from(full, steps=0, lr=0.0)).record
    assert record["divergence_nats"] < 0.7 * still["divergence_nats"]
    assert len(record["train_divergence_nats"]) == 20
    assert record["evaluation"].keys() == {"valid", "test"}
    tuned = evaluate(run_model(full), full, "test")["loss_nats"]
    assert record["full"]["test"]["loss_nats"] == tuned


def test_all_starts_and_steps_see_the_same_rows_in_the_same_order(full, monkeypatch):
    full = dataclasses.replace(full, batch_size=2)
    batches = []
    forward = distillation.Student.forward

    def noted(self, input_ids, labels, places, position_ids=None):
        batches[-1].append(input_ids.tolist())
        return forward(self, input_ids, labels, places, position_ids)

    monkeypatch.setattr(distillation.Student, "forward", noted)
    for start, steps in (("cut", 3), ("cut", 5), ("nothing", 5), ("squeezed", 3)):
        batches.append([])
        wide = {"wide": 4} if start == "squeezed" else {}
        measure_heal(heal_from(full, start, steps=steps, **wide))
    short, long, nothing, squeezed = batches
    assert long == nothing and short == squeezed == long[:3] and len(long) == 5


def test_a_start_from_nothing_is_the_base_and_learns(full):
    record = measure_heal(heal_from(full, "nothing", steps=20))
    still = measure_heal(heal_from(full, "nothing", steps=1, lr=1e-300))
    base = evaluate(load_model(full.model), full, "test")["loss_nats"]
    assert still["evaluation"]["test"]["loss_nats"] == pytest.approx(base, abs=1e-5)
    assert record["divergence_nats"] < 0.7 * still["divergence_nats"]
    assert record["config"]["alpha"] == LARGE_ALPHA


def test_a_squeezed_lora_is_the_wide_one_truncated(full):
    heal = heal_from(full, "squeezed", rank=2, wide=8)
    found = measure_heal(heal)["evaluation"]["test"]["loss_nats"]
    model, (taught, *_) = prepare(heal.recipe), heals._told(heal)
    distil(heal.recipe, model, taught, head_of(model))
    wide = evaluate(model, full, "test")["loss_nats"]
    layers = heals.lora_layers(model)
    narrow = with_update(
        full, lambda name, _: truncate(layers[name].get_delta_weight("default").detach(), 2)
    )
    assert found == pytest.approx(evaluate(narrow, full, "test")["loss_nats"], abs=1e-5)
    assert abs(found - wide) > 1e-5


def test_the_starts_are_what_the_tool_writes(store, tmp_path):
    base, tuned, config = saved_pair(tmp_path)
    config = dataclasses.replace(config, batch_size=4)
    heal = Heal(full=config, start="cut", rank=3, steps=0, rows=4)
    model, dW = prepare(heal.recipe), updates(config)
    heals._cut_to(model, dW, 3)
    extract_adapter(base, tuned, str(tmp_path / "cut"), rank=3)
    tokens = torch.arange(60, 90)[None]
    served = PeftModel.from_pretrained(load_model(base), tmp_path / "cut")
    with torch.no_grad():
        ours, theirs, plain = (
            m(input_ids=tokens).logits for m in (model, served, load_model(base))
        )
    assert (ours - theirs).norm() < 2e-2 * (theirs - plain).norm()
    shrink_adapter(str(tmp_path / "cut"), str(tmp_path / "small"), rank=1)
    heals._squeeze(model, 1)
    served = PeftModel.from_pretrained(load_model(base), tmp_path / "small")
    with torch.no_grad():
        ours, theirs = (m(input_ids=tokens).logits for m in (model, served))
    assert (ours - theirs).norm() < 2e-2 * (theirs - plain).norm()


def test_a_heal_is_stored_and_its_lessons_are_kept(full, monkeypatch):
    heal = heal_from(full, steps=2)
    first = heal_run(heal)
    assert entry_folder(full, "heals", heal.key).exists()
    monkeypatch.setattr(heals, "run_model", lambda config: pytest.fail("answered again"))
    assert heal_run(heal_from(full, "nothing", steps=2)).status == "finished"
    monkeypatch.setattr(heals, "measure_heal", lambda *a: pytest.fail("measured again"))
    again = heal_run(heal)
    assert again.record == first.record and again.loss() == first.loss()
    assert again.config == heal.recipe


def test_a_heal_that_diverges_is_stored_as_diverged(full):
    for start, fields in (("cut", {}), ("squeezed", {"wide": 4})):
        result = heal_run(heal_from(full, start, lr=1e30, **fields))
        assert result.status == "diverged" and result.loss() != result.loss()
        assert result.record["divergence_nats"] is None


CHANGES = {
    "start": {"start": "nothing"},
    "rank": {"rank": 3},
    "steps": {"steps": 7},
    "lr": {"lr": 1e-2},
    "rows": {"rows": 8},
    "wide": {"start": "squeezed", "wide": 4},
}


def test_the_key_changes_with_every_field_and_with_the_full_run(full, monkeypatch):
    heal = heal_from(full)
    assert {"full", *CHANGES} == {field.name for field in dataclasses.fields(Heal)}
    others = [dataclasses.replace(heal, **changes) for changes in CHANGES.values()]
    others += [dataclasses.replace(heal, full=dataclasses.replace(full, lr=1e-2))]
    others += [dataclasses.replace(others[-2], wide=8)]
    assert len({one.key for one in [heal, *others]}) == 2 + len(CHANGES) + 1
    assert heal.key.startswith("sentiment-heal-cut-r1-n6-s0-")
    key = heal.key
    monkeypatch.setattr(heals, "ROOM", 7)
    assert heal.key != key


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("start", {"start": "warm"}),
        ("steps", {"steps": -1}),
        ("steps", {"start": "nothing", "steps": 0, "lr": 0.0}),
        ("lr", {"lr": 0.0}),
        ("lr", {"steps": 0}),
        ("wide", {"wide": 4}),
        ("wide", {"start": "squeezed", "wide": 1}),
        ("rows", {"rows": 3}),
        ("rank", {"rank": 0}),
    ],
)
def test_a_heal_that_cannot_run_is_refused_by_name(full, field, changes):
    with pytest.raises(ValueError, match=f"^{field}="):
        dataclasses.replace(heal_from(full), **changes).recipe  # noqa: B018


def test_only_a_full_run_can_be_healed(full):
    for other in (
        profile().config("sentiment", "lora", rank=2),
        dataclasses.replace(full, train_embedding=True),
    ):
        with pytest.raises(ValueError, match="must be a full run"):
            heal_from(other)


def test_the_teacher_has_the_head_of_the_full_run_where_it_is_not_the_embedding(
    full, qwen, monkeypatch
):
    other = dataclasses.replace(full, model=str(qwen), lr=3e-3)
    used = []

    def noted(model, config, taught, teacher):
        used.append(teacher.weight)
        return distillation.divergence(model, config, taught, teacher)

    monkeypatch.setattr(heals, "divergence", noted)
    record = heal_run(heal_from(other)).record
    assert record["status"] == "finished" and record["divergence_nats"] > 0
    head = run_model(other).get_output_embeddings().weight
    assert torch.equal(used[0], head)
    assert (head - load_model(str(qwen)).lm_head.weight).abs().max() > 1e-3


@pytest.fixture
def graded(monkeypatch, store):
    """Heals whose held-out loss is lowest at the second rate; what was asked for, in order."""
    asked = []

    def result(heal):
        asked.append(heal)
        best = dict(profile().heals.lrs)[heal.start][1]
        loss = {"loss_nats": 1 + abs(heal.lr - best), "score": 50.0}
        record = {
            "status": "finished",
            "evaluation": {"valid": loss, "test": loss},
            "full": {"test": loss | {"loss_nats": 1.0}},
        }
        return Result(heal.recipe, record | {"divergence_nats": 0.5})

    monkeypatch.setattr(heals, "heal_run", result)
    monkeypatch.setattr(heals, "tuned", lambda task, *, seed: profile().config(task, seed=seed))
    return asked


def test_the_grid_has_every_start_rank_and_step_at_the_best_rate_of_a_climb(graded):
    sizes, found = profile(), heal_configs()
    counts = {start: sum(h.start == start and h.steps > 0 for h in found) for start in heals.STARTS}
    each = len(sizes.heals.tasks) * len(sizes.heals.steps) * len(sizes.seeds)
    assert counts == {"cut": 2 * each, "nothing": 2 * each, "squeezed": each}
    assert sum(h.steps == 0 for h in found) == 2 * len(sizes.heals.tasks) * len(sizes.seeds)
    assert len({h.key for h in found}) == len(found)
    rates = dict(sizes.heals.lrs)
    assert all(h.lr == rates[h.start][1] for h in found if h.steps)
    for start, lrs in rates.items():
        assert [h.lr for h in graded if h.start == start] == 2 * [*lrs[1:4], lrs[0]]  # two tasks
    assert {h.rows for h in found} == {sizes.heals.rows}
    assert {h.full.seed for h in graded} == {sizes.seeds[0]}, "the first seed chooses"
    tried = {(h.start, h.wide, h.rank, h.steps) for h in graded}
    assert tried == {("cut", 0, 4, 4), ("nothing", 0, 4, 4), ("squeezed", 8, 2, 4)}
    assert {(h.wide, h.rank) for h in found if h.start == "squeezed"} == {(8, 2)}


def test_the_table_has_a_line_a_heal(graded):
    table = heals_table(heal_configs()[:5])
    assert list(table.columns) == [
        *("task", "seed", "start", "rank", "steps", "lr"),
        *("status", "loss_nats", "score"),
        *("full_nats", "full_score", "kept_loss", "divergence_nats"),
    ]
    assert len(table) == 5 and (table["divergence_nats"] == 0.5).all()


def test_the_base_beside_a_heal_is_of_the_profile_that_made_its_full_run(graded, monkeypatch):
    asked = []

    def run(config):
        asked.append(config)
        return Result(config, {"evaluation": {"test": {"loss_nats": 5.0}}})

    monkeypatch.setattr(heals, "run", run)
    full = PROFILES["quick"].config("facts")
    table = heals_table([Heal(full=full, start="cut", rank=1, steps=6, lr=3e-3, rows=16)])
    assert asked == [PROFILES["quick"].config("facts", "base")]
    line = table.iloc[0]  # from 5 of the base to 1 of the full run it came down to this
    assert line["full_nats"] == 1 < line["loss_nats"] < 5
    assert line["kept_loss"] == pytest.approx((5 - line["loss_nats"]) / 4)
