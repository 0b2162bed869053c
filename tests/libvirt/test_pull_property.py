"""A libvirt domain that writes all the time while it is seeded, with interruptions of every kind.

As tests/qemu/test_seed_property.py, through libvirt's pull mode, whose jobs last half a second
here: nearly every seed goes over several of them. libvirtd is restarted, snapshots are
taken and checkpoints lost meanwhile: every point must be what the oracle says.
"""

import itertools
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, cast

import pytest
from forwarding_source import ForwardingSource
from hypothesis import strategies as st
from idle_domain import IdleDomain
from libvirt_bench import TARGETS, NamedSource
from libvirt_site import LibvirtSite, LibvirtSiteFailed
from protected_vm import VM, Witness
from seed_history import BEGINNING, MEANWHILE, SEEDS, DiesMeanwhile, Seed
from storage_daemon import StorageDaemon
from vm_history import CHANGES, SIZES, Change, Lab, PowerCut, Restart, Write, Zero, play_any

from drsync.capture import Outcome
from drsync.errors import LibvirtUnreachable, SourceLost
from drsync.model import CaptureId, Kind, Pace
from drsync.source import Base, DiskSurvey, LiveView, Source
from drsync.source.bitmap import Owner
from drsync.source.libvirt_pull import PullOptions
from drsync.source.libvirt_scratch import ScratchLimits
from drsync.source.libvirt_slices import PullView
from drsync.source.libvirt_source import open_source
from drsync.source.libvirt_survey import LibvirtOptions

BUDGET_S: Final = 20.0
"""No history is begun later than this after the first one: a loaded machine tries fewer."""
_NUMBERS: Final = itertools.count()

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(300)]


class NamedDomain(IdleDomain):
    """A domain whose disks have the names of the history's."""

    def io(self, target: str, *commands: str) -> str:
        return super().io(TARGETS[target], *commands)

    def read(self, target: str) -> bytes:
        return super().read(TARGETS[target])


class _Watched(ForwardingSource):
    """A source that notes the views that it opens."""

    def __init__(self, inner: Source, views: list[PullView]) -> None:
        super().__init__(inner)
        self._views = views

    def open_live(self, base: Base | None, disks: Sequence[DiskSurvey], *, pace: Pace) -> LiveView:
        view = super().open_live(base, disks, pace=pace)
        assert isinstance(view, PullView)
        self._views.append(view)
        return view


class DomainLab(Lab):
    """The history's VM as a domain of libvirt's."""

    def __init__(self, site: LibvirtSite, place: Path) -> None:
        sizes = {TARGETS[name]: size for name, size in SIZES.items()}
        self.domain = NamedDomain(site, f"history-{next(_NUMBERS)}", sizes, directory=place)
        self._views: list[PullView] = []
        self._open(place, cast(StorageDaemon, self.domain))

    def source(self) -> Source:
        vm = self.spool.vm(VM)
        options = LibvirtOptions(
            vm=VM,
            domain=self.domain.name,
            uri=self.domain.site.uri,
            repository_tag=self.repository().tag,
            layers=vm.path,
            pull=PullOptions(
                directory=vm.live_directory, scratch=ScratchLimits(keep_free_bytes=0, most_bytes=2**20), slice_s=0.5
            ),
        )
        return Witness(NamedSource(_Watched(open_source(options), self._views)), self.contents, self.seen)

    def cycle(self, **arguments: Any) -> Outcome:
        """As Lab's; a drsync that crashes takes its thread and its guard's pipe with it, as its process would."""
        try:
            return super().cycle(**arguments)
        finally:
            for view in self._views:
                view._slices._stopped.set()
                if view._slices._thread.is_alive():
                    view._slices._thread.join()
                view._slices._guard.close()
            self._views.clear()

    def _check_nothing_is_left(self, newest: CaptureId) -> None:
        name = Owner(repository=self.repository().tag, vm=VM).checkpoint(newest)
        assert self.domain.site.virsh("checkpoint-list", self.domain.name, "--name").split() == [name]
        assert self.domain.job() == "None"
        assert not [path for path in (self.spool.path / VM).iterdir() if path.is_dir()]
        assert self.domain.state == "running"


@dataclass(frozen=True, slots=True, kw_only=True)
class LostCheckpoints:
    """All checkpoints are gone, nobody knows why."""

    metadata_only: bool

    def run(self, lab: DomainLab) -> None:
        site, name = lab.domain.site, lab.domain.name
        for checkpoint in site.virsh("checkpoint-list", name, "--name").split():
            with suppress(LibvirtSiteFailed):  # after a power cut its bitmap is not there any more
                site.virsh("checkpoint-delete", name, checkpoint, *(["--metadata"] if self.metadata_only else []))


