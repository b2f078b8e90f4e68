"""The generator behind every draw: Philox4x32-10, and the uniforms made from its words."""

import pytest
import torch

from asyncopd.backends.reference.philox import philox4x32, uniforms

# kat_vectors of Random123 (counter, key, result), for ten rounds.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def words(values: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.tensor([value]) for value in values]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]) -> None:
    out = philox4x32(tuple(words(counter)), tuple(words(key)))  # type: ignore[arg-type]
    assert tuple(int(word) for word in out) == expected


def test_a_uniform_is_52_bits_of_two_words_and_a_half() -> None:
    # Block 0 of key 0, row 0 is the first known answer; block 1 must be another one.
    high, low, high2, low2 = KNOWN_ANSWERS[0][2]
    u = uniforms(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), 3)[0].tolist()
    expected = [((a >> 6 << 26 | b >> 6) + 0.5) / 2**52 for a, b in ((high, low), (high2, low2))]
    assert u[:2] == expected
    assert u[2] not in u[:2]


def test_stream_and_row_number_use_all_their_64_bits() -> None:
    numbers = [0, 1, 2**31, 2**32, 2**32 + 1, 2**33, 2**62, -1, -(2**32), -(2**63)]
    values = torch.tensor(numbers)
    zero = torch.zeros_like(values)
    draws = torch.cat([uniforms(values, zero, 1), uniforms(zero, values, 1)])[:, 0].tolist()
    assert len(set(draws)) == 2 * len(numbers) - 1  # (stream 0, row 0) is there twice


def test_uniforms_lie_strictly_between_0_and_1_and_spread() -> None:
    u = uniforms(torch.arange(2000), torch.zeros(2000, dtype=torch.int64), 100).flatten()
    assert u.dtype == torch.float64
    assert u.min() > 0
    assert u.max() < 1
    counts = torch.histc(u, 100, 0, 1)
    # Chi-square with 99 degrees of freedom exceeds 149 with probability 1e-3.
    assert ((counts - 2000).square() / 2000).sum() < 149


def test_the_count_of_draws_does_not_change_the_first_ones() -> None:
    streams, zero = torch.arange(5), torch.zeros(5, dtype=torch.int64)
    many = uniforms(streams, zero, 9)
    for count in range(1, 9):
        assert torch.equal(uniforms(streams, zero, count), many[:, :count])


def test_extreme_words_stay_strictly_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    from asyncopd.backends.reference import philox

    for word in (0, 0xFFFFFFFF):
        monkeypatch.setattr(philox, "philox4x32", lambda counter, key, w=word: [torch.full((1, 1), w)] * 4)
        u = uniforms(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), 2)
        assert ((u > 0) & (u < 1)).all()
