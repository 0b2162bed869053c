"""The scheduler: pace, limits, failures, fencing, reload and stop, with scripted captures."""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import apscheduler.schedulers.base
import pytest

from drsync.cadence import FIRST_WITHIN_S, Cadence, Drift
from drsync.capture import Outcome, Result
from drsync.config import Config, LibvirtSource, VmSettings, parse_config
from drsync.daemon import Daemon, Request
from drsync.errors import ConfigInvalid, DrsyncError, Fenced, LibvirtUnreachable, StoreUnavailable, WrongKey
from drsync.jobs import backoff_s
from drsync.model import Progress, SystemClock
from drsync.systemd import Notifier

DEADLINE_S = 20.0
"""How long a test waits for what should come at once; only a failing test waits so long."""


class SetClock:
    """A clock that stands still until it is moved; its two sides can be moved apart."""

    def __init__(self) -> None:
        self.wall = datetime(2026, 11, 23, 10, 0, tzinfo=UTC)
        self.monotonic = 1000.0

    def now(self) -> datetime:
        return self.wall

    def monotonic_s(self) -> float:
        return self.monotonic

    def advance(self, seconds: float) -> None:
        self.wall += timedelta(seconds=seconds)
        self.monotonic += seconds


class JumpingClock(SystemClock):
    """The host's clock, as if somebody had set it."""

    jump = timedelta(0)

    def now(self) -> datetime:
        return super().now() + self.jump


class ScriptedCaptures:
    """Captures that end as a test says; counts and times them."""

    def __init__(self, script: Mapping[str, Callable[[], None]] | None = None) -> None:
        self.script = dict(script or {})
        self.seeds: dict[str, Callable[[Callable[[], bool]], Result]] = {}
        """VMs that have to be seeded, and how that goes."""
        self.counts: Counter[str] = Counter()
        self.found: Sequence[VmSettings] = ()
        self.trouble: DrsyncError | None = None
        self.times: dict[str, list[float]] = {}
        self.running = 0
        self.most_running = 0
        self.beats = 0
        self.groups: list[tuple[str, ...]] = []
        self.scrubbed: list[str] = []
        self._lock = threading.Lock()

    def capture(
        self, vm: str, _progress: Progress, /, *, may_seed: bool = False, stop: Callable[[], bool] = bool
    ) -> Outcome:
        if vm in self.seeds and not may_seed:
            return outcome_of(vm, Result.SEED_DUE)
        if vm in self.seeds:
            return outcome_of(vm, self.seeds[vm](stop))
        with self._lock:
            self.counts[vm] += 1
            self.times.setdefault(vm, []).append(time.monotonic())
            self.running += 1
            self.most_running = max(self.most_running, self.running)
        try:
            self.script.get(vm, lambda: None)()
        finally:
            with self._lock:
                self.running -= 1
        return unchanged(vm)

    def capture_together(
        self, names: Sequence[str], progress_of: Callable[[str], Progress], /, *, may_seed: bool
    ) -> Mapping[str, Outcome | Exception]:
        """A group: its members end as their scripts say, one after the other."""
        with self._lock:
            self.groups.append(tuple(names))
        results: dict[str, Outcome | Exception] = {}
        for name in names:
            try:
                results[name] = self.capture(name, progress_of(name), may_seed=may_seed)
            except Exception as err:  # noqa: BLE001 - as a group hands it over
                results[name] = err
        return results

    def vms(self) -> Sequence[VmSettings]:
        if self.trouble is not None:
            raise self.trouble
        return self.found

    def scrub(self, vm: str, /, *, stop: Callable[[], bool]) -> None:
        with self._lock:
            self.scrubbed.append(vm)

    def beat(self) -> None:
        with self._lock:
            self.beats += 1


def outcome_of(vm: str, result: Result) -> Outcome:
    return Outcome(vm=vm, result=result, segment=None, shipped_before=None, checked_at=datetime.now(UTC))


def unchanged(vm: str) -> Outcome:
    return outcome_of(vm, Result.UNCHANGED)


class RecordingNotifier(Notifier):
    """A notifier that keeps what it is told."""

    def __init__(self) -> None:
        super().__init__("")
        self.messages: list[str] = []

    def _send(self, message: str) -> None:
        self.messages.append(message)


