"""A region of AWS as the site of a plan (site.Site).

What an earlier run brought up is recognised by the tags of its instance: one that runs, or is of the point that is
wanted, is started if it is off, waited for, and never restored a second time.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from drsync.config.plan_sites import Ec2Site
from drsync.config.plan_values import WaitFor
from drsync.errors import InstanceNotUp
from drsync.finding import Finding
from drsync.model import Progress
from drsync.pace import TokenBucket
from drsync.recovery.cloud.recover import CloudRecovery
from drsync.recovery.cloud.request import CloudPlan, CloudRequest, Via
from drsync.recovery.site import Arrival, Task
from drsync.recovery.waiting import closed
from drsync.session import Session
from drsync.target.ec2 import tags
from drsync.target.ec2.aws import Aws, CloudOptions
from drsync.target.ec2.instances import Instance, Instances
from drsync.target.ec2.sizing import FAMILIES
from drsync.target.ec2.snapshot import Snapshots

_EVERY_S = 2.0


class CloudSite:
    """A region in which the VMs of a plan come up."""

    def __init__(self, settings: Ec2Site, session: Session, *, sleep: Callable[[float], None] = time.sleep) -> None:
        self._settings = settings
        self._session = session
        self._sleep = sleep
        self._aws = Aws(CloudOptions(region=settings.region))
        self._instances = Instances(self._aws, session.clock, sleep=sleep)
        pace = TokenBucket(session.config.limits.cloud, session.clock)
        self._snapshots = Snapshots(self._aws, session.clock, pace=pace, sleep=sleep)

    @property
    def address(self) -> str:
        return f"ec2:{self._aws.region}"

    @contextmanager
    def opened(self) -> Iterator[None]:
        with self._aws.translated("DescribeVpcs"):
            self._aws.ec2.describe_vpcs(Filters=[{"Name": "is-default", "Values": ["true"]}])
        with self._aws:
            yield

    def check(self, task: Task) -> Arrival:
        request = self._request(task)
        found = self._came_before(request)
        if found is not None:
            return _arrived(found)
        plan = self._recovery(lambda _line: None).plan(request)
        return replace(_arrival(plan, request.instance_name), errors=tuple(plan.errors))

    def bring_up(self, task: Task, progress: Progress, say: Callable[[str], None]) -> Arrival:
        request = self._request(task)
        found = self._came_before(request)
        if found is not None:
            if found.state != "running":
                say(f"{task.vm}: was restored before; starting it")
                self._instances.start(found.id)
            instance_id, arrival = found.id, _arrived(found)
        else:
            recovery = self._recovery(say)
            plan = recovery.plan(request)
            say(f"{task.vm}: restoring point {plan.point.number} of {plan.point.time:%Y-%m-%d %H:%M:%S}Z")
            outcome = recovery.run(plan, progress)
            instance_id, arrival = outcome.instance.id, _arrival(plan, outcome.instance.id)
        self._wait(task, instance_id)
        return arrival

    def _recovery(self, say: Callable[[str], None]) -> CloudRecovery:
        return CloudRecovery(self._session, self._aws, self._snapshots, say=say, sleep=self._sleep)

    def _came_before(self, request: CloudRequest) -> Instance | None:
        """The instance that an earlier run made of this VM: running, or of the point that is wanted now."""
        mine = {
            tags.REPOSITORY: self._session.repository.id.hex(),
            tags.VM: request.vm,
            tags.NAME: request.instance_name,
        }
        for instance in self._instances.find(mine):
            if instance.state in ("running", "pending"):
                return instance
            point, _ = Finding(self._session).find_point(request.vm, number=request.number, at=request.at)
            if tags.capture_of(instance.tags) == point.capture:
                return instance
        return None

    def _wait(self, task: Task, instance_id: str) -> None:
        began_s = self._session.clock.monotonic_s()
        instance = self._instances.wait_running(instance_id, timeout_s=task.timeout_s)
        if task.wait.what is WaitFor.AGENT:
            self._instances.wait_checked(instance_id, timeout_s=task.timeout_s)
        elif task.wait.what is WaitFor.TCP:
            addresses = [task.wait.host] if task.wait.host else [instance.private_ip, instance.public_ip]
            addresses = [address for address in addresses if address]
            while problem := closed(addresses, task.wait.port):
                if self._session.clock.monotonic_s() - began_s >= task.timeout_s:
                    raise InstanceNotUp(instance=instance_id, region=self._aws.region, problem=problem)
                self._sleep(_EVERY_S)

    def _request(self, task: Task) -> CloudRequest:
        site, own = self._settings, task.own
        request = CloudRequest(
            vm=task.vm,
            networks=site.networks,
            security_groups=site.security_groups,
            families=site.families or FAMILIES,
            keep_ip=site.keep_ip,
            tags=site.tags,
            timeout_s=task.timeout_s,
            via=Via(site.via),
            import_bucket=site.bucket,
            import_role=site.import_role,
            convert_guest=site.convert_guest,
            fix_guest=site.fix_guest,
            skip_preflight=not site.preflight,
        )
        if own is None:
            return request
        return replace(
            request,
            number=own.point,
            at=own.at,
            name=own.name,
            networks={**site.networks, **own.networks},
            security_groups=own.security_groups or site.security_groups,
            instance_type=own.instance_type,
            boot_mode=own.boot_mode,
            private_ip=own.private_ip,
            keep_ip=site.keep_ip and own.private_ip is None,
            via=request.via if own.via is None else Via(own.via),
            convert_guest=_chosen(own.convert_guest, default=site.convert_guest and not own.fix_guest),
            fix_guest=_chosen(own.fix_guest, default=site.fix_guest and not own.convert_guest),
        )


def _chosen(own: bool | None, *, default: bool) -> bool:
    """What a VM's own table says, else what its site does."""
    return default if own is None else own


def _arrival(plan: CloudPlan, name: str) -> Arrival:
    return Arrival(
        name=name,
        point=plan.point,
        number=plan.point.number,
        live_bytes=sum(disk.put_bytes for disk in plan.disks),
        notes=tuple(f"{note.subject}: {note.text}" for note in plan.notes if note.effect != "problem"),
    )


def _arrived(found: Instance) -> Arrival:
    return Arrival(name=found.id, number=tags.number(found.tags, tags.POINT) or None, was_there=True)
