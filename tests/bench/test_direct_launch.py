"""A launch by asyncopd.kernels.launch is Triton's own launch: the same compiled kernel with the same arguments.

Triton compiles a variant for the types of arguments, for pointers and ints that are multiples of 16, for ints that are
1 and for ints of more than 32 bits. A cached launch that takes the variant of another call would read beyond a tensor
or compute something else, on a GPU only. Here every launch is recorded by the stand-in driver.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import launch_kernels
from triton import knobs
from triton.runtime import JITFunction

from asyncopd.kernels import launch as launch_module
from bench.launch_check.driver import Launch, Recorder, stand_in

pytestmark = pytest.mark.skipif(
    knobs.runtime.interpret or torch.cuda.is_available(), reason="compiled kernels, on a machine without a GPU"
)


@dataclass(frozen=True)
class Call:
    """Arguments of `every_argument`, and options."""

    x: Tensor
    y: Tensor
    optional: Tensor | None = None
    size: int = 96
    stride: int = 32
    plain: int = 5
    factor: float = 0.5
    block: int = 128
    word: str = "add"
    num_warps: int = 4
    programs: int = 3
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def arguments(self) -> tuple[Any, ...]:
        sizes = (self.size, self.stride, self.plain, self.factor)
        return self.x, self.y, self.optional, *sizes, self.block, self.word


MEMORY = torch.zeros(512)
assert MEMORY.data_ptr() % 16 == 0
BASE = Call(x=MEMORY[:128], y=MEMORY[128:256])
INTS = (0, 1, 2, 15, 16, 17, 48, 2**31 - 16, 2**31 - 1, 2**31, 2**31 + 1, 2**40 + 16, -1, -16, -(2**31) - 1)
VARIANTS = {
    "base": BASE,
    "pointer + 4 bytes": replace(BASE, x=MEMORY[1:129]),
    "pointer + 8 bytes": replace(BASE, x=MEMORY[2:130]),
    "pointer + 16 bytes": replace(BASE, x=MEMORY[4:132]),
    "other pointer + 4 bytes": replace(BASE, y=MEMORY[129:257]),
    "both pointers + 4 bytes": replace(BASE, x=MEMORY[1:129], y=MEMORY[129:257]),
    "bf16": replace(BASE, x=torch.zeros(128, dtype=torch.bfloat16)),
    "fp16": replace(BASE, x=torch.zeros(128, dtype=torch.float16)),
    "bf16 out": replace(BASE, y=torch.zeros(128, dtype=torch.bfloat16)),
    "optional": replace(BASE, optional=MEMORY[256:384]),
    "optional int32": replace(BASE, optional=torch.zeros(128, dtype=torch.int32)),
    "optional int64": replace(BASE, optional=torch.zeros(128, dtype=torch.int64)),
    "optional + 4 bytes": replace(BASE, optional=MEMORY[257:385]),
    **{f"size {n}": replace(BASE, size=n) for n in INTS},
    **{f"stride {n}": replace(BASE, stride=n) for n in INTS},
    "size 1, stride 1": replace(BASE, size=1, stride=1),
    **{f"plain {n}": replace(BASE, plain=n) for n in (0, 1, 16, -1, 2**31 - 1, 2**31, -(2**31) - 1)},
    **{f"factor {x}": replace(BASE, factor=x) for x in (1.0, 0.0, float("inf"), float("nan"))},
    "factor int 1": replace(BASE, factor=1),
    "factor int 3": replace(BASE, factor=3),
    "block 64": replace(BASE, block=64),
    "word": replace(BASE, word="none"),
    "word, optional": replace(BASE, word="none", optional=MEMORY[256:384]),
    "num_warps 2": replace(BASE, num_warps=2),
    "num_stages 2": replace(BASE, options={"num_stages": 2}),
    "maxnreg 64": replace(BASE, options={"maxnreg": 64}),
    "programs 1": replace(BASE, programs=1),
    "programs 70,000": replace(BASE, programs=70_000),
}


@pytest.fixture(scope="module")
def recorder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorder]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        with stand_in(keep_launches=True) as recorder:
            yield recorder


def only(recorder: Recorder) -> Launch:
    assert recorder.launches is not None
    (launch,) = recorder.launches
    recorder.launches.clear()
    return launch


def by_triton(call: Call, recorder: Recorder) -> Launch:
    launch_kernels.every_argument[(call.programs,)](
        *call.arguments, num_warps=call.num_warps, enable_fp_fusion=True, **call.options
    )
    return only(recorder)


def by_launch(call: Call, recorder: Recorder) -> Launch:
    launch_module.launch(
        launch_kernels.every_argument, call.programs, *call.arguments, num_warps=call.num_warps, **call.options
    )
    return only(recorder)


def assert_same(actual: Launch, expected: Launch) -> None:
    for name in ("function", "grid", "types", "binary", "handle", "packed_metadata"):
        assert getattr(actual, name) == getattr(expected, name), name
    assert len(actual.arguments) == len(expected.arguments)
    for ours, theirs in zip(actual.arguments, expected.arguments, strict=True):
        assert ours is theirs or (type(ours) is type(theirs) and repr(ours) == repr(theirs))
    assert actual.hooks == (None, None) or actual.hooks == expected.hooks


@pytest.fixture
def own_launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that Triton's own path launches."""
    found: list[str] = []
    run = JITFunction.run

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        found.append(self.__name__)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(JITFunction, "run", counted)
    return found


