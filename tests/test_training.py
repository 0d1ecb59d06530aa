"""Training and evaluation, against plain cross-entropy, PEFT's products and free generation."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

import utils

Q = "model.layers.0.self_attn.q_proj.weight"


def small(**changes):
    """A float32 run on the small task."""
    sizes = {"seq_len": 16, "batch_size": 4, "dtype": "float32", "eval_rows": 8}
    return utils.profile().config("sentiment", **(sizes | changes))


def batch_of(rows, seq_len=32):
    tokenizer = utils.load_tokenizer(utils.TINY)
    return utils.collate([utils.encode(row, tokenizer, seq_len) for row in rows], seq_len)


ROWS = [{"prompt": "Say it:", "answer": " yes"}, {"prompt": "And now the other:", "answer": " no"}]


def plain_loss(model, batch, dtype):
    """Cross-entropy over the logits of all positions, in float32."""
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        logits = model(input_ids=batch["input_ids"]).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch["labels"][:, 1:].flatten())


def test_labels_cover_the_answer_and_its_newline_only():
    tokenizer = utils.load_tokenizer(utils.TINY)
    row = utils.encode({"prompt": "Ask:", "answer": " é"}, tokenizer, 16)
    prompt = len(b"Ask:")
    assert row["labels"][:prompt] == [-100] * prompt
    assert row["labels"][prompt:] == row["input_ids"][prompt:]
    assert tokenizer.decode(row["input_ids"]) == "Ask: é\n"


@pytest.mark.parametrize("seq_len", [8, 9])
def test_a_row_that_does_not_fit_is_refused_by_name(seq_len):
    row = {"prompt": "Ask:", "answer": " yes"}  # 9 bytes with the newline
    if seq_len == 9:
        assert len(utils.encode(row, utils.load_tokenizer(utils.TINY), 9)["labels"]) == 9
    else:
        with pytest.raises(ValueError, match=r"9 tokens.*seq_len=8.*Ask"):
            utils.encode(row, utils.load_tokenizer(utils.TINY), 8)


def test_collate_pads_on_the_right():
    rows = [{"input_ids": [5, 6], "labels": [-100, 6]}, {"input_ids": [7], "labels": [7]}]
    batch = utils.collate(rows, 3)
    assert batch["input_ids"].tolist() == [[5, 6, 0], [7, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, -100], [7, -100, -100]]


def test_a_packed_batch_has_the_loss_and_gradient_of_one_row_a_line(small_task):
    tokenizer = utils.load_tokenizer(utils.TINY)
    rows = [utils.encode(row, tokenizer, 64) for row in (*ROWS, *small_task[:7])]
    packed, found = utils.pack(rows), []
    assert packed["labels"].shape == (3, 37)  # nine rows, no longer than the longest three need
    assert sorted(packed["labels"].flatten().tolist()) == sorted(
        sum((row["labels"] for row in rows), [-100] * int((packed["input_ids"] == 0).sum()))
    )
    for batch in (packed, utils.collate(rows, 64)):
        model = utils.load_model(utils.TINY)
        head = model.get_output_embeddings().weight.detach()
        loss = utils.answer_loss(model, head, batch, dtype=torch.float32)
        loss.backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        found.append((loss.item(), torch.cat(gradients)))
    (loss, gradient), (plain, oracle) = found
    assert loss == pytest.approx(plain, rel=1e-6)
    assert (gradient - oracle).norm() < 1e-5 * oracle.norm()


def test_every_row_of_a_task_has_the_metric_of_its_origin():
    rows = utils.load_task("mix")["test"]
    assert {row["metric"] for row in rows if row["task"] in ("kjv", "pirate", "sorbian")} == {
        "chrf"
    }
    assert {row["metric"] for row in rows if row["task"] in ("facts", "code")} == {"exact"}


@pytest.mark.parametrize("trained_head", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance", "gradient_tolerance"),
    [(torch.float32, 1e-5, 1e-5), (torch.bfloat16, 1e-2, 3e-2)],
    ids=str,
)
def test_answer_loss_is_plain_cross_entropy(trained_head, dtype, tolerance, gradient_tolerance):
    batch, found = batch_of(ROWS), []
    for loss_of in (utils.answer_loss, plain_loss):
        model = utils.load_model(utils.TINY)
        head = model.get_output_embeddings().weight.requires_grad_(trained_head)
        if loss_of is plain_loss:
            loss = plain_loss(model, batch, dtype)
        else:
            head = head if trained_head else head.detach().to(dtype)
            loss = utils.answer_loss(model, head, batch, dtype=dtype)
        loss.backward()
        gradients = [p.grad.float().flatten() for p in model.parameters() if p.grad is not None]
        found.append((loss.item(), torch.cat(gradients)))
    (loss, gradient), (plain, oracle) = found
    assert loss == pytest.approx(plain, rel=tolerance)
    assert (gradient - oracle).norm() < gradient_tolerance * oracle.norm()


def test_the_loss_ignores_prompt_and_padding():
    model = utils.load_model(utils.TINY)
    head = model.get_output_embeddings().weight.detach()
    batch = batch_of(ROWS)
    loss = utils.answer_loss(model, head, batch, dtype=torch.float32)
    padding = (batch["labels"] == -100) & (batch["input_ids"] == 0)
    other = batch | {"input_ids": batch["input_ids"].masked_fill(padding, 77)}
    assert torch.equal(loss, utils.answer_loss(model, head, other, dtype=torch.float32))
    everything = batch["input_ids"].masked_fill(padding, -100)
    counted = utils.answer_loss(model, head, batch | {"labels": everything}, dtype=torch.float32)
    assert loss.item() == pytest.approx(plain_loss(model, batch, torch.float32).item(), rel=1e-5)
    assert loss.item() != pytest.approx(counted.item(), rel=1e-5)


def test_score_rows_agrees_with_plain_cross_entropy_row_by_row(small_task):
    model, config = utils.load_model(utils.TINY).eval(), small()
    scores = utils.score_rows(model, config, small_task)
    for row, nats, tokens in zip(small_task, scores["nats"], scores["tokens"], strict=True):
        batch = batch_of([row], seq_len=16)
        assert tokens == len(row["answer"]) + 1
        with torch.no_grad():
            mean = plain_loss(model, batch, torch.float32).item()
        assert nats == pytest.approx(mean * tokens, rel=1e-5)


@pytest.fixture
def overfitted(small_task, store):
    """A model that knows the first four rows of the small task and no others."""
    config = small(steps=60, lr=1e-2)
    model = utils.prepare(config)
    utils.train(config, model)
    return config, model.eval(), small_task


def test_right_by_teacher_forcing_is_right_by_free_generation(overfitted):
    config, model, rows = overfitted
    right = utils.score_rows(model, config, rows)["right"].tolist()
    texts = utils.generate(model, config, [row["prompt"] for row in rows])
    assert right == [text == row["answer"] for text, row in zip(texts, rows, strict=True)]
    assert all(right[:4])
    assert not all(right)


def test_evaluate_reports_what_score_rows_found(overfitted):
    config, model, rows = overfitted
    scores = utils.score_rows(model, config, rows)
    evaluation = utils.evaluate(model, config, "test")
    assert evaluation["row_score"] == [100.0 * right for right in scores["right"]]
    assert evaluation["score"] == pytest.approx(100 * scores["right"].mean())
    expected = scores["nats"].sum() / scores["tokens"].sum()
    assert evaluation["loss_nats"] == pytest.approx(expected)


def test_evaluate_looks_at_the_first_rows_only(small_task):
    model = utils.load_model(utils.TINY)
    whole, half = (utils.evaluate(model, small(eval_rows=n), "test") for n in (8, 3))
    assert half["row_nats"] == pytest.approx(whole["row_nats"][:3], abs=1e-4)


def test_evaluate_leaves_the_mode_of_the_model(small_task):
    model = utils.load_model(utils.TINY)
    for mode in (True, False):
        utils.evaluate(model.train(mode), small(), "valid")
        assert model.training == mode


def test_training_lowers_the_loss_and_reports_every_step(small_task):
    config = small(steps=30, lr=1e-2)
    losses = utils.train(config, utils.prepare(config))
    assert len(losses) == 30
    assert losses[-1] < losses[0] - 0.4  # the frozen, tied head of random bytes allows no more


def test_the_first_loss_is_that_of_the_untrained_model(small_task):
    config = small(steps=1)  # one batch holds all four training rows
    model = utils.prepare(config)
    expected = plain_loss(model, batch_of(small_task[:4], 16), torch.float32).item()
    assert utils.train(config, model) == pytest.approx([expected], rel=1e-5)


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """A function that measures a configuration in a cache of its own; returns dW as well."""
    runs = []

    def train(config):
        monkeypatch.setenv("LOWRANK_CACHE", str(tmp_path / f"cache{len(runs)}"))
        runs.append(config)
        return (*utils.measure(config), utils.updates(config))

    return train


def test_a_seed_determines_every_byte_of_the_update(trained, config):
    first, again = trained(config)[2], trained(config)[2]
    other = trained(dataclasses.replace(config, seed=1))[2]
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(
        torch.equal(first[name], other[name])
        for name in utils.matrices(utils.load_model(utils.TINY))
    )


def test_updates_are_the_tuned_weights_minus_the_base(trained, config):
    dW = trained(config)[2]
    base, tuned = utils.load_model(config.model), utils.prepare(config)
    utils.train(config, tuned)
    W0, W1 = (dict(model.named_parameters()) for model in (base, tuned))
    assert dW.keys() == {name for name, p in W1.items() if p.requires_grad}
    assert all(torch.equal(dW[name], (W1[name] - W0[name]).detach()) for name in dW)


def test_spectra_and_norms_are_those_of_the_updates(trained, config):
    record, spectra, dW = trained(config)
    for name, S in spectra.items():
        oracle = torch.linalg.svdvals(dW[name].double())
        assert torch.allclose(S.double(), oracle, atol=float(1e-6 * oracle[0]))
        assert record["shapes"][name] == list(dW[name].shape)
    norms = record["squared_norms"]
    assert norms["matrices"] == pytest.approx(
        sum(float(S.square().sum()) for S in spectra.values())
    )
    total = sum(float(update.double().square().sum()) for update in dW.values())
    assert sum(norms.values()) == pytest.approx(total)
    assert norms["rest"] > 0


@pytest.mark.parametrize("method", ["full", "lora"])
def test_an_unchanged_model_has_a_zero_spectrum(store, method):
    still = {"steps": 1, "lr": 1e-300, "eval_rows": 4}  # below what float32 can add
    still |= {"method": "lora", "rank": 2} if method == "lora" else {}
    profile = utils.profile()
    record, spectra = utils.measure(profile.config("sentiment", **still))
    base, _ = utils.measure(profile.config("sentiment", "base", eval_rows=4))
    assert len(spectra) == 14
    assert all(not S.any() for S in spectra.values())
    loss, expected = (r["evaluation"]["test"]["loss_nats"] for r in (record, base))
    assert loss == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("rslora", [False, True])
def test_lora_spectra_are_those_of_pefts_own_update(store, rslora):
    from peft.tuners.lora import LoraLayer

    config = utils.profile().config(
        "sentiment", "lora", rank=4, rslora=rslora, steps=3, eval_rows=4, lr=1e-2
    )
    _, spectra = utils.measure(config)
    dW = utils.updates(config)
    model = utils.prepare(config)
    utils.train(config, model)
    layers = {
        f"{n}.weight": m
        for n, m in model.get_base_model().named_modules()
        if isinstance(m, LoraLayer)
    }
    delta = {name: layer.get_delta_weight("default").detach() for name, layer in layers.items()}
    W0 = utils.matrices(utils.load_model(config.model))
    merged = utils.matrices(model.merge_and_unload())
    assert spectra.keys() == dW.keys() == delta.keys() == W0.keys()
    for name, S in spectra.items():
        by_delta = torch.linalg.svdvals(delta[name].double())
        by_merge = torch.linalg.svdvals((merged[name] - W0[name]).detach().double())
        assert S.shape == (4,)
        assert S[0] > 0
        assert torch.allclose(dW[name], delta[name], rtol=1e-5, atol=1e-9)
        assert torch.allclose(S.double(), by_delta[:4], atol=float(1e-5 * by_delta[0]))
        assert torch.allclose(S.double(), by_merge[:4], atol=float(1e-3 * by_merge[0]))


def test_the_alpha_of_rslora_is_divided_by_the_root_of_the_rank(store):
    norms = []
    for rslora in (False, True):
        config = utils.profile().config("sentiment", "lora", rank=4, rslora=rslora)
        model = utils.prepare(config)
        layer = model.get_base_model().get_submodule(Q.removesuffix(".weight"))
        torch.nn.init.ones_(layer.lora_B["default"].weight)
        norms.append(layer.get_delta_weight("default").detach().norm().item())
    assert norms[1] / norms[0] == pytest.approx(2)


def test_lora_trains_factors_only_and_covers_every_matrix(store):
    model = utils.prepare(utils.profile().config("sentiment", "lora", rank=4))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * len(utils.matrices(utils.load_model(utils.TINY)))
    assert all("lora_" in name for name in trained)


@pytest.mark.parametrize("trained_embedding", [False, True])
def test_the_embedding_is_trained_when_asked_only(trained, config, trained_embedding):
    config = dataclasses.replace(config, train_embedding=trained_embedding)
    record, spectra, dW = trained(config)
    moved = [name for name in dW if "embed" in name]
    assert bool(moved) == trained_embedding
    assert all(dW[name].any() for name in moved)
    assert (record["squared_norms"]["embedding"] > 0) == trained_embedding
    assert len(spectra) == 14


@pytest.mark.parametrize("steps", [1, 6])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_run_that_diverges_is_stored_as_diverged(store, method, steps):
    changes = {"lr": 1e30, "steps": steps, "eval_rows": 4}
    changes |= {"rank": 2} if method == "lora" else {}
    result = utils.run(utils.profile().config("sentiment", method, **changes))
    assert result.status == "diverged"
    assert len(result.record["train_loss_nats"]) <= 2  # it stops, rather than training on NaN
    assert result.spectra == {}
    assert result.loss() != result.loss()
    assert utils.runs_table([result])["status"].tolist() == ["diverged"]
    assert utils.spectra_table([result]).empty


def test_a_batch_larger_than_the_task_is_refused(small_task, store):
    with pytest.raises(ValueError, match="batch_size"):
        utils.run(small(batch_size=5))  # four training rows


@pytest.mark.parametrize("method", ["base", "full"])
@pytest.mark.parametrize("task", utils.TASKS)
def test_every_task_runs_to_a_stored_result(store, task, method):
    changes = {} if method == "base" else {"steps": 1}
    config = utils.profile().config(task, method, eval_rows=6, **changes)
    result = utils.run(config)
    assert result.status == "finished"
    assert 5 < result.loss() < 7  # log(384) = 5.95: a random model over 384 tokens
    assert 0 <= result.score() <= 100


def test_tables_have_one_line_a_run_and_one_a_matrix(config):
    results = [utils.run(config)]
    table, spectra = utils.runs_table(results), utils.spectra_table(results)
    assert table[["task", "method", "seed", "status"]].values.tolist() == [
        ["sentiment", "full", 0, "finished"]
    ]
    assert table["loss_nats"].tolist() == [results[0].loss()]
    assert len(spectra) == 14
    row = spectra.set_index("name").loc[Q]
    S = results[0].spectra[Q].double()
    share = S.square() / S.square().sum()
    assert row["energy_8"] == pytest.approx(float(share[:8].sum()))
    assert row["r90"] == int((share.cumsum(0) < 0.9).sum()) + 1
    assert row["stable_rank"] == pytest.approx(float(1 / share[0]))
    assert (row["layer"], row["module"], row["shape"]) == (0, "q_proj", "32x32")
    assert row["excess_8"] == pytest.approx(row["energy_8"] - float(utils.null_energy((32, 32))[7]))


def test_growth_is_what_a_shorter_run_ends_with(store):
    """At a constant learning rate the first half of a run is the run of half as many steps."""
    profile = utils.profile()
    whole, half = (
        utils.run(profile.config("sentiment", steps=steps, schedule="constant", eval_rows=64))
        for steps in (8, 4)
    )
    assert [growth["step"] for growth in whole.record["growth"]] == [1, 2, 4]
    found = whole.record["growth"][-1]
    table = utils.spectra_table([half]).set_index("name").loc[list(half.record["shapes"])]
    for column in ("energy_8", "r90", "entropy_rank", "stable_rank"):
        assert found[column] == pytest.approx(table[column].tolist(), abs=1e-4)
    assert found["loss_nats"] == pytest.approx(
        sum(half.record["evaluation"]["valid"]["row_nats"][:64])
        / sum(half.record["evaluation"]["valid"]["row_tokens"][:64]),
        abs=1e-4,
    )
