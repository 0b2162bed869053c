"""A domain's checkpoints: libvirt's record of them, and the bitmaps that they stand for.

The two can part: QEMU crashes and the bitmap is lost, a migration takes the
bitmap along and leaves the record behind, an image is put back to an older
state. Every function here works with either half missing.
"""

import json
import logging
import subprocess
from collections.abc import Callable, Sequence
from typing import Any, Final

import libvirt

from drsync.model import CaptureId
from drsync.source.bitmap import Owner
from drsync.source.libvirt_connection import LibvirtDomain, LibvirtRefused, is_error
from drsync.source.libvirt_xml import DomainDisk, checkpoint_sizes, checkpoint_xml

log = logging.getLogger(__name__)

_QEMU_IMG_TIMEOUT_S: Final = 30.0


class Checkpoints:
    """Those of one running domain."""

    def __init__(self, domain: LibvirtDomain, owner: Owner, targets: Sequence[str]) -> None:
        """`targets` are all disks of the domain, also those that are not captured."""
        self._domain = domain
        self._owner = owner
        self._targets = targets

    def captures(self) -> list[CaptureId]:
        """The captures of ours that libvirt has checkpoints of."""
        names = self._domain.call(
            "virDomainListAllCheckpoints",
            lambda: [checkpoint.getName() for checkpoint in self._domain.handle.listAllCheckpoints()],
        )
        return [capture for name in names if (capture := self._owner.checkpoint_capture(name)) is not None]

    def dirty_bytes(self, capture: CaptureId, targets: Sequence[str]) -> dict[str, int]:
        """Bytes written since `capture`, of each of `targets` whose bitmap is whole: it has recorded every write.

        If libvirt knows nothing of the checkpoint, it is told: after a migration, or when the
        domain was defined anew, the bitmaps are still in the images.
        """
        name = self._owner.checkpoint(capture)
        checkpoint = self._find(name)
        if checkpoint is None:
            if not targets:
                return {}
            checkpoint = self._adopt(name, targets)
        sizes = self._sizes(checkpoint)
        return {target: sizes[target] for target in targets if target in sizes}

    def remove(self, capture: CaptureId) -> None:
        """Remove the checkpoint of `capture` and its bitmaps, from every disk that still has one."""
        name = self._owner.checkpoint(capture)
        checkpoint = self._find(name)
        if checkpoint is not None:
            try:
                self._domain.call("virDomainCheckpointDelete", checkpoint.delete)
            except LibvirtRefused as err:
                log.info("vm=%s checkpoint=%s is removed disk by disk: %s", self._domain.vm, name, err.text)
                self._forget(checkpoint)
            else:
                return
        for target in self._targets:
            self.remove_bitmap(name, target)

    def remove_bitmap(self, name: str, target: str) -> None:
        """Remove one disk's bitmap that libvirt has no record of, if it is there."""
        try:
            checkpoint = self._adopt(name, [target])
        except LibvirtRefused as err:
            log.debug("vm=%s checkpoint=%s can't stand for disk %s: %s", self._domain.vm, name, target, err.text)
            return
        try:
            self._domain.call("virDomainCheckpointDelete", checkpoint.delete)
        except LibvirtRefused:  # the bitmap isn't there, or its image can't be written now
            self._forget(checkpoint)

    def forget(self, capture: CaptureId) -> None:
        """Remove libvirt's record of `capture` and leave the bitmaps: all that libvirt can do while a domain is off."""
        checkpoint = self._find(self._owner.checkpoint(capture))
        if checkpoint is not None:
            self._forget(checkpoint)

    def stored(self, disks: Sequence[DomainDisk]) -> list[tuple[CaptureId, str]]:
        """Our bitmaps that lie in the images of local disks, as (capture, target).

        The images name the bitmaps of earlier runs of QEMU, also those that libvirt has
        forgotten; what was made in this run, libvirt knows itself.
        """
        found = []
        for disk in disks:
            if disk.top.path is not None and disk.keeps_bitmaps:
                captures = map(self._owner.checkpoint_capture, _stored_names(str(disk.top.path)))
                found += [(capture, disk.target) for capture in captures if capture is not None]
        return found

    def _find(self, name: str) -> Any:
        try:
            return self._domain.call(
                "virDomainCheckpointLookupByName", lambda: self._domain.handle.checkpointLookupByName(name)
            )
        except LibvirtRefused as err:
            if is_error(err, "VIR_ERR_NO_DOMAIN_CHECKPOINT"):
                return None
            raise

    def _adopt(self, name: str, targets: Sequence[str]) -> Any:
        """Tell libvirt of a checkpoint that it doesn't know; whether the bitmaps are there is not looked at."""
        others = [target for target in self._targets if target not in targets]

        def redefine() -> Any:
            xml = checkpoint_xml(name, targets, others, domain=self._domain.handle.XMLDesc(0))
            return self._domain.handle.checkpointCreateXML(xml, libvirt.VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE)

        return self._domain.call("virDomainCheckpointCreateXML", redefine)

    def _sizes(self, checkpoint: Any) -> dict[str, int]:
        flags = libvirt.VIR_DOMAIN_CHECKPOINT_XML_SIZE | libvirt.VIR_DOMAIN_CHECKPOINT_XML_NO_DOMAIN
        ask: Callable[[], str] = lambda: checkpoint.getXMLDesc(flags)  # noqa: E731  named for its type
        return checkpoint_sizes(self._domain.call("virDomainCheckpointGetXMLDesc", ask))

    def _forget(self, checkpoint: Any) -> None:
        """Remove libvirt's record alone."""
        metadata_only = libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY
        self._domain.call("virDomainCheckpointDelete", lambda: checkpoint.delete(metadata_only))


def _stored_names(image: str) -> list[str]:
    """The names of the bitmaps in an image, which QEMU may have open."""
    command = ["qemu-img", "info", "-U", "--output=json", "-f", "qcow2", image]
    try:
        done = subprocess.run(command, capture_output=True, check=True, timeout=_QEMU_IMG_TIMEOUT_S)  # noqa: S603  no shell
        bitmaps = json.loads(done.stdout)["format-specific"]["data"].get("bitmaps", [])
        return [str(bitmap["name"]) for bitmap in bitmaps]
    except (OSError, subprocess.SubprocessError, ValueError, LookupError, TypeError) as err:
        log.debug("can't list the bitmaps in %s: %s", image, err)
        return []
