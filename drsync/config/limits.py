"""`[limits]` and `[[limits.window]]`: how much may be moved, and the course of that over the week."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Final
from zoneinfo import ZoneInfo

from drsync.config.key import Key, read_days, read_minute_of_day, read_rate, read_time_zone
from drsync.pace import Rate, Window

_UPLOAD_MEANING: Final = "Bytes a second that one drsync process sends to the repository, all VMs together."
_SEED_UPLOAD_MEANING: Final = "Of `upload`, as much as seeds may take."
_INCREMENT_UPLOAD_MEANING: Final = "Of `upload`, as much as captures may take that are no seeds."
_RESTORE_MEANING: Final = (
    "Bytes a second that one drsync process reads from the repository: restores, `verify`, what is brought to AWS."
)
_READ_MEANING: Final = "Bytes a second that are read of a VM's disks, for a capture or a seed; of each VM."
_SEED_READ_MEANING: Final = "Of `read`, as much as a seed may take; of each VM."
_CLOUD_MEANING: Final = "Bytes a second that one drsync process writes into EBS snapshots, or reads of them."


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitsSettings:
    """`[limits]`: how much of the line and of the disks drsync may take."""

    upload: Annotated[
        Rate,
        Key(
            name="upload",
            parse=read_rate,
            default="unlimited",
            meaning=_UPLOAD_MEANING,
            why="Nobody else knows what the line has to carry beside.",
        ),
    ]
    seed_upload: Annotated[
        Rate,
        Key(
            name="seed_upload",
            parse=read_rate,
            default="unlimited",
            meaning=_SEED_UPLOAD_MEANING,
            why="While nothing else is sent, a seed may have it all.",
        ),
    ]
    increment_upload: Annotated[
        Rate,
        Key(
            name="increment_upload",
            parse=read_rate,
            default="unlimited",
            meaning=_INCREMENT_UPLOAD_MEANING,
            why="They are small, and what holds them up costs the RPO.",
        ),
    ]
    restore: Annotated[
        Rate,
        Key(
            name="restore",
            parse=read_rate,
            default="unlimited",
            meaning=_RESTORE_MEANING,
            why="Who restores is in a hurry.",
        ),
    ]
    read: Annotated[
        Rate,
        Key(
            name="read",
            parse=read_rate,
            default="unlimited",
            meaning=_READ_MEANING,
            why="An increment is small, and soon over; while one is read the guest's writes cost more.",
        ),
    ]
    seed_read: Annotated[
        Rate,
        Key(
            name="seed_read",
            parse=read_rate,
            default="unlimited",
            meaning=_SEED_READ_MEANING,
            why="Reading waits for the line, which is mostly slower than the disks.",
        ),
    ]
    cloud: Annotated[
        Rate,
        Key(
            name="cloud",
            parse=read_rate,
            default="unlimited",
            meaning=_CLOUD_MEANING,
            why="AWS takes about 500 MiB/s of an account; a line to it from outside should not be filled.",
        ),
    ]
    time_zone: Annotated[
        ZoneInfo | None,
        Key(
            name="time_zone",
            parse=read_time_zone,
            default="local",
            meaning='Whose clock the windows go by: `"local"`, this host\'s, or a name such as `"Europe/Berlin"`.',
            why="It is what a clock in the room shows, if the host was set up so; many are in UTC.",
        ),
    ]


_OUTSIDE: Final = "Left out: as if there were no such window."


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowSettings:
    """`[[limits.window]]`: hours of the week in which other limits hold."""

    begin_min: Annotated[
        int,
        Key(
            name="from",
            parse=read_minute_of_day,
            default="00:00",
            meaning="When it begins, by the clock of `time_zone`.",
            why="With the default of `to`: the whole day.",
        ),
    ]
    end_min: Annotated[
        int,
        Key(
            name="to",
            parse=read_minute_of_day,
            default="24:00",
            meaning="When it ends. What ends before it begins, ends on the next day.",
            why="With the default of `from`: the whole day.",
        ),
    ]
    days: Annotated[
        frozenset[int],
        Key(
            name="days",
            parse=read_days,
            default="mon-sun",
            meaning="The days on which it begins: `mon tue wed thu fri sat sun`, ranges and commas.",
            why="Every day.",
        ),
    ]
    upload: Annotated[Rate | None, Key(name="upload", parse=read_rate, meaning=_UPLOAD_MEANING, why=_OUTSIDE)]
    seed_upload: Annotated[
        Rate | None, Key(name="seed_upload", parse=read_rate, meaning=_SEED_UPLOAD_MEANING, why=_OUTSIDE)
    ]
    increment_upload: Annotated[
        Rate | None, Key(name="increment_upload", parse=read_rate, meaning=_INCREMENT_UPLOAD_MEANING, why=_OUTSIDE)
    ]
    restore: Annotated[Rate | None, Key(name="restore", parse=read_rate, meaning=_RESTORE_MEANING, why=_OUTSIDE)]
    read: Annotated[Rate | None, Key(name="read", parse=read_rate, meaning=_READ_MEANING, why=_OUTSIDE)]
    seed_read: Annotated[Rate | None, Key(name="seed_read", parse=read_rate, meaning=_SEED_READ_MEANING, why=_OUTSIDE)]
    cloud: Annotated[Rate | None, Key(name="cloud", parse=read_rate, meaning=_CLOUD_MEANING, why=_OUTSIDE)]


RATES: Final = ("upload", "seed_upload", "increment_upload", "restore", "read", "seed_read", "cloud")
"""The limits that have a course over the week."""


def with_windows(limits: LimitsSettings, windows: Sequence[WindowSettings]) -> LimitsSettings:
    """The limits, each with its course over the week; of several windows the first one counts that sets it."""

    def course(name: str) -> Rate:
        usual: Rate = getattr(limits, name)
        found = [(window, rate) for window in windows if (rate := getattr(window, name)) is not None]
        return Rate(
            bytes_per_s=usual.bytes_per_s,
            windows=tuple(
                Window(days=w.days, begin_min=w.begin_min, end_min=w.end_min, bytes_per_s=rate.bytes_per_s)
                for w, rate in found
            ),
            zone=limits.time_zone,
        )

    return LimitsSettings(time_zone=limits.time_zone, **{name: course(name) for name in RATES})
