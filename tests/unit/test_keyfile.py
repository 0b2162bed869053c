"""The file that holds the root key on a host."""

import os
import resource
import stat
from pathlib import Path

import pytest

from drsync.errors import KeyFileExists, KeyFileExposed, KeyFileMissing
from drsync.format.keys import RootKey, RootKeys
from drsync.keyfile import read_key_file, write_key_file

KEY = RootKey(bytes(range(32)))


def test_what_was_written_is_read_and_is_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "new" / "directory" / "key"
    before = os.umask(0)
    try:
        write_key_file(path, KEY)
    finally:
        os.umask(before)
    assert read_key_file(path) == RootKeys((KEY,))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_text() == KEY.to_text()


def test_an_existing_file_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("precious")
    with pytest.raises(KeyFileExists) as caught:
        write_key_file(path, KEY)
    assert path.read_text() == "precious"
    assert caught.value.remedy.startswith(f"mv {path} {path}.old")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o610, 0o620, 0o666])
def test_a_file_that_others_may_use_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "key"
    write_key_file(path, KEY)
    path.chmod(mode)
    with pytest.raises(KeyFileExposed) as caught:
        read_key_file(path)
    assert caught.value.remedy == f"chmod 600 {path}"
    assert KEY.secret.hex() not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"\xff" * 80, b"x" * 100_000, KEY.to_text().encode()[:-3]])
def test_a_file_that_is_no_key_file_is_refused_without_showing_it(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "key"
    path.write_bytes(data)
    path.chmod(0o600)
    with pytest.raises(KeyFileMissing) as caught:
        read_key_file(path)
    assert str(caught.value) == f"no usable key file at {path}: is not a drsync key file"


def test_a_file_that_is_not_there_is_told_with_the_way_to_get_it_back(tmp_path: Path) -> None:
    with pytest.raises(KeyFileMissing, match="No such file") as caught:
        read_key_file(tmp_path / "key")
    assert caught.value.remedy.startswith("drsync key recover")


def test_a_directory_is_no_key_file(tmp_path: Path) -> None:
    with pytest.raises(KeyFileMissing):
        read_key_file(tmp_path)
    with pytest.raises(KeyFileExists):
        write_key_file(tmp_path, KEY)


def test_a_place_that_can_not_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(KeyFileMissing):
        write_key_file(tmp_path / "file" / "key", KEY)
    with pytest.raises(KeyFileMissing, match="Not a directory"):
        write_key_file(tmp_path / "file" / "deeper" / "key", KEY)


def test_a_key_that_can_not_be_written_whole_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "key"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))  # stands for a disk that gets full
    try:
        with pytest.raises(KeyFileMissing, match="File too large"):
            write_key_file(path, KEY)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []
