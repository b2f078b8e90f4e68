"""Support and align_rows: what is cached, how it is copied, and the one place where positions shift."""

import copy
import pickle

import pytest
import torch
from scenes import scene, support

from asyncopd import Support, TopK, align_rows, topk_logprobs


def equal(a: Support, b: Support) -> bool:
    names = ("ids", "teacher_logprobs", "log_weights")
    return a.draw == b.draw and all(torch.equal(getattr(a, name), getattr(b, name)) for name in names)


def test_deepcopy_and_pickle(rng: torch.Generator) -> None:
    sup = support(scene(rng), "head_tail", rng)
    assert equal(copy.deepcopy(sup), sup)
    assert copy.deepcopy(sup).ids is not sup.ids
    assert equal(pickle.loads(pickle.dumps(sup)), sup)


def test_rows_of_a_support(rng: torch.Generator) -> None:
    sup = support(scene(rng), "samples", rng)
    some = sup[1:3]
    assert torch.equal(some.ids, sup.ids[1:3])
    assert torch.equal(some.teacher_logprobs, sup.teacher_logprobs[1:3])
    assert torch.equal(some.log_weights, sup.log_weights[1:3])
    assert some.draw == "samples"
    assert torch.equal(sup[torch.tensor([4, 0])].ids, sup.ids[[4, 0]])


def test_a_support_is_frozen(rng: torch.Generator) -> None:
    sup = support(scene(rng), "samples", rng)
    with pytest.raises(AttributeError):
        sup.ids = sup.ids.clone()  # type: ignore[misc]


def test_from_topk(rng: torch.Generator) -> None:
    s = scene(rng)
    own = topk_logprobs(s.log_q, 4)
    sup = Support.from_topk(own)
    assert torch.equal(sup.ids, own.ids)
    assert torch.equal(sup.teacher_logprobs, own.logprobs)
    assert (sup.log_weights == 0).all()
    assert sup.draw == "top_k"
    of_student: TopK = topk_logprobs(s.log_p, 4)
    scores = s.log_q.gather(1, of_student.ids)
    assert torch.equal(Support.from_topk(of_student, scores).teacher_logprobs, scores)


def test_align_rows_pairs_a_state_with_the_next_token() -> None:
    # The state at position t of sequence b is the number 100 b + t; labels are tokens, -100 in the prompt.
    states = (100 * torch.arange(2)[:, None] + torch.arange(5)).float()[:, :, None]
    labels = torch.tensor([[-100, -100, 7, 8, 9], [-100, 3, 4, -100, -100]])
    aligned = align_rows(states, labels)
    assert aligned.rows[:, 0].tolist() == [0, 1, 2, 3, 100, 101, 102, 103]
    assert aligned.targets.tolist() == [-100, 7, 8, 9, 3, 4, -100, -100]
    assert aligned.mask.tolist() == [False, True, True, True, True, True, False, False]
    assert aligned.mask.dtype == torch.bool


def test_align_rows_takes_another_ignored_label_and_keeps_gradients() -> None:
    states = torch.zeros(1, 3, 2, requires_grad=True)
    aligned = align_rows(states, torch.tensor([[5, 0, 6]]), ignore_index=0)
    assert aligned.mask.tolist() == [False, True]
    aligned.rows[aligned.mask].sum().backward()
    assert states.grad is not None
    assert states.grad[0].tolist() == [[0, 0], [1, 1], [0, 0]]


@pytest.mark.parametrize("length", [0, 1])
def test_align_rows_of_sequences_without_a_next_token(length: int) -> None:
    aligned = align_rows(torch.zeros(2, length, 3), torch.zeros(2, length, dtype=torch.int64))
    assert aligned.rows.shape == (0, 3)
    assert aligned.targets.shape == aligned.mask.shape == (0,)


def test_align_rows_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match=r"states: got shape \[4, 3\], expected \[B, L, D\]"):
        align_rows(torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"labels: got shape \[2, 3\], expected \[2, 4\]"):
        align_rows(torch.zeros(2, 4, 3), torch.zeros(2, 3, dtype=torch.int64))
