"""The options of a loss as text, in which they pass through an operator, and back."""

import math
from dataclasses import replace

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asyncopd import Support
from asyncopd.backends.loss_spec import SPEC_FIELDS, LossSpec
from asyncopd.losses.kl import forward_spec, reverse_spec

NUMBERS = st.floats(min_value=0.0, exclude_min=True, allow_nan=False)
OPTIONAL = st.none() | NUMBERS
SPECS = st.builds(
    LossSpec,
    divergence=st.sampled_from(["reverse", "forward"]),
    normalize=st.sampled_from(["exact", "sampled"]),
    tail=st.sampled_from(["drop", "bucket", "renormalize"]),
    baseline=st.sampled_from(["none", "mean", "loo"]),
    head_is_certain=st.booleans(),
    needs_policy=st.booleans(),
    advantage=st.sampled_from(["current", "behavior"]),
    ratio_cap=OPTIONAL,
    clip_eps=OPTIONAL,
    m2_budget=OPTIONAL,
    proximal_cap=NUMBERS,
    metrics=st.booleans(),
)


@given(SPECS)
def test_text_keeps_every_bit(spec: LossSpec) -> None:
    again = LossSpec.parse(spec.text)
    assert again == spec
    assert again.text == spec.text
    assert LossSpec.parse(spec.text) is again


@given(SPECS, SPECS)
def test_other_options_have_another_text(a: LossSpec, b: LossSpec) -> None:
    assert (a.text == b.text) == (a == b)


def test_every_field_is_in_the_text() -> None:
    assert tuple(LossSpec.__dataclass_fields__) == SPEC_FIELDS
    assert len(LossSpec().text.split("|")) == len(SPEC_FIELDS)


def test_numbers_of_other_types() -> None:
    assert LossSpec.parse(LossSpec(proximal_cap=5).text) == LossSpec(proximal_cap=5.0)
    assert LossSpec.parse(LossSpec(clip_eps=numpy.float64(0.1)).text) == LossSpec(clip_eps=0.1)
    assert LossSpec.parse(LossSpec(proximal_cap=math.inf).text).proximal_cap == math.inf


@pytest.mark.parametrize(
    "text", ["", "reverse", LossSpec().text + "|", LossSpec().text.replace("reverse", "inverse"), "x|" * 11 + "x"]
)
def test_what_is_no_spec_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"spec: got .*expected"):
        LossSpec.parse(text)


def test_unknown_words_are_refused() -> None:
    with pytest.raises(ValueError, match="tail: got 'drpo', expected one of 'drop'"):
        LossSpec(tail="drpo")


def test_the_same_options_are_the_same_object() -> None:
    """Backends keep what they derive from a spec by the spec."""
    support = Support(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1), torch.zeros(1, 1))
    specs = [reverse_spec(support, "exact", "drop", "mean", None, metrics) for metrics in (False, True, False)]
    assert specs[0] is specs[2]
    assert specs[0] == replace(specs[1], metrics=False) == LossSpec(baseline="mean", metrics=False)
    assert forward_spec(support, "bucket", True) == LossSpec(divergence="forward", tail="bucket")