@pytest.fixture(scope="module")
def expected(recorder: Recorder) -> dict[str, Launch]:
    return {name: by_triton(call, recorder) for name, call in VARIANTS.items()}


def test_variants_are_compiled_for_what_they_differ_in(expected: dict[str, Launch]) -> None:
    """Or the tests below could not see a wrong choice."""
    base = expected["base"].binary
    same = {"base", "pointer + 16 bytes", "programs 1", "programs 70,000"}
    same |= {"size 0", "size 16", "size 48", f"size {2**31 - 16}", "size -16"}  # multiples of 16, as the base's
    same |= {"stride 0", "stride 16", "stride 48", f"stride {2**31 - 16}", "stride -16"}
    same |= {name for name in expected if name.startswith("factor") and "int" not in name}
    same |= {f"plain {n}" for n in (0, 1, 16, -1, 2**31 - 1)}
    assert {name for name, launch in expected.items() if launch.binary == base} == same


def test_every_launch_is_that_of_triton(
    recorder: Recorder, expected: dict[str, Launch], own_launches: list[str]
) -> None:
    """In an order in which every variant follows others, twice; from the second time on without Triton's path."""
    names = list(VARIANTS)
    for name in names:
        assert_same(by_launch(VARIANTS[name], recorder), expected[name])
    own_launches.clear()
    for name in [*reversed(names), *names[::2], *names[1::2]]:
        assert_same(by_launch(VARIANTS[name], recorder), expected[name])
        assert_same(by_launch(BASE, recorder), expected["base"])
    assert bool(own_launches) != launch_module.DIRECT


def test_equal_numbers_of_other_types_are_other_arguments(recorder: Recorder, expected: dict[str, Launch]) -> None:
    """1, 1.0 and True are equal, and so would be keys that hold them."""
    for _ in range(2):
        for factor in (1, 1.0, True):
            call = replace(BASE, factor=factor)
            assert_same(by_launch(call, recorder), by_triton(call, recorder))


def test_triton_launches_where_hooks_are_set(
    recorder: Recorder, own_launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A profiler's hook is called by Triton's path alone."""
    by_launch(BASE, recorder)
    own_launches.clear()
    knobs.runtime.launch_enter_hook.add(lambda metadata: None)
    try:
        by_launch(BASE, recorder)
    finally:
        knobs.runtime.launch_enter_hook.calls.clear()
    assert own_launches == ["every_argument"]


def test_triton_launches_in_versions_that_were_not_tested(
    recorder: Recorder, own_launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch_module, "DIRECT", False)
    for _ in range(2):
        by_launch(BASE, recorder)
    assert own_launches == ["every_argument"] * 2
