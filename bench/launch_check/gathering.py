"""Cases of scores at ids, forward and backward: from logits, and through the exact and the sampled head."""

import torch

import asyncopd
from asyncopd.ops import linear_gather_logits_into
from bench.launch_check.extraction import head_bias
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
    some_ids,
    some_mask,
    wants_grad,
)
from bench.launch_check.pairwise import Case

HEAD_VOCAB = 40_000  # tiles of 4,096 columns, as at any larger vocabulary

GATHER_OPTIONS = {
    "dtype": FLOATS,
    "vocab": VOCABS,
    "ids": tuple(IDS),
    "k": (64, 1, 200),
    "temperature": (1.0, 0.7),
    "layout": LAYOUTS,
    "gradient": ("contiguous", "expanded"),
    "rows": (4, 1),
}
GATHER_RULES = (FAR_ROWS,)


def gather(case: Case) -> None:
    rows, vocab, k = case["rows"], case["vocab"], case["k"]
    logits = wants_grad(matrix(rows, vocab, case["dtype"], case["layout"]))
    ids = some_ids(rows, k, vocab, case["ids"])
    scores = asyncopd.gather_logprobs(logits, ids, temperature=case["temperature"])
    gradient = torch.ones(scores.shape, dtype=scores.dtype)
    scores.backward(gradient if case["gradient"] == "contiguous" else gradient[:1, :1].expand(scores.shape))


LINEAR_GATHER_OPTIONS = {
    "dtype": FLOATS,
    "vocab": (HEAD_VOCAB, 999),
    "ids": tuple(IDS),
    "k": (64, 1),
    "bias": (None, "same", "fp32"),
    "temperature": (1.0, 0.7),
    "logit_scale": (1.0, 0.5),
    "softcap": (None, 30.0),
    "hidden": ("contiguous", "rows apart", "transposed"),
    "weight": ("contiguous", "rows apart", "transposed"),
    "trains": ("both", "hidden", "weight"),
    "rows": (4, 1),
}


def linear_gather(case: Case) -> None:
    rows, vocab, dtype = case["rows"], case["vocab"], case["dtype"]
    bias = head_bias(case, vocab)
    scores = asyncopd.linear_gather_logprobs(
        wants_grad(matrix(rows, WIDTH, dtype, case["hidden"]), case["trains"] != "weight"),
        wants_grad(matrix(vocab, WIDTH, dtype, case["weight"]), case["trains"] != "hidden"),
        some_ids(rows, case["k"], vocab, case["ids"]),
        bias=None if bias is None else wants_grad(bias),
        temperature=case["temperature"],
        logit_scale=case["logit_scale"],
        softcap=case["softcap"],
    )
    scores.sum().backward()


LOGITS_INTO_OPTIONS = {
    "dtype": FLOATS,
    "gradient": ("same", "fp32"),
    "gradient_rows": ("contiguous", "rows apart"),
    "ids": tuple(IDS),
    "k": (64, 1),
    "mask": (None, "bool", "int"),
    "bias": (None, "same", "fp32"),
    "temperature": (1.0, 0.7),
    "logit_scale": (1.0, 0.5),
    "softcap": (None, 30.0),
    "rows": (4, 1),
}


def logits_into(case: Case) -> None:
    """Twice into the same gradients, as a trainer that accumulates."""
    rows, dtype, vocab = case["rows"], case["dtype"], 999
    bias = head_bias(case, vocab)
    kind = DTYPES[dtype if case["gradient"] == "same" else case["gradient"]]
    gradient = laid_out(torch.zeros(vocab, WIDTH, dtype=kind), case["gradient_rows"])
    for _ in range(2):
        scores = linear_gather_logits_into(
            wants_grad(matrix(rows, WIDTH, dtype)),
            matrix(vocab, WIDTH, dtype),
            some_ids(rows, case["k"], vocab, case["ids"]),
            gradient,
            mask=some_mask(rows, case["mask"]),
            bias=bias,
            bias_grad=None if bias is None else torch.zeros(vocab),
            temperature=case["temperature"],
            logit_scale=case["logit_scale"],
            softcap=case["softcap"],
        )
        scores.sum().backward()
