"""The QEMUs of a configuration's VMs: how drsync gets at them, and whether it may."""

import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from drsync.config import LibvirtSource, VmSettings
from drsync.errors import CaptureRunning, DrsyncError, SourceError
from drsync.model import Clock
from drsync.protection import Protection, libvirt_needed
from drsync.source import Source
from drsync.spool import Spool

_LOGGER = logging.getLogger(__name__)


class Reach:
    """Thread-safe, for different VMs at a time."""

    def __init__(self, spool: Spool, protection: Protection, clock: Clock) -> None:
        """`spool` has the directories that QEMU writes to and is read through."""
        self._spool = spool
        self._protection = protection
        self._clock = clock

    def open(self, vm: VmSettings, repository_tag: str) -> Source:
        """A session with the VM's QEMU; what it makes there bears the tag."""
        if isinstance(vm.source, LibvirtSource):
            return self._open_domain(vm, vm.source, repository_tag)
        from drsync.source.qmp import QmpOptions, QmpSource  # noqa: PLC0415 - reading needs no QEMU

        return QmpSource(
            QmpOptions(
                vm=vm.name,
                socket=vm.source.socket,
                repository_tag=repository_tag,
                disks=vm.source.disks,
                live_directory=self._spool.vm(vm.name).live_directory,
            )
        )

    def _open_domain(self, vm: VmSettings, source: LibvirtSource, repository_tag: str) -> Source:
        with libvirt_needed(vm.name):
            from drsync.source.libvirt_pull import PullOptions  # noqa: PLC0415 - as libvirt_needed
            from drsync.source.libvirt_scratch import ScratchLimits  # noqa: PLC0415 - as libvirt_needed
            from drsync.source.libvirt_source import open_source  # noqa: PLC0415 - as libvirt_needed
            from drsync.source.libvirt_survey import LibvirtOptions  # noqa: PLC0415 - as libvirt_needed

        spool = self._spool.vm(vm.name)
        limits = ScratchLimits(keep_free_bytes=spool.keep_free_bytes)
        options = LibvirtOptions(
            vm=vm.name,
            domain=source.domain or vm.name,
            uri=source.uri,
            repository_tag=repository_tag,
            layers=spool.path,
            exclude=source.exclude,
            pull=PullOptions(directory=spool.live_directory, scratch=limits),
        )
        return open_source(options, clock=self._clock)

    def end_dead_reading(self) -> None:
        """End what a dead process left that read a domain live; what does not work now is logged, and tried again."""
        left = list(self._spool.path.glob("*/.live"))
        if left:
            with suppress(SourceError):  # it may be of a VM that a pattern finds
                self._protection.look()
        for vm in self._protection.vms if left else ():
            directory = self._spool.vm(vm.name).live_directory
            if isinstance(vm.source, LibvirtSource) and directory.exists():
                self._end_dead_reading(vm.name, vm.source, directory)

    def _end_dead_reading(self, vm_name: str, source: LibvirtSource, directory: Path) -> None:
        try:
            with libvirt_needed(vm_name), self._spool.vm(vm_name).locked():
                from drsync.source.libvirt_guard import end_dead_job  # noqa: PLC0415 - as libvirt_needed

                end_dead_job(vm_name, source.uri, source.domain or vm_name, directory)
        except CaptureRunning:
            pass  # a live process reads it
        except DrsyncError as err:
            _LOGGER.warning("vm=%s a backup in pull mode may still run: %s", vm_name, err)

    def check_access(self, vm: VmSettings) -> Sequence[str]:
        """Check that the VM's QEMU can write layers; what else there is to know of it, for people.

        Raises:
            SpoolClosed: its user can't pass through to the spool.
        """
        if not isinstance(vm.source, LibvirtSource):
            return []
        with libvirt_needed(vm.name):
            from drsync.source.libvirt_access import qemu_access  # noqa: PLC0415 - as libvirt_needed
        access = qemu_access(vm.source.uri)
        self._spool.vm(vm.name).check_passable(access.uid, access.gid)
        if "apparmor" in access.confined_by:
            return [f"AppArmor confines QEMU; if it denies {self._spool.path}, docs/libvirt.md has the rule"]
        return []
