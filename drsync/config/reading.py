"""A file's content, read into settings, with every problem found in one pass."""

import re
import socket
import tomllib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Final

from drsync.config.key import shown
from drsync.config.limits import RATES, LimitsSettings, WindowSettings, with_windows
from drsync.config.prune import PruneSettings
from drsync.config.retention import Retention, RetentionSettings
from drsync.config.settings import (
    LISTS,
    TABLES,
    CloudSettings,
    Config,
    DaemonSettings,
    RepositorySettings,
    SpoolSettings,
    VerifySettings,
)
from drsync.config.table import TableReading, names_of
from drsync.config.vms import SOURCES, LibvirtSource, ProtectSettings, QmpSource, VmSettings
from drsync.errors import ConfigInvalid, ConfigMissing
from drsync.model import NAME_PATTERN, Consistency
from drsync.retention import Rules

MAX_SOCKET_PATH_BYTES: Final = 107
"""Linux' sun_path is 108 bytes with its closing zero: nothing can connect to a longer path."""


def load_config(path: Path, *, host_name: str | None = None) -> Config:
    """Read and check the whole file; nothing but the file is touched.

    `host_name` is the machine's name unless given.

    Raises:
        ConfigMissing: there is no such file.
        ConfigInvalid: it can't be read or used; `fields["problems"]` has all that was found.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError as err:
        raise ConfigMissing(path=path) from err
    except OSError as err:
        raise _invalid(path, [f"can't be read: {err.strerror}"]) from err
    return parse_config(content, path, host_name=host_name)


def parse_config(content: bytes, path: Path, *, host_name: str | None = None) -> Config:
    """The values of a file's content; relative paths in it start at the directory of `path`.

    Raises:
        ConfigInvalid: as `load_config`.
    """
    try:
        document = tomllib.loads(content.decode())
    except UnicodeDecodeError as err:
        line = content.count(b"\n", 0, err.start) + 1
        raise _invalid(path, [f"is not UTF-8 text (at line {line})"]) from err
    except tomllib.TOMLDecodeError as err:
        raise _invalid(path, [f"is not TOML: {err}"]) from err
    config, problems = read_document(document, path, host_name=host_name)
    if config is None:
        raise _invalid(path, problems)
    return config


def read_document(
    document: Mapping[str, object], path: Path, *, host_name: str | None
) -> tuple[Config | None, Sequence[str]]:
    """The settings of a parsed document, or None and everything that is wrong with it."""
    reading = _Reading(path, _safe_host_name(socket.gethostname() if host_name is None else host_name))
    config = reading.config(document)
    return (None if reading.problems else config), reading.problems


def _invalid(path: Path, problems: Sequence[str]) -> ConfigInvalid:
    more = f" (and {len(problems) - 1} more; `drsync config check` lists them)" if len(problems) > 1 else ""
    return ConfigInvalid(path=path, problem=problems[0] + more, problems=tuple(problems))


class _Reading(TableReading):
    """One pass over a parsed document that collects every problem."""

    def __init__(self, path: Path, host: str) -> None:
        super().__init__(path.absolute().parent, defaults={"host": host})
        self._path = path

    def config(self, document: Mapping[str, object]) -> Config | None:
        known = [name for name in TABLES if "." not in name]
        unknown = [name for name in document if name not in known]
        self.problems += [f"unknown table or key {shown(name)}; {self.nearest(name, known)}" for name in unknown]
        repository = self.table("[repository]", RepositorySettings, document.get("repository", {}))
        spool = self.table("[spool]", SpoolSettings, document.get("spool", {}))
        limits = self._limits(document.get("limits", {}))
        verify = self.table("[verify]", VerifySettings, document.get("verify", {}))
        retention = self._retention(document.get("retention"))
        prune = self.table("[prune]", PruneSettings, document.get("prune", {}))
        daemon = self.table("[daemon]", DaemonSettings, document.get("daemon", {}))
        vms = self._vms(document.get("vm", []))
        protects = self._protects(document.get("protect", []))
        self._check_groups(vms, protects)
        clouds = self._clouds(document.get("cloud", []))
        if repository is None or spool is None or limits is None:
            return None
        if verify is None or prune is None or daemon is None:
            return None
        self._check_s3_only(repository)
        return Config(
            path=self._path,
            repository=repository,
            spool=spool,
            limits=limits,
            verify=verify,
            retention=retention,
            prune=prune,
            vms=vms,
            protects=protects,
            clouds=clouds,
            daemon=daemon,
        )

    def _limits(self, table: object) -> LimitsSettings | None:
        own = {name: value for name, value in table.items() if name != "window"} if isinstance(table, dict) else table
        windows = table.get("window", []) if isinstance(table, dict) else []
        limits = self.table("[limits]", LimitsSettings, own, also_known={"window"})
        if not isinstance(windows, list):
            self.problems.append("limits.window is not a list of tables; write [[limits.window]], with two brackets")
            return None
        read = [self._window(number, window) for number, window in enumerate(windows, 1)]
        if limits is None:
            return None
        return with_windows(limits, [window for window in read if window is not None])

    def _window(self, number: int, table: object) -> WindowSettings | None:
        where = f"[[limits.window]] number {number}"
        window = self.table(where, WindowSettings, table)
        if window is None:
            return None
        if all(getattr(window, name) is None for name in RATES):
            self.problems.append(f"{where}: it limits nothing; set one of {', '.join(RATES)}")
        if window.begin_min == window.end_min:
            self.problems.append(f'{where}: from and to are the same; the whole day is from = "00:00", to = "24:00"')
        return window

    def _check_s3_only(self, repository: RepositorySettings) -> None:
        if not repository.url.startswith("s3:"):
            given = {"endpoint_url": repository.endpoint_url, "region": repository.region, "lock": repository.lock_s}
            for name, value in given.items():
                if value is not None:
                    self.problems.append(
                        f"[repository]: {name} is only for s3:// repositories; url is {repository.url}"
                    )

    def _retention(self, table: object) -> Retention:
        """`[retention]` and its exceptions, each of which has what it does not say from `[retention]`."""
        if table is None:
            return Retention(exceptions={})
        general = {name: value for name, value in table.items() if name != "vm"} if isinstance(table, dict) else table
        default = self._rules("[retention]", general)
        exceptions = table.get("vm", {}) if isinstance(table, dict) else {}
        if not isinstance(exceptions, dict):
            self.problems.append('[retention]: vm is not a table; write [retention.vm."NAME OR PATTERN"]')
            exceptions = {}
        if default is None or not isinstance(general, dict):
            return Retention(exceptions={})
        found: dict[str, Rules] = {}
        for name, own in exceptions.items():
            rules = self._rules(f"[retention.vm.{shown(name)}]", general | own if isinstance(own, dict) else own)
            if rules is not None:
                found[name] = rules
        return Retention(default=default, exceptions=found)

    def _rules(self, where: str, table: object) -> Rules | None:
        settings = self.table(where, RetentionSettings, table)
        if settings is None:
            return None
        rules = settings.rules()
        if rules == Rules(minimum_age=rules.minimum_age):
            self.problems.append(
                f"{where}: no rule keeps anything for long; set last, hourly, daily, weekly, monthly or yearly"
            )
            return None
        return rules

    def _vms(self, tables: object) -> tuple[VmSettings, ...]:
        if not isinstance(tables, list):
            self.problems.append("vm is not a list of tables; write [[vm]], with two brackets")
            return ()
        vms = [vm for number, table in enumerate(tables, 1) if (vm := self._vm(number, table)) is not None]
        self._check_unique("name", [vm.name for vm in vms])
        self._check_sources(vms)
        return tuple(vms)

    def _check_sources(self, vms: Sequence[VmSettings]) -> None:
        over_qmp = [(vm, vm.source) for vm in vms if isinstance(vm.source, QmpSource)]
        for vm, source in over_qmp:
            self._check_socket(vm, "socket", source.socket)
            if source.agent is not None:
                self._check_socket(vm, "agent", source.agent)
            elif vm.consistency is Consistency.FILESYSTEM:
                needs = 'consistency = "filesystem" needs agent, the socket of the guest agent'
                self.problems.append(f'[[vm]] "{vm.name}": {needs}')
        self._check_unique("socket", [str(source.socket) for _, source in over_qmp])
        self._check_unique("agent", [str(source.agent) for _, source in over_qmp if source.agent])
        domains = [vm.source.domain or vm.name for vm in vms if isinstance(vm.source, LibvirtSource)]
        self._check_unique("domain", domains)

    def _check_socket(self, vm: VmSettings, key: str, path: Path) -> None:
        if len(bytes(path)) > MAX_SOCKET_PATH_BYTES:
            limit = f"is longer than a socket's path can be ({MAX_SOCKET_PATH_BYTES} bytes)"
            self.problems.append(f'[[vm]] "{vm.name}": {key}: {path} {limit}')

    def _check_groups(self, vms: Sequence[VmSettings], protects: Sequence[ProtectSettings]) -> None:
        """All VMs of a group are captured by one job, so what that job does must be the same for them."""
        first: dict[str, tuple[str, VmSettings | ProtectSettings]] = {}
        members: list[tuple[str, str, VmSettings | ProtectSettings]] = [
            *((f'[[vm]] "{vm.name}"', f'"{vm.name}"', vm) for vm in vms),
            *((f"[[protect]] number {n}", f"[[protect]] number {n}", p) for n, p in enumerate(protects, 1)),
        ]
        for where, name, one in members:
            if one.group is None:
                continue
            other_name, other = first.setdefault(one.group, (name, one))
            for key, same in (("rpo", one.rpo_s == other.rpo_s), ("group_pause", one.group_pause == other.group_pause)):
                if not same:
                    problem = f'{key} is not that of {other_name}, which is in the group "{one.group}", too'
                    self.problems.append(f"{where}: {problem}")

    def _protects(self, tables: object) -> tuple[ProtectSettings, ...]:
        if not isinstance(tables, list):
            self.problems.append("protect is not a list of tables; write [[protect]], with two brackets")
            return ()
        read = [self.table(f"[[protect]] number {n}", ProtectSettings, table) for n, table in enumerate(tables, 1)]
        return tuple(protect for protect in read if protect is not None)

    def _clouds(self, tables: object) -> tuple[CloudSettings, ...]:
        if not isinstance(tables, list):
            self.problems.append("cloud is not a list of tables; write [[cloud]], with two brackets")
            return ()
        read = [self.table(f"[[cloud]] number {n}", CloudSettings, table) for n, table in enumerate(tables, 1)]
        clouds = tuple(cloud for cloud in read if cloud is not None)
        self._check_unique("name", [cloud.name for cloud in clouds], table="cloud")
        return clouds

    def _check_unique(self, key: str, values: Sequence[str], *, table: str = "vm") -> None:
        for value in sorted({value for value in values if values.count(value) > 1}):
            self.problems.append(
                f"[[{table}]]: {key} = {shown(value)} stands {values.count(value)} times; it must be unique"
            )

    def _vm(self, number: int, table: object) -> VmSettings | None:
        named = table.get("name") if isinstance(table, dict) else None
        where = f"[[vm]] {shown(named)}" if isinstance(named, str) else f"[[vm]] number {number}"
        if not isinstance(table, dict):
            self.problems.append(f"{where} = {shown(table)} is not a table")
            return None
        chosen = table.get("source", "qmp")
        source_class: type[QmpSource] | type[LibvirtSource]
        source_class = SOURCES[chosen if isinstance(chosen, str) and chosen in SOURCES else "qmp"]
        source_names = names_of(source_class)
        own = {name: value for name, value in table.items() if name not in source_names}
        rest = {name: value for name, value in table.items() if name in source_names}
        source: QmpSource | LibvirtSource | None = self.table(where, source_class, rest)
        return self.table(where, VmSettings, own, also_known=source_names, source=source)

    def nearest(self, name: str, known: Collection[str]) -> str:
        for table, kind in TABLES.items():
            if name in names_of(kind) and table != "protect":
                return f"it belongs to {f'[[{table}]]' if table in LISTS else f'[{table}]'}"
        sources = [source for source, kind in SOURCES.items() if name in names_of(kind)]
        if sources:
            return f"it belongs to [[vm]] with source = {' or '.join(map(shown, sources))}"
        if name in names_of(ProtectSettings):
            return "it belongs to [[protect]]"
        return super().nearest(name, known)


def _safe_host_name(name: str) -> str:
    safe = re.sub(r"[^a-z0-9._-]", "-", name.lower()).lstrip("._-")[:63]
    if re.fullmatch(NAME_PATTERN, safe) is None:
        return "host"
    return safe
