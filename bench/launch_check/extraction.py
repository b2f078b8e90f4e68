"""Cases of what is taken from a policy without a gradient: top-K and supports, from logits and from hidden states."""

import torch

import asyncopd
from bench.launch_check.inputs import (
    DTYPES,
    FAR_ROWS,
    FLOATS,
    IDS,
    LAYOUTS,
    VOCABS,
    WIDTH,
    laid_out,
    matrix,
)
from bench.launch_check.pairwise import Case, Rule

TOPK_OPTIONS = {
    "dtype": FLOATS,
    "vocab": VOCABS,
    "k": (64, 1),
    "temperature": (1.0, 0.7),
    "layout": LAYOUTS,
    "rows": (4, 1),
}
TOPK_RULES = (FAR_ROWS,)


def topk(case: Case) -> None:
    logits = matrix(case["rows"], case["vocab"], case["dtype"], case["layout"])
    asyncopd.topk_logprobs(logits, case["k"], temperature=case["temperature"])


SAMPLE_OPTIONS = {
    "dtype": FLOATS,
    "vocab": VOCABS,
    "head": (16, 0),
    "num_samples": (48, 1, 0),
    "seed": ("int", "tensor"),
    "sampled_ids": (None, "int64", "int32"),
    "temperature": (1.0, 0.7),
    "layout": LAYOUTS,
    "rows": (4, 1),
}
SAMPLE_RULES = (
    FAR_ROWS,
    Rule(("head", "num_samples"), lambda head, samples: head + samples > 0),
    Rule(("num_samples", "sampled_ids"), lambda samples, ids: samples > 0 or ids is None),
)


def sample(case: Case) -> None:
    rows, own = case["rows"], case["sampled_ids"]
    asyncopd.sample_support(
        matrix(rows, case["vocab"], case["dtype"], case["layout"]),
        num_samples=case["num_samples"],
        head=case["head"],
        seed=2**40 + 1 if case["seed"] == "int" else torch.arange(rows) - 2,
        sampled_ids=None if own is None else torch.arange(rows, dtype=IDS[own]),
        temperature=case["temperature"],
    )


LINEAR_TOPK_OPTIONS = {
    "dtype": FLOATS,
    "vocab": (2000, 999),
    "rows": (128, 1),  # with a bias, scale or cap 128 rows take the fused form
    "k": (64, 1),
    "width": (WIDTH, WIDTH + 8),
    "bias": (None, "same", "fp32"),
    "temperature": (1.0, 0.7),
    "logit_scale": (1.0, 0.5),
    "softcap": (None, 30.0),
    "hidden": ("contiguous", "rows apart", "transposed"),
    "weight": ("contiguous", "rows apart", "transposed"),
}


def linear_topk(case: Case) -> None:
    dtype, vocab = case["dtype"], case["vocab"]
    asyncopd.linear_topk_logprobs(
        matrix(case["rows"], case["width"], dtype, case["hidden"]),
        matrix(vocab, case["width"], dtype, case["weight"]),
        case["k"],
        bias=head_bias(case, vocab),
        temperature=case["temperature"],
        logit_scale=case["logit_scale"],
        softcap=case["softcap"],
    )


def head_bias(case: Case, vocab: int) -> torch.Tensor | None:
    """options read: bias, dtype"""
    kind = case["bias"]
    return None if kind is None else torch.ones(vocab, dtype=DTYPES[case["dtype"] if kind == "same" else kind])


SHARDED_TOPK_OPTIONS = {"dtype": FLOATS, "k": (64, 1), "temperature": (1.0, 0.7), "from": ("logits", "hidden states")}


def sharded_topk(case: Case) -> None:
    from bench.launch_check.shards import LonelyShard

    shard, dtype = LonelyShard.of_sizes(2000, 1000), case["dtype"]
    if case["from"] == "logits":
        asyncopd.vocab_parallel_topk_logprobs(
            matrix(4, shard.size, dtype), case["k"], shard, temperature=case["temperature"]
        )
    else:
        hidden, weight = matrix(4, WIDTH, dtype), laid_out(matrix(shard.size, WIDTH, dtype), "rows apart")
        asyncopd.vocab_parallel_linear_topk_logprobs(hidden, weight, case["k"], shard, temperature=case["temperature"])
