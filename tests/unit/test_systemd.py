"""What systemd is told, over a real datagram socket."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from drsync.systemd import Notifier


@pytest.fixture
def receiver(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiving:
        receiving.bind(str(tmp_path / "notify"))
        receiving.settimeout(5)
        yield receiving


def test_each_state_is_one_datagram(receiver: socket.socket) -> None:
    notifier = Notifier.from_environment({"NOTIFY_SOCKET": receiver.getsockname()})
    notifier.ready("2 VMs")
    notifier.reloading()
    notifier.watchdog()
    notifier.stopping()
    messages = [receiver.recv(1000).decode() for _ in range(4)]
    assert messages[0] == "READY=1\nSTATUS=2 VMs"
    assert messages[1].startswith("RELOADING=1\nMONOTONIC_USEC=")
    assert messages[2:] == ["WATCHDOG=1", "STOPPING=1"]


def test_an_abstract_socket_is_reached() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiving:
        receiving.bind(f"\0drsync-test-{os.getpid()}")
        receiving.settimeout(5)
        Notifier(f"@drsync-test-{os.getpid()}").watchdog()
        assert receiving.recv(100) == b"WATCHDOG=1"


def test_without_systemd_nothing_happens(tmp_path: Path) -> None:
    Notifier.from_environment({}).ready("")
    Notifier(str(tmp_path / "nobody")).ready("")


def test_a_full_socket_does_not_block(receiver: socket.socket) -> None:
    notifier = Notifier(receiver.getsockname())
    for _ in range(10_000):
        notifier.watchdog()


@pytest.mark.parametrize(
    ("environ", "watchdog_s"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_the_watchdog_is_only_for_the_process_that_it_names(environ: dict[str, str], watchdog_s: float | None) -> None:
    assert Notifier.from_environment(environ).watchdog_s == watchdog_s
