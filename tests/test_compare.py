"""A pair's table: planted updates come back, rounding is told from rank, a kill costs little."""

import math
import os
import pathlib
import shutil
import warnings

import pytest
import torch
from pairs import ARCHITECTURES, RANK, SIGMA, Q, edit, plant, same_tables
from safetensors.torch import load_file

from deltarank import compare
from deltarank.compare import compare_checkpoints
from deltarank.runtime import cache_folder
from deltarank.spectra import singular_values

# What comes back


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "mixtral"])
def test_planted_spectra_come_back(save, architecture):
    """Not of Mixtral, whose model holds two matrices of its files as one."""
    table = compare_checkpoints(*save(architecture)).set_index("name")
    inner = table[table["kind"] != "vocabulary"]
    assert len(inner) >= 8
    for name in inner.index[inner["min_dim"] >= RANK]:
        torch.testing.assert_close(table.loc[name, "S"][:RANK], SIGMA, rtol=1e-4, atol=0)
    wide = inner[inner["min_dim"] >= 16]
    assert (wide["r90"] == 2).all()  # (16 + 4) / 21 = 0.95
    assert (wide["stable_rank"] - 21 / 16).abs().max() < 1e-3
    assert (wide["changed_share"] > 0.9).all()
    assert not wide["near_rounding"].any()
    vocabulary = table[table["kind"] == "vocabulary"]
    assert len(vocabulary) and (vocabulary["squared_norm"] == 0).all()


@pytest.mark.parametrize(
    ("architecture", "each"),
    [("gpt-oss", ["gate_up_proj[{}]", "down_proj[{}]"]), ("mixtral", ["{}.w1", "{}.w2", "{}.w3"])],
)
def test_experts_are_matrices_of_their_own(save, architecture, each):
    """Of one tensor with three dimensions, or stored one by one; with the router of each layer."""
    table = compare_checkpoints(*save(architecture))
    experts = table[table["kind"] == "expert"]["name"].str.removesuffix(".weight")
    assert len(experts) == 2 * (len(each) * 3 + 1)
    ends = tuple(f"experts.{end.format(i)}" for end in each for i in range(3))
    assert experts.str.endswith((*ends, "mlp.router", "block_sparse_moe.gate")).all()
    rest = table[table["kind"] == "matrix"]["name"]
    assert len(rest) == 8 and rest.str.contains("self_attn").all()
    assert not table["name"].str.contains("bias").any()  # gpt-oss has one a row for its experts


def test_every_expert_has_its_own_update(save):
    base, tuned = save("gpt-oss")
    name = "model.layers.0.mlp.experts.down_proj"
    edit(tuned, lambda t: [t[name][i].mul_(1 + i) for i in range(3)])
    table = compare_checkpoints(base, tuned).set_index("name")
    W0, W1 = (load_file(f"{folder}/model.safetensors")[name] for folder in (base, tuned))
    for i, dW in enumerate(W1 - W0):
        norm = table.loc[f"{name}[{i}]", "squared_norm"]
        assert norm == pytest.approx(float(dW.square().sum()), rel=1e-5)


def test_every_tensor_is_one_of_the_matrices_or_of_the_rest(save):
    base, tuned = save()
    table = compare_checkpoints(base, tuned)
    names = load_file(f"{tuned}/model.safetensors").keys()
    assert sorted([*table["name"], *table.attrs["rest"]]) == sorted(names)


def test_the_share_of_the_entries_that_changed_is_counted(save):
    base, tuned = save()
    W0 = load_file(f"{base}/model.safetensors")[Q]
    edit(tuned, lambda t: t.update({Q: torch.cat([W0[:8] + 1, W0[8:]])}))
    changed = compare_checkpoints(base, tuned).set_index("name")["changed_share"]
    assert changed[Q] == 0.25 and changed["model.embed_tokens.weight"] == 0


def test_the_table_says_what_singular_values_say(save):
    base, tuned = save()
    table = compare_checkpoints(base, tuned).set_index("name")
    W0, W1 = (load_file(f"{folder}/model.safetensors") for folder in (base, tuned))
    for name in table.index:
        dW = W1[name] - W0[name]
        assert table.loc[name, "shape"] == tuple(dW.shape)
        torch.testing.assert_close(
            table.loc[name, "S"], singular_values(dW).float(), rtol=1e-5, atol=1e-9
        )
        assert table.loc[name, "relative_size"] == pytest.approx(
            float(dW.norm() / W0[name].norm()), rel=1e-5
        )
    norm = "model.norm.weight"
    assert table.attrs["rest"][norm] == pytest.approx(float((W1[norm] - W0[norm]).norm() ** 2))


