"""What a run has made in AWS: listed, and removed again if the run fails."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from drsync.errors import CloudError, CloudLeftovers
from drsync.target.ec2 import images
from drsync.target.ec2.aws import Aws
from drsync.target.ec2.instances import Instances
from drsync.target.ec2.snapshot import Snapshots

log = logging.getLogger(__name__)

_TRIES: Final = 12
_PAUSE_S: Final = 5.0


class Kind(StrEnum):
    """What can be made."""

    SNAPSHOT = "snapshot"
    IMAGE = "image"
    INSTANCE = "instance"


_COMMANDS: Final = {
    Kind.SNAPSHOT: "aws ec2 delete-snapshot --region {region} --snapshot-id {id}",
    Kind.IMAGE: "aws ec2 deregister-image --region {region} --image-id {id}",
    Kind.INSTANCE: "aws ec2 terminate-instances --region {region} --instance-ids {id}",
}


@dataclass(frozen=True, slots=True)
class Thing:
    """Something in AWS that goes on costing."""

    kind: Kind
    id: str


class Made:
    """Everything that one run has made, in order."""

    def __init__(
        self, aws: Aws, snapshots: Snapshots, instances: Instances, *, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._aws = aws
        self._snapshots = snapshots
        self._instances = instances
        self._sleep = sleep
        self.things: list[Thing] = []

    def add(self, kind: Kind, resource_id: str) -> None:
        """Something was made."""
        self.things.append(Thing(kind, resource_id))

    def keep(self) -> None:
        """Say what stays, although the run failed."""
        for thing in self.things:
            log.warning("kept %s %s; remove it with: %s", thing.kind, thing.id, self.command(thing))

    def remove(self, why: BaseException) -> None:
        """Remove all of it, the newest first.

        Raises:
            CloudLeftovers: something can't be removed; all of that is listed, with the commands that do it.
        """
        left: list[Thing] = []
        for thing in reversed(self.things):
            log.info("removing %s %s", thing.kind, thing.id)
            if not self._removed(thing):
                left.append(thing)
        self.things.clear()
        if left:
            raise CloudLeftovers(
                problem=f"{why or type(why).__name__}",
                region=self._aws.region,
                left=", ".join(f"{thing.kind} {thing.id}" for thing in left),
                commands="; ".join(self.command(thing) for thing in left),
                things=tuple((thing.kind.value, thing.id) for thing in left),
            ) from why

    def command(self, thing: Thing) -> str:
        """The command that removes a thing by hand."""
        return _COMMANDS[thing.kind].format(region=self._aws.region, id=thing.id)

    def _removed(self, thing: Thing) -> bool:
        """Whether it could be removed; a snapshot may be in use by its image for some seconds more."""
        for attempt in range(_TRIES):
            try:
                self._remove(thing)
            except CloudError as err:
                if err.fields.get("aws_code") != "InvalidSnapshot.InUse" or attempt == _TRIES - 1:
                    log.warning("can't remove %s %s: %s", thing.kind, thing.id, err)
                    return False
                self._sleep(_PAUSE_S)
            else:
                return True
        return False

    def _remove(self, thing: Thing) -> None:
        match thing.kind:
            case Kind.SNAPSHOT:
                self._snapshots.delete(thing.id)
            case Kind.IMAGE:
                images.deregister(self._aws, thing.id)
            case Kind.INSTANCE:
                self._instances.terminate(thing.id)
