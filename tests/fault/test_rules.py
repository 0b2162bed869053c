"""Rules of tests/rules.py that need a scene of their own."""

import base64
import errno
import hashlib
import logging
import os
import shutil
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import zstandard
from blake3 import blake3
from faulty import Effect, Fault, FaultyStore
from protected_vm import VM, ProtectedVm, restored
from shipped_vm import DiskStep, ShippedVm, Step, objects_of

from drsync.capture import Result
from drsync.errors import EncodingWrong, Fenced, StoreFull, StoreUnavailable
from drsync.format import names, seal
from drsync.format.keys import new_object_id
from drsync.heartbeat import Seen, write_heartbeat
from drsync.model import BLOCK_SIZE, Kind
from drsync.prune.run import PruneOptions, prune_vm
from drsync.retention import Rules
from drsync.seed import SeedOptions
from drsync.ship import ShipLimits
from drsync.store import Bytes, ObjectStore
from drsync.store.directory import DirectoryStore
from drsync.store.retry import RetryingStore, RetryPolicy
from drsync.writer import open_writer


@pytest.fixture
def lab(tmp_path: Path) -> ProtectedVm:
    return ProtectedVm(tmp_path)


def retrying(store: ObjectStore) -> RetryingStore:
    return RetryingStore(store, sleep=lambda _: None, policy=RetryPolicy(attempts=4))


# Rule 3


def test_f20_a_writer_is_not_fenced_by_its_own_segment(tmp_path: Path) -> None:
    """The reply is lost, and whoever compares what is there is told of changed bytes."""
    vm = ShippedVm(tmp_path)
    change = DiskStep(size_bytes=BLOCK_SIZE, writes={0: 1})
    with FaultyStore(
        vm.store,
        Fault("create", key=names.log_prefix(VM), effect=Effect.REPLY_LOST),
        Fault("get_range", key=names.log_prefix(VM), effect=Effect.CORRUPT),
    ) as faulty:
        vm.log.objects.store = retrying(faulty)
        segment = vm.capture(Step(disks={"root": change}))
    assert segment.seq == 1
    assert vm.log.read(1).meta.writer == vm.writer_id


def test_f20_a_writer_of_the_same_name_with_other_bytes_is_fenced(tmp_path: Path) -> None:
    vm = ShippedVm(tmp_path)
    first, second = (open_writer(vm.log, vm.writer_id) for _ in range(2))
    first.fence()
    with pytest.raises(Fenced):
        second.fence()


# Rule 10


def test_a_prune_right_behind_a_create_does_not_fence_the_writer(lab: ProtectedVm) -> None:
    """The horizon that the writer then finds speaks of its segment, as of a point that stays."""
    lab.cycle()
    for _ in range(3):
        lab.write()
        lab.cycle()
    lab.write()

    class PrunedBehindCreate(FaultyStore):
        def create(inner, key: str, body: Bytes, *, sha256: bytes) -> None:
            super().create(key, body, sha256=sha256)
            if key == names.segment(VM, 5):
                done = prune_vm(
                    lab.log(),
                    Rules(last=1),
                    [],
                    committed=5,
                    now=lab.clock.now(),
                    options=PruneOptions(grace=timedelta(0)),
                )
                assert (done.horizon, done.kept) == (1, 1)

    assert lab.cycle(store=PrunedBehindCreate(lab.store)).result is Result.COMMITTED
    assert [point.number for point in lab.check_points()] == [5]
    lab.write()
    lab.cycle()
    assert lab.check_settled().number == 6


# Rule 8


def test_packs_that_vanish_while_a_seed_reads_are_sent_again(lab: ProtectedVm) -> None:
    """F18: right before the segment its packs are looked for; whoever deleted them must not make a hole in a point."""
    gone: list[str] = []

    def vanish() -> None:
        packs = [info.key for info in lab.store.list(names.pack_prefix(VM))]
        for key in packs if not gone else ():
            lab.store.delete(key)
            gone.append(key)

    lab.vm.during_read = vanish
    small = ShipLimits(object_blocks=2, object_zero_runs=64, workers=1)
    outcome = lab.cycle(seed=SeedOptions(stream_above_bytes=0, limits=small))
    assert gone
    assert outcome.result is Result.COMMITTED
    assert len(lab.check_points()) == 1


