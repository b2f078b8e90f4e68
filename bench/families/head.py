"""Head, gather and reverse KL in one, forward + backward with dense dH and dW: exact and sampled normalisation."""

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import asyncopd
from bench.families import head_oracle
from bench.families.base import COMPILED, EAGER, LIMIT, OURS, Family, Provider, Unavailable, compiled
from bench.families.head_oracle import Gradients
from bench.families.kl import torch_reverse_kl
from bench.inputs import HeadInputs, head_inputs

LINEAR_CE, CHUNKED = "F.linear_cross_entropy", "chunked recompute"
CHUNK = 128  # rows of the chunked heads: a quarter of the logits of 512 rows


class Oracle:
    """The specification of every provider of these families; each is computed when it is first asked for."""

    def __init__(self, inputs: HeadInputs) -> None:
        self._head = head_oracle.Head(inputs)

    @cached_property
    def exact(self) -> head_oracle.Oracle:
        return head_oracle.exact(self._head)

    @cached_property
    def zero_sum(self) -> head_oracle.Oracle:
        return head_oracle.exact_zero_sum(self._head)

    @cached_property
    def sampled(self) -> head_oracle.Oracle:
        return head_oracle.sampled(self._head)

    @cached_property
    def cross_entropy(self) -> head_oracle.Oracle:
        return head_oracle.cross_entropy(self._head)


def with_gradients(loss: Callable[[Tensor, Tensor], Tensor], inputs: HeadInputs) -> Callable[[], Gradients]:
    def forward_and_backward() -> Gradients:
        value = loss(inputs.hidden, inputs.weight)
        dhidden, dweight = torch.autograd.grad(value, (inputs.hidden, inputs.weight))
        return Gradients(value.detach(), dhidden, dweight)

    return forward_and_backward


def with_hidden_gradient(loss: Callable[[Tensor, Tensor], Tensor], inputs: HeadInputs) -> Callable[[], Gradients]:
    """The same of a head that is not trained (LoRA)."""
    weight = inputs.weight.detach()

    def forward_and_backward() -> Gradients:
        value = loss(inputs.hidden, weight)
        (dhidden,) = torch.autograd.grad(value, inputs.hidden)
        return Gradients(value.detach(), dhidden, None)

    return forward_and_backward


# ------------------------------------------------------------------------------------------------------- limits


def products_of(inputs: HeadInputs, count: int) -> Callable[[], None]:
    """The first `count` of z = h W^T, dh = z W, dW = z^T h of the valid rows, into buffers that are there already."""
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    if inputs.mask is not None:
        hidden = hidden[inputs.mask]
    logits = hidden.new_empty(hidden.shape[0], weight.shape[0])
    operands = [(hidden, weight.t(), logits)]
    if count > 1:
        operands.append((logits, weight, torch.empty_like(hidden)))
    if count > 2:
        operands.append((logits.t(), hidden, torch.empty_like(weight)))

    def products() -> None:
        for a, b, out in operands:
            torch.mm(a, b, out=out)

    return products


def read_rows_and_clear(inputs: HeadInputs) -> Callable[[], Tensor]:
    """One read of the K rows of W of every position, and the zeros of a dense dW in a buffer that is there already."""
    weight, ids = inputs.weight.detach(), inputs.support.ids.clamp(min=0)
    if inputs.mask is not None:
        ids = ids[inputs.mask]
    dweight = torch.empty_like(weight)

    def read_and_clear() -> Tensor:
        dweight.zero_()
        return F.embedding_bag(ids, weight, mode="sum")

    return read_and_clear


# ------------------------------------------------------------------------------------------------ materialised


def torch_exact(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    teacher: Tensor,
    log_w: Tensor,
    mask: Tensor | None,
    valid: int,
    centred: bool = False,
) -> Tensor:
    logprobs = (hidden @ weight.t()).float().log_softmax(dim=1).gather(1, ids)
    return torch_reverse_kl(logprobs, teacher, log_w, mask, valid, centred=centred)


def torch_sampled(
    hidden: Tensor, weight: Tensor, ids: Tensor, teacher: Tensor, log_w: Tensor, mask: Tensor | None, valid: int
) -> Tensor:
    """K rows of W a position, gathered: [N, K, H]."""
    logits = torch.einsum("nkh,nh->nk", F.embedding(ids, weight), hidden).float()
    logprobs = logits - (log_w + logits).logsumexp(dim=1, keepdim=True)
    return torch_reverse_kl(logprobs, teacher, log_w, mask, valid)


def _with_support(
    function: Callable[..., Tensor], i: HeadInputs, gradients: Callable[..., Callable[[], Gradients]] = with_gradients
) -> Callable[[], Gradients]:
    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        s = i.support
        return function(hidden, weight, s.ids, s.teacher_logprobs, s.log_weights, i.mask, i.case.valid_rows)

    return gradients(loss, i)


# ------------------------------------------------------------------------------------------------------ others


