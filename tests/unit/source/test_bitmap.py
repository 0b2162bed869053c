"""The rule that makes an increment or a full: every combination of bitmap, size and base."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from drsync.model import CaptureId, Kind, new_capture_id
from drsync.source import Base, BaseDisk
from drsync.source.bitmap import Decision, DirtyBitmap, Owner, decide

MIB = 1024 * 1024
OWNER = Owner(repository="00c0ffee", vm="web")
BASE_CAPTURE = CaptureId("00112233445566aa")
OTHER_CAPTURE = CaptureId("ffffffffffffffff")
BASE = Base(capture=BASE_CAPTURE, disks=[BaseDisk(name="root", size_bytes=4 * MIB)])
RIGHT = OWNER.bitmap(BASE_CAPTURE, "root")


def bitmap(
    name: str = RIGHT,
    *,
    granularity: int = 65536,
    recording: bool = True,
    busy: bool = False,
    inconsistent: bool = False,
    persistent: bool = True,
) -> DirtyBitmap:
    return DirtyBitmap(
        name=name,
        count=3 * 65536,
        granularity=granularity,
        recording=recording,
        busy=busy,
        persistent=persistent,
        inconsistent=inconsistent,
    )


@dataclass(frozen=True, kw_only=True)
class Case:
    bitmaps: Sequence[DirtyBitmap] = (bitmap(),)
    base: Base | None = BASE
    disk: str = "root"
    size_bytes: int = 4 * MIB
    full: bool = False
    reason: str = ""


CASES = {
    "right": Case(),
    "right, kept in memory only": Case(bitmaps=[bitmap(persistent=False)]),
    "right, among others": Case(bitmaps=[bitmap("backup-0"), bitmap(OWNER.bitmap(OTHER_CAPTURE, "root")), bitmap()]),
    "asked for": Case(full=True, reason="a full was asked for"),
    "asked for, first": Case(full=True, base=None, bitmaps=[], reason="a full was asked for"),
    "first": Case(base=None, bitmaps=[], reason="there is no point yet"),
    "no base, but a bitmap": Case(base=None, reason="there is no point yet"),
    "new disk": Case(
        disk="data", bitmaps=[bitmap(OWNER.bitmap(BASE_CAPTURE, "data"))], reason="disk is not in the newest point"
    ),
    "grew": Case(size_bytes=6 * MIB, reason="disk grew from 4 MiB to 6 MiB"),
    "shrank": Case(size_bytes=2 * MIB, reason="disk shrank from 4 MiB to 2 MiB"),
    "missing": Case(bitmaps=[], reason="bitmap is missing"),
    "of another capture": Case(bitmaps=[bitmap(OWNER.bitmap(OTHER_CAPTURE, "root"))], reason="bitmap is missing"),
    "of another disk": Case(bitmaps=[bitmap(OWNER.bitmap(BASE_CAPTURE, "data"))], reason="bitmap is missing"),
    "of another VM": Case(
        bitmaps=[bitmap(Owner(repository="00c0ffee", vm="db").bitmap(BASE_CAPTURE, "root"))],
        reason="bitmap is missing",
    ),
    "of another repository": Case(
        bitmaps=[bitmap(Owner(repository="0badcafe", vm="web").bitmap(BASE_CAPTURE, "root"))],
        reason="bitmap is missing",
    ),
    "name that only begins right": Case(bitmaps=[bitmap(RIGHT + "x")], reason="bitmap is missing"),
    "inconsistent": Case(
        bitmaps=[bitmap(inconsistent=True, recording=False)],
        reason="bitmap is inconsistent, QEMU did not end cleanly",
    ),
    "busy": Case(bitmaps=[bitmap(busy=True)], reason="bitmap is in use by another job or export"),
    "not recording": Case(bitmaps=[bitmap(recording=False)], reason="bitmap does not record"),
    "finer": Case(bitmaps=[bitmap(granularity=4096)], reason="bitmap has a granularity of 4 KiB, not 64 KiB"),
    "coarser": Case(bitmaps=[bitmap(granularity=131072)], reason="bitmap has a granularity of 128 KiB, not 64 KiB"),
}


def right_name(case: Case) -> str:
    return "" if case.base is None else OWNER.bitmap(case.base.capture, case.disk)


def decided(case: Case) -> Decision:
    return decide(case.disk, case.size_bytes, case.bitmaps, case.base, name=right_name(case), full=case.full)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_each_case_has_its_kind_and_reason(case: Case) -> None:
    decision = decided(case)
    assert decision.reason == case.reason
    assert decision.kind is (Kind.FULL if case.reason else Kind.INCREMENTAL)
    assert decision.dirty_bytes == (0 if case.reason else 3 * 65536)


def test_only_one_combination_of_all_makes_an_increment() -> None:
    """Every state of the bitmap, with every name, base and size, asked for or not."""
    flags = itertools.product([True, False], repeat=4)
    states = [
        dict(zip(("recording", "busy", "inconsistent", "persistent"), flag, strict=True), granularity=granularity)
        for flag, granularity in itertools.product(flags, [4096, 65536, 131072])
    ]
    names = [RIGHT, OWNER.bitmap(OTHER_CAPTURE, "root"), OWNER.bitmap(BASE_CAPTURE, "data"), "other"]
    bases = [None, BASE, Base(capture=BASE_CAPTURE, disks=[]), Base(capture=OTHER_CAPTURE, disks=BASE.disks)]
    sizes = [2 * MIB, 4 * MIB, 6 * MIB]
    increments = []
    for state, name, base, size, full in itertools.product(states, names, bases, sizes, [True, False]):
        case = Case(bitmaps=[bitmap(name, **state)], base=base, size_bytes=size, full=full)  # type: ignore[arg-type] # the dict's values are of several types
        decision = decided(case)
        assert (decision.kind is Kind.FULL) == bool(decision.reason)
        if decision.kind is Kind.INCREMENTAL:
            increments.append((state, name, base))
    usable = {"recording": True, "busy": False, "inconsistent": False, "granularity": 65536}
    right = (usable | {"persistent": True}, usable | {"persistent": False})
    other = Base(capture=OTHER_CAPTURE, disks=BASE.disks)
    expected = [
        (state, name, base) for state, (name, base) in itertools.product(right, [(RIGHT, BASE), (names[1], other)])
    ]
    assert len(increments) == len(expected)
    assert all(found in increments for found in expected)


def test_the_dirty_bytes_are_never_more_than_the_disk() -> None:
    base = Base(capture=BASE_CAPTURE, disks=[BaseDisk(name="root", size_bytes=512)])
    assert decide("root", 512, [bitmap()], base, name=RIGHT).dirty_bytes == 512


def test_a_bitmaps_name_tells_its_capture_to_its_owner_alone() -> None:
    capture = new_capture_id()
    name = OWNER.bitmap(capture, "root")
    assert name == f"drsync-00c0ffee-{capture}-web:root"
    assert OWNER.bitmap_capture(name) == capture
    for other in (Owner(repository="0badcafe", vm="web"), Owner(repository="00c0ffee", vm="we")):
        assert other.bitmap_capture(name) is None
    for foreign in ("", "drsync", "drsync-00c0ffee", f"drsync-00c0ffee-{capture}", f" {name}", f"{name}\n", "x" * 2000):
        assert OWNER.bitmap_capture(foreign) is None


def test_a_job_is_known_by_its_owner_alone_also_when_a_vms_name_begins_anothers() -> None:
    job = Owner(repository="00c0ffee", vm="web-1-2").job(new_capture_id(), 1)
    assert Owner(repository="00c0ffee", vm="web-1-2").owns_job(job)
    for vm in ("web", "2", "1-2", "web-1"):
        assert not Owner(repository="00c0ffee", vm=vm).owns_job(job)
    assert not Owner(repository="0badcafe", vm="web-1-2").owns_job(job)
    assert not OWNER.owns_job("drsync-00c0ffee")


def test_names_are_as_qemu_wants_them_even_for_the_longest_vm_and_disk() -> None:
    owner = Owner(repository="00c0ffee", vm="v" * 63)
    assert len(owner.layer_node(9999)) <= 31
    assert len(owner.bitmap(new_capture_id(), "d" * 63)) <= 255
    assert owner.owns_node(owner.layer_node(0))
    assert not OWNER.owns_node(owner.layer_node(0))
    assert not owner.owns_node(owner.layer_node(0) + "x")
    assert not owner.owns_node(owner.layer_node(0)[:-1])


@pytest.mark.parametrize(("tag", "vm"), [("", "web"), ("00C0FFEE", "web"), ("00c0ffee0", "web"), ("00c0ffee", "a:b")])
def test_an_owner_of_no_valid_name_is_refused(tag: str, vm: str) -> None:
    with pytest.raises(ValueError, match=r"hex digits|name a VM"):
        Owner(repository=tag, vm=vm)
