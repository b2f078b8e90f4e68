"""What is compiled ahead of time of the [N, K] loss: the usual losses, each option at least once."""

from typing import Any

from asyncopd.backends.loss_spec import LossSpec
from asyncopd.kernels.compile_case import CompileCase
from asyncopd.kernels.kl import MAX_IDS, TOTAL_BLOCK, _kl_kernel, _total_kernel, block_of, warps_of
from asyncopd.kernels.kl_metrics import COARSE

_NUMBERS = ("inverse", "log_cap", "log_proximal_cap", "log_low", "log_high")
# Neither specialised on nor read in vectors.
_ALONE = ("threshold", "denominator", "num_rows")


def _compile_case(
    name: str, k: int, max_registers: int, *, dtype: str = "fp32", metrics: bool = False, seeks: bool = False,
    proximal: bool = False, total: bool = False, **options: Any
) -> CompileCase:  # fmt: skip
    spec = LossSpec(needs_policy=True, **options)
    block_rows, width = block_of(k)
    budget = spec.m2_budget is not None and not seeks
    absent = {
        **({} if proximal else {"proximal": None}),
        **({} if budget else {"threshold": None}),
        **({} if total else {"denominator": None}),
        **({} if metrics else dict.fromkeys(("sums", "bins", "histogram"))),
    }
    constexprs: dict[str, Any] = {
        **absent,
        **({"num_ids": 1} if k == 1 else {}),  # of which Triton makes a constant
        "ROWS": block_rows,
        "WIDTH": width,
        "DIVERGENCE": spec.divergence,
        "NORMALIZE": spec.normalize,
        "TAIL": spec.tail,
        "BASELINE": spec.baseline,
        "HEAD_IS_CERTAIN": spec.head_is_certain,
        "BEHAVIOUR": spec.advantage == "behavior",
        "HAS_CAP": spec.ratio_cap is not None,
        "CLIPS": spec.clip_eps is not None or budget,
        "TOTAL": total,
        "SEEKS": seeks,
        "COARSE": COARSE,
    }
    types = {
        **dict.fromkeys(("student", "teacher", "log_weights"), "*fp32"),
        "student": f"*{dtype}",
        "ids": "*i64",
        "mask": "*u8",
        **dict.fromkeys(("proximal", "threshold", "losses", "coef", "sums"), "*fp32"),
        "bins": "*i16",
        "histogram": "*i64",
        "denominator": "*i64",
        **dict.fromkeys(("num_rows", "num_ids"), "i32"),
        **dict.fromkeys(_NUMBERS, "fp32"),
    }
    signature = {name: "constexpr" if name in constexprs else types[name] for name in _kl_kernel.arg_names}
    divisible = [n for n in signature if signature[n] != "constexpr" and types[n] != "fp32" and n not in _ALONE]
    return CompileCase(
        name=f"kl-{name}-k{k}-{dtype}",
        kernel=_kl_kernel,
        signature=signature,
        constexprs=constexprs,
        num_warps=warps_of(k),
        max_registers=max_registers,
        divisible=tuple(divisible),
    )


def compile_cases() -> list[CompileCase]:
    """The usual losses, each option at least once, and everything at once at both ends of K."""
    samples: dict[str, Any] = {"head_is_certain": False}
    everything: dict[str, Any] = {
        "normalize": "sampled",
        "baseline": "loo",
        "advantage": "behavior",
        "ratio_cap": 2.0,
        "clip_eps": 0.2,
        "proximal": True,
        "metrics": True,
    }
    return [
        _compile_case("reverse", 64, 40),
        _compile_case("reverse", 64, 40, dtype="bf16"),
        _compile_case("reverse-metrics", 64, 64, metrics=True),
        _compile_case("reverse-sampled-mean", 64, 40, normalize="sampled", baseline="mean"),
        _compile_case("reverse-seek", 64, 40, seeks=True, m2_budget=0.04, **samples),
        _compile_case("reverse-budget", 64, 64, m2_budget=0.04, **samples),
        _compile_case("reverse-bucket", 64, 40, tail="bucket"),
        _compile_case("reverse-renormalize-metrics", 64, 64, tail="renormalize", metrics=True),
        _compile_case("forward", 64, 40, divergence="forward"),
        _compile_case("forward-bucket", 64, 40, divergence="forward", tail="bucket"),
        _compile_case("forward-renormalize-metrics", 64, 64, divergence="forward", tail="renormalize", metrics=True),
        _compile_case("reverse-total", 64, 40, total=True),
        *(_compile_case("everything", k, 128, **everything) for k in (1, 64, 1024, MAX_IDS)),
        _total_case(),
    ]


def _total_case() -> CompileCase:
    return CompileCase(
        name="kl-total",
        kernel=_total_kernel,
        signature={"losses": "*fp32", "total": "*fp32", "programs": "i32", "BLOCK": "constexpr"},
        constexprs={"BLOCK": TOTAL_BLOCK},
        num_warps=4,
        max_registers=40,
        divisible=("losses", "total"),
    )
