"""`[retention]`: which points stay, and for which VMs it is otherwise."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from fnmatch import fnmatchcase
from typing import Annotated

from drsync.config.key import Key, read_count, read_duration
from drsync.retention import KEEP_ALL, Rules

_NOT_NAMED = "What is not asked for is not promised."


@dataclass(frozen=True, slots=True, kw_only=True)
class RetentionSettings:
    """`[retention]`: the rules. Each by itself can keep a point; `drsync retention --explain` says which one does."""

    last: Annotated[
        int,
        Key(
            name="last",
            parse=read_count,
            default=0,
            meaning="So many of the newest points stay, 0 to 1000000.",
            why=_NOT_NAMED,
        ),
    ]
    hourly: Annotated[
        int,
        Key(
            name="hourly",
            parse=read_count,
            default=0,
            meaning="Of so many of the newest hours that have points, the first point stays.",
            why=_NOT_NAMED,
        ),
    ]
    daily: Annotated[
        int,
        Key(name="daily", parse=read_count, default=0, meaning="The same for days (in UTC).", why=_NOT_NAMED),
    ]
    weekly: Annotated[
        int,
        Key(
            name="weekly",
            parse=read_count,
            default=0,
            meaning="The same for weeks, which begin on Monday.",
            why=_NOT_NAMED,
        ),
    ]
    monthly: Annotated[
        int, Key(name="monthly", parse=read_count, default=0, meaning="The same for months.", why=_NOT_NAMED)
    ]
    yearly: Annotated[
        int, Key(name="yearly", parse=read_count, default=0, meaning="The same for years.", why=_NOT_NAMED)
    ]
    minimum_age_s: Annotated[
        float,
        Key(
            name="minimum_age",
            parse=read_duration,
            default="3d",
            meaning="A point that is younger stays, however many there are.",
            why="A weekend, and a day to notice. It is what holds against a flood of forged points.",
        ),
    ]

    def rules(self) -> Rules:
        return Rules(
            last=self.last,
            hourly=self.hourly,
            daily=self.daily,
            weekly=self.weekly,
            monthly=self.monthly,
            yearly=self.yearly,
            minimum_age=timedelta(seconds=self.minimum_age_s),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """Which rules hold for which VM."""

    default: Rules = KEEP_ALL
    """Without `[retention]` everything stays: nobody loses points for not having read of a default."""
    exceptions: Mapping[str, Rules]
    """Name or pattern of VMs → their rules, in the order of the file."""

    def of(self, vm: str) -> Rules:
        """The rules of a VM: those of its own name, else of the first pattern that matches, else those of all."""
        if vm in self.exceptions:
            return self.exceptions[vm]
        return next((rules for pattern, rules in self.exceptions.items() if fnmatchcase(vm, pattern)), self.default)
