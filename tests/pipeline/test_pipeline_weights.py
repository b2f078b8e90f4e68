"""Double-buffered weights, the hazard rule, and the checkpoint's rename."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pipeline_fakes import Fake, FakeLearner, weights_of

from asyncopd.pipeline import WeightSegment, specs_of
from asyncopd.pipeline.learner_worker import save_atomically
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


class FolderLearner(FakeLearner):
    def save(self, path: str) -> None:
        Path(path).mkdir()
        (Path(path) / "weights").write_text(str(self.version))
        if self.version == 3:
            raise OSError("disk full")


def test_checkpoint_is_whole_or_the_old_one(tmp_path: Path) -> None:
    learner, path = FolderLearner(Fake()), tmp_path / "run" / "checkpoint"
    for version in (1, 2):
        learner.version = version
        save_atomically(learner, path)
        assert (path / "weights").read_text() == str(version)
    learner.version = 3
    with pytest.raises(OSError, match="disk full"):
        save_atomically(learner, path)
    assert (path / "weights").read_text() == "2"
    assert [p.name for p in path.parent.iterdir()] == ["checkpoint"]


def test_checkpoint_file_replaces_a_file(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    path.write_text("old")
    save_atomically(FakeLearner(Fake()), path)
    assert path.read_text() == "0"
    assert list(tmp_path.iterdir()) == [path]
