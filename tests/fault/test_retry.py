"""A store that fails in every way that a test can script, behind a RetryingStore."""

import hashlib
import logging
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from fake_clock import FakeClock
from faulty import Effect, Fault, FaultyStore, Method

from drsync.errors import (
    ObjectDamaged,
    ObjectExists,
    ObjectMissing,
    StoreDenied,
    StoreError,
    StoreFull,
    StoreMisconfigured,
    StoreUnavailable,
)
from drsync.store import ObjectInfo, ObjectStore
from drsync.store.memory import MemoryStore
from drsync.store.retry import RetryingStore, RetryPolicy
from drsync.units import MiB

KEY = "vm/web/log/0000000000000001"
BODY = b"a segment"
SHA256 = hashlib.sha256(BODY).digest()
POLICY = RetryPolicy(attempts=6, time_limit_s=60.0, first_wait_s=0.5, longest_wait_s=8.0, log_every_s=5.0)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def memory(clock: FakeClock) -> MemoryStore:
    return MemoryStore(clock)


def retrying(inner: ObjectStore, clock: FakeClock, policy: RetryPolicy = POLICY) -> RetryingStore:
    return RetryingStore(inner, clock=clock, sleep=clock.sleep, policy=policy)


def put(store: ObjectStore, key: str = KEY, body: bytes = BODY) -> None:
    store.create(key, body, sha256=hashlib.sha256(body).digest())


def read_all(store: ObjectStore) -> tuple[bytes, bytes, bytes, list[str]]:
    return (
        store.get(KEY, limit_bytes=100),
        store.get_range(KEY, 2, 3),
        store.get_tail(KEY, 4).data,
        [info.key for info in store.list("vm/")],
    )


READS: list[Method] = ["get", "get_range", "get_tail", "list"]


@pytest.mark.parametrize("effect", [Effect.REFUSED, Effect.REPLY_LOST])
@pytest.mark.parametrize("method", READS)
def test_a_read_that_fails_twice_succeeds(
    memory: MemoryStore, clock: FakeClock, method: Method, effect: Effect
) -> None:
    put(memory)
    with FaultyStore(memory, Fault(method, 1, effect), Fault(method, 2, effect)) as faulty:
        assert read_all(retrying(faulty, clock)) == read_all(memory)
    assert faulty.calls[method] == 3
    assert len(clock.slept) == 2


@pytest.mark.parametrize("effect", [Effect.REFUSED, Effect.REPLY_LOST])
def test_a_replace_that_fails_is_repeated(memory: MemoryStore, clock: FakeClock, effect: Effect) -> None:
    with FaultyStore(memory, Fault("replace", 1, effect)) as faulty:
        retrying(faulty, clock).replace("host/hv1.json", b"new")
    assert memory.get("host/hv1.json", limit_bytes=10) == b"new"


def test_a_create_that_did_not_reach_the_store_is_repeated(memory: MemoryStore, clock: FakeClock) -> None:
    with FaultyStore(memory, Fault("create")) as faulty:
        put(retrying(faulty, clock))
    assert memory.get(KEY, limit_bytes=100) == BODY
    assert faulty.calls == {"create": 2}


def test_s2_a_create_whose_reply_was_lost_is_ones_own_success(memory: MemoryStore, clock: FakeClock) -> None:
    with FaultyStore(memory, Fault("create", effect=Effect.REPLY_LOST)) as faulty:
        put(retrying(faulty, clock))
    assert faulty.calls["create"] == 2
    assert memory.get(KEY, limit_bytes=100) == BODY


def test_s2_an_object_of_ones_own_from_before_a_restart_is_ones_own_success(
    memory: MemoryStore, clock: FakeClock
) -> None:
    put(memory)
    put(retrying(memory, clock))


@pytest.mark.parametrize("other", [b"B segment", b"a longer segment", b"", BODY[:-1] + b"T"])
def test_s2_another_object_under_the_key_is_a_lost_race_also_after_a_lost_reply(
    memory: MemoryStore, clock: FakeClock, other: bytes
) -> None:
    put(memory, body=other)
    with pytest.raises(ObjectExists):
        put(retrying(memory, clock))
    with FaultyStore(memory, Fault("create")) as faulty, pytest.raises(ObjectExists):
        put(retrying(faulty, clock))
    assert memory.get(KEY, limit_bytes=100) == other


def test_an_object_of_another_size_is_not_read_to_compare_it(memory: MemoryStore, clock: FakeClock) -> None:
    put(memory, body=b"x" * 1000)
    faulty = FaultyStore(memory)
    with pytest.raises(ObjectExists):
        put(retrying(faulty, clock))
    assert faulty.calls == {"create": 1, "get_tail": 1}


