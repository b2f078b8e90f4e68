"""Several sequences in one row of a forward pass, without padding and without seeing each other.

A pack of sequences of lengths L_1, L_2, ... is one row of sum L_i tokens; positions restart in each sequence and the
attention mask is block-diagonal and causal. The state at a sequence's position t - 1 predicts its token t: those states
are the rows that every loss and score is computed on.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from asyncopd.engines.model import trunk
from asyncopd.pipeline.slots import SlotView, Span


@dataclass(slots=True)
class Pack:
    """One forward pass over T tokens of which R are response tokens."""

    input_ids: Tensor  # int64 [1, T]
    position_ids: Tensor  # int64 [1, T]
    attention_mask: Tensor  # bool [1, 1, T, T]
    predicting: Tensor  # int64 [R], the position whose state predicts each response token
    slot_rows: Tensor  # int64 [R], the slot's row of that response token


def packs(slot: SlotView, sequences: Iterable[int] | None, max_tokens: int) -> Iterator[Pack]:
    """The chosen sequences of a slot (None: all) in packs of at most `max_tokens` tokens, or one longer sequence."""
    spans = slot.spans()
    group: list[Span] = []
    length = 0
    for index in range(len(spans)) if sequences is None else sequences:
        span = spans[index]
        size = span.prompt_length + span.response_length
        if group and length + size > max_tokens:
            yield pack(slot.tokens, group)
            group, length = [], 0
        group.append(span)
        length += size
    if group:
        yield pack(slot.tokens, group)


def pack(tokens: Tensor, spans: list[Span]) -> Pack:
    """Pack these spans of a slot's tokens."""
    lengths = torch.tensor([s.prompt_length + s.response_length for s in spans])
    ends = lengths.cumsum(0)
    starts = ends - lengths
    input_ids = torch.cat([tokens[s.start : s.start + s.prompt_length + s.response_length] for s in spans])
    sequence = torch.repeat_interleave(torch.arange(len(spans)), lengths)
    position = torch.arange(int(ends[-1])) - starts[sequence]
    causal = torch.ones(len(sequence), len(sequence), dtype=torch.bool).tril_()
    predicting = [
        torch.arange(s.response_length) + (start + s.prompt_length - 1)
        for s, start in zip(spans, starts.tolist(), strict=True)
    ]
    slot_rows = [torch.arange(s.row, s.row + s.response_length) for s in spans]
    return Pack(
        input_ids.long()[None],
        position[None],
        (causal & (sequence[:, None] == sequence[None, :]))[None, None],
        torch.cat(predicting),
        torch.cat(slot_rows),
    )


def predicting_states(model: PreTrainedModel, pack: Pack) -> Tensor:
    """Hidden states [R, H] that predict the pack's response tokens, in the order of `pack.slot_rows`."""
    out = trunk(model)(
        input_ids=pack.input_ids,
        position_ids=pack.position_ids,
        attention_mask=pack.attention_mask,
        use_cache=False,
    )
    return out.last_hidden_state[0, pack.predicting]
