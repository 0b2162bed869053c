"""Sizes and times as people write them, and back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drsync.units import GiB, KiB, MiB, TiB, format_duration, format_size, parse_duration, parse_size


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("0B", 0),
        ("512B", 512),
        ("64KiB", 64 * KiB),
        (" 64 MiB ", 64 * MiB),
        ("1.5GiB", 3 * GiB // 2),
        ("2TiB", 2 * TiB),
    ],
)
def test_a_size_is_a_number_with_a_binary_unit(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize(
    "text", ["", "64", "64MB", "64mib", "MiB", "-1MiB", "1e3MiB", "1,5GiB", "1 M iB", "inf B", "9" * 400]
)
def test_what_is_not_a_size_is_refused_with_the_units(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a size; write for example 64MiB \(units: B, KiB, MiB, GiB, TiB\)"):
        parse_size(text)


@pytest.mark.parametrize(("text", "seconds"), [("30s", 30), ("5m", 300), ("0.5 h", 1800), ("1d", 86400), ("0s", 0)])
def test_a_time_is_a_number_with_a_unit(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "5", "5min", "5M", "m", "-5m", "5m3s", "nan s"])
def test_what_is_not_a_time_is_refused_with_the_units(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a time; write for example 5m \(units: s, m, h, d\)"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (KiB, "1 KiB"),
        (64 * KiB, "64 KiB"),
        (3 * GiB // 2, "1.5 GiB"),
        (1010 * MiB, "1010 MiB"),
        (5 * TiB, "5 TiB"),
        (5000 * TiB, "5000 TiB"),
    ],
)
def test_a_size_is_shown_in_the_largest_unit_that_fits(size_bytes: int, text: str) -> None:
    assert format_size(size_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (0.44, "0.4 s"),
        (9.94, "9.9 s"),
        (38.2, "38 s"),
        (60, "1 min"),
        (303, "5 min 3 s"),
        (7800, "2 h 10 min"),
        (3 * 86400 + 4 * 3600, "3 d 4 h"),
    ],
)
def test_a_time_is_shown_with_its_two_largest_units(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@given(st.integers(min_value=0, max_value=2**60))
def test_a_shown_size_can_be_read_again_and_is_near(size_bytes: int) -> None:
    assert parse_size(format_size(size_bytes)) == pytest.approx(size_bytes, rel=0.01)
