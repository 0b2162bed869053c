"""Which VMs are protected: `[[vm]]` one by one, `[[protect]]` by pattern, and what is asked of their points."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

from drsync.config.key import (
    Key,
    one_of,
    read_at_least_1s,
    read_disks,
    read_name,
    read_path,
    read_switch,
    read_text,
    read_texts,
    read_uri,
    shown,
)
from drsync.model import Consistency, OnFreezeFailure


@dataclass(frozen=True, slots=True, kw_only=True)
class QmpSource:
    """`source = "qmp"`: a QMP socket of drsync's own, to qemu-system or qemu-storage-daemon."""

    socket: Annotated[
        Path,
        Key(
            name="socket",
            parse=read_path,
            required=True,
            meaning="The UNIX socket given to QEMU with `-qmp unix:SOCKET,server=on,wait=off`, for drsync alone.",
            why="QEMU serves one client at a time on a QMP socket, so every VM has one for drsync.",
        ),
    ]
    disks: Annotated[
        Mapping[str, str] | None,
        Key(
            name="disks",
            parse=read_disks,
            meaning="The disks to protect: name in the repository = QEMU's block node name.",
            why="Left out: all writable disks, named after their device.",
        ),
    ]
    agent: Annotated[
        Path | None,
        Key(
            name="agent",
            parse=read_path,
            meaning="The UNIX socket of the channel to the guest's qemu-ga, for drsync alone (docs/consistency.md).",
            why='Needed only for `consistency = "filesystem"`. libvirt has the channel of its domains itself.',
        ),
    ]


