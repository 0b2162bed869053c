"""Seeds of a VM that goes on writing: whatever happens meanwhile, what is committed is what the disks held."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, cast

import pytest
from crashing import WHENS, Bomb, Crash, Mined
from faulty import Fault, FaultyStore
from protected_vm import KIB, VM, ProtectedVm, Witness

from drsync.capture import Outcome, Result
from drsync.catalog import Point
from drsync.errors import DiskMissing, LiveUnavailable, NoWayToCopy, SourceLost, SpoolFull, StoreUnavailable
from drsync.format import names
from drsync.journal import Journal
from drsync.model import BLOCK_SIZE, Kind, Pace
from drsync.seed import SeedOptions
from drsync.ship import ShipLimits
from drsync.source import Base, DiskSurvey, LiveView, Source
from drsync.source.memory import MemoryDisk, MemorySource
from drsync.spool import VmSpool
from drsync.store import ObjectStore

LIMITS: Final = ShipLimits(object_blocks=2, object_zero_runs=2, workers=1)
ALWAYS: Final = SeedOptions(stream_above_bytes=0, limits=LIMITS)
"""Every whole disk is streamed; with one worker, so that the steps come in one order."""


def seeding(lab: ProtectedVm, *, stop_after: int | None = None, writes: bool = True, full: bool = False) -> Outcome:
    """A cycle that streams. The guest writes before every piece that is read; it stops after so many pieces."""
    pieces = 0

    def meanwhile() -> None:
        nonlocal pieces
        pieces += 1
        if writes:
            lab.write()

    lab.vm.during_read = meanwhile
    options = SeedOptions(
        stream_above_bytes=0, limits=LIMITS, stop=lambda: stop_after is not None and pieces >= stop_after
    )
    try:
        return lab.cycle(seed=options, full=full)
    finally:
        lab.vm.during_read = lambda: None


def packs_of(lab: ProtectedVm) -> set[str]:
    return {info.key for info in lab.store.list(names.pack_prefix(VM))}


def listed_packs(lab: ProtectedVm, point: Point) -> set[str]:
    segment = lab.log().read(point.number)
    ids = [segment.packs.entry(n).object_id for n in range(len(segment.packs))]
    return {names.pack(VM, object_id) for object_id in ids}


def kinds(point: Point) -> dict[str, Kind]:
    return {disk.name: disk.kind for disk in point.disks}


def test_a_first_full_of_a_guest_that_writes_all_the_time_is_of_one_instant(tmp_path: Path) -> None:
    lab = ProtectedVm(tmp_path)
    outcome = seeding(lab)
    assert outcome.result is Result.COMMITTED
    newest = lab.check_settled()
    assert kinds(newest) == {"root": Kind.FULL, "data": Kind.FULL}
    assert newest.reason == "data: there is no point yet; root: there is no point yet"
    assert listed_packs(lab, newest) == packs_of(lab)
    lab.write()
    lab.cycle()
    assert kinds(lab.check_settled()) == {"root": Kind.INCREMENTAL, "data": Kind.INCREMENTAL}


def test_nothing_of_a_seed_is_in_the_log_before_its_point(tmp_path: Path) -> None:
    lab = ProtectedVm(tmp_path)
    assert seeding(lab, stop_after=3).result is Result.SEEDING
    assert packs_of(lab)
    assert lab.points() == []


def test_a_seed_that_was_stopped_goes_on_where_it_was(tmp_path: Path) -> None:
    lab = ProtectedVm(tmp_path)
    assert seeding(lab, stop_after=3).result is Result.SEEDING
    journal = Journal.load(lab.spool().vm(VM).journal_path)
    assert journal is not None
    assert len(journal.rounds) == 1
    sent = packs_of(lab)
    outcome = seeding(lab)
    assert outcome.result is Result.COMMITTED
    newest = lab.check_settled()
    assert sent < listed_packs(lab, newest)
    assert listed_packs(lab, newest) == packs_of(lab)  # nothing was sent twice


@pytest.mark.parametrize("end", ["restart", "crash"])
def test_after_a_restart_of_qemu_what_was_sent_is_compared_not_sent_again(tmp_path: Path, end: str) -> None:
    lab = ProtectedVm(tmp_path)
    seeding(lab, stop_after=4, writes=False)
    sent = packs_of(lab)
    assert sent
    getattr(lab.vm, end)()
    outcome = seeding(lab, writes=False)
    assert outcome.result is Result.COMMITTED
    newest = lab.check_settled()
    assert listed_packs(lab, newest) == packs_of(lab)
    segment = lab.log().read(newest.number)
    rows = sum(len(r.blocks) for r in segment.rows)
    held = [lab.log().objects.read_index(key, "pack") for key in packs_of(lab)]
    assert rows == 0
    assert len(held) < 8  # 7 + 3 blocks, two in a pack: none is there twice
    assert newest.changed_bytes == 7 * BLOCK_SIZE + 2 * BLOCK_SIZE + 512
    assert "QEMU was restarted during the seed" in newest.reason


def test_a_guest_that_writes_across_restarts_of_qemu_gets_a_right_point(tmp_path: Path) -> None:
    lab = ProtectedVm(tmp_path)
    for end in (lab.vm.restart, lab.vm.crash, lab.vm.restart):
        seeding(lab, stop_after=3)
        end()
        lab.write()
    seeding(lab)
    lab.check_settled()


def test_a_resync_sends_only_what_differs_and_older_points_stay(tmp_path: Path) -> None:
    lab = ProtectedVm(tmp_path)
    lab.cycle()
    before = lab.points()
    lab.vm.crash()
    lab.write()
    assert seeding(lab, stop_after=2, writes=False).result is Result.SEEDING
    assert lab.check_points() == before
    seeding(lab, writes=False)
    newest = lab.check_settled()
    assert kinds(newest) == {"root": Kind.RESYNC, "data": Kind.RESYNC}
    assert newest.changed_bytes <= 4 * BLOCK_SIZE + 512
    assert lab.points()[:1] == before


def test_a_disk_that_is_new_is_read_whole_beside_one_whose_increment_is_streamed(tmp_path: Path) -> None:
    lab = ProtectedVm(tmp_path)
    lab.cycle()
    lab.write()
    lab.vm.disks["new"] = MemoryDisk(5 * BLOCK_SIZE, persistent=True)
    lab.vm.disks["new"].write(0, b"\7" * (5 * BLOCK_SIZE))
    seeding(lab)
    newest = lab.check_settled()
    assert kinds(newest) == {"root": Kind.INCREMENTAL, "data": Kind.INCREMENTAL, "new": Kind.FULL}


def test_a_full_that_was_asked_for_is_sent_whole(tmp_path: Path) -> None:
    lab = ProtectedVm(tmp_path)
    lab.cycle()
    seeding(lab, full=True)
    newest = lab.check_settled()
    assert kinds(newest) == {"root": Kind.FULL, "data": Kind.FULL}
    assert newest.parent is None
    assert newest.reason == "data: a full was asked for; root: a full was asked for"


def test_a_disk_that_is_resized_in_the_middle_is_read_again(tmp_path: Path) -> None:
    for size_bytes in (320 * KIB + 512, 2 * BLOCK_SIZE):
        lab = ProtectedVm(tmp_path / str(size_bytes))
        seeding(lab, stop_after=6)
        lab.vm.disks["data"].resize(size_bytes)
        lab.write()
        seeding(lab)
        assert kinds(lab.check_settled()) == {"root": Kind.FULL, "data": Kind.FULL}


def test_a_disk_that_is_added_in_the_middle_is_in_the_point(tmp_path: Path) -> None:
    lab = ProtectedVm(tmp_path)
    seeding(lab, stop_after=6)
    lab.vm.disks["new"] = MemoryDisk(5 * BLOCK_SIZE, persistent=True)
    lab.vm.disks["new"].write(BLOCK_SIZE, b"\7" * BLOCK_SIZE)
    seeding(lab)
    assert set(kinds(lab.check_settled())) == {"root", "data", "new"}


def test_a_disk_that_is_taken_away_in_the_middle_is_not_in_the_point(tmp_path: Path) -> None:
    lab = ProtectedVm(tmp_path)
    seeding(lab, stop_after=6, writes=False)
    del lab.vm.disks["data"]
    seeding(lab, writes=False)
    assert set(kinds(lab.check_settled())) == {"root"}


def test_packs_that_somebody_deleted_are_sent_again(tmp_path: Path) -> None:
    lab = ProtectedVm(tmp_path)
    seeding(lab, stop_after=4)
    gone = min(packs_of(lab))
    objects = {key: lab.store.get(key, limit_bytes=2**30) for key in (info.key for info in lab.store.list(""))}
    from shipped_vm import store_of

    lab.store = store_of({key: data for key, data in objects.items() if key != gone})
    seeding(lab)
    newest = lab.check_settled()
    assert gone not in listed_packs(lab, newest)


def test_a_seed_of_an_older_point_is_given_up(tmp_path: Path) -> None:
    lab = ProtectedVm(tmp_path)
    seeding(lab, stop_after=3)
    lab.cycle("bravo")  # another host takes the VM over
    lab.cycle(take_over=True)
    lab.check_settled()
    assert not lab.spool().vm(VM).journal_path.exists()


def test_a_cycle_that_may_not_seed_says_that_it_is_due_and_touches_nothing(tmp_path: Path) -> None:
    lab = ProtectedVm(tmp_path)
    for _ in range(2):
        assert lab.cycle(seed=ALWAYS, may_seed=False).result is Result.SEED_DUE
    assert lab.bitmaps() == set()
    assert packs_of(lab) == set()


def test_what_does_not_fit_the_spool_is_streamed_and_a_spool_without_any_room_is_an_error(tmp_path: Path) -> None:
    lab = ProtectedVm(tmp_path)
    lab.cycle()
    lab.vm.crash()
    lab.free_bytes = 1024 * KIB + 3 * BLOCK_SIZE
    lab.write()
    outcome = lab.cycle()
    assert outcome.result is Result.COMMITTED
    assert lab.log().read(lab.check_settled().number).packs.lengths.size > 0
    lab.free_bytes = -1
    lab.write()
    with pytest.raises(SpoolFull):
        lab.cycle()


def test_rounds_go_on_until_the_rest_fits_the_spool(tmp_path: Path) -> None:
    """The guest rewrites all of its disk during the first round, and less during each one that follows."""
    lab = ProtectedVm(tmp_path)
    lab.cycle()
    lab.vm.crash()
    lab.free_bytes = 1024 * KIB + 2 * BLOCK_SIZE
    left = [8, 6, 4, 2, 1, 0]

    def meanwhile() -> None:
        for block in range(left.pop(0) if left else 0):
            lab.vm.disks["root"].write(block * BLOCK_SIZE, bytes([len(left) + 40]) * BLOCK_SIZE)

    lab.vm.during_read = meanwhile
    lab.cycle(seed=SeedOptions(stream_above_bytes=0, limits=ShipLimits(object_blocks=64, workers=1)))
    newest = lab.check_settled()
    assert len(lab.log().read(newest.number).meta.rounds) >= 2


def test_a_guest_that_writes_faster_than_the_line_takes_is_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It rewrites its disk during every round, and the spool never has the room for what is left."""
    caplog.set_level("WARNING", logger="drsync")
    lab = ProtectedVm(tmp_path)
    lab.cycle()
    lab.vm.crash()
    lab.free_bytes = 1024 * KIB + 2 * BLOCK_SIZE
    pieces = 0

    def meanwhile() -> None:
        nonlocal pieces
        pieces += 1
        for block in range(7):
            lab.vm.disks["root"].write(block * BLOCK_SIZE, bytes([pieces % 250 + 1]) * BLOCK_SIZE)

    lab.vm.during_read = meanwhile
    options = SeedOptions(stream_above_bytes=0, limits=LIMITS, stop=lambda: pieces >= 30)
    assert lab.cycle(seed=options).result is Result.SEEDING
    assert "vm=web the seed does not come to an end: in the" in caplog.text
    assert "the guest changed 448 KiB, and the spool has no room for that; raise [limits] upload" in caplog.text
    assert len(lab.points()) == 1
    lab.vm.during_read = lambda: None
    lab.free_bytes = None
    lab.cycle(seed=ALWAYS)
    lab.check_settled()


