"""A recovery plan: which VMs come back, in which order, on which networks (docs/plan.md).

[site.NAME]   where: target, URI, pool, networks
[[wave]]      which VMs, one wave after the other
[vm.NAME]     what is different for one VM
"""

import tomllib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Final, TypeVar

from drsync.config.key import Key, read_duration, read_name, read_parallel, read_path, read_text, read_texts, shown
from drsync.config.table import TableReading, names_of
from drsync.errors import PlanInvalid

T = TypeVar("T")

WAYS: Final = ("ebs", "vm-import")
BOOT_MODES: Final = ("legacy-bios", "uefi")
MAX_PLAN_BYTES: Final = 4 * 1024 * 1024


class OnFailure(StrEnum):
    """What a VM that fails means for the others."""

    CONTINUE = "continue"
    STOP = "stop"


class WaitFor(StrEnum):
    """When a VM counts as up."""

    RUNNING = "running"
    AGENT = "agent"
    TCP = "tcp"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """What is waited for."""

    what: WaitFor
    host: str = ""
    """Empty: the guest's own address, as libvirt knows it."""
    port: int = 0

    def __str__(self) -> str:
        return ":".join(filter(None, (self.what, self.host and _bracketed(self.host), str(self.port or ""))))


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def read_wait(value: object) -> Wait:
    """ "running", "agent", "tcp:PORT" or "tcp:HOST:PORT"."""
    text = read_text(value)
    kind, _, rest = text.partition(":")
    host, _, port = rest.rpartition(":")
    if kind == WaitFor.TCP and port.isascii() and port.isdecimal() and 0 < int(port) < 65536:
        return Wait(what=WaitFor.TCP, host=host.strip("[]"), port=int(port))
    if text in (WaitFor.RUNNING, WaitFor.AGENT):
        return Wait(what=WaitFor(text))
    raise ValueError(f'{shown(text)} is nothing to wait for; write "running", "agent", "tcp:PORT" or "tcp:HOST:PORT"')


def read_names(value: object) -> Sequence[str]:
    """Names of VMs, each once."""
    if not isinstance(value, list) or not value:
        raise ValueError(f'{shown(value)} is not a list of VMs; write for example ["db", "web"]')
    names = [read_name(name) for name in value]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"names {', '.join(twice)} twice")
    return tuple(names)


def read_networks(value: object) -> Mapping[str, str]:
    """Old network, bridge or device → new network."""
    if not isinstance(value, dict):
        raise ValueError(f'{shown(value)} is not a table; write for example {{ prod = "default" }}')  # noqa: TRY004  one kind of error for every bad value
    for old, new in value.items():
        if not isinstance(new, str) or not new:
            raise ValueError(f"{old} = {shown(new)} is not the name of a network; write it in quotes")
    return dict(value)


def read_tag_table(value: object) -> Mapping[str, str]:
    """Tags of a user's own."""
    if not isinstance(value, dict):
        raise ValueError(f'{shown(value)} is not a table; write for example {{ team = "dr" }}')  # noqa: TRY004  one kind of error for every bad value
    for key, text in value.items():
        if not isinstance(text, str):
            raise ValueError(f"{key} = {shown(text)} is not a tag; write its value in quotes")  # noqa: TRY004  as above
        if key.lower().startswith(("aws:", "drsync:")) or key == "Name":
            raise ValueError(f"the tag {key} is kept for others")
    return dict(value)


def read_boot_mode(value: object) -> str:
    """How an instance boots, in EC2's words."""
    if value not in BOOT_MODES:
        raise ValueError(f"{shown(value)} is not a boot mode; use {' or '.join(map(shown, BOOT_MODES))}")
    return str(value)


def read_way(value: object) -> str:
    """How disks get into AWS."""
    if value not in WAYS:
        raise ValueError(f"{shown(value)} is no way into AWS; use {' or '.join(map(shown, WAYS))}")
    return str(value)


