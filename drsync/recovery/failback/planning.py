"""From a request to a plan: which instance, which volumes, compared with what. Makes nothing."""

from collections.abc import Sequence

from drsync.catalog import Point
from drsync.errors import CantFailBack, DrsyncError, StillProtected, UnknownPoint
from drsync.finding import Finding
from drsync.heartbeat import read_heartbeats
from drsync.image import PointImage
from drsync.recovery.failback.request import FailbackDisk, FailbackPlan, FailbackRequest, Reference
from drsync.session import Session
from drsync.target.domain.values import Notes
from drsync.target.ec2 import tags
from drsync.target.ec2.aws import Aws
from drsync.target.ec2.instances import Instance, Instances
from drsync.target.ec2.snapshot import GIB, FoundSnapshot, Keeper, Snapshots
from drsync.target.ec2.volumes import Volume, Volumes

MARK = "failback"
"""What a point that came home is told by, in its definition."""


def came_from(image: PointImage) -> str:
    """The instance that a point was failed back from; empty if it was captured."""
    told = image.point.definition.get(MARK)
    return str(told.get("instance", "")) if isinstance(told, dict) else ""


class FailbackPlanning:
    """One run of `Failback.plan`."""

    def __init__(
        self, session: Session, aws: Aws, snapshots: Snapshots, instances: Instances, request: FailbackRequest
    ) -> None:
        self._session = session
        self._finding = Finding(session)
        self._aws = aws
        self._snapshots = snapshots
        self._instances = instances
        self._request = request
        self._errors: list[DrsyncError] = []
        self._notes = Notes()

    def plan(self) -> FailbackPlan:
        """The plan; what would refuse it is in its errors.

        Raises:
            CantFailBack: there is no instance, or several and none was chosen.
            UnknownVm, PointLost, IntegrityError, StoreError: there is no log to bring it home to.
            CloudError: AWS can't be asked.
        """
        vm = self._request.vm
        head, head_image = self._finding.find_point(vm)
        instance = self._instance()
        origin, origin_image = self._origin(instance)
        self._check_gone_on(instance, origin, head, head_image)
        known = self._snapshots.find(self._owner())
        disks = self._disks(instance, origin, head, known)
        if instance.state == "running" and not self._request.stop:
            text = "it runs on: what it writes from now on comes home with the next failback, or with --stop"
            self._notes.changed("instance", text)
        return FailbackPlan(
            request=self._request,
            region=self._aws.region,
            instance=instance,
            origin=origin,
            origin_image=origin_image,
            head=head,
            head_image=head_image,
            disks=disks,
            notes=tuple(self._notes.all),
            errors=tuple(self._errors),
        )

    def _owner(self) -> dict[str, str]:
        return {tags.REPOSITORY: self._session.repository.id.hex(), tags.VM: self._request.vm}

    def _cant(self, problem: str) -> CantFailBack:
        return CantFailBack(vm=self._request.vm, region=self._aws.region, problem=problem)

    def _instance(self) -> Instance:
        wanted = self._request.instance
        there = self._instances.find(self._owner())
        found = [one for one in there if wanted in (None, one.id)]
        listed = ", ".join(f"{one.id} ({one.tags.get(tags.NAME, '')}, {one.state})" for one in there) or "none"
        if not found:
            raise self._cant(f"it has no instance {wanted or ''}".rstrip() + f" there; there is {listed}")
        if len(found) > 1:
            raise self._cant(f"it has several instances: {listed}; choose one with --instance")
        if found[0].state not in ("running", "stopped"):
            self._errors.append(self._cant(f"instance {found[0].id} is {found[0].state}: wait until it runs or is off"))
        return found[0]

    def _origin(self, instance: Instance) -> tuple[Point | None, PointImage | None]:
        """The point that the instance was made from, if the log still has that very one."""
        number = tags.number(instance.tags, tags.POINT)
        try:
            point, image = self._finding.find_point(self._request.vm, number=number or None)
        except UnknownPoint:
            return None, None
        return (point, image) if point.capture == tags.capture_of(instance.tags) else (None, None)

    def _check_gone_on(self, instance: Instance, origin: Point | None, head: Point, head_image: PointImage) -> None:
        """Whether anybody else wrote the log since, or saw the VM alive elsewhere."""
        if came_from(head_image) != instance.id and (origin is None or head.number != origin.number):
            began = tags.number(instance.tags, tags.POINT)
            self._gone_on(instance, f"point {head.number} is newer than point {began}, from which it began")
        seen = read_heartbeats(self._session.repository).of(self._request.vm)
        if seen is not None and instance.launched_at is not None and seen.checked_at > instance.launched_at:
            when = f"{seen.checked_at:%Y-%m-%d %H:%M:%S}Z"
            self._gone_on(instance, f"a host saw it run at {when}, after the instance was launched")

    def _gone_on(self, instance: Instance, problem: str) -> None:
        if self._request.take_over:
            self._notes.changed("log", f"{problem}; the instance's state comes behind it all the same")
        else:
            self._errors.append(StillProtected(vm=self._request.vm, instance=instance.id, problem=problem))

    # Disks

    def _disks(
        self, instance: Instance, origin: Point | None, head: Point, known: Sequence[FoundSnapshot]
    ) -> Sequence[FailbackDisk]:
        volumes = Volumes(self._aws).of_instance(instance.id)
        by_name = {name: volume for volume in volumes if (name := self._disk_of(volume, known))}
        wanted = [disk.name for disk in (origin or head).disks]
        for volume in volumes:
            if self._disk_of(volume, known) not in wanted:
                self._notes.lost(f"volume {volume.id}", f"at {volume.device}: it is no disk of the VM, and stays there")
        found: list[FailbackDisk] = []
        for name in wanted:
            if name in by_name:
                found.append(self._disk(name, by_name[name], instance, origin, head, known))
            else:
                self._errors.append(self._cant(f"instance {instance.id} has no volume that is disk {name}"))
        return found

    @staticmethod
    def _disk_of(volume: Volume, known: Sequence[FoundSnapshot]) -> str:
        """Which disk a volume is, by its own tag, or that of the snapshot that it was made from."""
        made_from = next((s.tags for s in known if s.id == volume.snapshot_id), {})
        return volume.tags.get(tags.DISK) or made_from.get(tags.DISK, "")

    def _disk(
        self,
        name: str,
        volume: Volume,
        instance: Instance,
        origin: Point | None,
        head: Point,
        known: Sequence[FoundSnapshot],
    ) -> FailbackDisk:
        size_bytes = volume.size_gib * GIB
        before_bytes = next((disk.size_bytes for disk in head.disks if disk.name == name), None)
        if before_bytes is not None and before_bytes != size_bytes:
            text = f"its size is {size_bytes} bytes, the volume's, and was {before_bytes}"
            self._notes.changed(f"disk {name}", text)
        reference, reason = self._reference(name, volume, instance, origin, head, known)
        if before_bytes is None and not reason:
            reference, reason = None, "the newest point does not have it"
        return FailbackDisk(
            name=name,
            volume_id=volume.id,
            size_bytes=size_bytes,
            before_bytes=before_bytes,
            reference=reference,
            reason=reason,
        )

    def _reference(
        self,
        name: str,
        volume: Volume,
        instance: Instance,
        origin: Point | None,
        head: Point,
        known: Sequence[FoundSnapshot],
    ) -> tuple[Reference | None, str]:
        """What the volume can be compared with; or None, and why not."""
        if self._request.whole:
            return None, "it was asked for"
        of_disk = [s for s in known if s.tags.get(tags.DISK) == name and s.state == "completed"]
        for snapshot in of_disk:
            is_earlier_pass = snapshot.tags.get(tags.KEEPER) == Keeper.FAILBACK and snapshot.volume_id == volume.id
            if is_earlier_pass and snapshot.tags.get(tags.CAPTURE) == head.capture:
                return Reference(snapshot=snapshot, point=head.number), ""
        if origin is None:
            return None, "the log has not the point any more that the instance began from"
        made_from = next((s for s in of_disk if s.id == volume.snapshot_id), None)
        if made_from is None:
            return None, "the snapshot is gone that its volume was made from"
        if tags.is_changed(made_from.tags) or made_from.tags.get(tags.CAPTURE) != origin.capture:
            return None, "the guest was changed on its way into AWS"
        return Reference(snapshot=made_from, point=origin.number), ""
