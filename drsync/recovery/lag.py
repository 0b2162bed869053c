"""How much is lost with a point."""

from datetime import datetime

from drsync import catalog
from drsync.catalog import Point
from drsync.heartbeat import read_heartbeats
from drsync.session import Session


def rpo_s(session: Session, point: Point, lost_at: datetime) -> float:
    """From the newest moment that the point is known to show until the site was lost."""
    seen = read_heartbeats(session.repository).of(point.vm)
    checked_at = seen.checked_at if seen is not None and seen.seq == point.number else None
    return catalog.lag_s(point.time, checked_at, lost_at)
