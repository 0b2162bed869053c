"""A libvirt host of our own on this machine, and as many of them as a test wants: a site to protect, and one to lose.

    LibvirtSite A ── libvirtd ── QEMU, QEMU …      mount namespace: /etc/libvirt, /var/lib/libvirt, /var/log/libvirt,
       │ path/images/*.qcow2                       /var/cache/libvirt and /run are the site's own directories
       └ kill(): libvirtd and all of its QEMUs are gone at once, as the host's power would be
    LibvirtSite B ── libvirtd                      another host for libvirt: it has its own UUID

No systemd, no virtlogd; nothing of the machine's own libvirt is seen or changed. A
path below `path` is the same file for libvirt, QEMU, drsync and the test. Needs root.
"""

import os
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Self

PROGRAMS: Final = ("libvirtd", "virsh", "qemu-system-x86_64", "unshare")
_CAPABILITIES: Final = Path(__file__).parents[1] / ".lab" / "libvirt-capabilities"
"""What libvirtd found out of the machine's QEMUs, which takes it 5 s or more; it asks anew when they change."""
_START_TIMEOUT_S: Final = 120.0
_STOP_TIMEOUT_S: Final = 20.0
_POWER_OFF_TIMEOUT_S: Final = 120.0
_SCRIPT: Final = """
set -e
mount --bind "$0/etc" /etc/libvirt
mount --bind "$0/lib" /var/lib/libvirt
mount --bind "$0/log" /var/log/libvirt
mount --bind "$0/cache" /var/cache/libvirt
mount --bind "$0/run" /run
if [ -e /dev/kvm ]; then
    : > "$0/no-kvm"
    mount --bind "$0/no-kvm" /dev/kvm
    mount -o remount,bind,ro /dev/kvm
fi
exec libvirtd --pid-file "$0/run/libvirtd.pid"
"""
"""Directories of its own, and no KVM: a machine may have a /dev/kvm that can't be used, and libvirtd would then find
what it knows of QEMU out of date at every call and ask it again for seconds. The file in its place can't be written to,
which is what both look at."""
_QEMU_CONF: Final = {
    "user": '"root"',
    "group": '"root"',
    "dynamic_ownership": "0",
    "remember_owner": "0",
    "security_driver": '"none"',
    "namespaces": "[ ]",
    "cgroup_controllers": "[ ]",
    "stdio_handler": '"file"',
}
"""As little around QEMU as can be; with stdio_handler "file" virtlogd is not needed."""


class LibvirtSiteFailed(Exception):
    """libvirtd does not start here, or virsh was refused; the text has what was printed."""