def config_of(*vms: str, rpo_s: float = 0.05, parallel: int = 2, stop_timeout_s: float = 5.0) -> Config:
    text = '[repository]\nurl = "file:///srv/repository"\n'
    text += "".join(f'[[vm]]\nname = "{vm}"\nsocket = "/run/{vm}.qmp"\n' for vm in vms)
    config = parse_config(text.encode(), Path("/etc/drsync/drsync.toml"), host_name="alpha")
    return replace(
        config,
        vms=[replace(vm, rpo_s=rpo_s) for vm in config.vms],
        daemon=replace(config.daemon, parallel=parallel, stop_timeout_s=stop_timeout_s),
    )


class Running:
    """A daemon at work in a thread of its own."""

    def __init__(self, daemon: Daemon, notifier: RecordingNotifier) -> None:
        self.daemon = daemon
        self.notifier = notifier
        self._finished: bool | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        self._finished = self.daemon.run()

    def stop(self) -> bool:
        self.daemon.ask(Request.STOP)
        self._thread.join(DEADLINE_S)
        assert self._finished is not None, "the daemon did not stop"
        return self._finished

    def finished(self) -> bool | None:
        """What `run` returned; None while it runs."""
        return self._finished


@contextmanager
def running(
    config: Config,
    captures: ScriptedCaptures,
    *,
    load: Callable[[], Config] | None = None,
    clock: SystemClock | None = None,
) -> Iterator[Running]:
    notifier = RecordingNotifier()
    daemon = Daemon(
        config,
        load=load or (lambda: config),
        open_captures=lambda _: captures,
        clock=clock or SystemClock(),
        notifier=notifier,
        poll_s=0.02,
        look_s=0.02,
    )
    work = Running(daemon, notifier)
    try:
        yield work
    finally:
        if work.finished() is None:
            work.stop()


def pattern_config(*vms: str) -> Config:
    """VMs that are named, and a pattern."""
    text = b'[repository]\nurl = "file:///srv/repository"\n[[protect]]\nmatch = "*"\n'
    protects = parse_config(text, Path("/etc/drsync/drsync.toml")).protects
    return replace(config_of(*vms), protects=protects)


def found_vm(name: str) -> VmSettings:
    source = LibvirtSource(domain=name, uri="qemu:///system", exclude=())
    return replace(config_of(name).vms[0], source=source)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s, "it did not come to this"
        time.sleep(0.005)


# ---- cadence -----------------------------------------------------------------------------------


def slots_of(cadence: Cadence, clock: SetClock, count: int) -> list[float]:
    """The monotonic times of the first runs, when every run starts on time."""
    slots, previous = [], None
    for _ in range(count):
        previous = cadence.get_next_fire_time(previous, clock.now())
        clock.advance((previous - clock.now()).total_seconds())
        slots.append(clock.monotonic)
    return slots


def test_runs_are_one_interval_apart() -> None:
    clock = SetClock()
    slots = slots_of(Cadence(clock, "web", 300.0), clock, 5)
    assert slots[0] - 1000 <= FIRST_WITHIN_S
    assert slots[1] - slots[0] <= 300 + 30
    assert [b - a for a, b in pairwise(slots[1:])] == pytest.approx([300.0] * 3)


def test_vms_do_not_start_together() -> None:
    clock = SetClock()
    first = sorted(Cadence(clock, f"vm{n}", 300.0).due_s for n in range(20))
    gaps = [b - a for a, b in pairwise(first)]
    assert max(first) - min(first) > 20
    assert sum(gap > 0.05 for gap in gaps) > 15
    starts = sorted(slots_of(Cadence(clock, f"vm{n}", 300.0), SetClock(), 3)[-1] % 300 for n in range(20))
    assert starts[-1] - starts[0] > 200


def test_a_vms_slots_are_the_same_after_a_restart() -> None:
    one, two = SetClock(), SetClock()
    two.advance(1234.5)
    before = slots_of(Cadence(one, "web", 300.0), one, 20)
    after = slots_of(Cadence(two, "web", 300.0), two, 3)
    assert any(after[2] == pytest.approx(slot) for slot in before)


def test_missed_runs_become_one() -> None:
    clock = SetClock()
    cadence = Cadence(clock, "web", 10.0)
    first = cadence.get_next_fire_time(None, clock.now())
    clock.advance(1e9)
    following = cadence.get_next_fire_time(first, clock.now())
    assert clock.now() < following <= clock.now() + timedelta(seconds=11)


