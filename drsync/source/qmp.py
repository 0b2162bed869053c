"""Captures a VM through a QMP socket of ours: a qemu-system, or a qemu-storage-daemon.

One transaction takes all disks at one instant:

    block-dirty-bitmap-add   disk 1     the new bitmaps first: whatever is written from
    block-dirty-bitmap-add   disk 2     here on belongs to the next increment
    blockdev-backup          disk 1 ──▶ layer 1   (copy before write until it is done)
    blockdev-backup          disk 2 ──▶ layer 2

The order is what makes it safe with iothreads. QEMU holds a disk's requests
back only from its backup action on; a write that slips in between the two is
in the new bitmap and in the layer, so it is copied once more, but never lost.
The old bitmaps are neither disabled nor cleared: `release` drops them when the
repository has the point.

While a job runs, a guest's write waits until what it overwrites is in the layer.
If the layer can't be written then (spool full), QEMU fails the guest's write:
that is why the caller checks the room before and lets `capture` watch it.
"""

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from drsync.errors import CaptureFailed, CaptureTimeout, DiskMissing, SourceLost
from drsync.model import CaptureId, Clock, Consistency, Kind, Pace, Progress, SystemClock
from drsync.source import NO_PACE, Base, CaptureResult, DiskSurvey, Instant, LiveView, at_once
from drsync.source.backup import DiskCopy, copy_tuning, identity, incarnation_of, make_layer
from drsync.source.bitmap import Action, Owner, begin_bitmap, decide
from drsync.source.definition import describe
from drsync.source.jobs import JobFailed, Jobs, speed_of
from drsync.source.live import Exports
from drsync.source.monitor import CommandRefused, Monitor
from drsync.source.nodes import BlockGraph, Device, Export, Node, choose_disks
from drsync.source.watch import Watch

log = logging.getLogger(__name__)

_CANCEL_TIMEOUT_S: Final = 60.0
"""A cancelled job ends when its requests in flight are done; longer means that a disk hangs."""
_MIGRATING: Final = frozenset({"inmigrate", "finish-migrate", "postmigrate"})
"""Run states in which the disks belong to another process, or may at any moment (RunState in QEMU's run-state.json)."""
_NO_MIGRATION: Final = frozenset({None, "none", "completed", "failed", "cancelled"})
"""What query-migrate says when no migration goes on (MigrationStatus in migration.json)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QmpOptions:
    """Which VM, and where."""

    vm: str
    socket: Path
    repository_tag: str
    """First 8 hex digits of the repository's id: bitmaps of other repositories are not ours."""
    disks: Mapping[str, str] | None = None
    """Disk name → block node; None = all writable disks (see source/nodes.py)."""
    live_directory: Path | None = None
    """Where the socket for live reading goes; made when it is needed. None: disks are never read live."""
    connect_timeout_s: float = 10.0
    """QEMU greets at once, unless another client is connected."""


