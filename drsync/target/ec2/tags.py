"""How drsync knows in AWS what is its own: tags on everything that it makes.

    drsync:repository   id of the repository                     } which VM
    drsync:vm           the VM's name in it                      }
    drsync:capture      the capture that made the point          } which state of it; CAPTURE-fixed: with the
                        guest prepared for EC2 (--fix-guest), so no longer what was captured
    drsync:point        its number, for people
    drsync:disk         on snapshots and volumes: the disk
    drsync:disks        on snapshots: how many disks the point has
    drsync:keeper       restore | sync | failback: who keeps a snapshot, and may remove it
    drsync:instance     on snapshots of a failback: the instance whose volume they show
    drsync:converted    on images: AWS has changed the guest (ImportImage)
    drsync:plan         on snapshots: digest of the list of blocks that they take
    drsync:written      on pending snapshots: how many of those blocks AWS surely has
    Name                for the console

Tags can be written by everybody in the account who may tag: they say what can be used again, and
never that something can be trusted more than the account.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from mypy_boto3_ec2.type_defs import FilterTypeDef, TagTypeDef

PREFIX: Final = "drsync:"
REPOSITORY: Final = "drsync:repository"
VM: Final = "drsync:vm"
CAPTURE: Final = "drsync:capture"
POINT: Final = "drsync:point"
DISK: Final = "drsync:disk"
DISKS: Final = "drsync:disks"
KEEPER: Final = "drsync:keeper"
INSTANCE: Final = "drsync:instance"
CONVERTED: Final = "drsync:converted"
PLAN: Final = "drsync:plan"
WRITTEN: Final = "drsync:written"
NAME: Final = "Name"
MAX_VALUE: Final = 256
"""Characters of a tag's value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PointTags:
    """Which point of which VM something in AWS is."""

    repository: str
    vm: str
    capture: str
    point: int

    def tags(self) -> dict[str, str]:
        return {**self.identity(), POINT: str(self.point)}

    def identity(self) -> dict[str, str]:
        """What something of this very point is found by."""
        return {**self.owner(), CAPTURE: self.capture}

    def owner(self) -> dict[str, str]:
        """What everything of this VM is found by."""
        return {REPOSITORY: self.repository, VM: self.vm}


FIXED: Final = "-fixed"
"""Behind the capture of what is not as it was captured; the ids of captures are hex digits."""


def capture_of(tags: Mapping[str, str]) -> str:
    """The capture that something was made from, whether or not the guest was prepared for EC2 on the way."""
    return tags.get(CAPTURE, "").removesuffix(FIXED)


def is_changed(tags: Mapping[str, str]) -> bool:
    """Whether the guest on it is not as it was captured: prepared by drsync, or converted by AWS."""
    return tags.get(CAPTURE, "").endswith(FIXED) or CONVERTED in tags


def listed(tags: Mapping[str, str]) -> list["TagTypeDef"]:
    """As requests want them."""
    return [{"Key": key, "Value": value[:MAX_VALUE]} for key, value in tags.items()]


def read(tags: Iterable["TagTypeDef"] | None) -> dict[str, str]:
    """As answers have them."""
    return {tag.get("Key", ""): tag.get("Value", "") for tag in tags or ()}


def number(tags: Mapping[str, str], key: str) -> int:
    """A tag's value as a number; 0 if it is none."""
    text = tags.get(key, "")
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 12 else 0


def filters(tags: Mapping[str, str]) -> list["FilterTypeDef"]:
    """What finds things with all of these tags."""
    return [{"Name": f"tag:{key}", "Values": [literal(value)]} for key, value in tags.items()]


def literal(value: str) -> str:
    """A filter's value that means just this text: * and ? are wildcards."""
    return value[:MAX_VALUE].replace("\\", "\\\\").replace("*", "\\*").replace("?", "\\?")
