"""Products whose size may be known to the device alone: layouts, counts, edges of tiles, NaN, precision."""

import itertools

import pytest
import torch
from carried import carry
from each_backend import DEVICES
from torch import Tensor

from asyncopd.kernels.gemm import FP32, GROUP_ROWS, LARGE, SMALL, cublas_sums_in_fp32, product, tile_for

DEVICE = DEVICES["triton"]
NAN = float("nan")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Exact in fp16 and bf16, and so are their sums in fp32, in any order: an index that is off by one shows.
VALUES = (-8, 9)


def whole_numbers(
    rng: torch.Generator, rows: int, columns: int, dtype: torch.dtype, transposed: bool = False
) -> Tensor:
    values = torch.randint(*VALUES, (columns, rows) if transposed else (rows, columns), generator=rng)
    return values.to(DEVICE, dtype).t() if transposed else values.to(DEVICE, dtype)


def count_of(n: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(n, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("a_transposed", "b_transposed"), [*itertools.product([False, True], repeat=2)])
def test_every_layout_and_edges_of_tiles(
    rng: torch.Generator, dtype: torch.dtype, a_transposed: bool, b_transposed: bool
) -> None:
    a = whole_numbers(rng, 133, 150, dtype, a_transposed)
    b = whole_numbers(rng, 150, 270, dtype, b_transposed)
    for count in (None, count_of(133)):
        out = torch.full((133, 270), NAN, device=DEVICE)
        product(a, b, out, count=count)
        assert torch.equal(out, a.float() @ b.float())


@pytest.mark.parametrize("count", [-3, 0, 1, 127, 128, 129, 200, 10**6])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_rows_beyond_the_count_are_neither_read_nor_written(
    rng: torch.Generator, count: int, dtype: torch.dtype
) -> None:
    a, b = whole_numbers(rng, 200, 64, torch.bfloat16), whole_numbers(rng, 64, 40, torch.bfloat16)
    out = torch.full((200, 40), -7.0, device=DEVICE)
    live = min(max(count, 0), 200)
    expected = torch.cat([a[:live].float() @ b.float(), out[live:]])
    a[live:] = NAN
    product(a, b, out, count=count_of(count, dtype))
    assert torch.equal(out, expected)


@pytest.mark.parametrize("count", [-3, 0, 1, 31, 64, 100, 128, 10**6])
@pytest.mark.parametrize("accumulate", [False, True])
def test_terms_beyond_the_count_are_not_read(rng: torch.Generator, count: int, accumulate: bool) -> None:
    a = whole_numbers(rng, 70, 128, torch.bfloat16, transposed=True)
    b = whole_numbers(rng, 128, 40, torch.bfloat16)
    live = min(max(count, 0), 128)
    before = whole_numbers(rng, 70, 40, torch.float32)
    expected = a[:, :live].float() @ b[:live].float() + (before if accumulate else 0.0)
    a[:, live:], b[live:] = NAN, NAN
    out = before if accumulate else torch.full_like(before, NAN)
    product(a, b, out, count=count_of(count), counted="depth", accumulate=accumulate)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counted", [None, "rows", "depth"])
def test_what_is_there_is_added_to_and_rounded_once(rng: torch.Generator, dtype: torch.dtype, counted: str) -> None:
    a, b = whole_numbers(rng, 30, 64, dtype), whole_numbers(rng, 64, 33, dtype)
    count = None if counted is None else count_of(30 if counted == "rows" else 64)
    before = (1000 * torch.randn(30, 33, generator=rng)).to(DEVICE, dtype)
    out = before.clone()
    product(a, b, out, count=count, counted=counted or "rows", accumulate=True)
    # Rounded to nearest: a 16-bit result that was cut off, or rounded twice, differs somewhere among these.
    assert torch.equal(out, (before.float() + a.float() @ b.float()).to(dtype))


@pytest.mark.parametrize("tile", [LARGE[9], SMALL[9], SMALL[10], FP32], ids=str)
def test_sums_are_fp32(rng: torch.Generator, tile: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asyncopd.kernels.gemm.tile_for", lambda *_: tile)
    # 256 + 1 + 1 + ... : bf16 sums would stay at 256, fp16 ones at 2048.
    a = torch.ones(1, 4001, device=DEVICE, dtype=torch.bfloat16)
    a[0, 0] = 256
    out = torch.empty(1, 1, device=DEVICE)
    product(a, torch.ones_like(a).t(), out, count=count_of(1))
    assert out.item() == 4256


def test_more_tiles_than_a_group_of_them(rng: torch.Generator) -> None:
    # Two groups of rows, the second of one and a half tiles, and three tiles of columns.
    rows = FP32.BM * GROUP_ROWS + FP32.BM + 10
    a, b = whole_numbers(rng, rows, 3, torch.float32), whole_numbers(rng, 3, 300, torch.float32)
    out = torch.full((rows, 300), NAN, device=DEVICE)
    product(a, b, out, count=count_of(rows))
    assert torch.equal(out, a @ b)


def test_rows_apart_and_views_that_begin_anywhere(rng: torch.Generator) -> None:
    a = whole_numbers(rng, 40, 90, torch.float32)[3::2, 5:70]
    b = whole_numbers(rng, 90, 200, torch.float32)[7:72, 11:100]
    memory = torch.full((40, 100), -7.0, device=DEVICE)
    out = memory[1:38:2, 4:93]
    for count in (None, count_of(19)):
        out.fill_(NAN)
        product(a, b, out, count=count)
        assert torch.equal(out, a @ b)
    written = torch.zeros_like(memory, dtype=torch.bool)
    written[1:38:2, 4:93] = True
    assert (memory[~written] == -7).all()


def test_row_strides_beyond_32_bits(rng: torch.Generator) -> None:
    a, b = whole_numbers(rng, 1, 64, torch.bfloat16), whole_numbers(rng, 64, 20, torch.bfloat16)
    out = torch.empty(1, 20, device=DEVICE)
    product(a.as_strided((1, 64), (2**40, 1)), b, out.as_strided((1, 20), (2**40, 1)), count=count_of(1))
    assert torch.equal(out, a.float() @ b.float())


def test_nan_and_infinity_stay_in_their_rows_and_columns(rng: torch.Generator) -> None:
    a, b = torch.ones(20, 70, device=DEVICE), torch.ones(70, 30, device=DEVICE)
    a[3, 69], a[5, 0], a[7, 1] = NAN, float("inf"), float("inf")
    b[1, 4] = 0.0
    out = torch.empty(20, 30, device=DEVICE)
    product(a, b, out, count=count_of(20))
    torch.testing.assert_close(out, a @ b, rtol=0, atol=0, equal_nan=True)
    assert out[3].isnan().all()
    assert out[7, 4].isnan()


@pytest.mark.parametrize(("rows", "depth", "columns"), [(0, 3, 4), (4, 3, 0), (4, 0, 3)])
def test_empty_products(rows: int, depth: int, columns: int) -> None:
    a, b = torch.ones(rows, depth, device=DEVICE), torch.ones(depth, columns, device=DEVICE)
    for count in (None, count_of(rows)):
        out = torch.full((rows, columns), 5.0, device=DEVICE)
        product(a, b, out, count=count, accumulate=True)
        assert (out == 5).all()
        product(a, b, out, count=count)
        assert (out == 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": torch.zeros(4, 8).double()}, r"a: got torch\.float64"),
        ({"a": torch.zeros(4, 8, 1)}, r"a: got shape \[4, 8, 1\]"),
        ({"a": torch.zeros(8, 16)[::2, ::2]}, r"a: got strides \[32, 2\]"),
        ({"b": torch.zeros(9, 6)}, r"b: got torch\.float32 \[9, 6\], expected torch\.float32 \[8, N\]"),
        ({"b": torch.zeros(8, 6).half()}, r"b: got torch\.float16"),
        ({"out": torch.zeros(4, 7)}, r"out: got torch\.float32 \[4, 7\]"),
        ({"out": torch.zeros(4, 6).bfloat16()}, r"out: got torch\.bfloat16"),
        ({"out": torch.zeros(6, 4).t()}, "out: got column stride 4"),
        ({"count": torch.zeros(1, dtype=torch.int64)}, r"count: got torch\.int64 \[1\]"),
        ({"count": torch.tensor(1.0)}, r"count: got torch\.float32"),
        ({"b": torch.zeros(8, 6, device="meta")}, "b: got device meta"),
        ({"counted": "columns"}, "counted: got 'columns'"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    arguments = {"a": torch.zeros(4, 8), "b": torch.zeros(8, 6), "out": torch.zeros(4, 6), **change}
    on_device = {
        name: carry(value, DEVICE) if isinstance(value, Tensor) and value.device.type == "cpu" else value
        for name, value in arguments.items()
    }
    with pytest.raises((TypeError, ValueError), match=message):
        product(**on_device)  # type: ignore[arg-type]


def test_cublas_is_for_sums_in_fp32() -> None:
    matmul = torch.backends.cuda.matmul
    whole, half, short = (torch.zeros(1, 1, dtype=dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16))
    tf32, fp16_sums = matmul.allow_tf32, matmul.allow_fp16_accumulation
    try:
        matmul.allow_tf32 = matmul.allow_fp16_accumulation = False
        assert cublas_sums_in_fp32(whole, whole)
        assert cublas_sums_in_fp32(half, whole)
        assert cublas_sums_in_fp32(short, whole)
        assert not cublas_sums_in_fp32(short, short)
        matmul.allow_tf32 = matmul.allow_fp16_accumulation = True
        assert not cublas_sums_in_fp32(whole, whole)
        assert not cublas_sums_in_fp32(half, whole)
        assert cublas_sums_in_fp32(short, whole)
    finally:
        matmul.allow_tf32, matmul.allow_fp16_accumulation = tf32, fp16_sums


@pytest.mark.skipif(DEVICE == "cpu", reason="asks a device how large it is")
def test_small_products_use_small_tiles() -> None:
    a = torch.empty(64, 64, dtype=torch.bfloat16, device=DEVICE)
    assert tile_for(a, 64, 512) in SMALL.values()
    assert tile_for(a, 8192, 151_936) in LARGE.values()


@pytest.mark.skipif(DEVICE == "cpu", reason="cuBLAS")
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
def test_without_a_count_nothing_else_as_large_as_the_result_is_made(accumulate: bool, out_dtype: torch.dtype) -> None:
    a = torch.ones(2048, 64, dtype=torch.bfloat16, device=DEVICE)
    out = torch.ones(2048, 2048, dtype=out_dtype, device=DEVICE)
    product(a, a.t(), out, accumulate=accumulate)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    product(a, a.t(), out, accumulate=accumulate)
    assert torch.cuda.max_memory_allocated() - before < out.numel()
    assert (out == (129 if accumulate else 64)).all()
