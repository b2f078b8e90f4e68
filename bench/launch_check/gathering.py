"""Cases of scores at ids, forward and backward: from logits, and through the exact and the sampled head."""

import torch

import asyncopd
from asyncopd.ops import linear_gather_logits_into
from bench.launch_check.inputs import (
    DTYPES,
    FAR_ROWS,
    FLOATS,
    HEADS,
    IDS,
    LAYOUTS,
    LOGITS,
    WIDTH,
    head_bias,
    laid_out,
    matrix,
    some_ids,
    some_mask,
    wants_grad,
)
from bench.launch_check.pairwise import Case

GATHER_OPTIONS = {
    "dtype": FLOATS,
    "size": tuple(LOGITS),
    "ids": tuple(IDS),
    "temperature": (1.0, 0.7),
    "layout": LAYOUTS,
    "gradient": ("contiguous", "expanded"),
}
GATHER_RULES = (FAR_ROWS,)


def gather(case: Case) -> None:
    size = LOGITS[case["size"]]
    logits = wants_grad(matrix(size.rows, size.vocab, case["dtype"], case["layout"]))
    scores = asyncopd.gather_logprobs(logits, some_ids(size, case["ids"]), temperature=case["temperature"])
    gradient = torch.ones(scores.shape, dtype=scores.dtype)
    scores.backward(gradient if case["gradient"] == "contiguous" else gradient[:1, :1].expand(scores.shape))


HEAD_OPTIONS = {
    "bias": (None, "same", "fp32"),
    "temperature": (1.0, 0.7),
    "logit_scale": (1.0, 0.5),
    "softcap": (None, 30.0),
}
LINEAR_GATHER_OPTIONS = {
    "dtype": FLOATS,
    "size": tuple(HEADS),
    "ids": tuple(IDS),
    **HEAD_OPTIONS,
    "hidden": ("contiguous", "rows apart", "transposed"),
    "weight": ("contiguous", "rows apart", "transposed"),
    "trains": ("both", "hidden", "weight"),
}


def linear_gather(case: Case) -> None:
    size, dtype = HEADS[case["size"]], case["dtype"]
    bias = head_bias(size.vocab, dtype, case["bias"])
    scores = asyncopd.linear_gather_logprobs(
        wants_grad(matrix(size.rows, WIDTH, dtype, case["hidden"]), case["trains"] != "weight"),
        wants_grad(matrix(size.vocab, WIDTH, dtype, case["weight"]), case["trains"] != "hidden"),
        some_ids(size, case["ids"]),
        bias=None if bias is None else wants_grad(bias),
        temperature=case["temperature"],
        logit_scale=case["logit_scale"],
        softcap=case["softcap"],
    )
    scores.sum().backward()


LOGITS_INTO_OPTIONS = {
    "dtype": FLOATS,
    "size": tuple(HEADS),
    "gradient": ("same", "fp32"),
    "gradient_rows": ("contiguous", "rows apart"),
    "ids": tuple(IDS),
    "mask": (None, "bool", "int"),
    **HEAD_OPTIONS,
}


def logits_into(case: Case) -> None:
    """Twice into the same gradients, as a trainer that accumulates."""
    size, dtype = HEADS[case["size"]], case["dtype"]
    bias = head_bias(size.vocab, dtype, case["bias"])
    kind = DTYPES[dtype if case["gradient"] == "same" else case["gradient"]]
    gradient = laid_out(torch.zeros(size.vocab, WIDTH, dtype=kind), case["gradient_rows"])
    for _ in range(2):
        scores = linear_gather_logits_into(
            wants_grad(matrix(size.rows, WIDTH, dtype)),
            matrix(size.vocab, WIDTH, dtype),
            some_ids(size, case["ids"]),
            gradient,
            mask=some_mask(size.rows, case["mask"]),
            bias=bias,
            bias_grad=None if bias is None else torch.zeros(size.vocab),
            temperature=case["temperature"],
            logit_scale=case["logit_scale"],
            softcap=case["softcap"],
        )
        scores.sum().backward()
