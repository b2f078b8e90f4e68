"""Times go round, memory is what was touched, and a lost ratio is caught."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_cases import CPU, tiny

import asyncopd
from bench import gates, test_gates
from bench.families import EAGER, OURS
from bench.gates import Bound, GateLost, hold
from bench.measure import Timing, interleave, peak_extra_bytes

MIB = 2**20


def sleeper(seconds: float) -> Callable[[], None]:
    return lambda: time.sleep(seconds)


def test_rounds_go_round_all_calls() -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    timings = interleave(calls, device=CPU, rounds=3)
    assert "".join(order) == "abcbcacab"
    assert all(len(timing.seconds) == 3 for timing in timings.values())


def test_rounds_fit_their_budget() -> None:
    timings = interleave({"a": sleeper(0.02)}, device=CPU, budget_s=0.1)
    assert 4 <= len(timings["a"].seconds) <= 6
    assert 0.02 <= timings["a"].best <= timings["a"].median
    assert len(interleave({"a": sleeper(0.02)}, device=CPU, budget_s=0.0)["a"].seconds) == 2


def test_best_and_median() -> None:
    assert (Timing((3.0, 1.0, 7.0)).best, Timing((3.0, 1.0, 7.0)).median) == (1.0, 3.0)


def test_peak_memory_is_that_of_the_worst_moment() -> None:
    def call() -> torch.Tensor:
        kept = torch.ones(16 * MIB, dtype=torch.uint8)
        torch.ones(64 * MIB, dtype=torch.uint8)
        torch.ones(32 * MIB, dtype=torch.uint8)
        return kept

    call()
    peak = peak_extra_bytes(call, CPU)
    if peak is None:
        pytest.skip("the peak of resident memory cannot be read here")
    assert 80 * MIB - MIB <= peak <= 84 * MIB
    # Many small blocks that an allocator keeps when they are freed count as well.
    small = peak_extra_bytes(lambda: [torch.ones(MIB // 16, dtype=torch.uint8) for _ in range(512)], CPU)
    assert small is not None
    assert 32 * MIB - MIB <= small <= 36 * MIB


def test_gate_catches_a_planted_slow_call() -> None:
    calls = {"slow": sleeper(0.010), "fast": sleeper(0.002)}
    with pytest.raises(GateLost, match=r"slow .* ms / fast .* ms = .*, at most 2\.000: LOST"):
        hold(calls, [Bound("slow", "fast", 2.0)], rounds=2)
    with pytest.raises(GateLost):
        hold(calls, [Bound.faster("fast", "slow", 20)], rounds=2)
    timings = hold(calls, [Bound.faster("fast", "slow", 2)], rounds=2)
    assert len(timings["fast"].seconds) == 2, "what holds at once is not repeated"


def test_gate_forgives_a_disturbance_but_not_for_ever() -> None:
    rounds = 0

    def disturbed() -> None:
        nonlocal rounds
        rounds += 1
        time.sleep(0.020 if rounds <= 2 else 0.002)

    calls = {"disturbed": disturbed, "steady": sleeper(0.002)}
    timings = hold(calls, [Bound("disturbed", "steady", 3.0)], rounds=1)
    assert len(timings["steady"].seconds) == 3
    rounds = -100
    with pytest.raises(GateLost):
        hold(calls, [Bound("disturbed", "steady", 3.0)], rounds=1)
    assert rounds == -100 + gates.ATTEMPTS


def report(timing: Timing) -> None:
    """In place of pytest-benchmark."""


def test_the_gates_themselves_catch_a_slow_and_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    right = asyncopd.topk_logprobs
    bounds = [Bound(OURS, EAGER, 10.0)]
    test_gates.gate(tiny("topk"), bounds, report)

    def slow(*args: Any) -> asyncopd.support.TopK:
        time.sleep(0.02)
        return right(*args)

    monkeypatch.setattr(asyncopd, "topk_logprobs", slow)
    with pytest.raises(GateLost, match="LOST"):
        test_gates.gate(tiny("topk"), bounds, report)

    monkeypatch.setattr(asyncopd, "topk_logprobs", lambda logits, k: right(logits + 1e-3 * logits, k))
    with pytest.raises(AssertionError, match="asyncopd: wrong: log-probabilities off by"):
        test_gates.gate(tiny("topk"), bounds, report)


def test_gates_skip_where_ratios_mean_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX2")
    assert "this one has AVX2" in (gates.reason_not_comparable() or "")
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0})
    assert "may use 1 core" in (gates.reason_not_comparable() or "")
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1})
    assert gates.reason_not_comparable() is None
