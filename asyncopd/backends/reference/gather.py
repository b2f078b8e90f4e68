"""Log-probabilities at a few ids of each row of logits, and the gradient.

lp[n, k] = z[n, ids[n, k]] - LSE(z[n]),   z = logits / T
dz[n]    = scatter(g[n] at ids[n]) - (sum_k g[n, k]) softmax(z[n]),   dlogits = dz / T
"""

import torch
from torch import Tensor

from asyncopd.backends.reference.rows import PAD, check_ids_in_range, compute_dtype, logprobs_at, row_chunks


def gather_logprobs(logits: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """logits [N, V], ids [N, K] -> log-probabilities [N, K] and LSE [N]."""
    num_rows, vocab = logits.shape
    check_ids_in_range(ids, vocab)
    dtype = compute_dtype(logits)
    logprobs = torch.empty(ids.shape, dtype=dtype, device=logits.device)
    lse = torch.empty(num_rows, dtype=dtype, device=logits.device)
    for rows in row_chunks(num_rows, vocab):
        z = logits[rows].to(dtype) / temperature
        lse[rows] = torch.logsumexp(z, dim=1)
        logprobs[rows] = logprobs_at(z, lse[rows], ids[rows])
    return logprobs, lse


def gather_logprobs_backward(grad: Tensor, logits: Tensor, lse: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """grad [N, K] of the log-probabilities -> gradient [N, V] of the logits, in the logits' dtype.

    Where the logits are one shard of a vocabulary, lse [N] is that of the whole and ids may be ELSEWHERE.
    """
    dlogits = torch.empty_like(logits)
    for rows in row_chunks(*logits.shape):
        z = logits[rows].to(lse.dtype) / temperature
        dlogits[rows] = (logits_gradient(grad[rows], z, lse[rows], ids[rows]) / temperature).to(logits.dtype)
    return dlogits


def logits_gradient(grad: Tensor, z: Tensor, lse: Tensor, ids: Tensor) -> Tensor:
    """dz [C, V] from grad [C, K], z [C, V] (overwritten), lse [C] and ids [C, K].

    A row whose gradients sum to zero never multiplies its softmax, so a masked row of NaN or inf logits yields 0.
    """
    grad = grad.to(z.dtype).masked_fill(ids == PAD, 0.0)
    total = grad.sum(dim=1, keepdim=True)
    softmax = z.sub_(lse[:, None]).exp_()
    softmax = softmax.masked_fill_((total == 0) | (lse == -torch.inf)[:, None], 0.0)
    return softmax.mul_(-total).scatter_add_(1, ids.clamp(min=0).long(), grad.masked_fill(ids < 0, 0.0))