# Rule 21


def test_reads_that_break_off_in_a_restore_are_made_again(lab: ProtectedVm) -> None:
    lab.cycle()
    lab.write()
    lab.cycle()
    reads = [
        Fault("get_range", call=call, effect=effect) for call, effect in ((1, Effect.REFUSED), (2, Effect.REPLY_LOST))
    ]
    with FaultyStore(lab.store, *reads, Fault("get_tail", call=2, effect=Effect.REPLY_LOST)) as faulty:
        assert restored(lab.log(retrying(faulty)), 2) == lab.contents()


# Rule 24


class Seals(FaultyStore):
    """Keeps all that anybody ever tried to store, also what was refused."""

    def __init__(self, inner: ObjectStore, kept: dict[str, set[bytes]], *faults: Fault) -> None:
        super().__init__(inner, *faults)
        self._kept = kept

    def create(self, key: str, body: Bytes, *, sha256: bytes) -> None:
        data = bytes(body)
        header = seal.header_of(data, seal.parse_footer(data, len(data)))
        self._kept.setdefault(header.object, set()).add(data)
        super().create(key, body, sha256=sha256)


def test_no_key_seals_two_contents_whatever_is_cloned_or_tried_again(lab: ProtectedVm, tmp_path: Path) -> None:
    """An object's keys come from its id alone, so two contents under one id would share keys and nonces."""
    kept: dict[str, set[bytes]] = {}
    lab.cycle(store=Seals(lab.store, kept))
    lab.write()
    with pytest.raises(StoreUnavailable):  # a layer waits; it is sent again below, twice
        lab.cycle(store=Seals(lab.store, kept, Fault("create")))
    shutil.copytree(tmp_path / "alpha", tmp_path / "clone")  # a copy of the host: same writer, same waiting layer
    with Seals(lab.store, kept, Fault("create", key=names.log_prefix(VM), effect=Effect.REPLY_LOST)) as lossy:
        with pytest.raises(StoreUnavailable):
            lab.cycle(store=lossy)
    lab.write()
    lab.cycle("clone", store=Seals(lab.store, kept))
    lab.write()
    lab.cycle(store=Seals(lab.store, kept), take_over=True)
    assert len(kept) >= 5
    assert {len(contents) for contents in kept.values()} == {1}
    assert lab.check_points()


def test_a_fork_draws_other_ids() -> None:
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(theirs, new_object_id())
        os._exit(0)
    drawn = new_object_id()
    os.close(theirs)
    assert os.waitpid(child, 0)[1] == 0
    with os.fdopen(ours, "rb") as pipe:
        other = pipe.read()
    assert len(other) == len(drawn)
    assert other != drawn


# Rule 27