# A crash, or a failure, at any step


def crash_at_every_step(
    place: Path, prepare: Callable[[ProtectedVm], None], *, write_after: bool, also: Callable[[ProtectedVm], None]
) -> list[str]:
    fired: list[str] = []
    step = 0
    while True:
        step += 1
        for when in WHENS:
            lab = ProtectedVm(place / f"{step}-{when}")
            prepare(lab)
            committed = lab.points()
            bomb = Bomb(step, when)
            lab.vm.during_read = lab.write if write_after else lambda: None
            with suppress(Crash):
                lab.cycle(
                    store=cast(ObjectStore, Mined(lab.store, bomb)),
                    spool=cast(VmSpool, Mined(lab.spool().vm(VM), bomb)),
                    open_source=lambda lab=lab, bomb=bomb: cast(Source, Mined(lab.source(), bomb)),  # type: ignore[misc]
                    seed=ALWAYS,
                )
            lab.vm.during_read = lambda: None
            if not bomb.fired_at:
                lab.check_settled()
                return fired
            fired.append(f"{when} {bomb.fired_at}")
            assert lab.check_points()[: len(committed)] == committed
            also(lab)
            if write_after:
                lab.write()
            lab.cycle(seed=ALWAYS)
            lab.check_settled()
            assert lab.points()[: len(committed)] == committed


