"""The result of a preflight: all findings, and what they come to."""

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Final

import msgspec

from drsync.preflight.checks import EC2_CHECKS
from drsync.preflight.facts import Facts
from drsync.preflight.findings import Finding, Verdict
from drsync.preflight.machine import Machine

KEPT_NAME: Final = "preflight.json"
"""Where the last report of a VM is kept, in its part of the spool."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Whether a point would boot; kept with the VM."""

    target: str
    vm: str
    point: int
    point_time: datetime
    checked_at: datetime
    reader: str
    findings: tuple[Finding, ...]
    read_bytes: int = 0
    """What was read from the repository's objects for it."""
    took_s: float = 0.0

    @property
    def verdict(self) -> Verdict:
        """The worst of the findings; what is not known is worse than a warning."""
        return next((v for v in _WORST_FIRST if any(f.verdict is v for f in self.findings)), Verdict.OK)

    @property
    def counts(self) -> Mapping[Verdict, int]:
        """How many findings there are of each verdict; 0 for those that did not occur."""
        return Counter(finding.verdict for finding in self.findings)


_WORST_FIRST = (Verdict.FAILS, Verdict.UNKNOWN, Verdict.WARNING, Verdict.OK)


def judge(machine: Machine, facts: Facts) -> Sequence[Finding]:
    """All findings for EC2, in the order of a boot."""
    return [finding for check in EC2_CHECKS for finding in check(machine, facts)]