def read_point(value: object) -> int:
    """A point's number."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{shown(value)} is not a point's number (drsync points VM lists them)")
    return value


def read_instant(value: object) -> datetime:
    """An instant with its zone: the plan means the same on every machine."""
    try:
        parsed = value if isinstance(value, datetime) else datetime.fromisoformat(read_text(value))
    except ValueError:
        parsed = None
    if parsed is None or parsed.tzinfo is None:
        raise ValueError(f"{shown(value)} is not a time with its zone; write for example 2026-11-23T10:00:00Z")
    return parsed


def read_flag(value: object) -> bool:
    """Yes or no."""
    if not isinstance(value, bool):
        raise ValueError(f"{shown(value)} is not true or false")  # noqa: TRY004  one kind of error for every bad value
    return value


def read_target(value: object) -> str:
    """The kind of a site."""
    if value not in TARGETS:
        raise ValueError(f"{shown(value)} is not a target; use {' or '.join(map(shown, TARGETS))}")
    return str(value)


def read_on_failure(value: object) -> OnFailure:
    """Continue or stop."""
    if value not in list(OnFailure):
        raise ValueError(f'{shown(value)} is neither "continue" nor "stop"')
    return OnFailure(str(value))


_WAIT_WHY: Final = "A domain that runs need not have booted: say what your clients need."
_TIMEOUT_WHY: Final = "A guest without KVM boots slowly; one that checks its file systems, too."


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Wave:
    """`[[wave]]`: VMs that come back together, when those before are up."""

    vms: Annotated[
        Sequence[str],
        Key(
            name="vms",
            parse=read_names,
            required=True,
            meaning="The VMs of this wave, by their names in the repository.",
            why="Waves run one after the other: what others need comes first.",
        ),
    ]
    delay_s: Annotated[
        float,
        Key(
            name="delay",
            parse=read_duration,
            default="0s",
            meaning="How long to wait after the wave before.",
            why="What is up is usually ready.",
        ),
    ]
    wait: Annotated[
        Wait,
        Key(
            name="wait",
            parse=read_wait,
            default="running",
            meaning='When its VMs count as up: `"running"`, `"agent"` (the guest agent answers; on EC2: its status '
            'checks have passed), `"tcp:PORT"` on the guest\'s own address, `"tcp:HOST:PORT"`.',
            why=_WAIT_WHY,
        ),
    ]
    timeout_s: Annotated[
        float,
        Key(
            name="timeout",
            parse=read_duration,
            default="10m",
            meaning="How long a started VM may take until it is up; the restore itself may take as long as it takes.",
            why=_TIMEOUT_WHY,
        ),
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class VmOverride:
    """`[vm.NAME]`: what is different for one VM."""

    name: Annotated[
        str | None,
        Key(
            name="name",
            parse=read_text,
            meaning="The domain's new name: a copy; on EC2, the instance's.",
            why="Left out: as it was.",
        ),
    ]
    point: Annotated[
        int | None,
        Key(name="point", parse=read_point, meaning="The point's number.", why="Left out: the newest."),
    ]
    at: Annotated[
        datetime | None,
        Key(
            name="at",
            parse=read_instant,
            meaning="The newest point at or before this instant, with its zone.",
            why="Left out: the newest.",
        ),
    ]
    pool: Annotated[
        str | None,
        Key(name="pool", parse=read_text, meaning="The storage pool for its disks.", why="Left out: the site's."),
    ]
    networks: Annotated[
        Mapping[str, str],
        Key(
            name="networks",
            parse=read_networks,
            default={},
            meaning="Networks that are mapped otherwise than the site's.",
            why="Left out: as the site says.",
        ),
    ]
    instance_type: Annotated[
        str | None,
        Key(
            name="instance_type",
            parse=read_text,
            meaning="EC2: its type.",
            why="Left out: the cheapest of the site's families that has the VM's processors and memory.",
        ),
    ]
    boot_mode: Annotated[
        str | None,
        Key(
            name="boot_mode",
            parse=read_boot_mode,
            meaning='EC2: `"legacy-bios"` or `"uefi"`.',
            why="Left out: as the point tells.",
        ),
    ]
    private_ip: Annotated[
        str | None,
        Key(name="private_ip", parse=read_text, meaning="EC2: its address.", why="Left out: one that is free."),
    ]
    security_groups: Annotated[
        Sequence[str],
        Key(
            name="security_groups",
            parse=read_texts,
            default=[],
            meaning="EC2: its security groups, instead of the site's.",
            why="Left out: the site's.",
        ),
    ]
    via: Annotated[
        str | None,
        Key(name="via", parse=read_way, meaning='EC2: `"ebs"` or `"vm-import"`.', why="Left out: as the site says."),
    ]
    convert_guest: Annotated[
        bool | None,
        Key(
            name="convert_guest",
            parse=read_flag,
            meaning="EC2: whether AWS converts the guest (for Windows).",
            why="Left out: as the site says.",
        ),
    ]
    fix_guest: Annotated[
        bool | None,
        Key(
            name="fix_guest",
            parse=read_flag,
            meaning="EC2: whether drsync prepares the guest on the way.",
            why="Left out: as the site says.",
        ),
    ]
    wait: Annotated[
        Wait | None,
        Key(name="wait", parse=read_wait, meaning="When it counts as up.", why="Left out: as its wave says."),
    ]
    timeout_s: Annotated[
        float | None,
        Key(name="timeout", parse=read_duration, meaning="How long it may take.", why="Left out: as its wave says."),
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanTop:
    """What stands at the top of the file."""

    on_failure: Annotated[
        OnFailure,
        Key(
            name="on_failure",
            parse=read_on_failure,
            default="continue",
            meaning='`"continue"`: a VM that fails stops nobody. `"stop"`: no further VM is begun.',
            why="In a disaster, half of the VMs are better than none.",
        ),
    ]
    parallel: Annotated[
        int,
        Key(
            name="parallel",
            parse=read_parallel,
            default=2,
            meaning="How many VMs of a wave are restored at a time, 1 to 64.",
            why="Each restore reads with several connections itself.",
        ),
    ]


PLAN_TABLES: Final[Mapping[str, Sequence[type]]] = {
    "": (PlanTop,),
    "[site.NAME]": (LibvirtSite, Ec2Site),
    "[[wave]]": (Wave,),
    "[vm.NAME]": (VmOverride,),
}
"""Every table of the file; docs/plan.md is checked against it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What the file says."""

    path: Path
    top: PlanTop
    sites: Mapping[str, Site]
    waves: Sequence[Wave]
    overrides: Mapping[str, VmOverride]

    def site(self, name: str | None) -> tuple[str, Site]:
        """The site of that name; without one, the only one.

        Raises:
            PlanInvalid: there is no such site, or more than one to choose from.
        """
        known = ", ".join(sorted(self.sites))
        if name is None and len(self.sites) == 1:
            return next(iter(self.sites.items()))
        if name is None:
            raise PlanInvalid(path=self.path, problem=f"choose a site with --site; it has {known}")
        if name not in self.sites:
            raise PlanInvalid(path=self.path, problem=f"there is no site {name}; it has {known}")
        return name, self.sites[name]


def load_plan(path: Path) -> Plan:
    """Read and check the file.

    Raises:
        PlanInvalid: it can't be read or used; `fields["problems"]` has all that was found.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_PLAN_BYTES + 1)
    except OSError as err:
        raise _invalid(path, [f"can't be read: {err.strerror}"]) from err
    if len(content) > MAX_PLAN_BYTES:
        raise _invalid(path, ["is too large for a plan"])
    try:
        document = tomllib.loads(content.decode())
    except ValueError as err:  # not TOML, or not UTF-8
        raise _invalid(path, [f"is not TOML: {err}"]) from err
    reading = _Reading(path)
    plan = reading.plan(document)
    if plan is None or reading.problems:
        raise _invalid(path, reading.problems)
    return plan


