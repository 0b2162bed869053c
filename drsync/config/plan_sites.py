"""`[site.NAME]` of a recovery plan: where VMs come back, a kind of site a target."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

from drsync.config.key import Key, read_path, read_text, read_texts, shown
from drsync.config.plan_values import read_flag, read_networks, read_tag_table, read_way


def read_target(value: object) -> str:
    """The kind of a site."""
    if value not in TARGETS:
        raise ValueError(f"{shown(value)} is not a target; use {' or '.join(map(shown, TARGETS))}")
    return str(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class LibvirtSite:
    """`target = "libvirt"`: a libvirt host."""

    target: Annotated[
        str,
        Key(
            name="target",
            parse=read_target,
            required=True,
            meaning='What the site is: `"libvirt"` or `"ec2"`.',
            why="Each target has keys of its own.",
        ),
    ]
    uri: Annotated[
        str,
        Key(
            name="uri",
            parse=read_text,
            default="qemu:///system",
            meaning="The libvirt host.",
            why="A recovery usually runs on the host that takes over.",
        ),
    ]
    pool: Annotated[
        str | None,
        Key(
            name="pool",
            parse=read_text,
            meaning="The storage pool for the disks.",
            why="Left out: the one that the VM had, if there is one of that name, else the one named `default`.",
        ),
    ]
    disk_dir: Annotated[
        Path | None,
        Key(
            name="disk_dir",
            parse=read_path,
            meaning="A directory for the disks, instead of a pool.",
            why="Left out: the pool is used.",
        ),
    ]
    networks: Annotated[
        Mapping[str, str],
        Key(
            name="networks",
            parse=read_networks,
            default={},
            meaning="Old network, bridge or device = network of this site (`bridge:NAME` for a bridge; "
            '`"*"` = all others).',
            why="Networks of the same name need no entry.",
        ),
    ]
    keep_mac: Annotated[
        bool,
        Key(
            name="keep_mac",
            parse=read_flag,
            default=True,
            meaning="Whether the guests keep their MAC addresses.",
            why="DHCP leases and licences hang on them, and the old site is gone.",
        ),
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ec2Site:
    """`target = "ec2"`: a region of AWS. Credentials are found as the AWS tools find them."""

    target: Annotated[
        str,
        Key(name="target", parse=read_target, required=True, meaning='`"ec2"`.', why="As above."),
    ]
    region: Annotated[
        str | None,
        Key(name="region", parse=read_text, meaning="The AWS region.", why="Left out: that of the environment."),
    ]
    networks: Annotated[
        Mapping[str, str],
        Key(
            name="networks",
            parse=read_networks,
            default={},
            meaning='Old network, bridge or device = subnet id (`"*"` = all others). The VM\'s first one decides.',
            why="Left out: the default VPC, if the region has one.",
        ),
    ]
    security_groups: Annotated[
        Sequence[str],
        Key(
            name="security_groups",
            parse=read_texts,
            default=[],
            meaning="The security groups' ids.",
            why="Left out: the VPC's default group, which lets nobody in from outside.",
        ),
    ]
    families: Annotated[
        Sequence[str],
        Key(
            name="families",
            parse=read_texts,
            default=[],
            meaning="Families of instance types to choose from, between equals the first.",
            why="Left out: m7i, m6i, m5, c7i, c6i, c5, r7i, r6i, r5: current, not burstable, without local disks.",
        ),
    ]
    keep_ip: Annotated[
        bool,
        Key(
            name="keep_ip",
            parse=read_flag,
            default=False,
            meaning="Whether instances get the addresses that the VMs' definitions gave them.",
            why="It needs subnets with the same addresses as the old site.",
        ),
    ]
    tags: Annotated[
        Mapping[str, str],
        Key(
            name="tags",
            parse=read_tag_table,
            default={},
            meaning="Tags on all that is made.",
            why="drsync's own tags are there anyway.",
        ),
    ]
    via: Annotated[
        str,
        Key(
            name="via",
            parse=read_way,
            default="ebs",
            meaning='How the disks get there: `"ebs"`, block by block, or `"vm-import"`, as images in a bucket.',
            why="It needs no bucket and no role, and sends what differs only.",
        ),
    ]
    bucket: Annotated[
        str | None,
        Key(
            name="bucket",
            parse=read_text,
            meaning="For `vm-import`: where images lie while AWS reads them.",
            why="Left out: there is none, and `vm-import` is refused.",
        ),
    ]
    import_role: Annotated[
        str,
        Key(
            name="import_role",
            parse=read_text,
            default="vmimport",
            meaning="The role that VM Import takes on.",
            why="AWS's own name for it.",
        ),
    ]
    convert_guest: Annotated[
        bool,
        Key(
            name="convert_guest",
            parse=read_flag,
            default=False,
            meaning="Whether AWS changes the guests' drivers, network and boot loader (ImportImage).",
            why="It takes from a quarter of an hour on, and takes only systems of AWS's list.",
        ),
    ]
    fix_guest: Annotated[
        bool,
        Key(
            name="fix_guest",
            parse=read_flag,
            default=False,
            meaning="Whether drsync prepares the guests on the way, by libguestfs (preflight.md).",
            why="A guest that is prepared in quiet times comes up sooner.",
        ),
    ]
    preflight: Annotated[
        bool,
        Key(
            name="preflight",
            parse=read_flag,
            default=True,
            meaning="Whether a VM is looked into first, and refused if it would not boot.",
            why="An instance that does not boot costs the minutes that count.",
        ),
    ]


TARGETS: Final[Mapping[str, type[LibvirtSite] | type[Ec2Site]]] = {"libvirt": LibvirtSite, "ec2": Ec2Site}
Site = LibvirtSite | Ec2Site
