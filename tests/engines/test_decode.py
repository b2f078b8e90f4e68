"""Decoding in places: the same answers whatever the batch, right supports, versions in flight."""

import pytest
import torch
from tiny_models import EOS, VOCAB, drain, make_decoder, make_model, reference_logprobs, requests
from transformers import PreTrainedModel

from asyncopd.engines.draw import check_draw, token_streams

# fp32 on both sides; a forward over the whole sequence sums in another order than a cached one.
CLOSE = {"atol": 2e-5, "rtol": 1e-5}


def test_answers_do_not_depend_on_places_or_company(student: PreTrainedModel) -> None:
    todo = requests(13)
    together = drain(make_decoder(student, places=5), todo)
    for request in todo:
        alone = drain(make_decoder(student, places=1), [request])[request.uid]
        assert torch.equal(alone.response_ids, together[request.uid].response_ids)
        assert torch.equal(alone.ids, together[request.uid].ids)


def test_finished_places_are_refilled_without_waiting_for_the_longest(student: PreTrainedModel) -> None:
    decoder = make_decoder(student, places=4)
    decoder.submit(requests(20))
    tokens = steps = 0
    while decoder.active():
        tokens += sum(len(r.response_ids) for r in decoder.step())
        steps += 1
    # Waves that wait for their longest would take 5 * 12 steps.
    assert tokens / (4 * steps) > 0.8


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(
    ("draw", "num_scores", "head"), [("token", 1, 0), ("samples", 6, 0), ("head_tail", 8, 3), ("student_top_k", 5, 0)]
)
def test_support_is_drawn_from_the_policy_that_wrote_the_token(
    student: PreTrainedModel, draw: str, num_scores: int, head: int, temperature: float
) -> None:
    decoder = make_decoder(student, draw=draw, num_scores=num_scores, head=head, temperature=temperature)
    for rollout in drain(decoder, requests(9)).values():
        log_mu = reference_logprobs(student, rollout, temperature)
        ids = rollout.ids.long()
        at_ids = log_mu.gather(1, ids)
        if draw in ("token", "samples"):
            torch.testing.assert_close(rollout.log_weights, -torch.log(torch.tensor(num_scores)) - at_ids, **CLOSE)
            assert torch.equal(ids[:, 0], rollout.response_ids.long())
        elif draw == "student_top_k":
            assert torch.equal(ids, log_mu.topk(num_scores).indices)
            assert (rollout.log_weights == 0).all()
        else:
            assert torch.equal(ids[:, :head], log_mu.topk(head).indices)
            rest = torch.log1p(-at_ids[:, :head].exp().sum(dim=1, keepdim=True))
            tail = rest - torch.log(torch.tensor(float(num_scores - head))) - at_ids[:, head:]
            torch.testing.assert_close(rollout.log_weights[:, head:], tail, atol=1e-3, rtol=1e-3)
            # The rollout's own token is in the support: in the head, or as the first draw of the tail.
            own = rollout.response_ids.long()[:, None]
            assert (ids[:, : head + 1] == own).any(dim=1).all()


def test_tokens_follow_the_policy_at_its_temperature(student: PreTrainedModel) -> None:
    temperature, count = 0.5, 4000
    decoder = make_decoder(student, places=500, max_response_tokens=1, temperature=temperature)
    todo = requests(1) * count
    for uid, request in enumerate(todo):
        todo[uid] = type(request)(uid, request.prompt_ids)
    answers = drain(decoder, todo)
    counts = torch.bincount(torch.tensor([int(r.response_ids[0]) for r in answers.values()]), minlength=VOCAB)
    p = reference_logprobs(student, answers[0], temperature)[0].exp()
    likely = p * count >= 5
    chi2 = ((counts - p * count) ** 2 / (p * count))[likely].sum()
    freedom = int(likely.sum())
    assert chi2 < freedom + 4 * (2 * freedom) ** 0.5  # four standard deviations of a chi-square


def test_answer_ends_with_eos_or_is_cut(student: PreTrainedModel) -> None:
    ended = cut = 0
    for rollout in drain(make_decoder(student), requests(60)).values():
        response = rollout.response_ids.tolist()
        assert EOS not in response[:-1]
        ended += response[-1] == EOS
        cut += response[-1] != EOS
        assert response[-1] == EOS or len(response) == 12
    assert ended
    assert cut


def test_new_weights_in_flight_are_recorded_token_by_token(student: PreTrainedModel) -> None:
    decoder = make_decoder(student, max_response_tokens=8, draw="samples", num_scores=4)
    decoder.submit(requests(4))
    other = {name: p.detach() for name, p in make_model(5).named_parameters()}
    finished = [r for _ in range(3) for r in decoder.step()]
    decoder.load_weights(other, version=7)
    while decoder.active():
        finished += decoder.step()
    for rollout in finished:
        length = len(rollout.versions)
        assert rollout.versions.tolist() == [0] * min(3, length) + [7] * max(0, length - 3)
    new = make_model(5)
    long = next(r for r in finished if len(r.versions) > 3)
    # Before the switch: the old policy's probabilities; after it no longer.
    log_mu = reference_logprobs(make_model(0), long).gather(1, long.ids.long())
    torch.testing.assert_close(long.log_weights[:3], -torch.log(torch.tensor(4.0)) - log_mu[:3], **CLOSE)
    assert not torch.allclose(long.log_weights[3:], -torch.log(torch.tensor(4.0)) - log_mu[3:], atol=1e-2)
    assert torch.equal(next(new.parameters()), next(decoder.model.parameters()))


def test_teacher_draws_leave_the_support_to_the_teacher(student: PreTrainedModel) -> None:
    rollout = drain(make_decoder(student, draw="teacher_top_k"), requests(1))[0]
    assert rollout.ids is None
    assert rollout.log_weights is None


def test_prompt_that_does_not_fit_is_refused(student: PreTrainedModel) -> None:
    request = requests(1)[0]
    request.prompt_ids = [3] * 6
    with pytest.raises(ValueError, match=r"sequence 0: got 6 tokens, expected 1\.\.5"):
        make_decoder(student).submit([request])


def test_streams_never_collide() -> None:
    uids, positions = torch.meshgrid(torch.arange(50), torch.arange(40), indexing="ij")
    streams = torch.cat(
        [token_streams(s, uids.flatten(), positions.flatten(), purpose) for s in (0, 1, 9) for purpose in (0, 1)]
    )
    assert len(streams.unique()) == len(streams)
    assert (streams >= 0).all()
    assert (
        int(token_streams((1 << 14) - 1, torch.tensor([(1 << 28) - 1]), torch.tensor([(1 << 20) - 1]), 1)) == 2**63 - 1
    )
    with pytest.raises(ValueError, match="seed: got 16384"):
        token_streams(1 << 14, uids[0], positions[0], 0)


@pytest.mark.parametrize(
    ("draw", "num_scores", "head", "message"),
    [
        ("token", 2, 0, "draw.num_scores: got 2"),
        ("head_tail", 8, 8, "draw.head: got 8"),
        ("head_tail", 8, 0, "draw.head: got 0"),
        ("teacher_top_k", 62, 0, "draw.num_scores: got 62"),
        ("head_tail", 100, 62, "draw.head: got 62"),
    ],
)
def test_impossible_draws_are_refused(draw: str, num_scores: int, head: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_draw(draw, num_scores, head, VOCAB)  # type: ignore[arg-type]