@dataclass(frozen=True, slots=True, kw_only=True)
class DaemonRestart:
    """libvirtd is updated; the domain runs on."""

    def run(self, lab: DomainLab) -> None:
        lab.domain.site.stop_daemon()
        lab.domain.site.start()


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The admin takes an external snapshot, or commits the one that there is."""

    def run(self, lab: DomainLab) -> None:
        site, domain = lab.domain.site, lab.domain
        if domain.top("vda") == domain.paths["vda"]:
            disk = f"vda,file={domain.paths['vda'].with_suffix('.snap')}"
            site.virsh(
                *("snapshot-create-as", domain.name, "--no-metadata", "--disk-only", "--diskspec", disk),
                *("--diskspec", "vdb,snapshot=no"),
            )
        else:
            top = domain.top("vda")
            site.virsh("blockcommit", domain.name, "vda", "--active", "--pivot", "--wait")
            top.unlink()


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotMeanwhile:
    """A seed during which an external snapshot is taken, and libvirtd restarted after it."""

    meanwhile: Sequence[Change]
    then: Literal["snapshot", "daemon"]

    def run(self, lab: DomainLab) -> None:
        trouble = Snapshot() if self.then == "snapshot" else DaemonRestart()
        lost = (SourceLost, LibvirtUnreachable) if self.then == "daemon" else ()
        with suppress(*lost):
            Seed(meanwhile=[*self.meanwhile, cast(Change, trouble)]).run(lab)


Step = (
    Change | Seed | LostCheckpoints | DiesMeanwhile | Restart | PowerCut | DaemonRestart | Snapshot | SnapshotMeanwhile
)
NO_GROWTH: Final = CHANGES.filter(lambda c: type(c).__name__ != "Grow")
TROUBLE: Final = st.one_of(
    st.sampled_from([Restart(), PowerCut(), DaemonRestart(), Snapshot()]),
    st.builds(LostCheckpoints, metadata_only=st.booleans()),
    st.builds(DiesMeanwhile, after=st.integers(1, 5)),
    st.builds(SnapshotMeanwhile, meanwhile=MEANWHILE, then=st.sampled_from(["snapshot", "daemon"])),
)
HISTORIES: Final[st.SearchStrategy[list[Step]]] = st.lists(
    st.one_of(NO_GROWTH, SEEDS, SEEDS, TROUBLE), min_size=5, max_size=9
)


def play(site: LibvirtSite, place: Path, history: Sequence[Step]) -> set[Kind]:
    """Let a history happen and check all of it; the kinds of captures that its points came from."""
    lab = DomainLab(site, place)
    with lab.domain:
        for step in history:
            step.run(lab)  # type: ignore[union-attr]
        kinds = lab.check()
        assert not lab.spool.vm(VM).journal_path.exists()
        return kinds


def test_a_history_with_all_kinds_of_interruptions_restores_at_every_point(site: LibvirtSite, tmp_path: Path) -> None:
    busy = [
        Write(disk="root", sectors=300, start=0, pattern=1),
        Write(disk="data", sectors=300, start=999, pattern=2),
        Zero(disk="root", sectors=700, start=30, unmap=True),
        Write(disk="root", sectors=3, start=500, pattern=3),
    ]
    kinds = play(
        site,
        tmp_path,
        [
            *BEGINNING,
            Seed(meanwhile=busy, stop_after=2),
            DaemonRestart(),
            Seed(meanwhile=busy, bomb=(9, "after")),
            Restart(),
            Seed(meanwhile=busy, failing_pack=2),
            SnapshotMeanwhile(meanwhile=busy, then="snapshot"),
            Seed(meanwhile=busy, full=True, stop_after=3),
            SnapshotMeanwhile(meanwhile=busy, then="daemon"),
            Write(disk="root", sectors=300, start=30, pattern=6),
            Seed(meanwhile=busy),
            LostCheckpoints(metadata_only=True),
            Write(disk="root", sectors=300, start=500, pattern=6),
            Snapshot(),
            Seed(meanwhile=busy),
            PowerCut(),
            Seed(meanwhile=busy, stop_after=3),
            Seed(meanwhile=[]),
            DiesMeanwhile(after=2),
            Write(disk="data", sectors=30, start=310, pattern=8),
            Seed(meanwhile=[]),
        ],
    )
    assert kinds == set(Kind)


def test_any_history_of_seeds_restores_at_every_point(
    site: LibvirtSite, tmp_path_factory: pytest.TempPathFactory
) -> None:
    play_any(
        HISTORIES,
        lambda history: play(site, tmp_path_factory.mktemp("history"), [*BEGINNING, *history]),
        budget_s=BUDGET_S,
    )
