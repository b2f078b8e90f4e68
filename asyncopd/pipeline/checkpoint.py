"""The checkpoint on disk: at its path there is always a whole one, the old or the new."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path


def save_atomically(save: Callable[[str], None], path: Path) -> None:
    """Call ``save`` with a sibling of ``path``, then rename: ``path`` is never half a checkpoint."""
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    clean_up(path)
    partial, old = _siblings(path)
    try:
        save(str(partial))
    except BaseException:
        _remove(partial)
        raise
    if path.is_dir():  # rename() replaces a file, but not a folder with something in it
        os.replace(path, old)
    os.replace(partial, path)
    _remove(old)


def clean_up(path: Path) -> None:
    """Remove what a save that was killed left beside ``path``; nobody may be saving there."""
    path = path.absolute()
    partial, old = _siblings(path)
    if old.exists() and not os.path.lexists(path):  # killed between the two renames: the only whole one
        os.replace(old, path)
    for leftover in (partial, old):
        _remove(leftover)


def _siblings(path: Path) -> tuple[Path, Path]:
    """Where a checkpoint is written, and where the one before it waits to be removed."""
    return path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.old")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
