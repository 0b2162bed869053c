"""Captures a domain that is off, through a qemu-storage-daemon of drsync's own.

Whoever starts the VM must always be able to, so its images are open for
writing (and locked) only for the milliseconds that a bitmap takes:

    1. for writing   add the new bitmaps, close: they lie in the images now
    2. for reading   copy into layers, by the old bitmaps; nothing is locked

If the VM is started during 2, what it writes is in both generations of bitmaps;
the copy may be torn, so it is noticed and dropped (C3: nothing is lost by it).
The bitmaps are called as libvirt's checkpoints are: when the domain runs again,
the next capture goes on from them.

A bitmap in an image says exactly whether the VM wrote anything since, also
when it ran and was stopped in between. A raw image has none: there the file's
identity, size and time of change must be as they were when it was read.
"""

import logging
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import libvirt

from drsync.errors import CaptureFailed, CaptureTimeout, DiskMissing, LiveUnavailable, SourceLost
from drsync.model import BLOCK_SIZE, CaptureId, Clock, Consistency, Kind, Pace, Progress, SystemClock
from drsync.source import NO_PACE, Base, CaptureResult, DiskSurvey, Instant, LiveView, at_once
from drsync.source.backup import boot_of_host, copy_tuning, make_layer
from drsync.source.bitmap import Owner, decide
from drsync.source.jobs import JobFailed, Jobs, speed_of
from drsync.source.libvirt_checkpoints import Checkpoints
from drsync.source.libvirt_connection import LibvirtDomain, LibvirtRefused
from drsync.source.libvirt_definition import describe, is_other_image
from drsync.source.libvirt_images import (
    NotOpenable,
    chain_names,
    identities,
    is_as_read,
    protocol_options,
    split_bitmap,
)
from drsync.source.libvirt_survey import RAW_REASON, LibvirtOptions, domain_xml
from drsync.source.libvirt_xml import DomainDisk, DomainXml
from drsync.source.monitor import CommandRefused
from drsync.source.nodes import BlockGraph, Node
from drsync.source.storage_daemon import StorageDaemon
from drsync.source.watch import Watch

log = logging.getLogger(__name__)

_CANCEL_TIMEOUT_S: Final = 60.0


