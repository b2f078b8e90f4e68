"""What a loss refuses, and that the message names the argument, what came and what was expected."""

from typing import Any

import pytest
import torch

from asyncopd import Correction, Support, forward_kl, linear_forward_kl, linear_reverse_kl, reverse_kl

N, V, K, H = 3, 11, 4, 5
IDS = torch.arange(N * K).reshape(N, K) % V
LOGQ = torch.full((N, K), -2.0)
STUDENT = torch.full((N, K), -1.5)
SAMPLED_W = torch.full((N, K), 0.3)
HEAD_TAIL_W = torch.tensor([0.0, 0.0, 0.7, 0.9]).expand(N, K).contiguous()
TOP_K = Support(IDS, LOGQ, torch.zeros(N, K), "top_k")
SAMPLES = Support(IDS, LOGQ, SAMPLED_W, "samples")
HEAD_TAIL = Support(IDS, LOGQ, HEAD_TAIL_W, "head_tail")
TEACHER_SAMPLES = Support(IDS, LOGQ, SAMPLED_W, "teacher_samples")
UNTOLD_TOP_K, UNTOLD_SAMPLES, UNTOLD_HEAD_TAIL = (
    Support(IDS, LOGQ, w) for w in (torch.zeros(N, K), SAMPLED_W, HEAD_TAIL_W)
)
HIDDEN, WEIGHT = torch.zeros(N, H), torch.zeros(V, H)
CORRECTIONS = [
    Correction(),
    Correction(ratio_cap=2.0),
    Correction(clip_eps=0.2),
    Correction(m2_budget=0.04),
    Correction(advantage="behavior"),
    Correction(clip_eps=0.2, proximal_logprobs=STUDENT),
]


@pytest.fixture(autouse=True)
def reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASYNCOPD_BACKEND", "reference")


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
@pytest.mark.parametrize("sup", [SAMPLES, HEAD_TAIL, TEACHER_SAMPLES, UNTOLD_SAMPLES, UNTOLD_HEAD_TAIL])
def test_a_tail_on_a_sampled_support(sup: Support, tail: Any) -> None:
    for loss in (reverse_kl, forward_kl):
        with pytest.raises(ValueError, match=rf"tail: got '{tail}'.*sampled support.*expected 'drop'"):
            loss(STUDENT, sup, tail=tail)
    for linear in (linear_reverse_kl, linear_forward_kl):
        with pytest.raises(ValueError, match=r"tail"):
            linear(HIDDEN, WEIGHT, sup, tail=tail)


@pytest.mark.parametrize("draw", ["samples", "head_tail", "teacher_samples"])
def test_a_tail_on_a_support_that_says_it_was_sampled(draw: Any) -> None:
    # Whatever its weights look like.
    sup = Support(IDS, LOGQ, torch.zeros(N, K), draw)
    for loss in (reverse_kl, forward_kl):
        with pytest.raises(ValueError, match=rf"tail: got 'bucket' with a sampled support \({draw}\)"):
            loss(STUDENT, sup, tail="bucket")


@pytest.mark.parametrize("correction", CORRECTIONS, ids=lambda c: str(c)[:60])
@pytest.mark.parametrize("sup", [TOP_K, HEAD_TAIL, TEACHER_SAMPLES, UNTOLD_TOP_K, UNTOLD_HEAD_TAIL])
def test_a_correction_where_mu_is_not_in_the_weights(sup: Support, correction: Correction) -> None:
    with pytest.raises(ValueError, match=r"correction: needs the behaviour policy, which only M-sample supports"):
        reverse_kl(STUDENT, sup, correction=correction)
    if correction.proximal_logprobs is None:
        with pytest.raises(ValueError, match=r"correction"):
            linear_reverse_kl(HIDDEN, WEIGHT, sup, correction=correction)


def test_a_masked_row_does_not_hide_a_support_without_mu() -> None:
    mask = torch.tensor([True, False, True])
    with pytest.raises(ValueError, match=r"correction: needs the behaviour policy"):
        reverse_kl(STUDENT, UNTOLD_HEAD_TAIL, mask=mask, correction=Correction(clip_eps=0.2))


@pytest.mark.parametrize("correction", CORRECTIONS, ids=lambda c: str(c)[:60])
def test_corrections_of_m_samples_are_taken(correction: Correction) -> None:
    for sup in (SAMPLES, UNTOLD_SAMPLES):
        assert reverse_kl(STUDENT, sup, correction=correction).isfinite()