def chunked_recompute(inputs: HeadInputs) -> Callable[[], Gradients]:
    """The head of a chunk of rows at a time, made again in the backward, as chunked losses are published elsewhere."""
    s, mask = inputs.support, inputs.mask

    def logprobs_of(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        return (hidden @ weight.t()).float().log_softmax(dim=1).gather(1, ids)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        chunks = zip(hidden.split(CHUNK), s.ids.split(CHUNK), strict=True)
        parts = [checkpoint(logprobs_of, h, weight, ids, use_reentrant=False) for h, ids in chunks]
        return torch_reverse_kl(torch.cat(parts), s.teacher_logprobs, s.log_weights, mask, inputs.case.valid_rows)

    return with_gradients(loss, inputs)


def masked_targets(inputs: HeadInputs) -> Tensor:
    """[N]; -100 at the rows that do not count."""
    return inputs.targets if inputs.mask is None else torch.where(inputs.mask, inputs.targets, -100)


def linear_cross_entropy(inputs: HeadInputs) -> Callable[[], Gradients]:
    """Another loss, one target a row, with the same three products: the baseline that comes with torch."""
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if options is None or not hasattr(F, "linear_cross_entropy"):
        raise Unavailable(f"torch {torch.__version__} has no chunked F.linear_cross_entropy")
    targets = masked_targets(inputs)
    # Left to itself it takes chunks of one or two rows at these shapes, and 10 times as long (7.1 s against 0.7 s for
    # 64 rows of Qwen3 0.6B on two threads).
    chunked = options(batch_chunk_size=CHUNK, chunking_method=None)
    return with_gradients(lambda h, w: F.linear_cross_entropy(h, w, targets, options=chunked), inputs)


def ours(
    inputs: HeadInputs, gradients: Callable[..., Callable[[], Gradients]] = with_gradients, **options: Any
) -> Callable[[], Gradients]:
    loss = partial(asyncopd.linear_reverse_kl, support=inputs.support, mask=inputs.mask, **options)
    return gradients(loss, inputs)


def _check_exact(oracle: Oracle, out: Gradients) -> float:
    return oracle.exact.check(out)


def _check_zero_sum(oracle: Oracle, out: Gradients) -> float:
    # A - b is smaller than A, and what rounding the logits to 16 bits adds to it is not.
    return oracle.zero_sum.check(out, at_most=2.0)


def _check_frozen(oracle: Oracle, out: Gradients) -> float:
    return oracle.exact.check(out, frozen=True)


def check_cross_entropy(oracle: Oracle, out: Gradients) -> float:
    return oracle.cross_entropy.check(out)


def _check_sampled(oracle: Oracle, out: Gradients) -> float:
    return oracle.sampled.check(out)


EXACT_HEAD = Family(
    name="exact_head",
    title="Head + exact reverse KL, forward + backward",
    limit="the three matrix products of the valid rows",
    error="relative",
    inputs=head_inputs,
    oracle=Oracle,
    providers=(
        Provider(LIMIT, partial(products_of, count=3)),
        Provider(EAGER, partial(_with_support, torch_exact), _check_exact),
        Provider(COMPILED, lambda i: _with_support(compiled(torch_exact), i), _check_exact),
        Provider(LINEAR_CE, linear_cross_entropy, check_cross_entropy),
        Provider(CHUNKED, chunked_recompute, _check_exact),
        Provider(OURS, partial(ours, normalize="exact"), _check_exact),
    ),
)

ZERO_SUM = Family(
    name="exact_head_zero_sum",
    title="Head + exact reverse KL, zero-sum coefficients, forward + backward",
    limit="the matrix product of the logits",
    error="relative",
    inputs=head_inputs,
    oracle=Oracle,
    providers=(
        Provider(LIMIT, partial(products_of, count=1)),
        Provider(EAGER, partial(_with_support, partial(torch_exact, centred=True)), _check_zero_sum),
        Provider(COMPILED, lambda i: _with_support(partial(compiled(torch_exact), centred=True), i), _check_zero_sum),
        Provider(OURS, partial(ours, baseline="mean"), _check_zero_sum),
    ),
)

FROZEN = Family(
    name="exact_head_frozen",
    title="Head + exact reverse KL, frozen head, forward + backward",
    limit="the two matrix products of logits and dH",
    error="relative",
    inputs=head_inputs,
    oracle=Oracle,
    providers=(
        Provider(LIMIT, partial(products_of, count=2)),
        Provider(EAGER, partial(_with_support, torch_exact, gradients=with_hidden_gradient), _check_frozen),
        Provider(
            COMPILED,
            lambda i: _with_support(compiled(torch_exact), i, with_hidden_gradient),
            _check_frozen,
        ),
        Provider(OURS, partial(ours, gradients=with_hidden_gradient), _check_frozen),
    ),
)

SAMPLED_HEAD = Family(
    name="sampled_head",
    title="Head + sampled reverse KL, forward + backward",
    limit="one read of the K rows of W of every position, and a dense dW of zeros",
    error="relative",
    inputs=head_inputs,
    oracle=Oracle,
    providers=(
        Provider(LIMIT, read_rows_and_clear),
        Provider(EAGER, partial(_with_support, torch_sampled), _check_sampled),
        Provider(COMPILED, lambda i: _with_support(compiled(torch_sampled), i), _check_sampled),
        Provider(OURS, partial(ours, normalize="sampled"), _check_sampled),
    ),
)
