"""Whatever lies in a repository: an error of drsync's tree or the right bytes, in bounded time and memory.

Two who write: one without a key, who changes, cuts, mixes and moves what is there, and makes the hashes anew that have
no key; and one with the key, whose objects authenticate and are absurd. `--seed N` plays the same again; in
the long form (tests/run.sh --soak) it goes on for as long as is wanted.
"""

import json
import random
import resource
import runpy
import secrets
import struct
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest
import zstandard
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from fake_clock import FakeClock
from figures import count
from forged import rehashed
from key_service import MemoryKms
from pruned_vm import PrunedVm
from rules import ROOT
from shipped_vm import DiskStep, OracleDisk, ShippedVm, Step, objects_of, restored, restored_disk, store_of
from soak import FUZZ_S

from drsync.catalog import points
from drsync.damage import lost_pack, write_record
from drsync.errors import DrsyncError, ObjectMissing
from drsync.format import Malformed, names, seal
from drsync.format.blockmap import open_page, page_binding
from drsync.format.keys import FIRST_GENERATION, ObjectKeys, RecoveryKey
from drsync.format.ring import ScryptCost
from drsync.heartbeat import Seen, read_heartbeats, write_heartbeat
from drsync.hurt import assess, standing_of
from drsync.keyring import Keyring
from drsync.log import Log
from drsync.mapped import load_mapped_image
from drsync.mapping import MapPolicy, keep_mapped
from drsync.model import BLOCK_SIZE, NoProgress, is_name
from drsync.pins import pin_point, read_pins
from drsync.repair import repair
from drsync.repository import open_repository, read_record
from drsync.store import ObjectStore
from drsync.target.image import ImageDisk, ImageFormat
from drsync.verify import verify

Objects = dict[str, bytes]
ROUNDS: Final = 100
LEAST_ROUNDS: Final = 25
NOW: Final = datetime(2026, 1, 2, tzinfo=UTC)
PHRASE: Final = "six words that nobody can guess"
USUAL_S: Final = 12.0
"""No round is begun later than this, beyond the least; 100 rounds take 10 s on two processors that nobody else uses."""
MOST_BYTES: Final = 48 * 1024 * 1024
"""Of Python and numpy at once, for objects of a few KiB; restore keeps 4 requests of 4 MiB on their way."""
LONGEST_S: Final = 10.0
"""For one look at everything: it takes 0.1 s, and machines are shared."""
NASTY: Final = (
    "../x",
    "/etc/passwd",
    "a/b",
    "..",
    ".",
    "",
    "a\0b",
    "x" * 300,
    "NUL:",
    "a\nb",
    "ä",
    "root/../../x",
    "\ud800",
)


@pytest.fixture(scope="module")
def vm(tmp_path_factory: pytest.TempPathFactory) -> ShippedVm:
    """A VM with all kinds of objects: segments, packs of several rounds, maps that lean on maps, a fence, horizons,
    merged segments, a pin, a damage record, a heartbeat, a slot.
    """
    made = PrunedVm(tmp_path_factory.mktemp("fuzzed"))
    for number in range(7):
        writes = {(number * 3 + n) % 9: number + n for n in range(4)}
        root = DiskStep(size_bytes=9 * BLOCK_SIZE - 512, writes=writes, explicit_zeros=number == 3)
        data = DiskStep(size_bytes=2 * BLOCK_SIZE, writes={number % 2: number * 2 + 1})
        rounds = [{"root": {0: 5, 1: 6}}, {"root": {0: 7}}] if number == 0 else []
        made.capture(Step(disks={"root": root, "data": data}, taken_over=number == 2, rounds=rounds))
        keep_mapped(made.log, made.log.read(made.log.newest()), MapPolicy(every=1, step=1))
        if number in (3, 5):
            made.prune([min(made.points), max(made.points)])
    assert made.recovery is not None
    recovery = made.recovery
    ring_of(made.store).add_passphrase(lambda: ring_of(made.store).open_with_recovery(recovery), "paper", PHRASE)
    pin_point(made.log.objects, max(made.points), until=None, note="kept", now=made.clock.now())
    segment = next(s for s in standing_of(made.log).segments if len(s.packs))
    lost = lost_pack(made.vm, segment, 0, ObjectMissing(key="a pack", url="memory:"))
    write_record(made.log.objects, lost, made.clock.now())
    prefixes = {name.rpartition("/")[0] for name in objects_of(made.store)}
    assert {f"vm/web/{part}" for part in ("log", "pack", "map", "merged", "horizon", "pin", "damage")} < prefixes
    seen = Seen(seq=made.log.newest(), checked_at=NOW)
    write_heartbeat(made.repository, "alpha", {made.vm: seen})
    return made


