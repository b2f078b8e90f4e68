"""Every op once on every backend, beside the reference: python -m bench.smoke --device cuda --backends triton,cuda

Forward and backward in bf16 and fp32, 64 rows, a vocabulary of 1,000 and one of 50,257. It checks that what will be
measured runs and is right to a few digits; the tests are the ones that look at every digit.

Exit status: 0 all is right; 1 some values are wrong; 3 an op broke, which ends the process with the op's name: after a
fault on a device nothing that it returns can be believed. With a cold cache of Triton's nearly all of the time is that
of its compiler (about 160 kernels), so --jobs shares the calls out to processes.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Annotated, NoReturn

import torch
import typer
from torch import Tensor

import asyncopd
from asyncopd import backends
from asyncopd.ops import linear_gather_logits_into

ROWS, WIDTH, K = 64, 64, 16
VOCABULARIES = (1_000, 50_257)
DTYPES = (torch.bfloat16, torch.float32)
BROKE = 3

# Largest difference over the largest value. Both backends sum in fp32; gradients of 16-bit tensors are rounded to 16
# bits, and on a device so is the dz that is multiplied with the head (2^-8 each).
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
RATIO_P99 = 1e-2  # a histogram finds it to 1 %: see LossMetrics
SAME_IDS = 0.99  # of draws: where a draw's number falls on the boundary between two ids, rounding decides

Outputs = Mapping[str, Tensor | None]


@dataclass(frozen=True)
class Inputs:
    """Seeded, and the same whichever backend is asked."""

    logits: Tensor
    hidden: Tensor
    weight: Tensor
    support: asyncopd.Support
    mask: Tensor
    grad: Tensor  # fp32 [N, K]

    @classmethod
    def of(cls, vocab: int, dtype: torch.dtype, device: torch.device) -> "Inputs":
        rng = torch.Generator().manual_seed(0)
        weight = torch.randn(vocab, WIDTH, generator=rng) * 2.5 / WIDTH**0.5
        hidden = torch.randn(ROWS, WIDTH, generator=rng)
        logits = (hidden @ weight.t()).to(dtype)
        draw = asyncopd.sample_support(logits, num_samples=K - 4, head=4, seed=0)
        teacher = draw.logprobs + 0.3 * torch.randn(ROWS, K, generator=rng)
        mask = torch.rand(ROWS, generator=rng) > 0.25
        grad = torch.randn(ROWS, K, generator=rng)
        support = asyncopd.Support(
            draw.ids.to(device), teacher.to(device), draw.log_weights.to(device), draw="head_tail"
        )
        return cls(
            logits.to(device),
            hidden.to(device, dtype),
            weight.to(device, dtype),
            support,
            mask.to(device),
            grad.to(device),
        )


def _gradients(value: Tensor, *leaves: Tensor, grad: Tensor | None = None) -> list[Tensor]:
    return list(torch.autograd.grad(value, leaves, grad))


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


# -------------------------------------------------------------------------------------------------------- the ops


def topk(i: Inputs) -> Outputs:
    return asyncopd.topk_logprobs(i.logits, K)._asdict()


def sample(i: Inputs) -> Outputs:
    """Ids by themselves, since one draw may differ; scores at ids that are given are the other ops' business."""
    draw = asyncopd.sample_support(i.logits, num_samples=K - 4, head=4, seed=1)
    return {"drawn ids": draw.ids, "logsumexp": draw.logsumexp}


def gather(i: Inputs) -> Outputs:
    logits = _leaf(i.logits)
    scores = asyncopd.gather_logprobs(logits, i.support.ids)
    (dlogits,) = _gradients(scores, logits, grad=i.grad)
    return {"logprobs": scores, "dlogits": dlogits}


def linear_topk(i: Inputs) -> Outputs:
    """Ids are left out: rounding of the product may swap neighbours."""
    top = asyncopd.linear_topk_logprobs(i.hidden, i.weight, K)
    return {"logprobs": top.logprobs, "logsumexp": top.logsumexp}


def linear_gather(i: Inputs) -> Outputs:
    hidden, weight = _leaf(i.hidden), _leaf(i.weight)
    scores = asyncopd.linear_gather_logprobs(hidden, weight, i.support.ids)
    dhidden, dweight = _gradients(scores, hidden, weight, grad=i.grad)
    return {"logprobs": scores, "dhidden": dhidden, "dweight": dweight}


