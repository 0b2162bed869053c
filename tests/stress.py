"""A VM, two hosts that protect it, a store that fails, and a model: random, and the same again with the same seed.

    world = World("seed 1", place)
    for _ in range(200):
        world.step()        # something happens: to the guest, to a host, to the repository
    world.audit()           # every surviving point is what the disks held at its instant

`trace` has a line a step. The model is a hash of each disk at the instant of each capture.
"""

import copy
import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, cast

from crashing import WHENS, Bomb, Crash, Mined
from figures import compared
from protected_vm import MemoryTarget, Witness
from simulated import CALM, OUTAGE, Interruption, StormyStore, Weather, WorldClock, WrongClock, digest_of

from drsync.capture import CaptureOptions, Result, run_cycle
from drsync.catalog import points
from drsync.errors import DrsyncError, Fenced, IntegrityError
from drsync.format import names
from drsync.format.keys import RootKey
from drsync.image import PointImage, load_image
from drsync.log import Log, Segment
from drsync.mapped import load_mapped_image
from drsync.mapping import MapPolicy
from drsync.model import BLOCK_SIZE, CaptureId, NoProgress, Pace
from drsync.prune.run import PruneOptions, prune_vm
from drsync.quiesce import NoQuiesce
from drsync.repair import repair
from drsync.repository import Repository, create_repository, open_repository
from drsync.restore import restore_disk
from drsync.retention import Aged, Rules, decide
from drsync.seed import SeedOptions
from drsync.ship import ShipLimits
from drsync.source import Source
from drsync.source.memory import MemoryDisk, MemorySource, MemoryVm
from drsync.spool import Spool, VmSpool
from drsync.store import ObjectStore
from drsync.store.retry import RetryingStore, RetryPolicy
from drsync.verify import verify

VM: Final = "web"
HOSTS: Final = ("alpha", "bravo")
SECTOR: Final = 512
MOST_BLOCKS: Final = 12
MAPS: Final = MapPolicy(every=3, step=1)
LIMITS: Final = ShipLimits(object_blocks=3, object_zero_runs=3, workers=2)
RETRIES: Final = RetryPolicy(attempts=3)

_WEIGHTS: Final = {
    "guest_writes": 30,
    "guest_resizes": 6,
    "guest_gets_or_loses_a_disk": 3,
    "guest_restarts": 3,
    "guest_loses_power": 3,
    "guest_goes_back": 4,
    "clock_is_set": 3,
    "calm_cycle": 24,
    "stormy_cycle": 14,
    "crashing_cycle": 12,
    "interrupted_cycle": 10,
    "outage": 3,
    "taken_over": 4,
    "seeding": 6,
    "repository_rolled_back": 4,
    "map_is_spoiled": 3,
    "restored_by_a_map": 8,
    "verified": 2,
    "repaired": 3,
    "pruned": 6,
    "stalled_writer": 2,
}
"""What can happen (World._NAME), and how often it does."""

Disks = Mapping[str, tuple[int, str]]
"""Size and SHA-256 of each disk."""


def disks_of(vm: MemoryVm) -> Disks:
    """What the disks hold now."""
    return {name: (len(disk.content), hashlib.sha256(disk.content).hexdigest()) for name, disk in vm.disks.items()}


@dataclass(slots=True)
class Pieces:
    """A Pace that counts what is read live, and asks to stop after so many pieces."""

    stop_after: int
    taken: int = 0

    def take(self, size_bytes: int) -> None:
        self.taken += 1

    def take_now(self, size_bytes: int) -> bool:
        return True

    def is_spent(self) -> bool:
        return self.taken >= self.stop_after


