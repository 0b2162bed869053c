"""JSON of the repository is hostile: whatever it is, it becomes a record or Malformed."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from drsync.format import Malformed
from drsync.format.record import decode_record


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    number: int
    anything: object = None


def test_a_record_is_decoded() -> None:
    assert decode_record(b'{"number": 1, "more": []}', Sample) == Sample(number=1)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"null",
        b"{}",
        b'{"number": "1"}',
        b'{"number": 1',
        b'{"number": 1, "anything": "\xff"}',
        b'{"number": 1, "anything": "\\ud800"}',
        b'{"number": 1, "anything": ' + b"[" * 100_000,
        b'{"more": ' + b"[" * 100_000,
        b'{"number": 1, "anything": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
)
def test_what_is_no_record_is_malformed_and_not_shown(raw: bytes) -> None:
    with pytest.raises(Malformed) as caught:
        decode_record(raw, Sample)
    assert str(caught.value) == "it is not a Sample"


@given(st.binary() | st.text().map(str.encode))
def test_any_bytes_are_a_record_or_malformed(raw: bytes) -> None:
    with pytest.raises(Malformed):
        decode_record(raw, Sample)