def test_a_killed_comparison_goes_on(save, monkeypatch):
    base, tuned = save()
    measured, stop_at = [], 5
    original = compare._compare_matrix

    def measure(*arguments):
        measured.append(arguments[1])
        if len(measured) == stop_at:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(compare, "_compare_matrix", measure)
    with pytest.raises(KeyboardInterrupt):
        compare_checkpoints(base, tuned)
    resumed = compare_checkpoints(base, tuned)
    assert len(measured) == len(resumed) + 1  # only the interrupted one was measured twice
    shutil.rmtree(cache_folder() / "pairs")
    assert same_tables(compare_checkpoints(base, tuned), resumed)


def test_a_file_that_was_replaced_is_read_again(save):
    """Though it has the old size and time, as out of a reproducible archive."""
    base, tuned = save()
    first, file = compare_checkpoints(base, tuned), pathlib.Path(tuned, "model.safetensors")
    before = file.stat()
    edit(tuned, lambda t: t.update({Q: t[Q] + 1}))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    again = compare_checkpoints(base, tuned).set_index("name")
    assert again.loc[Q, "squared_norm"] > first.set_index("name").loc[Q, "squared_norm"]


@pytest.mark.parametrize("name", ["{home}/mine", "../../mine", "../../../mine", "n" * 300])
def test_no_name_in_a_file_becomes_a_path(save, tmp_path, monkeypatch, name):
    """Whoever wrote the file could have folders of the reader's replaced."""
    monkeypatch.setenv("LOWRANK_CACHE", str(tmp_path / "cache"))
    kept = [folder / "mine" / "notes.txt" for folder in (tmp_path, tmp_path / "cache")]
    for file in kept:
        file.parent.mkdir(parents=True)
        file.write_text("keep me")
    name = name.format(home=tmp_path)
    base, tuned = save()
    for folder, value in ((base, 0.0), (tuned, 1.0)):
        edit(folder, lambda t, value=value: t.update({name: torch.full((4, 4), value)}))
    assert compare_checkpoints(base, tuned).set_index("name").loc[name, "r90"] == 1
    assert [file.read_text() for file in kept] == ["keep me"] * 2


# Half precision


def rounded_pair(relative_size, rank=8, n=256):
    """A rank-8 update of a given relative size, both sides rounded to bfloat16: W0, W1."""
    generator = torch.Generator().manual_seed(0)
    W0 = torch.randn(n, n, generator=generator) * 0.02
    W0 = W0.bfloat16().float()
    B, A = torch.randn(n, rank, generator=generator), torch.randn(rank, n, generator=generator)
    dW = B @ A
    dW *= relative_size * W0.norm() / dW.norm()
    return W0.bfloat16(), (W0 + dW).bfloat16()


@pytest.mark.parametrize("relative_size", [1e-1, 1e-2, 1e-3])
def test_rounding_is_told_from_rank(save, relative_size):
    base, tuned = save("llama", dtype=torch.bfloat16)
    W0, W1 = rounded_pair(relative_size)
    edit(base, lambda t: t.update(extra=W0))
    edit(tuned, lambda t: t.update(extra=W1))
    row = compare_checkpoints(base, tuned).set_index("name").loc["extra"]
    S = row["S"].double()
    beyond = float(S[8:].square().sum() / S.square().sum())  # what is not the planted rank 8
    if relative_size < 5e-3:  # smaller than the spacing of bfloat16: half of what is left is not
        assert row["near_rounding"] and row["rounding_share"] > beyond > 0.4
        assert row["r90"] > 80
    else:
        assert not row["near_rounding"] and row["above_rounding"] == 8 and row["r90"] in (7, 8)
        assert beyond == pytest.approx(row["rounding_share"] * (1 - 8 / 256) ** 2, rel=0.25)


def test_directions_of_an_oblong_matrix_are_told_from_rounding(save):
    """Weights from 1 to 2 are rounded to 1 / 128; the last of four directions is near the edge."""
    base, tuned = save(dtype=torch.bfloat16)
    generator, m, n = torch.Generator().manual_seed(0), 512, 32
    W0 = (1.2 + 0.6 * torch.rand(m, n, generator=generator)).bfloat16()
    edge = 2**-7 / math.sqrt(12) * (math.sqrt(m) + math.sqrt(n))
    W1 = W0.float()
    plant(W1, generator, sigma=torch.tensor([3.0, 3.0, 3.0, 1.2 * edge]))
    edit(base, lambda t: t.update(extra=W0))
    edit(tuned, lambda t: t.update(extra=W1.bfloat16()))
    row = compare_checkpoints(base, tuned).set_index("name").loc["extra"]
    assert row["above_rounding"] == 4
    assert row["S"][3] < 1.5 * edge and row["S"][4] > 0.95 * edge


