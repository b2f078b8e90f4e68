"""What calls cost the CPU: a launch by Triton's front door and by the compiled kernel's, a custom op, small losses."""

import time
from pathlib import Path

import torch

import asyncopd
from asyncopd.kernels import launch, summary, topk
from bench.measure import Call, Timing
from bench.probe.setting import Setting

CALLS, ROUNDS = 20, 20


def run(setting: Setting) -> None:
    calls = _calls(setting)
    for name, call in calls.items():
        for _ in range(5):
            call()
        if not setting.dry:
            setting.say(name, Timing(tuple(_seconds(call, setting) for _ in range(ROUNDS))), "", None)
    print(f"  {len(calls)} calls; CPU: {_cpu()}", flush=True)


def _seconds(call: Call, setting: Setting) -> float:
    """Of one call, the mean of some: the GPU has nothing to do before, so its queue is never full."""
    torch.cuda.synchronize(setting.device)
    begin = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - begin) / CALLS


def _calls(setting: Setting) -> dict[str, Call]:
    device, rows, k = setting.device, 8, 16
    x = setting.randn(rows, 1024)
    out = summary.summarize(x, launch.Scale.of(1.0), peaks=True, sums=False)
    scale = launch.Scale.of(1.0)
    arguments = (
        *(x, *out, x.stride(0), out.peaks.stride(0), 1024, summary.count_groups(1024), out.tiles),
        *(scale.scale, scale.scale_low, summary.GROUP, summary.TILE_GROUPS, True, False),
    )
    kernel = summary._summary_kernel
    compiled = kernel[(rows,)](*arguments, num_warps=4)
    stream = 0 if setting.dry else torch.cuda.current_stream(device).cuda_stream
    hooks = (None, None, None)  # launch metadata, before, after

    logprobs = x.log_softmax(1)[:, :k].contiguous().requires_grad_()
    ids = torch.arange(k, device=device).expand(rows, k).contiguous()
    support = asyncopd.Support(ids, logprobs.detach(), torch.zeros(rows, k, device=device), draw="top_k")
    return {
        "a loop of 1,000 additions": lambda: sum(range(1000)),
        "torch.empty": lambda: torch.empty(8, device=device),
        "x + 1": lambda: x + 1,
        "launch, kernel[grid]": lambda: kernel[(rows,)](*arguments, num_warps=4),
        "launch, compiled.run": lambda: compiled.run(
            rows, 1, 1, stream, compiled.function, compiled.packed_metadata, *hooks, *arguments
        ),
        "topk: public function": lambda: asyncopd.topk_logprobs(x, k),
        "topk: custom op": lambda: torch.ops.asyncopd.topk_logprobs(x, k, 1.0),
        "topk: the backend's function": lambda: topk.topk_logprobs(x, k, 1.0),
        "torch topk + logsumexp": lambda: (x.topk(k), x.logsumexp(1)),
        "reverse_kl, forward, no gradient": lambda: asyncopd.reverse_kl(logprobs.detach(), support),
        "reverse_kl, forward": lambda: asyncopd.reverse_kl(logprobs, support),
        "reverse_kl, forward + backward": lambda: asyncopd.reverse_kl(logprobs, support).backward(),
        "torch, backward of one product": lambda: (logprobs * 2).sum().backward(),
    }


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    return next((line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")), "unknown")
