"""Two folders of weights: their tensors aligned, their slices streamed side by side."""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

from deltarank.checkpoints import Checkpoint, is_vocabulary, layer_and_module, open_checkpoint
from deltarank.checks import listed, require

CAUSAL = re.compile(r"CausalLM|(?<!With)LMHeadModel")  # LlamaForCausalLM, GPT2LMHeadModel
LM_HEAD = "lm_head.weight"
SLICE_ENTRIES = 2**21  # of a matrix, read at once; larger buffers cost more than they save


@dataclass(frozen=True)
class Pair:
    """Base and tuned checkpoint, aligned tensor by tensor."""

    base: Checkpoint
    tuned: Checkpoint
    names: dict[str, str]  # tensor in tuned -> the same in base
    only_base: list[str]  # heads and poolers that one side lacks
    only_tuned: list[str]

    def matrices(self) -> dict[str, tuple[str, int | None]]:
        """What has a spectrum, {label: (tensor in tuned, expert)}: 2-D, experts of a 3-D one.

        Experts are in a layer, and neither convolutions nor vectors.  Their biases are 2-D, a row
        for each, and no matrix.
        """
        found: dict[str, tuple[str, int | None]] = {}
        for name in self.names:
            shape, deep = self.tuned.shapes[name], layer_and_module(name)[0] >= 0
            entries = math.prod(shape)
            if len(shape) == 2 and entries and not name.endswith("bias"):
                found[name] = (name, None)
            elif len(shape) == 3 and min(shape[1:]) > 1 and entries and deep and "conv" not in name:
                found |= {f"{name}[{i}]": (name, i) for i in range(shape[0])}
        return found

    def is_causal(self) -> bool:
        """Whether the base continues text, which PEFT wants to be told."""
        return any(map(CAUSAL.search, self.base.config.get("architectures") or []))

    def require_same_vocabulary(self, cure: str) -> None:
        """Raise ValueError for a pair that cannot be run on the same tokens."""
        grown, told = [*self.added_rows()], f"{self.base.source} and {self.tuned.source} differ"
        require(not grown, f"{told} in vocabulary, by {grown[:1]}: {cure}")

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape that both sides have: for a resized vocabulary, of its common rows."""
        shapes = self.base.shapes[self.names[name]], self.tuned.shapes[name]
        return tuple(map(min, *shapes)) if shapes[0] else ()

    def added_rows(self) -> dict[str, int]:
        """Rows of resized vocabularies that only tuned has (below zero: only base), by tensor."""
        before = {name: self.base.shapes[here] for name, here in self.names.items()}
        after = {name: self.tuned.shapes[name] for name in self.names}
        return {n: after[n][0] - before[n][0] for n in after if after[n] != before[n]}

    def parts(self, name: str, expert: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield W0 and W1 slice by slice along the longer side, as stored, 2 M entries each."""
        shape = self.shape(name)
        if len(shape) < 2 or math.prod(shape) == 0:
            whole = [slice(0, size) for size in shape]
            yield self.base.read(self.names[name], *whole), self.tuned.read(name, *whole)
            return
        m, n = shape[-2:]
        lead = [slice(0, size) for size in shape[:-2]] if expert is None else [expert]
        long, step = max(m, n), max(1, SLICE_ENTRIES // (math.prod(shape[:-2]) * min(m, n)))
        for start in range(0, long, step):
            cut = slice(start, min(start + step, long))
            index = (*lead, cut, slice(0, n)) if m >= n else (*lead, slice(0, m), cut)
            yield self.base.read(self.names[name], *index), self.tuned.read(name, *index)


def open_pair(base: str, tuned: str, *, allow_pickle: bool = False) -> Pair:
    """Both checkpoints, aligned by name; everything that headers can tell is checked here.

    One side's names may carry a prefix ("transformer."), a head that both tie may be missing on
    one side, a vocabulary may have grown, with the bias of its head.  Raises ValueError naming
    tensor and both shapes otherwise; warns of words and heads that only tuned has.
    """
    W0, W1 = (open_checkpoint(source, allow_pickle=allow_pickle) for source in (base, tuned))
    W0, W1 = _without_tied_heads(W0, W1)
    names = common_names(W0.files, W1.files)
    only_base = sorted(set(W0.files) - set(names.values()))
    only_tuned = sorted(set(W1.files) - set(names))
    require(bool(names), f"{base} and {tuned} have no tensor in common: another architecture?")
    for side, other, alone in ((base, tuned, only_base), (tuned, base, only_tuned)):
        deep = [name for name in alone if layer_and_module(name)[0] >= 0]
        require(
            not deep,
            f"{side} has {', '.join(deep[:1])} and {other} has not ({len(deep)} such tensors): "
            f"is {tuned} a fine-tune of {base}?",
        )
    pair = Pair(W0, W1, names, only_base, only_tuned)
    for name, of_base in names.items():
        before, after = W0.shapes[of_base], W1.shapes[name]
        grown = len(before) == len(after) in (1, 2) and before[1:] == after[1:]
        require(
            before == after or (grown and is_vocabulary(name)),
            f"{name} has shape {before} in {base} ({W0.files[of_base].name}) and {after} in "
            f"{tuned} ({W1.files[name].name}): is {tuned} a fine-tune of {base}?",
        )
    _warn_of_what_is_new(pair, base, tuned)
    return pair


def _warn_of_what_is_new(pair: Pair, base: str, tuned: str) -> None:
    """Warn of rows and tensors that one side alone has: they are no update, or an unknown one."""
    grown = [f"{n}[{-more}:]" for n, more in pair.added_rows().items() if more > 0]
    new = grown + pair.only_tuned
    if new:
        told = f"{tuned} has {listed(new)}, which {base} has not"
        warnings.warn(f"{told}: no adapter holds them, copy them from {tuned}", stacklevel=3)
    gone = [f"{n}[{more}:]" for n, more in pair.added_rows().items() if more < 0]
    lost = gone + pair.only_base
    if lost:
        told = f"{base} has {listed(lost)}, which {tuned} has not"
        warnings.warn(f"{told}: what became of it is not measured", stacklevel=3)


def _without_tied_heads(*sides: Checkpoint) -> tuple[Checkpoint, ...]:
    """Both sides without the head, where on neither it is more than another name of the embedding.

    A tie that config.json states counts as far as the numbers bear it out: a file may hold another
    head all the same.
    """
    if any(side.config.get("tie_word_embeddings") is False for side in sides):
        return sides
    stored = [(side, name) for side in sides for name in side.files if name.endswith(LM_HEAD)]
    if not all(_is_alias(side, name) for side, name in stored):
        return sides
    files = ({n: f for n, f in side.files.items() if not n.endswith(LM_HEAD)} for side in sides)
    return tuple(
        dataclasses.replace(side, files=found) for side, found in zip(sides, files, strict=True)
    )


def _is_alias(side: Checkpoint, head: str) -> bool:
    """Whether a head holds the same numbers as another tensor of the vocabulary."""
    shape = side.shapes[head]
    others = [n for n in side.files if n != head and is_vocabulary(n) and side.shapes[n] == shape]
    step = max(1, SLICE_ENTRIES // max(1, math.prod(shape[1:])))
    cuts = [slice(start, start + step) for start in range(0, shape[0], step)]
    return any(
        all(bool((side.read(head, cut) == side.read(name, cut)).all()) for cut in cuts)
        for name in others
    )


def common_names(base: Iterable[str], tuned: Iterable[str]) -> dict[str, str]:
    """{tensor in tuned: the same in base}; one side's names may carry a prefix.

    >>> common_names(["h.0.w", "lm_head.w"], ["model.h.0.w", "lm_head.w"])
    {'model.h.0.w': 'h.0.w', 'lm_head.w': 'lm_head.w'}
    """
    base, tuned = dict.fromkeys(base), dict.fromkeys(tuned)
    prefixes = {"": None} | _prefixes(base, tuned) | _prefixes(tuned, base)

    def matched(prefix: str) -> dict[str, str]:
        forms = {name: (name, name.removeprefix(prefix), prefix + name) for name in tuned}
        found = {name: [form for form in three if form in base] for name, three in forms.items()}
        return {name: present[0] for name, present in found.items() if present}

    return max(map(matched, prefixes), key=len)


def _prefixes(longer: Iterable[str], shorter: Container[str]) -> dict[str, None]:
    """What some names have before others; one that is real comes with the most of them."""
    ends = ((name, dot.end()) for name in longer for dot in re.finditer(r"\.", name))
    return {name[:end]: None for name, end in ends if name[end:] in shorter}
