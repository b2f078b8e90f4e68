"""The teacher: one prefill over a slot's packed sequences, and the scores that the draw asks for."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from asyncopd.engines.draw import DrawName, token_streams
from asyncopd.engines.model import Head
from asyncopd.engines.packing import Pack, packs, predicting_states
from asyncopd.ops import linear_gather_logprobs, linear_topk_logprobs, sample_support
from asyncopd.pipeline.slots import SlotView


class TeacherScorer:
    """The pipeline's `Scorer` on a causal language model.

    Where the student drew, it scores exactly the slot's ids, and no [R, V] logits are ever held. Where the teacher
    draws (its own top-K, or samples from itself) it writes ids and log-weights as well.

    Args:
        temperature: divides the teacher's logits; the same as the student's.
        max_packed_tokens: tokens of one forward pass (memory grows with its square: the mask).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        draw: DrawName,
        num_scores: int,
        temperature: float,
        seed: int,
        max_packed_tokens: int,
    ) -> None:
        self.model = model.eval()
        self.head = Head.of(model)
        self.draw, self.num_scores = draw, num_scores
        self.temperature = temperature
        self.seed = seed
        self.max_packed_tokens = max_packed_tokens

    @torch.inference_mode()
    def score(self, slot: SlotView) -> None:
        for pack in packs(slot, None, self.max_packed_tokens):
            hidden = predicting_states(self.model, pack)
            if self.draw == "teacher_top_k":
                top = linear_topk_logprobs(
                    hidden, self.head.weight, self.num_scores, temperature=self.temperature, **self.head.options()
                )
                self._write(slot, pack, top.ids, torch.zeros_like(top.logprobs), top.logprobs)
            elif self.draw == "teacher_samples":
                self._sample(slot, pack, hidden)
            else:
                slot.teacher_logprobs[pack.slot_rows] = linear_gather_logprobs(
                    hidden,
                    self.head.weight,
                    slot.ids[pack.slot_rows],
                    temperature=self.temperature,
                    **self.head.options(),
                ).float()

    def _sample(self, slot: SlotView, pack: Pack, hidden: Tensor) -> None:
        uids, positions = _token_names(slot)
        streams = token_streams(self.seed, uids, positions, purpose=1)
        # A few rows at a time: sampling is the one thing that needs a row's logits whole.
        for rows in torch.arange(hidden.shape[0]).split(256):
            out = sample_support(
                self.head.logits(hidden[rows]),
                num_samples=self.num_scores,
                seed=streams[pack.slot_rows[rows]],
                temperature=self.temperature,
            )
            self._write(slot, pack, out.ids, out.log_weights, out.logprobs, rows)

    @staticmethod
    def _write(
        slot: SlotView, pack: Pack, ids: Tensor, log_weights: Tensor, logprobs: Tensor, rows: Tensor | None = None
    ) -> None:
        target = pack.slot_rows if rows is None else pack.slot_rows[rows]
        slot.ids[target] = ids.int()
        slot.log_weights[target] = log_weights.float()
        slot.teacher_logprobs[target] = logprobs.float()


def _token_names(slot: SlotView) -> tuple[Tensor, Tensor]:
    """int64 [R] each: which sequence and which response position every row of the slot belongs to."""
    lengths = slot.response_lengths.long()
    starts = lengths.cumsum(0) - lengths
    uids = torch.repeat_interleave(slot.uids, lengths)
    return uids, torch.arange(len(uids)) - torch.repeat_interleave(starts, lengths)
