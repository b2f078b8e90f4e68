"""How much a call allocates, for the tests that promise how little."""

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def largest_allocation(run: Callable[[], object]) -> int:
    """Bytes of the largest single allocation, seen by the allocator itself, so inside custom ops too."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        run()
    kineto = trace.profiler
    assert kineto is not None
    return max(e.nbytes() for e in kineto.kineto_results.events() if e.name() == "[memory]")