def test_a_certain_sample_is_not_mistaken_for_a_top_k_when_told() -> None:
    # log w = 0 is a draw of probability 1 / M too; "samples" says so.
    sup = Support(IDS, LOGQ, torch.zeros(N, K), "samples")
    assert reverse_kl(STUDENT, sup, correction=Correction(clip_eps=0.2)).isfinite()


def test_masked_rows_and_pads_are_not_held_against_a_support() -> None:
    weights = SAMPLED_W.clone()
    weights[1] = 0.0
    mask = torch.tensor([True, False, True])
    sup = Support(IDS, LOGQ, weights)
    assert reverse_kl(STUDENT, sup, mask=mask, correction=Correction(clip_eps=0.2)).isfinite()
    weights = torch.zeros(N, K)
    weights[1] = 0.7
    assert forward_kl(STUDENT, Support(IDS, LOGQ, weights), mask=mask, tail="bucket").isfinite()
    padded = IDS.clone()
    padded[:, 2] = -1
    sup = Support(padded, LOGQ, torch.zeros(N, K).masked_fill(padded < 0, -torch.inf))
    assert reverse_kl(STUDENT, sup, tail="renormalize").isfinite()


def test_leave_one_out_of_a_top_k() -> None:
    with pytest.raises(ValueError, match=r"baseline: got 'loo' with a top-k support, expected independent samples"):
        reverse_kl(STUDENT, TOP_K, baseline="loo")
    with pytest.raises(ValueError, match=r"baseline"):
        linear_reverse_kl(HIDDEN, WEIGHT, TOP_K, baseline="loo")


REFUSED: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    (reverse_kl, {"tail": "bucket", "baseline": "mean"}, ValueError, "baseline"),
    (reverse_kl, {"tail": "renormalize", "normalize": "sampled"}, ValueError, "normalize"),
    (reverse_kl, {"tail": "bucket", "correction": Correction(clip_eps=0.2)}, ValueError, "correction"),
    (reverse_kl, {"normalize": "sample"}, ValueError, "normalize"),
    (reverse_kl, {"baseline": "average"}, ValueError, "baseline"),
    (reverse_kl, {"tail": "keep"}, ValueError, "tail"),
    (reverse_kl, {"reduction": "batchmean"}, ValueError, "reduction"),
    (reverse_kl, {"correction": 0.2}, TypeError, "correction"),
    (reverse_kl, {"support": (IDS, LOGQ, SAMPLED_W)}, TypeError, "support"),
    (reverse_kl, {"student_logprobs": STUDENT[:, :2]}, ValueError, "student_logprobs"),
    (reverse_kl, {"student_logprobs": STUDENT[0]}, ValueError, "student_logprobs"),
    (reverse_kl, {"student_logprobs": IDS}, TypeError, "student_logprobs"),
    (reverse_kl, {"student_logprobs": STUDENT.to("meta")}, ValueError, "student_logprobs"),
    (reverse_kl, {"mask": torch.ones(N, 1)}, ValueError, "mask"),
    (reverse_kl, {"mask": torch.ones(N + 1)}, ValueError, "mask"),
    (reverse_kl, {"mask": torch.ones(N, device="meta")}, ValueError, "mask"),
    (reverse_kl, {"mask": [True] * N}, TypeError, "mask"),
    (reverse_kl, {"num_items_in_batch": 0}, ValueError, "num_items_in_batch"),
    (reverse_kl, {"num_items_in_batch": -3.0}, ValueError, "num_items_in_batch"),
    (reverse_kl, {"num_items_in_batch": torch.ones(2)}, ValueError, "num_items_in_batch"),
    (reverse_kl, {"num_items_in_batch": 4, "reduction": "none"}, ValueError, "num_items_in_batch"),
    (
        reverse_kl,
        {"support": SAMPLES, "correction": Correction(clip_eps=0.2, proximal_logprobs=STUDENT[:, :1])},
        ValueError,
        "correction.proximal_logprobs",
    ),
    (
        reverse_kl,
        {"support": SAMPLES, "correction": Correction(clip_eps=0.2, proximal_logprobs=STUDENT.to("meta"))},
        ValueError,
        "correction.proximal_logprobs",
    ),
    (forward_kl, {"tail": "keep"}, ValueError, "tail"),
    (forward_kl, {"reduction": "batchmean"}, ValueError, "reduction"),
    (forward_kl, {"mask": torch.ones(N + 1)}, ValueError, "mask"),
    (forward_kl, {"student_logprobs": STUDENT[:, :2]}, ValueError, "student_logprobs"),
    (forward_kl, {"support": None}, TypeError, "support"),
    *(
        (loss, wrong, error, name)
        for loss in (linear_reverse_kl, linear_forward_kl)
        for wrong, error, name in (
            ({"hidden": HIDDEN[:2]}, ValueError, "ids"),
            ({"hidden": HIDDEN[None]}, ValueError, "hidden"),
            ({"hidden": HIDDEN.double()}, TypeError, "lm_head_weight"),
            ({"lm_head_weight": WEIGHT[:, :2]}, ValueError, "lm_head_weight"),
            ({"lm_head_weight": WEIGHT.to("meta")}, ValueError, "lm_head_weight"),
            ({"lm_head_weight": WEIGHT[:7]}, ValueError, "ids"),
            ({"bias": torch.zeros(V - 1)}, ValueError, "bias"),
            ({"mask": torch.ones(N + 1)}, ValueError, "mask"),
            ({"temperature": 0.0}, ValueError, "temperature"),
            ({"softcap": -1.0}, ValueError, "softcap"),
            ({"support": SAMPLED_W}, TypeError, "support"),
            ({"reduction": "batchmean"}, ValueError, "reduction"),
            ({"tail": "keep"}, ValueError, "tail"),
        )
    ),
    (linear_reverse_kl, {"baseline": "average"}, ValueError, "baseline"),
    (linear_reverse_kl, {"normalize": "none"}, ValueError, "normalize"),
    (linear_reverse_kl, {"correction": "clip"}, TypeError, "correction"),
]


