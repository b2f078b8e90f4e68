"""Supports drawn from a policy: the head by rank, the tail by exact inverse-CDF draws from what is left.

For M draws from mu restricted to the rest (all of mu without a head) the Horvitz-Thompson weight of token a is
mu(rest) / (M mu(a)); with z the logits over temperature that is log w = LSE(z over the rest) - log M - z_a.
"""

import math

import torch
from torch import Tensor

from asyncopd.backends.reference.extract import top_ids
from asyncopd.backends.reference.philox import uniforms
from asyncopd.backends.reference.rows import check_ids_in_range, compute_dtype, logprobs_at, row_chunks


def sample_support(
    logits: Tensor,
    num_samples: int,
    head: int,
    seed: int,
    streams: Tensor | None,
    sampled_ids: Tensor | None,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logits [N, V] -> ids int64 [N, K], log-weights [N, K], log mu at the ids [N, K], LSE [N]; K = head + samples.

    Row n draws from (seed, n), or from streams[n]. `sampled_ids` [N] takes the place of the first draw, except in
    rows where it lies in the head. With no mass outside the head the tail is padding.
    """
    num_rows, vocab = logits.shape
    dtype, device = compute_dtype(logits), logits.device
    rows_in_stream = torch.arange(num_rows, device=device)
    if streams is None:
        streams = torch.full((num_rows,), seed, dtype=torch.int64, device=device)
    else:
        rows_in_stream = torch.zeros_like(rows_in_stream)
    k = head + num_samples
    ids = torch.empty(num_rows, k, dtype=torch.int64, device=device)
    log_weights = torch.zeros(num_rows, k, dtype=dtype, device=device)
    logprobs = torch.empty(num_rows, k, dtype=dtype, device=device)
    lse = torch.empty(num_rows, dtype=dtype, device=device)
    for rows in row_chunks(num_rows, vocab):
        z = logits[rows].to(dtype) / temperature
        lse[rows] = torch.logsumexp(z, dim=1)
        ids[rows, :head] = top_ids(logits[rows], head)
        if num_samples:
            rest = z.scatter(1, ids[rows, :head], -torch.inf)
            u = uniforms(streams[rows], rows_in_stream[rows], num_samples)
            drawn, rest_lse = _inverse_cdf(rest, u)
            if sampled_ids is not None:
                token = sampled_ids[rows].long()
                check_ids_in_range(token, vocab, "sampled_ids", pads=False)
                check_possible(z, token)
                in_head = (ids[rows, :head] == token[:, None]).any(dim=1)
                drawn[:, 0] = torch.where(in_head, drawn[:, 0], token)
            empty = (rest_lse == -torch.inf)[:, None]
            ids[rows, head:] = drawn.masked_fill(empty, -1)
            weights = rest_lse[:, None] - math.log(num_samples) - z.gather(1, drawn)
            # Exactly 0 marks what was not drawn; a draw of weight 1 keeps its weight and does not look like one.
            weights = torch.where(weights == 0, torch.finfo(dtype).tiny, weights)
            log_weights[rows, head:] = weights.masked_fill(empty, -torch.inf)
        logprobs[rows] = logprobs_at(z, lse[rows], ids[rows])
    return ids, log_weights, logprobs, lse


def _inverse_cdf(z: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Draws [C, M] with probabilities softmax(z) [C, V] at u [C, M], and LSE(z) [C].

    The cumulative sum is fp64: in fp32 it would lose the tail of a 150,000-token vocabulary. A row that holds a NaN or
    has no mass draws uniformly, so its ids are valid.
    """
    lse = torch.logsumexp(z, dim=1)
    peak = z.max(dim=1, keepdim=True).values
    mass = torch.exp(z.double() - peak.double())
    mass = torch.where(torch.isfinite(lse)[:, None], mass, 1.0)
    cdf = mass.cumsum(dim=1)
    total = cdf[:, -1:]
    # Strictly below the total, so that the search stops at the last token with mass even when u * total rounds up.
    target = torch.minimum(u * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cdf, target, right=True), lse


def check_possible(z: Tensor, token: Tensor) -> None:
    """On a CPU: a rollout's own token that its policy could not have written has no weight; say so."""
    if z.device.type != "cpu":
        return
    impossible = z.gather(1, token[:, None]) == -torch.inf
    if bool(impossible.any()):
        raise ValueError(
            f"sampled_ids: got token {int(token[impossible[:, 0]][0])}, whose logit is -inf, "
            "expected a token that the policy can write"
        )
