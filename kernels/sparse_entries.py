"""The sampled head's entries: what each (n, k) contributes to the gradients, and their order by id.

    dy[n, k] = grad s / T (1 - tanh^2)      for ids that are no pads, of rows that take part

A row takes part if the mask lets it and any of its gradients is not 0; then all its entries do. Of other rows nothing
reaches a gradient, whatever their hidden states hold; in a row that takes part 0 times an infinite state is NaN.

A few passes over N K elements (524,288 at N = 8,192, K = 64: 2 to 6 MB each): factors and keys, a stable sort of the
32-bit keys with 64-bit positions, the end of each entry's segment, and the entries' rows and factors in sorted order.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from asyncopd.kernels.compile_case import CompileCase
from asyncopd.kernels.launch import cdiv, launch, padded
from asyncopd.kernels.softcap import Factors, product_gradient
from asyncopd.kernels.summary import row_start

FLAT = 512  # entries of a program that only moves them


@triton.jit
def _entries_kernel(
    grad,  # [N, K] fp32
    logits,  # [N, K] fp32; read with a softcap only
    ids,  # [N, K] int32 or int64
    mask,  # [N] uint8
    factors,  # [N, K] fp32: dy, 0 where an entry takes no part
    keys,  # [N, K] int32: ids, or `vocab` where an entry takes no part
    k,
    vocab,
    outer,
    rate,
    rate_low,
    back,
    back_low,
    BLOCK: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_CAP: tl.constexpr,
):
    row = tl.program_id(0)
    row_ids, row_grad = row_start(ids, row, k), row_start(grad, row, k)
    # A row takes part if the mask lets it and a gradient of it is not 0; then all of it does.
    used = tl.zeros([BLOCK], tl.int32)
    for start in range(0, k, BLOCK):
        at = start + tl.arange(0, BLOCK)
        token = tl.load(row_ids + at, mask=at < k, other=-1)
        g = tl.load(row_grad + at, mask=at < k, other=0.0)
        used = tl.maximum(used, ((token >= 0) & (token < vocab) & (g != 0.0)).to(tl.int32))
    takes_part = tl.max(used, axis=0)
    if HAS_MASK:
        takes_part = tl.where(tl.load(mask + row) == 0, 0, takes_part)
    for start in range(0, k, BLOCK):
        at = start + tl.arange(0, BLOCK)
        token = tl.load(row_ids + at, mask=at < k, other=-1)
        here = (token >= 0) & (token < tl.where(takes_part > 0, vocab, 0))
        g = tl.load(row_grad + at, mask=here, other=0.0)
        z = g
        if HAS_CAP:
            z = tl.load(row_start(logits, row, k) + at, mask=here, other=0.0)
        factor = product_gradient(g, z, outer, rate, rate_low, back, back_low, HAS_CAP)
        tl.store(row_start(factors, row, k) + at, tl.where(here, factor, 0.0), mask=at < k)
        tl.store(row_start(keys, row, k) + at, tl.where(here, token, vocab).to(tl.int32), mask=at < k)


@triton.jit
def _order_kernel(
    order,  # [N K] int64: position of each sorted entry
    factors,  # [N K] fp32
    sorted_rows,  # [N K] int32
    sorted_factors,  # [N K] fp32
    keys,  # [N K] int32, sorted
    named,  # [V + 1] uint8, 0 before: 1 where an entry has that key; or None
    count,  # N K
    k,
    BLOCK: tl.constexpr,
    MARK: tl.constexpr,
):
    """What the slices would otherwise each look up by way of two loads that wait for each other, and a division."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    entry = tl.load(order + at, mask=at < count, other=0)
    factor = tl.load(factors + entry, mask=at < count, other=0.0)
    tl.store(sorted_rows + at, (entry // k).to(tl.int32), mask=at < count)
    tl.store(sorted_factors + at, factor, mask=at < count)
    if MARK:
        # Entries with the same key all write, and write the same.
        key = tl.load(keys + at, mask=at < count, other=0)
        tl.store(named + key, tl.full([BLOCK], 1, tl.uint8), mask=at < count)


class Entries(NamedTuple):
    """What each (n, k) contributes: factors fp32 and keys int32, [N, K]; the key is V where it takes no part."""

    factors: Tensor
    keys: Tensor


def launch_entries(
    grad: Tensor, logits: Tensor, ids: Tensor, mask: Tensor | None, vocab: int, scalars: Factors, cap: bool
) -> Entries:
    """grad, logits fp32 [N, K], ids [N, K], all contiguous; mask bool [N], contiguous."""
    rows, k = ids.shape
    out = Entries(
        torch.empty((rows, k), dtype=torch.float32, device=ids.device),
        torch.empty((rows, k), dtype=torch.int32, device=ids.device),
    )
    block = min(1024, padded(k, 16))
    if ids.numel():
        launch(
            _entries_kernel,
            rows,
            grad,
            logits,
            ids,
            ids if mask is None else mask.view(torch.uint8),
            *out,
            k,
            vocab,
            scalars.outer,
            scalars.rate,
            scalars.rate_low,
            scalars.back,
            scalars.back_low,
            block,
            mask is not None,
            cap,
            num_warps=max(1, block // 256),
        )
    return out


class SortedEntries(NamedTuple):
    """Entries of equal keys side by side, in the order of (n, k) among themselves; [N K] each."""

    keys: Tensor  # int32, ascending: what takes no part comes last
    ends: Tensor  # int32: position after the entry's segment
    rows: Tensor  # int32: n
    factors: Tensor  # fp32


def sorted_by_id(entries: Entries, named: Tensor | None = None) -> SortedEntries:
    """named: uint8 [V + 1], where 1 is stored for every key that there is; the last one is of no id."""
    k, count = entries.keys.shape[1], entries.keys.numel()
    if count >= 2**31:
        raise ValueError(f"ids: got shape {list(entries.keys.shape)}, expected less than 2^31 ids")
    # Radix sort on a device: 32-bit keys are half the passes of 64-bit ones.
    keys, order = entries.keys.flatten().sort(stable=True)
    ends = torch.searchsorted(keys, keys, right=True, out_int32=True)
    out = SortedEntries(keys, ends, torch.empty_like(keys), torch.empty_like(entries.factors).flatten())
    if count:
        launch(
            _order_kernel,
            cdiv(count, FLAT),
            order,
            entries.factors,
            out.rows,
            out.factors,
            keys,
            named,
            count,
            k,
            FLAT,
            named is not None,
            num_warps=4,
        )
    return out


def compile_cases() -> list[CompileCase]:
    order = CompileCase(
        name="sparse-head-order",
        kernel=_order_kernel,
        signature={
            "order": "*i64",
            "factors": "*fp32",
            "sorted_rows": "*i32",
            "sorted_factors": "*fp32",
            "keys": "*i32",
            "named": "*u8",
            **dict.fromkeys(("count", "k"), "i32"),
            **dict.fromkeys(("BLOCK", "MARK"), "constexpr"),
        },
        constexprs={"BLOCK": FLAT, "MARK": True},
        num_warps=4,
        max_registers=48,
        divisible=("order", "factors", "sorted_rows", "sorted_factors", "keys", "named", "count", "k"),
    )
    return [order, *(_entries_case(cap) for cap in (False, True))]


def _entries_case(cap: bool) -> CompileCase:
    return CompileCase(
        name="sparse-head-entries" + ("-softcap" if cap else ""),
        kernel=_entries_kernel,
        signature={
            **dict.fromkeys(("grad", "logits"), "*fp32"),
            "ids": "*i64",
            "mask": "*u8",
            "factors": "*fp32",
            "keys": "*i32",
            **dict.fromkeys(("k", "vocab"), "i32"),
            **dict.fromkeys(("outer", "rate", "rate_low", "back", "back_low"), "fp32"),
            **dict.fromkeys(("BLOCK", "HAS_MASK", "HAS_CAP"), "constexpr"),
        },
        constexprs={"BLOCK": 64, "HAS_MASK": True, "HAS_CAP": cap},
        num_warps=1,
        max_registers=48,
        divisible=("grad", "logits", "ids", "mask", "factors", "keys", "k", "vocab"),
    )
