"""The pilot light: a VM's newest points wait in AWS as EBS snapshots, ahead of the disaster.

    point 12 ──▶ snapshots ◀── keep = 2 ── point 17 ──▶ snapshots over those of 12, only what differs
                                             │
    disaster: RegisterImage + RunInstances ──┘ no data moves

What there is, AWS itself says: snapshots with drsync's tags (target/ec2/tags.py). A point is whole when each of its
disks has a completed snapshot. Nothing is kept elsewhere, so it may run anywhere, also in turns; two at once write the
same snapshot, block by block with the same content.
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final

from drsync.catalog import Point
from drsync.errors import CloudRefused
from drsync.finding import Finding
from drsync.model import Progress
from drsync.recovery.cloud.disks import DiskShipping
from drsync.recovery.cloud.importing import belongs_to
from drsync.recovery.lag import rpo_s
from drsync.session import Session
from drsync.target.ec2 import images, tags
from drsync.target.ec2.aws import Aws
from drsync.target.ec2.import_leftovers import ImportLeftovers
from drsync.target.ec2.instances import Instances
from drsync.target.ec2.snapshot import BLOCK_BYTES, FoundSnapshot, Keeper, Snapshots
from drsync.target.ec2.upload import ImportPlace

log = logging.getLogger(__name__)

ABANDONED_AFTER: Final = timedelta(hours=24)
"""AWS gives up a pending snapshot that nothing was written to for so long (snapshot.TIMEOUT_MIN)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldPoint:
    """What AWS has of one point."""

    number: int
    capture: str
    snapshots: Sequence[FoundSnapshot]

    @property
    def is_whole(self) -> bool:
        """Whether it can come up without any data being moved."""
        return self.number > 0 and len(self.disks) == tags.number(self.snapshots[0].tags, tags.DISKS)

    @property
    def disks(self) -> Mapping[str, str]:
        """Disk → completed snapshot."""
        return {s.tags.get(tags.DISK, ""): s.id for s in self.snapshots if s.state == "completed"}

    @property
    def started_at(self) -> datetime:
        return max(snapshot.started_at for snapshot in self.snapshots)


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncOutcome:
    """What one sync of one VM came to."""

    vm: str
    point: int
    time: datetime
    was_there: bool
    sent_blocks: int
    snapshots: Mapping[str, str]
    removed: Sequence[str]
    took_s: float

    @property
    def sent_bytes(self) -> int:
        return self.sent_blocks * BLOCK_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class PilotStatus:
    """How ready a VM is in AWS."""

    vm: str
    newest: int
    """The newest point in the repository."""
    held: int | None
    """The newest one that is whole in AWS."""
    lag_s: float | None
    """How much would be lost if the site were lost now and this point came up."""
    points: Sequence[HeldPoint]
    """All of which AWS has something, the newest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leftover:
    """Something in AWS that nobody needs."""

    kind: str
    id: str
    vm: str
    why: str


@dataclass(slots=True)
class Cleaned:
    """What a clean-up did, or would do."""

    removed: list[Leftover] = field(default_factory=list)
    kept: list[Leftover] = field(default_factory=list)
    """AWS did not let them go; `why` says what it said."""


class PilotLight:
    """The snapshots of one repository in one region."""

    def __init__(self, session: Session, aws: Aws, snapshots: Snapshots, *, keep: int) -> None:
        self._session = session
        self._finding = Finding(session)
        self._aws = aws
        self._snapshots = snapshots
        self._keep = keep
        self._shipping = DiskShipping(session=session, snapshots=snapshots, keeper=Keeper.SYNC)

    def held(self, vm: str) -> list[HeldPoint]:
        """What AWS has of a VM's points, the newest first.

        Raises:
            CloudError: AWS can't be asked.
        """
        by_capture: dict[str, list[FoundSnapshot]] = {}
        found = self._snapshots.find(self._owner(vm))
        for snapshot in (s for s in found if not tags.is_changed(s.tags)):
            by_capture.setdefault(snapshot.tags.get(tags.CAPTURE, ""), []).append(snapshot)
        held = [
            HeldPoint(number=tags.number(its[0].tags, tags.POINT), capture=capture, snapshots=its)
            for capture, its in by_capture.items()
        ]
        return sorted(held, key=lambda point: point.number, reverse=True)

    def _owner(self, vm: str) -> dict[str, str]:
        return {tags.REPOSITORY: self._session.repository.id.hex(), tags.VM: vm}

    def is_due(self, vm: str, interval_s: float) -> bool:
        """Whether the last point was begun so long ago that a newer one is wanted.

        Raises:
            CloudError: AWS can't be asked.
        """
        begun = [point.started_at for point in self.held(vm) if point.is_whole]
        return not begun or self._session.clock.now() - max(begun) >= timedelta(seconds=interval_s)

    def sync(self, vm: str, progress: Progress) -> SyncOutcome:
        """Bring the newest point to AWS, as far as it is not there, then remove what is outdated.

        Raises:
            UnknownVm, UnknownPoint, PointLost, IntegrityError, StoreError: the point can't be had.
            CloudError: AWS does not take it; what is written stays, and the next sync goes on with it.
        """
        began_s = self._session.clock.monotonic_s()
        point, image = self._finding.find_point(vm)
        sent, snapshots = 0, {}
        disks = self._shipping.plan(point, image, [disk.name for disk in point.disks])
        for disk in disks:
            written = self._shipping.write(point, disk, progress)
            sent += written.sent_blocks
            snapshots[disk.name] = written.snapshot_id
        return SyncOutcome(
            vm=vm,
            point=point.number,
            time=point.time,
            was_there=all(disk.existing is not None for disk in disks),
            sent_blocks=sent,
            snapshots=snapshots,
            removed=[one.id for one in self._remove(self._outdated(vm)).removed],
            took_s=self._session.clock.monotonic_s() - began_s,
        )

    def status(self, vm: str) -> PilotStatus:
        """How ready a VM is.

        Raises:
            UnknownVm, UnknownPoint, IntegrityError, StoreError: the repository can't be read.
            CloudError: AWS can't be asked.
        """
        newest, _ = self._finding.find_point(vm)
        points = self.held(vm)
        whole = next((point for point in points if point.is_whole), None)
        return PilotStatus(
            vm=vm,
            newest=newest.number,
            held=None if whole is None else whole.number,
            lag_s=None if whole is None else self._lag_s(vm, whole, newest),
            points=points,
        )

    def _lag_s(self, vm: str, held: HeldPoint, newest: Point) -> float:
        point = newest if held.capture == newest.capture else self._finding.find_point(vm, number=held.number)[0]
        return rpo_s(self._session, point, self._session.clock.now())

    def cleanup(self, vm: str, *, restored: bool = False, dry_run: bool = False, bucket: str | None = None) -> Cleaned:
        """Remove what is outdated; with `restored` also what restores and failbacks made and no instance uses.

        That is also what killed imports have left; their images in `bucket`, if it is given. No instance is touched.

        Raises:
            CloudError: AWS can't be asked.
        """
        leftovers = self._outdated(vm)
        cleaned = Cleaned()
        if restored:
            leftovers = [*self._restored(vm), *leftovers]
            cleaned = self._clean_imports(vm, bucket, dry_run=dry_run)
        done = Cleaned(removed=list(leftovers)) if dry_run else self._remove(leftovers)
        return Cleaned(removed=[*cleaned.removed, *done.removed], kept=done.kept)

    def _clean_imports(self, vm: str, bucket: str | None, *, dry_run: bool) -> Cleaned:
        imports = ImportLeftovers(
            self._aws,
            None if bucket is None else ImportPlace(bucket=bucket),
            belongs_to(self._session.repository.id.hex(), vm),
            clock=self._session.clock,
        )
        found = imports.find()
        if not dry_run:
            imports.remove(found)
        return Cleaned(removed=[Leftover(kind=o.kind, id=o.id, vm=vm, why="an import left it") for o in found])

    def _outdated(self, vm: str) -> list[Leftover]:
        """Points beyond those that are kept, and pending snapshots that nobody goes on with."""
        held = self.held(vm)
        whole = [point for point in held if point.is_whole and self._is_of_sync(point)]
        judged = [(s, self._why_outdated(point, s, whole)) for point in held for s in point.snapshots]
        return [
            Leftover(kind="snapshot", id=snapshot.id, vm=vm, why=why)
            for snapshot, why in judged
            if why and snapshot.tags.get(tags.KEEPER) == Keeper.SYNC
        ]

    def _is_of_sync(self, point: HeldPoint) -> bool:
        return any(snapshot.tags.get(tags.KEEPER) == Keeper.SYNC for snapshot in point.snapshots)

    def _why_outdated(self, point: HeldPoint, snapshot: FoundSnapshot, whole: Sequence[HeldPoint]) -> str:
        if point in whole[: self._keep]:
            return ""
        if point in whole:
            return f"{self._keep} newer points are there"
        if snapshot.state == "error":
            return "AWS gave it up"
        if whole and point.number < whole[0].number:
            return "it is part of a point that was never whole, and a newer one is"
        if self._session.clock.now() - snapshot.started_at > ABANDONED_AFTER and snapshot.state == "pending":
            return "nobody goes on with it"
        return ""

    def _restored(self, vm: str) -> list[Leftover]:
        """Images that no instance was made of, and the snapshots that restores made for them."""
        instances = Instances(self._aws, self._session.clock)
        found: list[Leftover] = []
        used: set[str] = set()
        for image in images.find(self._aws, self._owner(vm)):
            its = {
                m["Ebs"]["SnapshotId"] for m in image.get("BlockDeviceMappings", []) if "SnapshotId" in m.get("Ebs", {})
            }
            if instances.of_image(image["ImageId"]):
                used |= its
            else:
                found.append(Leftover(kind="image", id=image["ImageId"], vm=vm, why="no instance uses it"))
        made = self._snapshots.find({**self._owner(vm), tags.KEEPER: Keeper.RESTORE.value})
        why = "a restore made it; no instance uses it"
        found += [Leftover(kind="snapshot", id=s.id, vm=vm, why=why) for s in made if s.id not in used]
        return found + self._of_failbacks(vm, used)

    def _of_failbacks(self, vm: str, used: Collection[str]) -> list[Leftover]:
        """Snapshots that failbacks made of instances that are gone: nothing will be compared with them any more."""
        there = {instance.id for instance in Instances(self._aws, self._session.clock).find(self._owner(vm))}
        made = self._snapshots.find({**self._owner(vm), tags.KEEPER: Keeper.FAILBACK.value})
        why = "a failback made it; its instance is gone"
        return [
            Leftover(kind="snapshot", id=s.id, vm=vm, why=why)
            for s in made
            if s.id not in used and s.tags.get(tags.INSTANCE) not in there
        ]

    def _remove(self, leftovers: Sequence[Leftover]) -> Cleaned:
        cleaned = Cleaned()
        for one in leftovers:
            try:
                if one.kind == "image":
                    images.deregister(self._aws, one.id)
                else:
                    self._snapshots.delete(one.id)
            except CloudRefused as err:  # in use by an image, locked, shared: then it is needed
                log.info("vm=%s %s %s stays: %s", one.vm, one.kind, one.id, err)
                cleaned.kept.append(Leftover(kind=one.kind, id=one.id, vm=one.vm, why=str(err)))
            else:
                cleaned.removed.append(one)
        return cleaned
