"""Finds the point that somebody wants back."""

from datetime import datetime

from drsync import catalog
from drsync.catalog import Point
from drsync.errors import PointLost, PointPruned, UnknownPoint
from drsync.heartbeat import read_heartbeats
from drsync.image import PointImage
from drsync.log import Log
from drsync.mapped import Stretch, newest_stretch
from drsync.salvage import refuse_damaged
from drsync.session import Session


class Finding:
    """Looks in the logs of a session's repository."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def find_point(self, vm: str, *, number: int | None = None, at: datetime | None = None) -> tuple[Point, PointImage]:
        """The point that was asked for, else the newest, from as little of the log as block maps allow.

        Raises:
            UnknownVm, UnknownPoint: there is nothing like that.
            PointPruned: there was.
            PointLost: no number was given, and newer points than the log has are known to have been committed.
            PointDamaged: there are damage records, and the point has really lost something.
        """
        point, image = self.find_even_damaged(vm, number=number, at=at)
        refuse_damaged(self._session.log(vm), point.number)
        return point, image

    def find_even_damaged(
        self, vm: str, *, number: int | None = None, at: datetime | None = None
    ) -> tuple[Point, PointImage]:
        """As `find_point`, but damage is no reason to refuse.

        Raises:
            UnknownVm, UnknownPoint, PointPruned, PointLost: see `find_point`.
        """
        self._session.known_vms(vm)
        log = self._session.log(vm)
        last = self._last_needed(log, number)
        while True:
            stretch = newest_stretch(log, last)
            known = catalog.points_of(stretch.segments, parent=stretch.parent)
            try:
                point = catalog.choose(vm, known, number=number, at=at)
            except UnknownPoint as err:
                parent = _surviving(stretch)
                if stretch.ground is None or parent is None:
                    raise UnknownPoint(**err.fields | {"known": catalog.described(catalog.points(log))}) from err
                last = parent  # what is older than this map is looked for in front of it
            else:
                return point, stretch.image(point.number)

    def _last_needed(self, log: Log, number: int | None) -> int:
        """The last segment that a restore reads; damage behind the point that was asked for does not matter."""
        if number is not None and 1 <= number <= log.horizon().through:
            if number not in log.horizon().survivors:
                raise PointPruned(vm=log.vm, point=number, known=catalog.described(catalog.points(log)))
            return number
        if number is not None and number >= 1 and any(seq == number for seq, _ in log.listed(after=number - 1)):
            return number
        newest, committed = log.newest(), self.committed(log.vm)
        if number is None and newest < committed:  # not an older point instead, without a word
            raise PointLost(vm=log.vm, found=newest, expected=committed)
        return newest

    def committed(self, vm: str) -> int:
        """The newest segment that the heartbeats, or this host's spool, know to have been committed."""
        seen = read_heartbeats(self._session.repository).of(vm)
        return max(self._session.spool.vm(vm).state().wrote_seq, seen.seq if seen else 0)


def _surviving(stretch: Stretch) -> int | None:
    """The newest point before a stretch that was not pruned; None if there is none."""
    parent, horizon = stretch.parent, stretch.horizon
    if parent is None or not horizon.is_dropped(parent):
        return parent
    return max((seq for seq in horizon.survivors if seq < parent), default=None)
