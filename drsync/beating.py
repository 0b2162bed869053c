"""The heartbeat of this host, and what is looked at with it."""

import logging
from functools import cached_property
from typing import Final

from drsync import catalog
from drsync.heartbeat import Seen, write_heartbeat
from drsync.locks import LockWatch
from drsync.session import Session

_LOGGER = logging.getLogger(__name__)
_LOOK_AT_KEYS_S: Final = 3600.0


class Beating:
    """Keep it between the beats: what costs a request more is not looked at each time."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._looked_at_keys_s: float | None = None

    def beat(self) -> None:
        """Write this host's heartbeat: what its spool knows of each configured VM."""
        seen: dict[str, Seen] = {}
        for vm in self._session.protection.vms:
            state = self._session.spool.vm(vm.name).state()
            is_ours = bool(state.wrote_seq and state.checked_at) and not state.fenced_by
            if is_ours and self._session.repository.holds(vm.name):
                seen[vm.name] = Seen(seq=state.wrote_seq, checked_at=catalog.parse_time(state.checked_at))
        write_heartbeat(self._session.repository, self._session.config.daemon.host, seen)
        self._lock_watch.look()
        self._look_for_rotation()

    @cached_property
    def _lock_watch(self) -> LockWatch:
        return LockWatch(self._session.locks, self._session.config.repository.lock, self._session.clock)

    def _look_for_rotation(self) -> None:
        """`warn_if_rotated`, at the first heartbeat and once an hour: a request more each time would cost."""
        now_s = self._session.clock.monotonic_s()
        if self._looked_at_keys_s is not None and now_s - self._looked_at_keys_s < _LOOK_AT_KEYS_S:
            return
        self._looked_at_keys_s = now_s
        warn_if_rotated(self._session)


def warn_if_rotated(session: Session) -> None:
    """Say in the log that the repository has a newer key than this host, if it does."""
    newest, held = session.host_keys.newest_generation(session.repository.record), session.repository.generation
    if newest > held:
        _LOGGER.warning(
            "the repository's key was rotated: it is of generation %d, %s has %d. New points still go under the "
            "old one. Put a new key file there (drsync key recover, or drsync key export where the root key is), "
            "then: systemctl reload drsync",
            newest,
            session.config.repository.key_file,
            held,
        )