def _invalid(path: Path, problems: Sequence[str]) -> PlanInvalid:
    more = f" (and {len(problems) - 1} more: {'; '.join(problems[1:])})" if len(problems) > 1 else ""
    return PlanInvalid(path=path, problem=problems[0] + more, problems=tuple(problems))


class _Reading(TableReading):
    """One pass over a parsed plan."""

    def __init__(self, path: Path) -> None:
        super().__init__(path.absolute().parent)
        self._path = path

    def plan(self, document: Mapping[str, object]) -> Plan | None:
        tables = {"site", "wave", "vm"}
        top_keys = {name: value for name, value in document.items() if name not in tables}
        top = self.table("the plan", PlanTop, top_keys, also_known=tables)
        sites: Mapping[str, Site] = self._named("site", document.get("site", {}), self._site)
        waves = self._waves(document.get("wave", []))
        overrides = self._named("vm", document.get("vm", {}), lambda where, table: self.table(where, VmOverride, table))
        self._check(sites, waves, overrides)
        if top is None or self.problems:
            return None
        return Plan(path=self._path, top=top, sites=sites, waves=waves, overrides=overrides)

    def _named(self, kind: str, tables: object, read: Callable[[str, object], T | None]) -> Mapping[str, T]:
        if not isinstance(tables, dict):
            self.problems.append(f"{kind} is not a table; write [{kind}.NAME]")
            return {}
        found = {name: read(f"[{kind}.{name}]", table) for name, table in tables.items()}
        return {name: value for name, value in found.items() if value is not None}

    def _site(self, where: str, table: object) -> Site | None:
        chosen = table.get("target") if isinstance(table, dict) else None
        kind = TARGETS.get(chosen, LibvirtSite) if isinstance(chosen, str) else LibvirtSite
        return self.table(where, kind, table)

    def _waves(self, tables: object) -> Sequence[Wave]:
        if not isinstance(tables, list):
            self.problems.append("wave is not a list of tables; write [[wave]], with two brackets")
            return ()
        waves = [self.table(f"[[wave]] number {number}", Wave, table) for number, table in enumerate(tables, 1)]
        return tuple(wave for wave in waves if wave is not None)

    def _check(self, sites: Mapping[str, Site], waves: Sequence[Wave], overrides: Mapping[str, VmOverride]) -> None:
        if not sites and not self.problems:
            self.problems.append("there is no [site.NAME]: say where the VMs come back")
        if not waves and not self.problems:
            self.problems.append("there is no [[wave]]: say which VMs come back")
        names = [name for wave in waves for name in wave.vms]
        for name in sorted({name for name in names if names.count(name) > 1}):
            self.problems.append(f"[[wave]]: {name} is in {names.count(name)} waves; each VM comes back once")
        for name in overrides if waves else ():
            if name not in names:
                self.problems.append(f"[vm.{name}]: no wave has this VM; {self.nearest(name, names)}")
        for name, override in overrides.items():
            if override.point is not None and override.at is not None:
                self.problems.append(f"[vm.{name}]: point and at both choose the point: give one of them")
        for name, site in sites.items():
            if isinstance(site, LibvirtSite) and site.pool and site.disk_dir:
                self.problems.append(f"[site.{name}]: pool and disk_dir both choose the place: give one of them")

    def nearest(self, name: str, known: Collection[str]) -> str:
        homes = [where for where, kinds in PLAN_TABLES.items() if where and any(name in names_of(k) for k in kinds)]
        if homes and name not in known:
            return f"it belongs to {homes[0]}"
        return super().nearest(name, known)
