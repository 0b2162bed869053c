"""Blocks of 512 KiB, kept in files by what they hold.

A block is stored once, whoever has it; only blocks that were written take space, so a disk's virtual size costs
nothing. Nothing is synced: it all goes when LocalStack ends.
"""

import hashlib
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

BLOCK_BYTES = 512 * 1024
"""The only block size of EBS direct (known: API reference, PutSnapshotBlock)."""

ZERO_BLOCK = bytes(BLOCK_BYTES)

BLOCKS_PER_GIB = 2**30 // BLOCK_BYTES


@dataclass(frozen=True, slots=True)
class Block:
    """One write of one block. Two writes of the same bytes are two: EBS tells what was written, not what differs."""

    digest: bytes
    """SHA-256 of the 512 KiB."""
    write: int
    """The number of the write, unique in this LocalStack."""


class BlockStore:
    """Files named by SHA-256 below a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def add(self, data: bytes) -> bytes:
        """Keep a block and give its digest."""
        digest = hashlib.sha256(data).digest()
        path = self._path(digest)
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.directory)
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            Path(name).replace(path)
        return digest

    def read(self, digest: bytes) -> bytes:
        """The 512 KiB of a digest that `add` gave."""
        return self._path(digest).read_bytes()

    def keep_only(self, digests: Iterable[bytes]) -> None:
        """Remove every block that is not named."""
        kept = {digest.hex() for digest in digests}
        for path in self.directory.glob("??/*"):
            if path.name not in kept:
                path.unlink()

    def _path(self, digest: bytes) -> Path:
        name = digest.hex()
        return self.directory / name[:2] / name
