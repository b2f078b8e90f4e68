"""LSE + top-K: one kernel a row (a candidate) beside the three kernels that there are, and beside a read."""

import torch
import triton

import asyncopd
from asyncopd.kernels import launch, summary, topk
from bench.measure import Call
from bench.probe.row_topk import row_topk_kernel
from bench.probe.setting import BF16, Setting

# Warps, stages of the loop over tiles, registers a thread: what fits an SM three times, or hides more loads.
# Each takes 6 s to compile at a real vocabulary.
VARIANTS = ((8, 1, 80), (8, 2, 96), (16, 1, 64))


def run(setting: Setting) -> None:
    shape = setting.shape
    logits = (3 * setting.randn(shape.rows, shape.vocab)).to(BF16)
    scale = launch.Scale.of(1.0)
    calls: dict[str, Call] = {
        "limit: amax": lambda: logits.view(-1).amax(),
        "three kernels": lambda: asyncopd.topk_logprobs(logits, shape.k),
        "the summary alone": lambda: summary.summarize(logits, scale, peaks=True, sums=False),
    }
    out = _outputs(setting)
    for variant in VARIANTS:
        name = "one kernel a row, {} warps, {} stages, {} registers".format(*variant)
        calls[name] = _one_kernel(setting, logits, out, *variant)
    setting.compare(calls)
    if not setting.dry:
        expected = asyncopd.topk_logprobs(logits, shape.k)
        for name, ours, theirs in zip(("ids", "logprobs", "logsumexp"), out, expected, strict=True):
            print(f"  {name} of the last: {'the same bits' if torch.equal(ours, theirs) else 'DIFFERENT'}", flush=True)


def _outputs(setting: Setting) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, k, device = setting.shape.rows, setting.shape.k, setting.device
    return (
        torch.empty(rows, k, device=device, dtype=torch.int64),
        torch.empty(rows, k, device=device),
        torch.empty(rows, device=device),
    )


def _one_kernel(
    setting: Setting,
    logits: torch.Tensor,
    out: tuple[torch.Tensor, ...],
    warps: int,
    stages: int,
    registers: int,
) -> Call:
    shape, device = setting.shape, setting.device
    groups, blocks = summary.count_groups(shape.vocab), topk.Blocks.of(shape.k)
    tiles = triton.cdiv(groups, summary.TILE_GROUPS)
    group_stride, work_stride = tiles * summary.TILE_GROUPS, topk.work_size(shape.k)[0]
    padded_tiles = launch.padded(tiles, 1)
    scratch = (
        torch.empty(shape.rows, group_stride, device=device, dtype=logits.dtype),
        torch.empty(shape.rows, padded_tiles, device=device),
        torch.empty(shape.rows, padded_tiles, device=device),
        torch.empty(shape.rows, work_stride, device=device, dtype=torch.int32),
    )
    # A thread compares 8 keys at a time and holds 16 elements of the chosen groups.
    chunk, rivals = min(64, blocks.K, warps * 8), min(blocks.K, max(1, warps * 256 // blocks.K))
    sizes = {
        "GROUP": summary.GROUP,
        "TILE_GROUPS": summary.TILE_GROUPS,
        "GROUPS": launch.padded(groups, 64),
        "SUB": topk.SUB,
        "TILES": padded_tiles,
        "K": blocks.K,
        "CHUNK": chunk,
        "RIVALS": rivals,
        "SHIFT": summary.shift_of(shape.vocab),
        "STAGES": stages,
    }
    numbers = (shape.vocab, group_stride, work_stride, shape.k, shape.vocab, groups, tiles, shape.k)
    scale = launch.Scale.of(1.0)
    return lambda: row_topk_kernel[(shape.rows,)](
        logits, *scratch, *out, *numbers, *scale, **sizes, num_warps=warps, maxnreg=registers
    )
