"""The console of a guest that came back: it leaves no thread behind that reads what is not its own."""

import os
import pty
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager

from recovered_guest import PtyConsole


def test_a_console_that_is_closed_takes_nothing_from_who_gets_its_number_next() -> None:
    guest, terminal = pty.openpty()
    path = os.ttyname(terminal)
    with busy_processor():
        for _ in range(50):
            with closing(PtyConsole(path)) as console:
                os.write(guest, b"word")
                console.drain(5)
            near, far = socket.socketpair()  # the lowest numbers that are free
            with near, far:
                far.sendall(b"x")
                near.settimeout(5)
                assert near.recv(4) == b"x"
    os.close(guest)
    os.close(terminal)


@contextmanager
def busy_processor() -> Iterator[None]:
    """Threads get their turns late inside."""
    over = threading.Event()

    def work() -> None:
        while not over.is_set():
            sum(range(2000))

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_a_console_carries_both_ways() -> None:
    guest, terminal = pty.openpty()
    console = PtyConsole(os.ttyname(terminal))
    with closing(console):
        console.type("ls")
        assert os.read(guest, 16) == b"ls\n"
    os.close(guest)
    os.close(terminal)
