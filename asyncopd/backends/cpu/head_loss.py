"""The exact loss through the head with its gradients: three products with the head, and no [N, V] tensor.

The logits have to be kept from the forward (LSE needs all of them) to the gradient. All of them are kept where they
are no larger than a tile. Else there is room for them where nothing lies yet: dW [V, H] is written block by block, and
the logits [N, B] of a block fit into its rows [B, H] as long as N <= H. Otherwise rows go in groups, whose logits are
kept beside; and where dW is 16-bit, so that groups could not be added up in it, the logits are computed again.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from asyncopd import backends
from asyncopd.backends.cpu.head import finished
from asyncopd.backends.cpu.walk import Gradients, Tiles, Walk, fits_one_tile
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
    kl_loss = backends.select("kl_loss", hidden.device, compute_dtype(hidden, teacher))
    rows = hidden
    if mask is not None:
        check_ids_in_range(ids, head.weight.shape[0])  # the walk sees those of valid rows only
        rows, ids, teacher, log_weights = hidden[mask], ids[mask], teacher[mask], log_weights[mask]
        proximal = None if proximal is None else proximal[mask]
    gradients = Gradients.empty(rows, head, need_hidden=need_hidden, need_weight=need_weight)
    parts = []
    for group, tiles, kept in _groups(rows.shape[0], head.weight, gradients.weight):
        walk = Walk(rows[group], ids[group], head)
        scores, lse = walk.forward(tiles)
        part = None if proximal is None else proximal[group]
        support = (teacher[group], log_weights[group], ids[group], None, part)
        loss, coef, metrics = kl_loss(scores, *support, denominator, spec)
        usable = _silence_rows_without_entries(walk, coef, lse)
        walk.backward(coef, lse, gradients.of(group), tiles if kept and usable else None, first=group.start == 0)
        parts.append(scores)
    if len(parts) != 1:  # the loss and its metrics are of all rows together
        scores = torch.cat(parts) if parts else torch.empty(ids.shape, dtype=torch.float32)
        loss, _, metrics = kl_loss(scores, teacher, log_weights, ids, None, proximal, denominator, spec)
    return loss, metrics, *finished(gradients, mask, hidden, head)


def _silence_rows_without_entries(walk: Walk, coef: Tensor, lse: Tensor) -> bool:
    """A row without entries adds nothing, whatever its hidden state holds: 0 * NaN in a product would.

    A hidden state that is not finite makes every logit, and so LSE, not finite, unless a softcap hides it. A sum tells
    in one pass whether there may be one; where finite values overflow, the rows are looked at for nothing.
    Returns whether the logits at hand may be used for the gradient: one of NaN is no factor for a softcap's slope.
    """
    finite, capped = math.isfinite(lse.sum()), walk.head.softcap is not None
    if capped or not finite:
        walk.hidden = torch.where((coef != 0).any(dim=1, keepdim=True), walk.hidden, 0.0)
    return finite or not capped


def _groups(rows: int, weight: Tensor, dweight: Tensor | None) -> Iterator[tuple[slice, Tiles, bool]]:
    """Groups of rows, the tiles of each, and whether those keep the logits until the gradient."""
    vocab = weight.shape[0]
    if fits_one_tile(rows, vocab):
        yield slice(0, rows), Tiles.all(rows, vocab), True
        return
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
