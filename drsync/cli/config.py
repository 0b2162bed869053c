"""`drsync config`: whether the configuration file can be worked with."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import click

from drsync.capturing import Capturing
from drsync.cli import render, views
from drsync.cli.app import App, json_option, pass_app
from drsync.cli.lock import described
from drsync.config import LibvirtSource, ProtectSettings, VmSettings
from drsync.errors import ConfigInvalid, DrsyncError, FreezeFailed, LocksMissing, StoreDenied, StoreError
from drsync.format import names
from drsync.limits import described as described_limits
from drsync.locks import LockState
from drsync.model import Consistency, OnFreezeFailure
from drsync.protection import matches
from drsync.session import Session
from drsync.source import DiskSurvey
from drsync.source.agent import AgentFailed
from drsync.store.probe import probe_create_only
from drsync.units import counted, format_duration, format_size
from drsync.upkeep import Upkeep

_MAX_RECORD_BYTES = 65536


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that was looked at."""

    name: str
    details: Sequence[str] = ()
    error: DrsyncError | None = None
    looked: bool = True
    """False: it can't be looked at until another problem is solved."""
    disks: Sequence[DiskSurvey] = field(default=())


@click.group("config")
def command() -> None:
    """Check the configuration file."""


@command.command("check")
@json_option
@pass_app
@click.pass_context
def check(ctx: click.Context, app: App) -> None:
    """Check the file and everything that it names.

    Reads the file, reaches the repository, the spool and every VM, and says what
    would be captured. Lists everything that is wrong; the exit code is that of the first. Points
    and layers are neither made nor changed.
    """
    checks = list(_all_checks(app))
    if app.as_json:
        ok = all(found.error is None for found in checks)
        render.document({"config": str(app.config_path), "ok": ok, "checks": [_document(found) for found in checks]})
    else:
        for found in checks:
            _print(found)
    ctx.exit(next((found.error.code for found in checks if found.error), 0))


def _all_checks(app: App) -> Iterator[Check]:
    try:
        session = app.session()
    except ConfigInvalid as err:
        problems = err.fields.get("problems", ())
        for problem in problems if isinstance(problems, tuple) else ():
            yield Check(name="file", error=ConfigInvalid(path=app.config_path, problem=problem))
        return
    except DrsyncError as err:
        yield Check(name="file", error=err)
        return
    yield Check(name="file", details=[f"{app.config_path}: {counted(len(session.config.vms), 'VM')}"])
    if limits := described_limits(session.config.limits, app.clock.now()):
        yield Check(name="limits", details=limits)
    yield from _patterns(session)
    repository = _checked("repository", lambda: _repository(session))
    yield repository
    yield _checked("spool", lambda: _spool(session))
    for vm in session.protection.vms:
        yield _vm(session, vm) if repository.error is None else _not_looked_at(vm)


def _checked(name: str, look: Callable[[], Sequence[str]]) -> Check:
    try:
        return Check(name=name, details=look())
    except DrsyncError as err:
        return Check(name=name, error=err)


def _repository(session: Session) -> Sequence[str]:
    record = session.repository.record
    body = session.store.get(names.REPOSITORY, limit_bytes=_MAX_RECORD_BYTES)
    try:
        probe_create_only(session.raw_store, names.REPOSITORY, body, hashlib.sha256(body).digest())
        refuses = "it refuses to overwrite"
    except StoreDenied:  # a host's role; whether the store itself would refuse was asked by `drsync init`
        refuses = "these credentials may not even try to overwrite it"
    opens = f"{session.store.url}: the key opens it, and {refuses} (id {record.id[:8]})"
    return [opens, *_locks(session)]


def _locks(session: Session) -> Sequence[str]:
    """Whether objects can be locked there, and are.

    Raises:
        LocksMissing: they shall be, and can't.
    """
    policy = session.config.repository.lock
    try:
        support = session.locks.lock_support()
    except StoreError as err:
        if policy is not None and not isinstance(err, StoreDenied):
            raise
        return [f"whether the bucket can lock objects is not known: {err}"] if policy is not None else []
    if policy is None:
        return ["the bucket can lock objects, and `lock` is not set: nothing is locked"] if support.enabled else []
    if not support.enabled:
        raise LocksMissing(url=session.store.url, problem="the bucket has no Object Lock")
    found = Upkeep(session).lock_status()
    if found.state in (LockState.LAPSING, LockState.LAPSED) and found.error is not None:
        raise found.error
    by_itself = f"; by itself the bucket locks everything, heartbeats too: {support.default}" if support.default else ""
    days = format_duration(policy.period.total_seconds())
    return [f"objects are locked when they are made, {policy.mode}, {days}{by_itself}", described(found)]


