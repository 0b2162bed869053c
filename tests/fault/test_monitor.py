"""A QMP session with something that misbehaves at every step: each fault has its error, and none hangs or leaks."""

import json
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from drsync.errors import NotQmp, SourceBusy, SourceLost, SourceUnreachable
from drsync.source.jobs import Job
from drsync.source.monitor import REPLY_LIMIT_BYTES, CommandRefused, Monitor

GREETING = b'{"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": ""}, "capabilities": []}}\n'
JOB_EVENT = b'{"event": "JOB_STATUS_CHANGE", "data": {"id": "x", "status": "running"}, "timestamp": {}}\n'
OTHER_EVENT = b'{"event": "RTC_CHANGE", "data": {"offset": 1}, "timestamp": {}}\n'

Script = Callable[[socket.socket], None]


@contextmanager
def listening(script: Script) -> Iterator[Path]:
    """A socket at which one client is served by `script`; an error of the script fails the test."""
    trouble: list[BaseException] = []
    with tempfile.TemporaryDirectory(prefix="drsync-qmp-") as directory, socket.socket(socket.AF_UNIX) as server:
        path = Path(directory) / "qmp"
        server.bind(str(path))
        server.listen(1)

        def serve() -> None:
            try:
                connection, _ = server.accept()
                with connection:
                    script(connection)
            except BaseException as err:  # noqa: BLE001 - raised again where the test sees it
                trouble.append(err)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield path
        finally:
            thread.join(timeout=20)
    assert not thread.is_alive(), "the script did not end"
    if trouble:
        raise trouble[0]


def says(data: bytes) -> Script:
    """Greet with `data`, then wait until the client is gone."""

    def script(connection: socket.socket) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):  # the client has heard enough
            connection.sendall(data)
            while connection.recv(4096):
                pass

    return script


def qemu(*answers: bytes | None) -> Script:
    """Greet and negotiate; answer each command with a line in which ID stands for its id; None hangs up."""

    def script(connection: socket.socket) -> None:
        connection.sendall(GREETING)
        for answer in (b'{"return": {}, "id": ID}\n', *answers):
            request = read_request(connection)
            if answer is None:
                return
            with suppress(BrokenPipeError, ConnectionResetError):
                connection.sendall(answer.replace(b"ID", json.dumps(request.get("id")).encode()))
        with suppress(ConnectionResetError):
            connection.recv(4096)

    return script


def read_request(connection: socket.socket) -> dict[str, object]:
    """One command: a client of QMP ends it with nothing but its last brace."""
    received = b""
    while True:
        part = connection.recv(4096)
        assert part, "the client hung up in the middle"
        received += part
        with suppress(json.JSONDecodeError):
            request: dict[str, object] = json.loads(received)
            return request


def connect(path: Path, timeout_s: float = 5) -> Monitor:
    return Monitor.connect("web", path, timeout_s=timeout_s)


def test_nothing_there_is_unreachable(tmp_path: Path) -> None:
    with pytest.raises(SourceUnreachable, match="No such file or directory") as caught:
        connect(tmp_path / "qmp")
    assert caught.value.retryable
    assert str(tmp_path / "qmp") in caught.value.remedy


def test_a_socket_that_nobody_serves_is_unreachable(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="drsync-qmp-") as directory:
        path = Path(directory) / "qmp"
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
        with pytest.raises(SourceUnreachable, match="Connection refused"):
            connect(path)


def test_what_is_not_a_socket_is_unreachable(tmp_path: Path) -> None:
    (tmp_path / "qmp").write_text("")
    with pytest.raises(SourceUnreachable, match="it is not a socket"):
        connect(tmp_path / "qmp")


def test_a_path_that_no_socket_can_have_is_unreachable(tmp_path: Path) -> None:
    with pytest.raises(SourceUnreachable, match="too long"):
        connect(tmp_path / ("x" * 200))


def test_whoever_hangs_up_at_once_is_unreachable() -> None:
    with listening(lambda _: None) as path, pytest.raises(SourceUnreachable, match="hung up"):
        connect(path)


