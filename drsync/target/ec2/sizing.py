"""Which instance type a VM gets: the cheapest one of the allowed families that has what the VM had.

What a type can do is what DescribeInstanceTypes says. Prices are not asked for (they need another service
and other rights); for the order within the allowed families it is enough to weigh processors and memory as
the on-demand prices of the usual families do (us-east-1: m5, c5 and r5 differ just by memory, which gives
about 0.037 USD per vCPU and 0.003 USD per GiB and hour). Between equals the order of the families decides.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from drsync.target.ec2.aws import Aws
from drsync.target.ec2.tags import literal

if TYPE_CHECKING:
    from mypy_boto3_ec2.type_defs import InstanceTypeInfoTypeDef

FAMILIES: Final = ("m7i", "m6i", "m5", "c7i", "c6i", "c5", "r7i", "r6i", "r5")
"""Allowed unless the user says otherwise: current, not burstable, without local disks, x86."""
ARM_FAMILIES: Final = ("m7g", "m6g", "c7g", "c6g", "r7g", "r6g")
_VCPU_WEIGHT: Final = 0.037
_GIB_WEIGHT: Final = 0.003


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What the instance must have."""

    vcpus: int
    memory_mib: int
    architecture: str = "x86_64"
    boot_mode: str = "legacy-bios"
    tpm: bool = False
    volumes: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceType:
    """What DescribeInstanceTypes says of a type."""

    name: str
    vcpus: int
    memory_mib: int
    architectures: Collection[str]
    boot_modes: Collection[str]
    tpm: bool
    bare_metal: bool
    volumes: int
    """How many it can have, beside its network interface."""
    current: bool = True

    @property
    def family(self) -> str:
        return self.name.partition(".")[0]

    @property
    def weight(self) -> float:
        """About its price, as far as processors and memory make it."""
        return self.vcpus * _VCPU_WEIGHT + self.memory_mib / 1024 * _GIB_WEIGHT

    def lacks(self, need: Need, *, size_too: bool = True) -> str:
        """Why it can't be the VM; empty if it can. Without `size_too` it may be smaller than the VM was."""
        if need.architecture not in self.architectures:
            return f"is not {need.architecture}"
        if need.boot_mode not in self.boot_modes:
            return f"can't boot by {need.boot_mode}"
        if need.tpm and not self.tpm:
            return "has no NitroTPM"
        if need.volumes > self.volumes:
            return f"takes {self.volumes} volumes, not {need.volumes}"
        if size_too and (self.vcpus < need.vcpus or self.memory_mib < need.memory_mib):
            return f"has {self.vcpus} vCPUs and {self.memory_mib} MiB"
        return ""


def choose(types: Sequence[InstanceType], need: Need, families: Sequence[str] = FAMILIES) -> InstanceType | None:
    """The cheapest type of these families that has what is needed; None if there is none. Pure."""
    order = {family: number for number, family in enumerate(families)}
    fitting = [t for t in types if t.family in order and not t.bare_metal and not t.lacks(need)]
    return min(fitting, key=lambda t: (round(t.weight, 4), order[t.family], t.name), default=None)


def types_of(aws: Aws, families: Sequence[str]) -> list[InstanceType]:
    """All types of these families that the region has.

    Raises:
        CloudError: AWS can't be asked.
    """
    with aws.translated("DescribeInstanceTypes"):
        pages = aws.ec2.get_paginator("describe_instance_types").paginate(
            Filters=[{"Name": "instance-type", "Values": [f"{literal(family)}.*" for family in families]}]
        )
        return [_read(info) for page in pages for info in page["InstanceTypes"]]


def type_named(aws: Aws, name: str) -> InstanceType | None:
    """The type of that name; None if the region has none.

    Raises:
        CloudError: AWS can't be asked.
    """
    with aws.translated("DescribeInstanceTypes"):
        answer = aws.ec2.describe_instance_types(Filters=[{"Name": "instance-type", "Values": [literal(name)]}])
    return next((_read(info) for info in answer["InstanceTypes"]), None)


def offered_in(aws: Aws, zone: str) -> set[str]:
    """The names of the types that an availability zone has: not every one has all of the region.

    Raises:
        CloudError: AWS can't be asked.
    """
    with aws.translated("DescribeInstanceTypeOfferings"):
        pages = aws.ec2.get_paginator("describe_instance_type_offerings").paginate(
            LocationType="availability-zone", Filters=[{"Name": "location", "Values": [zone]}]
        )
        return {str(offer["InstanceType"]) for page in pages for offer in page["InstanceTypeOfferings"]}


def _read(info: "InstanceTypeInfoTypeDef") -> InstanceType:
    ebs = info.get("EbsInfo", {})
    attachments = int(ebs.get("MaximumEbsAttachments") or 27)
    shared = ebs.get("AttachmentLimitType", "shared") == "shared"
    return InstanceType(
        name=str(info["InstanceType"]),
        vcpus=info["VCpuInfo"]["DefaultVCpus"],
        memory_mib=info["MemoryInfo"]["SizeInMiB"],
        architectures=tuple(map(str, info["ProcessorInfo"]["SupportedArchitectures"])),
        boot_modes=tuple(map(str, info.get("SupportedBootModes") or ("legacy-bios",))),
        tpm=info.get("NitroTpmSupport") == "supported",
        bare_metal=info.get("BareMetal", False),
        volumes=attachments - 1 if shared else attachments,
        current=info.get("CurrentGeneration", True),
    )
