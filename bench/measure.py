"""Time and memory of calls that are compared with each other.

Times are taken in rounds that go round all calls, each round starting with another one: a disturbance of the machine
then hits all of them alike, and none always finds the caches that its neighbour left.
"""

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

Call = Callable[[], object]

# Above the L2 of any GPU; and a read of it takes 0.2 ms at least, in which the CPU queues the call that is timed: the
# time is then the kernels', not that of their launches.
_FLUSH_BYTES = 2**30


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of every round of one call."""

    seconds: tuple[float, ...]

    @property
    def best(self) -> float:
        return min(self.seconds)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


class Stopwatch:
    """Seconds of a call: the wall clock on a CPU; events, with a cold L2, on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._scratch = torch.zeros(_FLUSH_BYTES // 4, device=device) if device.type == "cuda" else None

    def __call__(self, call: Call) -> float:
        # What the call returns is freed after its time was taken, and before the next call.
        if self._scratch is None:
            start = time.perf_counter()
            output = call()
            seconds = time.perf_counter() - start
        else:
            # Read, not written: an L2 full of writes would be emptied at the expense of the call.
            self._scratch.amax()
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            output = call()
            end.record()
            end.synchronize()
            seconds = begin.elapsed_time(end) / 1e3
        del output
        return seconds


def interleave(
    calls: Mapping[str, Call], *, device: torch.device, rounds: int | None = None, budget_s: float = 3.0
) -> dict[str, Timing]:
    """Time warm calls in rounds: as many as given, else as many as fit the budget, from 2 to 50."""
    watch = Stopwatch(device)
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        done, begin = 0, time.perf_counter()
        while done < (rounds or 50):
            if rounds is None and done >= 2 and time.perf_counter() - begin > budget_s:
                break
            start = done % max(len(names), 1)
            for name in names[start:] + names[:start]:
                seconds[name].append(watch(calls[name]))
            done += 1
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def peak_extra_bytes(call: Call, device: torch.device) -> int | None:
    """The most memory that one call holds beyond what was held before it, its result included; None if unknown.

    On a CPU the rise of the process's resident peak, which sees every allocator (torch's, the GEMM's, a kernel's own)
    and counts touched pages only. Call it warm: libraries that load and buffers that stay belong to the first call.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        output = call()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device)
        del output
        return peak - before
    release_memory()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew from here (proc(5))
        before = _status_bytes("VmRSS")
        output = call()
        peak = _status_bytes("VmHWM")
    except OSError:  # not Linux, or not allowed here
        return None
    del output
    return max(peak - before, 0)


def release_memory() -> None:
    """Give freed memory back to the system: a call that reuses it would seem to need none."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
    if trim is not None:
        trim(0)


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")