@pytest.fixture(scope="module")
def objects(vm: ShippedVm) -> Objects:
    return objects_of(vm.store)


@contextmanager
def bounded() -> Iterator[None]:
    """What is done within takes little memory, if it is `traced`, and time."""
    before = 0
    if tracemalloc.is_tracing():
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
    started_s = time.monotonic()
    yield
    if tracemalloc.is_tracing():
        _, peak = tracemalloc.get_traced_memory()
        assert peak - before < MOST_BYTES, f"{peak - before} bytes of memory"
    assert time.monotonic() - started_s < LONGEST_S


@pytest.fixture
def traced() -> Iterator[None]:
    """Every byte that Python and numpy take is counted, which takes three times as long."""
    tracemalloc.start()
    yield
    tracemalloc.stop()


@pytest.fixture(autouse=True)
def fenced() -> Iterator[None]:
    """Nothing gets more than 2 GiB of addresses beside what the tests have already: a bomb is a MemoryError."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**31, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


def look_at_everything(vm: ShippedVm, store: ObjectStore) -> Iterator[tuple[str, Callable[[], object]]]:
    """All that drsync reads of a repository, each by itself: some of it may still be whole."""
    recovery = vm.recovery
    assert recovery is not None
    for what, look in (("recovery key", _by_recovery), ("passphrase", _by_passphrase)):
        yield what, lambda look=look: look(vm, store, recovery)  # type: ignore[misc]
    try:
        repository = open_repository(store, vm.root, "key")
    except DrsyncError:
        count("bad inputs refused")
        return
    log = Log(repository.vm(vm.vm))
    yield "heartbeats", lambda: _true_or_absent(read_heartbeats(repository).of(vm.vm), vm)
    yield "names", lambda: all(is_name(name) for name in repository.vm_names())
    yield "verify", lambda: bool(verify(log, committed_seq=0, read_data=True, progress=NoProgress()))
    yield "pins", lambda: {pin.point for pin in read_pins(log.objects).for_rules()} <= {max(vm.points)}
    yield "damage", lambda: set(assess(log, NOW).hurt) <= {*range(1, vm.log.newest() + 1)}
    yield "repair", lambda: repair(log, NOW, dry_run=True).points <= vm.log.newest()
    yield "points", lambda: all(p.number in vm.points for p in points(log))
    for number in (min(vm.points), max(vm.points)):
        yield f"point {number}", lambda number=number: restored(log, number) == vm.points[number]  # type: ignore[misc]
        yield f"map {number}", lambda number=number: _by_map(log, number) == vm.points[number]  # type: ignore[misc]


def ring_of(store: ObjectStore) -> Keyring:
    return Keyring(store, read_record(store), FakeClock(), MemoryKms, new_cost=cheap_cost)


def cheap_cost() -> ScryptCost:
    return ScryptCost(salt=secrets.token_hex(16), log2_n=10)


def _by_recovery(vm: ShippedVm, store: ObjectStore, recovery: RecoveryKey) -> bool:
    return vm.root.secret in {root.secret for root in ring_of(store).open_with_recovery(recovery).roots.generations}


def _by_passphrase(vm: ShippedVm, store: ObjectStore, recovery: RecoveryKey) -> bool:
    return vm.root.secret in {root.secret for root in ring_of(store).open_with_passphrase(PHRASE).roots.generations}


def _true_or_absent(seen: Seen | None, vm: ShippedVm) -> bool:
    return seen is None or seen.seq == vm.log.newest()


def _by_map(log: Log, number: int) -> Mapping[str, OracleDisk]:
    image = load_mapped_image(log, number)
    if image.seq != number:
        return {}
    return {disk.name: restored_disk(image, log, disk.name) for disk in image.point.disks}


def check_harmless(vm: ShippedVm, objects: Objects, told: str, *, right: bool = True) -> None:
    """Each look ends in an error of the tree or, if it must be `right`, in what is true."""
    for what, look in look_at_everything(vm, store_of(objects)):
        with bounded():
            try:
                result = look()
            except DrsyncError as err:
                assert err.remedy
                count("bad inputs refused")
            except Exception as err:
                raise AssertionError(f"{what} raised {err!r} after: {told}") from err
            else:
                assert result or not right, f"{what} is wrong after: {told}"


def _goes_on(rounds: int, passed_s: float) -> bool:
    return passed_s < FUZZ_S if FUZZ_S else rounds < ROUNDS and passed_s < USUAL_S


# Without a key


def change(dice: random.Random, objects: Objects) -> tuple[Objects, str]:
    """Do something to one or two objects."""
    changed = dict(objects)
    name = dice.choice(sorted(objects))
    data = bytearray(objects[name])
    kind = dice.choice(["flip", "flip", "bytes", "number", "cut", "longer", "mixed", "moved", "copied", "gone", "text"])
    match kind:
        case "flip":
            for _ in range(dice.choice([1, 1, 8])):
                data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        case "bytes":
            at = dice.randrange(len(data))
            data[at : at + 16] = dice.randbytes(min(16, len(data) - at))
        case "number":  # in the footer, or anywhere
            at = dice.choice([max(0, len(data) - 56), max(0, len(data) - 48), dice.randrange(len(data))])
            number = dice.choice([0, 1, 2**31, 2**32 - 1, len(data), len(data) - 1])
            data[at : at + 4] = struct.pack("<I", number)[: max(0, len(data) - at)]
        case "cut":
            del data[dice.randrange(len(data)) :]
        case "longer":
            data += dice.choice([b"\0", b"DRSYNC1\n", dice.randbytes(100)])
        case "mixed":
            other = objects[dice.choice(sorted(objects))]
            at = dice.randrange(min(len(data), len(other)))
            data[at:] = other[at:]
        case "moved" | "copied":
            other_name = dice.choice(sorted(objects))
            changed[other_name] = bytes(data)
            if kind == "moved" and other_name != name:
                del changed[name]
            return changed, f"{kind} {name} to {other_name}"
        case "gone":
            del changed[name]
            return changed, f"{name} is gone"
        case "text":
            data = bytearray(_nasty_text(dice, bytes(data)))
    if name.startswith("vm/") and len(data) > seal.FOOTER_BYTES and dice.random() < 0.7:
        data = bytearray(rehashed(bytes(data)))
    changed[name] = bytes(data)
    return changed, f"{kind} of {name}"


def _nasty_text(dice: random.Random, data: bytes) -> bytes:
    """JSON with another value in it, deep JSON, or no JSON."""
    try:
        document = json.loads(data)
    except ValueError:
        return dice.choice([b"{}", b"[" * 5000, b"\xff\xfe", b'{"a":' * 3000])
    if dice.random() < 0.5:
        _spoil(dice, document)
        return json.dumps(document).encode()
    key = dice.choice(sorted(document))
    document[key] = dice.choice([None, -1, 2**63, 2**64, 1e308, "", "x" * 1000, [], {}, {"\ud800": "AA=="}, *NASTY])
    return json.dumps(document).encode()


@pytest.mark.timeout(FUZZ_S + 600)
def test_a_changed_repository_gives_the_right_bytes_or_an_error(vm: ShippedVm, objects: Objects, seed: int) -> None:
    check_harmless(vm, objects, "nothing")
    began_s = time.monotonic()
    number = 0
    while number < LEAST_ROUNDS or _goes_on(number, time.monotonic() - began_s):
        changed, told = change(random.Random(f"{seed} {number}"), objects)
        check_harmless(vm, changed, f"{told} (round {number}, --seed {seed})")
        number += 1


def test_a_name_of_a_vm_from_a_heartbeat_is_harmless(vm: ShippedVm, objects: Objects) -> None:
    for name in [*NASTY, "x" * 100_000]:
        body = {"format": 1, "host": "alpha", "vms": {name: "AAAA"}}
        check_harmless(vm, {**objects, "host/alpha.json": json.dumps(body).encode()}, f"a VM {name[:20]!r}")


# With the key


class Forger:
    """Somebody with the key: seals whatever he likes."""

    def __init__(self, vm: ShippedVm) -> None:
        self._objects = vm.log.objects

    def opened(self, data: bytes) -> tuple[seal.Header, bytes, ObjectKeys, bytes]:
        """Header, plain index, keys and frames of an object."""
        footer = seal.parse_footer(data, len(data))
        header = seal.header_of(data[-footer.tail_length :], footer)
        keys = self._objects.object_keys(header)
        index = seal.open_index(data[-footer.tail_length :], footer, keys).index
        return header, index, keys, data[: len(data) - footer.tail_length]

    def sealed(self, data: bytes, index: bytes) -> bytes:
        """The object with another index, as its owner would seal it."""
        header, _, keys, frames = self.opened(data)
        buffer = memoryview(bytearray(len(frames) + seal.sealed_bound(len(index))))
        buffer[: len(frames)] = frames
        made = seal.seal(buffer, len(frames), header, index, keys)
        return bytes(buffer[: made.length])

    def with_packed(self, data: bytes, packed: bytes) -> bytes:
        """The object with another zstd frame below its seal."""
        header, _, keys, frames = self.opened(data)
        head = msgspec.json.encode(header)
        sealed = AESGCM(keys.index).encrypt(bytes(12), packed, head)
        length = len(frames) + len(head) + len(sealed) + seal.FOOTER_BYTES
        footer = struct.pack("<IIQ32s8s", len(head), len(sealed), length, bytes(32), seal.MAGIC)
        return rehashed(frames + head + sealed + footer)


ABSURD_NUMBERS: Final = (-1, 0, 1, 63, 65, 4096, 2**16, 2**31, 2**32 - 1, 2**32, 2**53, 2**62, 2**63 - 1)


def absurd(dice: random.Random, index: bytes) -> bytes:
    """Another index: a value of its metadata, its columns, or anything else of it is absurd."""
    if index.startswith(b"{"):  # a record without columns
        record = json.loads(index)
        _spoil(dice, record)
        return dice.choice([json.dumps(record).encode(), index[: dice.randrange(len(index))], b"[" * 5000])
    (length,) = struct.unpack_from("<I", index)
    meta, columns = json.loads(index[4 : 4 + length]), bytearray(index[4 + length :])
    match dice.choice(["meta", "meta", "meta", "columns", "columns", "length", "cut", "random"]):
        case "meta":
            _spoil(dice, meta)
        case "columns" if columns:
            for _ in range(dice.choice([1, 4])):
                at = dice.randrange(0, len(columns), 4) if len(columns) >= 4 else 0
                columns[at : at + 4] = struct.pack("<I", dice.choice([0, 1, 7, 2**31, 2**32 - 1, dice.getrandbits(32)]))
        case "length":
            return struct.pack("<I", dice.choice([0, 1, length - 1, length + 1, 2**31, 2**32 - 1])) + index[4:]
        case "cut":
            return index[: dice.randrange(len(index))]
        case _:
            return dice.randbytes(dice.choice([0, 3, 4, 100, 5000]))
    text = json.dumps(meta).encode()
    return struct.pack("<I", len(text)) + text + bytes(columns)


def _spoil(dice: random.Random, value: Any) -> None:
    """Change one thing somewhere in a JSON document."""
    while True:
        keys: Sequence[Any] = sorted(value) if isinstance(value, dict) else range(len(value))
        if not keys:
            return
        key = dice.choice(keys)
        if isinstance(value[key], dict | list) and value[key] and dice.random() < 0.8:
            value = value[key]
            continue
        value[key] = dice.choice([*ABSURD_NUMBERS, *NASTY, None, True, [], {}, [1] * 5000, "full", "resync", 1.5])
        return


@pytest.mark.usefixtures("traced")
@pytest.mark.timeout(FUZZ_S + 600)
def test_an_object_that_authenticates_and_is_absurd_costs_little(vm: ShippedVm, objects: Objects, seed: int) -> None:
    """Nobody is safe from false data by whoever has the key, but nothing breaks by it."""
    forger = Forger(vm)
    began_s = time.monotonic()
    sealed_ones = [name for name in sorted(objects) if name.startswith("vm/")]
    number = 0
    while number < LEAST_ROUNDS or _goes_on(number, time.monotonic() - began_s):
        dice = random.Random(f"absurd {seed} {number}")
        name = dice.choice(sealed_ones)
        _, index, _, _ = forger.opened(objects[name])
        changed = {**objects, name: forger.sealed(objects[name], absurd(dice, index))}
        check_harmless(vm, changed, f"an absurd {name} (round {number}, --seed {seed})", right=False)
        number += 1


BOMBS: Final = {
    "64 MiB and 1": zstandard.ZstdCompressor().compress(bytes(2**26 + 1)),
    "of unknown size": zstandard.ZstdCompressor(write_content_size=False).compress(bytes(2**20)),
    "4 EiB": b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", 2**62) + bytes(8),
    "16 EiB": b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", 2**64 - 1) + bytes(8),
    "nothing": b"",
    "4 GiB to skip": b"\x50\x2a\x4d\x18\xff\xff\xff\xff",
}


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("packed", BOMBS.values(), ids=BOMBS.keys())
def test_a_compressed_bomb_is_not_unpacked(vm: ShippedVm, objects: Objects, packed: bytes) -> None:
    forger = Forger(vm)
    for prefix in (names.log_prefix(vm.vm), names.pack_prefix(vm.vm), names.map_prefix(vm.vm)):
        name = max(name for name in objects if name.startswith(prefix))
        changed = {**objects, name: forger.with_packed(objects[name], packed)}
        check_harmless(vm, changed, f"a bomb in {name}")


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("packed", BOMBS.values(), ids=BOMBS.keys())
def test_a_page_that_is_a_bomb_is_not_unpacked(vm: ShippedVm, packed: bytes) -> None:
    keys, binding = vm.log.objects.keys_of(bytes(16), FIRST_GENERATION), page_binding(vm.repository.id, "root")
    stored = AESGCM(keys.frame).encrypt(struct.pack("<IQ", 0, 8), packed, binding + struct.pack("<Q", 3))
    with bounded(), pytest.raises(Malformed):
        open_page(keys, stored, 8, binding, 3)


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("packed", BOMBS.values(), ids=BOMBS.keys())
def test_recover_py_unpacks_no_bomb(packed: bytes) -> None:
    recover = runpy.run_path(str(ROOT / "examples/recover.py"))
    with bounded(), pytest.raises((recover["Refused"], zstandard.ZstdError)):
        recover["unzip"](packed, seal.MAX_INDEX_BYTES)


@pytest.mark.usefixtures("traced")
def test_rows_without_end_are_refused_before_room_is_made_for_them(vm: ShippedVm, objects: Objects) -> None:
    forger = Forger(vm)
    name = max(name for name in objects if name.startswith(names.log_prefix(vm.vm)))
    _, index, _, _ = forger.opened(objects[name])
    (length,) = struct.unpack_from("<I", index)
    for rows in (2**31, 2**32, 2**40, 2**62):
        meta = json.loads(index[4 : 4 + length])
        for extent in meta["contents"]:
            extent["rows"] = extent["zero_runs"] = rows
        text = json.dumps(meta).encode()
        forged = forger.sealed(objects[name], struct.pack("<I", len(text)) + text + index[4 + length :])
        check_harmless(vm, {**objects, name: forged}, f"{rows} rows")


@pytest.mark.parametrize("bad", [name for name in NASTY if name.isprintable() or name.isascii()])  # JSON holds these
def test_a_name_from_the_repository_never_leaves_the_target(
    vm: ShippedVm, objects: Objects, tmp_path: Path, bad: str
) -> None:
    """Names of disks become file names."""
    forger = Forger(vm)
    name = max(name for name in objects if name.startswith(names.log_prefix(vm.vm)))
    _, index, _, _ = forger.opened(objects[name])
    forged = forger.sealed(objects[name], index.replace(b'"root"', json.dumps(bad).encode()))
    store = store_of({**objects, name: forged})
    log = Log(open_repository(store, vm.root, "key").vm(vm.vm))
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises(DrsyncError):
        image = load_mapped_image(log, max(vm.points))
        for disk in image.point.disks:
            ImageDisk(target / f"{disk.name}.raw", disk.size_bytes, ImageFormat.RAW, vm=vm.vm, overwrite=False)
    count("bad inputs refused")
    assert list(tmp_path.rglob("*")) == [target]
