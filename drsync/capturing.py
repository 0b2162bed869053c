"""Captures of a session's VMs: what one would do, one by itself, one of a group."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Final

from drsync.capture import CaptureOptions, Outcome, Result, base_of, run_cycle
from drsync.config import VmSettings, captured_together
from drsync.errors import LibraryMissing, LiveUnavailable
from drsync.group import Assembly, run_together
from drsync.heads import Heads, newest_point
from drsync.model import Progress
from drsync.quiesce import Company
from drsync.seed import SeedOptions, is_to_be_streamed
from drsync.session import Session
from drsync.source import DiskSurvey

_LEAST_GATHER_S: Final = 30.0
"""A member of a group gets this long to be ready, however short the RPO is."""


class Capturing:
    """Thread-safe, for different VMs at a time; keep it between the cycles, since it remembers the logs' heads."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._heads = Heads(session.clock)

    def survey(self, vm: VmSettings) -> Sequence[DiskSurvey]:
        """What a capture of the VM would do now. Nothing in QEMU is changed: a capture may wait to be shipped."""
        log = self._session.log(vm.name)
        newest = log.newest()
        head = log.read(newest) if newest else None
        with self._session.spool.vm(vm.name).locked(), self._session.open_source(vm) as source:
            return source.survey(base_of(newest_point(log, head)), tidy=False)

    def way(self, vm: VmSettings, disks: Sequence[DiskSurvey]) -> tuple[bool, Sequence[str]]:
        """Whether a capture of these disks would be read live, not copied to the spool; what there is to know of it.

        Raises:
            SpoolFull: it would, and the spool has no room to end that.
            LibraryMissing: it would, and what that needs is not installed.
            NoWayToCopy: it would have to, and can't be.
        """
        spool = self._session.spool.vm(vm.name)
        wanted = is_to_be_streamed(disks, spool, self._seed_options(vm.name))
        if wanted:
            spool.check_room(0)
        with spool.locked(), self._session.open_source(vm) as source:
            try:
                source.check_live(disks)
            except LibraryMissing:
                if wanted:
                    raise
                return False, []
            except LiveUnavailable as err:
                copy_bytes = sum(disk.copy_bytes for disk in disks)
                if wanted and not spool.has_room(copy_bytes):
                    raise spool.no_way(copy_bytes, err) from err
                problem = f"can't be read live: {err.fields['problem']}"
                told = wanted or source.is_running()
                return False, [f"{problem}; so a full needs room in the spool"] if told else []
        return wanted, []

    def _seed_options(self, vm_name: str, stop: Callable[[], bool] = lambda: False) -> SeedOptions:
        return SeedOptions(
            stream_above_bytes=self._session.config.spool.stream_above_bytes,
            read_pace=self._session.limits.seed_reads(vm_name),
            store=self._session.seed_store,
            stop=stop,
        )

    def capture(
        self,
        vm_name: str,
        progress: Progress,
        *,
        full: bool = False,
        take_over: bool = False,
        may_seed: bool = True,
        stop: Callable[[], bool] = lambda: False,
        company: Company | None = None,
    ) -> Outcome:
        """One capture cycle of a configured VM, by itself or as one of a `company`; a seed ends when `stop` says so.

        Raises:
            DrsyncError: see capture.run_cycle; the error is also remembered for `status`.
        """
        vm = self._session.protection.vm(vm_name)
        self._session.guests.let_go_of(vm)  # before the repository is looked for, which may be away
        options = CaptureOptions(
            full=full,
            take_over=take_over,
            timeout_s=vm.capture_timeout_s,
            may_seed=may_seed,
            heads=self._heads,
            read_pace=self._session.limits.reads(vm.name),
            seed=self._seed_options(vm.name, stop),
        )
        return run_cycle(
            self._session.log(vm.name),
            self._session.spool.vm(vm.name),
            self._session.spool.writer_id(),
            lambda: self._session.open_source(vm),
            self._session.clock,
            progress,
            options,
            self._session.guests.quiesce(vm, company),
        )

    def together(self, vm_name: str) -> Sequence[VmSettings]:
        """The VMs that are captured together with this one, itself among them.

        Raises:
            UnknownVm: there is no such VM.
        """
        vm = self._session.protection.vm(vm_name)
        return next(vms for vms in captured_together(self._session.protection.vms) if vm in vms)

    def capture_together(
        self,
        names: Sequence[str],
        progress_of: Callable[[str], Progress],
        *,
        full: bool = False,
        take_over: bool = False,
        may_seed: bool = True,
    ) -> Mapping[str, Outcome | Exception]:
        """One cycle of each of these VMs of one group, at one instant; how each one ended.

        Members of the group that are not named are left out, which the points tell.
        So are those that have to be seeded: the others do not wait for that. With
        `may_seed` they are seeded when the others have their points, else it is told.

        Raises:
            CaptureRunning: another process on this host captures the group.
        """
        vms = [self._session.protection.vm(name) for name in names]
        group = vms[0].group
        if group is None:
            raise ValueError(names)
        absent = {vm.name: self._why_absent(vm.name) for vm in self.together(names[0]) if vm.name not in names}
        assembly = Assembly(
            group,
            names,
            pauses=vms[0].group_pause,
            gather_s=max(_LEAST_GATHER_S, min(vms[0].rpo_s, *(vm.capture_timeout_s for vm in vms))),
            copy_s=max(vm.capture_timeout_s for vm in vms),
            absent=absent,
        )
        progresses = {name: progress_of(name) for name in names}

        def cycle(name: str, company: Company | None) -> Outcome:
            return self.capture(
                name, progresses[name], full=full, take_over=take_over, may_seed=company is None, company=company
            )

        with self._session.spool.group_locked(group):
            results = run_together(
                assembly, {name: partial(cycle, name) for name in names}, self._session.guests.are_held
            )
        if not may_seed:
            return results
        return {name: _seeded(result, partial(cycle, name, None)) for name, result in results.items()}

    def _why_absent(self, vm_name: str) -> str:
        return "is being seeded" if self._session.spool.vm(vm_name).journal_path.exists() else "was left out"


def _seeded(result: Outcome | Exception, seed: Callable[[], Outcome]) -> Outcome | Exception:
    """What became of a member of a group: if it was left to be seeded, what `seed` comes to."""
    if isinstance(result, Exception) or result.result is not Result.SEED_DUE:
        return result
    try:
        outcome = seed()
    except Exception as err:  # noqa: BLE001 - kept for the caller, as the cycles of the others are
        return err
    return replace(outcome, shipped_before=outcome.shipped_before or result.shipped_before)