LibvirtUriKey = Annotated[
    str,
    Key(
        name="uri",
        parse=read_uri,
        default="qemu:///system",
        meaning="How libvirt is reached. It must be this host's: QEMU writes into the spool.",
        why="libvirt's daemon for the whole system, where servers run their VMs.",
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class LibvirtSource:
    """`source = "libvirt"`: a domain that libvirt manages."""

    domain: Annotated[
        str | None,
        Key(
            name="domain",
            parse=read_text,
            meaning="The domain's name or UUID in libvirt.",
            why="Left out: the VM's name.",
        ),
    ]
    uri: LibvirtUriKey
    exclude: Annotated[
        Sequence[str],
        Key(
            name="exclude",
            parse=read_texts,
            default="[]",
            meaning='Disks that are not protected, by their `<target dev="...">`.',
            why="All writable disks with a medium; CD-ROMs, read-only and transient disks are left out anyway.",
        ),
    ]


SourceSettings = QmpSource | LibvirtSource

SOURCES: Final[Mapping[str, type[QmpSource] | type[LibvirtSource]]] = {"qmp": QmpSource, "libvirt": LibvirtSource}
"""What `source` may be, and which class holds the keys that only this source has."""


def _source(value: object) -> str:
    if not isinstance(value, str) or value not in SOURCES:
        raise ValueError(f"{shown(value)} is not a source; use {' or '.join(map(shown, SOURCES))}")
    return value


def _libvirt_only(value: object) -> str:
    if value != "libvirt":
        raise ValueError(f'{shown(value)} is not a source that VMs can be looked for in; use "libvirt"')
    return "libvirt"


RpoKey = Annotated[
    float,
    Key(
        name="rpo",
        parse=read_at_least_1s,
        default="5m",
        meaning="Recovery point objective: how much of the newest work a disaster may cost. At least 1s. The daemon "
        "captures so often that no point gets older before the next one is in the repository: it measures how long "
        "that takes.",
        why="A capture reads only what changed, so this often costs a guest nothing that it would notice.",
    ),
]
CaptureTimeoutKey = Annotated[
    float,
    Key(
        name="capture_timeout",
        parse=read_at_least_1s,
        default="10m",
        meaning="A capture that takes longer is cancelled; the guest runs on, nothing is lost. At least 1s.",
        why="60 GiB at 100 MB/s. While it runs QEMU copies before the guest may overwrite, so it must end.",
    ),
]
ConsistencyKey = Annotated[
    Consistency,
    Key(
        name="consistency",
        parse=one_of(Consistency),
        default="crash",
        meaning='`"crash"`: as after a power cut. `"filesystem"`: the guest agent freezes file systems first.',
        why="It needs nothing in the guest, and journals are made for it. docs/consistency.md weighs the two.",
    ),
]
FreezeTimeoutKey = Annotated[
    float,
    Key(
        name="freeze_timeout",
        parse=read_at_least_1s,
        default="10s",
        meaning="The longest that a guest may be held still, frozen or paused. At least 1s.",
        why="Windows itself ends a freeze after 10 s, and few users wait longer for an answer.",
    ),
]
OnFreezeFailureKey = Annotated[
    OnFreezeFailure,
    Key(
        name="on_freeze_failure",
        parse=one_of(OnFreezeFailure),
        default="crash",
        meaning='When freezing fails: `"crash"`, take a crash-consistent point; `"fail"`, take none.',
        why="A point that is as after a power cut is worth more than none.",
    ),
]


GroupKey = Annotated[
    str | None,
    Key(
        name="group",
        parse=read_name,
        meaning="VMs with the same group are captured at one instant. They need the same `rpo`.",
        why="Left out: the VM is captured by itself.",
    ),
]
GroupPauseKey = Annotated[
    bool,
    Key(
        name="group_pause",
        parse=read_switch,
        default=True,
        meaning="Whether the VMs of the group are paused, for some milliseconds, until all are captured.",
        why="Only so do their points fit together when no agent freezes them. The same for all VMs of a group.",
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class VmSettings:
    """`[[vm]]`: one machine to protect."""

    name: Annotated[
        str,
        Key(
            name="name",
            parse=read_name,
            required=True,
            meaning="The VM's name in the repository: 1 to 63 of a-z 0-9 . _ -, and only once in this file.",
            why="Points are found by it, so it outlives host names and UUIDs.",
        ),
    ]
    source: Annotated[
        SourceSettings,
        Key(
            name="source",
            parse=_source,
            default="qmp",
            meaning='How drsync reaches the VM: `"qmp"`, a QMP socket of its own, or `"libvirt"`.',
            why="It needs nothing but QEMU. For VMs that libvirt manages it must be set.",
        ),
    ]
    rpo_s: RpoKey
    capture_timeout_s: CaptureTimeoutKey
    consistency: ConsistencyKey
    freeze_timeout_s: FreezeTimeoutKey
    on_freeze_failure: OnFreezeFailureKey
    group: GroupKey
    group_pause: GroupPauseKey


@dataclass(frozen=True, slots=True, kw_only=True)
class ProtectSettings:
    """`[[protect]]`: every domain whose name matches, also those that appear later."""

    source: Annotated[
        str,
        Key(
            name="source",
            parse=_libvirt_only,
            default="libvirt",
            meaning='Where VMs are looked for: `"libvirt"`.',
            why="Only libvirt knows which VMs there are.",
        ),
    ]
    match: Annotated[
        str,
        Key(
            name="match",
            parse=read_text,
            required=True,
            meaning="Which domains, by name: `*` is any text, `?` any character, `[ab]` one of these.",
            why='`"*"` protects all; that should be a decision.',
        ),
    ]
    uri: LibvirtUriKey
    exclude_vms: Annotated[
        Sequence[str],
        Key(
            name="exclude_vms",
            parse=read_texts,
            default="[]",
            meaning="Domains that are not meant although they match, by names or patterns.",
            why="None.",
        ),
    ]
    exclude: Annotated[
        Sequence[str],
        Key(
            name="exclude",
            parse=read_texts,
            default="[]",
            meaning='Disks that are not protected, by their `<target dev="...">`, of each of these domains.',
            why="All writable disks with a medium; CD-ROMs, read-only and transient disks are left out anyway.",
        ),
    ]
    rpo_s: RpoKey
    capture_timeout_s: CaptureTimeoutKey
    consistency: ConsistencyKey
    freeze_timeout_s: FreezeTimeoutKey
    on_freeze_failure: OnFreezeFailureKey
    group: GroupKey
    group_pause: GroupPauseKey


def captured_together(vms: Sequence[VmSettings]) -> Sequence[Sequence[VmSettings]]:
    """The VMs as they are captured: each by itself, or all of a group at one instant, in their order."""
    found: dict[str, list[VmSettings]] = {}
    for vm in vms:
        found.setdefault(f"vm {vm.name}" if vm.group is None else f"group {vm.group}", []).append(vm)
    return list(found.values())
