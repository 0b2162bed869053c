import io
import os

import pytest
from botocore.utils import determine_content_length

from drsync.store.body import BodyReader


@pytest.mark.parametrize("body", [b"0123456789", bytearray(b"0123456789"), memoryview(b"x0123456789x")[1:-1]])
def test_it_reads_like_a_file(body: bytes | bytearray | memoryview) -> None:
    reader = BodyReader(body)
    assert len(reader) == 10
    assert bytes(reader.read(4)) == b"0123"
    assert reader.tell() == 4
    assert bytes(reader.read()) == b"456789"
    assert bytes(reader.read(4)) == b""
    assert reader.seek(0) == 0
    assert bytes(reader.read(None)) == b"0123456789"
    assert reader.seek(-3, io.SEEK_END) == 7
    assert reader.seek(1, io.SEEK_CUR) == 8
    assert bytes(reader.read(100)) == b"89"


def test_botocore_finds_its_length_without_reading_it() -> None:
    reader = BodyReader(b"0123456789")
    assert determine_content_length(reader) == 10
    assert reader.tell() == 0


def test_nothing_is_copied() -> None:
    body = bytearray(os.urandom(1000))
    piece = BodyReader(body).read(500)
    body[0] ^= 0xFF
    assert piece[0] == body[0]


def test_the_body_can_not_be_changed_through_it() -> None:
    with pytest.raises(TypeError):
        BodyReader(bytearray(b"abc")).read()[0] = 1
