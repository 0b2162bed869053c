"""Rule 35: keys and secrets are in key files and on the one line that prints a recovery key, and nowhere else.

Real commands run with -vv while somebody looks at /proc: argument lists, environments, logs, traces and reprs
are searched for every secret, as it is, in hex, base32 and base64.
"""

import base64
import json
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from command_line import Cli
from fake_clock import FakeClock
from key_service import MemoryKms
from shipped_vm import DiskStep, ShippedVm, Step

from drsync.config import load_config
from drsync.errors import DrsyncError
from drsync.format.keys import HostKeys, Keys, RecoveryKey, RootKey, RootKeys, VmKeys
from drsync.hostkeys import HostKeyFile
from drsync.keyfile import read_key_file
from drsync.log import Log
from drsync.repository import open_repository, read_record
from drsync.session import Session
from drsync.store.directory import DirectoryStore

PHRASE = "a passphrase that is long, and says: zyzzyva"
MIB = 1024 * 1024
FAILING = """
import sys
from drsync.overview import Overview
from drsync.cli import main

def broken(self, *_, **__):
    session = self._session
    log = session.log("web")
    keys, opened, secret = log.objects.keys, session.repository, log.objects.key.secret
    raise ZeroDivisionError(f"{log!r} {keys!r} {opened!r} {self!r} {session!r} {log.objects!r}")

Overview.points = broken
main()
"""


def encodings(secret: bytes) -> Iterator[bytes]:
    """How a secret could be written, also as a part of something longer."""
    yield secret
    yield secret.hex().encode()
    yield secret.hex().upper().encode()
    yield repr(secret)[2:-1].encode()
    yield base64.b32encode(secret).rstrip(b"=")[:-1]
    yield RecoveryKey(secret).to_text().encode()[: len(secret) * 8 // 5 // 4 * 5]  # in groups, as it is printed
    for shift in range(3):  # wherever it begins within the groups of three bytes
        inner = base64.b64encode(bytes(shift) + secret)[4 if shift else 0 :].rstrip(b"=")[:-2]
        yield inner
        yield inner.replace(b"+", b"-").replace(b"/", b"_")


def found_in(text: bytes, secrets: Iterable[bytes]) -> list[bytes]:
    return [form for secret in secrets for form in encodings(secret) if form in text]


def secrets_of(keys: Keys) -> list[bytes]:
    of_vms: Sequence[VmKeys]
    if isinstance(keys, HostKeys):
        roots, of_vms = [], list(keys.vms.values())
    else:
        roots, of_vms = [root.secret for root in keys.generations], []
    return [*roots, *(key.secret for vm in of_vms for key in vm.generations)]


@dataclass
class Watched:
    """What could be seen of processes from outside, and what they said."""

    seen: set[bytes] = field(default_factory=set)
    looks: int = 0

    @property
    def text(self) -> bytes:
        return b"\n".join(self.seen)

    def run(self, cli: Cli, *words: str, stdin: bytes = b"", code: int = 0, script: str = "") -> bytes:
        """Run a real command; its stdout, which is not searched: init and add print a key there."""
        start = ["-c", script] if script else ["-m", "drsync"]
        command = [sys.executable, *start, "--config", str(cli.config), "-vv", *words]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        done = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(process.pid, done))
        watcher.start()
        stdout, stderr = process.communicate(stdin, timeout=60)
        done.set()
        watcher.join()
        assert process.returncode == code, (words, stdout, stderr)
        self.seen.add(stderr)
        return stdout

    def _watch(self, pid: int, done: threading.Event) -> None:
        """Read what others can read of the process and of those that it starts, every few milliseconds."""
        while not done.wait(0.01):
            for path in (Path(f"/proc/{pid}"), *_children(pid)):
                for name in ("cmdline", "environ"):
                    try:
                        self.seen.add((path / name).read_bytes())
                        self.looks += 1
                    except OSError:
                        pass  # it has ended


def _children(pid: int) -> list[Path]:
    try:
        listed = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return []
    return [Path(f"/proc/{child}") for child in listed.split()]


@contextmanager
def environment_of(secret: str) -> Iterator[None]:
    os.environ["DRSYNC_TEST_SECRET"] = secret
    try:
        yield
    finally:
        del os.environ["DRSYNC_TEST_SECRET"]


def test_the_search_finds_what_it_looks_for(cli: Cli) -> None:
    """A test that can't fail proves nothing."""
    secret = bytes(range(7, 39))
    for number, form in enumerate(encodings(secret)):
        assert found_in(b"before" + form + b"behind", [secret]), number
    assert found_in(base64.b32encode(secret), [secret])
    assert found_in(base64.b64encode(b"xy" + secret + b"z"), [secret])
    assert found_in(repr(secret).encode(), [secret])
    watched = Watched()
    with environment_of(secret.hex()):
        watched.run(cli, "status", code=24)
    assert found_in(watched.text, [secret])