def nothing(lab: ProtectedVm) -> None:
    pass


def a_point_and_lost_bitmaps(lab: ProtectedVm) -> None:
    lab.cycle()
    lab.vm.crash()
    lab.write()


def half_a_seed(lab: ProtectedVm) -> None:
    seeding(lab, stop_after=4)


def half_a_seed_and_a_restart(lab: ProtectedVm) -> None:
    half_a_seed(lab)
    lab.vm.restart()


def restart(lab: ProtectedVm) -> None:
    lab.vm.restart()


SEEDING: Final = {
    "Witness.survey",
    "Witness.begin_recording",
    "Witness.open_live",
    "Witness.capture",
    "Witness.release",
    "MemoryStore.create",
    "MemoryStore.list",
    "VmSpool.complete",
    "VmSpool.remove_journal",
}


@pytest.mark.parametrize("also", [nothing, restart])
@pytest.mark.parametrize("prepare", [nothing, a_point_and_lost_bitmaps, half_a_seed, half_a_seed_and_a_restart])
def test_a_crash_at_any_step_of_a_seed_loses_no_point(
    tmp_path: Path, prepare: Callable[[ProtectedVm], None], also: Callable[[ProtectedVm], None]
) -> None:
    fired = crash_at_every_step(tmp_path, prepare, write_after=True, also=also)
    steps = SEEDING - {"Witness.begin_recording"} if prepare is half_a_seed else SEEDING
    # The guest's writes come between threads, so the same number is not always the same step: names must do.
    assert steps <= {crash.split()[1] for crash in fired}


