"""Which product the reference's head takes: on a GPU the tensor cores where they sum 16-bit values in fp32."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from asyncopd.backends.reference.head import Head

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def products(monkeypatch: pytest.MonkeyPatch, device: str, hidden: torch.dtype, weight: torch.dtype) -> list[Any]:
    """(dtype of the operands, out_dtype) of every product that `Head.logits` asks for; the logits are checked."""
    asked = []
    mm = torch.mm

    def recorded(a: Tensor, b: Tensor, **options: Any) -> Tensor:
        assert a.dtype == b.dtype
        asked.append((a.dtype, options.get("out_dtype")))
        return mm(a, b, **options)

    with monkeypatch.context() as patch, FakeTensorMode():
        patch.setattr(torch, "mm", recorded)
        head = Head(torch.empty(9000, 8, dtype=weight, device=device), None, 0.7, 1.0, 5.0)
        z = head.logits(torch.empty(3, 8, dtype=hidden, device=device))
    assert z.shape == (3, 9000)
    assert z.dtype == (FP64 if FP64 in (hidden, weight) else FP32)
    return asked


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_a_gpu_multiplies_16_bits_as_they_are(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    assert products(monkeypatch, "cuda", dtype, dtype) == [(dtype, FP32)]
    assert products(monkeypatch, "cpu", dtype, dtype) == [(FP32, None)] * 2, "a block of the vocabulary at a time"


def multiplies_16_bits(device: str, hidden: torch.dtype, weight: torch.dtype) -> bool:
    with FakeTensorMode():
        head = Head(torch.empty(9, 8, dtype=weight, device=device), None, 1.0, 1.0, None)
        return head._multiplies_16_bits(torch.empty(3, 8, dtype=hidden, device=device))


def test_other_operands_are_upcast() -> None:
    assert multiplies_16_bits("cuda", BF16, BF16)
    for hidden, weight in ((FP32, FP32), (FP32, BF16), (BF16, FP16), (FP64, FP64)):
        assert not multiplies_16_bits("cuda", hidden, weight)
    assert not multiplies_16_bits("cpu", BF16, BF16)


def test_sums_in_fp16_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(allow_fp16_accumulation=True))
    assert not multiplies_16_bits("cuda", FP16, FP16)
    assert multiplies_16_bits("cuda", BF16, BF16)
