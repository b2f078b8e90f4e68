"""The exact loss through the head with its gradients: three products with the head, and no [N, V] tensor.

The logits have to be kept from the forward (LSE needs all of them) to the gradient. There is room for them where
nothing lies yet: dW [V, H] is written block by block, and the logits [N, B] of a block fit into its rows [B, H] as long
as N <= H. Otherwise rows go in groups, whose logits are kept beside; and where dW is 16-bit, so that groups could not
be added up in it, the logits are computed again.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from asyncopd import backends
from asyncopd.backends.cpu.head import finished
from asyncopd.backends.cpu.memory import empty_gradient
from asyncopd.backends.cpu.walk import Gradients, Tiles, Walk
from asyncopd.backends.loss_spec import LossSpec
from asyncopd.backends.reference.head import Head
from asyncopd.backends.reference.rows import check_ids_in_range, compute_dtype

# Logits kept beside (fp32: 256 MiB), at most a quarter of all. dW is read and written once a group, so few large ones.
KEPT_ELEMENTS = 1 << 26


def linear_kl(
    hidden: Tensor,
    head: Head,
    mask: Tensor | None,
    ids: Tensor,
    teacher: Tensor,
    log_weights: Tensor,
    proximal: Tensor | None,
    denominator: Tensor,
    need_hidden: bool,
    need_weight: bool,
    spec: LossSpec,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, metrics, and gradients of hidden [N, H], weight [V, H] (empty if not needed), bias [V] (or empty)."""
    weight, bias = head.weight, head.bias
    check_ids_in_range(ids, weight.shape[0])
    used = torch.ones(hidden.shape[0], dtype=torch.bool) if mask is None else mask
    rows = slice(None) if mask is None else mask
    hidden_used, ids_used = hidden[rows], ids[rows]
    support = (teacher[rows], log_weights[rows], ids_used, None, None if proximal is None else proximal[rows])
    kl_rows = backends.select("kl_rows", hidden.device, compute_dtype(hidden, teacher))

    gradients = Gradients(
        torch.zeros(hidden_used.shape, dtype=torch.float32) if need_hidden else None,
        empty_gradient(weight) if need_weight else None,
        None if bias is None else torch.zeros(bias.shape, dtype=torch.float32),
    )
    scores = torch.empty(ids_used.shape, dtype=torch.float32)
    row_losses, metrics = torch.empty(0, dtype=torch.float32), torch.empty(0, dtype=torch.float32)
    for group, tiles, kept in _groups(hidden_used.shape[0], weight, gradients.weight):
        walk = Walk(hidden_used[group], ids_used[group], head)
        scores[group], lse = walk.forward(tiles)
        row_losses, coef, metrics = kl_rows(scores[group], *(None if t is None else t[group] for t in support), spec)
        # A row without entries adds nothing, whatever its hidden state holds: 0 * NaN in a product would.
        walk.hidden = torch.where((coef != 0).any(dim=1, keepdim=True), walk.hidden, 0.0)
        stored = tiles if kept else None
        walk.backward(coef / denominator, lse, gradients.of(group), stored, first=group.start == 0)
    if row_losses.shape[0] < scores.shape[0] or not scores.shape[0]:
        row_losses, _, metrics = kl_rows(scores, *support, spec)
    return row_losses.sum() / denominator, metrics, *finished(gradients, used, hidden, head)


def _groups(rows: int, weight: Tensor, dweight: Tensor | None) -> Iterator[tuple[slice, Tiles, bool]]:
    """Groups of rows, the tiles of each, and whether those keep the logits until the gradient."""
    vocab = weight.shape[0]
    inside = None if dweight is None else Tiles.inside(dweight, rows)
    if inside is not None:
        yield slice(0, rows), inside, True
    elif dweight is not None and dweight.dtype != torch.float32:
        yield slice(0, rows), Tiles.one(rows, vocab), False
    else:
        count = max(1, min(-(-rows // 4), KEPT_ELEMENTS // vocab))
        for start in range(0, rows, count):
            group = slice(start, min(start + count, rows))
            yield group, Tiles.all(group.stop - start, vocab), True
