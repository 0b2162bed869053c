"""The bytes of a PUT as the file that botocore wants, without copying them."""

import io

from drsync.model import NoPace, Pace
from drsync.store import Bytes


class BodyReader:
    """A read-only, seekable file over `body`; each read is a view of it, nothing is copied.

    botocore takes bytes, bytearray or a file. Bytes it copies once more; a
    bytearray goes out in a single send, which then must be done within the
    connect timeout, however slow the line is. From a file it sends small blocks,
    each with its own time, and asks the server first (``Expect: 100-continue``),
    so what will be refused anyway is not sent.

    What is read once `sending` is set waits for `pace`. (Over plain HTTP botocore
    reads a body before that, too, to sign it.)
    """

    def __init__(self, body: Bytes, pace: Pace | None = None) -> None:
        self._view = memoryview(body).cast("B").toreadonly()
        self._position = 0
        self._pace = pace or NoPace()
        self.sending = False

    def __len__(self) -> int:
        return len(self._view)

    def read(self, size: int | None = -1) -> memoryview:
        end = len(self._view) if size is None or size < 0 else self._position + size
        piece = self._view[self._position : end]
        self._position += len(piece)
        if self.sending:
            self._pace.take(len(piece))
        return piece

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: len(self._view)}[whence]
        self._position = max(0, start + offset)
        return self._position
