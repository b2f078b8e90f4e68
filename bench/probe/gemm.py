"""Products of a block of the vocabulary by its width, and what the whole vocabulary takes at that rate."""

from collections.abc import Mapping

import torch

from bench.measure import Call
from bench.probe.setting import BF16, Setting

WIDTHS, DRY_WIDTHS = (4096, 8192, 16384), (1024, 2048)


def run(setting: Setting) -> None:
    widths = DRY_WIDTHS if setting.dry else WIDTHS
    rows, width, vocab = setting.shape.rows, setting.shape.width, setting.shape.vocab

    def note(name: str, ms: float) -> str:
        columns = int(name.split()[-2])
        return f"{2e-9 * rows * width * columns / ms:.0f} TFLOPS, the whole vocabulary {ms * vocab / columns:.2f} ms"

    reduced = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    try:
        setting.compare(_calls(setting, widths), rounds=9, note=note)
    finally:
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = reduced


def _calls(setting: Setting, widths: tuple[int, ...]) -> Mapping[str, Call]:
    # A CPU has no product of bf16 into fp32: a dry run has tensors without data, whose shapes and dtypes are checked.
    shape, device = setting.shape, torch.device("meta") if setting.dry else setting.device
    hidden = torch.randn(shape.rows, shape.width, device=device).to(BF16)
    weight = torch.randn(max(widths), shape.width, device=device).to(BF16)
    memory = torch.empty(shape.rows * max(widths), device=device)
    dz = torch.randn(shape.rows * max(widths), device=device).to(BF16)
    dh, dw = torch.zeros(shape.rows, shape.width, device=device), torch.empty_like(weight)
    calls: dict[str, Call] = {}
    for columns in widths:
        size = shape.rows * columns
        _add(calls, columns, hidden, weight[:columns], memory[:size], dz[:size], dh, dw[:columns])
    return calls


def _add(
    calls: dict[str, Call],
    columns: int,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    x: torch.Tensor,
    dz: torch.Tensor,
    dh: torch.Tensor,
    dw: torch.Tensor,
) -> None:
    x, dz = x.view(-1, columns), dz.view(-1, columns)
    fp32 = torch.float32
    calls[f"z in fp32, {columns} columns"] = lambda: torch.mm(hidden, weight.t(), out_dtype=fp32, out=x)
    calls[f"dh += in fp32, {columns} columns"] = lambda: torch.addmm(dh, dz, weight, out_dtype=fp32, out=dh)
    calls[f"dW in bf16, {columns} columns"] = lambda: torch.mm(dz.t(), hidden, out=dw)
