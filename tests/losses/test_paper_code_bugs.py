"""Faults observed in the paper's reference code, one test each: those of the numerical core."""

import math

import pytest
import torch

from asyncopd import Support, align_rows, linear_reverse_kl, sample_support, topk_logprobs

LINEAR = ("linear_gather_logprobs", "linear_gather_logprobs_backward")


@pytest.mark.ops("kl_rows", "topk_logprobs", *LINEAR)
def test_top_k_support_off_by_one_token(engine: str, rng: torch.Generator) -> None:
    states, weight = torch.randn(2, 8, 5, generator=rng), 2 * torch.randn(50, 5, generator=rng)
    aligned = align_rows(states, torch.ones(2, 8, dtype=torch.int64))
    sup = Support.from_topk(topk_logprobs(aligned.rows @ weight.t(), 8))
    assert linear_reverse_kl(aligned.rows, weight, sup, mask=aligned.mask).abs() < 1e-5
    assert linear_reverse_kl(aligned.rows.roll(1, 0), weight, sup, mask=aligned.mask).abs() > 0.1


def test_first_response_token_skipped() -> None:
    labels = torch.tensor([[-100, -100, 11, 12, 13]])
    aligned = align_rows(torch.arange(5.0)[None, :, None], labels)
    assert aligned.targets[aligned.mask].tolist() == [11, 12, 13]
    assert aligned.rows[aligned.mask, 0].tolist() == [1, 2, 3]  # the last prompt position predicts the first token


@pytest.mark.ops("sample_support")
def test_sampling_ignores_temperature(engine: str) -> None:
    logits = torch.tensor([2.0, 0.0]).expand(4000, 2)
    for temperature in (0.5, 1.0, 4.0):
        ids = sample_support(logits, num_samples=1, seed=2, temperature=temperature).ids
        p = 1 / (1 + math.exp(-2 / temperature))
        assert abs(float((ids == 0).float().mean()) - p) < 4 * math.sqrt(p * (1 - p) / 4000)