@pytest.mark.parametrize("jump_s", [-3600.0, 3600.0, 1e9])
def test_setting_the_clock_does_not_move_a_due_time(jump_s: float) -> None:
    clock = SetClock()
    cadence = Cadence(clock, "web", 300.0)
    due = cadence.get_next_fire_time(datetime.min.replace(tzinfo=UTC), clock.now())
    left = due - clock.now()
    clock.wall += timedelta(seconds=jump_s)
    assert cadence.wall_time(clock.now()) - clock.now() == pytest.approx(left, abs=timedelta(milliseconds=1))


def test_an_overdue_run_is_due_now() -> None:
    clock = SetClock()
    cadence = Cadence(clock, "web", 300.0)
    clock.advance(1000)
    assert cadence.wall_time(clock.now()) == clock.now()


def test_a_delay_sets_one_run_aside_from_the_slots() -> None:
    clock = SetClock()
    cadence = Cadence(clock, "web", 300.0)
    assert cadence.delay(4.0, clock.now()) == clock.now() + timedelta(seconds=4)
    clock.advance(4)
    following = cadence.get_next_fire_time(clock.now(), clock.now())
    one = SetClock()
    slot = slots_of(Cadence(one, "web", 300.0), one, 2)[1]
    assert clock.monotonic + (following - clock.now()).total_seconds() == pytest.approx(slot)


def run_for(cadence: Cadence, clock: SetClock, lead_s: float, *, usual: bool = True) -> float:
    """Let the next run come and take `lead_s`, as the scheduler does it; when it started."""
    clock.advance(max(0.0, cadence.due_s - clock.monotonic))
    cadence.fired()
    cadence.get_next_fire_time(clock.now(), clock.now())
    started = clock.monotonic
    while cadence.due_s < started + lead_s:
        clock.advance(cadence.due_s - clock.monotonic)
        cadence.skipped()
        cadence.get_next_fire_time(clock.now(), clock.now())
    clock.advance(started + lead_s - clock.monotonic)
    if cadence.ended(usual=usual):
        cadence.delay(0.0, clock.now())
    return started


@pytest.mark.parametrize("lead_s", [0.01, 0.4, 1.3, 2.5, 4.0, 4.9])
def test_a_point_never_gets_older_than_the_rpo(lead_s: float) -> None:
    clock = SetClock()
    cadence = Cadence(clock, "web", 10.0)
    starts = [run_for(cadence, clock, lead_s) for _ in range(50)]
    ages = [following + lead_s - start for start, following in pairwise(starts[1:])]
    assert max(ages) <= 10.0
    assert max(ages) > 10.0 - 1.6 * lead_s - 1.0, "and is not captured much more often than that needs"


def test_a_lead_that_grows_keeps_to_the_rpo_within_its_margin_and_fades() -> None:
    clock = SetClock()
    cadence = Cadence(clock, "web", 100.0)
    for _ in range(3):
        run_for(cadence, clock, 4.0)
    before_s = cadence.interval_s
    run_for(cadence, clock, 20.0)
    assert cadence.interval_s == 75.0
    for _ in range(30):
        run_for(cadence, clock, 4.0)
    assert cadence.interval_s == before_s == 95.0


def test_what_is_not_usual_does_not_count_as_a_lead() -> None:
    clock = SetClock()
    cadence = Cadence(clock, "web", 100.0)
    run_for(cadence, clock, 80.0, usual=False)
    assert (cadence.lead_s, cadence.interval_s) == (0.0, 100.0)


def test_runs_that_take_longer_than_half_the_rpo_follow_each_other_at_once() -> None:
    clock = SetClock()
    cadence = Cadence(clock, "web", 10.0)
    starts = [run_for(cadence, clock, 7.0) for _ in range(10)]
    assert cadence.interval_s == 5.0
    assert [b - a for a, b in pairwise(starts[2:])] == pytest.approx([7.0] * 7)


def test_drift_tells_a_jump_once_and_no_slewing() -> None:
    clock = SetClock()
    drift = Drift(clock)
    clock.advance(1e6)
    clock.wall += timedelta(seconds=0.9)
    assert drift.jumped_s() == 0.0
    clock.wall -= timedelta(hours=1)
    assert drift.jumped_s() == pytest.approx(-3599.1)
    assert drift.jumped_s() == 0.0


def test_the_back_off_doubles_up_to_a_minute() -> None:
    for failures, least in [(1, 1), (2, 2), (3, 4), (6, 32)]:
        assert least <= backoff_s(failures) <= least + 1
    assert backoff_s(20) == backoff_s(10_000) == 60


# ---- the daemon --------------------------------------------------------------------------------


