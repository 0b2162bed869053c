"""An AMI becomes an instance: RunInstances once, however often it is asked for, and what comes after.

The client token is made of what the instance is, so that a repeated request is the same instance (API
reference: tokens have up to 64 characters and hold while the instance exists). An instance that was terminated
keeps its token for a while: the next one has another generation in it.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

from drsync.errors import CloudNotFound, CloudRefused, CloudUnavailable, InstanceNotUp
from drsync.model import Clock
from drsync.target.ec2 import tags
from drsync.target.ec2.aws import Aws

if TYPE_CHECKING:
    from mypy_boto3_ec2.type_defs import FilterTypeDef, InstanceTypeDef

_GONE: Final = ("shutting-down", "terminated")
_GENERATIONS: Final = 8
_POLL_S: Final = (0.5, 5.0)
VISIBLE_WITHIN_S: Final = 120.0
"""So long a new instance may not be found: EC2's API is eventually consistent (its user guide)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchSpec:
    """What is launched."""

    of: tags.PointTags
    name: str
    image_id: str
    instance_type: str
    subnet_id: str | None = None
    security_groups: Sequence[str] = ()
    private_ip: str | None = None
    own_tags: Mapping[str, str] = field(default_factory=dict)

    @property
    def tags(self) -> dict[str, str]:
        return {tags.NAME: self.name, **self.own_tags, **self.of.tags()}

    def request(self, generation: int) -> dict[str, Any]:
        """RunInstances for this spec."""
        mine = tags.listed(self.tags)
        request: dict[str, Any] = {
            "ImageId": self.image_id,
            "InstanceType": self.instance_type,
            "MinCount": 1,
            "MaxCount": 1,
            "MetadataOptions": {"HttpTokens": "required", "HttpEndpoint": "enabled"},
            "TagSpecifications": [{"ResourceType": kind, "Tags": mine} for kind in ("instance", "volume")],
        }
        if self.subnet_id is not None:
            interface: dict[str, Any] = {"DeviceIndex": 0, "SubnetId": self.subnet_id, "DeleteOnTermination": True}
            if self.security_groups:
                interface["Groups"] = list(self.security_groups)
            if self.private_ip is not None:
                interface["PrivateIpAddress"] = self.private_ip
            request["NetworkInterfaces"] = [interface]
        else:
            if self.security_groups:
                request["SecurityGroupIds"] = list(self.security_groups)
            if self.private_ip is not None:
                request["PrivateIpAddress"] = self.private_ip
        what = json.dumps([request, generation], sort_keys=True)
        request["ClientToken"] = "drsync-" + hashlib.sha256(what.encode()).hexdigest()[:48]
        return request


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """An instance as AWS tells of it."""

    id: str
    state: str
    image_id: str
    instance_type: str
    private_ip: str
    public_ip: str
    zone: str
    volumes: Mapping[str, str]
    """Device → volume."""
    tags: Mapping[str, str]
    reason: str = ""
    launched_at: datetime | None = None
    """When it was last launched or started."""

    @property
    def is_gone(self) -> bool:
        return self.state in _GONE


