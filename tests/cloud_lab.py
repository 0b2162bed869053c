"""A VM in a repository, and what its restore to EC2 has made in LocalStack."""

import http.client
import json
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from command_line import Cli
from drsync_localstack import volume_files
from ec2_lab import Cloud, wait_for
from libvirt_points import file_of
from shipped_vm import OracleDisk, ShippedVm, read_raw

from drsync.format.keys import RootKey
from drsync.keyfile import write_key_file
from drsync.store.directory import DirectoryStore

MIB = 1024 * 1024


def definition(
    *,
    memory_mib: int = 1024,
    vcpus: int = 1,
    firmware: str = "",
    devices: str = "",
    disks: tuple[str, ...] = ("root",),
    nvram: bytes | None = None,
) -> Mapping[str, object]:
    """What a point of a libvirt domain holds: the first disk is vda."""
    targets = [f"vd{chr(ord('a') + number)}" for number in range(len(disks))]
    made = "".join(f"<disk type='file' device='disk'><target dev='{target}'/></disk>" for target in targets)
    xml = (
        f"<domain type='kvm'><name>web</name><uuid>6a0f3b1e-9b9f-4d0b-8a44-0f5b6f3a2c11</uuid>"
        f"<memory unit='MiB'>{memory_mib}</memory><vcpu>{vcpus}</vcpu>"
        f"<os{firmware}><type arch='x86_64' machine='q35'>hvm</type></os><devices>{made}{devices}</devices></domain>"
    )
    return {
        "source": "libvirt",
        "domain": {"name": "web", "uuid": "6a0f3b1e-9b9f-4d0b-8a44-0f5b6f3a2c11", "xml": xml},
        "files": [] if nvram is None else [file_of("nvram", nvram)],
        "disks": {name: {"target": target, "format": "raw"} for name, target in zip(disks, targets, strict=True)},
    }


def protected(cli: Cli, place: Path, **more: Any) -> ShippedVm:
    """A VM whose points lie in the repository of `cli`."""
    root = RootKey.generate()
    write_key_file(cli.key_file, root)
    return ShippedVm(place, store=DirectoryStore(cli.repository), root=root, definition=definition(**more))


def start(cli: Cli, *words: str) -> "subprocess.Popen[str]":
    """A command in a process of its own, which can be killed."""
    return subprocess.Popen(
        [sys.executable, "-m", "drsync", "--config", cli.config, *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=dict(os.environ),
    )


def killed_when(cloud: Cloud, operation: str, cli: Cli, *words: str, count: int = 1) -> None:
    """Run a command, and kill -9 it in the middle of an operation that a fault holds up, the `count`th time."""
    process = start(cli, *words)
    try:
        wait_for(lambda: cloud.fired().get(operation, 0) >= count or process.poll() is not None, bool, 60)
        assert process.poll() is None, process.communicate()[0]
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()


class Made:
    """What one VM has in AWS."""

    def __init__(self, cloud: Cloud) -> None:
        self.cloud = cloud
        self._mine: Any = [{"Name": "tag:drsync:vm", "Values": ["web"]}]

    @property
    def snapshots(self) -> dict[str, str]:
        """Snapshot → state."""
        found = self.cloud.ec2.describe_snapshots(Filters=self._mine)["Snapshots"]
        return {one["SnapshotId"]: one["State"] for one in found}

    @property
    def images(self) -> list[str]:
        return [one["ImageId"] for one in self.cloud.ec2.describe_images(Filters=self._mine)["Images"]]

    @property
    def instances(self) -> dict[str, str]:
        """Instance → state, of those that are not terminated."""
        pages = self.cloud.ec2.describe_instances(Filters=self._mine)["Reservations"]
        found = {one["InstanceId"]: one["State"]["Name"] for page in pages for one in page["Instances"]}
        return {name: state for name, state in found.items() if state not in ("terminated", "shutting-down")}

    @property
    def nothing(self) -> bool:
        return not (self.snapshots or self.images or self.instances)

    def instance(self, instance_id: str) -> Any:
        return self.cloud.ec2.describe_instances(InstanceIds=[instance_id])["Reservations"][0]["Instances"][0]

    def volume_of(self, instance_id: str, disk: str) -> Any:
        """The volume that is tagged as this disk."""
        filters: Any = [
            {"Name": "attachment.instance-id", "Values": [instance_id]},
            {"Name": "tag:drsync:disk", "Values": [disk]},
        ]
        (volume,) = self.cloud.ec2.describe_volumes(Filters=filters)["Volumes"]
        return volume

    def write(self, instance_id: str, disk: str, blocks: Mapping[int, bytes]) -> None:
        """Write blocks of 512 KiB of an instance's disk, as its guest would."""
        body = b"".join(struct.pack(">Q", index) + data for index, data in blocks.items())
        volume_id = self.volume_of(instance_id, disk)["VolumeId"]
        parts = urlsplit(self.cloud.endpoint_url)
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
        connection.request("PUT", f"/_drsync/volumes/{volume_id}/blocks", body)
        assert json.loads(connection.getresponse().read()) == {"written": len(blocks)}
        connection.close()

    def content_of(self, instance_id: str, disk: str, place: Path) -> OracleDisk:
        """What an instance's disk holds."""
        path = place / f"{instance_id}-{disk}.raw"
        volume_files.get(self.cloud.endpoint_url, self.volume_of(instance_id, disk)["VolumeId"], path)
        return read_raw(path)
