"""Preflights of a session's points, and the reports that are kept of them."""

import logging
from datetime import datetime

from drsync.catalog import Point
from drsync.errors import SpoolError
from drsync.finding import Finding
from drsync.preflight.report import KEPT_NAME, Report
from drsync.preflight.run import preflight
from drsync.session import Session

_LOGGER = logging.getLogger(__name__)


class Preflighting:
    """Looks into points before they are needed."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def preflight(self, vm: str, *, number: int | None = None, at: datetime | None = None, reader: str = "") -> Report:
        """Whether a point, else the newest, would come up in EC2; the result is kept in this host's spool.

        Raises:
            UnknownVm, UnknownPoint, PointLost: see find_point.
            ObjectMissing, ObjectDamaged, StoreError: the disks can't be read.
        """
        # It reads little: what it can't read, it says.
        point, image = Finding(self._session).find_even_damaged(vm, number=number, at=at)
        report = preflight(self._session.log(vm).objects, point, image, self._session.clock, reader=reader)
        try:
            self._session.spool.vm(vm).note(KEPT_NAME, report)
        except SpoolError as err:  # a machine that only recovers need not have a spool
            _LOGGER.warning("vm=%s the result is not kept: %s", vm, err)
        return report

    def preflighted(self, point: Point) -> Report:
        """The report of a point: the one that is kept if it is of this point, else a new one.

        Raises:
            UnknownVm, UnknownPoint, ObjectMissing, ObjectDamaged, StoreError: see `preflight`.
        """
        kept = self._session.spool.vm(point.vm).noted(KEPT_NAME, Report)
        if kept is not None and (kept.vm, kept.point, kept.point_time) == (point.vm, point.number, point.time):
            return kept
        return self.preflight(point.vm, number=point.number)