class OfflineSource:
    """A Source of a domain that is off. Not thread-safe."""

    def __init__(self, options: LibvirtOptions, domain: LibvirtDomain, *, clock: Clock | None = None) -> None:
        """`domain` is open and off; it belongs to this session from now on.

        Raises:
            DomainMissing: it lives on another host, where it has been migrated to.
        """
        self._options = options
        self._clock = clock or SystemClock()
        self._owner = Owner(repository=options.repository_tag, vm=options.vm)
        self._domain = domain
        self._chains: Mapping[str, list[str]] = {}
        state, reason = domain.call("virDomainGetState", domain.handle.state)
        if (state, reason) == (libvirt.VIR_DOMAIN_SHUTOFF, libvirt.VIR_DOMAIN_SHUTOFF_MIGRATED):
            domain.close()
            raise domain.missing("it has been migrated to another host")

    def survey(
        self, base: Base | None, *, full: bool = False, tidy: bool = True, keep: Collection[CaptureId] = ()
    ) -> Sequence[DiskSurvey]:
        kept = {*keep, *([base.capture] if base is not None else [])}
        with self._translated():
            self._domain.check_run("survey")
            xml = domain_xml(self._domain, self._options)
            if tidy:
                self._remove_bitmaps(xml, lambda made_by: made_by not in kept)
            with self._reading(xml) as (_, graph):
                self._chains = {disk.target: chain_names(disk, _node(graph, disk)) for disk in xml.disks}
                return [self._survey_disk(disk, graph, base, full=full) for disk in xml.disks]

    def capture(
        self,
        capture: CaptureId,
        base: Base | None,
        disks: Sequence[DiskSurvey],
        layers: Mapping[str, Path],
        *,
        timeout_s: float,
        keep_free_bytes: int = 0,
        progress: Progress | None = None,
        instant: Instant = at_once,
        pace: Pace = NO_PACE,
    ) -> CaptureResult:
        deadline_s = self._clock.monotonic_s() + timeout_s
        watch = Watch(self._options.vm, layers, keep_free_bytes=keep_free_bytes, progress=progress)
        made: list[Path] = []
        try:
            with self._translated(), self._staying_off():
                return self._capture(capture, base, disks, layers, made, instant, watch, deadline_s, pace)
        except BaseException as err:
            self._abandon(capture, made, err)
            if isinstance(err, TimeoutError):
                raise CaptureTimeout(vm=self._options.vm, timeout_s=timeout_s) from err
            raise

    def check_live(self, disks: Sequence[DiskSurvey]) -> None:
        raise self._not_live()

    def begin_recording(self, capture: CaptureId, disks: Sequence[DiskSurvey]) -> Mapping[str, object]:
        raise self._not_live()

    def open_live(self, base: Base | None, disks: Sequence[DiskSurvey], *, pace: Pace) -> LiveView:
        raise self._not_live()

    def _not_live(self) -> LiveUnavailable:
        return LiveUnavailable(vm=self._options.vm, problem="the domain is off: its disks are copied")

    def incarnation(self) -> str:
        return f"{boot_of_host()} {self._domain.uuid} off"

    def is_running(self) -> bool:
        self._domain.check_run("is_running")
        return False

    def pause(self, *, timeout_s: float) -> bool:
        return self.is_running()

    def resume(self, *, timeout_s: float) -> None:
        self._domain.check_run("resume")

    def release(self, keep: CaptureId) -> None:
        with self._translated():
            self._domain.check_run("release")
            xml = domain_xml(self._domain, self._options)
            self._remove_bitmaps(xml, lambda made_by: made_by != keep)
            self._forget_checkpoints(xml, keep)

    def close(self) -> None:
        self._domain.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # What there is

    @contextmanager
    def _reading(self, xml: DomainXml) -> Iterator[tuple[StorageDaemon, BlockGraph]]:
        """All disks open for reading, nothing locked."""
        with StorageDaemon(self._options.vm) as daemon:
            for disk in xml.disks:
                daemon.add_image(disk.target, protocol_options(self._domain, disk.top), disk.top.format, writable=False)
            yield daemon, _graph(daemon)

    def _survey_disk(self, disk: DomainDisk, graph: BlockGraph, base: Base | None, *, full: bool) -> DiskSurvey:
        node = _node(graph, disk)
        size_bytes = node.image.virtual_size
        name = self._owner.checkpoint(base.capture) if base is not None else ""
        decision = decide(disk.target, size_bytes, node.dirty_bitmaps, base, name=name, full=full)
        kind, reason, copy_bytes = decision.kind, decision.reason, decision.dirty_bytes
        if kind is Kind.INCREMENTAL and base is not None:
            reason = is_other_image(base, disk.target, chain_names(disk, node)) or split_bitmap(node, name)
        elif base is not None and not disk.keeps_bitmaps and reason == "bitmap is missing":
            reason = "" if is_as_read(disk, base, node) else RAW_REASON.format(format=disk.top.format)
        if reason:
            copy_bytes = graph.allocated_bytes(node)
        return DiskSurvey(
            name=disk.target,
            size_bytes=size_bytes,
            kind=Kind.FULL if reason else Kind.INCREMENTAL,
            reason=reason,
            copy_bytes=copy_bytes,
            persistent=node.keeps_bitmaps,
        )

    # Taking a capture

    def _capture(
        self,
        capture: CaptureId,
        base: Base | None,
        disks: Sequence[DiskSurvey],
        layers: Mapping[str, Path],
        made: list[Path],
        instant: Instant,
        watch: Watch,
        deadline_s: float,
        pace: Pace,
    ) -> CaptureResult:
        self._domain.check_run("capture")
        xml = domain_xml(self._domain, self._options)
        for disk in disks:
            make_layer(layers[disk.name], disk.size_bytes, (0, 0))
            made.append(layers[disk.name])
        with instant():  # a domain that is off holds still by itself; the others of its group may not
            time = self._clock.now().astimezone(UTC)
            self._add_bitmaps(capture, xml, disks)
        before = identities(xml)
        definition = self._definition(xml, before)
        self._copy(capture, base, disks, layers, xml, watch, deadline_s, pace)
        if identities(xml) != before:
            raise self._failed("copying", "an image was changed meanwhile")
        return CaptureResult(time=time, consistency=Consistency.CRASH, definition=definition)

    def _definition(self, xml: DomainXml, known_by: Mapping[str, str | None]) -> Mapping[str, object]:
        """The definition, with what the next survey knows a raw image again by."""
        definition = describe(self._domain, xml)
        disks = definition["disks"]
        for name, disk in disks.items() if isinstance(disks, dict) else ():
            disk["identity"] = known_by.get(name)
            disk["chain"] = self._chains.get(name, disk["chain"])
        return definition

    def _add_bitmaps(self, capture: CaptureId, xml: DomainXml, disks: Sequence[DiskSurvey]) -> None:
        """The new bitmaps, in every image that can keep one; they record from now on, whoever writes."""
        kept = [disk for disk in xml.disks if any(d.name == disk.target and d.persistent for d in disks)]
        name = self._owner.checkpoint(capture)
        with self._writing(kept) as daemon:
            for disk in kept:
                arguments = {"node": disk.target, "name": name, "granularity": BLOCK_SIZE, "persistent": True}
                daemon.monitor.execute("block-dirty-bitmap-add", arguments)

    def _copy(
        self,
        capture: CaptureId,
        base: Base | None,
        disks: Sequence[DiskSurvey],
        layers: Mapping[str, Path],
        xml: DomainXml,
        watch: Watch,
        deadline_s: float,
        pace: Pace,
    ) -> None:
        with self._reading(xml) as (daemon, graph):
            jobs = Jobs(daemon.monitor, self._clock)
            tuning = copy_tuning(daemon.monitor.qemu_version())
            started = []
            changed = [disk for disk in disks if disk.kind is not Kind.INCREMENTAL or disk.copy_bytes]
            speed = speed_of(pace, len(changed))
            for index, disk in enumerate(disks):
                node = graph.node(disk.name)
                if node is None or node.image.virtual_size != disk.size_bytes:
                    raise self._failed("blockdev-add", f"disk {disk.name} is not as it was surveyed")
                if disk not in changed:
                    continue  # an empty layer says that nothing changed
                layer, job = f"layer-{index}", self._owner.job(capture, index)
                file = {"driver": "file", "filename": str(layers[disk.name])}
                daemon.monitor.execute("blockdev-add", {"driver": "qcow2", "node-name": layer, "file": file})
                extent = self._extent(disk, node, base)
                arguments = {
                    "job-id": job,
                    "device": disk.name,
                    "target": layer,
                    "auto-dismiss": False,
                    "speed": speed,
                    **tuning,
                    **extent,
                }
                daemon.monitor.execute("blockdev-backup", arguments)
                started.append((job, layer))
            try:
                ids = [job for job, _ in started]
                jobs.wait(ids, deadline_s=deadline_s, on_progress=watch.tick, pace=pace, speed=speed)
            finally:
                jobs.end(self._owner.owns_job, timeout_s=_CANCEL_TIMEOUT_S)
            for _, layer in started:
                daemon.monitor.execute("blockdev-del", {"node-name": layer})

    def _extent(self, disk: DiskSurvey, node: Node, base: Base | None) -> dict[str, object]:
        if disk.kind is Kind.INCREMENTAL and base is not None:
            return {"sync": "bitmap", "bitmap": self._owner.checkpoint(base.capture), "bitmap-mode": "never"}
        return {"sync": "top" if node.knows_unwritten else "full"}

    @contextmanager
    def _staying_off(self) -> Iterator[None]:
        """What is done inside fails if the domain was started meanwhile, even if it was stopped again."""
        started = threading.Event()
        connection = self._domain.connection

        def on_event(_connection: object, _domain: object, event: int, *_: object) -> None:
            if event == libvirt.VIR_DOMAIN_EVENT_STARTED:
                started.set()

        kind = libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE
        number = self._domain.call(
            "virConnectDomainEventRegisterAny",
            lambda: connection.domainEventRegisterAny(self._domain.handle, kind, on_event, None),
        )
        try:
            yield
        finally:
            with suppress(libvirt.libvirtError):
                connection.domainEventDeregisterAny(number)
        self._domain.check_run("capture")
        if started.is_set():
            raise self._domain.lost("capture", "the domain was started meanwhile")

    # Bitmaps

    @contextmanager
    def _writing(self, disks: Sequence[DomainDisk]) -> Iterator[StorageDaemon]:
        """Disks open for writing and locked. Nothing slow may be done inside: the VM can't start meanwhile."""
        with StorageDaemon(self._options.vm) as daemon:
            for disk in disks:
                daemon.add_image(disk.target, protocol_options(self._domain, disk.top), disk.top.format, writable=True)
            yield daemon

    def _remove_bitmaps(self, xml: DomainXml, unwanted: Callable[[CaptureId], bool]) -> None:
        """Remove our bitmaps of `unwanted` captures; an image without one is not touched."""
        with self._reading(xml) as (_, graph):
            names = {disk.target: self._unwanted(_node(graph, disk), unwanted) for disk in xml.disks}
        with_some = [disk for disk in xml.disks if names[disk.target]]
        if not with_some:
            return
        try:
            with self._writing(with_some) as daemon:
                for disk in with_some:
                    for name in names[disk.target]:
                        daemon.monitor.execute("block-dirty-bitmap-remove", {"node": disk.target, "name": name})
        except CommandRefused as err:  # the VM is being started: its next capture removes them
            log.warning("vm=%s bitmaps stay for now: %s", self._options.vm, err.text)

    def _unwanted(self, node: Node, unwanted: Callable[[CaptureId], bool]) -> list[str]:
        captures = ((bitmap.name, self._owner.checkpoint_capture(bitmap.name)) for bitmap in node.dirty_bitmaps)
        return [name for name, made_by in captures if made_by is not None and unwanted(made_by)]

    def _forget_checkpoints(self, xml: DomainXml, keep: CaptureId) -> None:
        checkpoints = Checkpoints(self._domain, self._owner, [*(disk.target for disk in xml.disks), *xml.excluded])
        for capture in checkpoints.captures():
            if capture != keep:
                checkpoints.forget(capture)

    def _abandon(self, capture: CaptureId, made: Sequence[Path], cause: BaseException) -> None:
        if not isinstance(cause, SourceLost):
            try:
                self._remove_bitmaps(domain_xml(self._domain, self._options), lambda made_by: made_by == capture)
            except (SourceLost, CaptureFailed, DiskMissing, LibvirtRefused, CommandRefused) as err:
                log.warning("vm=%s capture=%s is not cleared away yet: %s", self._options.vm, capture, err)
        for path in made:
            path.unlink(missing_ok=True)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except LibvirtRefused as err:
            raise self._failed(err.operation, err.text) from err
        except CommandRefused as err:
            raise self._failed(err.command, err.text) from err
        except NotOpenable as err:
            raise self._failed("blockdev-add", str(err)) from err
        except JobFailed as err:
            raise self._failed("blockdev-backup", str(err)) from err

    def _failed(self, operation: str, problem: str) -> CaptureFailed:
        return CaptureFailed(vm=self._options.vm, operation=operation, problem=problem)


def _graph(daemon: StorageDaemon) -> BlockGraph:
    return BlockGraph(nodes=daemon.monitor.query("query-named-block-nodes", list[Node]), devices=[], exports=[])


def _node(graph: BlockGraph, disk: DomainDisk) -> Node:
    node = graph.node(disk.target)
    if node is None:
        raise CommandRefused("query-named-block-nodes", "GenericError", f"disk {disk.target} is not open")
    return node