@pytest.mark.parametrize(("changed", "near"), [(1, True), (400, True), (450, False)])
def test_rounding_is_near_where_it_is_a_twentieth_of_the_update(save, changed, near):
    """1,024 weights of 1 are rounded by 2^-7; so many of them change by twice as much."""
    base, tuned = save(dtype=torch.bfloat16)
    W0 = torch.ones(32, 32)
    W1 = W0 + 2**-6 * (torch.arange(1024) < changed).view(32, 32)
    edit(base, lambda t: t.update({Q: W0.bfloat16()}))
    edit(tuned, lambda t: t.update({Q: W1.bfloat16()}))
    row = compare_checkpoints(base, tuned).set_index("name").loc[Q]
    share = 1024 / 12 / (4 * changed)
    assert row["rounding_share"] == pytest.approx(min(share, 1))
    assert row["near_rounding"] == near == (share > 0.05)


@pytest.mark.parametrize("scale", [1, 1e-6])  # 1e-6: below float16's smallest normal number
@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "BF16"), (torch.float16, "F16")])
def test_the_rounding_variance_is_that_of_rounding(dtype, name, scale):
    W = torch.randn(400, 400, generator=torch.Generator().manual_seed(0)) * scale
    error = float((W.to(dtype).float() - W).square().sum())
    assert compare._rounding_variance(W.to(dtype).float(), name) == pytest.approx(error, rel=0.03)


def test_the_rounding_is_that_of_the_narrowest_type_that_holds_the_weights(save, tmp_path):
    """A copy in float32 of what was stored in bfloat16 is as rounded as that."""
    base, tuned = save(dtype=torch.bfloat16)
    before = compare_checkpoints(base, tuned)
    for folder in (base, tuned):
        edit(folder, lambda tensors: tensors.update({n: W.float() for n, W in tensors.items()}))
    after = compare_checkpoints(base, tuned)
    assert {*after["dtype_tuned"]} == {"F32"} and (before["rounding_share"] > 0).any()
    for column in ("rounding_share", "above_rounding", "near_rounding"):
        assert after[column].tolist() == pytest.approx(before[column].tolist())
    assert (after["base_rounding_share"] == 0).all()


def test_weights_that_need_float32_are_not_rounded(save):
    table = compare_checkpoints(*save())
    assert (table[["rounding_share", "base_rounding_share"]] == 0).all(axis=None)


def test_a_base_in_a_narrower_type_than_the_tuned_model_is_warned_of(save):
    base, tuned = save(norms=False)
    edit(base, lambda t: t.update({n: W.bfloat16() for n, W in t.items()}))
    with pytest.warns(UserWarning, match="is stored in a narrower type than .* matrices are near"):
        table = compare_checkpoints(base, tuned)
    embedding = table.set_index("name").loc["model.embed_tokens.weight"]  # was not trained
    assert embedding["base_rounding_share"] == pytest.approx(1, abs=0.05)
    assert not table["near_rounding"].any()


def test_a_difference_out_of_the_range_is_no_broken_weight(save):
    base, tuned = save()
    for folder, sign in ((base, -1), (tuned, 1)):
        edit(folder, lambda t, sign=sign: t.update({Q: torch.full_like(t[Q], sign * 3e38)}))
    with pytest.raises(ValueError, match=f"{Q}: the update is out of the range of float32"):
        compare_checkpoints(base, tuned)


def test_mixed_types_are_compared(save):
    base, tuned = save()
    before = compare_checkpoints(base, tuned).set_index("name")
    edit(tuned, lambda t: t.update({Q: t[Q].double()}))
    after = compare_checkpoints(base, tuned).set_index("name")
    assert after.loc[Q, "dtype_tuned"] == "F64"
    assert after.loc[Q, "stable_rank"] == pytest.approx(before.loc[Q, "stable_rank"])


# Strange sizes and values