def test_no_greeting_in_time_is_busy() -> None:
    with listening(says(b"")) as path, pytest.raises(SourceBusy, match=r"no greeting in 0\.3 s"):
        connect(path, timeout_s=0.3)


def test_a_qemu_that_greets_and_then_hangs_is_busy() -> None:
    with listening(says(GREETING)) as path, pytest.raises(SourceBusy):
        connect(path, timeout_s=0.3)


def test_a_full_queue_of_waiting_clients_is_busy() -> None:
    with tempfile.TemporaryDirectory(prefix="drsync-qmp-") as directory, socket.socket(socket.AF_UNIX) as server:
        path = Path(directory) / "qmp"
        server.bind(str(path))
        server.listen(0)
        with socket.socket(socket.AF_UNIX) as waiting:
            waiting.connect(str(path))
            with pytest.raises(SourceBusy):
                connect(path, timeout_s=0.3)


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"NBDMAGICIHAVEOPT\0\3",
        b"\xff\xfe\x00\n",
        b"[]\n",
        b"{}\n",
        b'{"QMP": 1}\n',
        b'{"QMP": {"version": 1, "capabilities": 1}}\n',
        b'{"return": {}}\n',
        b"[" * 100_000 + b"\n",
        GREETING + b'{"error": {"class": "GenericError", "desc": "no"}}\n',
        GREETING + b"nonsense\n",
        b"{" + b"x" * (REPLY_LIMIT_BYTES * 2),
    ],
    ids=[
        "ssh",
        "nbd",
        "binary",
        "list",
        "empty",
        "number",
        "shape",
        "reply",
        "deep",
        "refusal",
        "then-nonsense",
        "endless",
    ],
)
def test_whoever_speaks_otherwise_is_not_qmp(data: bytes) -> None:
    with listening(says(data)) as path, pytest.raises(NotQmp) as caught:
        connect(path)
    assert not caught.value.retryable
    assert len(str(caught.value)) < 500


def test_a_refused_command_says_why_and_the_session_goes_on() -> None:
    refusal = b'{"error": {"class": "DeviceNotFound", "desc": "no such disk"}, "id": ID}\n'
    with listening(qemu(refusal, b'{"return": 7, "id": ID}\n')) as path, connect(path) as monitor:
        with pytest.raises(CommandRefused) as caught:
            monitor.execute("query-block")
        assert (caught.value.command, caught.value.error_class) == ("query-block", "DeviceNotFound")
        assert caught.value.text == "no such disk"
        assert monitor.execute("query-block") == 7


def test_the_peer_is_known() -> None:
    import os

    with listening(qemu()) as path, connect(path) as monitor:
        assert (monitor.peer.pid, monitor.peer.uid) == (os.getpid(), os.geteuid())


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (None, "it closed the connection"),
        (b"nonsense\n", "Failed to deserialize"),
        (b'{"id": ID}\n', "missing"),
        (b'{"error": {}, "id": ID}\n', "malformed"),
        (b"x" * (REPLY_LIMIT_BYTES * 2 + 1), "limit"),
    ],
    ids=["hangs-up", "nonsense", "empty", "bad-error", "endless"],
)
def test_a_session_that_breaks_in_a_command_is_lost_for_good(answer: bytes | None, problem: str) -> None:
    with listening(qemu(answer)) as path, connect(path) as monitor:
        with pytest.raises(SourceLost, match=problem) as caught:
            monitor.execute("transaction")
        assert "during transaction" in str(caught.value)
        assert len(str(caught.value)) < 500
        with pytest.raises(SourceLost, match="during query-jobs"):
            monitor.execute("query-jobs")
        with pytest.raises(SourceLost, match="waiting for jobs"):
            monitor.wait_for_job(5)


def test_no_answer_in_time_ends_the_session() -> None:
    with listening(qemu(b"")) as path, connect(path) as monitor:
        with pytest.raises(SourceLost, match=r"no answer in 0\.2 s"):
            monitor.execute("query-jobs", timeout_s=0.2)
        with pytest.raises(SourceLost, match="no answer"):
            monitor.execute("query-jobs")


