"""Reads a layer: the qcow2 file that a capture wrote into the spool.

QEMU writes three things into a layer, and drsync tells them apart as
`qemu-img map` would: a block that is absent was not captured; a block that is
explicitly zero was zeroed or discarded by the guest; any other has its 64 KiB
at an offset of the file.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from drsync.errors import LayerDamaged
from drsync.model import BLOCK_SIZE
from drsync.qcow2 import ImageReader, NotReadable, Table

_IOV_MAX = 1024


class Layer:
    """An open layer. Reading blocks is safe from several threads."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        """Open the layer at `path`, which must be of a disk of `size_bytes`.

        Raises:
            LayerDamaged: it is not a complete layer of such a disk.
        """
        self._path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as err:
            raise LayerDamaged(path=path, problem=err.strerror) from err
        try:
            self._reader = ImageReader(self._fd)
            if self._reader.size_bytes != size_bytes:
                raise NotReadable(f"is of a disk of {self._reader.size_bytes} bytes, not {size_bytes}")
        except NotReadable as err:
            os.close(self._fd)
            raise LayerDamaged(path=path, problem=err) from err

    def tables(self) -> Iterator[Table]:
        """What the layer holds, 8192 blocks at a time, in the order of the disk.

        Raises:
            LayerDamaged: its tables are not whole.
        """
        try:
            yield from self._reader.tables()
        except NotReadable as err:
            raise LayerDamaged(path=self._path, problem=err) from err

    def read_blocks(self, offsets: "np.typing.NDArray[np.int64]", out: memoryview) -> None:
        """Read the blocks at `offsets` of the file, one after the other, into `out`.

        Neighbours in the file are read at once: after a full that is nearly
        everything. A last cluster that the file does not fill reads as zeros.

        Raises:
            LayerDamaged: the file can't be read, or ends too early.
        """
        starts = np.flatnonzero(np.diff(offsets, prepend=-1) != BLOCK_SIZE)
        ends = np.append(starts[1:], len(offsets))
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            self._read(int(offsets[start]), out[start * BLOCK_SIZE : end * BLOCK_SIZE])

    def _read(self, offset: int, out: memoryview) -> None:
        try:
            while out:
                count = os.preadv(self._fd, [out], offset)
                if count == 0:
                    if len(out) >= BLOCK_SIZE:
                        raise LayerDamaged(path=self._path, problem=f"it ends at {offset}, inside of its data")
                    out[:] = bytes(len(out))
                    return
                out, offset = out[count:], offset + count
        except OSError as err:
            raise LayerDamaged(path=self._path, problem=err.strerror) from err

    def close(self) -> None:
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
