"""Codes: what rows hold, how they are told in tokens, and bits that are known in closed form."""

import math
from collections import Counter

import pytest
import torch

from deltarank.study.codes import (
    DIGIT_BITS,
    DIGITS,
    WORDS,
    code_scores,
    digit_tokens,
    draw_codes,
    encode_codes,
)
from deltarank.study.models import TINY, load_tokenizer


def test_words_are_distinct_and_of_one_length():
    assert len(set(WORDS)) == len(WORDS) == 256
    assert {len(word) for word in WORDS} == {4} and "".join(WORDS).islower()


def test_prompts_are_distinct_and_digits_are_even():
    rows = draw_codes(4000, 6, seed=0)
    assert len({row["prompt"] for row in rows}) == 4000
    digits = Counter("".join(row["answer"] for row in rows))
    assert digits.keys() == set(DIGITS)
    spread = math.sqrt(24000 * 0.1 * 0.9)
    assert all(abs(count - 2400) < 5 * spread for count in digits.values())
    assert {len(row["answer"]) for row in rows} == {6}


def test_a_seed_draws_the_same_codes_and_another_draws_others():
    assert draw_codes(20, 4, seed=1) == draw_codes(20, 4, seed=1)
    first, second = (draw_codes(20, 4, seed=seed) for seed in (1, 2))
    assert first != second
    assert [row["answer"] for row in first] != [row["answer"] for row in second]


def test_more_codes_than_pairs_of_words_are_refused():
    assert len({row["prompt"] for row in draw_codes(256**2, 1, seed=0)}) == 256**2
    with pytest.raises(ValueError, match="^codes=65537: two words make 65536 prompts at most$"):
        draw_codes(256**2 + 1, 1, seed=0)


def test_rows_are_told_digit_by_digit_and_only_digits_count():
    tokenizer, rows = load_tokenizer(TINY), draw_codes(5, 3, seed=0)
    batch, digits = encode_codes(rows, tokenizer)
    texts = tokenizer.batch_decode(batch["input_ids"])
    assert texts == [row["prompt"] + row["answer"] for row in rows]
    tokens = torch.tensor(digit_tokens(tokenizer))
    counted = batch["labels"][batch["labels"] != -100].view(5, 3)
    assert torch.equal(counted, tokens[digits])
    assert ["".join(map(str, code)) for code in digits.tolist()] == [r["answer"] for r in rows]


class Joiner:
    """A tokenizer that makes one token of two digits."""

    name_or_path = "joiner"

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [10 + int(text[i : i + 2]) for i in range(0, len(text), 2)]}


def test_a_tokenizer_that_joins_digits_is_refused():
    with pytest.raises(ValueError, match="^the tokenizer of joiner has no token for each digit"):
        digit_tokens(Joiner())


def test_a_table_holds_all_bits_half_a_table_half_and_a_uniform_guess_none():
    known, unknown = torch.zeros(64, 6), torch.full((64, 6), math.log(10))
    right, wrong = torch.ones(64, 6).bool(), torch.zeros(64, 6).bool()
    total = 64 * 6 * math.log2(10)
    assert code_scores(known, right)["learned_bits"] == pytest.approx(total)
    assert code_scores(unknown, wrong)["learned_bits"] == pytest.approx(0, abs=1e-3)
    half = torch.cat([known[:32], unknown[:32]]), torch.cat([right[:32], wrong[:32]])
    scores = code_scores(*half)
    assert scores["learned_bits"] == pytest.approx(total / 2, rel=1e-6)
    assert scores["recall"] == scores["digits_right"] == 0.5
    assert total / 64 == pytest.approx(6 * DIGIT_BITS)


def test_a_code_counts_as_recalled_only_with_every_digit():
    right = torch.tensor([[True, True], [True, False], [False, False], [True, True]])
    scores = code_scores(torch.zeros(4, 2), right)
    assert scores["recall"] == 0.5 and scores["digits_right"] == 5 / 8


def test_no_codes_hold_no_bits():
    scores = code_scores(torch.zeros(0, 6), torch.zeros(0, 6).bool())
    assert scores == {"learned_bits": 0, "recall": 0, "digits_right": 0}
