"""Who QEMU is on a libvirt host: the user that must be able to write layers, and what else confines it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from drsync.source.libvirt_connection import connected
from drsync.source.libvirt_xml import parse


@dataclass(frozen=True, slots=True, kw_only=True)
class QemuAccess:
    """What libvirt says of the QEMUs that it starts."""

    uid: int
    gid: int
    confined_by: Sequence[str]
    """Security models beside users and groups: "apparmor", "selinux"."""


def qemu_access(uri: str) -> QemuAccess:
    """Ask libvirt's capabilities.

    Raises:
        LibvirtUnreachable: it does not answer.
    """
    with connected(uri) as connection:
        root = parse(connection.getCapabilities())
    uid = gid = 0
    confined_by = []
    for model in root.iterfind("./host/secmodel"):
        name = model.findtext("model", "")
        if name == "dac":
            label = re.fullmatch(r"\+?(\d+):\+?(\d+)", model.findtext("baselabel", ""))
            uid, gid = (int(label[1]), int(label[2])) if label else (0, 0)
        elif name:
            confined_by.append(name)
    return QemuAccess(uid=uid, gid=gid, confined_by=confined_by)
