"""Ranks by energy and by budget, against PEFT, planted ranks and enumeration; and the verdict."""

import itertools

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from pairs import RANK, SIGMA, Q, build, edit, plant
from peft import LoHaConfig, convert_to_lora, get_peft_model
from safetensors.torch import load_file

from deltarank import ranks
from deltarank.adapters import extract_adapter
from deltarank.compare import compare_checkpoints
from deltarank.page import Inspection
from deltarank.ranks import adapter_verdict, kept_share, ranks_of, recommend_ranks, verdict
from deltarank.spectra import energy_rank, null_energy, singular_values, spectrum_measures


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8, 0.9, 0.95, 0.99])
def test_energy_agrees_with_peft(share):
    """convert_to_lora gives a layer the rank that energy_rank gives the same update."""
    torch.manual_seed(0)
    targets = ["q_proj", "down_proj"]
    loha = get_peft_model(build("llama"), LoHaConfig(r=6, alpha=6, target_modules=targets))
    for name, parameter in loha.named_parameters():
        if "hada" in name:
            torch.nn.init.normal_(parameter)
    layers = {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach()
        for name, module in loha.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    _, factors = convert_to_lora(loha, rank=share)
    assert len(layers) == 4
    for name, dW in layers.items():
        theirs = next(len(A) for key, A in factors.items() if name in key and "lora_A" in key)
        assert energy_rank(singular_values(dW), share) == theirs


def test_ranks_by_energy_find_the_planted_rank(save):
    lora = recommend_ranks(compare_checkpoints(*save()), energy=0.999)
    assert lora["r"] == RANK and lora["rank_pattern"] == {} and lora["lora_alpha"] == RANK
    assert len(lora["target_modules"]) == 14


def test_noise_gets_no_rank_that_energy_would_give_it():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(128, 96, generator=generator)
    plant(noise, generator, sigma=torch.tensor([60.0, 50.0]))
    S = singular_values(noise)
    assert energy_rank(S, 0.9) > 40
    assert energy_rank(ranks._above_noise(S, (128, 96)), 0.9) == 2


@pytest.mark.parametrize(("wide", "budget"), [(3, 24), (21, 36)])
def test_a_budget_is_spent_best(wide, budget):
    """The greedy allocation keeps as much energy as the best of all, by enumeration."""
    spectra = {
        "a.weight": [3.0, 2.0, 0.5],
        "b.weight": [2.9, 2.8, 0.1],
        "c.weight": [1.0, 0.9, 0.8],
    }
    shapes = dict(zip(spectra, [(3, 3), (3, wide), (3, 3)], strict=True))
    columns = {"name": list(spectra), "S": [torch.tensor(S) for S in spectra.values()]}
    columns |= {"shape": list(shapes.values()), "kind": "matrix", "squared_norm": 1.0}
    table = pd.DataFrame(columns)
    lora = recommend_ranks(table, budget=budget)
    got = ranks_of(lora, spectra)

    def kept(allocation):
        return sum(sum(s**2 for s in spectra[n][:r]) for n, r in allocation.items())

    every = [
        dict(zip(spectra, each, strict=True)) for each in itertools.product(range(4), repeat=3)
    ]
    takes = [sum(r * sum(shapes[n]) for n, r in each.items()) for each in every]
    best = max((each for each, n in zip(every, takes, strict=True) if n <= budget), key=kept)
    assert got == best
    assert recommend_ranks(table, budget=6)["target_modules"] == ["a"]
    with pytest.raises(ValueError, match="budget=5"):
        recommend_ranks(table, budget=5)


def test_what_noise_of_the_medians_variance_adds_is_taken_off():
    null = null_energy((128, 96)).diff(prepend=torch.zeros(1, dtype=torch.float64))
    update = torch.zeros(96, dtype=torch.float64)
    update[:3] = torch.tensor([9.0, 4.0, 1.0])
    found = ranks._above_noise((40 * null + update).sqrt(), (128, 96))
    torch.testing.assert_close(found, update.sqrt(), rtol=0, atol=1e-6)


def test_a_pair_without_an_update_has_no_ranks(save):
    base, _ = save()
    with pytest.warns(UserWarning, match="identical"):
        table = compare_checkpoints(base, base)
    with pytest.raises(ValueError, match="no linear layer was changed"):
        recommend_ranks(table, energy=0.9)


@pytest.mark.parametrize("rule", [{}, {"energy": 0.9, "budget": 1000}, {"rank": 8, "budget": 9}])
def test_one_rule_is_to_be_given(rule):
    with pytest.raises(ValueError, match="give one of rank=16, energy=0.9 and budget"):
        recommend_ranks(pd.DataFrame(), **rule)


def test_a_budget_below_the_first_rank_names_what_it_would_go_to():
    """The greedy rule takes the largest gain a parameter first, be it of a large matrix."""
    rows = [("big", (100, 100), 9.0), ("small", (4, 4), 1e-3)]
    lines = [
        {"name": name, "kind": "matrix", "shape": shape, "S": torch.tensor([s]), "squared_norm": s}
        for name, shape, s in rows
    ]
    with pytest.raises(ValueError, match="budget=50: the first rank goes to big and takes 200"):
        recommend_ranks(pd.DataFrame(lines), budget=50)


def test_one_rank_for_all_gives_a_smaller_matrix_all_it_has(save):
    table = compare_checkpoints(*save())
    lora = recommend_ranks(table, rank=20)
    others = ["model.layers.0.self_attn.k_proj.weight", "model.embed_tokens.weight"]
    assert [*ranks_of(lora, [Q, *others]).values()] == [20, 16, 0]  # the last left out
    for rank in (0, 33):
        with pytest.raises(ValueError, match=f"rank={rank}: choose one from 1 to 32"):
            recommend_ranks(table, rank=rank)


@pytest.mark.parametrize("share", [0.0, 1.1])
def test_a_share_of_the_energy_outside_0_to_1_is_refused(save, share):
    with pytest.raises(ValueError, match=f"energy={share}: must be above 0 and at most 1"):
        recommend_ranks(compare_checkpoints(*save()), energy=share)


def test_the_share_that_ranks_keep_is_that_of_the_cuts(save):
    table = compare_checkpoints(*save())
    one = recommend_ranks(table, rank=1)
    assert kept_share(table, one) == pytest.approx(float(SIGMA[0] ** 2 / SIGMA.square().sum()))
    assert kept_share(table, recommend_ranks(table, rank=RANK)) == pytest.approx(1)


def adapter_table(S, rank):
    """A table of Lora.spectra: two matrices of 64 x 48 with these singular values."""
    rows = [{"name": f"model.layers.{i}.q_proj.weight", "kind": "matrix"} for i in (0, 1)]
    table = pd.DataFrame(rows).assign(S=[S] * 2, shape=[(64, 48)] * 2, lora_rank=rank)
    table = table.assign(dtype_tuned="F16", **spectrum_measures(S, (64, 48)))
    table.attrs = {"rest": {}}
    return table


def test_an_adapter_has_no_noise_below_its_rank():
    """The singular values that a LoRA lacks are zero, and so is the noise that they tell of."""
    S = torch.tensor([3.0, 2.0, 1.0, 0.5])
    table = adapter_table(S, 4)
    for share in (0.5, 0.9, 0.95, 1.0):
        lora = recommend_ranks(table, energy=share)
        assert {*ranks_of(lora, table["name"]).values()} == {energy_rank(S, share)}
    assert recommend_ranks(table, budget=10**6)["r"] == 4
    with pytest.raises(ValueError, match="rank=5: choose one from 1 to 4"):
        recommend_ranks(table, rank=5)


def test_the_list_of_modules_is_not_searched_for_each_matrix(save):
    """A mixture of experts has thousands: searching for each took minutes."""

    class Unsearched(list):
        def __contains__(self, module):
            raise AssertionError("the list was searched")

    table = compare_checkpoints(*save())
    lora = recommend_ranks(table, rank=2)
    lora["target_modules"] = Unsearched(lora["target_modules"])
    assert len(verdict(table, lora)) == 3
    assert len(Inspection("base", "tuned", {"rank": 2}, table, lora).shown) == len(table)


# The verdict


@pytest.mark.parametrize(
    ("S", "uses", "found"),
    [
        ([4.0, 2] + [0.1] * 6, (2, 2), "half of its rank holds 99 % of it"),
        ([1.0] * 4 + [0.01] * 4, (4, 4), "half of its rank holds 99 % of it"),
        ([4.0, 2, 1, 1] + [0.6] * 4, (4, 8), "half of its rank holds 90 % of it"),
        ([1.0] * 8, (8, 8), "it uses most of its rank"),
    ],
)
def test_the_verdict_on_an_adapter_says_what_it_uses_of_its_rank(S, uses, found):
    table = adapter_table(torch.tensor(S), 8)
    lines = adapter_verdict(table, recommend_ranks(table, rank=1))
    first = "Of its rank 8 in 2 matrices the adapter uses {} directions (median) for 90 % and {} "
    assert lines[0].startswith(f"{first.format(*uses)}for 99 % of its squared update: ")
    assert found in lines[0] and "Cut at rank 1 it keeps" in lines[0]
    assert "The ranks for extraction take 224 parameters" in lines[1]
    assert lines[2].startswith("The adapter takes 1,792 parameters, stored as F16.")
    assert not any("nan" in line for line in lines)


def test_the_verdict_on_an_adapter_of_nothing_is_one_line():
    assert adapter_verdict(adapter_table(torch.zeros(8), 8), None) == [
        "None of 2 matrices can be cut: the adapter changes no layer."
    ]


def test_the_verdict_on_a_pair_whose_experts_alone_changed_says_so():
    S = torch.tensor([2.0, 1.0])
    table = pd.DataFrame({"kind": ["matrix", "expert", "expert"], "S": [0 * S, S, S]})
    table["squared_norm"] = [0.0, 5.0, 5.0]
    (line,) = verdict(table, None)
    assert line.startswith("None of 3 matrices can be cut: those of linear layers are unchanged.")
    assert line.endswith("What changed no LoRA of ours holds: 2 of kind expert.")
    table.attrs["rest"] = {"norm.weight": 0.1, "bias": 0.0}
    (line,) = verdict(table, None)
    assert line.endswith("holds: 2 of kind expert, 1 norms, biases and others.")


def test_the_verdict_knows_a_merged_lora_and_what_is_mostly_rounding():
    S = torch.cat([torch.full((14,), 3.0), torch.full((50,), 1e-3)])
    table = table_of(S, S).assign(near_rounding=False)
    (first, *_) = verdict(table, recommend_ranks(table, rank=8))
    assert ": nearly all of it is in 14 directions (median), as of a merged LoRA. Cut at" in first
    table = table.assign(near_rounding=True, above_rounding=5)
    first, _, last = verdict(table, recommend_ranks(table, rank=8))
    assert ": much of it is rounding, above which 5 directions stand (median). Cut at" in first
    assert "2 of 2 matrices are near rounding: what a cut leaves out is mostly rounding" in last


def test_the_verdict_says_what_vllm_does_not_load(save):
    table = compare_checkpoints(*save())
    lora = recommend_ranks(table, rank=2)
    assert " MB in float32)" in verdict(table, lora)[1]
    assert "vLLM" not in verdict(table, lora | {"r": 512})[1]
    assert "vLLM loads no more than rank 512." in verdict(table, lora | {"r": 513})[1]


def test_what_is_no_linear_layer_gets_no_rank(save):
    """A norm of many heads, the state of a Mamba, the positions of a T5: 2-D, and no LoRA's."""
    base, tuned = save()
    before = recommend_ranks(compare_checkpoints(base, tuned), rank=2)
    layer, generator = "model.layers.0.self_attn", torch.Generator().manual_seed(0)
    names = [f"{layer}.q_norm.weight", f"{layer}.A_log"]
    names.append(f"{layer}.relative_attention_bias.weight")
    for folder in (base, tuned):
        more = {name: torch.randn(8, 16, generator=generator) for name in names}
        edit(folder, lambda tensors, more=more: tensors.update(more))
    table = compare_checkpoints(base, tuned)
    kinds = table.set_index("name")["kind"]
    assert {*kinds[names]} == {"other"} and (kinds == "matrix").sum() == 14
    assert recommend_ranks(table, rank=2) == before
    assert (
        "Outside these matrices, not in the factors: " in (told := verdict(table, before)[1])
        and "other " in told
    )


def test_the_verdict_says_what_one_rank_for_all_stores(save, tmp_path):
    base, tuned = save()
    edit(tuned, lambda t: plant(t[Q], torch.Generator().manual_seed(5), sigma=torch.ones(9) / 50))
    table = compare_checkpoints(base, tuned)
    lora = recommend_ranks(table, energy=0.99)
    extract_adapter(base, tuned, str(tmp_path / "out"), ranks=lora)
    stored = sum(t.numel() for t in load_file(tmp_path / "out/adapter_model.safetensors").values())
    size = f"{4 * stored / 1e6:,.1f} MB in float32"
    assert (
        f"parameters ({stored:,} stored at one rank, {size}); 1 matrix " in verdict(table, lora)[1]
    )


def test_the_verdict_names_the_matrix_that_needs_most(save):
    base, tuned = save()
    edit(tuned, lambda t: plant(t[Q], torch.Generator().manual_seed(5), sigma=torch.ones(9) / 50))
    table = compare_checkpoints(base, tuned)
    lines = verdict(table, recommend_ranks(table, energy=0.99))
    assert len(lines) == 3
    assert "14 matrices" in lines[0] and "rank 64 100 %" in lines[0]
    assert f"1 matrix needs more than the median, most of all {Q}" in lines[1]
    assert "F32" in lines[2] and "0 of 14 matrices are near rounding." in lines[2]


def test_the_verdict_names_none_where_several_need_most(save):
    table = compare_checkpoints(*save())
    needed = {
        name: 2 if i < 3 else 1 for i, name in enumerate(ranks.changed_matrices(table)["name"])
    }
    line = verdict(table, ranks.lora_arguments(needed))[1]
    assert "3 matrices need more than the median. " in line


def test_the_verdict_says_what_to_do_at_one_rank(save):
    table = compare_checkpoints(*save())
    lines = verdict(table, recommend_ranks(table, rank=1))
    assert "rank 8 keeps 100 %" in lines[0]
    assert "low-rank" in lines[0] and "noise" not in lines[0]
    assert "Cut at rank 1 it keeps 76 %" in lines[0]  # 16 of 16 + 4 + 1
    assert "train" in lines[0] and "learning rate" in lines[0]
    assert "most of all" not in lines[1]


def table_of(*spectra):
    """A table of (96, 64) matrices with these spectra, the first of them near rounding."""
    names = [f"a.{i}.x.weight" for i in range(len(spectra))]
    columns = {"name": names, "shape": [(96, 64)] * len(names), "S": list(spectra)}
    columns |= {"kind": "matrix", "relative_size": 0.053, "dtype_tuned": "BF16"}
    measures = pd.DataFrame([spectrum_measures(S, (96, 64)) for S in spectra])
    table = measures.assign(**columns, near_rounding=[name == names[0] for name in names])
    table.attrs["rest"] = {"norm": 0.0}
    return table


CONCENTRATED = "it is concentrated, but not low-rank"


@pytest.mark.parametrize(
    ("squares", "found"),
    [
        ([(30.0, 8), (1.0, 20)], "it is low-rank"),  # rank 8 keeps 92 %
        ([(17.0, 8), (1.0, 20)], CONCENTRATED),  # 87 %
        ([(10.0, 8), (1.0, 20)], CONCENTRATED),
        ([(10.0, 14), (0.02, 50)], CONCENTRATED),  # 14 directions hold 99.3 %: no merged LoRA
        ([(9.0, 4), (1.0, 34)], CONCENTRATED),  # r90 is 0.795 of what noise needs
        ([(9.0, 4), (1.0, 36)], "it is spread out like noise"),  # 0.85
    ],
)
def test_the_verdict_says_what_kind_of_update_it_is(squares, found):
    S = torch.cat([torch.full((count,), square) for square, count in squares]).sqrt()
    table = table_of(*[F.pad(S, (0, 64 - len(S)))] * 2)
    assert f": {found}. Cut at" in verdict(table, recommend_ranks(table, rank=8))[0]


def test_one_matrix_unlike_the_others_moves_no_median_of_the_verdict():
    one, all_of_it = torch.ones(1), torch.ones(60)
    table = table_of(one, one, all_of_it).assign(relative_size=[0.01, 0.02, 0.9])
    lora = recommend_ranks(table, rank=1)
    lines = verdict(table, lora)
    assert "needs rank 1 (median), 0.03 of what noise of its shape needs" in lines[1]
    assert "the update is 2.0 % of the weights (median)" in lines[2]
    (first, *_) = adapter_verdict(table.assign(lora_rank=64), lora)
    assert "uses 1 directions (median) for 90 % and 1 for 99 % of its squared update" in first


def test_the_verdict_is_on_the_matrices_that_a_lora_adapts():
    table = table_of(torch.ones(64), torch.ones(4)).assign(kind=["vocabulary", "matrix"])
    (first, *_) = verdict(table, recommend_ranks(table, rank=4))
    assert "Of the squared update of 1 matrices rank 8 keeps 100 %" in first


def test_the_verdict_says_which_share_lies_outside_the_matrices():
    table = table_of(torch.ones(6), torch.ones(4)).assign(kind=["vocabulary", "matrix"])
    table.attrs["rest"] = {"norm": 10.0, "bias": 20.0}
    line = verdict(table, recommend_ranks(table, rank=1))[1]
    told = "vocabulary 15 %, norms, biases and others 75 % of the whole squared update"
    assert f"not in the factors: {told}" in line


def test_the_verdict_on_noise_says_so_and_doubts_what_is_near_rounding():
    S = (96 * 64 * null_energy((96, 64)).diff(prepend=torch.zeros(1))).sqrt()
    table = table_of(S, S)
    lines = verdict(table, recommend_ranks(table, rank=8))
    assert "noise" in lines[0] and "low-rank" not in lines[0]
    assert "1.00 of what noise of its shape needs" in lines[1]
    assert lines[2].startswith("Stored as BF16, the update is 5.3 % of the weights")
    assert "1 of 2 matrices are near rounding: their ranks say little" in lines[2]


def test_the_verdict_on_a_pair_without_an_update_is_one_line(save):
    base, _ = save()
    with pytest.warns(UserWarning, match="identical"):
        table = compare_checkpoints(base, base)
    assert len(verdict(table, None)) == 1 and "unchanged" in verdict(table, None)[0]