def _spool(session: Session) -> Sequence[str]:
    spool = session.spool
    spool.writer_id()
    free = format_size(max(0, spool.free_bytes()))
    return [f"{spool.path}: {free} free beside the reserve of {format_size(spool.reserve_bytes)}"]


def _patterns(session: Session) -> Iterator[Check]:
    """What each [[protect]] finds now."""
    if not session.config.protects:
        return
    try:
        found = session.vms()[len(session.config.vms) :]
    except DrsyncError as err:
        yield Check(name="protect", error=err)
        return
    for protect in session.config.protects:
        mine = [vm for vm in found if isinstance(vm.source, LibvirtSource) and _is_of(vm.source, protect)]
        names = ", ".join(_found_name(vm.name, vm.source) for vm in mine if isinstance(vm.source, LibvirtSource))
        yield Check(
            name=f"protect {protect.match}", details=[f"{counted(len(mine), 'VM')} at {protect.uri}: {names or 'none'}"]
        )


def _is_of(source: LibvirtSource, protect: ProtectSettings) -> bool:
    return source.uri == protect.uri and matches(protect, source.domain or "")


def _found_name(name: str, source: LibvirtSource) -> str:
    return name if source.domain == name else f"{name} ({source.domain})"


def _vm(session: Session, vm: VmSettings) -> Check:
    name = f"vm {vm.name}"
    try:
        access = session.reach.check_access(vm)
        capturing = Capturing(session)
        disks = capturing.survey(vm)
        streams, notes = capturing.way(vm, disks)
        agent = _agent(session, vm)
    except DrsyncError as err:
        return Check(name=name, error=err)
    lines = [_disk_line(disk, streams=streams) for disk in disks]
    return Check(name=name, details=[*lines, *notes, *access, *agent], disks=disks)


def _agent(session: Session, vm: VmSettings) -> Sequence[str]:
    """What the guest's agent says, if it is needed.

    Raises:
        FreezeFailed: it does not work, and points without it are not wanted.
    """
    if vm.consistency is not Consistency.FILESYSTEM:
        return []
    try:
        info = session.guests.about_agent(vm)
        problem = "" if info.can_freeze else f"qemu-ga {info.version} is not allowed to freeze file systems"
    except AgentFailed as err:
        problem = f"no answer from the guest agent: {err}"
    if not problem:
        return [f"guest agent: qemu-ga {info.version} answers and can freeze file systems".replace("  ", " ")]
    if vm.on_freeze_failure is OnFreezeFailure.FAIL:
        raise FreezeFailed(vm=vm.name, problem=problem)
    return [f"guest agent: NOT USABLE, points will be crash-consistent: {problem}"]


def _not_looked_at(vm: VmSettings) -> Check:
    # What a capture would do depends on the newest point, and which bitmaps are ours on the repository.
    return Check(name=f"vm {vm.name}", looked=False, details=["not looked at until the repository can be used"])


def _disk_line(disk: DiskSurvey, *, streams: bool) -> str:
    reason = f" ({disk.reason})" if disk.reason else ""
    what = f"up to {format_size(disk.copy_bytes)} of {format_size(disk.size_bytes)}, {disk.kind}{reason}"
    return f"{disk.name}: would {'read live' if streams else 'capture'} {what}"


def _print(found: Check) -> None:
    if found.error:
        render.line(f"{found.name}: PROBLEM: {found.error}")
        render.line(f"    remedy: {render.as_typed(found.error.remedy)}")
    for detail in found.details:
        render.line(f"{found.name}: {detail}")


def _document(found: Check) -> views.Document:
    return {
        "check": found.name,
        "ok": found.error is None if found.looked else None,
        "details": list(found.details),
        "error": views.error(found.error) if found.error else None,
        "disks": views.survey(found.disks),
    }
