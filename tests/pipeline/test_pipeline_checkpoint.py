"""The checkpoint's renames, and what a save that was killed leaves."""

from __future__ import annotations

from pathlib import Path

import pytest
from pipeline_fakes import Fake, FakeLearner

from asyncopd.pipeline.checkpoint import clean_up, save_atomically


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
        save_atomically(learner.save, path)
        assert (path / "weights").read_text() == str(version)
    learner.version = 3
    with pytest.raises(OSError, match="disk full"):
        save_atomically(learner.save, path)
    assert (path / "weights").read_text() == "2"
    assert [p.name for p in path.parent.iterdir()] == ["checkpoint"]


def test_checkpoint_file_replaces_a_file(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    path.write_text("old")
    save_atomically(FakeLearner(Fake()).save, path)
    assert path.read_text() == "0"
    assert list(tmp_path.iterdir()) == [path]


def test_old_checkpoint_comes_back_when_killed_between_the_renames(tmp_path: Path) -> None:
    """`checkpoint` is out of the way, and the new one is not in its place."""

    def fail(path: str) -> None:
        raise OSError("disk full")

    for end in ("clean up", "failing save"):
        (tmp_path / ".checkpoint.old").mkdir()
        (tmp_path / ".checkpoint.old" / "weights").write_text("the only one")
        (tmp_path / ".checkpoint.partial").mkdir()
        if end == "clean up":
            clean_up(tmp_path / "checkpoint")
        else:
            with pytest.raises(OSError, match="disk full"):
                save_atomically(fail, tmp_path / "checkpoint")
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
        assert (tmp_path / "checkpoint" / "weights").read_text() == "the only one"
        (tmp_path / "checkpoint" / "weights").unlink()
        (tmp_path / "checkpoint").rmdir()


def test_old_checkpoint_goes_when_the_new_one_is_in_place(tmp_path: Path) -> None:
    """Killed after the second rename."""
    (tmp_path / "checkpoint").write_text("new")
    (tmp_path / ".checkpoint.old").write_text("old")
    clean_up(tmp_path / "checkpoint")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"checkpoint": "new"}