class QmpSource:
    """A Source over QMP. Not thread-safe."""

    def __init__(self, options: QmpOptions, *, clock: Clock | None = None) -> None:
        """Connect to the VM that `options` name.

        Raises:
            SourceUnreachable, SourceBusy, NotQmp: as Monitor.connect.
        """
        self._options = options
        self._clock = clock or SystemClock()
        self._owner = Owner(repository=options.repository_tag, vm=options.vm)
        self._monitor = Monitor.connect(options.vm, options.socket, timeout_s=options.connect_timeout_s)
        self._jobs = Jobs(self._monitor, self._clock)
        self._live = Exports(self._monitor, self._owner, options.live_directory, self._clock)

    def survey(
        self, base: Base | None, *, full: bool = False, tidy: bool = True, keep: Collection[CaptureId] = ()
    ) -> Sequence[DiskSurvey]:
        kept = {*keep, *([base.capture] if base is not None else [])}
        with self._translated():
            self._refuse_while_migrating()
            if tidy:
                self._clear_jobs_and_nodes()
            graph = self._graph()
            disks = self._disks(graph)
            if tidy:
                self._remove_bitmaps(graph, lambda made_by: made_by not in kept)
        return [self._survey_disk(name, node, graph, base, full=full) for name, node in disks.items()]

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
        try:
            with self._translated():
                copies = self._plan(capture, base, disks, layers)
                return self._capture(capture, copies, instant, watch, deadline_s, pace)
        except TimeoutError as err:
            raise CaptureTimeout(vm=self._options.vm, timeout_s=timeout_s) from err

    def check_live(self, disks: Sequence[DiskSurvey]) -> None:
        with self._translated():
            self._live.check()

    def begin_recording(self, capture: CaptureId, disks: Sequence[DiskSurvey]) -> Mapping[str, object]:
        with self._translated():
            self._refuse_while_migrating()
            nodes = self._as_surveyed(disks)
            actions = [
                begin_bitmap(nodes[disk.name].node_name, self._owner.bitmap(capture, disk.name), disk.persistent)
                for disk in disks
            ]
            self._monitor.execute("transaction", {"actions": actions})
        return {}

    def open_live(self, base: Base | None, disks: Sequence[DiskSurvey], *, pace: Pace) -> LiveView:
        with self._translated():
            self._refuse_while_migrating()
            return self._live.open(base, disks, self._as_surveyed(disks), pace)

    def incarnation(self) -> str:
        return incarnation_of(self._monitor.peer)

    def is_running(self) -> bool:
        with self._translated():
            return self._run_state() == "running"

    def pause(self, *, timeout_s: float) -> bool:
        with self._translated():
            if self._run_state() != "running":
                return False
            self._monitor.execute("stop", timeout_s=timeout_s)
            return True

    def resume(self, *, timeout_s: float) -> None:
        with self._translated():
            if self._run_state() == "paused":
                self._monitor.execute("cont", timeout_s=timeout_s)

    def release(self, keep: CaptureId) -> None:
        with self._translated():
            self._remove_bitmaps(self._graph(), lambda made_by: made_by != keep)

    def close(self) -> None:
        self._monitor.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # What QEMU has

    def _graph(self) -> BlockGraph:
        """QEMU's block nodes with all their bitmaps, in one answer; and what uses them."""
        nodes = self._monitor.query("query-named-block-nodes", list[Node])
        return BlockGraph(
            nodes=[node for node in nodes if not self._owner.owns_node(node.node_name)],
            devices=self._monitor.query("query-block", list[Device]),
            exports=self._monitor.query("query-block-exports", list[Export]),
        )

    def _disks(self, graph: BlockGraph) -> dict[str, Node]:
        wanted = self._options.disks
        known = ", ".join(graph.writable()) or "none"
        disks: dict[str, Node] = {}
        for name, node in choose_disks(graph, wanted).items():
            if node is None:
                raise DiskMissing(vm=self._options.vm, node=wanted[name] if wanted else name, known=known)
            disks[name] = node
        if not disks:
            raise DiskMissing(vm=self._options.vm, node="that is a disk", known=known)
        return disks

    def _bitmap(self, base: Base | None, disk: str) -> str:
        return "" if base is None else self._owner.bitmap(base.capture, disk)

    def _survey_disk(self, name: str, node: Node, graph: BlockGraph, base: Base | None, *, full: bool) -> DiskSurvey:
        size_bytes = node.image.virtual_size
        decision = decide(name, size_bytes, node.dirty_bitmaps, base, name=self._bitmap(base, name), full=full)
        is_full = decision.kind is Kind.FULL
        return DiskSurvey(
            name=name,
            size_bytes=size_bytes,
            kind=decision.kind,
            reason=decision.reason,
            copy_bytes=graph.allocated_bytes(node) if is_full else decision.dirty_bytes,
            persistent=node.keeps_bitmaps,
        )

    def _refuse_while_migrating(self) -> None:
        """A VM that arrives has not loaded its bitmaps yet; one that leaves must not have its disks held by a job."""
        state = self._run_state()
        if state is None:
            return
        migration = self._monitor.query("query-migrate", dict[str, object]).get("status")
        if state in _MIGRATING:
            raise self._failed("query-status", f"the VM is being migrated, its state is {state}")
        if migration not in _NO_MIGRATION:
            raise self._failed("query-migrate", f"the VM is being migrated, the migration is {migration}")

    def _run_state(self) -> str | None:
        """QEMU's RunState of the VM; None from a qemu-storage-daemon, which runs none."""
        try:
            return str(self._monitor.query("query-status", dict[str, object]).get("status"))
        except CommandRefused:
            return None

    # Taking a capture

    def _plan(
        self, capture: CaptureId, base: Base | None, disks: Sequence[DiskSurvey], layers: Mapping[str, Path]
    ) -> list[DiskCopy]:
        nodes = self._as_surveyed(disks)
        copies = []
        for index, disk in enumerate(disks):
            copy = DiskCopy(
                disk=disk,
                node=nodes[disk.name],
                path=layers[disk.name],
                layer_node=self._owner.layer_node(index),
                job=self._owner.job(capture, index),
                bitmap=self._owner.bitmap(capture, disk.name),
                base_bitmap=self._owner.bitmap(base.capture, disk.name) if base is not None else "",
            )
            copies.append(copy)
        return copies

    def _as_surveyed(self, disks: Sequence[DiskSurvey]) -> dict[str, Node]:
        """The nodes of `disks`, which must be there and of the size that the survey told."""
        nodes = self._disks(self._graph())
        for disk in disks:
            if disk.name not in nodes or nodes[disk.name].image.virtual_size != disk.size_bytes:
                raise self._failed("query-named-block-nodes", f"disk {disk.name} is not as it was surveyed")
        return nodes

    def _capture(
        self,
        capture: CaptureId,
        copies: Sequence[DiskCopy],
        instant: Instant,
        watch: Watch,
        deadline_s: float,
        pace: Pace,
    ) -> CaptureResult:
        made: list[Path] = []
        try:
            self._refuse_while_migrating()
            definition = describe(self._monitor, {copy.disk.name: copy.node for copy in copies})
            owner = identity(self._monitor.peer)
            for copy in copies:
                make_layer(copy.path, copy.disk.size_bytes, owner)
                made.append(copy.path)
            for copy in copies:
                self._monitor.execute("blockdev-add", copy.layer())
            tuning, speed = copy_tuning(self._monitor.qemu_version()), speed_of(pace, len(copies))
            with instant() as limit_s:
                time = self._begin(copies, tuning, speed, limit_s)
            ids = [copy.job for copy in copies]
            self._jobs.wait(ids, deadline_s=deadline_s, on_progress=watch.tick, pace=pace, speed=speed)
            self._close_layers(copies)
        except BaseException as err:
            self._abandon(capture, made, err)
            raise
        return CaptureResult(time=time, consistency=Consistency.CRASH, definition=definition)

    def _begin(self, copies: Sequence[DiskCopy], tuning: Action, speed: int, limit_s: float) -> datetime:
        """Start all bitmaps and all jobs at one instant; returns the time that the disks show.

        The clock is read before, not after: the point then surely holds all that the
        guest had written by that time, so the loss reckoned from it is never understated.
        """
        time = self._clock.now().astimezone(UTC)
        actions = [copy.begin_bitmap() for copy in copies] + [copy.begin_backup(tuning, speed) for copy in copies]
        self._monitor.execute("transaction", {"actions": actions}, timeout_s=limit_s)
        return time

    def _close_layers(self, copies: Sequence[DiskCopy]) -> None:
        """Take the layers out of QEMU: it writes what it still holds of their tables and closes the files."""
        for copy in copies:
            self._jobs.dismiss(copy.job)
            self._monitor.execute("blockdev-del", {"node-name": copy.layer_node})

    # Clearing away

    def _abandon(self, capture: CaptureId, made: Sequence[Path], cause: BaseException) -> None:
        """Undo a capture as far as QEMU still answers; what is left, the next survey clears away."""
        if not isinstance(cause, SourceLost):
            try:
                self._clear_jobs_and_nodes()
                self._remove_bitmaps(self._graph(), lambda made_by: made_by == capture)
            except (SourceLost, CaptureFailed, CommandRefused) as err:
                log.warning("vm=%s capture=%s is not cleared away yet: %s", self._options.vm, capture, err)
        for path in made:
            path.unlink(missing_ok=True)

    def _clear_jobs_and_nodes(self) -> None:
        """End our jobs, then delete our layer nodes, which closes their files; and what live reading left."""
        try:
            self._jobs.end(self._owner.owns_job, timeout_s=_CANCEL_TIMEOUT_S)
            self._live.clear()
            for node in self._monitor.query("query-named-block-nodes", list[Node], {"flat": True}):
                if self._owner.owns_node(node.node_name):
                    self._monitor.execute("blockdev-del", {"node-name": node.node_name})
        except TimeoutError as err:
            raise self._failed("job-cancel", f"a job or export did not end in {_CANCEL_TIMEOUT_S:g} s") from err

    def _remove_bitmaps(self, graph: BlockGraph, unwanted: Callable[[CaptureId], bool]) -> None:
        """Remove our bitmaps of `unwanted` captures from all nodes.

        One that can't be removed now (its node became the read-only backing file of
        a snapshot, or another program uses it) harms nobody, and is tried again.
        """
        for node in graph.nodes:
            for bitmap in node.dirty_bitmaps:
                made_by = self._owner.bitmap_capture(bitmap.name)
                if made_by is None or not unwanted(made_by):
                    continue
                try:
                    self._monitor.execute("block-dirty-bitmap-remove", {"node": node.node_name, "name": bitmap.name})
                except CommandRefused as err:
                    log.warning("vm=%s bitmap=%s stays for now: %s", self._options.vm, bitmap.name, err.text)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except CommandRefused as err:
            raise self._failed(err.command, err.text) from err
        except JobFailed as err:
            raise self._failed("blockdev-backup", str(err)) from err

    def _failed(self, operation: str, problem: str) -> CaptureFailed:
        return CaptureFailed(vm=self._options.vm, operation=operation, problem=problem)