def test_scales_and_thin_matrices(save):
    base, tuned = save()
    generator = torch.Generator().manual_seed(0)
    extra = {
        "tiny": torch.randn(20, 20, generator=generator) * 1e-30,
        "huge": torch.randn(20, 20, generator=generator) * 1e30,
        "row": torch.randn(1, 20, generator=generator),
        "column": torch.randn(20, 1, generator=generator),
        "vector": torch.randn(20, generator=generator),
        "scalar": torch.tensor(1.0),
        "empty": torch.zeros(0, 20),
    }
    edit(base, lambda t: t.update(extra))
    edit(tuned, lambda t: t.update({name: 2 * W for name, W in extra.items()}))
    table = compare_checkpoints(base, tuned).set_index("name")
    for name in ("tiny", "huge", "row", "column"):
        exact = torch.linalg.svdvals(extra[name].double())
        torch.testing.assert_close(
            table.loc[name, "S"].double(), exact, rtol=1e-3, atol=float(exact[0]) * 1e-6
        )
    assert table.loc["row", "r90"] == table.loc["column", "r90"] == 1
    assert table.attrs["rest"]["scalar"] == 1.0
    assert table.attrs["rest"]["empty"] == 0.0


def test_identical_and_unrelated_pairs_are_named(save):
    base, tuned = save()
    with pytest.warns(UserWarning, match="identical"):
        table = compare_checkpoints(base, base)
    assert (table["r90"] == 0).all() and (table["relative_size"] == 0).all()

    def redraw(tensors):
        for weight in tensors.values():
            weight.normal_(std=0.02)

    edit(tuned, redraw)
    with pytest.warns(UserWarning, match="is .*base really the base"):
        compare_checkpoints(base, tuned)


def test_one_matrix_of_another_size_makes_no_unrelated_pair(save):
    base, tuned = save()
    edit(tuned, lambda t: t[Q].mul_(1e3))
    with warnings.catch_warnings(action="error"):
        compare_checkpoints(base, tuned)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_name_file_and_tensor(save, value):
    base, tuned = save()
    edit(tuned, lambda t: t[Q].view(-1)[7:8].fill_(value))
    with pytest.raises(ValueError, match=f"^tuned/model.safetensors: {Q} .*repair it$"):
        compare_checkpoints(base, tuned)


def test_weights_that_are_and_stay_zero_have_no_size(save):
    base, tuned = save()
    for folder in (base, tuned):
        edit(folder, lambda t: t.update({Q: torch.zeros_like(t[Q])}))
    row = compare_checkpoints(base, tuned).set_index("name").loc[Q]
    assert row["relative_size"] == 0 and row["squared_norm"] == 0


def test_an_update_of_weights_that_were_zero_is_infinitely_large(save):
    base, tuned = save()
    edit(base, lambda t: t[Q].zero_())
    row = compare_checkpoints(base, tuned).set_index("name").loc[Q]
    assert row["relative_size"] == math.inf and row["squared_norm"] > 0


def test_a_norm_whose_update_has_no_square_in_float32_is_in_the_rest(save):
    base, tuned = save()
    name = "model.norm.weight"
    edit(base, lambda t: t[name].zero_())
    edit(tuned, lambda t: t[name].fill_(1e-25))
    rest = compare_checkpoints(base, tuned).attrs["rest"]
    assert rest[name] == pytest.approx(32 * 1e-50, rel=1e-6, abs=0)


@pytest.mark.parametrize("scale", [1e160, 1e60, 1e-60])
def test_an_update_of_doubles_out_of_the_range_of_floats_is_named(save, scale):
    base, tuned = save()
    update = scale * torch.ones(32, 32, dtype=torch.float64)
    edit(base, lambda t: t.update({Q: torch.zeros_like(update)}))
    edit(tuned, lambda t: t.update({Q: update}))
    with pytest.raises(ValueError, match=f"{Q}: .*float32: rescale"):
        compare_checkpoints(base, tuned)


def test_a_pair_without_a_matrix_is_refused(save):
    folders = save()
    for folder in folders:
        edit(folder, lambda t: [t.pop(name) for name in list(t) if t[name].dim() > 1])
    with pytest.raises(ValueError, match="share no matrix: there is nothing to compare"):
        compare_checkpoints(*folders)


def test_a_pair_that_headers_refuse_is_not_measured(save, monkeypatch):
    base, tuned = save()
    edit(tuned, lambda t: t.pop(Q))
    monkeypatch.setattr(compare, "_compare_matrix", lambda *_: pytest.fail("measured"))
    with pytest.raises(ValueError, match=Q):
        compare_checkpoints(base, tuned)
