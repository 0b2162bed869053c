"""The NBD reader, when nobody serves any more."""

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from drsync.errors import SourceLost
from drsync.model import NoPace
from drsync.source.nbd import NbdReader


@pytest.fixture
def hangs_up(tmp_path: Path) -> Iterator[Path]:
    """A socket whose server closes every connection at once, as a QEMU does that ends at this moment."""
    path = tmp_path / "nbd"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen(1)

        def close_all() -> None:
            while not stop.is_set():
                connection, _ = server.accept()
                connection.close()

        stop = threading.Event()
        thread = threading.Thread(target=close_all)
        thread.start()
        yield path
        stop.set()
        with socket.socket(socket.AF_UNIX) as last:
            last.connect(str(path))
        thread.join()


def test_a_server_that_hangs_up_while_one_connects_is_lost(hangs_up: Path) -> None:
    """It depends on the moment how libnbd sees that: of a hundred tries each way comes up."""
    for _ in range(100):
        with pytest.raises(SourceLost):
            NbdReader("web", hangs_up, "root", size_bytes=65536, bitmap="", pace=NoPace())