def test_a_store_that_fails_in_the_middle_costs_nothing_but_the_pack_on_its_way(tmp_path: Path) -> None:
    lab = ProtectedVm(tmp_path)
    with FaultyStore(lab.store, Fault("create", call=3, key=names.pack_prefix(VM))) as faulty:
        with pytest.raises(StoreUnavailable):
            lab.cycle(store=faulty, seed=ALWAYS)
    sent = packs_of(lab)
    assert len(sent) == 2
    lab.cycle(seed=ALWAYS)
    assert sent < listed_packs(lab, lab.check_settled())


def test_a_vm_that_goes_away_in_the_middle_is_gone_on_with_when_it_is_back(tmp_path: Path) -> None:
    lab = ProtectedVm(tmp_path)
    pieces = 0

    def die() -> None:
        nonlocal pieces
        pieces += 1
        if pieces == 5:
            lab.vm.restart()

    lab.vm.during_read = die
    with pytest.raises(SourceLost):
        lab.cycle(seed=ALWAYS)
    lab.vm.during_read = lambda: None
    sent = packs_of(lab)
    lab.cycle(seed=ALWAYS)
    assert sent <= listed_packs(lab, lab.check_settled())


def test_a_configured_disk_that_is_gone_is_told(tmp_path: Path) -> None:
    lab = ProtectedVm(tmp_path)
    seeding(lab, stop_after=3)
    with pytest.raises(DiskMissing):
        lab.cycle(
            seed=ALWAYS, open_source=lambda: MemorySource(lab.vm, lab.repository().tag, disks={"root": "elsewhere"})
        )


@pytest.mark.parametrize("cut", [1, 30, 200])
def test_a_journal_that_was_torn_is_gone_on_with_from_its_last_whole_line(tmp_path: Path, cut: int) -> None:
    lab = ProtectedVm(tmp_path)
    seeding(lab, stop_after=5)
    path = lab.spool().vm(VM).journal_path
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut] + b"\0" * 10)
    seeding(lab)
    lab.check_settled()


class Taken(Witness):
    """A QEMU whose NBD server belongs to somebody else."""

    def open_live(self, base: Base | None, disks: Sequence[DiskSurvey], *, pace: Pace) -> LiveView:
        raise LiveUnavailable(vm=VM, problem="NBD server already running")


def taken(lab: ProtectedVm) -> Source:
    return Taken(MemorySource(lab.vm, lab.repository().tag, clock=lab.clock), lab.contents, lab.seen)


def test_what_cannot_be_read_live_goes_through_the_spool_and_the_log_says_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lab = ProtectedVm(tmp_path)
    assert lab.cycle(seed=ALWAYS, open_source=lambda: taken(lab)).result is Result.COMMITTED
    lab.check_settled()
    assert "vm=web reads through the spool: VM web: its disks can't be read live: NBD server already" in caplog.text
    assert not lab.spool().vm(VM).journal_path.exists()


def test_what_can_neither_be_read_live_nor_fits_the_spool_is_an_error_and_the_seed_may_go_on(tmp_path: Path) -> None:
    lab = ProtectedVm(tmp_path)
    seeding(lab, stop_after=3)
    sent, bitmaps = packs_of(lab), lab.bitmaps()
    lab.free_bytes = 1024 * KIB + 2 * BLOCK_SIZE
    with pytest.raises(NoWayToCopy, match="disks can't be read live: NBD server already running") as caught:
        lab.cycle(seed=ALWAYS, open_source=lambda: taken(lab))
    assert caught.value.remedy.startswith(f"df -h {tmp_path}")
    assert lab.bitmaps() == bitmaps
    lab.free_bytes = None
    seeding(lab)
    assert sent < listed_packs(lab, lab.check_settled())
