"""Points of libvirt domains, captured through a QMP socket of their own, with what libvirt's source writes of them."""

import hashlib
import subprocess
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import msgspec
import zstandard
from command_line import Cli
from forwarding_source import ForwardingSource
from libvirt_guest import LibvirtGuest, Machine, SiteDisk
from libvirt_site import LibvirtSite
from qmp_socket import QmpSocket
from storage_daemon import DaemonDisk, StorageDaemon

from drsync.capture import CaptureOptions, Outcome, run_cycle
from drsync.config import load_config
from drsync.model import NoProgress, SystemClock
from drsync.session import Session
from drsync.source import CaptureResult, Source
from drsync.source.qmp import QmpOptions, QmpSource

QEMU = "http://libvirt.org/schemas/domain/qemu/1.0"


def session_of(cli: Cli) -> Session:
    return Session(load_config(cli.config), SystemClock())


def copy_disk(image: Path, disk: Path) -> Path:
    subprocess.run(["cp", "--reflink=auto", "--sparse=always", image, disk], check=True)
    return disk


class QmpGuest(LibvirtGuest):
    """A guest that has a QMP socket for drsync beside libvirt's own, in a directory that outlives its site."""

    def __init__(self, site: LibvirtSite, name: str, disks: Sequence[SiteDisk], sockets: Path, **changes: Any) -> None:
        super().__init__(site, name, disks, **changes)
        self.qmp_socket = sockets / f"{name}.qmp"

    def xml(self) -> str:
        arguments = ("-qmp", f"unix:{self.qmp_socket},server=on,wait=off")
        line = "".join(f"<qemu:arg value='{word}'/>" for word in arguments)
        xml = super().xml().replace("<domain ", f"<domain xmlns:qemu='{QEMU}' ", 1)
        return xml.replace("</domain>", f"<qemu:commandline>{line}</qemu:commandline></domain>")


class DefinedSource(ForwardingSource):
    """A Source whose points have another definition than QMP gives."""

    def __init__(self, inner: Source, definition: Mapping[str, object]) -> None:
        super().__init__(inner)
        self._definition = definition

    def capture(self, *arguments: Any, **named: Any) -> CaptureResult:
        return replace(super().capture(*arguments, **named), definition=self._definition)


def file_of(role: str, content: bytes) -> Mapping[str, object]:
    """A small file, as a definition holds it."""
    return {
        "role": role,
        "encoding": "zstd+base64",
        "size_bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "data": b64encode(zstandard.compress(content)).decode(),
    }


def definition_of(
    guest: LibvirtGuest, *, files: Sequence[Mapping[str, object]] = (), **changes: object
) -> Mapping[str, object]:
    """What a point knows of a domain, asked of its site."""
    site = guest.site
    known: dict[str, object] = {
        "source": "libvirt",
        "domain": {
            "name": guest.name,
            "uuid": guest.machine.uuid,
            "xml": site.virsh("dumpxml", "--inactive", "--security-info", guest.name),
            "live_xml": site.virsh("dumpxml", guest.name),
            "running": True,
            "autostart": "Autostart:      enable" in site.virsh("dominfo", guest.name),
            "persistent": True,
        },
        "host": {"libvirt": "9.0.0", "qemu": "7.2", "arch": "x86_64", "machine": "pc-i440fx-7.2", "cpu": None},
        "disks": {d.target: {"target": d.target, "source": str(d.path), "format": d.format} for d in guest.disks},
        "excluded": [],
        "networks": {},
        "pools": {},
        "files": list(files),
    }
    return msgspec.to_builtins({**known, **changes})  # type: ignore[no-any-return]  # a dict stays one


def capture(cli: Cli, guest: QmpGuest, definition: Mapping[str, object]) -> Outcome:
    """One point of a running guest."""
    return capture_from(cli, guest.name, guest.qmp_socket, nodes_of(guest), definition)


def capture_from(
    cli: Cli, vm: str, socket: Path, disks: Mapping[str, str], definition: Mapping[str, object]
) -> Outcome:
    """One point of whatever answers at a QMP socket."""
    session = session_of(cli)
    options = QmpOptions(vm=vm, socket=socket, repository_tag=session.repository.tag, disks=disks)
    return run_cycle(
        session.log(vm),
        session.spool.vm(vm),
        session.spool.writer_id(),
        lambda: DefinedSource(QmpSource(options), definition),
        SystemClock(),
        NoProgress(),
        CaptureOptions(),
    )


def nodes_of(guest: QmpGuest) -> Mapping[str, str]:
    """Target (vda) → block node, as libvirt named them in this run."""
    files = {str(disk.path): disk.target for disk in guest.disks}
    with QmpSocket(guest.qmp_socket) as qmp:
        inserted = [device["inserted"] for device in qmp.execute("query-block") if "inserted" in device]
    return {
        files[node["image"]["filename"]]: node["node-name"] for node in inserted if node["image"]["filename"] in files
    }


def make_point(
    cli: Cli,
    site: LibvirtSite,
    name: str,
    disk: Path,
    devices: str = "",
    *,
    system: str = "",
    files: Sequence[Mapping[str, object]] = (),
    uuid: str = "",
) -> None:
    """A point of a domain that is defined at `site` and off: 8 MiB, of which the first one is written."""
    machine = Machine(uuid=uuid or str(uuid4()), devices=devices, os=system)
    guest = QmpGuest(site, name, [SiteDisk(target="vda", path=disk)], site.path, machine=machine)
    guest.define()
    place = cli.place / name
    place.mkdir(exist_ok=True)
    with StorageDaemon(place, [DaemonDisk(name="vda", size_bytes=8 << 20)]) as daemon:
        daemon.io("vda", "write -P 7 0 1M")
        capture_from(cli, name, daemon.qmp_socket, {"vda": "d-vda"}, definition_of(guest, files=files))