@pytest.mark.timeout(300)
def test_no_secret_is_seen_of_any_command(cli: Cli, tmp_path: Path) -> None:
    watched = Watched()
    shown = watched.run(cli, "init", "--json")
    recovery = RecoveryKey.from_text(json.loads(shown)["recovery_key"])
    typed = recovery.to_text().encode()
    first = read_key_file(cli.key_file)
    repository = open_repository(DirectoryStore(cli.repository), first, cli.key_file)
    vm = ShippedVm(tmp_path, repository=repository)
    step = Step(disks={"root": DiskStep(size_bytes=MIB, writes={0: 3})})
    vm.run([step])
    known = [recovery.secret, PHRASE.encode(), *secrets_of(first)]

    watched.run(cli, "key", "add", "passphrase", stdin=typed + b"\n" + PHRASE.encode() + b"\n")
    watched.run(cli, "key", "rotate", stdin=PHRASE.encode() + b"\n")
    keys = read_key_file(cli.key_file)
    assert isinstance(keys, RootKeys)
    assert keys.newest == 2
    vm.log = Log(open_repository(vm.store, keys, cli.key_file).vm("web"))
    vm.run([step])
    watched.run(cli, "verify", "--read-data")
    watched.run(cli, "restore", "web", "--to", "image", "--output", str(tmp_path / "out"))
    watched.run(cli, "key", "export", "web", "--output", str(tmp_path / "web.key"))
    host = read_key_file(tmp_path / "web.key")
    known += [*secrets_of(keys), *secrets_of(host)]
    known += [key.secret for key in keys.of_vm(repository.id, "web").generations]

    watched.run(cli, "key", "rotate", stdin=b"not the passphrase at all\n", code=27)
    cli.key_file.rename(tmp_path / "kept")
    watched.run(cli, "key", "recover", stdin=typed)
    assert cli.key_file.read_bytes() == (tmp_path / "kept").read_bytes()

    content = cli.key_file.read_bytes()
    cli.key_file.write_bytes(content[:-12])
    watched.run(cli, "status", code=24)
    cli.key_file.write_bytes(content)
    watched.run(cli, "points", "web", script=FAILING, code=1)
    assert b"ZeroDivisionError" in watched.text, "a trace of a bug was looked at, too"
    assert b"Traceback" in watched.text

    assert watched.looks > 50
    assert found_in(watched.text, known) == []
    stored = [path for path in cli.place.rglob("*") if path.is_file() and path not in {cli.key_file}]
    own = {tmp_path / "kept", tmp_path / "web.key"}
    for path in stored:
        assert path in own or found_in(path.read_bytes(), known) == [], path


def test_no_repr_of_anything_that_holds_a_key_shows_it(cli: Cli, tmp_path: Path) -> None:
    recovery = RecoveryKey.from_text(cli.ok("init", "--json").json["recovery_key"])
    session = Session(load_config(cli.config), FakeClock())
    kms = MemoryKms()
    host = HostKeyFile(cli.key_file, session.store, FakeClock(), lambda: kms)
    ring = host.keyring()
    opened = ring.open_with_recovery(recovery)
    rotation = ring.rotate(lambda: ring.open_with_recovery(recovery))
    keys = rotation.ring.roots
    of_host = keys.of_vms(session.repository.id, ["web"])
    objects = session.repository.vm("web")
    made = objects.keys.of_object(bytes(16), 1)
    things: list[object] = [session, session.repository, session.host_keys, objects, session.log("web"), host, ring]
    things += [opened, opened.secret, opened.slots, rotation, rotation.ring, keys, of_host, of_host.vms, recovery]
    things += [RootKey(keys.generations[0].secret), objects.key, objects.keys, made]
    known = [recovery.secret, opened.secret.authority, *secrets_of(keys), *secrets_of(of_host), objects.key.secret]
    known += [made.frame, made.index, made.content]
    for thing in things:
        for text in (repr(thing), str(thing), f"{thing!r:>5}", repr(vars(thing)) if hasattr(thing, "__dict__") else ""):
            assert found_in(text.encode(), known) == [], type(thing)


def test_no_error_of_a_key_shows_it(cli: Cli, tmp_path: Path) -> None:
    recovery = RecoveryKey.from_text(cli.ok("init", "--json").json["recovery_key"])
    content = cli.key_file.read_text()
    keys = read_key_file(cli.key_file)
    for damaged in (content[:-3], content + content, content.replace("root", "host"), content.replace(":", ";")):
        cli.key_file.write_text(damaged)
        with pytest.raises(DrsyncError) as caught:
            read_key_file(cli.key_file)
        chain: BaseException | None = caught.value
        while chain is not None:
            said = f"{chain!r} {chain} {getattr(chain, 'fields', '')} {chain.args}".encode()
            assert found_in(said, [recovery.secret, *secrets_of(keys)]) == []
            chain = chain.__cause__ or chain.__context__
    assert read_record(DirectoryStore(cli.repository))


def test_a_process_that_is_killed_by_its_own_fault_leaves_no_memory_behind(cli: Cli) -> None:
    script = (
        "import resource, signal, os\n"
        f"resource.setrlimit(resource.RLIMIT_CORE, ({resource.RLIM_INFINITY}, {resource.RLIM_INFINITY}))\n"
        "from drsync.overview import Overview\n"
        "from drsync.cli import main\n"
        "def told(self): raise SystemExit(str(resource.getrlimit(resource.RLIMIT_CORE)[0]))\n"
        "Overview.status = told\n"
        "main()\n"
    )
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    if hard != resource.RLIM_INFINITY:
        script = script.replace(f"({resource.RLIM_INFINITY}, {resource.RLIM_INFINITY})", f"({hard}, {hard})")
    command = [sys.executable, "-c", script, "--config", str(cli.config), "status"]
    assert subprocess.run(command, capture_output=True, text=True, check=False).stderr.strip() == "0"
