"""Cases of what is taken from a policy without a gradient: top-K and supports, from logits and from hidden states."""

import torch

import asyncopd
from bench.launch_check.inputs import (
    FAR_ROWS,
    FLOATS,
    HEADS,
    IDS,
    LAYOUTS,
    LOGITS,
    WIDTH,
    Size,
    head_bias,
    laid_out,
    matrix,
)
from bench.launch_check.pairwise import Case, Rule
from bench.launch_check.shards import LonelyShard

TOPK_OPTIONS = {"dtype": FLOATS, "size": tuple(LOGITS), "layout": LAYOUTS, "temperature": (1.0, 0.7)}
TOPK_RULES = (FAR_ROWS,)


def topk(case: Case) -> None:
    size = LOGITS[case["size"]]
    logits = matrix(size.rows, size.vocab, case["dtype"], case["layout"])
    asyncopd.topk_logprobs(logits, size.k, temperature=case["temperature"])


SAMPLE_OPTIONS = {
    "dtype": FLOATS,
    "size": tuple(LOGITS),
    "head": (16, 0),
    "num_samples": (48, 1, 0),
    "seed": ("int", "tensor"),
    "sampled_ids": (None, "int64", "int32"),
    "temperature": (1.0, 0.7),
    "layout": LAYOUTS,
}
SAMPLE_RULES = (
    FAR_ROWS,
    Rule(("head", "num_samples"), lambda head, samples: head + samples > 0),
    Rule(("num_samples", "sampled_ids"), lambda samples, ids: samples > 0 or ids is None),
)


def sample(case: Case) -> None:
    size, own = LOGITS[case["size"]], case["sampled_ids"]
    asyncopd.sample_support(
        matrix(size.rows, size.vocab, case["dtype"], case["layout"]),
        num_samples=case["num_samples"],
        head=case["head"],
        seed=2**40 + 1 if case["seed"] == "int" else torch.arange(size.rows) - 2,
        sampled_ids=None if own is None else torch.arange(size.rows, dtype=IDS[own]),
        temperature=case["temperature"],
    )


# With a bias, scale or cap 128 rows take the fused form.
LINEAR_TOPK_SIZES = {"usual": Size(128, 2000, 64), "ones": Size(1, 999, 1)}
LINEAR_TOPK_OPTIONS = {
    "dtype": FLOATS,
    "size": tuple(LINEAR_TOPK_SIZES),
    "width": (WIDTH, WIDTH + 8),
    "bias": (None, "same", "fp32"),
    "temperature": (1.0, 0.7),
    "logit_scale": (1.0, 0.5),
    "softcap": (None, 30.0),
    "hidden": ("contiguous", "rows apart", "transposed"),
    "weight": ("contiguous", "rows apart", "transposed"),
}


def linear_topk(case: Case) -> None:
    size, dtype = LINEAR_TOPK_SIZES[case["size"]], case["dtype"]
    asyncopd.linear_topk_logprobs(
        matrix(size.rows, case["width"], dtype, case["hidden"]),
        matrix(size.vocab, case["width"], dtype, case["weight"]),
        size.k,
        bias=head_bias(size.vocab, dtype, case["bias"]),
        temperature=case["temperature"],
        logit_scale=case["logit_scale"],
        softcap=case["softcap"],
    )


SHARDED_TOPK_OPTIONS = {
    "dtype": FLOATS,
    "size": tuple(HEADS),
    "temperature": (1.0, 0.7),
    "of": ("logits", "hidden states"),
}


def sharded_topk(case: Case) -> None:
    size, dtype, temperature = HEADS[case["size"]], case["dtype"], case["temperature"]
    shard = LonelyShard.of_sizes(size.vocab, 500)
    if case["of"] == "logits":
        logits = matrix(size.rows, size.vocab, dtype)
        asyncopd.vocab_parallel_topk_logprobs(logits, size.k, shard, temperature=temperature)
    else:
        hidden, weight = matrix(size.rows, WIDTH, dtype), laid_out(matrix(size.vocab, WIDTH, dtype), "rows apart")
        asyncopd.vocab_parallel_linear_topk_logprobs(hidden, weight, size.k, shard, temperature=temperature)
