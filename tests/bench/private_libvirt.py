"""A libvirtd of our own: no systemd, nothing of the machine's libvirt is used or changed.

It runs in a mount namespace in which its directories are ours, so its domains,
checkpoints and settings are gone with the directory. Needs root.
"""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from bench.tools import NotMeasured

_START_TIMEOUT_S = 60.0  # its first answer takes seconds: it asks QEMU what it can do
_SCRIPT = """
set -e
mount --bind "$0/etc" /etc/libvirt
mount --bind "$0/lib" /var/lib/libvirt
mount --bind "$0/log" /var/log/libvirt
mount --bind "$0/cache" /var/cache/libvirt
mount --bind "$0/run" /run
exec libvirtd --pid-file "$0/run/libvirtd.pid"
"""
_QEMU_CONF = """
user = "root"
group = "root"
dynamic_ownership = 0
remember_owner = 0
security_driver = "none"
namespaces = [ ]
cgroup_controllers = [ ]
stdio_handler = "file"
"""
"""As little around QEMU as can be; with stdio_handler "file" virtlogd is not needed."""


class PrivateLibvirt:
    """A running libvirtd; `close` ends it and every QEMU that it started."""

    def __init__(self) -> None:
        """Start it.

        Raises:
            NotMeasured: it does not start here.
        """
        self.directory = Path(tempfile.mkdtemp(prefix="drsync-libvirt-"))  # short: sockets have short paths
        for name in ("etc", "lib", "log", "cache", "run/libvirt"):
            (self.directory / name).mkdir(parents=True)
        (self.directory / "etc" / "qemu.conf").write_text(_QEMU_CONF)
        (self.directory / "etc" / "libvirtd.conf").write_text('auth_unix_rw = "none"\n')
        # Not "qemu+unix": virtnbdbackup takes that for a remote host.
        self.uri = f"qemu:///system?socket={self.directory}/run/libvirt/libvirt-sock"
        self._log = self.directory / "libvirtd.log"
        with self._log.open("wb") as log:
            command = ["unshare", "--mount", "sh", "-c", _SCRIPT, str(self.directory)]
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            self._wait_until_up()
        except BaseException:
            self.close()
            raise

    def _wait_until_up(self) -> None:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while subprocess.run(["virsh", "-q", "-c", self.uri, "version"], capture_output=True, check=False).returncode:
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise NotMeasured(f"libvirtd does not start here: {self._log.read_text(errors='replace')[-500:]}")
            time.sleep(0.1)

    def virsh(self, *arguments: str | Path, script: str = "") -> str:
        """Run virsh with arguments, or with a script of several commands; its output."""
        command = ["virsh", "-q", "-c", self.uri, *arguments]
        done = subprocess.run(
            command, input=script, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"{' '.join(map(str, arguments)) or 'virsh'}: {done.stdout[-2000:]}")
        return done.stdout

    def close(self) -> None:
        """End libvirtd and its QEMUs; their directories go with them."""
        pid_files = list((self.directory / "run" / "libvirt" / "qemu").glob("*.pid"))
        qemus = [int(path.read_text()) for path in pid_files if path.stem != "driver"]
        self._process.terminate()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for pid in qemus:  # only those that nobody destroyed
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.directory, ignore_errors=True)
