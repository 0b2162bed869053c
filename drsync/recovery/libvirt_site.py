"""A libvirt host as the site of a plan.

What an earlier run brought back is recognised by the mark in its domain, started if it is off, waited for, and never
restored a second time.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from drsync.catalog import Point
from drsync.config.plan_sites import LibvirtSite as LibvirtSiteSettings
from drsync.errors import HostRefused, HostUnreachable, NotStarted
from drsync.finding import Finding
from drsync.model import Progress
from drsync.recovery.planning import PlannedRoom
from drsync.recovery.recover import Recovery
from drsync.recovery.request import RecoveryPlan, RecoveryRequest
from drsync.recovery.site import Arrival, Task
from drsync.recovery.waiting import wait_until_up
from drsync.session import Session
from drsync.target.libvirt_host import Domain, LibvirtHost


class LibvirtSite:
    """A host on which the VMs of a plan come back (site.Site)."""

    def __init__(
        self,
        settings: LibvirtSiteSettings,
        session: Session,
        *,
        sleep: Callable[[float], None] = time.sleep,
        open_host: Callable[[str], LibvirtHost] = LibvirtHost,
    ) -> None:
        self._settings = settings
        self._session = session
        self._sleep = sleep
        self._open_host = open_host
        self._opened: LibvirtHost | None = None
        self._rooms = PlannedRoom()

    @property
    def address(self) -> str:
        return self._settings.uri

    @contextmanager
    def opened(self) -> Iterator[None]:
        with self._open_host(self._settings.uri) as host:
            self._opened = host
            try:
                yield
            finally:
                self._opened = None

    @property
    def _host(self) -> LibvirtHost:
        if self._opened is None:
            raise HostUnreachable(uri=self._settings.uri, problem="it is not connected")
        return self._opened

    def check(self, task: Task) -> Arrival:
        request = self._request(task)
        found = self._came_before(request)
        if found is not None:
            return Arrival(name=found.name, was_there=True)
        plan = Recovery(self._session, self._host).plan(request)
        return replace(_arrival(plan), errors=(*plan.errors, *self._rooms.add(plan)))

    def bring_up(self, task: Task, progress: Progress, say: Callable[[str], None]) -> Arrival:
        request, host = self._request(task), self._host
        found = self._came_before(request)
        if found is None:
            recovery = Recovery(self._session, host)
            plan = recovery.plan(request)
            say(f"{task.vm}: restoring point {plan.point.number} of {plan.point.time:%Y-%m-%d %H:%M:%S}Z")
            recovery.run(plan, progress)
            uuid, arrival = plan.uuid, _arrival(plan)
        else:
            if not found.active:
                say(f"{task.vm}: was restored before; starting it")
                _start(host, found)
            number = found.mark.point if found.mark is not None else None
            uuid, arrival = found.uuid, Arrival(name=found.name, number=number, was_there=True)
        wait_until_up(
            host,
            uuid,
            arrival.name,
            task.wait,
            timeout_s=task.timeout_s,
            clock=self._session.clock,
            sleep=self._sleep,
        )
        return arrival

    def _came_before(self, request: RecoveryRequest) -> Domain | None:
        """The domain that an earlier run made of this VM: running, or at the point that is wanted now."""
        repository = self._session.repository.id.hex()
        for domain in self._host.domains():
            mark = domain.mark
            if mark is None or (mark.repository, mark.vm) != (repository, request.vm):
                continue
            if request.name is not None and domain.name != request.name:
                continue
            if domain.active or self._wanted(request).number == mark.point:
                return domain
        return None

    def _wanted(self, request: RecoveryRequest) -> Point:
        point, _ = Finding(self._session).find_point(request.vm, number=request.number, at=request.at)
        return point

    def _request(self, task: Task) -> RecoveryRequest:
        site, own = self._settings, task.own
        request = RecoveryRequest(
            vm=task.vm,
            uri=site.uri,
            pool=site.pool,
            disk_dir=site.disk_dir,
            networks=site.networks,
            keep_mac=site.keep_mac,
            start=True,
        )
        if own is None:
            return request
        return replace(
            request,
            number=own.point,
            at=own.at,
            name=own.name,
            pool=own.pool or site.pool,
            disk_dir=None if own.pool else site.disk_dir,
            networks={**site.networks, **own.networks},
        )


def _arrival(plan: RecoveryPlan) -> Arrival:
    return Arrival(
        name=plan.domain,
        point=plan.point,
        number=plan.point.number,
        live_bytes=sum(disk.live_bytes for disk in plan.disks),
        notes=tuple(f"{note.subject}: {note.text}" for note in plan.notes if note.effect != "problem"),
    )


def _start(host: LibvirtHost, found: Domain) -> None:
    try:
        host.start(found.uuid)
    except HostRefused as err:
        raise NotStarted(domain=found.name, uri=host.uri, problem=err.fields["problem"]) from err