def test_a_large_object_is_compared_in_pieces_and_failures_while_comparing_are_retried(
    memory: MemoryStore, clock: FakeClock
) -> None:
    body = random.Random(3).randbytes(20 * MiB)
    lost = Fault("create", effect=Effect.REPLY_LOST)
    with FaultyStore(memory, lost, Fault("get_tail"), Fault("get_range", 2)) as faulty:
        put(retrying(faulty, clock), body=body)
    assert faulty.calls == {"create": 2, "get_tail": 2, "get_range": 4}


def test_a_difference_in_the_last_piece_is_a_lost_race(memory: MemoryStore, clock: FakeClock) -> None:
    body = bytes(20 * MiB)
    put(memory, body=body[:-1] + b"\x01")
    with pytest.raises(ObjectExists):
        put(retrying(memory, clock), body=body)


def test_bytes_that_change_while_they_are_compared_are_not_taken_for_ones_own(
    memory: MemoryStore, clock: FakeClock
) -> None:
    lost = Fault("create", effect=Effect.REPLY_LOST)
    corrupt = Fault("get_range", effect=Effect.CORRUPT, at=3)
    with FaultyStore(memory, lost, corrupt) as faulty, pytest.raises(ObjectExists):
        put(retrying(faulty, clock))


def test_bytes_that_were_stored_damaged_are_not_taken_for_ones_own(memory: MemoryStore, clock: FakeClock) -> None:
    for number, damage in enumerate([Fault("create", effect=Effect.CORRUPT), Fault("create", effect=Effect.CUT, at=4)]):
        with FaultyStore(memory, damage) as faulty:
            put(faulty, f"vm/web/pack/{number}")
        with pytest.raises(ObjectExists):
            put(retrying(memory, clock), f"vm/web/pack/{number}")


def test_an_object_that_vanishes_while_it_is_compared_is_not_taken_for_ones_own(
    memory: MemoryStore, clock: FakeClock
) -> None:
    put(memory)

    def missing() -> StoreError:
        return ObjectMissing(key=KEY, url="memory:")

    with FaultyStore(memory, Fault("get_tail", error=missing)) as faulty, pytest.raises(ObjectExists):
        put(retrying(faulty, clock))


LASTING = [
    StoreDenied(url="x", operation="create", problem="x"),
    StoreMisconfigured(url="x", problem="x"),
    StoreFull(url="x", problem="x", path="x"),
    ObjectMissing(key="x", url="x"),
    ObjectDamaged(key="x", problem="x"),
    ValueError("a bug"),
    KeyboardInterrupt(),
]


@pytest.mark.parametrize("error", LASTING, ids=lambda error: type(error).__name__)
def test_what_a_retry_does_not_help_is_raised_at_once(
    memory: MemoryStore, clock: FakeClock, error: BaseException
) -> None:
    put(memory)
    methods: list[Method] = ["create", "replace", *READS]
    for method in methods:
        with FaultyStore(memory, Fault(method, error=lambda: error)) as faulty:
            store = retrying(faulty, clock)
            with pytest.raises(type(error)):
                call(store, method)
            assert faulty.calls == {method: 1}
    assert clock.slept == []


def call(store: ObjectStore, method: Method) -> None:
    match method:
        case "create":
            put(store, "vm/web/log/new")
        case "replace":
            store.replace("host/hv1.json", b"x")
        case "get":
            store.get(KEY, limit_bytes=100)
        case "get_range":
            store.get_range(KEY, 0, 1)
        case "get_tail":
            store.get_tail(KEY, 1)
        case "list":
            list(store.list(""))


def test_the_last_error_is_raised_when_the_attempts_are_used_up(memory: MemoryStore, clock: FakeClock) -> None:
    with FaultyStore(memory, *(Fault("get", number + 1) for number in range(6))) as faulty:
        with pytest.raises(StoreUnavailable) as raised:
            retrying(faulty, clock).get(KEY, limit_bytes=1)
        assert faulty.calls == {"get": 6}
    assert raised.value.fields["problem"] == "scripted"
    assert len(clock.slept) == 5


def test_no_try_starts_behind_the_time_limit(memory: MemoryStore, clock: FakeClock) -> None:
    class Slow(MemoryStore):
        tries = 0

        def get(self, key: str, *, limit_bytes: int) -> bytes:
            self.tries += 1
            clock.advance(25.0)
            raise StoreUnavailable(url=self.url, problem="timeout")

    slow = Slow(clock)
    started_s = clock.monotonic_s()
    with pytest.raises(StoreUnavailable):
        retrying(slow, clock).get(KEY, limit_bytes=1)
    assert slow.tries in {2, 3}  # at 0, 25+ and, if the waits are short, 50+ seconds
    assert clock.monotonic_s() - started_s < 60 + 25


