"""Brings one point up as an instance, or leaves nothing behind.

    each disk ▶ snapshot ─┐                 (by EBS direct, or by VM Import: importing.py)
                          ├▶ image ▶ instance ▶ (stopped | running ▶ checked)
    each disk ▶ snapshot ─┘

Every step first looks whether AWS has its result already: by the tags of a snapshot, the name of an image, the
client token of an instance. So a run that was killed is repeated by the same command, and a point that waits in AWS
as snapshots (the pilot light) comes up without any data being moved.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

from drsync.errors import CantRunInCloud
from drsync.model import Progress
from drsync.recovery.cloud.cost import cost_of
from drsync.recovery.cloud.disks import DiskShipping, PlannedDisk
from drsync.recovery.cloud.fixing import fixed_disks
from drsync.recovery.cloud.importing import ImportRoute
from drsync.recovery.cloud.made import Kind, Made
from drsync.recovery.cloud.planning import CloudPlanning
from drsync.recovery.cloud.request import CloudOutcome, CloudPlan, CloudRequest, Step, Via
from drsync.recovery.lag import rpo_s
from drsync.session import Session
from drsync.target.ec2 import images, tags
from drsync.target.ec2.aws import Aws
from drsync.target.ec2.images import ImageDisk, ImageSpec, devices
from drsync.target.ec2.instances import Instance, Instances, LaunchSpec
from drsync.target.ec2.snapshot import BLOCK_BYTES, Keeper, Snapshots
from drsync.target.ec2.upload import Tuning


@dataclass(slots=True)
class _Run:
    """What one run has come to so far."""

    plan: CloudPlan
    made: Made
    started_s: float
    steps: list[Step] = field(default_factory=list)
    snapshots: dict[str, str] = field(default_factory=dict)
    sent_blocks: int = 0
    has_image: bool = False
    """An earlier recovery has made an image of this point: its snapshots are not this one's."""


