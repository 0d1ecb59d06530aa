"""Adapters where they are served: PEFT, what PEFT merges, llama.cpp compute the logits of the cut.

Tiny models of four families whose whole update is noise, so that each cut loses much of it.  The
oracle is torch's SVD in float64.  Seconds for PEFT; llama.cpp is built on first use, in two
minutes of one core, and skipped where it cannot be.
"""

import shutil

import families
import llamacpp
import pytest
from families import FAMILIES, TOKENS, build, cut_logits, extract
from loras import edit_lora
from peft import PeftModel
from transformers import AutoModelForCausalLM

FORMS = {  # options of extract; at rank 40 k_proj and v_proj have 32 and zeros
    "rank 8": (8,),
    "rank 40": (40,),
    "patterns": (40, "--patterns"),
    "norms": (8, "--norms"),
}
RANKS = {name: options[0] for name, options in FORMS.items()}
PORTABLE = ["rank 8", "rank 40"]
TOLERANCE = 1e-4  # of logits of size 1; float32 moves them by 1e-5
ANOTHER = 0.1  # apart, and they are those of another model
GELU = 4e-3  # the same of Gemma in llama.cpp, which looks GELU up in a table of float16
NORMS_OF_HEADS = ("Qwen 3", "Gemma 3")  # families that have q_norm and k_norm
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


class Family:
    """Base and tuned folders of a family, and its adapters in every form."""

    def __init__(self, name, home):
        self.name, self.folders = name, families.save(home, name)
        self.base = home / "base"
        self.tolerance = GELU if name == "Gemma 3" else TOLERANCE  # in llama.cpp
        self.adapters = {
            form: extract(self.folders, home / form, "--rank", *options)
            for form, options in FORMS.items()
        }
        self.adapters["alpha doubled"] = home / "alpha doubled"
        shutil.copytree(self.adapters["rank 8"], self.adapters["alpha doubled"])
        edit_lora(self.adapters["alpha doubled"], lora_alpha=16)

    def cut(self, form):
        """The logits that an adapter should have."""
        return cut_logits(self.folders, RANKS[form])

    def in_peft(self, form):
        """The base with an adapter, by PEFT."""
        return PeftModel.from_pretrained(build(self.name), self.adapters[form]).eval()

    def in_llama_cpp(self, form=None):
        """The logits of the base with an adapter, or without, in llama.cpp."""
        adapter = self.adapters[form] if form else None
        return llamacpp.logits(self.base, adapter, tokens=TOKENS)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    return Family(request.param, tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="module")
def converted(family):
    """A family whose base and adapters, but for norms of heads, are there for llama.cpp."""
    llamacpp.python()
    refused = ["norms"] if family.name in NORMS_OF_HEADS else []
    llamacpp.convert(family.base, *(a for f, a in family.adapters.items() if f not in refused))
    return family


def apart(found, expected):
    """The largest difference of two tables of logits."""
    assert found.shape == expected.shape == (len(TOKENS), families.SIZES["vocab_size"])
    return float((found - expected).abs().max())


# PEFT


def test_the_cut_is_neither_base_nor_tuned(family):
    """What the tests below would not see otherwise."""
    tuned = families.logits(AutoModelForCausalLM.from_pretrained(family.folders[1]))
    for form in PORTABLE:
        assert apart(family.cut(form), families.logits(build(family.name))) > ANOTHER
        assert apart(family.cut(form), tuned) > ANOTHER
    assert apart(family.cut("rank 8"), family.cut("rank 40")) > ANOTHER


@pytest.mark.parametrize("form", [*PORTABLE, "patterns"])
def test_peft_computes_the_logits_of_the_cut(family, form):
    assert apart(families.logits(family.in_peft(form)), family.cut(form)) < TOLERANCE


@pytest.mark.parametrize("form", [*PORTABLE, "patterns"])
def test_the_model_that_peft_merged_computes_them(family, form):
    merged = family.in_peft(form).merge_and_unload()
    assert not isinstance(merged, PeftModel)
    assert apart(families.logits(merged), family.cut(form)) < TOLERANCE


def test_twice_the_alpha_is_another_model_in_peft(family):
    found = families.logits(family.in_peft("alpha doubled"))
    assert apart(found, family.cut("rank 8")) > ANOTHER


def test_norms_make_another_model_in_peft(family):
    assert apart(families.logits(family.in_peft("norms")), family.cut("norms")) > ANOTHER


# llama.cpp


def test_a_base_in_llama_cpp_computes_its_own_logits(converted):
    found = converted.in_llama_cpp()
    assert apart(found, families.logits(build(converted.name))) < converted.tolerance


@pytest.mark.parametrize("form", PORTABLE)
def test_llama_cpp_computes_the_logits_of_the_cut(converted, form):
    assert apart(converted.in_llama_cpp(form), converted.cut(form)) < converted.tolerance


def test_twice_the_alpha_is_another_model_in_llama_cpp(converted):
    found = converted.in_llama_cpp("alpha doubled")
    assert apart(found, converted.cut("rank 8")) > ANOTHER
    assert apart(found, cut_logits(converted.folders, 8, alpha=16)) < converted.tolerance


def test_llama_cpp_scales_each_rank_of_a_pattern_by_the_one_alpha(converted):
    """So that --patterns is not the default: k_proj and v_proj, of rank 32, come 40 / 32 times."""
    found = converted.in_llama_cpp("patterns")
    assert apart(found, converted.cut("patterns")) > ANOTHER
    assert apart(found, cut_logits(converted.folders, 40, alpha=40)) < converted.tolerance


def test_llama_cpp_drops_norms_or_its_converter_stops(converted):
    """So that --norms is not the default."""
    if converted.name in NORMS_OF_HEADS:
        with pytest.raises(RuntimeError, match="_norm.weight': Not a lora_A or lora_B tensor"):
            llamacpp.convert(converted.base, converted.adapters["norms"])
    else:
        assert apart(converted.in_llama_cpp("norms"), converted.cut("rank 8")) < TOLERANCE
