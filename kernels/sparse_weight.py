"""The gradient of the sampled head's weight and bias: sums over the entries of an id, and no pass over the vocabulary.

    dW[v] = sum over (n, k) with ids[n, k] = v of dy[n, k] h[n]         db[v] likewise of dy[n, k]

Entries (n, k) are sorted by id, stably, once; then an id's are one segment, in the order of (n, k). The sorted entries
are cut into runs of 128, wherever segments end, so no program has more work than another, whether 524,288 ids are all
one or all different:

    runs    a program a run and slice of 512 columns: adds up the segments that lie within its run and stores their rows
            of dW; what comes in from the run before goes to scratch
    joins   a program a run and slice: a segment that leaves the run it begins in is that piece and the scratch of the
            runs that follow, added in their order

Nothing is atomic: each row of dW has one program that stores it, in one order of summation that the ids alone decide.
Sizes follow from shapes: scratch is N K / 128 rows of H in fp32 (67 MB at N = 8,192, K = 64, H = 4,096).

Bytes there in bf16: 4.3 GB of h, from L2, since slices are the slowest index and one of h is 8.4 MB (0.8 ms at
5.5 TB/s); U H b of dW written, U: distinct ids (1.24 GB if all 151,936 are named, 0.37 ms at 3.35 TB/s); of scratch at
most 67 MB each way; the sort, of 32-bit keys and 64-bit positions, is 6 MB a pass. In a dense dW the rows that no id
names are zeroed, (V - U) H b: the sorted entries mark the others in V bytes. The sum can instead be added to a gradient
that is there already, and then rows that no id names are not touched at all.

Accuracy: fp32; a piece is at most 32 sums of 4 terms, and pieces are added with their rounding errors: an id that a
million entries name loses no more digits than one that 128 name. Rounded once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from asyncopd.kernels.compile_case import CompileCase
from asyncopd.kernels.launch import INTERPRET, cdiv, launch
from asyncopd.kernels.numeric import INF, sum_pair, to_storage
from asyncopd.kernels.sparse_entries import Entries, sorted_by_id
from asyncopd.kernels.summary import row_start

RUN = 128  # sorted entries of a program
COLUMNS = 512  # of a program
ENTRIES = 4  # rows of h at a time: a thread of 64 has 16 bytes (bf16) of each
PIECES = 8  # rows of scratch at a time
ZEROED = 16  # rows of dW that a program looks at


@triton.jit
def sum_of_entries(
    hidden,  # [N, H], unit column stride
    rows,  # [N K] int32, sorted
    factors,  # [N K] fp32, sorted
    first,
    last,
    column,
    hidden_stride,
    width,
    ENTRIES: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
):
    """fp32 sums over the sorted entries from first to last - 1, in their order: of dy h [columns] and of dy [1]."""
    total = tl.zeros(column.shape, tl.float32)
    total_factor = tl.zeros([1], tl.float32)
    while first < last:
        at = first + tl.arange(0, ENTRIES)
        factor = tl.load(factors + at, mask=at < last, other=0.0)
        if NEED_WEIGHT:
            row = tl.load(rows + at, mask=at < last, other=0)
            place = row.to(tl.int64)[:, None] * hidden_stride + column[None, :]
            there = (at < last)[:, None] & (column < width)[None, :]
            h = tl.load(hidden + place, mask=there, other=0.0).to(tl.float32)
            total += tl.sum(factor[:, None] * h, axis=0)
        total_factor += tl.sum(factor, axis=0)
        first += ENTRIES
    return total, total_factor


@triton.jit
def add_pieces(total, low, pieces):  # fp32 [columns] twice, [pieces, columns]
    """(total, low) + pieces, whose sum it is: the rounding errors of the totals are kept apart."""
    total, error = sum_pair(total, tl.sum(pieces, axis=0))
    return total, low + error


@triton.jit
def store_sum(to, value, mask, ADD: tl.constexpr, INTERPRET: tl.constexpr):
    """To what is there already, or in its place; rounded once."""
    if ADD:
        value += tl.load(to, mask=mask, other=0.0).to(tl.float32)
    tl.store(to, to_storage(value, to.dtype.element_ty, INTERPRET), mask=mask)


@triton.jit
def _runs_kernel(
    hidden,  # [N, H], unit column stride
    keys,  # [N K] int32, ascending; `vocab` where an entry takes no part
    ends,  # [N K] int32: position after the entry's segment
    rows,  # [N K] int32, sorted as the keys
    factors,  # [N K] fp32, likewise
    pieces,  # [runs, H] fp32: of the segment that comes in from the run before
    bias_pieces,  # [runs] fp32
    dweight,  # [V, H], unit column stride
    dbias,  # [V]
    hidden_stride,
    dweight_stride,
    count,  # N K
    runs,
    vocab,
    width,
    RUN: tl.constexpr,
    COLUMNS: tl.constexpr,
    ENTRIES: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
    NEED_BIAS: tl.constexpr,
    ADD: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    part, run = tl.program_id(0) // runs, tl.program_id(0) % runs
    column = part * COLUMNS + tl.arange(0, COLUMNS)
    first_slice = part + tl.arange(0, 1) == 0  # the bias has one
    begin = run * RUN
    end = tl.minimum(begin + RUN, count)
    before = tl.load(keys + begin - 1, mask=begin > 0, other=-1)
    position = begin
    while position < end:
        key = tl.load(keys + position)
        stop = tl.load(ends + position)
        comes_in = key == before
        # Whatever takes no part comes last.
        if key == vocab:
            stop = end
        elif comes_in | (stop <= end):
            total, total_factor = sum_of_entries(
                hidden,
                rows,
                factors,
                position,
                tl.minimum(stop, end),
                column,
                hidden_stride,
                width,
                ENTRIES,
                NEED_WEIGHT,
            )
            if comes_in:
                if NEED_WEIGHT:
                    tl.store(row_start(pieces, run, width) + column, total, mask=column < width)
                if NEED_BIAS:
                    tl.store(bias_pieces + run + tl.arange(0, 1), total_factor, mask=first_slice)
            else:
                if NEED_WEIGHT:
                    to = row_start(dweight, key, dweight_stride) + column
                    store_sum(to, total, column < width, ADD, INTERPRET)
                if NEED_BIAS:
                    store_sum(dbias + key + tl.arange(0, 1), total_factor, first_slice, ADD, INTERPRET)
        position = stop


@triton.jit
def _joins_kernel(
    hidden,  # [N, H], unit column stride
    keys,  # [N K] int32, ascending
    ends,  # [N K] int32
    rows,  # [N K] int32, sorted
    factors,  # [N K] fp32, sorted
    pieces,  # [runs, H] fp32
    bias_pieces,  # [runs] fp32
    dweight,  # [V, H], unit column stride
    dbias,  # [V]
    hidden_stride,
    dweight_stride,
    runs,
    vocab,
    width,
    RUN: tl.constexpr,
    COLUMNS: tl.constexpr,
    ENTRIES: tl.constexpr,
    PIECES: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
    NEED_BIAS: tl.constexpr,
    ADD: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """One program less than runs a slice: nothing leaves the last."""
    part, run = tl.program_id(0) // (runs - 1), tl.program_id(0) % (runs - 1)
    begin = run * RUN
    end = begin + RUN
    key = tl.load(keys + end - 1)
    before = tl.load(keys + begin - 1, mask=begin > 0, other=-1)
    if (key == tl.load(keys + end)) & (key != before) & (key < vocab):
        column = part * COLUMNS + tl.arange(0, COLUMNS)
        smaller = tl.load(keys + begin + tl.arange(0, RUN)) < key
        first = begin + tl.sum(smaller.to(tl.int32), axis=0)
        total, total_factor = sum_of_entries(
            hidden, rows, factors, first, end, column, hidden_stride, width, ENTRIES, NEED_WEIGHT
        )
        low, low_factor = tl.zeros(total.shape, tl.float32), tl.zeros([1], tl.float32)
        after = (tl.load(ends + end - 1) + RUN - 1) // RUN  # the run that it no longer reaches
        piece = run + 1
        while piece < after:
            at = piece + tl.arange(0, PIECES)
            if NEED_WEIGHT:
                there = (at < after)[:, None] & (column < width)[None, :]
                place = at.to(tl.int64)[:, None] * width + column[None, :]
                total, low = add_pieces(total, low, tl.load(pieces + place, mask=there, other=0.0))
            if NEED_BIAS:
                some = tl.load(bias_pieces + at, mask=at < after, other=0.0)
                total_factor, low_factor = add_pieces(total_factor, low_factor, some[:, None])
            piece += PIECES
        # Infinities have no rounding errors.
        if NEED_WEIGHT:
            total = tl.where(tl.abs(total) < INF, total + low, total)
            to = row_start(dweight, key, dweight_stride) + column
            store_sum(to, total, column < width, ADD, INTERPRET)
        if NEED_BIAS:
            total_factor = tl.where(tl.abs(total_factor) < INF, total_factor + low_factor, total_factor)
            first_slice = part + tl.arange(0, 1) == 0
            store_sum(dbias + key + tl.arange(0, 1), total_factor, first_slice, ADD, INTERPRET)


@triton.jit
def _zero_kernel(
    named,  # [V + 1] uint8
    dweight,  # [V, H], unit column stride
    dbias,  # [V]
    dweight_stride,
    vocab,
    width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
    NEED_BIAS: tl.constexpr,
):
    """0 in the rows that no id names."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    empty = tl.load(named + row, mask=row < vocab, other=1) == 0
    if NEED_BIAS:
        tl.store(dbias + row, tl.zeros([ROWS], dbias.dtype.element_ty), mask=empty)
    if NEED_WEIGHT:
        for start in range(0, width, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            to = dweight + row.to(tl.int64)[:, None] * dweight_stride + column[None, :]
            zeros = tl.zeros([ROWS, COLUMNS], dweight.dtype.element_ty)
            tl.store(to, zeros, mask=empty[:, None] & (column < width)[None, :])


def launch_weight_gradient(
    entries: Entries, hidden: Tensor, dweight: Tensor | None, dbias: Tensor | None, vocab: int, *, add: bool
) -> None:
    """Every row of dweight [V, H] and dbias [V] is written; with `add`, those that an id names are added to.

    Either may be None. dweight has unit column stride, dbias is contiguous, both have any dtype of DTYPES.
    """
    rows, k = entries.keys.shape
    width, count = hidden.shape[1], rows * k
    if count == 0 and not add:
        for gradient in (dweight, dbias):
            if gradient is not None:
                gradient.zero_()
    if count == 0 or (dweight is None and dbias is None):
        return
    device = hidden.device
    runs = cdiv(count, RUN)
    slices = 1 if dweight is None else max(1, cdiv(width, COLUMNS))
    pieces = torch.empty((runs, 0 if dweight is None else width), dtype=torch.float32, device=device)
    bias_pieces = torch.empty(runs, dtype=torch.float32, device=device)
    # In the place of what is not wanted, and not touched.
    dweight_stride = 0 if dweight is None else dweight.stride(0)
    to = (pieces if dweight is None else dweight, bias_pieces if dbias is None else dbias)
    named = None if add else torch.zeros(vocab + 1, dtype=torch.uint8, device=device)
    sorted_entries = sorted_by_id(entries, named)
    flags = (dweight is not None, dbias is not None, add, INTERPRET)
    if named is not None:
        launch(
            _zero_kernel,
            cdiv(vocab, ZEROED),
            named,
            *to,
            dweight_stride,
            vocab,
            width,
            ZEROED,
            COLUMNS,
            *flags[:2],
            num_warps=4,
        )
    launch(
        _runs_kernel,
        runs * slices,
        hidden,
        *sorted_entries,
        pieces,
        bias_pieces,
        *to,
        hidden.stride(0),
        dweight_stride,
        count,
        runs,
        vocab,
        width,
        RUN,
        COLUMNS,
        ENTRIES,
        *flags,
        num_warps=2,
    )
    if runs > 1:
        launch(
            _joins_kernel,
            (runs - 1) * slices,
            hidden,
            *sorted_entries,
            pieces,
            bias_pieces,
            *to,
            hidden.stride(0),
            dweight_stride,
            runs,
            vocab,
            width,
            RUN,
            COLUMNS,
            ENTRIES,
            PIECES,
            *flags,
            num_warps=2,
        )


def compile_cases() -> list[CompileCase]:
    cases = []
    for dtype, into in (("bf16", "bf16"), ("fp16", "fp16"), ("fp32", "fp32"), ("bf16", "fp32")):
        add = dtype != into
        for kernel, name in ((_runs_kernel, "runs"), (_joins_kernel, "joins")):
            cases.append(_gradient_case(kernel, name, dtype, into, add))
        if not add:
            cases.append(_zero_case(dtype))
    return cases


def _zero_case(dtype: str) -> CompileCase:
    constants = {"ROWS": ZEROED, "COLUMNS": COLUMNS, "NEED_WEIGHT": True, "NEED_BIAS": True}
    return CompileCase(
        name=f"sparse-head-zero-{dtype}",
        kernel=_zero_kernel,
        signature={
            "named": "*u8",
            "dweight": f"*{dtype}",
            "dbias": "*fp32",
            **dict.fromkeys(("dweight_stride", "vocab", "width"), "i32"),
            **dict.fromkeys(constants, "constexpr"),
        },
        constexprs=constants,
        num_warps=4,
        max_registers=64,
        divisible=("named", "dweight", "dbias", "dweight_stride", "vocab", "width"),
    )


def _gradient_case(kernel: object, name: str, dtype: str, into: str, add: bool) -> CompileCase:
    """`runs` or `joins`; adding into an fp32 gradient of a bf16 weight is what trainers that keep one do."""
    joins = name == "joins"
    sizes = {"RUN": RUN, "COLUMNS": COLUMNS, "ENTRIES": ENTRIES, **({"PIECES": PIECES} if joins else {})}
    flags = {"NEED_WEIGHT": True, "NEED_BIAS": True, "ADD": add, "INTERPRET": False}
    numbers = ("hidden_stride", "dweight_stride", *(() if joins else ("count",)), "runs", "vocab", "width")
    return CompileCase(
        name=f"sparse-head-{name}-{dtype}" + (f"-add-{into}" if add else ""),
        kernel=kernel,
        signature={
            "hidden": f"*{dtype}",
            **dict.fromkeys(("keys", "ends", "rows"), "*i32"),
            **dict.fromkeys(("factors", "pieces", "bias_pieces"), "*fp32"),
            "dweight": f"*{into}",
            "dbias": "*fp32",
            **dict.fromkeys(numbers, "i32"),
            **dict.fromkeys((*sizes, *flags), "constexpr"),
        },
        constexprs={**sizes, **flags},
        num_warps=2,
        max_registers=104 if joins else 64,
        divisible=(
            *("hidden", "keys", "ends", "rows", "factors", "pieces", "bias_pieces", "dweight", "dbias"),
            *("hidden_stride", "dweight_stride", "width", "vocab"),
        ),
    )
