"""localstack/start.sh and stop.sh, as a person would use them."""

import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from s3_lab import ROOT, make_client

pytestmark = pytest.mark.localstack

LISTENING = "0A"


def script(name: str, port: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", ROOT / "localstack" / name, *arguments],
        env={**os.environ, "LOCALSTACK_PORT": str(port)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        free: int = probe.getsockname()[1]
    yield free
    script("stop.sh", free)


def listeners(port: int) -> set[str]:
    """The local addresses, as the kernel writes them, that a TCP port is listened on."""
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            address, number = local.split(":")
            if state == LISTENING and int(number, 16) == port:
                found.add(address)
    return found


def in_tmp() -> set[str]:
    """What LocalStack has in the place where it would keep S3's objects, left alone."""
    return {path.name for path in Path("/tmp").iterdir() if "localstack" in path.name}  # noqa: S108 - looked at only


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or waits only for its parent to notice."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("Z")
    except FileNotFoundError:
        return True


def test_it_starts_once_on_loopback_only_and_keeps_to_its_directory_and_stops(port: int) -> None:
    before = in_tmp()
    started = script("start.sh", port)
    assert started.returncode == 0, started.stderr
    endpoint_url = started.stdout.strip()
    assert endpoint_url == f"http://127.0.0.1:{port}"
    assert listeners(port) == {"0100007F"}, "it listens elsewhere than on 127.0.0.1"

    pid = int((ROOT / f".lab/localstack/{port}/pid").read_text())
    began = time.monotonic()
    again = script("start.sh", port)
    assert (again.returncode, again.stdout) == (0, started.stdout)
    assert time.monotonic() - began < 5
    assert int((ROOT / f".lab/localstack/{port}/pid").read_text()) == pid

    client = make_client(endpoint_url)
    client.create_bucket(Bucket="some-bucket")
    client.put_object(Bucket="some-bucket", Key="large", Body=bytes(2**20))
    client.close()
    assert (ROOT / f".lab/localstack/{port}/root/s3/some-bucket").is_dir()
    assert in_tmp() <= before

    assert script("stop.sh", port).returncode == 0
    assert listeners(port) == set()
    assert has_ended(pid)
    assert not (ROOT / f".lab/localstack/{port}").exists()
    assert script("stop.sh", port).returncode == 0


def test_a_port_of_something_else_is_refused_with_a_way_out() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused = script("start.sh", port)
    assert refused.returncode != 0
    assert f"port {port} is taken" in refused.stderr
    assert f"LOCALSTACK_PORT={port + 1}" in refused.stderr


def test_stop_ends_no_process_that_start_did_not_start(port: int) -> None:
    state = ROOT / f".lab/localstack/{port}"
    state.mkdir(parents=True)
    with subprocess.Popen(["sleep", "60"]) as other:
        try:
            (state / "pid").write_text(f"{other.pid}\n")
            assert script("stop.sh", port).returncode == 0
            assert other.poll() is None
        finally:
            other.kill()


def test_a_running_one_that_is_not_ours_is_used_as_it_is(localstack: str) -> None:
    port = int(localstack.rsplit(":", 1)[1])
    found = script("start.sh", port)
    assert (found.returncode, found.stdout.strip()) == (0, localstack.replace("localhost", "127.0.0.1"))
    with urllib.request.urlopen(f"{localstack}/_localstack/health", timeout=10) as reply:  # noqa: S310 - ours
        assert reply.status == 200


def test_compose_and_host_mode_are_the_same_release() -> None:
    pinned = (ROOT / "localstack/requirements.txt").read_text().splitlines()
    assert "localstack-core==4.12.0" in pinned
    assert "build: ." in (ROOT / "localstack/compose.yaml").read_text()
    assert "FROM localstack/localstack:4.12.0" in (ROOT / "localstack/Dockerfile").read_text()


def test_every_package_is_pinned() -> None:
    for name in ("requirements.txt", "requirements-build.txt"):
        for line in (ROOT / "localstack" / name).read_text().splitlines():
            assert line.startswith("#") or "==" in line, line