def test_every_vm_is_captured_again_and_again_and_the_host_lives() -> None:
    captures = ScriptedCaptures()
    with running(config_of("web", "db"), captures) as work:
        wait_until(lambda: captures.counts["web"] >= 3 and captures.counts["db"] >= 3)
        assert work.stop() is True
    assert 1 <= captures.beats <= 3  # one at the first capture, one at the end for all that came since
    assert work.notifier.messages[0] == "READY=1\nSTATUS=2 VMs, 2 at a time, to file:///srv/repository"
    assert "WATCHDOG=1" in work.notifier.messages
    assert "STOPPING=1" in work.notifier.messages


def test_no_more_vms_at_a_time_than_allowed_and_none_twice() -> None:
    captures = ScriptedCaptures({vm: lambda: time.sleep(0.03) for vm in ("a", "b", "c", "d", "e")})
    with running(config_of("a", "b", "c", "d", "e", rpo_s=0.01, parallel=2), captures):
        wait_until(lambda: len(captures.counts) == 5 and min(captures.counts.values()) >= 2)
    assert captures.most_running == 2


def test_one_vm_is_never_captured_twice_at_a_time() -> None:
    captures = ScriptedCaptures({"web": lambda: time.sleep(0.1)})
    with running(config_of("web", rpo_s=0.01, parallel=4), captures):
        wait_until(lambda: captures.counts["web"] >= 3)
    assert captures.most_running == 1


def raising(error: BaseException) -> Callable[[], None]:
    def capture() -> None:
        raise error

    return capture