class World:
    """Everything that there is, and what happens to it."""

    def __init__(self, seed: str, place: Path) -> None:
        self._dice = random.Random(f"what happens in {seed}")
        self._place = place
        self.time = WorldClock()
        self.clock = WrongClock(self.time)
        self.store = StormyStore(seed, self.time)
        self.key = RootKey.generate()
        create_repository(self.store, self.key, self.clock)
        root = MemoryDisk(6 * BLOCK_SIZE, persistent=True)
        self.vm = MemoryVm(VM, {"root": root, "data": MemoryDisk(3 * BLOCK_SIZE + SECTOR, persistent=False)})
        self.seen: dict[CaptureId, Disks] = {}
        self.acked: dict[int, CaptureId] = {}
        """The points that a cycle said were committed."""
        self._dropped: set[tuple[int, CaptureId]] = set()
        self._kept: Mapping[str, MemoryDisk] | None = None
        self._number = 0
        self._depth = 0
        self.trace: list[str] = []
        self.done: Counter[str] = Counter()
        """How often each thing happened, and how each cycle ended."""

    @staticmethod
    def happenings() -> list[str]:
        """What can happen."""
        return list(_WEIGHTS)

    # What happens

    def step(self) -> None:
        """One thing happens."""
        self._number += 1
        (name,) = self._dice.choices(list(_WEIGHTS), list(_WEIGHTS.values()))
        self.store.begin(f"{self._number}", CALM)
        told = getattr(self, f"_{name}")()
        self.store.begin(f"{self._number} after", CALM)
        self.done[name] += 1
        self.trace.append(f"{self._number} {name}: {told}")
        self._check_acknowledged()

    def _guest_writes(self) -> str:
        told = []
        for _ in range(self._dice.randint(1, 3)):
            name = self._dice.choice(sorted(self.vm.disks))
            disk = self.vm.disks[name]
            sectors = len(disk.content) // SECTOR
            first = self._dice.randrange(sectors)
            length = min(self._dice.choice([1, 8, 128, 200, 384]), sectors - first) * SECTOR
            kind = self._dice.choice(["random", "pattern", "zeros"])
            if kind == "zeros":
                disk.zero(first * SECTOR, length)
            elif kind == "pattern":
                disk.write(first * SECTOR, bytes([self._dice.randrange(1, 256)]) * length)
            else:
                disk.write(first * SECTOR, self._dice.randbytes(length))
            told.append(f"{name} {first}+{length // SECTOR} {kind}")
        return ", ".join(told)

    def _guest_resizes(self) -> str:
        name = self._dice.choice(sorted(self.vm.disks))
        disk = self.vm.disks[name]
        size = self._dice.randint(1, MOST_BLOCKS) * BLOCK_SIZE - self._dice.choice([0, 0, SECTOR, BLOCK_SIZE // 2])
        try:
            disk.resize(size)
        except ValueError as err:
            return str(err)
        return f"{name} {size}"

    def _guest_gets_or_loses_a_disk(self) -> str:
        if self.vm.disks.pop("extra", None) is not None:
            return "loses extra"
        self.vm.disks["extra"] = MemoryDisk(2 * BLOCK_SIZE, persistent=self._dice.random() < 0.5)
        self.vm.disks["extra"].write(SECTOR, self._dice.randbytes(SECTOR))
        return "gets extra"

    def _guest_restarts(self) -> str:
        self.vm.restart()
        return ""

    def _guest_loses_power(self) -> str:
        self.vm.crash()
        return ""

    def _guest_goes_back(self) -> str:
        """Its images are copied, with the bitmaps in them; or it is put back to that copy."""
        if self._kept is None or self._dice.random() < 0.4:
            self._kept = copy.deepcopy(self.vm.disks)
            return "is copied"
        self.vm.disks = dict(copy.deepcopy(self._kept))
        self.vm.restart()
        return "is put back"

    def _clock_is_set(self) -> str:
        wrong = timedelta(hours=self._dice.choice([-24, -1, 0, 1, 24, 24 * 365]))
        self.clock.set(wrong)
        return str(wrong)

    def _calm_cycle(self) -> str:
        return self._cycle(self._host(), full=self._dice.random() < 0.1)

    def _stormy_cycle(self) -> str:
        weather = Weather(fails=self._dice.choice([0.03, 0.1, 0.4]), lies=self._dice.choice([0, 0, 0.03, 0.1]))
        return self._cycle(self._host(), weather=weather)

    def _crashing_cycle(self) -> str:
        bomb = Bomb(self._dice.randint(1, 40), self._dice.choice(WHENS))
        told = self._cycle(self._host(), around=bomb, seed=self._dice.random() < 0.2)
        return f"{told} at {bomb.fired_at or 'no step'}"

    def _interrupted_cycle(self) -> str:
        """Somebody does something in the midst of a cycle."""
        host = self._host()
        other = self._dice.choice([h for h in HOSTS if h != host])
        meanwhile: list[str] = []

        def happens() -> None:
            meanwhile.append(
                self._dice.choice(
                    [
                        self._guest_writes,
                        self._guest_loses_power,
                        lambda: self._cycle(other, take_over=self._dice.random() < 0.5),
                        lambda: self._cycle(host),
                        self._restored_by_a_map,
                        self._pruned,
                    ]
                )()
            )

        interruption = self._some_time(happens)
        told = self._cycle(host, around=interruption)
        return f"{told} {interruption.fired_at or 'no step'} {meanwhile}"

    def _some_time(self, happens: Callable[[], None]) -> Interruption:
        """Before or after any step of a cycle, or of those that matter most."""
        when = self._dice.choice(WHENS)
        if self._dice.random() < 0.3:
            return Interruption(self._dice.randint(1, 3), happens, when=when, only=".create")
        return Interruption(self._dice.randint(1, 30), happens, when=when)

    def _outage(self) -> str:
        return self._cycle(self._host(), weather=OUTAGE)

    def _taken_over(self) -> str:
        return self._cycle(self._host(), take_over=True)

    def _seeding(self) -> str:
        weather = Weather(fails=self._dice.choice([0.0, 0.0, 0.1]))
        full = self._dice.random() < 0.5
        return self._cycle(self._host(), seed=True, full=full, weather=weather, busy=True)

    def _repository_rolled_back(self) -> str:
        """A host that finds an older repository than it wrote says so and writes nothing; then it is there again."""
        host = self._dice.choice(HOSTS)
        wrote = self._spool(host).vm(VM).state().wrote_seq
        older = self.store.as_of(self._dice.randint(self.store.version // 2, self.store.version))
        if names.REPOSITORY not in {info.key for info in older.list("")}:
            return "before it began"
        before = digest_of(older)
        found = Log(self._repository(older).vm(VM)).newest()
        if not wrote or found >= wrote or self._spool(host).vm(VM).state().fenced_by:
            return f"{host} can't know"
        captured = len(self.seen)
        try:
            self._run(host, older, Interruption(0, lambda: None), CaptureOptions())
        except IntegrityError:
            assert (digest_of(older), len(self.seen)) == (before, captured)
            self.done["PointLost"] += 1
            return f"{host} noticed that {found} is not {wrote}"
        raise AssertionError(f"{host} wrote {wrote}, found {found}, and did not notice")

    def _map_is_spoiled(self) -> str:
        found = [info.key for info in self.store.calm.list(names.map_prefix(VM))]
        if not found:
            return "there is none"
        key = self._dice.choice(found)
        data = bytearray(self.store.calm.get(key, limit_bytes=2**30))
        data[self._dice.randrange(len(data))] ^= 0x40
        self.store.spoil(key, bytes(data))
        return f"map {found.index(key)}"

    def _restored_by_a_map(self) -> str:
        """Any point, in any weather: it is right, or it is an error."""
        if not self.acked:
            return "there is no point"
        point = self._dice.choice(sorted(self.acked))
        weather = Weather(fails=self._dice.choice([0, 0.05]), lies=self._dice.choice([0, 0, 0.05]))
        with self._weather(weather):
            log = Log(self._repository(self._retrying(self.store)).vm(VM))
            try:
                image = load_mapped_image(log, point)
                disks = self._restored(log, image)
            except DrsyncError as err:
                assert weather != CALM, f"point {point} can't be restored: {err!r}"
                return f"{point} {type(err).__name__}"
        assert disks == self.seen[self.acked[point]], f"point {point} is not as captured"
        return f"{point}"

    def _pruned(self) -> str:
        """Points are dropped as the rules say, or, if it fails or dies, none: the newest one and all others stay."""
        self.time.advance(3600.0 * self._dice.choice([1, 5, 30, 24 * 20]))
        rules = Rules(last=self._dice.randint(1, 12), daily=self._dice.choice([0, 0, 3]))
        grace = timedelta(hours=self._dice.choice([0, 0, 24]))
        around = self._dice.choice([None, Bomb(self._dice.randint(1, 60), self._dice.choice(WHENS))])
        weather = Weather(fails=self._dice.choice([0, 0, 0.1]), lies=self._dice.choice([0, 0, 0.02]))
        return self._prune(rules, grace, weather, around)

    def _prune(
        self, rules: Rules, grace: timedelta, weather: Weather = CALM, around: Bomb | Interruption | None = None
    ) -> str:
        before = {point.number: point.capture for point in points(self._log())}
        aged = [Aged(seq, info.modified) for seq, info in self._log().listed() if seq in before]
        stay = {verdict.point for verdict in decide(aged, rules, [], self.time.now()) if verdict.keep}
        mined = Mined(self.store, cast(Bomb, around or Interruption(0, lambda: None)))
        log = Log(self._repository(self._retrying(cast(ObjectStore, mined))).vm(VM))
        options = PruneOptions(grace=grace)
        with self._weather(weather):
            try:
                done = prune_vm(
                    log, rules, [], committed=max(self.acked, default=0), now=self.time.now(), options=options
                )
            except Crash:
                ended = "prune crash"
            except DrsyncError as err:
                ended = f"prune {type(err).__name__}"
                assert weather != CALM or around or self._depth > 1, f"{err!r}"
            else:
                ended = "pruned" if done.dropped or done.deleted_objects else "pruned nothing"
        after = {point.number: point.capture for point in points(self._log())}
        assert after.items() <= before.items(), "a prune made a point"
        told = f"{sorted(after)} are left of {sorted(before)}, not {sorted(stay)}"
        assert after.keys() in (before.keys(), stay), told
        self.acked = {number: capture for number, capture in self.acked.items() if number in after}
        self._dropped |= before.items() - after.items()
        self.done[ended] += 1
        return f"{ended}: {len(before)} points, {len(after)} stay"

    def _stalled_writer(self) -> str:
        """A writer sleeps before a step; meanwhile another one takes over, and prune frees the slot that it had."""
        host = self._host()
        other = next(h for h in HOSTS if h != host)

        def happens() -> None:
            self._guest_writes()
            self._cycle(other, take_over=True, quiet=True)
            for _ in range(2):
                self._guest_writes()
                self._cycle(other, quiet=True)
                self._prune(Rules(last=1), timedelta(0))
            self._prune(Rules(last=1), timedelta(0))

        sleep = self._some_time(happens)
        return f"{self._cycle(host, around=sleep)} while it slept {sleep.fired_at or 'no step'}"

    def _verified(self) -> str:
        report = verify(self._log(), committed_seq=0, read_data=True, progress=NoProgress())
        wrong = [p for p in report.problems if not _is_of_a_map(p.error)]
        assert not wrong, wrong
        return f"{report.points} points, {report.frames} frames"

    def _repaired(self) -> str:
        """Maps are made anew, in any weather and while it may die: nothing that was right becomes wrong by it."""
        around = self._dice.choice([None, Bomb(self._dice.randint(1, 30), self._dice.choice(WHENS))])
        weather = Weather(fails=self._dice.choice([0, 0, 0.1]), lies=self._dice.choice([0, 0, 0.02]))
        mined = Mined(self.store, cast(Bomb, around or Interruption(0, lambda: None)))
        log = Log(self._repository(self._retrying(cast(ObjectStore, mined))).vm(VM))
        with self._weather(weather):
            try:
                report = repair(log, self.time.now(), dry_run=self._dice.random() < 0.2, policy=MAPS)
            except Crash:
                return "crash"
            except DrsyncError as err:
                assert weather != CALM, f"{err!r}"
                return type(err).__name__
        assert weather.lies or not report.hurt, f"nothing is lost, but {report.hurt}"
        self.done["repaired maps"] += sum(made.name is not None for made in report.repairs)
        return f"{report.maps} maps, {len(report.repairs)} anew"

    # Cycles

    def _host(self) -> str:
        """Mostly one that is not fenced: the other one just says so."""
        able = [host for host in HOSTS if not self._spool(host).vm(VM).state().fenced_by]
        return self._dice.choice(able if able and self._dice.random() < 0.9 else HOSTS)

    def _cycle(
        self,
        host: str,
        *,
        weather: Weather = CALM,
        around: Bomb | Interruption | None = None,
        seed: bool = False,
        busy: bool = False,
        quiet: bool = False,
        **options: Any,
    ) -> str:
        """One cycle of a new process on `host`; how it ended."""
        pieces = Pieces(self._dice.choice([1, 2, 5, 1000]))
        if seed:
            pace = cast(Pace, pieces)
            options["seed"] = SeedOptions(stream_above_bytes=0, read_pace=pace, stop=pieces.is_spent, limits=LIMITS)
        else:
            options["seed"] = SeedOptions(limits=LIMITS)
        self.vm.during_capture = self._during(0.0 if quiet else 0.15, crash=0.0 if quiet else 0.03)
        self.vm.during_read = self._during(0.3 if busy else 0.0)
        before = len(self.trace)
        with self._weather(weather):
            try:
                outcome = self._run(
                    host, self.store, around or Interruption(0, lambda: None), CaptureOptions(maps=MAPS, **options)
                )
            except Crash:
                ended = "crash"
            except DrsyncError as err:
                ended = type(err).__name__
                own = isinstance(err, Fenced) and err.fields["writer"] == self._spool(host).writer_id()
                assert not own, f"{host} says that it is fenced by itself"
                calm = weather == CALM and isinstance(around, Interruption | None) and not self._depth
                assert not (calm and isinstance(err, IntegrityError)), f"{err!r}"
            else:
                ended = str(outcome.result)
                self._acknowledge(outcome.shipped_before)
                self._acknowledge(outcome.segment if outcome.result is Result.COMMITTED else None)
        assert len(self.trace) == before
        self.done[ended] += 1
        return f"{host} {ended}"

    def _during(self, writes: float, crash: float = 0.0) -> Callable[[], None]:
        def happens() -> None:
            drawn = self._dice.random()
            if drawn < crash:
                self.vm.crash()
            elif drawn < writes:
                self._guest_writes()

        return happens

    def _run(self, host: str, store: ObjectStore, around: Bomb | Interruption, options: CaptureOptions) -> Any:
        mined = Mined(store, cast(Bomb, around))
        log = Log(self._repository(self._retrying(cast(ObjectStore, mined))).vm(VM))
        spool = self._spool(host)
        source = lambda: cast(Source, Mined(self._source(), cast(Bomb, around)))  # noqa: E731 - as run_cycle wants it
        return run_cycle(
            log,
            cast(VmSpool, Mined(spool.vm(VM), cast(Bomb, around))),
            spool.writer_id(),
            source,
            self.clock,
            NoProgress(),
            options,
            NoQuiesce(),
        )

    def _source(self) -> Source:
        tag = self._repository(self.store.calm).tag
        inner = MemorySource(self.vm, tag, clock=self.clock)
        return cast(Source, Witness(inner, lambda: cast(Any, disks_of(self.vm)), cast(Any, self.seen)))

    def _spool(self, host: str) -> Spool:
        return Spool(self._place / host, 0)

    def _repository(self, store: ObjectStore) -> Repository:
        opened = open_repository(self.store.calm, self.key, "key")
        return Repository(store, opened.record, self.key)

    def _retrying(self, store: ObjectStore) -> ObjectStore:
        return RetryingStore(store, clock=self.time, sleep=self.time.advance, policy=RETRIES)

    def _log(self) -> Log:
        return Log(self._repository(self.store.calm).vm(VM))

    @contextmanager
    def _weather(self, weather: Weather) -> Iterator[None]:
        """The weather while something is done; within another thing's, that one goes on behind it."""
        outer = self.store.state()
        self._depth += 1
        self.store.begin(f"{self._number}.{self._depth}", weather)
        try:
            yield
        finally:
            self._depth -= 1
            self.store.resume(outer)

    # What must be so

    def _acknowledge(self, segment: Segment | None) -> None:
        """What was a point and has been dropped since, while its writer slept, is gone rightly."""
        if segment is None or segment.meta.point is None:
            return
        if (segment.seq, segment.meta.point.capture) not in self._dropped:
            self.acked[segment.seq] = segment.meta.point.capture

    def _check_acknowledged(self) -> None:
        """The newest acknowledged point is in the log, and right."""
        if not self.acked:
            return
        log, newest = self._log(), max(self.acked)
        stored = {seq for seq, _ in log.listed()}
        assert set(self.acked) <= stored, "an acknowledged point is gone"
        segment = log.read(newest)
        assert segment.meta.point is not None
        assert segment.meta.point.capture == self.acked[newest], f"point {newest} is another one"

    def audit(self) -> str:
        """Every point of the log is what the disks held, by the log and by the maps; a hash of the repository."""
        log = self._log()
        found = points(log)
        assert set(self.acked) <= {point.number for point in found}
        for point in found:
            self.acked.setdefault(point.number, point.capture)
            image = load_image(log, point.number)
            told = f"point {point.number} of capture {point.capture}"
            assert self._restored(log, image) == self.seen[point.capture], f"{told} is not as captured"
            assert self.acked[point.number] == point.capture, f"{told} is in another one's place"
        for number in self.acked:
            by_map = self._restored(log, load_mapped_image(log, number))
            assert by_map == self.seen[self.acked[number]], f"point {number} is another one by a map"
        return digest_of(self.store.calm)

    def settle(self) -> None:
        """When all trouble is over, a cycle brings the present state."""
        assert self._cycle("alpha", take_over=True, quiet=True) in {"alpha committed", "alpha unchanged"}
        self._guest_writes()
        assert self._cycle("alpha", quiet=True) == "alpha committed"
        newest = self._log().read(self._log().newest()).meta.point
        assert newest is not None
        assert self.seen[newest.capture] == disks_of(self.vm)

    def _restored(self, log: Log, image: PointImage) -> Disks:
        held = {}
        for disk in image.point.disks:
            target = MemoryTarget(disk.size_bytes)
            restore_disk(log.objects, image, disk.name, target, NoProgress())
            held[disk.name] = (disk.size_bytes, hashlib.sha256(target.content).hexdigest())
        compared(sum(size for size, _ in held.values()))
        return held


def _is_of_a_map(error: DrsyncError) -> bool:
    return "/map/" in str(error.fields.get("key", ""))