def test_an_answer_of_another_shape_is_not_qemus() -> None:
    script = qemu(b'{"return": [{"id": 1}], "id": ID}\n')
    problem = "query-jobs answered otherwise"
    with listening(script) as path, connect(path) as monitor, pytest.raises(NotQmp, match=problem):
        monitor.query("query-jobs", list[Job])


def test_an_event_before_the_answer_to_the_negotiation_is_no_answer() -> None:
    """QEMU sends events from the moment that it takes `qmp_capabilities`, and answers it a moment later."""

    def script(connection: socket.socket) -> None:
        connection.sendall(GREETING)
        read_request(connection)
        connection.sendall(OTHER_EVENT + JOB_EVENT + b'{"return": {}}\n')
        request = read_request(connection)
        connection.sendall(json.dumps({"return": 7, "id": request["id"]}).encode() + b"\n")

    with listening(script) as path, connect(path) as monitor:
        assert monitor.execute("one") == 7


def test_only_a_job_ends_the_wait_and_each_only_once() -> None:
    events = OTHER_EVENT + JOB_EVENT + JOB_EVENT
    answers = (b'{"return": {}, "id": ID}\n', events + b'{"return": {}, "id": ID}\n' + OTHER_EVENT)
    with listening(qemu(*answers)) as path, connect(path) as monitor:
        monitor.execute("one")
        assert not monitor.wait_for_job(0.05)
        monitor.execute("two")
        assert monitor.wait_for_job(20)
        assert not monitor.wait_for_job(0.05)


def test_a_wait_ends_when_the_event_comes() -> None:
    release = threading.Event()

    def script(connection: socket.socket) -> None:
        connection.sendall(GREETING)
        connection.recv(4096)
        connection.sendall(b'{"return": {}}\n')
        release.wait(10)
        connection.sendall(JOB_EVENT)
        connection.recv(4096)

    with listening(script) as path, connect(path) as monitor:
        threading.Timer(0.1, release.set).start()
        assert monitor.wait_for_job(20)


def test_a_session_that_breaks_while_waiting_is_lost() -> None:
    release = threading.Event()

    def script(connection: socket.socket) -> None:
        connection.sendall(GREETING)
        connection.recv(4096)
        connection.sendall(b'{"return": {}}\n')
        release.wait(10)

    with listening(script) as path, connect(path) as monitor:
        threading.Timer(0.1, release.set).start()
        with pytest.raises(SourceLost, match="waiting for jobs: it closed the connection"):
            monitor.wait_for_job(20)


def test_a_session_that_breaks_as_it_begins_is_lost_or_unreachable() -> None:
    def script(connection: socket.socket) -> None:
        connection.sendall(GREETING)
        connection.recv(4096)
        connection.sendall(b'{"return": {}}\n')

    for _ in range(20):
        with (
            listening(script) as path,
            pytest.raises((SourceUnreachable, SourceLost), match=r"closed the connection|hung up|Broken pipe|reset"),
            connect(path) as monitor,
        ):
            monitor.execute("query-jobs")


def test_a_closed_session_stays_closed() -> None:
    with listening(qemu()) as path:
        monitor = connect(path)
        monitor.close()
        monitor.close()
        with pytest.raises(SourceLost, match="was closed"):
            monitor.execute("query-jobs")


@pytest.mark.parametrize("script", [says(b"garbage\n"), says(b""), qemu(None)], ids=["garbage", "silence", "hang-up"])
def test_a_broken_session_prints_nothing_and_leaks_nothing(script: Script) -> None:
    """In a program that configured no logging, with every warning an error."""
    program = """if True:
        import gc, pathlib, sys
        from drsync.errors import SourceError
        from drsync.source.monitor import Monitor
        try:
            with Monitor.connect("web", pathlib.Path(sys.argv[1]), timeout_s=0.5) as monitor:
                monitor.execute("query-jobs")
        except SourceError as err:
            print(type(err).__name__)
        gc.collect()
    """
    with listening(script) as path:
        command = [sys.executable, "-X", "dev", "-W", "error", "-c", program, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.stderr == ""
    assert done.stdout.strip() in {"NotQmp", "SourceBusy", "SourceLost"}
    assert done.returncode == 0
