"""What drsync shall reach, beside what it did: printed figures, which fail nothing."""

from dataclasses import dataclass

from bench.measuring import MIB, Figure, Journal

OURS = "drsync"


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """One line of the summary."""

    goal: str
    measured: str
    reached: bool | None
    """None: it could not be compared."""

    def __str__(self) -> str:
        word = {True: "reached", False: "not reached", None: "not measured"}[self.reached]
        return f"{self.goal:60} {self.measured:>40}  {word}"


def goals(journal: Journal) -> list[Goal]:
    """Every goal, from the medians of all runs."""
    return [
        _ship(journal.median(OURS, "ship alone")),
        _at_most("full", 1.5, journal.median(OURS, "full"), journal.median("qemu-img", "convert")),
        _stored(journal, "full"),
        _stored(journal, "full", "increment"),
        _at_most("increment", 0.5, journal.median(OURS, "increment"), journal.median("virtnbdbackup", "increment")),
        _restore(journal.median(OURS, "restore"), journal.median("restic", "restore")),
        _sparse(journal.median(OURS, "1 MiB on sparse 2 TiB")),
        _memory(journal),
    ]


def _at_most(what: str, factor: float, mine: Figure | None, theirs: Figure | None) -> Goal:
    goal = f"{what}: at most {factor} x " + {"full": "qemu-img convert", "increment": "virtnbdbackup"}[what]
    if mine is None or theirs is None:
        return _unknown(goal)
    ratio = mine.wall_s / theirs.wall_s
    return Goal(goal=goal, measured=f"{ratio:.2f} x ({_pair(mine, theirs)})", reached=ratio <= factor)


def _restore(mine: Figure | None, theirs: Figure | None) -> Goal:
    goal = "restore: at least 2 x as fast as restic"
    if mine is None or theirs is None:
        return _unknown(goal)
    ratio = theirs.wall_s / mine.wall_s
    return Goal(goal=goal, measured=f"{ratio:.2f} x ({_pair(mine, theirs)})", reached=ratio >= 2)


def _ship(mine: Figure | None) -> Goal:
    goal = "ship alone: at least 800 MB/s of raw data"
    if mine is None or mine.raw_bytes is None:
        return _unknown(goal)
    rate = mine.raw_bytes / 1e6 / mine.wall_s
    return Goal(goal=goal, measured=f"{rate:.0f} MB/s", reached=rate >= 800)


def _stored(journal: Journal, *steps: str) -> Goal:
    goal = f"stored ({' + '.join(steps)}): at most restic's"
    mine, theirs = (_stored_bytes(journal, tool, steps) for tool in (OURS, "restic"))
    if mine is None or theirs is None:
        return _unknown(goal)
    measured = f"{mine / theirs:.3f} x ({mine / MIB:.0f} : {theirs / MIB:.0f} MiB)"
    return Goal(goal=goal, measured=measured, reached=mine <= theirs)


def _stored_bytes(journal: Journal, tool: str, steps: tuple[str, ...]) -> int | None:
    found = [f.stored_bytes for step in steps if (f := journal.median(tool, step)) and f.stored_bytes is not None]
    return sum(found) if len(found) == len(steps) else None


def _sparse(mine: Figure | None) -> Goal:
    goal = "1 MiB changed on a sparse disk of 2 TiB: under 1 s"
    if mine is None:
        return _unknown(goal)
    return Goal(goal=goal, measured=f"{mine.wall_s:.2f} s", reached=mine.wall_s < 1)


def _memory(journal: Journal) -> Goal:
    goal = "peak memory: under 300 MiB in every step"
    found = journal.of(OURS)
    if not found:
        return _unknown(goal)
    worst = max(found, key=lambda figure: figure.peak_mib)
    return Goal(goal=goal, measured=f"{worst.peak_mib:.0f} MiB ({worst.step})", reached=worst.peak_mib < 300)


def _pair(mine: Figure, theirs: Figure) -> str:
    return f"{mine.wall_s:.2f} : {theirs.wall_s:.2f} s"


def _unknown(goal: str) -> Goal:
    return Goal(goal=goal, measured="-", reached=None)
