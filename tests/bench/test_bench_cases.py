"""Shapes and the work that they need at least."""

import torch
from tiny_cases import CPU, tiny

from asyncopd.task import load_student
from bench import cases
from bench.cases import CASES, EMBEDDED, Case, cases_of
from bench.families import FAMILIES
from bench.inputs import head_inputs, logits_inputs, loss_inputs


def test_names_are_unique_and_every_family_has_a_headline_case_on_a_gpu() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    assert {c.family for c in CASES if c.size == "gpu" and c.headline} == set(FAMILIES)
    on_cpu = {c.family for c in CASES if c.size != "gpu" and c.headline}
    # What only a GPU's table has: other work of the head, and a teacher's.
    assert set(FAMILIES) - on_cpu == {"exact_head_zero_sum", "exact_head_frozen", "linear_gather"}


def test_sizes_nest() -> None:
    assert set(cases_of("ci")) < set(cases_of("full"))
    assert not set(cases_of("full")) & set(cases_of("gpu"))


def test_embedded_model_is_the_one_that_ships() -> None:
    config = load_student().config
    assert (EMBEDDED.vocab, EMBEDDED.width) == (config.vocab_size, config.hidden_size)


def test_least_work() -> None:
    assert cases.TOPK.work.bytes == 128 * 151_936 * 4
    assert cases.TOPK_BF16.work.bytes == 128 * 151_936 * 2
    assert cases.GATHER.work.bytes == 3 * 128 * 151_936 * 4
    assert cases.EXACT_HEAD.work.flops == 3 * 2 * 512 * 151_936 * 1024
    assert cases.SAMPLED_HEAD.work.flops * 151_936 == cases.EXACT_HEAD.work.flops * 64
    assert cases.KL.work.bytes == 8192 * 64 * (3 * 4 + 8 + 4)  # three scores and an id in, a coefficient out


def test_masked_rows_need_no_work() -> None:
    whole, half = tiny("exact_head", rows=20), tiny("exact_head", rows=20, masked=0.5)
    assert half.valid_rows == 10
    assert 2 * half.work.flops == whole.work.flops


def test_heads_that_do_less_need_fewer_products() -> None:
    exact, zero_sum, frozen = (
        tiny(family).work for family in ("exact_head", "exact_head_zero_sum", "exact_head_frozen")
    )
    assert 3 * zero_sum.flops == exact.flops
    assert 3 * frozen.flops == 2 * exact.flops
    assert tiny("linear_gather").work == tiny("linear_topk").work


def test_inputs_are_the_same_every_time_and_peaked() -> None:
    a, b = (logits_inputs(tiny("topk"), CPU) for _ in range(2))
    assert torch.equal(a.logits, b.logits)
    probability = a.logits.softmax(1).amax(1)
    assert probability.median() > 0.1
    first, second = (head_inputs(tiny("exact_head"), CPU) for _ in range(2))
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(first.support.ids, second.support.ids)
    assert (first.hidden @ first.weight.t()).softmax(1).amax(1).median() > 0.1


def test_chunks_of_inputs_join() -> None:
    """More rows than are drawn at a time; every row has its own support."""
    case: Case = tiny("exact_head", rows=200)
    inputs = head_inputs(case, CPU)
    assert inputs.support.ids.shape == (200, 8)
    top = (inputs.hidden @ inputs.weight.t()).topk(3, dim=1).indices
    assert torch.equal(inputs.support.ids[:, :3].sort(1).values, top.sort(1).values)


def test_loss_inputs_have_the_weights_of_a_head_and_a_tail() -> None:
    inputs = loss_inputs(tiny("kl"), CPU)
    assert not inputs.support.log_weights[:, :3].any()
    assert (inputs.support.log_weights[:, 3:] != 0).all()
