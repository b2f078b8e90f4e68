"""The check of launches without a GPU: planted faults are caught and named; the tables have every pair of values."""

from collections.abc import Callable, Iterator
from itertools import combinations, product
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import launch_kernels
import triton
import triton.language as tl
from triton import knobs

from asyncopd import backends
from asyncopd.kernels.launch import launch
from bench.launch_check import check, driver
from bench.launch_check.check import Outcome, run_cases
from bench.launch_check.driver import stand_in
from bench.launch_check.ops import OPS, Op
from bench.launch_check.pairwise import Case, Rule, table

needs_compiler = pytest.mark.skipif(
    knobs.runtime.interpret or torch.cuda.is_available(), reason="compiled kernels, on a machine without a GPU"
)


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "triton"))
    yield
    launch_kernels.GLOBAL = tl.constexpr(2.0)


def planted(run: Callable[[Case], None]) -> Outcome:
    return run_cases("planted", run, [{"dtype": "bf16", "k": 64}])


def by_triton(kernel: Any, *args: Any) -> None:
    kernel[(1,)](*args, num_warps=4)


def by_launch(kernel: Any, *args: Any) -> None:
    launch(kernel, 1, *args, num_warps=4)


PATHS = pytest.mark.parametrize("path", [by_triton, by_launch], ids=["by_triton", "by_launch"])


# ------------------------------------------------------------------------------------------------ planted faults


@needs_compiler
@PATHS
def test_a_clean_kernel_passes(path: Callable[..., None]) -> None:
    outcome = planted(lambda case: path(launch_kernels.scale_kernel, torch.ones(64), 64, 128))
    assert outcome.failures == []
    assert (outcome.cases, outcome.launches, outcome.launched) == (1, 2, {"scale_kernel"})
    assert len(outcome.variants) <= 1  # none if the other path has compiled it
    assert outcome.spilling == set()


@needs_compiler
@PATHS
def test_a_global_that_is_no_number_is_caught(path: Callable[..., None]) -> None:
    """It is compiled, and refused when it is launched."""
    outcome = planted(lambda case: path(launch_kernels.nan_kernel, torch.ones(64), 64, 128))
    (failure,) = outcome.failures
    assert failure.startswith("planted: dtype='bf16', k=64\n    RuntimeError: Global variable NOT_A_NUMBER has changed")


@needs_compiler
@pytest.mark.parametrize("shape", [(), (64,)])
def test_an_fp64_tensor_that_reaches_a_kernel_is_caught(shape: tuple[int, ...]) -> None:
    added = torch.ones(shape, dtype=torch.float64)
    # The kernel is compiled once: what it was compiled with is told in the case that did it.
    launch_kernels.add_kernel.device_caches.clear()
    outcome = planted(lambda case: by_triton(launch_kernels.add_kernel, torch.ones(64), added, 64, 128))
    first, *others = outcome.failures
    assert first == "planted: dtype='bf16', k=64\n    add_kernel: argument added is *fp64"
    assert all("fp64 instructions in its PTX" in other for other in others)


@needs_compiler
def test_fp64_arithmetic_inside_a_kernel_is_caught() -> None:
    outcome = planted(lambda case: by_launch(launch_kernels.wide_kernel, torch.ones(64), 64, 128))
    (failure,) = outcome.failures
    assert failure.startswith("planted: dtype='bf16', k=64\n    wide_kernel: ")
    assert failure.endswith("fp64 instructions in its PTX")


@needs_compiler
@PATHS
def test_a_global_that_changes_between_calls_is_caught(path: Callable[..., None]) -> None:
    """Triton's path refuses the second launch; a direct one would compute with the old value."""

    def run(case: Case) -> None:
        path(launch_kernels.scale_kernel, torch.ones(64), 64, 128)
        launch_kernels.GLOBAL = tl.constexpr(3.0)

    outcome = planted(run)
    assert outcome.failures
    assert all(failure.startswith("planted: dtype='bf16', k=64\n") for failure in outcome.failures)
    assert "scale_kernel: global GLOBAL was constexpr[2.0] at compilation and is constexpr[3.0] now" in str(outcome)


@needs_compiler
def test_spills_are_counted() -> None:
    kernel = launch_kernels.spilling_kernel
    outcome = planted(lambda case: kernel[(1,)](torch.ones(1024), 1024, 1024, num_warps=1, maxnreg=24))
    assert outcome.failures == []
    (variant,) = outcome.spilling
    assert variant.startswith("spilling_kernel(x=*fp32, size=i32, BLOCK=1024, num_warps=1")


@needs_compiler
def test_an_error_of_an_op_is_caught_and_others_go_on() -> None:
    def run(case: Case) -> None:
        if case["k"] == 1:
            raise ValueError("k: got 1")
        by_launch(launch_kernels.scale_kernel, torch.ones(64), 64, 128)

    outcome = run_cases("planted", run, [{"k": 1}, {"k": 2}])
    assert outcome.failures == ["planted: k=1\n    ValueError: k: got 1"]
    assert (outcome.cases, outcome.launches) == (2, 2)