class BadCompressor:
    """Compresses what it is given, but for one bit."""

    def __init__(self, **options: Any) -> None:
        self._good = GoodCompressor(**options)

    def compress(self, data: Bytes) -> bytes:
        changed = bytearray(data)
        changed[len(changed) // 2] ^= 4
        return self._good.compress(bytes(changed))


class BrokenCompressor:
    """What it makes can't be read at all."""

    def __init__(self, **_: Any) -> None:
        pass

    def compress(self, data: Bytes) -> bytes:
        return b"\x28\xb5\x2f\xfd" + bytes(32)


GoodCompressor = zstandard.ZstdCompressor


@pytest.mark.parametrize("compressor", [BadCompressor, BrokenCompressor])
def test_what_does_not_come_back_as_it_was_is_not_committed(
    lab: ProtectedVm, monkeypatch: pytest.MonkeyPatch, compressor: type
) -> None:
    lab.cycle()
    lab.write()
    with monkeypatch.context() as patch:
        patch.setattr(zstandard, "ZstdCompressor", compressor)
        with pytest.raises(EncodingWrong) as caught:
            lab.cycle()
    assert caught.value.remedy.startswith("drsync capture web")
    assert [p.number for p in lab.check_points()] == [1]
    assert len(lab.spooled()) == 1, "the layer waits"
    lab.cycle()
    assert lab.check_settled().kind is Kind.INCREMENTAL


# Rule 28


def test_a_disk_that_is_taken_away_makes_a_point(lab: ProtectedVm) -> None:
    """Although nothing was written: the newest point must not show a disk that is gone."""
    lab.cycle()
    del lab.vm.disks["data"]
    assert lab.cycle().result is Result.COMMITTED
    assert [disk.name for disk in lab.check_settled().disks] == ["root"]
    assert lab.cycle().result is Result.UNCHANGED


# Rule 29


def is_full(*_: object, **__: object) -> None:
    """How a full file system answers whoever gives a file its name."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_directory_without_room_costs_no_point(lab: ProtectedVm, tmp_path: Path) -> None:
    directory = tmp_path / "repository"
    for key, data in objects_of(lab.store).items():
        DirectoryStore(directory).create(key, data, sha256=hashlib.sha256(data).digest())
    lab.store = DirectoryStore(directory)
    lab.cycle()
    lab.write()
    before = sorted(path for path in directory.rglob("*") if path.is_file())
    with pytest.raises(StoreFull):
        lab.cycle(store=DirectoryStore(directory, publishers=(is_full,)))
    assert sorted(path for path in directory.rglob("*") if path.is_file()) == before, "nothing half is left"
    assert len(lab.check_points()) == 1
    lab.cycle()
    assert lab.check_settled().kind is Kind.INCREMENTAL


# Rule 32


def clear_parts(objects: dict[str, bytes]) -> Iterator[bytes]:
    """All that somebody without a key can read: names and headers, and what has no seal."""
    for name, data in objects.items():
        yield name.encode()
        if name.startswith("vm/"):
            footer = seal.parse_footer(data, len(data))
            start = len(data) - footer.tail_length
            yield data[start : start + footer.header_length]
        else:
            yield data


def test_nothing_in_the_clear_depends_on_what_is_in_a_block(lab: ProtectedVm, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever reads bucket and log, and has a file, can't tell whether the VM has it too."""
    caplog.set_level(logging.DEBUG)
    known = os.urandom(BLOCK_SIZE)
    lab.vm.disks["root"].write(BLOCK_SIZE, known)
    lab.cycle()
    lab.vm.disks["root"].write(3 * BLOCK_SIZE, known)
    lab.cycle()
    write_heartbeat(lab.repository(), "alpha", {VM: Seen(seq=2, checked_at=lab.clock.now())})
    objects = objects_of(lab.store)
    digests = [hashlib.new(name, known).digest() for name in ("md5", "sha1", "sha256", "sha512", "blake2b")]
    digests += [blake3(known).digest(), zstandard.ZstdCompressor(level=1).compress(known)[:64], known[:64]]
    readable = b"\n".join([*clear_parts(objects), caplog.text.encode()])
    stored = b"\n".join(objects.values())
    for digest in digests:
        part = digest[:12]
        assert part not in stored
        for shown in (part, part.hex().encode(), base64.b64encode(digest[:12])):
            assert shown not in readable
    chunks = [{data[at : at + 16] for at in range(0, len(data) - 16)} for data in _frames(objects)]
    assert not chunks[0] & chunks[1], "equal blocks look alike"


def _frames(objects: dict[str, bytes]) -> list[bytes]:
    """The bytes of the two segments' frames."""
    found = [data for name, data in sorted(objects.items()) if name.startswith(names.log_prefix(VM))]
    return [data[seal.FRAMES_START : -seal.parse_footer(data, len(data)).tail_length] for data in found]
