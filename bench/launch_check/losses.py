"""Cases of the losses, forward and backward: on [N, K] scores, through a head, and through one split by vocabulary."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

import asyncopd
from asyncopd import Correction
from bench.launch_check.extraction import head_bias
from bench.launch_check.gathering import HEAD_VOCAB
from bench.launch_check.inputs import (
    DTYPES,
    FLOATS,
    IDS,
    WIDTH,
    backward,
    laid_out,
    matrix,
    some_mask,
    support,
    wants_grad,
)
from bench.launch_check.pairwise import Case, Rule
from bench.launch_check.shards import LonelyShard

REDUCTIONS = ("mean", "sum", "none", "items", "items tensor")
CORRECTIONS = ("none", "ratio_cap", "clip_eps", "clip_eps, proximal", "m2_budget")
DRAWS = (None, "top_k", "samples", "head_tail", "teacher_samples")


def reduction_options(case: Case) -> dict[str, Any]:
    """options read: reduction"""
    kind = case["reduction"]
    items = {"items": 7, "items tensor": torch.tensor(7)}
    return {"num_items_in_batch": items[kind]} if kind in items else {"reduction": kind}


def correction_of(kind: str, advantage: str, shape: torch.Size) -> Correction | None:
    options: dict[str, dict[str, Any]] = {
        "none": {},
        "ratio_cap": {"ratio_cap": 2.0},
        "clip_eps": {"clip_eps": 0.2},
        "clip_eps, proximal": {"clip_eps": 0.2, "proximal_logprobs": torch.full(shape, -2.0)},
        "m2_budget": {"m2_budget": 0.04},
    }
    if kind == "none" and advantage == "current":
        return None
    return Correction(advantage=advantage, **options[kind])  # type: ignore[arg-type]


SCORES_OPTIONS = {
    "dtype": FLOATS,
    "teacher": ("fp32", "bf16", "fp64"),
    "ids": tuple(IDS),
    "k": (64, 1),
    "mask": (None, "bool", "int"),
    "metrics": (False, True),
    "reduction": REDUCTIONS,
    "layout": ("contiguous", "rows apart", "transposed"),
    "rows": (6, 1),
}

REVERSE_OPTIONS = {
    "draw": DRAWS,
    "normalize": ("exact", "sampled"),
    "tail": ("drop", "bucket", "renormalize"),
    "baseline": ("none", "mean", "loo"),
    "correction": CORRECTIONS,
    "advantage": ("current", "behavior"),
    **SCORES_OPTIONS,
}
REVERSE_RULES = (
    Rule(("tail", "draw"), lambda tail, draw: tail == "drop" or draw in (None, "top_k")),
    Rule(("tail", "baseline"), lambda tail, baseline: tail == "drop" or baseline == "none"),
    Rule(("tail", "normalize"), lambda tail, normalize: tail == "drop" or normalize == "exact"),
    Rule(("tail", "correction"), lambda tail, correction: tail == "drop" or correction == "none"),
    Rule(("tail", "advantage"), lambda tail, advantage: tail == "drop" or advantage == "current"),
    Rule(("normalize", "draw"), lambda normalize, draw: normalize == "exact" or draw != "top_k"),
    Rule(("baseline", "draw"), lambda baseline, draw: baseline != "loo" or draw != "top_k"),
    Rule(("correction", "draw"), lambda correction, draw: correction == "none" or draw in (None, "samples")),
    Rule(("advantage", "draw"), lambda advantage, draw: advantage == "current" or draw in (None, "samples")),
)
FORWARD_OPTIONS = {"draw": DRAWS, "tail": ("drop", "bucket", "renormalize"), **SCORES_OPTIONS}
FORWARD_RULES = REVERSE_RULES[:1]


def student_scores(case: Case) -> Tensor:
    """options read: rows, k, dtype, layout"""
    return wants_grad(
        laid_out(torch.full((case["rows"], case["k"]), -1.5, dtype=DTYPES[case["dtype"]]), case["layout"])
    )


def reverse(case: Case) -> None:
    student = student_scores(case)
    loss = asyncopd.reverse_kl(
        student,
        support(case, case["rows"], case["k"], 1000, case["draw"], case["layout"]),
        mask=some_mask(case["rows"], case["mask"]),
        normalize=case["normalize"],
        tail=case["tail"],
        baseline=case["baseline"],
        correction=correction_of(case["correction"], case["advantage"], student.shape),
        return_metrics=case["metrics"],
        **reduction_options(case),
    )
    backward(loss)


def forward(case: Case) -> None:
    student = student_scores(case)
    loss = asyncopd.forward_kl(
        student,
        support(case, case["rows"], case["k"], 1000, case["draw"], case["layout"]),
        mask=some_mask(case["rows"], case["mask"]),
        tail=case["tail"],
        return_metrics=case["metrics"],
        **reduction_options(case),
    )
    backward(loss)


# What a loss makes of its head's products: how the pairs of its own options behave is seen on scores, above.
LOSSES: dict[str, tuple[str | None, dict[str, Any]]] = {
    "reverse": ("head_tail", {}),
    "reverse, mean": ("head_tail", {"baseline": "mean"}),
    "reverse, loo": ("samples", {"baseline": "loo"}),
    "reverse, bucket": ("top_k", {"tail": "bucket"}),
    "reverse, renormalize": ("top_k", {"tail": "renormalize"}),
    "sampled": ("head_tail", {"normalize": "sampled"}),
    "sampled, mean": ("samples", {"normalize": "sampled", "baseline": "mean"}),
    "forward": (None, {}),
    "forward, renormalize": ("top_k", {"tail": "renormalize"}),
    "ratio_cap": ("samples", {"correction": ("ratio_cap", "current")}),
    "clip_eps, proximal, mean": (
        "samples",
        {"correction": ("clip_eps, proximal", "behavior"), "baseline": "mean"},
    ),
    "m2_budget": ("samples", {"correction": ("m2_budget", "current")}),
}

HEAD_OPTIONS = {
    "loss": tuple(LOSSES),
    "dtype": FLOATS,
    "teacher": ("fp32", "bf16", "fp64"),
    "mask": (None, "bool", "int"),
    "metrics": (False, True),
    "reduction": REDUCTIONS,
    "trains": ("both", "hidden", "weight"),
    "bias": (None, "same", "fp32"),
    "temperature": (1.0, 0.7),
    "logit_scale": (1.0, 0.5),
    "softcap": (None, 30.0),
    "hidden": ("contiguous", "rows apart"),
    "weight": ("contiguous", "transposed"),
    "rows": (6, 1),
    "ids": tuple(IDS),
}


def through_head(case: Case) -> None:
    _through_head(case, HEAD_VOCAB, None)


# What a shard changes is which ids are here; how layouts and sizes are launched is seen above.
_OF_A_SHARD = ("loss", "dtype", "mask", "reduction", "trains", "bias", "temperature", "softcap", "rows")
SHARDED_OPTIONS = {name: HEAD_OPTIONS[name] for name in _OF_A_SHARD}


def through_sharded_head(case: Case) -> None:
    """Ids of the first of two shards and of the second."""
    others = {"teacher": "fp32", "metrics": False, "logit_scale": 1.0, "ids": "int64"}
    layouts = {"hidden": "contiguous", "weight": "contiguous"}
    _through_head({**case, **others, **layouts}, HEAD_VOCAB, LonelyShard.of_sizes(HEAD_VOCAB, 500))


def _through_head(case: Case, vocab: int, shard: LonelyShard | None) -> None:
    k, rows, dtype, trains = 64, case["rows"], case["dtype"], case["trains"]
    draw, options = LOSSES[case["loss"]]
    options = dict(options)
    if "correction" in options:
        kind, advantage = options["correction"]
        options["correction"] = correction_of(kind, advantage, torch.Size((rows, k)))
    bias = head_bias(case, vocab)
    is_forward = case["loss"].startswith("forward")
    function: Any
    if shard is None:
        function = asyncopd.linear_forward_kl if is_forward else asyncopd.linear_reverse_kl
    elif is_forward:
        function = partial(asyncopd.vocab_parallel_linear_forward_kl, shard=shard)
    else:
        function = partial(asyncopd.vocab_parallel_linear_reverse_kl, shard=shard)
    loss = function(
        wants_grad(matrix(rows, WIDTH, dtype, case["hidden"]), trains != "weight"),
        wants_grad(matrix(vocab, WIDTH, dtype, case["weight"]), trains != "hidden"),
        support(case, rows, k, vocab if shard is None else shard.vocab, draw),
        mask=some_mask(rows, case["mask"]),
        return_metrics=case["metrics"],
        bias=None if bias is None else wants_grad(bias),
        temperature=case["temperature"],
        logit_scale=case["logit_scale"],
        softcap=case["softcap"],
        **options,
        **reduction_options(case),
    )
    backward(loss)
