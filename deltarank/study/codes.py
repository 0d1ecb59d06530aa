"""Codes: rows whose information is known exactly, and what of it a model has learned."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deltarank.checks import require
from deltarank.study.tasks import a_line_each, answered, encode_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Common nouns of four letters, chosen by hand for this project, so free of any licence.  Each is
# one token of Gemma 3, alone and after a space: all prompts have one length, there as in bytes.
NOUNS = """
area ball bank barn base bath beam bean bear bell belt bike bill bird boat body bone boot bulb bull
bush cafe cage cake calf camp cart case cash cave cell chef chin chip city clay clip club coal coat
code cola cone cook cord corn crab crew crow dawn deal dean deck deer desk dial diet dose drop duck
duke dust exam exit face fact fall farm fear feet film fire fish flat flow foam fold folk foot form
fort fuel fund fuse gear gift goat gold gown hair hall hand harp heat heel herb herd hero hill hint
hood hook horn host hour idea isle item jack joke jury kick kind king kite knee knot lace lady lake
lamb lamp land lane lead leaf lens lift limb lime link lion loan loop mail mall mask mass math meal
menu milk mill mind mist moon move nail name neck need nest note odds opal oven pace page pain palm
park part pass path pear peer pipe play plot plug poem pole poll pond pony pool port pose rack rail
rain rank rate rest ride rise robe rock roll room root rule rust sail sale salt sand scar seal seed
shed ship shoe show sign silk sink size skin soap sock song soup spin spot star stem step suit tail
tale talk tank tape task taxi team tear term test text toll tone tour town trap tray tree trip twin
type vase vest view visa walk wall wave wine wire wish wolf wood work yard zone
"""
WORDS = tuple(NOUNS.split())
DIGITS = "0123456789"
DIGIT_BITS = math.log2(len(DIGITS))  # what a digit drawn at random holds


def draw_codes(count: int, digits: int, seed: int) -> list[dict]:
    """`count` rows, each a distinct prompt of two WORDS and an answer of random digits.

    The digits are independent of the prompts and of each other, so that who knows all prompts
    still needs count * digits * DIGIT_BITS bits to write the answers down: no model of language,
    and no other code, helps.  Raises ValueError for more rows than there are pairs of words.

    >>> [row] = draw_codes(1, 6, seed=0)
    >>> len(row["prompt"].split()), len(row["answer"])
    (2, 6)
    """
    pairs = len(WORDS) ** 2
    require(count <= pairs, f"codes={count}: two words make {pairs} prompts at most")
    generator = random.Random(seed)
    picked = [divmod(i, len(WORDS)) for i in generator.sample(range(pairs), count)]
    return [
        {
            "prompt": f"{WORDS[first]} {WORDS[second]}:",
            "answer": "".join(generator.choices(DIGITS, k=digits)),
        }
        for first, second in picked
    ]


def digit_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token of each digit, 0 to 9.  Raises ValueError where a number is not one a digit."""
    tokens = tokenizer(DIGITS, add_special_tokens=False)["input_ids"]
    alone = [tokenizer(digit, add_special_tokens=False)["input_ids"] for digit in DIGITS]
    require(
        [[token] for token in tokens] == alone,
        f"the tokenizer of {tokenizer.name_or_path or type(tokenizer).__name__} has no token for "
        "each digit of a number: codes need one; choose another model",
    )
    return tokens


def encode_codes(
    rows: Sequence[dict], tokenizer: PreTrainedTokenizerBase
) -> tuple[dict[str, Tensor], Tensor]:
    """The rows as {"input_ids", "labels"}, each (rows, length), and their digits (rows, digits).

    Labels are IGNORED but at the digits; no newline ends a code, for its place is no information.
    """
    tokens = digit_tokens(tokenizer)
    digits = [[int(digit) for digit in row["answer"]] for row in rows]
    encoded = []
    for row, code in zip(rows, digits, strict=True):
        prompt, answer = encode_prompt(row["prompt"], tokenizer), [tokens[digit] for digit in code]
        encoded.append(answered(prompt, answer))
    return a_line_each(encoded), torch.tensor(digits)


def code_scores(nats: Tensor, right: Tensor) -> dict[str, float]:
    """What a model holds of codes by the loss of each digit, and by which of them it has right.

    nats: (codes, digits), -ln of the probability that the model gives a digit among the ten;
    right: (codes, digits), whether it is the likeliest of the ten.  Returns
    learned_bits: the codes' bits minus their loss in bits, that is what is saved in sending them
    to who has the model; 0 for who holds all digits equally likely, below 0 for who guesses worse.
    recall: the share of codes with every digit right; digits_right: the share of digits.

    >>> known = code_scores(torch.zeros(2, 6), torch.ones(2, 6).bool())  # a table that has all
    >>> round(known["learned_bits"], 3), round(2 * 6 * math.log2(10), 3)
    (39.863, 39.863)
    """
    lost = nats.double().sum().item() / math.log(2)
    return {
        "learned_bits": nats.numel() * DIGIT_BITS - lost,
        "recall": right.all(1).double().sum().item() / max(len(right), 1),
        "digits_right": right.double().sum().item() / max(right.numel(), 1),
    }