@pytest.mark.parametrize(
    "error",
    [
        StoreUnavailable(url="s3://b", problem="503"),
        WrongKey(path="/k", url="s3://b"),
        ValueError("a bug"),
    ],
)
def test_a_failing_vm_never_stops_the_others(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    captures = ScriptedCaptures({"bad": raising(error)})
    with running(config_of("bad", "good", parallel=1), captures):
        wait_until(lambda: captures.counts["bad"] >= 2 and captures.counts["good"] >= 10)
    said = [record for record in caplog.records if "vm=bad failed" in record.getMessage()]
    assert len(said) == 1, "what goes on is said once"


def test_a_failure_is_logged_with_code_and_remedy_and_recovery_with_its_length(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    captures = ScriptedCaptures({"web": raising(StoreUnavailable(url="s3://b", problem="503"))})
    with running(config_of("web"), captures):
        wait_until(lambda: captures.counts["web"] >= 2)
        captures.script.clear()
        wait_until(lambda: any("works again" in record.getMessage() for record in caplog.records))
    messages = [record.getMessage() for record in caplog.records]
    assert (
        "vm=web failed code=30 times=1, tried again with back-off: store s3://b does not work now: 503; "
        "remedy: drsync config check   (what waits in the spool is shipped when the store answers again)"
    ) in messages
    assert any(message.startswith("vm=web works again after 2 failures in ") for message in messages)


def test_an_rpo_that_cant_be_held_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    captures = ScriptedCaptures({"web": lambda: time.sleep(0.5)})
    with running(config_of("web", rpo_s=0.3), captures):
        wait_until(lambda: captures.counts["web"] >= 4)
    times = captures.times["web"]
    assert times[-1] - times[1] < 0.6 * 2, "one right behind the other"
    said = [record.getMessage() for record in caplog.records if "can't be held" in record.getMessage()]
    assert said == ["vm=web takes 0.5 s to get a point into the repository: an RPO of 0.3 s can't be held"]


def test_what_a_retry_may_cure_is_tried_again_with_a_growing_back_off_not_at_the_rpo() -> None:
    captures = ScriptedCaptures({"web": raising(StoreUnavailable(url="s3://b", problem="503"))})
    with running(config_of("web", rpo_s=0.01), captures):
        wait_until(lambda: captures.counts["web"] >= 3)
    first, second, third = captures.times["web"][:3]
    assert 0.9 < second - first < 3
    assert 1.9 < third - second < 4


def test_what_no_retry_cures_waits_for_the_next_slot() -> None:
    captures = ScriptedCaptures({"web": raising(WrongKey(path="/k", url="s3://b"))})
    with running(config_of("web", rpo_s=0.05), captures):
        wait_until(lambda: captures.counts["web"] >= 10)


def test_a_fenced_vm_is_left_alone_until_reload_and_it_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    captures = ScriptedCaptures({"web": raising(Fenced(vm="web", writer="0123", epoch=2))})
    with running(config_of("web", "db"), captures) as work:
        wait_until(lambda: captures.counts["db"] >= 20)
        assert captures.counts["web"] == 1
        work.daemon.ask(Request.RELOAD)
        wait_until(lambda: captures.counts["web"] == 2)
    said = [record.getMessage() for record in caplog.records if "vm=web fenced" in record.getMessage()]
    assert len(said) == 2
    assert said[0] == (
        "vm=web fenced: VM web is protected by another drsync (0123, epoch 2); this one stops, until drsync is "
        "reloaded; remedy: drsync capture web --take-over   (only if the other one shall stop)"
    )


@pytest.mark.parametrize("jump", [timedelta(hours=-1), timedelta(days=-3650), timedelta(days=365)])
def test_setting_the_clock_neither_stalls_nor_floods_the_captures(
    jump: timedelta, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = JumpingClock()

    class JumpingDatetime(datetime):
        """What APScheduler reads the time from, moved along with the daemon's clock."""

        @classmethod
        def now(cls, tz: object = None) -> datetime:  # type: ignore[override]
            return clock.now()

    monkeypatch.setattr(apscheduler.schedulers.base, "datetime", JumpingDatetime)
    captures = ScriptedCaptures()
    with running(config_of("web", rpo_s=0.2), captures, clock=clock):
        wait_until(lambda: captures.counts["web"] >= 2)
        before, clock.jump = captures.counts["web"], jump
        started_s = time.monotonic()
        wait_until(lambda: captures.counts["web"] >= before + 5)
        took_s = time.monotonic() - started_s
    assert 0.5 < took_s < 3
    assert any(record.getMessage().startswith("clock was set by") for record in caplog.records)


# ---- reload and stop ---------------------------------------------------------------------------


def test_reload_takes_new_vms_and_drops_old_ones() -> None:
    captures = ScriptedCaptures()
    with running(config_of("web"), captures, load=lambda: config_of("db")) as work:
        wait_until(lambda: captures.counts["web"] >= 1)
        work.daemon.ask(Request.RELOAD)
        wait_until(lambda: captures.counts["db"] >= 1)
        seen = captures.counts["web"]
        wait_until(lambda: captures.counts["db"] >= 10)
        assert captures.counts["web"] <= seen + 1
    assert [m.split("=")[0] for m in work.notifier.messages if "WATCHDOG" not in m] == [
        "READY",
        "RELOADING",
        "READY",
        "STOPPING",
    ]


def test_a_bad_new_file_keeps_the_old_configuration_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    def load() -> Config:
        raise ConfigInvalid(path="/etc/drsync/drsync.toml", problem="[repository]: url is missing")

    captures = ScriptedCaptures()
    with running(config_of("web"), captures, load=load) as work:
        work.daemon.ask(Request.RELOAD)
        wait_until(lambda: any("kept the old configuration" in record.getMessage() for record in caplog.records))
        before = captures.counts["web"]
        wait_until(lambda: captures.counts["web"] >= before + 3)
    assert "/etc/drsync/drsync.toml: [repository]: url is missing; remedy: edit " in caplog.text


def test_a_capture_that_runs_during_a_reload_is_finished_and_not_doubled() -> None:
    entered, leave = threading.Event(), threading.Event()

    def slow() -> None:
        entered.set()
        assert leave.wait(DEADLINE_S)

    captures = ScriptedCaptures({"web": slow})
    with running(config_of("web", "db"), captures) as work:
        assert entered.wait(DEADLINE_S)
        work.daemon.ask(Request.RELOAD)
        wait_until(lambda: sum("READY" in m for m in work.notifier.messages) == 2)
        before = captures.counts["db"]
        wait_until(lambda: captures.counts["db"] >= before + 10)
        assert captures.counts["web"] == 1
        leave.set()
        wait_until(lambda: captures.counts["web"] >= 2)


def test_stop_lets_a_running_capture_finish_and_starts_no_other() -> None:
    entered, leave = threading.Event(), threading.Event()

    def slow() -> None:
        entered.set()
        assert leave.wait(DEADLINE_S)

    captures = ScriptedCaptures({"web": slow})
    with running(config_of("web", "db", parallel=1), captures) as work:
        assert entered.wait(DEADLINE_S)
        work.daemon.ask(Request.STOP)
        wait_until(lambda: "STOPPING=1" in work.notifier.messages)
        counted = captures.counts.total()
        time.sleep(0.2)
        assert work.finished() is None
        leave.set()
        wait_until(lambda: work.finished() is not None)
    assert work.finished() is True
    assert captures.counts.total() == counted


@pytest.mark.parametrize("twice", [False, True])
def test_what_does_not_finish_in_time_or_on_a_second_request_is_abandoned_and_named(
    twice: bool, caplog: pytest.LogCaptureFixture
) -> None:
    entered, leave = threading.Event(), threading.Event()

    def stuck() -> None:
        entered.set()
        assert leave.wait(DEADLINE_S)

    captures = ScriptedCaptures({"web": stuck})
    with running(config_of("web", stop_timeout_s=10.0 if twice else 0.2), captures) as work:
        assert entered.wait(DEADLINE_S)
        started_s = time.monotonic()
        if twice:
            work.daemon.ask(Request.STOP)
        assert work.stop() is False
        assert time.monotonic() - started_s < 5
        leave.set()
    assert "abandoned, to be settled by the next capture: web" in caplog.text


def test_a_host_without_vms_still_runs_and_stops() -> None:
    with running(config_of(), ScriptedCaptures()) as work:
        assert work.stop() is True


# ---- groups ------------------------------------------------------------------------------------


def grouped(config: Config, group: str, *names: str) -> Config:
    return replace(config, vms=[replace(vm, group=group if vm.name in names else vm.group) for vm in config.vms])


def test_the_vms_of_a_group_are_one_job_and_the_others_are_not_in_it() -> None:
    captures = ScriptedCaptures()
    with running(grouped(config_of("web", "db", "app"), "shop", "db", "app"), captures) as work:
        wait_until(lambda: len(captures.groups) >= 3 and captures.counts["web"] >= 3)
        assert work.stop() is True
    assert set(captures.groups) == {("db", "app")}
    assert captures.counts["db"] == captures.counts["app"] == len(captures.groups)


def test_a_member_that_is_fenced_is_left_out_and_the_others_go_on(caplog: pytest.LogCaptureFixture) -> None:
    captures = ScriptedCaptures({"db": raising(Fenced(vm="db", writer="0123", epoch=2))})
    with running(grouped(config_of("db", "app"), "shop", "db", "app"), captures):
        wait_until(lambda: captures.counts["app"] >= 4)
    assert captures.groups[:2] == [("db", "app"), ("app",)]
    assert captures.counts["db"] == 1
    assert "vm=db fenced: " in caplog.text


def test_a_member_that_stays_away_does_not_make_the_others_be_captured_all_the_time() -> None:
    captures = ScriptedCaptures({"db": raising(StoreUnavailable(url="s3://b", problem="503"))})
    config = grouped(config_of("db", "app", rpo_s=0.5), "shop", "db", "app")
    with running(config, captures):
        wait_until(lambda: captures.counts["db"] >= 4)  # tried again after 1 s, 2 s, 4 s; then by its slots
        wait_until(lambda: len(captures.times["app"]) >= 7)
    gaps = [b - a for a, b in pairwise(captures.times["app"])]
    assert all(gap > 0.9 for gap in gaps[:3])
    assert all(0.3 < gap < 1.5 for gap in gaps[4:6]), gaps


def test_a_bug_in_a_groups_capture_is_each_members_failure(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(ScriptedCaptures):
        def capture_together(
            self, names: Sequence[str], progress_of: Callable[[str], Progress], /, *, may_seed: bool
        ) -> Mapping[str, Outcome | Exception]:
            raise ZeroDivisionError

    captures = Broken()
    with running(grouped(config_of("db", "app", "web"), "shop", "db", "app"), captures):
        wait_until(lambda: "vm=app failed" in caplog.text and captures.counts["web"] >= 3)
    assert "vm=db failed times=1, tried again with back-off: a bug in drsync" in caplog.text


def test_a_group_waits_for_a_capture_of_one_of_its_vms_that_began_before_a_reload() -> None:
    entered, leave = threading.Event(), threading.Event()

    def slow() -> None:
        entered.set()
        assert leave.wait(DEADLINE_S)

    captures = ScriptedCaptures({"db": slow})
    new = grouped(config_of("db", "app", "web"), "shop", "db", "app")
    with running(config_of("db"), captures, load=lambda: new) as work:
        assert entered.wait(DEADLINE_S)
        work.daemon.ask(Request.RELOAD)
        wait_until(lambda: captures.counts["web"] >= 5)
        assert captures.groups == []
        leave.set()
        wait_until(lambda: len(captures.groups) >= 1)


def test_vm_settings_of_a_test_are_those_of_a_file() -> None:
    (vm,) = config_of("web").vms
    assert isinstance(vm, VmSettings)


# ---- seeds -------------------------------------------------------------------------------------


class Seeding:
    """A seed that goes on until it is told to stop, or to end."""

    def __init__(self) -> None:
        self.begun = 0
        self.ends = False

    def __call__(self, stop: Callable[[], bool]) -> Result:
        self.begun += 1
        while not self.ends:
            if stop():
                return Result.SEEDING
            time.sleep(0.005)
        return Result.COMMITTED


def test_a_seed_holds_up_no_other_vm(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="drsync")
    captures, seed = ScriptedCaptures(), Seeding()
    captures.seeds = {"big": seed}
    with running(config_of("big", "web", parallel=1), captures):
        wait_until(lambda: seed.begun == 1)
        before = captures.counts["web"]
        wait_until(lambda: captures.counts["web"] >= before + 5)
        assert seed.begun == 1
        captures.seeds = {}
        seed.ends = True
        wait_until(lambda: captures.counts["big"] >= 3)  # its increments are captures like any other
    assert "vm=big has to be seeded: its disks are read live" in caplog.text


def test_seeds_wait_for_each_other() -> None:
    captures, first, second = ScriptedCaptures(), Seeding(), Seeding()
    captures.seeds = {"big": first, "bigger": second}
    with running(config_of("big", "bigger", "web"), captures):
        wait_until(lambda: first.begun + second.begun == 1)
        before = captures.counts["web"]
        wait_until(lambda: captures.counts["web"] >= before + 5)
        assert first.begun + second.begun == 1
        first.ends = second.ends = True
        wait_until(lambda: first.begun >= 1 and second.begun >= 1)


def test_a_seed_stops_at_once_when_the_daemon_is_asked_to_stop() -> None:
    captures, seed = ScriptedCaptures(), Seeding()
    captures.seeds = {"big": seed}
    with running(config_of("big", stop_timeout_s=DEADLINE_S), captures) as work:
        wait_until(lambda: seed.begun == 1)
        began_s = time.monotonic()
        assert work.stop()
        assert time.monotonic() - began_s < DEADLINE_S / 2


def test_a_seed_is_handed_over_when_the_configuration_is_read_again() -> None:
    captures, seed = ScriptedCaptures(), Seeding()
    captures.seeds = {"big": seed}
    with running(config_of("big"), captures) as work:
        wait_until(lambda: seed.begun == 1)
        work.daemon.ask(Request.RELOAD)
        wait_until(lambda: seed.begun == 2)


def test_a_member_that_has_to_be_seeded_is_seeded_by_itself_while_its_group_goes_on() -> None:
    captures, seed = ScriptedCaptures(), Seeding()
    captures.seeds = {"big": seed}
    config = grouped(config_of("big", "app", "db", parallel=1), "shop", "big", "app", "db")
    with running(config, captures):
        wait_until(lambda: seed.begun == 1)
        before = len(captures.groups)
        wait_until(lambda: len(captures.groups) >= before + 5)
        assert seed.begun == 1
        captures.seeds = {}
        seed.ends = True
        wait_until(lambda: captures.counts["big"] >= 3)  # it is captured with its group again
    assert captures.groups[0] == ("big", "app", "db")
    assert set(captures.groups[1:before]) <= {("app", "db")}
    assert captures.groups[-1] == ("big", "app", "db")
    assert captures.groups.count(("big", "app", "db")) == captures.counts["big"] + 1


def test_a_group_whose_members_are_all_seeded_comes_together_again() -> None:
    captures = ScriptedCaptures()
    begun, ends = [], threading.Event()

    def seed_of(name: str) -> Callable[[Callable[[], bool]], Result]:
        def seed(_stop: Callable[[], bool]) -> Result:
            begun.append(name)
            assert ends.wait(DEADLINE_S)
            del captures.seeds[name]
            return Result.COMMITTED

        return seed

    captures.seeds = {"big": seed_of("big"), "bigger": seed_of("bigger")}
    with running(grouped(config_of("big", "bigger"), "shop", "big", "bigger"), captures):
        wait_until(lambda: len(begun) == 1)
        time.sleep(0.3)  # several slots, in which there is nobody to capture
        assert captures.groups == [("big", "bigger")]
        ends.set()
        wait_until(lambda: captures.groups.count(("big", "bigger")) >= 3)
    assert sorted(begun) == ["big", "bigger"]


def test_a_seed_that_fails_is_tried_again_by_itself(caplog: pytest.LogCaptureFixture) -> None:
    seed = Seeding()

    def failing(stop: Callable[[], bool]) -> Result:
        if seed.begun == 0:
            seed.begun += 1
            raise StoreUnavailable(url="s3://b", problem="503")
        return seed(stop)

    captures = ScriptedCaptures()
    captures.seeds = {"big": failing}
    with running(grouped(config_of("big", "app"), "shop", "big", "app"), captures):
        wait_until(lambda: seed.begun == 2)
        assert set(captures.groups[1:]) <= {("app",)}
    assert caplog.text.count("vm=big failed code=30 times=1, tried again with back-off") == 1


def test_a_member_that_is_fenced_while_it_is_seeded_is_given_up() -> None:
    def fenced(_stop: Callable[[], bool]) -> Result:
        raise Fenced(vm="big", writer="0123", epoch=2)

    captures = ScriptedCaptures()
    captures.seeds = {"big": fenced}
    with running(grouped(config_of("big", "app"), "shop", "big", "app"), captures):
        wait_until(lambda: captures.counts["app"] >= 10)
    assert captures.groups.count(("big", "app")) == 1


# ---- patterns ----------------------------------------------------------------------------------


def test_a_vm_that_appears_is_captured_and_one_that_is_gone_no_more(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="drsync")
    captures = ScriptedCaptures()
    config = pattern_config("named")
    captures.found = [*config.vms]
    with running(config, captures) as work:
        wait_until(lambda: captures.counts["named"] > 0)
        captures.found = [*config.vms, found_vm("a"), found_vm("b")]
        wait_until(lambda: captures.counts["a"] > 1 and captures.counts["b"] > 1)
        captures.found = [found_vm("b")]  # a VM that the file names stays, whoever finds it
        wait_until(lambda: "vm=a is gone from libvirt" in caplog.text)
        settled = captures.counts["a"]
        before = captures.counts["b"], captures.counts["named"]
        wait_until(lambda: captures.counts["b"] > before[0] + 2 and captures.counts["named"] > before[1] + 2)
        assert captures.counts["a"] <= settled + 1
        captures.found = [found_vm("a")]
        wait_until(lambda: captures.counts["a"] > settled + 2)
        assert work.stop()
    assert caplog.text.count("vm=a was found: it is protected from now on") == 2
    assert "vm=named is gone" not in caplog.text


def test_what_a_pattern_finds_joins_its_group_and_leaves_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="drsync")
    captures = ScriptedCaptures()
    config = grouped(pattern_config("named"), "shop", "named")
    a, b = (replace(found_vm(name), group="shop") for name in "ab")
    captures.found = [*config.vms]
    with running(config, captures) as work:
        wait_until(lambda: ("named",) in captures.groups)
        captures.found = [*config.vms, a]
        wait_until(lambda: ("named", "a") in captures.groups)
        captures.found = [*config.vms, b]
        wait_until(lambda: ("named", "b") in captures.groups)
        assert work.stop()
    assert {names for names in captures.groups if len(names) > 2} <= {("named", "a", "b")}
    assert captures.groups[-1] == ("named", "b")
    assert "vm=a was found: it is protected from now on, every 0.1 s, in the group shop" in caplog.text
    assert "vm=a is gone from libvirt" in caplog.text


def test_a_group_of_found_vms_alone_begins_ends_and_begins_again() -> None:
    captures = ScriptedCaptures()
    members = [replace(found_vm(name), group="shop") for name in "ab"]
    with running(pattern_config(), captures) as work:
        for _ in range(2):
            captures.found = members
            before = captures.groups.count(("a", "b"))
            wait_until(lambda before=before: captures.groups.count(("a", "b")) > before + 1)  # type: ignore[misc]
            captures.found = []
            wait_until(lambda: not work.daemon._generation._jobs)
        assert work.stop()


def test_while_libvirt_does_not_answer_the_vms_that_are_known_go_on(caplog: pytest.LogCaptureFixture) -> None:
    captures = ScriptedCaptures()
    config = pattern_config()
    captures.found = [found_vm("a")]
    with running(config, captures):
        wait_until(lambda: captures.counts["a"] > 0)
        captures.trouble = LibvirtUnreachable(vm="*", uri="qemu:///system", problem="connection refused")
        wait_until(lambda: "VMs can't be looked for" in caplog.text)
        before = captures.counts["a"]
        wait_until(lambda: captures.counts["a"] > before + 2)
    assert caplog.text.count("VMs can't be looked for") == 1
    assert "virsh -c 'qemu:///system' list --all" in caplog.text
