"""Cases of the losses, forward and backward: on [N, K] scores, through a head, and through one split by vocabulary."""

from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import asyncopd
from asyncopd import Correction
from asyncopd.kernels import head_walk
from bench.launch_check.inputs import (
    DTYPES,
    FLOATS,
    HEADS,
    IDS,
    SCORES,
    WIDTH,
    Size,
    backward,
    head_bias,
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
    "size": tuple(SCORES),
    "mask": (None, "bool", "int"),
    "metrics": (False, True),
    "reduction": REDUCTIONS,
    "layout": ("contiguous", "rows apart", "transposed"),
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


def student_scores(case: Case, size: Size) -> Tensor:
    values = torch.full((size.rows, size.k), -1.5, dtype=DTYPES[case["dtype"]])
    return wants_grad(laid_out(values, case["layout"]))


def reverse(case: Case) -> None:
    size = SCORES[case["size"]]
    student = student_scores(case, size)
    loss = asyncopd.reverse_kl(
        student,
        support(size, case["draw"], case["teacher"], case["ids"], case["layout"]),
        mask=some_mask(size.rows, case["mask"]),
        normalize=case["normalize"],
        tail=case["tail"],
        baseline=case["baseline"],
        correction=correction_of(case["correction"], case["advantage"], student.shape),
        return_metrics=case["metrics"],
        **reduction_options(case),
    )
    backward(loss)


def forward(case: Case) -> None:
    size = SCORES[case["size"]]
    loss = asyncopd.forward_kl(
        student_scores(case, size),
        support(size, case["draw"], case["teacher"], case["ids"], case["layout"]),
        mask=some_mask(size.rows, case["mask"]),
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

# Likewise of a head, whose options go with each other in `linear_gather_logprobs`.
KINDS_OF_HEAD: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": "same", "logit_scale": 0.5, "weight": "transposed"},
    "softcap": {"softcap": 30.0, "temperature": 0.7, "weight": "transposed"},
    "fp32 bias, softcap": {"bias": "fp32", "softcap": 30.0, "temperature": 0.7, "hidden": "rows apart"},
}

HEAD_OPTIONS = {
    "loss": tuple(LOSSES),
    "dtype": FLOATS,
    "head": ("plain", "bias", "fp32 bias, softcap"),
    "size": tuple(HEADS),
    "mask": (None, "bool", "int"),
    "metrics": (False, True),
    "reduction": REDUCTIONS,
    "trains": ("both", "hidden", "weight"),
    "teacher": ("fp32", "bf16", "fp64"),
    "ids": tuple(IDS),
}


def through_head(case: Case) -> None:
    _through_head(case, None)


# A head that is not trained and has no bias takes one walk, with kernels of its own, where the loss is exact.
FROZEN_OPTIONS = {
    "loss": ("reverse", "reverse, loo", "reverse, bucket", "forward", "ratio_cap"),
    "dtype": FLOATS,
    "head": ("plain", "softcap"),
    "size": tuple(HEADS),
    "mask": (None, "bool"),
    "metrics": (False, True),
    "teacher": ("fp32", "fp64"),
    "ids": tuple(IDS),
}


def through_frozen_head(case: Case) -> None:
    _through_head({**case, "trains": "hidden", "reduction": "mean"}, None)


# At a real vocabulary some rows of e are kept in dW, some beside it, and some logits are multiplied again. Here that
# takes more rows than the head has columns, and little room beside dW.
MANY_ROWS_OPTIONS = {
    "loss": ("reverse", "forward"),
    "dtype": FLOATS,
    "beside": (0, 20),  # rows
    "mask": (None, "bool"),
    "trains": ("both", "weight"),
}
MANY_ROWS = Size(2 * WIDTH, 9_000, 5)


def through_many_rows(case: Case) -> None:
    room = case["beside"] * (MANY_ROWS.vocab + 16) * (4 if case["dtype"] == "fp32" else 2)
    others = {"head": "plain", "metrics": False, "reduction": "mean", "teacher": "fp32", "ids": "int64"}
    with mock.patch.object(head_walk, "KEPT_BYTES", room):
        _through_head({**case, **others}, None, MANY_ROWS)


# A vocabulary at which a row of the weight is split into slices of 64 columns.
WIDE_OPTIONS = {"loss": ("sampled",), "dtype": ("bf16", "fp32"), "trains": ("both", "hidden"), "ids": tuple(IDS)}
WIDE = Size(2, 220_000, 64)


def through_wide_head(case: Case) -> None:
    others = {"head": "plain", "mask": None, "metrics": False, "reduction": "mean", "teacher": "fp32"}
    _through_head({**case, **others}, None, WIDE)


# What a shard changes is which ids are here; how teachers and metrics are launched is seen above.
_OF_A_SHARD = ("loss", "dtype", "head", "mask", "trains")
SHARDED_OPTIONS = {name: HEAD_OPTIONS[name] for name in _OF_A_SHARD}


def through_sharded_head(case: Case) -> None:
    """Ids of the first of two shards and of the second."""
    others = {"size": "usual", "metrics": False, "reduction": "mean", "teacher": "fp32", "ids": "int64"}
    _through_head({**case, **others}, LonelyShard.of_sizes(HEADS["usual"].vocab, 500))


def _through_head(case: Case, shard: LonelyShard | None, size: Size | None = None) -> None:
    size, dtype, trains = size or HEADS[case["size"]], case["dtype"], case["trains"]
    head: dict[str, Any] = {"hidden": "contiguous", "weight": "contiguous", "bias": None}
    head |= KINDS_OF_HEAD[case["head"]]
    draw, loss_options = LOSSES[case["loss"]]
    options = dict(loss_options)
    if "correction" in options:
        kind, advantage = options["correction"]
        options["correction"] = correction_of(kind, advantage, torch.Size((size.rows, size.k)))
    options |= {name: value for name, value in head.items() if name in ("temperature", "logit_scale", "softcap")}
    bias = head_bias(size.vocab, dtype, head["bias"])
    ids_of = size if shard is None else replace(size, vocab=shard.vocab)
    is_forward = case["loss"].startswith("forward")
    function: Any
    if shard is None:
        function = asyncopd.linear_forward_kl if is_forward else asyncopd.linear_reverse_kl
    elif is_forward:
        function = partial(asyncopd.vocab_parallel_linear_forward_kl, shard=shard)
    else:
        function = partial(asyncopd.vocab_parallel_linear_reverse_kl, shard=shard)
    loss = function(
        wants_grad(matrix(size.rows, WIDTH, dtype, head["hidden"]), trains != "weight"),
        wants_grad(matrix(size.vocab, WIDTH, dtype, head["weight"]), trains != "hidden"),
        support(ids_of, draw, case["teacher"], case["ids"]),
        mask=some_mask(size.rows, case["mask"]),
        return_metrics=case["metrics"],
        bias=None if bias is None else wants_grad(bias),
        **options,
        **reduction_options(case),
    )
    backward(loss)
