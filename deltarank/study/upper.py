"""The upper part of a model: its last layers alone, on what the frozen ones below gave once."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltarank.checks import require
from deltarank.runtime import progress
from deltarank.study.losses import HIDDEN_TOLERANCE, Head, autocast, head_of, scoring
from deltarank.study.tasks import IGNORED

ROWS = 64  # rows that pass through the model at once where none is trained on


class Skip(nn.Module):
    """A layer that gives back the hidden states that it is given."""

    def forward(self, hidden: Tensor, *arguments, **named) -> Tensor:
        """`hidden`, whatever else the layers of the family are told."""
        return hidden


@dataclass(frozen=True)
class Upper:
    """The upper layers of a model, a head over some token ids, and rows with n answer tokens each.

    states: (rows, length, width), what the lowest of these layers is given; answers: (rows,
    length), True where the next token is one of the answer; targets: (rows, n), the answer tokens
    as their places among the head's ids; dtype: the autocast type.
    """

    model: nn.Module
    head: Head
    states: Tensor
    answers: Tensor
    targets: Tensor
    dtype: torch.dtype

    def of(self, picked: slice) -> Upper:
        """The same with some of the rows."""
        parts = {name: getattr(self, name)[picked] for name in ("states", "answers", "targets")}
        return dataclasses.replace(self, **parts)

    def hidden(self, **given: Tensor) -> Tensor:
        """Last hidden states (rows, length, width) from inputs_embeds=, some of the states."""
        with autocast(self.states.device, self.dtype):
            return self.model.get_decoder()(**given, use_cache=False).last_hidden_state

    def logits(self, picked: Tensor | slice) -> Tensor:
        """Logits (rows, n, ids) of the picked rows, in float32."""
        hidden = self.hidden(inputs_embeds=self.states[picked])
        y = self.head.logits(hidden[self.answers[picked]].float())  # (rows * n, ids)
        return y.view(*self.targets[picked].shape, -1)

    def nats(self, picked: Tensor | slice) -> Tensor:
        """Cross-entropy (rows, n) of the picked rows' targets in nats, among the head's ids.

        The loss over the whole vocabulary is this plus -ln of the probability that the next token
        is one of these ids at all.
        """
        return _cross_entropy(self.logits(picked), self.targets[picked])

    @torch.no_grad()
    def scores(self) -> tuple[Tensor, Tensor]:
        """nats of all rows, and whether each target is the likeliest id; both (rows, n)."""
        with scoring(self.model):
            parts = [self.logits(slice(i, i + ROWS)) for i in range(0, len(self.targets), ROWS)]
        y = torch.cat(parts)
        return _cross_entropy(y, self.targets), y.argmax(-1) == self.targets


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats, of the targets' shape; logits have one dimension more, the ids."""
    return F.cross_entropy(logits.movedim(-1, 1), targets, reduction="none")


def upper_part(
    model: nn.Module,
    first: int,
    batch: dict[str, Tensor],
    *,
    ids: list[int],
    targets: Tensor,
    dtype: torch.dtype,
    label: str = "",
) -> Upper:
    """`model` from its layer `first` on, with the rows of `batch`; takes the layers below it out.

    batch: input_ids and labels (rows, length + 1), as collate gives them; ids: the tokens that the
    head is to choose among; targets: (rows, n), the place in `ids` of each answer token.
    The layers below must not be trained.  With 640 numbers a token, the states of 1,000 codes take
    23 MB of memory.  Raises ValueError, naming the architecture, where the layers do not go on from
    what they were given: a family that does more to embeddings than its layers do.
    """
    whole, layers = head_of(model), decoder_layers(model)
    bias = None if whole.rule.bias is None else whole.rule.bias[ids]
    head = Head(whole.weight[ids].float(), dataclasses.replace(whole.rule, bias=bias))
    place = whole.weight.device
    tokens, answers = batch["input_ids"][:, :-1].to(place), batch["labels"][:, 1:] != IGNORED
    states = _states(model, first, tokens, dtype, label)
    found = Upper(model, head, states, answers.to(place), targets.to(place), dtype)
    with scoring(model):
        plain = found.hidden(input_ids=tokens[:ROWS])
        for i in range(first):
            layers[i] = Skip()  # the others keep their numbers
        moved = found.hidden(inputs_embeds=states[:ROWS]) - plain
    require(
        moved.norm().item() <= HIDDEN_TOLERANCE * plain.norm().item(),
        f"{type(model).__name__} does not go on from the states of a layer: choose another model",
    )
    return found


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The layers of a model, the lowest first; raises ValueError where they are not found."""
    layers = getattr(model.get_decoder(), "layers", None)
    told = f"{type(model).__name__} keeps its layers where they are not found: choose another model"
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(told)
    return layers


@torch.no_grad()
def _states(
    model: nn.Module, first: int, input_ids: Tensor, dtype: torch.dtype, label: str
) -> Tensor:
    """What the layer `first` is given for each token: (rows, length, width)."""
    states: list[Tensor] = []

    def keep(layer: nn.Module, given: tuple, named: dict) -> None:
        states.append(given[0] if given else named["hidden_states"])

    handle = decoder_layers(model)[first].register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with (
            scoring(model),
            autocast(input_ids.device, dtype),
            progress(len(input_ids), label) as bar,
        ):
            for rows in input_ids.split(ROWS):
                model.get_decoder()(input_ids=rows, use_cache=False)
                bar.update(len(rows))
    finally:
        handle.remove()
    return torch.cat(states)
