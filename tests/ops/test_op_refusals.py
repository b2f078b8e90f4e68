"""Wrong arguments raise TypeError or ValueError that name the argument, before anything is computed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import asyncopd

Z, H, W = torch.zeros(3, 5), torch.zeros(3, 4), torch.zeros(5, 4)
IDS = torch.zeros(3, 2, dtype=torch.int64)


def topk(logits: Any = Z, k: Any = 2, **options: Any) -> Any:
    return asyncopd.topk_logprobs(logits, k, **options)


def linear_topk(hidden: Any = H, weight: Any = W, k: Any = 2, **options: Any) -> Any:
    return asyncopd.linear_topk_logprobs(hidden, weight, k, **options)


def gather(logits: Any = Z, ids: Any = IDS, **options: Any) -> Any:
    return asyncopd.gather_logprobs(logits, ids, **options)


def linear_gather(hidden: Any = H, weight: Any = W, ids: Any = IDS, **options: Any) -> Any:
    return asyncopd.linear_gather_logprobs(hidden, weight, ids, **options)


def sample(logits: Any = Z, num_samples: Any = 2, seed: Any = 0, **options: Any) -> Any:
    return asyncopd.sample_support(logits, num_samples=num_samples, seed=seed, **options)


REFUSED = [
    (topk, {"logits": Z[0]}, ValueError, "logits"),
    (topk, {"logits": Z[None]}, ValueError, "logits"),
    (topk, {"logits": Z.long()}, TypeError, "logits"),
    (topk, {"logits": [[1.0]]}, TypeError, "logits"),
    (topk, {"k": 6}, ValueError, "k"),
    (topk, {"k": 0}, ValueError, "k"),
    (topk, {"k": -1}, ValueError, "k"),
    (topk, {"k": 2.0}, TypeError, "k"),
    (topk, {"k": True}, TypeError, "k"),
    (linear_topk, {"k": 6}, ValueError, "k"),
    (linear_topk, {"weight": W[:, :3]}, ValueError, "lm_head_weight"),
    (linear_topk, {"weight": W.double()}, TypeError, "lm_head_weight"),
    (linear_topk, {"hidden": H[0]}, ValueError, "hidden"),
    (linear_topk, {"bias": torch.zeros(4)}, ValueError, "bias"),
    (linear_topk, {"bias": torch.zeros(5, 1)}, ValueError, "bias"),
    (gather, {"ids": IDS[:2]}, ValueError, "ids"),
    (gather, {"ids": IDS[:, 0]}, ValueError, "ids"),
    (gather, {"ids": IDS.float()}, TypeError, "ids"),
    (gather, {"ids": IDS.to(torch.int16)}, TypeError, "ids"),
    (gather, {"ids": [[0], [1], [2]]}, TypeError, "ids"),
    (gather, {"ids": IDS.to("meta")}, ValueError, "ids"),
    (gather, {"logits": Z.to(torch.int32)}, TypeError, "logits"),
    (linear_gather, {"ids": IDS.to("meta")}, ValueError, "ids"),
    (linear_gather, {"weight": W.to("meta")}, ValueError, "lm_head_weight"),
    (linear_gather, {"weight": W.bfloat16()}, TypeError, "lm_head_weight"),
    (linear_gather, {"weight": None}, TypeError, "lm_head_weight"),
    (linear_gather, {"hidden": None}, TypeError, "hidden"),
    (linear_gather, {"bias": torch.zeros(5, device="meta")}, ValueError, "bias"),
    (linear_gather, {"bias": torch.zeros(5, dtype=torch.int64)}, TypeError, "bias"),
    (sample, {"num_samples": -1}, ValueError, "num_samples"),
    (sample, {"num_samples": 1.5}, TypeError, "num_samples"),
    (sample, {"num_samples": 0}, ValueError, "num_samples"),
    (sample, {"head": 6}, ValueError, "head"),
    (sample, {"head": -1}, ValueError, "head"),
    (sample, {"seed": 0.5}, TypeError, "seed"),
    (sample, {"seed": 2**63}, ValueError, "seed"),
    (sample, {"seed": torch.zeros(2, dtype=torch.int64)}, ValueError, "seed"),
    (sample, {"seed": torch.zeros(3, dtype=torch.int32)}, TypeError, "seed"),
    (sample, {"seed": torch.zeros(3, dtype=torch.int64, device="meta")}, ValueError, "seed"),
    (sample, {"sampled_ids": torch.zeros(3, 1, dtype=torch.int64)}, ValueError, "sampled_ids"),
    (sample, {"sampled_ids": torch.zeros(3)}, TypeError, "sampled_ids"),
    (sample, {"sampled_ids": IDS[:, 0], "num_samples": 0, "head": 2}, ValueError, "sampled_ids"),
    *(
        (call, {name: bad}, error, name)
        for call, names in (
            (topk, ["temperature"]),
            (gather, ["temperature"]),
            (sample, ["temperature"]),
            (linear_topk, ["temperature", "softcap"]),
            (linear_gather, ["temperature", "softcap"]),
        )
        for name in names
        for bad, error in ((0.0, ValueError), (-1.0, ValueError), (float("nan"), ValueError), ("1", TypeError))
    ),
    *(
        (call, {"temperature": bad}, ValueError, "temperature")
        for call in (topk, gather, sample, linear_topk, linear_gather)
        for bad in (1e-31, 1e31)
    ),
    (linear_gather, {"logit_scale": 0.0}, ValueError, "logit_scale"),
    (linear_gather, {"logit_scale": float("inf")}, ValueError, "logit_scale"),
]


def case_id(value: object) -> str:
    if callable(value) and not isinstance(value, type):
        return getattr(value, "__name__", "call")
    if isinstance(value, dict):
        return "-".join(value)
    return getattr(value, "__name__", str(value))


@pytest.mark.parametrize(("call", "wrong", "error", "name"), REFUSED, ids=case_id)
def test_refused_by_name(call: Callable[..., Any], wrong: dict[str, Any], error: type[Exception], name: str) -> None:
    with pytest.raises(error, match=name) as caught:
        call(**wrong)
    # What came and what was expected are said too.
    assert "expected" in str(caught.value)


def test_the_message_says_what_came() -> None:
    with pytest.raises(ValueError, match=r"k: got 6, expected 1\.\.5"):
        topk(k=6)
    with pytest.raises(ValueError, match=r"logits: got shape \[5\]"):
        topk(logits=Z[0])
