"""What could not be read: never passed over in silence."""

from collections.abc import Sequence

from drsync.preflight.facts import JOURNAL_WAITS, Facts
from drsync.preflight.findings import Finding, ok, unknown
from drsync.preflight.machine import Machine

_SHOWN = 8


def check_reading(_machine: Machine, facts: Facts) -> Sequence[Finding]:
    """Whether everything that was looked for could be looked at."""
    check = "reading"
    found: list[Finding] = []
    if not facts.reader:
        install = "pip install 'drsync[preflight]'   (or apt install python3-guestfs); then the same again"
        found.append(unknown(check, "nothing is installed here that reads file systems", install))
    action = "what depends on it is not known; in the guest: fsck, or mount it to see"
    found += [unknown(check, problem, action) for problem in facts.problems[:_SHOWN]]
    if len(facts.problems) > _SHOWN:
        found.append(
            unknown(check, f"{len(facts.problems) - _SHOWN} more of the kind", "drsync preflight --json has all")
        )
    if not facts.complete and not facts.problems:
        found.append(unknown(check, "the search of the disks did not come to its end", "the same again"))
    return found or [
        ok(check, f"all file systems that were looked for could be read ({facts.reader}){_waiting(facts)}")
    ]


def _waiting(facts: Facts) -> str:
    """Which file systems were in use: what changed in the last seconds may lie in their journals only."""
    names = [v.name for v in facts.volumes if v.problem == JOURNAL_WAITS] if facts.reader == "dissect" else []
    return f"; {', '.join(names)} was in use, its journal is not played back" if names else ""