class LibvirtSite:
    """One libvirt host. A context manager that destroys it at the end."""

    def __init__(self, *, qemu_conf: Mapping[str, str] | None = None, own_network: bool = False) -> None:
        """Start it. `qemu_conf` replaces settings of qemu.conf, values as they are written there.

        With `own_network` it has a network namespace of its own, so that virtual networks can be
        started without touching the machine's; nobody outside reaches its addresses then.

        Raises:
            LibvirtSiteFailed: it does not start here.
        """
        self.path = Path(tempfile.mkdtemp(prefix="drsync-site-"))  # short: sockets have short paths
        """The site's directory; images belong below `images`."""
        self.path.chmod(0o711)
        self.host_uuid = str(uuid.uuid4())
        self.images = self.path / "images"
        self._log = self.path / "libvirtd.log"
        self._unshare = ["unshare", "--mount", *(["--net"] if own_network else [])]
        self._namespaces: set[str] = set()
        self._process: subprocess.Popen[bytes] | None = None
        for name in ("etc", "lib", "log", "cache/qemu/capabilities", "run/libvirt", "images"):
            (self.path / name).mkdir(parents=True)
        _copy_new(_CAPABILITIES, self._capabilities)
        settings = {**_QEMU_CONF, **(qemu_conf or {})}
        (self.path / "etc" / "qemu.conf").write_text("".join(f"{key} = {value}\n" for key, value in settings.items()))
        (self.path / "etc" / "libvirtd.conf").write_text(f'auth_unix_rw = "none"\nhost_uuid = "{self.host_uuid}"\n')
        try:
            self.start()
        except BaseException:
            self.destroy()
            raise

    @property
    def socket(self) -> Path:
        """Where libvirtd listens."""
        return self.path / "run" / "libvirt" / "libvirt-sock"

    @property
    def uri(self) -> str:
        """How drsync, virsh and libvirt's clients on this machine reach the site."""
        return f"qemu:///system?socket={self.socket}"

    @property
    def peer_uri(self) -> str:
        """How another site's libvirtd reaches this one, for a peer-to-peer migration."""
        return f"qemu+unix:///system?socket={self.socket}"

    @property
    def inside(self) -> list[str]:
        """How a command begins that shall run on this host, where /var/lib/libvirt, /run … are its own."""
        if self._process is None:
            raise LibvirtSiteFailed("libvirtd does not run")
        return ["nsenter", f"--target={self._process.pid}", "--mount", "--net"]

    @property
    def running(self) -> bool:
        """Whether libvirtd runs; its QEMUs live on without it."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start libvirtd, which finds the QEMUs again that an earlier one started."""
        if self.running:
            raise LibvirtSiteFailed("libvirtd runs already")
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*self._unshare, "sh", "-c", _SCRIPT, str(self.path)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C ends the tests, which then end it in good order
            )
        self._wait_until_up(self._process)
        self._namespaces.add(_mount_namespace(self._process.pid))
        _copy_new(self._capabilities, _CAPABILITIES)

    def stop_daemon(self) -> None:
        """End libvirtd alone, as an update of its package would; its QEMUs run on."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(timeout=_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def kill(self) -> None:
        """End libvirtd and every process that it started, at once and by SIGKILL: the host has lost its power."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        while pids := self._pids():
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        self._namespaces.clear()  # the kernel gives their names to others now: a second kill would hit another site

    def destroy(self) -> None:
        """The site is gone: its processes are killed, its files removed. Safe to call twice."""
        self.kill()
        shutil.rmtree(self.path, ignore_errors=True)

    def virsh(self, *arguments: str | Path, script: str = "") -> str:
        """Run virsh with arguments, or with a script of several commands; its output.

        Raises:
            LibvirtSiteFailed: it was refused.
        """
        command = ["virsh", "-q", "-c", self.uri, *arguments]
        done = subprocess.run(
            command, input=script, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        if done.returncode:
            raise LibvirtSiteFailed(f"{' '.join(map(str, arguments)) or 'virsh'}: {done.stdout[-2000:]}")
        return done.stdout

    def define(self, xml: str, *, kind: str = "") -> None:
        """Define a domain from its XML; `kind` "net", "pool" … defines something else."""
        file = self.path / "definition.xml"
        file.write_text(xml)
        self.virsh(f"{kind}-define" if kind else "define", file)

    def power_off(self, name: str, *options: str) -> None:
        """End a domain, whatever state it is in, and return when its QEMU is gone; `--graceful` lets QEMU end itself.

        libvirt gives up after some seconds, and leaves the domain running, if QEMU waits for a busy
        disk or another job has the domain: it is told again then.

        Raises:
            LibvirtSiteFailed: it runs still; the text has libvirt's last reason.
        """
        deadline = time.monotonic() + _POWER_OFF_TIMEOUT_S
        while name in self.running_domains():
            try:
                self.virsh("destroy", *options, name)
            except LibvirtSiteFailed as err:
                if time.monotonic() > deadline and name in self.running_domains():
                    raise LibvirtSiteFailed(f"{name} can't be ended: {err}\n{self.log()}") from err
                time.sleep(0.2)

    def running_domains(self) -> list[str]:
        """The names of the domains that have a QEMU, paused ones too."""
        return self.virsh("list", "--name").splitlines()

    def log(self) -> str:
        """The last that libvirtd said."""
        return self._log.read_text(errors="replace")[-4000:]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.destroy()

    def _wait_until_up(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while subprocess.run(["virsh", "-q", "-c", self.uri, "version"], capture_output=True, check=False).returncode:
            if process.poll() is not None or time.monotonic() > deadline:
                raise LibvirtSiteFailed(f"libvirtd does not start here: {self.log()[-500:]}")
            time.sleep(0.05)

    @property
    def _capabilities(self) -> Path:
        return self.path / "cache" / "qemu" / "capabilities"

    def _pids(self) -> list[int]:
        """Every living process in this site's mount namespaces, however it was started."""
        return [
            int(entry.name)
            for entry in Path("/proc").iterdir()
            if entry.name.isdecimal() and _mount_namespace(int(entry.name)) in self._namespaces
        ]


def _copy_new(source: Path, target: Path) -> None:
    """Copy the files that `target` has not; a test beside this one sees whole files only."""
    target.mkdir(parents=True, exist_ok=True)
    for file in source.glob("*.xml"):
        if not (target / file.name).exists():
            partial = target / f".{file.name}.{os.getpid()}"
            shutil.copyfile(file, partial)
            partial.replace(target / file.name)


def _mount_namespace(pid: int) -> str:
    """The name of the mount namespace that a process is in; empty if it has ended."""
    with suppress(OSError):
        return str(Path(f"/proc/{pid}/ns/mnt").readlink())
    return ""
