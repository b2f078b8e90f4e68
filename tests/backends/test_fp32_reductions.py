"""cuBLAS's reductions are asked for in fp32 while a product runs, and nobody finds the setting changed afterwards."""

import threading
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton")
from asyncopd.kernels import cublas

MATMUL = torch.backends.cuda.matmul
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def setting(dtype: torch.dtype) -> tuple[bool, bool]:
    name = f"allow_{DTYPES[dtype]}_reduced_precision_reduction"
    return getattr(MATMUL, name), getattr(MATMUL, f"{name}_split_k", True)


def change(dtype: torch.dtype, reduced: bool, split_k: bool) -> None:
    setattr(MATMUL, f"allow_{DTYPES[dtype]}_reduced_precision_reduction", reduced if split_k else (reduced, split_k))


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    before = {dtype: setting(dtype) for dtype in DTYPES}
    yield
    for dtype, values in before.items():
        change(dtype, *values)


@pytest.mark.parametrize("before", [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_only_inside(dtype: torch.dtype, before: tuple[bool, bool]) -> None:
    change(dtype, *before)
    others = [setting(other) for other in DTYPES if other != dtype]
    with cublas.fp32_reductions(dtype):
        assert setting(dtype) == (False, before[1])
        assert [setting(other) for other in DTYPES if other != dtype] == others
        with cublas.fp32_reductions(dtype):
            assert setting(dtype) == (False, before[1])
        assert setting(dtype) == (False, before[1])
    assert setting(dtype) == before


def test_after_an_error() -> None:
    change(torch.bfloat16, True, True)
    with pytest.raises(RuntimeError, match="failed inside"), cublas.fp32_reductions(torch.bfloat16):
        raise RuntimeError("failed inside")
    assert setting(torch.bfloat16) == (True, True)


def test_threads_that_overlap() -> None:
    """One that enters second and leaves last must not save what the first has set."""
    change(torch.bfloat16, True, True)
    entered, leave = threading.Event(), threading.Event()

    def second() -> None:
        with cublas.fp32_reductions(torch.bfloat16):
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=second)
    with cublas.fp32_reductions(torch.bfloat16):
        thread.start()
        assert entered.wait(10)
    assert setting(torch.bfloat16) == (False, True)
    leave.set()
    thread.join(10)
    assert setting(torch.bfloat16) == (True, True)


def test_who_can_be_rounded_once() -> None:
    assert cublas.rounds_once(torch.empty(0, dtype=torch.bfloat16))
    assert not cublas.rounds_once(torch.empty(0))
    before = MATMUL.allow_fp16_accumulation
    try:
        for sums_in_fp16 in (False, True):
            MATMUL.allow_fp16_accumulation = sums_in_fp16
            assert cublas.rounds_once(torch.empty(0, dtype=torch.float16)) != sums_in_fp16
    finally:
        MATMUL.allow_fp16_accumulation = before