def case_id(value: object) -> str:
    return "-".join(value) if isinstance(value, dict) else getattr(value, "__name__", str(value))


@pytest.mark.parametrize(("loss", "wrong", "error", "name"), REFUSED, ids=case_id)
def test_refused_by_name(loss: Any, wrong: dict[str, Any], error: type[Exception], name: str) -> None:
    linear = {"hidden": HIDDEN, "lm_head_weight": WEIGHT, "support": TOP_K}
    gathered = {"student_logprobs": STUDENT, "support": TOP_K}
    arguments = linear if loss in (linear_reverse_kl, linear_forward_kl) else gathered
    with pytest.raises(error, match=name) as caught:
        loss(**{**arguments, **wrong})
    assert "expected" in str(caught.value) or name == "correction"


@pytest.mark.parametrize(
    ("options", "error", "name"),
    [
        ({"ratio_cap": 0.0}, ValueError, "ratio_cap"),
        ({"ratio_cap": float("inf")}, ValueError, "ratio_cap"),
        ({"clip_eps": -0.2}, ValueError, "clip_eps"),
        ({"clip_eps": "0.2"}, TypeError, "clip_eps"),
        ({"m2_budget": 0.0}, ValueError, "m2_budget"),
        ({"clip_eps": 0.2, "ratio_cap": 2.0}, ValueError, "clip_eps"),
        ({"clip_eps": 0.2, "m2_budget": 0.04}, ValueError, "m2_budget"),
        ({"proximal_logprobs": STUDENT}, ValueError, "proximal_logprobs"),
        ({"clip_eps": 0.2, "proximal_logprobs": STUDENT, "proximal_cap": 0.0}, ValueError, "proximal_cap"),
        ({"clip_eps": 0.2, "proximal_logprobs": STUDENT, "proximal_cap": None}, TypeError, "proximal_cap"),
        ({"advantage": "old"}, ValueError, "advantage"),
    ],
    ids=case_id,
)
def test_corrections_that_make_no_sense(options: dict[str, Any], error: type[Exception], name: str) -> None:
    with pytest.raises(error, match=name):
        Correction(**options)


@pytest.mark.parametrize(
    ("wrong", "error", "name"),
    [
        ({"ids": IDS.float()}, TypeError, "ids"),
        ({"ids": IDS.tolist()}, TypeError, "ids"),
        ({"ids": IDS[0]}, ValueError, "ids"),
        ({"teacher_logprobs": LOGQ[:, :2]}, ValueError, "teacher_logprobs"),
        ({"teacher_logprobs": IDS}, TypeError, "teacher_logprobs"),
        ({"log_weights": SAMPLED_W[:2]}, ValueError, "log_weights"),
        ({"log_weights": SAMPLED_W.to("meta")}, ValueError, "log_weights"),
        ({"log_weights": None}, TypeError, "log_weights"),
        ({"draw": "topk"}, ValueError, "draw"),
    ],
    ids=case_id,
)
def test_supports_that_are_none(wrong: dict[str, Any], error: type[Exception], name: str) -> None:
    with pytest.raises(error, match=rf"Support\.{name}"):
        Support(**{"ids": IDS, "teacher_logprobs": LOGQ, "log_weights": SAMPLED_W, **wrong})
