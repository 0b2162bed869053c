"""Damage at random while a real QEMU's guest writes: named as it restores, and healed by the next capture."""

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest
from damaging import REGIONS
from hypothesis import strategies as st
from protected_vm import VM
from seed_history import BEGINNING, SMALL, Guest
from vm_history import CHANGES, Change, Lab, play_any

from drsync.capture import Result
from drsync.damage import record
from drsync.errors import ChainBroken, ObjectDamaged, ObjectMissing
from drsync.format import Malformed, names
from drsync.hurt import TOLD_NAME, standing_of, told_of
from drsync.log import Log
from drsync.mapped import load_mapped_image
from drsync.model import NoProgress
from drsync.restore import restore_disk
from drsync.seed import SeedOptions
from drsync.target.image import ImageDisk, ImageFormat
from drsync.verify import verify

pytestmark = pytest.mark.qemu
BUDGET_S: Final = 120.0 if os.environ.get("DRSYNC_SOAK") else 15.0
NOT_AS_WRITTEN = (ChainBroken, ObjectDamaged, ObjectMissing)


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """Something happens to an object of the log, but not to the newest segment, which the next one follows."""

    seed: int

    def run(self, lab: Lab) -> None:
        chance = random.Random(self.seed)
        segments = [info.key for info in lab.store.list(names.log_prefix(VM))]
        found = sorted([*segments[:-1], *(info.key for info in lab.store.list(names.pack_prefix(VM)))])
        if not found:
            return
        path = lab.place / "repository" / chance.choice(found)
        try:
            data = REGIONS[chance.choice(sorted(REGIONS))](path.read_bytes(), chance)
        except (Malformed, ValueError):  # it is damaged already, so that there is no such region in it
            return
        path.unlink()
        if data is not None:
            path.write_bytes(data)


@dataclass(frozen=True, slots=True, kw_only=True)
class Capture:
    """A cycle, while the guest goes on writing."""

    meanwhile: Sequence[Change]

    def run(self, lab: Lab) -> None:
        guest = Guest(lab, self.meanwhile, None)
        lab.cycle(seed=SeedOptions(read_pace=guest, limits=SMALL))


Step = Change | Damage | Capture


def restores(lab: Lab, log: Log, point: int) -> bool:
    """Whether a point restores as `drsync restore` does it; if so, it must be what was captured."""
    try:
        image = load_mapped_image(log, point)
        contents = {}
        for disk in image.point.disks:
            path = lab.place / f"{point}-{disk.name}.raw"
            path.unlink(missing_ok=True)
            target = ImageDisk(path, disk.size_bytes, ImageFormat.RAW, vm=VM, overwrite=False)
            restore_disk(log.objects, image, disk.name, target, NoProgress())
            contents[disk.name] = path.read_bytes()
    except NOT_AS_WRITTEN:
        return False
    assert contents == lab.seen[image.point.capture], f"point {point} is wrong"
    return True


def audit(lab: Lab) -> set[int]:
    """Verify as the daemon of this host does; the points that are hurt."""
    log = Log(lab.repository().vm(VM))
    report = verify(log, committed_seq=0, read_data=True, progress=NoProgress())
    for damaged in report.damaged:
        record(log, [damaged], lab.clock.now())
    lab.spool.vm(VM).note(TOLD_NAME, told_of(standing_of(log), report.hurt, lab.clock.now()))
    return {point.point for point in report.hurt}


def play(place: Path, history: Sequence[Step]) -> None:
    lab = Lab(place, free_nbd=True)
    with lab.daemon:
        for step in history:
            step.run(lab)  # type: ignore[union-attr]
        log = Log(lab.repository().vm(VM))
        hurt = audit(lab)
        standing = standing_of(log)
        for segment in standing.segments:
            if segment.meta.point is not None:
                assert restores(lab, log, segment.seq) == (segment.seq not in hurt)
        outcome = lab.cycle(seed=SeedOptions(limits=SMALL))
        assert outcome.segment is not None
        assert hurt <= {s.seq for s in standing.segments} | standing.holes.keys()
        if standing.segments[-1].seq in hurt:
            assert outcome.result is Result.COMMITTED
        newest = Log(lab.repository().vm(VM))
        assert restores(lab, newest, outcome.segment.seq)
        assert outcome.segment.seq not in audit(lab)
        assert lab.seen[outcome.segment.meta.point.capture] == lab.contents()  # type: ignore[union-attr]


MEANWHILE: Final = st.lists(CHANGES.filter(lambda c: type(c).__name__ != "Grow"), max_size=4)
CAPTURES: Final = st.builds(Capture, meanwhile=MEANWHILE)
STEPS: Final[st.SearchStrategy[list[Step]]] = st.lists(
    st.one_of(CHANGES, CAPTURES, CAPTURES, st.builds(Damage, seed=st.integers(0, 2**32))), min_size=4, max_size=9
)


def history_of(steps: list[Step]) -> list[Step]:
    """Two points at least, and damage at the end."""
    return [*BEGINNING, Capture(meanwhile=[]), *steps, Capture(meanwhile=[]), Damage(seed=len(steps))]


def test_any_damage_is_named_as_it_restores_and_the_newest_point_is_healed(tmp_path: Path) -> None:
    places = iter(range(10**6))

    def play_one(history: list[Step]) -> None:
        place = tmp_path / str(next(places))
        place.mkdir()
        play(place, history)

    play_any(STEPS.map(history_of), play_one, budget_s=BUDGET_S)