def scores_loss(function: Callable[..., Tensor], **options: object) -> Callable[[Inputs], Outputs]:
    """A loss on log-probabilities [N, K], with its metrics."""

    def run(i: Inputs) -> Outputs:
        logprobs = _leaf(i.support.teacher_logprobs - 0.1 * i.grad.tanh())
        loss, metrics = function(logprobs, i.support, mask=i.mask, return_metrics=True, **options)
        (grad,) = _gradients(loss, logprobs)
        return {"loss": loss, "gradient": grad, **metrics._asdict()}

    return run


def row_losses(i: Inputs) -> Outputs:
    logprobs = _leaf(i.support.teacher_logprobs - 0.1 * i.grad.tanh())
    rows = asyncopd.reverse_kl(logprobs, i.support, mask=i.mask, reduction="none")
    (grad,) = _gradients(rows, logprobs, grad=i.grad[:, 0].contiguous())
    return {"losses": rows, "gradient": grad}


def head_loss(function: Callable[..., Tensor], **options: object) -> Callable[[Inputs], Outputs]:
    """A loss straight from hidden states."""

    def run(i: Inputs) -> Outputs:
        hidden, weight = _leaf(i.hidden), _leaf(i.weight)
        loss = function(hidden, weight, i.support, mask=i.mask, **options)
        dhidden, dweight = _gradients(loss, hidden, weight)
        return {"loss": loss, "dhidden": dhidden, "dweight": dweight}

    return run


def frozen_head(i: Inputs) -> Outputs:
    hidden = _leaf(i.hidden)
    loss = asyncopd.linear_reverse_kl(hidden, i.weight, i.support)
    (dhidden,) = _gradients(loss, hidden)
    return {"loss": loss, "dhidden": dhidden}


def accumulated(i: Inputs) -> Outputs:
    """The sampled loss whose dW is added to a buffer."""
    hidden, dweight = _leaf(i.hidden), torch.ones_like(i.weight, dtype=torch.float32)
    logits = linear_gather_logits_into(hidden, i.weight, i.support.ids, dweight)
    (dhidden,) = _gradients(logits, hidden, grad=i.grad)
    return {"logits": logits, "dhidden": dhidden, "dweight": dweight}


OPS: dict[str, Callable[[Inputs], Outputs]] = {
    "topk_logprobs": topk,
    "sample_support": sample,
    "gather_logprobs": gather,
    "linear_topk_logprobs": linear_topk,
    "linear_gather_logprobs": linear_gather,
    "reverse_kl": scores_loss(asyncopd.reverse_kl),
    "reverse_kl, row losses": row_losses,
    "reverse_kl, sampled": scores_loss(asyncopd.reverse_kl, normalize="sampled", baseline="mean"),
    "forward_kl": scores_loss(asyncopd.forward_kl),
    "linear_reverse_kl": head_loss(asyncopd.linear_reverse_kl),
    "linear_reverse_kl, zero-sum": head_loss(asyncopd.linear_reverse_kl, baseline="mean"),
    "linear_reverse_kl, sampled": head_loss(asyncopd.linear_reverse_kl, normalize="sampled"),
    "linear_reverse_kl, frozen head": frozen_head,
    "linear_forward_kl": head_loss(asyncopd.linear_forward_kl),
    "linear_gather_logits_into": accumulated,
}


# ----------------------------------------------------------------------------------------------------- comparison


def on(backend: str, op: Callable[[Inputs], Outputs], inputs: Inputs) -> dict[str, Tensor]:
    before = os.environ.get("ASYNCOPD_BACKEND")
    os.environ["ASYNCOPD_BACKEND"] = backend
    try:
        outputs = {name: value.detach() for name, value in op(inputs).items() if value is not None}
        if inputs.logits.device.type == "cuda":
            torch.cuda.synchronize()
        return outputs
    finally:
        del os.environ["ASYNCOPD_BACKEND"]
        if before is not None:
            os.environ["ASYNCOPD_BACKEND"] = before


