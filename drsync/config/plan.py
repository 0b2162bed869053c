"""A recovery plan: which VMs come back, in which order, on which networks (docs/plan.md).

[site.NAME]   where: target, URI, pool, networks (plan_sites.py)
[[wave]]      which VMs, one wave after the other
[vm.NAME]     what is different for one VM
"""

import tomllib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Final, TypeVar

from drsync.config.key import Key, read_duration, read_parallel, read_text, read_texts
from drsync.config.plan_sites import TARGETS, Ec2Site, LibvirtSite, Site
from drsync.config.plan_values import (
    OnFailure,
    Wait,
    read_boot_mode,
    read_flag,
    read_instant,
    read_names,
    read_networks,
    read_on_failure,
    read_point,
    read_wait,
    read_way,
)
from drsync.config.table import TableReading, names_of
from drsync.errors import PlanInvalid

T = TypeVar("T")

MAX_PLAN_BYTES: Final = 4 * 1024 * 1024

_WAIT_WHY: Final = "A domain that runs need not have booted: say what your clients need."
_TIMEOUT_WHY: Final = "A guest without KVM boots slowly; one that checks its file systems, too."


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