class CloudRecovery:
    """Brings points up in one region."""

    def __init__(
        self,
        session: Session,
        aws: Aws,
        snapshots: Snapshots,
        *,
        say: Callable[[str], None] = lambda _line: None,
        sleep: Callable[[float], None] = time.sleep,
        tuning: Tuning | None = None,
    ) -> None:
        """`say` is told what happens; `tuning` is for imports."""
        self._session = session
        self._aws = aws
        self._snapshots = snapshots
        self._instances = Instances(aws, session.clock, sleep=sleep)
        self._say = say
        self._tuning = tuning
        self._sleep = sleep

    def plan(self, request: CloudRequest) -> CloudPlan:
        """What `run` would do; nothing is made. What would refuse it is in the plan's errors.

        Raises:
            UnknownVm, UnknownPoint, PointLost, IntegrityError, StoreError: there is no such point.
            CloudError: AWS can't be asked.
        """
        return CloudPlanning(self._session, self._aws, self._shipping(request), request).plan()

    def _shipping(self, request: CloudRequest) -> DiskShipping:
        return DiskShipping(
            session=self._session,
            snapshots=self._snapshots,
            keeper=Keeper.RESTORE,
            own_tags=request.tags,
            is_fixed=request.fix_guest,
        )

    def run(self, plan: CloudPlan, progress: Progress, *, started_s: float | None = None) -> CloudOutcome:
        """Bring the instance up; the RTO is reckoned from `started_s`, or from now.

        Raises:
            DrsyncError: the first of the plan's errors; nothing was made.
            ObjectMissing, ObjectDamaged, StoreError, CloudError: it failed on the way; all that was made is removed.
            CloudLeftovers: it failed, and not all of that could be removed.
            InstanceNotUp: the instance is there, but EC2's checks do not pass; it stays.
        """
        if plan.errors:
            raise plan.errors[0]
        made = Made(self._aws, self._snapshots, self._instances, sleep=self._sleep)
        run = _Run(plan, made, self._session.clock.monotonic_s() if started_s is None else started_s)
        try:
            image_id, instance = self._bring_up(run, progress)
        except BaseException as err:
            if plan.request.keep_on_error:
                made.keep()
            else:
                made.remove(err)
            raise
        instance = self._wait(run, instance)
        return self._outcome(run, image_id, instance)

    def _bring_up(self, run: _Run, progress: Progress) -> tuple[str, Instance]:
        plan = run.plan
        if plan.existing is not None:
            self._say(f"{plan.request.vm}: instance {plan.existing.id} of this point is there already")
            return plan.existing.image_id, self._settled(run, plan.existing.id)
        shipping = self._shipping(plan.request)
        route = ImportRoute(self._aws, shipping, plan, tuning=self._tuning)
        run.has_image = bool(images.find(self._aws, plan.of.identity()))
        image_id = route.converted() if plan.request.convert_guest else None
        if image_id is not None:
            self._say(f"{plan.request.vm}: image {image_id}, converted before")
        elif plan.request.convert_guest and plan.request.via is Via.VM_IMPORT:
            image_id = self._convert(run, route, progress)
        elif plan.request.fix_guest and not all(disk.existing for disk in plan.disks):
            self._fixed_snapshots(run, shipping, progress)
        else:
            for disk in plan.disks:
                with self._step(run, f"snapshot {disk.name}"):
                    run.snapshots[disk.name] = self._snapshot(run, shipping, route, disk, progress)
            if plan.request.convert_guest:
                image_id = self._convert(run, route, progress)
        if image_id is None:
            with self._step(run, "image"):
                image_id = self._image(run)
        with self._step(run, "instance"):
            instance_id = self._instances.launch(self._launch_spec(plan, image_id))
            run.made.add(Kind.INSTANCE, instance_id)
            self._say(f"{plan.request.vm}: instance {instance_id} is launched")
            return image_id, self._settled(run, instance_id)

    def _settled(self, run: _Run, instance_id: str) -> Instance:
        """The instance, running or stopped as it was asked for, its volumes tagged with their disks."""
        plan, instance = run.plan, self._instances.get(instance_id)
        if instance.state == "stopped" and plan.request.start:
            self._instances.start(instance_id)
        if instance.state != "stopped" or plan.request.start:
            instance = self._instances.wait_running(instance_id, timeout_s=plan.request.timeout_s)
        disks = self._devices(run, instance.image_id)
        for device, volume_id in instance.volumes.items():
            if device in disks:
                self._instances.tag(volume_id, {tags.DISK: disks[device]})
        if instance.state == "running" and not plan.request.start:
            instance = self._instances.stop(instance_id, timeout_s=plan.request.timeout_s)
        return instance

    def _devices(self, run: _Run, image_id: str) -> dict[str, str]:
        """Device → disk: as registered, or as AWS has named them in a conversion."""
        plan = run.plan
        if not plan.request.convert_guest:
            return {device: disk.name for device, disk in zip(devices(len(plan.disks)), plan.disks, strict=True)}
        by_snapshot = images.devices_of(self._aws, image_id)
        return {by_snapshot[s]: name for name, s in run.snapshots.items() if s in by_snapshot}

    def _wait(self, run: _Run, instance: Instance) -> Instance:
        request = run.plan.request
        if not request.wait or not request.start:
            return instance
        with self._step(run, "checks"):
            self._instances.wait_checked(instance.id, timeout_s=request.timeout_s)
        return self._instances.get(instance.id)

    def _convert(self, run: _Run, route: ImportRoute, progress: Progress) -> str:
        """The image of a guest that AWS has converted, from the disks' snapshots, or from images of them."""
        with self._step(run, "conversion"):
            imported = route.convert(run.snapshots, progress)
        for snapshot_id in imported.snapshot_ids:
            if snapshot_id not in run.snapshots.values():
                run.made.add(Kind.SNAPSHOT, snapshot_id)
        run.made.add(Kind.IMAGE, imported.image_id)
        names = [disk.name for disk in run.plan.disks]
        run.snapshots.update(zip(names, imported.snapshot_ids, strict=False))
        self._say(f"{run.plan.request.vm}: image {imported.image_id}, converted by AWS")
        return imported.image_id

    def _snapshot(
        self, run: _Run, shipping: DiskShipping, route: ImportRoute, disk: PlannedDisk, progress: Progress
    ) -> str:
        """The snapshot of one disk."""
        vm = run.plan.request.vm
        if disk.existing is not None:
            self._say(f"{vm} {disk.name}: snapshot {disk.existing.id} has this point already")
            if disk.existing.tags.get(tags.KEEPER) == Keeper.RESTORE and not run.has_image:
                run.made.add(Kind.SNAPSHOT, disk.existing.id)  # by this recovery, before it was killed
        elif run.plan.request.via is Via.VM_IMPORT:
            snapshot_id = route.snapshot(disk, progress)
            run.made.add(Kind.SNAPSHOT, snapshot_id)
            return snapshot_id
        written = shipping.write(
            run.plan.point, disk, progress, opened=lambda snapshot_id: run.made.add(Kind.SNAPSHOT, snapshot_id)
        )
        run.sent_blocks += written.sent_blocks
        return written.snapshot_id

    def _fixed_snapshots(self, run: _Run, shipping: DiskShipping, progress: Progress) -> None:
        """The snapshots of all disks, with the guest prepared for EC2."""
        began_s = self._session.clock.monotonic_s()
        with fixed_disks(self._session, run.plan, progress, self._say) as fixed:
            run.steps.append(Step(name="fix guest", took_s=self._session.clock.monotonic_s() - began_s))
            for disk in run.plan.disks:
                with self._step(run, f"snapshot {disk.name}"):
                    opened = partial(run.made.add, Kind.SNAPSHOT)
                    written = shipping.write_fixed(run.plan.point, disk, fixed, progress, opened=opened)
                run.snapshots[disk.name] = written.snapshot_id
                run.sent_blocks += written.sent_blocks

    def _image(self, run: _Run) -> str:
        plan = run.plan
        spec = ImageSpec(
            of=plan.of,
            disks=[
                ImageDisk(name=disk.name, snapshot_id=run.snapshots[disk.name], volume_gib=disk.volume_gib)
                for disk in plan.disks
            ],
            architecture=plan.guest.architecture,
            boot_mode=plan.boot_mode,
            tpm=plan.tpm,
            uefi_data=plan.uefi_data,
            own_tags=plan.request.tags,
        )
        image_id, is_new = images.register(self._aws, spec)
        if is_new or not self._instances.of_image(image_id):
            run.made.add(Kind.IMAGE, image_id)
        self._say(f"{plan.request.vm}: image {image_id}")
        return image_id

    def _launch_spec(self, plan: CloudPlan, image_id: str) -> LaunchSpec:
        if plan.instance_type is None:  # which is one of the errors
            raise CantRunInCloud(vm=plan.request.vm, region=plan.region, problem="no instance type is chosen")
        return LaunchSpec(
            of=plan.of,
            name=plan.request.instance_name,
            image_id=image_id,
            instance_type=plan.instance_type.name,
            subnet_id=plan.subnet,
            security_groups=plan.request.security_groups,
            private_ip=plan.private_ip,
            own_tags=plan.request.tags,
        )

    @contextmanager
    def _step(self, run: _Run, name: str) -> Iterator[None]:
        began_s = self._session.clock.monotonic_s()
        yield
        run.steps.append(Step(name=name, took_s=self._session.clock.monotonic_s() - began_s))

    def _outcome(self, run: _Run, image_id: str, instance: Instance) -> CloudOutcome:
        plan, clock = run.plan, self._session.clock
        took_s = clock.monotonic_s() - run.started_s
        return CloudOutcome(
            plan=plan,
            instance=instance,
            image_id=image_id,
            snapshots=run.snapshots,
            was_there=plan.existing is not None,
            steps=tuple(run.steps),
            sent_blocks=run.sent_blocks,
            cost=cost_of(
                put_blocks=run.sent_blocks,
                block_bytes=BLOCK_BYTES,
                volume_gib=plan.volume_gib,
            ),
            rto_s=took_s,
            rpo_s=rpo_s(self._session, plan.point, plan.request.lost_at or clock.now()),
        )
