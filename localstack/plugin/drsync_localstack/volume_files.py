"""A volume of LocalStack as a file, and back: what starts an "instance" in QEMU.

    python -m drsync_localstack.volume_files get http://127.0.0.1:4566 vol-0123 disk.raw
    python -m drsync_localstack.volume_files put http://127.0.0.1:4566 vol-0123 disk.raw

A raw file is sparse: it takes the space of the blocks that were written, whatever the volume's size. A name that ends
in .qcow2 gives a qcow2 image, by qemu-img. Only the standard library is used, and nothing of LocalStack's.
"""

import http.client
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from drsync_localstack.blocks import BLOCK_BYTES, ZERO_BLOCK

INDEX = struct.Struct(">Q")
TIMEOUT_S = 120


class VolumeFailed(Exception):
    """LocalStack did not do what was asked; the text is its answer."""


def get(endpoint_url: str, volume_id: str, path: Path) -> None:
    """Write a volume's content into a new file, raw or (by its name) qcow2.

    Raises:
        VolumeFailed: there is no such volume.
    """
    if path.suffix == ".qcow2":
        raw = path.with_suffix(".raw.partial")
        try:
            _get_raw(endpoint_url, volume_id, raw)
            command = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(path)]
            subprocess.run(command, check=True, stdin=subprocess.DEVNULL)  # noqa: S603 - our own arguments
        finally:
            raw.unlink(missing_ok=True)
        return
    _get_raw(endpoint_url, volume_id, path)


def put(endpoint_url: str, volume_id: str, path: Path) -> int:
    """Write into a volume what a raw file has otherwise, block by block; how many blocks that were.

    Raises:
        VolumeFailed: there is no such volume, or the file has another size.
    """
    size = _size_of(endpoint_url, volume_id)
    if path.stat().st_size != size:
        raise VolumeFailed(f"{path} has {path.stat().st_size} bytes, {volume_id} has {size}")
    old = path.with_name(path.name + ".before")
    try:
        _get_raw(endpoint_url, volume_id, old)
        connection = _connect(endpoint_url)
        body = _changes(old, path)
        connection.request("PUT", f"/_drsync/volumes/{volume_id}/blocks", body, encode_chunked=True)
        written: int = json.loads(_read(connection))["written"]
        return written
    finally:
        old.unlink(missing_ok=True)


def _size_of(endpoint_url: str, volume_id: str) -> int:
    connection = _connect(endpoint_url)
    connection.request("GET", f"/_drsync/volumes/{volume_id}")
    size: int = json.loads(_read(connection))["size_bytes"]
    return size


def _get_raw(endpoint_url: str, volume_id: str, path: Path) -> None:
    size = _size_of(endpoint_url, volume_id)
    connection = _connect(endpoint_url)
    connection.request("GET", f"/_drsync/volumes/{volume_id}/blocks")
    answer = connection.getresponse()
    with path.open("wb") as file:
        file.truncate(size)
        while head := answer.read(INDEX.size):
            data = answer.read(BLOCK_BYTES)
            if len(head) != INDEX.size or len(data) != BLOCK_BYTES:
                raise VolumeFailed(f"the blocks of {volume_id} end too early")
            if data != ZERO_BLOCK:
                file.seek(INDEX.unpack(head)[0] * BLOCK_BYTES)
                file.write(data)
    connection.close()


def _changes(old: Path, new: Path) -> Iterator[bytes]:
    """The blocks in which two files of one size differ; where both have holes nothing is read."""
    with old.open("rb") as before, new.open("rb") as after:
        for index in sorted({*_blocks_with_data(before.fileno()), *_blocks_with_data(after.fileno())}):
            before.seek(index * BLOCK_BYTES)
            after.seek(index * BLOCK_BYTES)
            data = after.read(BLOCK_BYTES)
            if data != before.read(BLOCK_BYTES):
                yield INDEX.pack(index) + data


def _blocks_with_data(handle: int) -> Iterator[int]:
    """The numbers of the blocks in which a sparse file has data."""
    at, end = 0, os.fstat(handle).st_size
    while at < end:
        try:
            start = os.lseek(handle, at, os.SEEK_DATA)
        except OSError:  # ENXIO: no data from here on
            return
        at = os.lseek(handle, start, os.SEEK_HOLE)
        yield from range(start // BLOCK_BYTES, -(-at // BLOCK_BYTES))


def _connect(endpoint_url: str) -> http.client.HTTPConnection:
    parts = urlsplit(endpoint_url)
    return http.client.HTTPConnection(parts.hostname or "127.0.0.1", parts.port, timeout=TIMEOUT_S)


def _read(connection: http.client.HTTPConnection) -> bytes:
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    if answer.status != 200:
        raise VolumeFailed(f"{answer.status}: {body.decode(errors='replace')}")
    return body


def main(arguments: list[str]) -> None:
    """The command line, as the module's docstring has it."""
    try:
        verb, endpoint_url, volume_id, name = arguments
        action = {"get": get, "put": put}[verb]
    except (ValueError, KeyError):
        sys.exit("usage: python -m drsync_localstack.volume_files get|put ENDPOINT VOLUME FILE")
    try:
        action(endpoint_url, volume_id, Path(name))
    except VolumeFailed as err:
        sys.exit(str(err))


if __name__ == "__main__":
    main(sys.argv[1:])
