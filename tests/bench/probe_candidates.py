"""The probe's candidates give what they should, through Triton's interpreter; run by test_probe.py."""

import torch

import asyncopd
from bench.probe import rows
from bench.probe.pack12 import pack_kernel, unpack_kernel
from bench.probe.setting import Setting, Shape


class Small(Setting):
    shape = Shape(3, 9000, 64, 16)  # two whole tiles and a part of one


def one_kernel_a_row_has_the_bits_of_three() -> None:
    setting = Small.of(torch.device("cpu"))
    for dtype in (torch.bfloat16, torch.float32):
        logits = (3 * setting.randn(setting.shape.rows, setting.shape.vocab)).to(dtype)
        logits[0, 7], logits[1, 8999], logits[2, :100] = torch.nan, torch.inf, -torch.inf
        out = rows._outputs(setting)
        rows._one_kernel(setting, logits, out, 8, 1, 80)()
        expected = asyncopd.topk_logprobs(logits, setting.shape.k)
        for ours, theirs in zip(out, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def twelve_bits_hold_what_a_bf16_does() -> None:
    x = torch.randn(2, 1000)
    high, low = torch.empty(2, 1000, dtype=torch.uint8), torch.empty(2, 500, dtype=torch.uint8)
    peaks, sums, dx = torch.empty(2, 2), torch.empty(2, 2), torch.empty(2, 1000)
    pack_kernel[(2, 2)](x, high, low, peaks, sums, 1000, 1000, 1.4426950408889634, TILE=512)
    unpack_kernel[(2, 2)](high, low, torch.ones(2, 2), dx, 1000, TILE=512, INTERPRET=True)
    tile_peaks = torch.stack([x[:, :512].amax(1), x[:, 512:].amax(1)], 1)
    e = (x - tile_peaks.repeat_interleave(512, 1)[:, :1000]).exp()
    assert torch.equal(peaks, tile_peaks)
    torch.testing.assert_close(sums, torch.stack([e[:, :512].sum(1), e[:, 512:].sum(1)], 1))
    normal = e > 2**-12  # below, an fp16 has fewer bits
    relative = ((dx - e).abs() / e)[normal]
    # Half a unit of 8 bits of mantissa, and half a unit of the fp16 that is rounded to them.
    assert 2**-10 < relative.amax() < 2**-9 + 2**-11 + 1e-5


if __name__ == "__main__":
    one_kernel_a_row_has_the_bits_of_three()
    twelve_bits_hold_what_a_bf16_does()
    print("both are right")
