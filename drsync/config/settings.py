"""Every key of the configuration file: the one definition.

The classes below say each key's name, how its text is read, its default, and
why that default. docs/config.md and examples/drsync.toml are checked against
them by a test. Values are in the unit that their name says (`reserve_bytes`, `rpo_s`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Final

from drsync.config.key import (
    Key,
    one_of,
    read_at_least_1s,
    read_endpoint_url,
    read_keep,
    read_lock,
    read_name,
    read_names,
    read_parallel,
    read_path,
    read_repository_url,
    read_size,
    read_text,
    read_within,
)
from drsync.config.limits import LimitsSettings, WindowSettings
from drsync.config.prune import PruneSettings
from drsync.config.retention import Retention, RetentionSettings
from drsync.config.vms import ProtectSettings, VmSettings
from drsync.store.lock import LockMode, LockPolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class RepositorySettings:
    """`[repository]`: where points go, and the key that seals them."""

    url: Annotated[
        str,
        Key(
            name="url",
            parse=read_repository_url,
            required=True,
            meaning="Where points are kept: `file:///DIRECTORY` or `s3://BUCKET/PREFIX`.",
            why="No place is right for everybody, and a repository on the VM's own disk would be lost with it.",
        ),
    ]
    endpoint_url: Annotated[
        str | None,
        Key(
            name="endpoint_url",
            parse=read_endpoint_url,
            meaning="The S3 service's address. Only with `s3://`, and only for stores that are not AWS.",
            why="boto3 knows the addresses of AWS.",
        ),
    ]
    region: Annotated[
        str | None,
        Key(
            name="region",
            parse=read_text,
            meaning="The bucket's region. Only with `s3://`.",
            why="boto3 takes it from AWS_DEFAULT_REGION or ~/.aws/config.",
        ),
    ]
    key_file: Annotated[
        Path,
        Key(
            name="key_file",
            parse=read_path,
            default="/etc/drsync/repository.key",
            meaning="The file with the repository's key, or the keys of some VMs (docs/keys.md). "
            "Only its owner may read it.",
            why="Beside the configuration: the two belong to the host, not to the data.",
        ),
    ]
    lock_s: Annotated[
        float | None,
        Key(
            name="lock",
            parse=read_lock,
            meaning="Objects are locked for so long when they are made, 1d to 3650d, and the maintenance extends that "
            "while they are needed. Only with `s3://`, and a bucket with Object Lock. The same on every host.",
            why="Left out: nothing is locked. A bucket that can't lock would refuse every point. 30d is a good value.",
        ),
    ]
    lock_mode: Annotated[
        LockMode,
        Key(
            name="lock_mode",
            parse=one_of(LockMode),
            default="compliance",
            meaning='Who can end a lock early: with `"compliance"` nobody, with `"governance"` who has the right '
            "s3:BypassGovernanceRetention.",
            why="A lock that can be opened will be. A mistake costs the space of one `lock`, no more.",
        ),
    ]

    @property
    def lock(self) -> LockPolicy | None:
        """How objects are locked; None: they are not."""
        if self.lock_s is None:
            return None
        return LockPolicy(mode=self.lock_mode, period=timedelta(seconds=self.lock_s))


@dataclass(frozen=True, slots=True, kw_only=True)
class SpoolSettings:
    """`[spool]`: where layers wait until the repository has them."""

    path: Annotated[
        Path,
        Key(
            name="path",
            parse=read_path,
            default="/var/lib/drsync/spool",
            meaning="The spool's directory. QEMU must be able to open the files in it.",
            why="The place that the file system standard gives to a program's own lasting data.",
        ),
    ]
    reserve_bytes: Annotated[
        int,
        Key(
            name="reserve",
            parse=read_size,
            default="2GiB",
            meaning="Free space that a capture must leave on the spool's file system; else it is refused.",
            why="Room for what the guest writes anew while a capture runs, and for the file system's other users.",
        ),
    ]
    stream_above_bytes: Annotated[
        int,
        Key(
            name="stream_above",
            parse=read_size,
            default="4GiB",
            meaning="A full or resync of more than this is read live and sent at once, not copied to the spool.",
            why="Copying so much takes a minute in which the guest's writes may wait; more would take longer.",
        ),
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifySettings:
    """`[verify]`: what is stored is read again, so that damage is found while it can be healed."""

    within_s: Annotated[
        float | None,
        Key(
            name="within",
            parse=read_within,
            default="30d",
            meaning="In this time the daemon reads and checks every byte of its VMs' points. At least 1d, or `never`.",
            why="What a disk or a bucket loses is rarely noticed by itself; a month of reading is a trickle.",
        ),
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class CloudSettings:
    """`[[cloud]]`: the newest points wait in AWS as EBS snapshots."""

    name: Annotated[
        str,
        Key(
            name="name",
            parse=read_name,
            required=True,
            meaning="Its name here: `drsync cloud sync --cloud NAME`.",
            why="There can be several regions.",
        ),
    ]
    region: Annotated[
        str | None,
        Key(name="region", parse=read_text, meaning="The AWS region.", why="Left out: that of the environment."),
    ]
    vms: Annotated[
        Sequence[str],
        Key(
            name="vms",
            parse=read_names,
            default="[]",
            meaning="Which VMs, by their names in the repository; `[]` = all that it has.",
            why="Who forgets one would miss it when it is too late.",
        ),
    ]
    interval_s: Annotated[
        float,
        Key(
            name="interval",
            parse=read_at_least_1s,
            default="1h",
            meaning="How often a VM's newest point is brought to AWS, if there is a new one. At least 1s.",
            why="Every 512 KiB that changed are a request that costs; the repository has the points in between.",
        ),
    ]
    keep: Annotated[
        int,
        Key(
            name="keep",
            parse=read_keep,
            default=2,
            meaning="How many points of a VM stay in AWS, 1 to 1000.",
            why="One that can be used while the next one is written, and one before it.",
        ),
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class DaemonSettings:
    """`[daemon]`: the scheduler."""

    parallel: Annotated[
        int,
        Key(
            name="parallel",
            parse=read_parallel,
            default=2,
            meaning="How many VMs are captured and shipped at a time, 1 to 64.",
            why="One reads while another waits for the line; more would make every capture longer.",
        ),
    ]
    seeds: Annotated[
        int,
        Key(
            name="seeds",
            parse=read_parallel,
            default=1,
            meaning="How many VMs are seeded (read live, see `stream_above`) at a time, beside `parallel`, 1 to 64.",
            why="A seed takes as long as the line needs for it: two at a time end no sooner.",
        ),
    ]
    host: Annotated[
        str,
        Key(
            name="host",
            parse=read_name,
            meaning="This host's name in the repository. Two hosts with one repository need two names.",
            why="Left out: the machine's host name, in lower case, other characters replaced by `-`.",
        ),
    ]
    heartbeat_s: Annotated[
        float,
        Key(
            name="heartbeat",
            parse=read_at_least_1s,
            default="30s",
            meaning="How often, at most, it is told when this host's VMs were last seen unchanged. At least 1s.",
            why="One request tells of all VMs: 0.43 $ a month in AWS. What others see of an idle VM is so old.",
        ),
    ]
    stop_timeout_s: Annotated[
        float,
        Key(
            name="stop_timeout",
            parse=read_at_least_1s,
            default="60s",
            meaning="How long SIGTERM lets captures finish; then they are abandoned, safely. At least 1s.",
            why="Below systemd's 90 s, after which it would kill.",
        ),
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """What the configuration file says."""

    path: Path
    repository: RepositorySettings
    spool: SpoolSettings
    limits: LimitsSettings
    verify: VerifySettings
    retention: Retention
    prune: PruneSettings
    vms: Sequence[VmSettings]
    protects: Sequence[ProtectSettings]
    clouds: Sequence[CloudSettings]
    daemon: DaemonSettings


TABLES: Final = {
    "repository": RepositorySettings,
    "spool": SpoolSettings,
    "limits": LimitsSettings,
    "limits.window": WindowSettings,
    "verify": VerifySettings,
    "retention": RetentionSettings,
    "prune": PruneSettings,
    "vm": VmSettings,
    "protect": ProtectSettings,
    "cloud": CloudSettings,
    "daemon": DaemonSettings,
}
"""The file's tables. `[[vm]]` also takes the keys of its source."""
LISTS: Final = frozenset({"limits.window", "vm", "protect", "cloud"})
"""Those of which there may be several."""