class Instances:
    """The instances of a region."""

    def __init__(self, aws: Aws, clock: Clock, *, sleep: Callable[[float], None] = time.sleep) -> None:
        self._aws = aws
        self._clock = clock
        self._sleep = sleep

    def find(self, wanted: Mapping[str, str]) -> list[Instance]:
        """All own instances with these tags that are not terminated.

        Raises:
            CloudError: AWS can't be asked.
        """
        return self._listed(tags.filters(wanted))

    def of_image(self, image_id: str) -> list[Instance]:
        """All own instances of an image that are not terminated.

        Raises:
            CloudError: AWS can't be asked.
        """
        return self._listed([{"Name": "image-id", "Values": [image_id]}])

    def _listed(self, filters: "Sequence[FilterTypeDef]") -> list[Instance]:
        with self._aws.translated("DescribeInstances"):
            pages = self._aws.ec2.get_paginator("describe_instances").paginate(Filters=filters)
            found = [_read(one) for page in pages for group in page["Reservations"] for one in group["Instances"]]
        return [instance for instance in found if not instance.is_gone]

    def launch(self, spec: LaunchSpec) -> str:
        """The id of the instance of a spec; a launch whose answer got lost is found again.

        Raises:
            CloudLimit: a quota, or no such machine is free.
            CloudError: AWS refuses it.
        """
        for generation in range(_GENERATIONS):
            try:
                with self._aws.translated("RunInstances"):
                    answer = self._aws.ec2.run_instances(**spec.request(generation))
            except CloudRefused as err:
                if err.fields["aws_code"] in ("IdempotentParameterMismatch", "IdempotentInstanceTerminated"):
                    continue
                raise
            instance_id = answer["Instances"][0]["InstanceId"]
            if not self.get(instance_id).is_gone:
                return instance_id
        raise CloudUnavailable(
            operation="RunInstances", region=self._aws.region, problem="no client token is left for this point"
        )

    def get(self, instance_id: str) -> Instance:
        """An instance as it is now; one that was just made may take a while to be seen.

        Raises:
            CloudNotFound: there is none.
        """
        give_up_s, pause_s = self._clock.monotonic_s() + VISIBLE_WITHIN_S, _POLL_S[0]
        while True:
            try:
                with self._aws.translated("DescribeInstances"):
                    answer = self._aws.ec2.describe_instances(InstanceIds=[instance_id])
                return _read(answer["Reservations"][0]["Instances"][0])
            except CloudNotFound:
                if self._clock.monotonic_s() + pause_s > give_up_s:
                    raise
            self._sleep(pause_s)
            pause_s = min(pause_s * 2, _POLL_S[1])

    def wait_running(self, instance_id: str, *, timeout_s: float) -> Instance:
        """The instance once it runs.

        Raises:
            InstanceNotUp: it ended instead, or takes longer.
        """
        return self._wait(instance_id, "running", (*_GONE, "stopped"), timeout_s)

    def stop(self, instance_id: str, *, timeout_s: float) -> Instance:
        """Stop it; the instance once it is off.

        Raises:
            InstanceNotUp: it takes longer.
        """
        with self._aws.translated(f"StopInstances {instance_id}"):
            self._aws.ec2.stop_instances(InstanceIds=[instance_id])
        return self._wait(instance_id, "stopped", _GONE, timeout_s)

    def start(self, instance_id: str) -> None:
        """Start one that is off.

        Raises:
            CloudError: AWS refuses.
        """
        with self._aws.translated(f"StartInstances {instance_id}"):
            self._aws.ec2.start_instances(InstanceIds=[instance_id])

    def wait_checked(self, instance_id: str, *, timeout_s: float) -> None:
        """Return when both of EC2's status checks have passed: the host is well, and the guest answers to ARP.

        Raises:
            InstanceNotUp: they don't within the time.
        """
        give_up_s = self._clock.monotonic_s() + timeout_s
        while (state := self._checks(instance_id)) != ("ok", "ok"):
            if self._clock.monotonic_s() + _POLL_S[1] > give_up_s:
                problem = f"its status checks say {state[0]} (system) and {state[1]} (instance)"
                raise InstanceNotUp(instance=instance_id, region=self._aws.region, problem=problem)
            self._sleep(_POLL_S[1])

    def _checks(self, instance_id: str) -> tuple[str, str]:
        with self._aws.translated("DescribeInstanceStatus"):
            answer = self._aws.ec2.describe_instance_status(InstanceIds=[instance_id])["InstanceStatuses"]
        if not answer:
            return "unknown", "unknown"
        return str(answer[0]["SystemStatus"]["Status"]), str(answer[0]["InstanceStatus"]["Status"])

    def _wait(self, instance_id: str, wanted: str, never: Sequence[str], timeout_s: float) -> Instance:
        give_up_s, pause_s = self._clock.monotonic_s() + timeout_s, _POLL_S[0]
        while (instance := self.get(instance_id)).state != wanted:
            late = self._clock.monotonic_s() + pause_s > give_up_s
            if late or instance.state in never:
                problem = f"it is {instance.state}" + (f": {instance.reason}" if instance.reason else "")
                raise InstanceNotUp(instance=instance_id, region=self._aws.region, problem=problem)
            self._sleep(pause_s)
            pause_s = min(pause_s * 1.5, _POLL_S[1])
        return instance

    def tag(self, resource_id: str, own: Mapping[str, str]) -> None:
        """Add tags to an instance or a volume.

        Raises:
            CloudError: AWS refuses.
        """
        with self._aws.translated("CreateTags"):
            self._aws.ec2.create_tags(Resources=[resource_id], Tags=tags.listed(own))

    def terminate(self, instance_id: str) -> None:
        """Terminate it, with its volumes. One that is gone already is fine.

        Raises:
            CloudError: AWS refuses.
        """
        try:
            with self._aws.translated(f"TerminateInstances {instance_id}"):
                self._aws.ec2.terminate_instances(InstanceIds=[instance_id])
        except CloudNotFound:
            return


def _read(instance: "InstanceTypeDef") -> Instance:
    mappings = instance.get("BlockDeviceMappings", [])
    return Instance(
        id=instance["InstanceId"],
        state=str(instance["State"]["Name"]),
        image_id=instance.get("ImageId", ""),
        instance_type=str(instance.get("InstanceType", "")),
        private_ip=instance.get("PrivateIpAddress", ""),
        public_ip=instance.get("PublicIpAddress", ""),
        zone=instance.get("Placement", {}).get("AvailabilityZone", ""),
        volumes={m["DeviceName"]: m["Ebs"]["VolumeId"] for m in mappings if "Ebs" in m},
        tags=tags.read(instance.get("Tags")),
        reason=instance.get("StateReason", {}).get("Message", ""),
        launched_at=instance.get("LaunchTime"),
    )