def test_kernels_that_no_case_launches_are_named() -> None:
    everything = {name for path in check.kernel_sources() for name in check.triton_kernels._jitted(path.read_text())}
    assert check.never_launched(everything) == []
    assert check.never_launched(everything - {"_kl_kernel", "_runs_kernel"}) == [
        "_kl_kernel: launched by no case",
        "_runs_kernel: launched by no case",
    ]


@pytest.mark.parametrize("failures", [[], ["topk_logprobs: k=64\n    ValueError: no"]])
def test_exit_status(failures: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(check, "outcomes", lambda: iter([Outcome(failures, cases=1), Outcome([], cases=2)]))
    monkeypatch.setattr(check, "never_launched", lambda launched: [])
    if failures:
        with pytest.raises(SystemExit) as status:
            check.main()
        assert status.value.code == 1
    else:
        check.main()
    printed = capsys.readouterr().out
    assert "\n".join(failures) in printed
    assert f"3 cases, 0 launches of 0 kernels, 0 compiled for sm_90, {len(failures)} failures" in printed


# -------------------------------------------------------------------------------------------- the stand-in driver


@needs_compiler
def test_an_op_runs_and_everything_is_put_back() -> None:
    before = torch.empty, torch.empty_like, torch.Tensor.new_empty, triton.runtime.driver._active
    with stand_in(clear_memory=True) as recorder:
        assert backends.choose("kl_rows", torch.device("cpu"), torch.float32) == "triton"
        assert torch.empty(1000).abs().max() == 0
        op = next(op for op in OPS if op.name == "reverse_kl")
        op.run(op.cases()[0])
    assert "_kl_kernel" in {function.__name__ for function in recorder.launched}
    assert before == (torch.empty, torch.empty_like, torch.Tensor.new_empty, triton.runtime.driver._active)
    assert backends.choose("kl_rows", torch.device("cpu"), torch.float32) != "triton"


@needs_compiler
def test_a_stand_in_that_no_longer_fits_the_package_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "_CHECKS_OF_DATA", ("check_of_yesterday",))
    with pytest.raises(RuntimeError, match="no module of asyncopd has 'check_of_yesterday'"), stand_in():
        pass


# ------------------------------------------------------------------------------------------------------- the tables


def allowed_pairs(options: dict[str, Any], rules: Any) -> set[tuple[str, int, str, int]]:
    """By enumeration. Options that no rule names go with everything that is allowed."""
    ruled = [name for name in options if any(name in rule.names for rule in rules)]
    combos = []
    for indices in product(*(range(len(options[name])) for name in ruled)):
        case = dict(zip(ruled, indices, strict=True))
        values = {name: options[name][index] for name, index in case.items()}
        if all(rule.allows(*(values[name] for name in rule.names)) for rule in rules):
            combos.append(case)
    found = set()
    for a, b in combinations(options, 2):
        for combo in combos:
            for i in [combo[a]] if a in combo else range(len(options[a])):
                for j in [combo[b]] if b in combo else range(len(options[b])):
                    found.add((a, i, b, j))
    return found


def pairs_of(cases: list[Case], options: dict[str, Any]) -> set[tuple[str, int, str, int]]:
    def index(name: str, value: Any) -> int:
        return next(i for i, v in enumerate(options[name]) if type(v) is type(value) and v == value)

    return {(a, index(a, case[a]), b, index(b, case[b])) for case in cases for a, b in combinations(options, 2)}


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_every_pair_of_values_occurs(op: Op) -> None:
    cases = op.cases()
    assert pairs_of(cases, dict(op.options)) == allowed_pairs(dict(op.options), op.rules)
    assert cases == op.cases(), "the same in every process"
    for case in cases:
        assert all(rule.allows(*(case[name] for name in rule.names)) for rule in op.rules)
    largest = sorted(len(values) for values in op.options.values())[-2:]
    assert len(cases) <= 5 * largest[0] * largest[1], "pairs, not all combinations"


def test_table_of_a_small_example() -> None:
    options = {"a": (1, True, None), "b": ("x", "y"), "c": (0.0, 1.0)}
    rules = (Rule(("a", "b"), lambda a, b: a is not None or b == "y"),)
    cases = table(options, rules)
    assert pairs_of(cases, options) == allowed_pairs(options, rules)
    assert len(cases) <= 7
    assert not any(case["a"] is None and case["b"] == "x" for case in cases)


def test_a_pair_that_rules_exclude_by_a_third_option_is_left_out() -> None:
    rules = (Rule(("a", "c"), lambda a, c: a == c), Rule(("b", "c"), lambda b, c: b == c))
    assert table({"a": (0, 1), "b": (0, 1), "c": (0, 1)}, rules) == [
        {"a": 0, "b": 0, "c": 0},
        {"a": 1, "b": 1, "c": 1},
    ]
