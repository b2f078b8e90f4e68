"""Double-buffered weights and the hazard rule."""

from __future__ import annotations

import pytest
import torch
from pipeline_fakes import weights_of

from asyncopd.pipeline import WeightSegment, specs_of
from asyncopd.pipeline.weights import WeightBuffers


def test_two_versions_side_by_side() -> None:
    segment = WeightSegment(specs_of(weights_of(0)))
    segment.write(0, weights_of(1))
    segment.write(1, weights_of(2))
    for buffer, version in ((0, 1), (1, 2)):
        for name, tensor in segment.read(buffer).items():
            assert torch.equal(tensor, weights_of(version)[name])
            assert tensor.dtype == weights_of(version)[name].dtype


def test_write_converts_the_dtype_and_takes_parameters() -> None:
    segment = WeightSegment(specs_of({"w": torch.zeros(3, dtype=torch.bfloat16)}))
    segment.write(0, {"w": torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))})
    assert segment.read(0)["w"].tolist() == [1.0, 2.0, 3.0]


def test_weights_that_differ_from_the_spec_are_named() -> None:
    segment = WeightSegment(specs_of({"a": torch.zeros(2), "b": torch.zeros(3)}))
    with pytest.raises(ValueError, match=r"disagree on \['b', 'c'\]"):
        segment.write(0, {"a": torch.zeros(2), "c": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"weight 'b' has shape \(4,\)"):
        segment.write(0, {"a": torch.zeros(2), "b": torch.zeros(4)})


def test_buffer_is_free_only_when_every_worker_is_done_with_it() -> None:
    buffers = WeightBuffers(2)
    assert (buffers.version, buffers.free()) == (-1, 0)
    buffers.writing(0)
    assert (buffers.being_written, buffers.free()) == (True, 1)
    buffers.published(0, 0)
    buffers.writing(1)
    assert buffers.free() is None
    buffers.published(1, 1)
    assert buffers.version == 1
    buffers.acknowledged(0, 0)
    assert buffers.free() is None  # worker 1 may still read version 0
    buffers.acknowledged(1, 0)
    assert buffers.free() == 0
    assert buffers.owed_by(0)
    assert buffers.owed_by(1)


def test_acknowledging_a_newer_version_lets_go_of_a_skipped_one() -> None:
    buffers = WeightBuffers(1)
    buffers.published(0, 0)
    buffers.published(1, 1)
    buffers.acknowledged(0, 1)
    assert not buffers.owed_by(0)
    assert buffers.free() == 0  # the older one
