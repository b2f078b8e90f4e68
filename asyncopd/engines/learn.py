"""The learner: optimizer steps on the fused loss over packed rows."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from asyncopd.checkpoints import save_model
from asyncopd.engines.draw import KIND, DrawName
from asyncopd.engines.model import Head
from asyncopd.engines.packing import packs, predicting_states
from asyncopd.losses import Correction, LossMetrics, linear_forward_kl, linear_reverse_kl
from asyncopd.losses.options import Baseline, Normalize, Tail
from asyncopd.pipeline.shared import TensorSpec
from asyncopd.pipeline.slots import SlotView
from asyncopd.pipeline.weights import specs_of
from asyncopd.support import Support


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOptions:
    """Which divergence over the support, with the options of `asyncopd.reverse_kl` / `asyncopd.forward_kl`."""

    kind: Literal["reverse_kl", "forward_kl"] = "reverse_kl"
    normalize: Normalize = "exact"
    tail: Tail = "drop"
    baseline: Baseline = "mean"
    correction: Correction | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerOptions:
    """AdamW with linear warm-up and a cosine down to `min_lr_ratio` of the peak."""

    lr: float
    betas: tuple[float, float]
    weight_decay: float
    grad_clip: float
    warmup_steps: int
    min_lr_ratio: float
    total_steps: int


class OpdLearner:
    """The pipeline's `Learner`: the student in fp32 (its own master weights), AdamW, gradient clipping.

    A step is the mean over all response tokens of its batch, whatever slots and packs they came in: each pack's loss is
    divided by the token count of the whole batch.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        draw: DrawName,
        loss: LossOptions,
        optimizer: OptimizerOptions,
        temperature: float,
        max_packed_tokens: int,
    ) -> None:
        self.model = model.float().train()
        self.head = Head.of(model)
        self.draw, self.loss, self.options = draw, loss, optimizer
        self.temperature = temperature
        self.max_packed_tokens = max_packed_tokens
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=optimizer.lr, betas=optimizer.betas, weight_decay=optimizer.weight_decay
        )
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._lr_share)

    def weight_spec(self) -> list[TensorSpec]:
        return specs_of(self.named_weights())

    def named_weights(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.model.named_parameters()}

    def _lr_share(self, step: int) -> float:
        """Learning rate of step 0, 1, ... as a share of the peak; the first step already trains."""
        o = self.options
        if step < o.warmup_steps:
            return (step + 1) / (o.warmup_steps + 1)
        progress = (step - o.warmup_steps) / max(1, o.total_steps - o.warmup_steps)
        return o.min_lr_ratio + (1.0 - o.min_lr_ratio) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))

    def step(self, batch: list[tuple[SlotView, list[int]]]) -> dict[str, float]:
        num_tokens = sum(int(slot.response_lengths[sequences].sum()) for slot, sequences in batch)
        if num_tokens == 0:
            raise ValueError("step: got a batch without response tokens, expected at least one")
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        means = torch.zeros(len(LossMetrics._fields), dtype=torch.float32)
        for hidden, support in self._micro_batches(batch):
            loss, metrics = self._loss(hidden, support, num_tokens)
            loss.backward()
            total += loss.item()
            # Weighted by tokens: the mean of the batch, for the percentile the mean of the packs' percentiles.
            means += torch.stack(metrics) * (len(support.ids) / num_tokens)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.options.grad_clip, error_if_nonfinite=True)
        lr = float(self.scheduler.get_last_lr()[0])
        self.optimizer.step()
        self.scheduler.step()
        named = {f"loss/{name}": value for name, value in zip(LossMetrics._fields, means.tolist(), strict=True)}
        return {"loss": total, **named, "grad_norm": float(norm), "lr": lr}

    def _micro_batches(self, batch: list[tuple[SlotView, list[int]]]) -> Iterator[tuple[Tensor, Support]]:
        """Hidden states [R, H] and their support, a pack at a time; all at once where rows depend on each other."""
        parts = (
            (predicting_states(self.model, pack), self._support(slot, pack.slot_rows))
            for slot, sequences in batch
            for pack in packs(slot, sequences, self.max_packed_tokens)
        )
        if self.loss.correction is None or self.loss.correction.m2_budget is None:
            yield from parts
            return
        # M2PO spends one budget over the whole batch; split, it would be another estimator.
        hidden, supports = zip(*parts, strict=True)
        ids, scores, log_weights = (
            torch.cat([getattr(s, name) for s in supports]) for name in ("ids", "teacher_logprobs", "log_weights")
        )
        yield torch.cat(hidden), Support(ids, scores, log_weights, KIND[self.draw])

    def _support(self, slot: SlotView, rows: Tensor) -> Support:
        return Support(slot.ids[rows], slot.teacher_logprobs[rows], slot.log_weights[rows], KIND[self.draw])

    def _loss(self, hidden: Tensor, support: Support, num_tokens: int) -> tuple[Tensor, LossMetrics]:
        options = {
            "tail": self.loss.tail,
            "num_items_in_batch": num_tokens,
            "return_metrics": True,
            "temperature": self.temperature,
            **self.head.options(),
        }
        if self.loss.kind == "forward_kl":
            return linear_forward_kl(hidden, self.head.weight, support, **options)
        return linear_reverse_kl(
            hidden,
            self.head.weight,
            support,
            normalize=self.loss.normalize,
            baseline=self.loss.baseline,
            correction=self.loss.correction,
            **options,
        )

    def save(self, path: str) -> None:
        save_model(self.model, Path(path))
