"""Other projects' GPU kernels, where they are installed: each is asked for by its documented interface.

None has a reverse KL over a sparse support. What a head costs is compared through the cross entropy: one target a row,
and the same three matrix products.
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor

import asyncopd
from bench.cases import FamilyName
from bench.families.base import Provider
from bench.families.extraction import check_topk
from bench.families.head import Gradients, check_cross_entropy, masked_targets, with_gradients
from bench.inputs import HeadInputs, LogitsInputs


def flashinfer_topk(inputs: LogitsInputs) -> Callable[[], asyncopd.TopK]:
    """Its radix top-K of the logits; the normaliser, which it has not, is torch's."""
    from flashinfer import top_k

    def topk() -> asyncopd.TopK:
        values, ids = top_k(inputs.logits, inputs.case.k, sorted=True)
        lse = inputs.logits.float().logsumexp(dim=1)
        return asyncopd.TopK(ids.long(), values.float() - lse[:, None], lse)

    return topk


def liger(inputs: HeadInputs) -> Callable[[], Gradients]:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss, targets = LigerFusedLinearCrossEntropyLoss(), masked_targets(inputs)
    return with_gradients(lambda hidden, weight: loss(weight, hidden, targets), inputs)


def cut_cross_entropy(inputs: HeadInputs) -> Callable[[], Gradients]:
    from cut_cross_entropy import linear_cross_entropy

    return _cross_entropy(linear_cross_entropy, inputs)


def quack(inputs: HeadInputs) -> Callable[[], Gradients]:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return _cross_entropy(chunked_linear_cross_entropy, inputs)


def _cross_entropy(function: Callable[..., Tensor], inputs: HeadInputs) -> Callable[[], Gradients]:
    """`function(hidden, weight, targets)`, mean over the targets that are not -100."""
    targets = masked_targets(inputs)
    return with_gradients(lambda hidden, weight: function(hidden, weight, targets), inputs)


PEERS: dict[FamilyName, tuple[Provider, ...]] = {
    "topk": (Provider("flashinfer top_k + torch", flashinfer_topk, partial(check_topk, stable=False)),),
    "exact_head": (
        Provider("Liger cross entropy", liger, check_cross_entropy),
        Provider("cut-cross-entropy", cut_cross_entropy, check_cross_entropy),
        Provider("quack cross entropy", quack, check_cross_entropy),
    ),
}
