"""A libvirt domain without a system: disks that a test writes through QEMU's monitor, as a guest would.

It starts in a second, where a guest takes ten. The writes go through the devices of the
disks (qemu-io on their block backends), so everything that libvirt has put in between sees them.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self

import libvirt
import libvirt_qemu
from libvirt_guest import LibvirtGuest, Machine, SiteDisk
from libvirt_site import LibvirtSite, LibvirtSiteFailed

_END_TIMEOUT_S: Final = 30.0


class IdleDomain:
    """A domain; its disks are called by their targets. A context manager that starts it and ends it for good."""

    def __init__(
        self,
        site: LibvirtSite,
        name: str,
        sizes: Mapping[str, int],
        *,
        formats: Mapping[str, Literal["qcow2", "raw"]] | None = None,
        iothread: bool = False,
        directory: Path | None = None,
    ) -> None:
        """`sizes`: target → bytes. The images are empty, in `directory` or the site's."""
        self.site = site
        self.name = name
        self._formats = {target: (formats or {}).get(target, "qcow2") for target in sizes}
        self.paths = {t: (directory or site.images) / f"{name}-{t}.{f}" for t, f in self._formats.items()}
        self._driver = "iothread='1'" if iothread else ""
        for target, size_bytes in sizes.items():
            create = ["qemu-img", "create", "-q", "-f", self._formats[target], str(self.paths[target]), str(size_bytes)]
            subprocess.run(create, check=True)
        disks = [self.disk(target) for target in sizes]
        machine = Machine(memory_mib=32, top="<iothreads>1</iothreads>" if iothread else "")
        self.guest = LibvirtGuest(site, name, disks, machine)
        self._connection: Any = None

    def disk(self, target: str) -> SiteDisk:
        return SiteDisk(target=target, path=self.paths[target], format=self._formats[target], driver=self._driver)

    @property
    def state(self) -> str:
        return self.guest.state

    @property
    def running(self) -> bool:
        return self.state in {"running", "paused"}

    @property
    def pid(self) -> int:
        """QEMU's."""
        return int((self.site.path / "run" / "libvirt" / "qemu" / f"{self.name}.pid").read_text())

    @property
    def log(self) -> Path:
        """What QEMU has printed."""
        return self.site.path / "log" / "qemu" / f"{self.name}.log"

    def start(self) -> None:
        self.site.virsh("start", self.name)

    def stop(self) -> None:
        """End QEMU in good order: it saves its bitmaps."""
        self.site.power_off(self.name, "--graceful")

    def kill(self) -> None:
        """End QEMU as a power cut would."""
        os.kill(self.pid, signal.SIGKILL)
        deadline = time.monotonic() + _END_TIMEOUT_S
        while self.running:
            if time.monotonic() > deadline:
                raise TimeoutError("libvirt does not notice QEMU's end")
            time.sleep(0.02)

    def execute(self, command: str, **arguments: object) -> Any:
        """Run a command of QEMU's own, behind libvirt's back."""
        request = json.dumps({"execute": command, "arguments": arguments})
        return json.loads(self.site.virsh("qemu-monitor-command", self.name, request))["return"]

    def io(self, target: str, *commands: str) -> str:
        """Run qemu-io commands on a disk, as its guest: ``write -P 1 0 1M``, ``write -z 2M 1M``, ``discard 4M 1M``.

        Raises:
            AssertionError: one failed; the text has what was printed.
        """
        before = self.log.stat().st_size
        for command in commands:
            self._monitor(f'qemu-io -d {self._device(target)} "{command}"')
        output = self.log.read_bytes()[before:].decode(errors="replace")
        output = "".join(line for line in output.splitlines(keepends=True) if "Disconnect client" not in line)
        assert "failed" not in output, output
        assert "rror" not in output, output
        return output

    def read(self, target: str) -> bytes:
        """All of a small disk."""
        with suppress(LibvirtSiteFailed, libvirt.libvirtError):
            IdleDomain.io(
                self, target, "flush"
            )  # then what is in the files is all there is; a domain that is off has none
        copy = self.paths[target].with_suffix(".content")
        source = ["-U", "-f", self.top_format(target), str(self.top(target))]
        try:
            subprocess.run(["qemu-img", "convert", "-O", "raw", *source, str(copy)], check=True)
            return copy.read_bytes()
        finally:
            copy.unlink(missing_ok=True)

    def top(self, target: str) -> Path:
        """The image that is written now: a snapshot may have changed it."""
        lines = [line.split() for line in self.site.virsh("domblklist", self.name).splitlines()]
        return next(Path(words[1]) for words in lines if words and words[0] == target)

    def top_format(self, target: str) -> str:
        return self._formats[target] if self.top(target) == self.paths[target] else "qcow2"

    def job(self) -> str:
        """The domain's present job, as libvirt calls it; "None" without one."""
        return next(
            line.split()[-1] for line in self.site.virsh("domjobinfo", self.name).splitlines() if "type" in line
        )

    def migrate(self, there: LibvirtSite) -> None:
        """Move to another site while it runs; both reach the same images."""
        self._hang_up()
        self.site.virsh(
            *("migrate", "--live", "--persistent", "--undefinesource", "--unsafe", self.name, there.uri),
            *("--migrateuri", f"unix://{there.path}/memory"),
        )
        self.site = self.guest.site = there

    def close(self) -> None:
        self._hang_up()
        with suppress(LibvirtSiteFailed):
            self.site.power_off(self.name)
        with suppress(LibvirtSiteFailed):
            self.site.virsh("undefine", self.name, "--checkpoints-metadata", "--snapshots-metadata")

    def __enter__(self) -> Self:
        self.guest.define()
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _device(self, target: str) -> str:
        return f"/machine/peripheral/virtio-disk{ord(target[-1]) - ord('a')}/virtio-backend"

    def _monitor(self, command: str) -> str:
        """Run a command of QEMU's human monitor."""
        domain = self._found()
        said = libvirt_qemu.qemuMonitorCommand(domain, command, libvirt_qemu.VIR_DOMAIN_QEMU_MONITOR_COMMAND_HMP)
        assert "rror" not in said, said
        return str(said)

    def _found(self) -> Any:
        """The domain in libvirt, which may have been restarted."""
        if self._connection is not None:
            with suppress(libvirt.libvirtError):
                return self._connection.lookupByName(self.name)
            self._hang_up()
        self._connection = libvirt.open(self.site.uri)
        return self._connection.lookupByName(self.name)

    def _hang_up(self) -> None:
        if self._connection is not None:
            with suppress(libvirt.libvirtError):
                self._connection.close()
            self._connection = None