def test_waits_are_random_and_their_limit_doubles(memory: MemoryStore, clock: FakeClock) -> None:
    for _ in range(50):
        faults = [Fault("get", number + 1) for number in range(6)]
        with FaultyStore(memory, *faults) as faulty, pytest.raises(StoreUnavailable):
            retrying(faulty, clock).get(KEY, limit_bytes=1)
    for number, limit_s in enumerate([0.5, 1.0, 2.0, 4.0, 8.0]):
        waits = clock.slept[number::5]
        assert all(0 <= wait_s <= limit_s for wait_s in waits)
        assert max(waits) > limit_s / 2
        assert len(set(waits)) > 10


def test_a_sleep_that_raises_gives_up_at_once(memory: MemoryStore, clock: FakeClock) -> None:
    class Stopping(Exception):
        pass

    def sleep(_: float) -> None:
        raise Stopping

    with FaultyStore(memory, Fault("get")) as faulty, pytest.raises(Stopping):
        RetryingStore(faulty, clock=clock, sleep=sleep).get(KEY, limit_bytes=1)


@pytest.mark.parametrize("at", [0, 1, 999, 1000, 1001, 2499, 2500])
def test_s5_a_listing_that_breaks_off_goes_on_without_loss_or_repetition(
    memory: MemoryStore, clock: FakeClock, at: int
) -> None:
    names = [f"vm/web/log/{number:016x}" for number in range(2500)]
    for name in names:
        put(memory, name)
    broken = Fault("list", effect=Effect.REPLY_LOST, at=at)
    with FaultyStore(memory, broken, Fault("list", 2)) as faulty:
        assert [info.key for info in retrying(faulty, clock).list("vm/")] == names
    assert faulty.calls == {"list": 3}


def test_s5_a_listing_that_never_ends_well_raises(memory: MemoryStore, clock: FakeClock) -> None:
    for number in range(10):
        put(memory, f"vm/web/log/{number:016x}")
    faults = [Fault("list", number + 1, Effect.REPLY_LOST, at=5) for number in range(6)]
    with FaultyStore(memory, *faults) as faulty, pytest.raises(StoreUnavailable):
        list(retrying(faulty, clock).list("vm/"))


def test_a_listing_is_read_as_far_as_it_is_used(memory: MemoryStore, clock: FakeClock) -> None:
    class Counting(MemoryStore):
        listed = 0

        def list(self, prefix: str, *, after: str = "") -> Iterator[ObjectInfo]:
            for info in super().list(prefix, after=after):
                self.listed += 1
                yield info

    counting = Counting(clock)
    for number in range(3000):
        put(counting, f"vm/web/log/{number:016x}")
    assert next(retrying(counting, clock).list("vm/")).key.endswith("0")
    assert counting.listed == 1000


def test_each_retry_has_one_line_in_the_log_with_object_and_reason(
    memory: MemoryStore, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    policy = RetryPolicy(log_every_s=0.0)
    with FaultyStore(memory, Fault("create", 1), Fault("create", 2)) as faulty, caplog.at_level(logging.DEBUG):
        put(retrying(faulty, clock, policy))
    lines = [record.getMessage() for record in caplog.records if record.name == "drsync.store.retry"]
    assert len(lines) == 2
    assert f"operation=create key={KEY} try=2" in lines[0]
    assert "scripted" in lines[0]


def test_the_log_is_not_filled_by_an_outage_under_many_threads(
    memory: MemoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    clock = FakeClock()
    together = threading.Barrier(8)
    faults = [Fault("get", number + 1) for number in range(41)]
    put(memory)

    with FaultyStore(memory, *faults) as faulty:
        store = RetryingStore(faulty, clock=clock, sleep=lambda _: None, policy=RetryPolicy(attempts=5))

        def fail() -> None:
            together.wait()
            with pytest.raises(StoreUnavailable):
                store.get(KEY, limit_bytes=1)

        with ThreadPoolExecutor(8) as pool:
            for done in [pool.submit(fail) for _ in range(8)]:
                done.result()
        assert len(caplog.records) == 1
        clock.advance(6.0)
        assert store.get(KEY, limit_bytes=100) == BODY
    assert len(caplog.records) == 2
    assert "retries_not_logged=31" in caplog.records[-1].getMessage()


def test_a_fault_that_never_happened_fails_the_test(memory: MemoryStore) -> None:
    faulty = FaultyStore(memory, Fault("get", 2))
    with pytest.raises(AssertionError, match="never happened"), faulty, pytest.raises(ObjectMissing):
        faulty.get(KEY, limit_bytes=1)


def test_faults_can_be_of_one_key_only(memory: MemoryStore) -> None:
    with FaultyStore(memory, Fault("create", key="vm/web/log/")) as faulty:
        put(faulty, "vm/web/pack/1")
        with pytest.raises(StoreUnavailable):
            put(faulty)
        put(faulty)
