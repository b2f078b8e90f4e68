"""Supports drawn from a policy's own logits, in the pass that decodes."""

import torch
from torch import Tensor

from asyncopd.backends import select
from asyncopd.backends.reference.rows import compute_dtype
from asyncopd.ops import checks
from asyncopd.support import Draw


@torch.library.custom_op("asyncopd::sample_support", mutates_args=())
def _sample(
    logits: Tensor,
    num_samples: int,
    head: int,
    seed: int,
    streams: Tensor | None,
    sampled_ids: Tensor | None,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    run = select("sample_support", logits.device, logits.dtype)
    return run(logits, num_samples, head, seed, streams, sampled_ids, temperature)


@_sample.register_fake
def _(
    logits: Tensor,
    num_samples: int,
    head: int,
    seed: int,
    streams: Tensor | None,
    sampled_ids: Tensor | None,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape, dtype = (logits.shape[0], head + num_samples), compute_dtype(logits)
    return (
        logits.new_empty(shape, dtype=torch.int64),
        logits.new_empty(shape, dtype=dtype),
        logits.new_empty(shape, dtype=dtype),
        logits.new_empty(logits.shape[0], dtype=dtype),
    )


def sample_support(
    logits: Tensor,
    *,
    num_samples: int,
    head: int = 0,
    seed: int | Tensor,
    sampled_ids: Tensor | None = None,
    temperature: float = 1.0,
) -> Draw:
    """`head` most probable ids of each row, then `num_samples` independent draws from the rest of its distribution.

    With mu = softmax(logits / temperature), the log-weights are 0 in the head and log mu(rest) - log M - log mu(id)
    for the draws: sum_i w_i f(id_i) is an unbiased estimate of the sum of f over the vocabulary.

    Args:
        logits: [N, V] bf16, fp16, fp32 or fp64.
        num_samples: M >= 0 draws a row. head: 0..V, at most 1,024 on the triton backend; head + M >= 1.
        seed: an int (row n draws from stream n), or int64 [N], one stream a row: the same stream gives the same draw
            whatever the batch, the chunk or the thread count. An int seed's row 0 is the stream of that number.
        sampled_ids: [N], the rollout's own tokens, drawn from mu elsewhere: each replaces the first draw of its row,
            unless it lies in the head, whose members are all there already.
        temperature: divides the logits.
    Returns: ids int64 [N, head + M], log_weights, logprobs (under mu) and logsumexp in fp32 (fp64 for fp64). Draws of a
        row with no mass outside its head are pads (id -1, -inf). No gradient.
    Raises: TypeError, ValueError naming the argument.
    """
    checks.check_matrix("logits", logits, "V")
    checks.check_count("num_samples", num_samples, 0, None, "draws")
    checks.check_count("head", head, 0, logits.shape[1], "V")
    checks.check_count("head + num_samples", head + num_samples, 1, None, "K")
    checks.check_temperature(temperature)
    streams = None
    if isinstance(seed, Tensor):
        checks.check_row_vector("seed", seed, logits, "logits", (torch.int64,))
        seed, streams = 0, seed
    else:
        checks.check_count("seed", seed, -(2**63), 2**63 - 1, "int64")
    if sampled_ids is not None:
        checks.check_row_vector("sampled_ids", sampled_ids, logits, "logits", (torch.int32, torch.int64))
        checks.check_count("num_samples", num_samples, 1, None, "sampled_ids takes the place of a draw")
    out = _sample(logits.detach(), num_samples, head, seed, streams, sampled_ids, float(temperature))
    return Draw(*out)
