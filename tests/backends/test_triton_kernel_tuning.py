"""Choices by measurement: made once a shape, recorded, found again; and products are right whatever was chosen."""

import json
from pathlib import Path

import pytest
import torch
from each_backend import DEVICES

from asyncopd.kernels import gemm, tuning

CANDIDATES = [(128, 4), (64, 8), (32, 2)]
SHAPE = {"rows": 5, "dtype": "bf16"}


class Clock:
    """Times by candidate, and who was timed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, times: list[float]) -> None:
        self.times, self.ran = iter(times), []
        monkeypatch.setattr(tuning, "_milliseconds", self.milliseconds)

    def milliseconds(self, run: object) -> float:
        run()  # type: ignore[operator]
        return next(self.times)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "choices.jsonl"
    monkeypatch.setenv(tuning.VARIABLE, str(path))
    tuning._recorded.cache_clear()
    return path


def test_without_the_variable_nothing_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(tuning.VARIABLE, raising=False)
    clock = Clock(monkeypatch, [])
    assert tuning.choose("k", SHAPE, CANDIDATES, clock.ran.append) == (128, 4)
    assert clock.ran == []


def test_the_fastest_is_chosen_recorded_and_found_again(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, [3.0, 1.0, 2.0, 1.0, 2.0, 3.0])
    assert tuning.choose("k", SHAPE, CANDIDATES, clock.ran.append) == (64, 8)
    assert clock.ran == CANDIDATES
    assert tuning.choose("k", SHAPE, CANDIDATES, clock.ran.append) == (64, 8)
    tuning._recorded.cache_clear()  # as another process
    assert tuning.choose("k", SHAPE, CANDIDATES, clock.ran.append) == (64, 8)
    assert clock.ran == CANDIDATES
    # Another shape and another kernel are other choices.
    assert tuning.choose("k", {**SHAPE, "rows": 6}, CANDIDATES, clock.ran.append) == (128, 4)
    first, second = (json.loads(line) for line in file.read_text().splitlines())
    assert (first["kernel"], first["rows"], first["choice"]) == ("k", 5, [64, 8])
    assert first["ms"] == [[[128, 4], 3.0], [[64, 8], 1.0], [[32, 2], 2.0]]
    assert (second["rows"], second["choice"]) == (6, [128, 4])


def test_a_choice_that_is_no_candidate_any_more_is_made_again(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, [1.0, 2.0, 2.0, 1.0])
    assert tuning.choose("k", SHAPE, CANDIDATES[:2], clock.ran.append) == (128, 4)
    assert tuning.choose("k", SHAPE, CANDIDATES[1:], clock.ran.append) == (32, 2)


@pytest.mark.parametrize("text", ["no json", "[]", '{"kernel": "k"}'])
def test_a_file_of_something_else_is_refused(file: Path, text: str) -> None:
    file.write_text(text + "\n")
    with pytest.raises(ValueError, match=r"ASYNCOPD_AUTOTUNE: line 1 of .* is no recorded choice"):
        tuning.choose("k", SHAPE, CANDIDATES, lambda _: None)


@pytest.mark.parametrize("accumulate", [False, True])
def test_a_tuned_product_is_the_product(file: Path, monkeypatch: pytest.MonkeyPatch, accumulate: bool) -> None:
    """Candidates are timed on buffers of their own: `out` is added to once."""
    Clock(monkeypatch, [2.0, 1.0])
    device = DEVICES["triton"]
    a, b = torch.randn(3, 40, device=device).bfloat16(), torch.randn(40, 9, device=device).bfloat16()
    out = torch.ones(3, 9, device=device)
    gemm.product(a, b, out, count=torch.tensor(2, device=device), accumulate=accumulate)
    expected = a[:2].float() @ b.float() + accumulate
    torch.testing.assert_close(out[:2], expected, rtol=1e-5, atol=1e-5)
    assert (out[2] == 1).all()
    (line,) = (json.loads(text) for text in file.read_text().splitlines())
    assert line["choice"] == list(gemm.tiles_for(a, 3, 9)[1])
