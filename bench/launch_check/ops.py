"""Every op, its table of cases and how one of them is run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.launch_check import extraction, gathering, losses
from bench.launch_check.pairwise import Case, Rule, table


@dataclass(frozen=True, slots=True)
class Op:
    """`run(case)` calls the op, and its backward if it has one."""

    name: str
    options: Mapping[str, Sequence[Any]]
    rules: Sequence[Rule]
    run: Callable[[Case], None]

    def cases(self) -> list[Case]:
        return table(self.options, self.rules)


OPS = (
    Op("topk_logprobs", extraction.TOPK_OPTIONS, extraction.TOPK_RULES, extraction.topk),
    Op("sample_support", extraction.SAMPLE_OPTIONS, extraction.SAMPLE_RULES, extraction.sample),
    Op("gather_logprobs", gathering.GATHER_OPTIONS, gathering.GATHER_RULES, gathering.gather),
    Op("reverse_kl", losses.REVERSE_OPTIONS, losses.REVERSE_RULES, losses.reverse),
    Op("forward_kl", losses.FORWARD_OPTIONS, losses.FORWARD_RULES, losses.forward),
    Op("linear_topk_logprobs", extraction.LINEAR_TOPK_OPTIONS, (), extraction.linear_topk),
    Op("linear_gather_logprobs", gathering.LINEAR_GATHER_OPTIONS, (), gathering.linear_gather),
    Op("linear_gather_logits_into", gathering.LOGITS_INTO_OPTIONS, (), gathering.logits_into),
    Op("linear_reverse_kl, linear_forward_kl", losses.HEAD_OPTIONS, (), losses.through_head),
    Op("linear_reverse_kl, frozen head", losses.FROZEN_OPTIONS, (), losses.through_frozen_head),
    Op("linear losses, many rows", losses.MANY_ROWS_OPTIONS, (), losses.through_many_rows),
    Op("linear_reverse_kl, slices of 64 columns", losses.WIDE_OPTIONS, (), losses.through_wide_head),
    Op("vocab_parallel_linear_reverse_kl, _forward_kl", losses.SHARDED_OPTIONS, (), losses.through_sharded_head),
    Op("vocab_parallel_topk_logprobs, _linear", extraction.SHARDED_TOPK_OPTIONS, (), extraction.sharded_topk),
)


def describe(case: Case) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in case.items())