def difference(name: str, actual: Tensor, expected: Tensor, dtype: torch.dtype) -> str | None:
    """What is wrong with an output, or None."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return f"{name}: {actual.dtype} {list(actual.shape)}, the reference {expected.dtype} {list(expected.shape)}"
    if not actual.is_floating_point():
        same = float((actual == expected).double().mean())
        least = SAME_IDS if name.startswith("drawn") else 1.0
        return None if same >= least else f"{name}: {100 * same:.1f} % the same, expected {100 * least:.0f} %"
    # Scores of given logits are fp32 whatever the logits are, and nothing rounds them to 16 bits.
    exact = name in ("logprobs", "logsumexp") or (actual.dtype == torch.float32 and not name.startswith("d"))
    bound = RATIO_P99 if name == "ratio_p99" else TOLERANCE[torch.float32 if exact else dtype]
    finite = expected.isfinite()
    if not torch.equal(finite, actual.isfinite()):
        return f"{name}: not finite where the reference is, or the other way round"
    if not finite.any():
        return None
    # A scalar may be 0 but for rounding (the sum of zero-sum coefficients); what it sums is about 1.
    largest = expected[finite].double().abs().amax().clamp(min=1.0 if expected.dim() == 0 else 1e-30)
    error = float((actual - expected).double().abs()[finite].amax() / largest)
    if not error <= bound:
        return f"{name}: off by {error:.1e} of the largest value, expected at most {bound:.0e}"
    return None


@dataclass(frozen=True, slots=True)
class Share:
    """Every `of`-th of all calls, from `number` on: kernels are compiled when they are first called, by one process."""

    number: int = 0
    of: int = 1


def check(backend: str, device: torch.device, share: Share) -> tuple[int, list[str]]:
    """How many calls were made, and what is wrong, a line each; an op that the backend has not is left out."""
    calls, wrong = 0, []
    cases = [(op, vocab, dtype) for op in OPS for vocab in VOCABULARIES for dtype in DTYPES]
    inputs = cache(Inputs.of)
    for op, vocab, dtype in cases[share.number :: share.of]:
        where = f"{op} on {backend}, V={vocab}, {str(dtype).removeprefix('torch.')}"
        arguments = inputs(vocab, dtype, device)
        try:
            actual = on(backend, OPS[op], arguments)
        except backends.BackendUnavailable as reason:
            print(f"{where}: left out: {reason}", flush=True)
            continue
        except Exception as failure:
            _broke(where, failure)
        calls += 1
        expected = on("reference", OPS[op], arguments)
        for part, value in actual.items():
            if fault := difference(part, value, expected[part], dtype):
                wrong.append(f"{where}: {fault}")
                print(wrong[-1], flush=True)
    return calls, wrong


def _broke(where: str, failure: Exception) -> NoReturn:
    print(f"{where}: BROKE: {type(failure).__name__}: {failure}", flush=True)
    sys.stdout.flush()
    # What a failed device has left in the interpreter may not even be freed.
    os._exit(BROKE)


def shared_out(arguments: list[str], jobs: int) -> int:
    """The same by as many processes, each with its share; the worst of their statuses."""
    command = [sys.executable, "-m", "bench.smoke", *arguments, "--share"]
    with ThreadPoolExecutor(jobs) as pool:
        done = list(pool.map(lambda i: subprocess.run([*command, f"{i}/{jobs}"]).returncode, range(jobs)))
    # A process that a signal ended, in the midst of a call, has not said which.
    return max(BROKE if status < 0 else status for status in done)


def main(
    device: Annotated[str, typer.Option(help="cuda or cpu")] = "cuda",
    names: Annotated[str, typer.Option("--backends", help="of asyncopd, separated by commas")] = "triton",
    jobs: Annotated[int, typer.Option(help="processes that share the calls out, and with them the compiling")] = 1,
    share: Annotated[str, typer.Option(help="NUMBER/OF: this share of the calls alone")] = "0/1",
) -> None:
    """Every op once on every backend, beside the reference."""
    if jobs > 1:
        raise typer.Exit(shared_out(["--device", device, "--backends", names], jobs))
    number, of = map(int, share.split("/"))
    status = 0
    for backend in names.split(","):
        if reason := backends.unavailable_reason(backend):
            print(f"{backend}: cannot run here: {reason}")
            raise typer.Exit(1)
        begin = time.perf_counter()
        calls, wrong = check(backend, torch.device(device), Share(number, of))
        what = f"{len(wrong)} wrong values" if wrong else "right"
        print(f"{backend}: {calls} calls, {what}, {time.perf_counter() - begin:.1f} s", flush=True)
        status = max(status, int(bool(wrong)))
    raise typer.Exit(status)


if __name__ == "__main__":
    typer.run(main)
