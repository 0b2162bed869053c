"""From a request to a plan; collects what would refuse it instead of stopping at the first."""

import re
import uuid as uuids
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Final

from drsync.errors import CantComeUp, DomainExists, DrsyncError, ObjectDamaged, VolumeExists
from drsync.finding import Finding
from drsync.format.names import segment as segment_name
from drsync.recovery.origin import Origin, read_origin
from drsync.recovery.request import PlannedDisk, PlannedFile, RecoveryPlan, RecoveryRequest
from drsync.session import Session
from drsync.target.domain import tree
from drsync.target.domain.platform import choose_platform
from drsync.target.domain.rewrite import rewrite
from drsync.target.domain.values import Mark, NewDisk, Notes, Platform, Request, Rewritten, Target
from drsync.target.image import ImageFormat
from drsync.target.libvirt_host import Domain, LibvirtHost
from drsync.target.libvirt_storage import choose_pool, open_place, pools
from drsync.target.place import Directory, Place, Room

NVRAM_ROOT: Final = Path("/var/lib/libvirt/qemu/nvram")
"""Where NVRAM goes when the disks' pool has no files."""
LARGE_TEMPORARY: Final = Path("/var/tmp")  # noqa: S108  a file without a name is made in it
"""Where what is uploaded waits on a machine without a spool."""


class Planning:
    """One run of `Recovery.plan`: collects what would refuse it instead of stopping there."""

    def __init__(self, session: Session, host: LibvirtHost, request: RecoveryRequest) -> None:
        """Find the point.

        Raises:
            UnknownVm, UnknownPoint, PointLost, IntegrityError, StoreError: there is no such point.
        """
        self._session = session
        self._host = host
        self._request = request
        self._point, self._image = Finding(session).find_point(request.vm, number=request.number, at=request.at)
        self._errors: list[DrsyncError] = []
        self._origin = self._read_origin()
        self._name = request.name or self._origin.name
        self._stem = _safe(self._name)
        self._is_copy = self._name != self._origin.name
        self._uuid = str(uuids.uuid4()) if self._is_copy or not self._origin.uuid else self._origin.uuid.lower()

    def plan(self) -> RecoveryPlan:
        replaced = self._existing()
        place = self._place(replaced)
        disks = self._disks(place, replaced)
        nvram = self._nvram(place, replaced)
        tpm = self._origin.files.get("tpm")
        if tpm is not None and not self._host.is_local:
            self._cant("the TPM's state can't be put on another machine; run drsync on that host")
        rewritten = self._rewrite(disks, nvram, replaced, place)
        return RecoveryPlan(
            request=self._request,
            point=self._point,
            image=self._image,
            domain=self._name,
            uuid=self._uuid,
            place=place,
            disks=disks,
            nvram=nvram,
            tpm=tpm,
            tpm_version="tpm1.2" if "version='1.2'" in self._origin.xml.replace('"', "'") else "tpm2",
            autostart=self._origin.autostart and not self._is_copy,
            rewritten=rewritten,
            replaced=replaced,
            errors=tuple(self._errors),
        )

    def _cant(self, problem: str) -> None:
        self._errors.append(CantComeUp(vm=self._request.vm, uri=self._host.uri, problem=problem))

    def _read_origin(self) -> Origin:
        names = [disk.name for disk in self._point.disks]
        try:
            return read_origin(self._image.point.definition, self._request.vm, names, self._request.networks)
        except tree.NotReadable as err:  # it is authenticated, and yet not what drsync writes
            key = segment_name(self._request.vm, self._point.number)
            raise ObjectDamaged(key=key, problem=f"its definition {err}") from err

    def _existing(self) -> Domain | None:
        """The domain that is replaced, if it is asked for; one that is in the way is an error."""
        by_uuid, by_name = self._host.find(uuid=self._uuid), self._host.find(name=self._name)
        found = by_uuid or by_name
        if found is None:
            return None
        virsh = f"virsh -c '{self._host.uri}'"
        restore = f"drsync restore {self._request.vm} --to libvirt --uri '{self._host.uri}'"
        if found.active:
            self._in_the_way(f"domain {found.name} ({found.uuid}) is running", f"{virsh} shutdown {found.name}")
        elif not self._request.replace:
            command = f"{restore} --name OTHER-NAME   (or --replace, to put it in place of the old one)"
            self._in_the_way(f"domain {found.name} ({found.uuid}) is defined there", command)
        elif found.has_saved_state:
            problem = f"domain {found.name} would start with the memory of its last run"
            self._in_the_way(problem, f"{virsh} managedsave-remove {found.name}")
        elif self._origin.uuid and not self._is_copy and (found.name, found.uuid) != (self._name, self._uuid):
            problem = f"domain {found.name} ({found.uuid}) there is another one"
            self._in_the_way(problem, f"{restore} --name OTHER-NAME")
        else:
            self._uuid = found.uuid
        return found

    def _in_the_way(self, problem: str, command: str) -> None:
        self._errors.append(DomainExists(vm=self._request.vm, uri=self._host.uri, problem=problem, command=command))

    def _place(self, replaced: Domain | None) -> Place | None:
        """Where the disks go."""
        vm, directory = self._request.vm, self._request.disk_dir
        if directory is None and self._request.pool is None and replaced is not None and self._host.is_local:
            old = next((Path(path) for path in replaced.disks.values()), None)
            directory = old.parent if old is not None and old.is_file() else None
        if directory is not None:
            if not self._host.is_local:
                self._cant(f"{directory} is a directory of this machine; choose a pool of that host with --pool")
                return None
            return Directory(directory, vm=vm)
        try:
            known = pools(self._host)
            pool = choose_pool(known, self._request.pool, self._origin.pools, self._host.uri)
            spool = self._session.spool.path
            return open_place(self._host, pool, vm=vm, scratch=spool if spool.is_dir() else LARGE_TEMPORARY)
        except DrsyncError as err:
            self._errors.append(err)
            return None

    def _disks(self, place: Place | None, replaced: Domain | None) -> Sequence[PlannedDisk]:
        planned = []
        for disk in self._point.disks:
            target = self._origin.targets.get(disk.name, disk.name)
            image_format = self._format(disk.name, place)
            ending = "" if place is not None and place.block_devices else f".{image_format}"
            file = self._free_name(f"{self._stem}-{_safe(target)}", ending, place, replaced)
            planned.append(
                PlannedDisk(
                    name=disk.name,
                    target=target,
                    file=file,
                    path=place.path_of(file) if place is not None else file,
                    image_format=image_format,
                    size_bytes=disk.size_bytes,
                    live_bytes=self._image.live_bytes(disk.name),
                )
            )
        if place is not None:
            self._try(
                lambda: place.check_room([Room(size_bytes=d.size_bytes, live_bytes=d.live_bytes) for d in planned])
            )
        return planned

    def _format(self, disk: str, place: Place | None) -> ImageFormat:
        if place is not None and place.block_devices:
            return ImageFormat.RAW
        if self._request.image_format is not None:
            return self._request.image_format
        return ImageFormat.RAW if self._origin.formats.get(disk) == "raw" else ImageFormat.QCOW2

    def _nvram(self, place: Place | None, replaced: Domain | None) -> PlannedFile | None:
        content = self._origin.files.get("nvram")
        if content is None or place is None:
            return None
        if place.block_devices:
            place = Directory(NVRAM_ROOT, vm=self._request.vm)
        name = self._free_name(f"{self._stem}-nvram", ".fd", place, replaced)
        return PlannedFile(place=place, name=name, content=content)

    def _free_name(self, stem: str, ending: str, place: Place | None, replaced: Domain | None) -> str:
        """The name of a file or volume: one that is free where the old one stays beside it, else the usual one."""
        usual = stem + ending
        if place is None or not place.is_taken(usual):
            return usual
        if replaced is not None and self._request.replace:
            names = (f"{stem}-{number}{ending}" for number in count(2))
            return next(name for name in names if not place.is_taken(name))
        self._errors.append(VolumeExists(path=place.path_of(usual), vm=self._request.vm))
        return usual

    def _rewrite(
        self,
        disks: Sequence[PlannedDisk],
        nvram: PlannedFile | None,
        replaced: Domain | None,
        place: Place | None,
    ) -> Rewritten:
        notes = Notes()
        notes.all.extend(self._origin.notes)
        domain = tree.parse(self._origin.xml, "domain")
        platform = choose_platform(domain, self._host.capabilities, notes, machine=self._origin.host.machine)
        if platform is None:
            rewritten = Rewritten(xml="", notes=tuple(notes.all))
        else:
            request = self._domain_request(disks, nvram, replaced, place)
            rewritten = rewrite(self._origin.xml, request, self._target(platform), self._origin.host, notes.all)
        for note in rewritten.problems:
            self._cant(f"{note.subject}: {note.text}")
        return rewritten

    def _target(self, platform: Platform) -> Target:
        return Target(
            host=self._host.capabilities,
            offer=self._host.offer(platform),
            platform=platform,
            around=self._host.surroundings(),
            judge=self._host.judge(platform),
        )

    def _domain_request(
        self,
        disks: Sequence[PlannedDisk],
        nvram: PlannedFile | None,
        replaced: Domain | None,
        place: Place | None,
    ) -> Request:
        blocks = place is not None and place.block_devices
        keep_mac = self._request.keep_mac
        return Request(
            name=self._name,
            uuid=self._uuid,
            disks={d.target: NewDisk(path=d.path, format=d.image_format, is_block_device=blocks) for d in disks},
            mark=Mark(
                repository=self._session.repository.id.hex(),
                vm=self._request.vm,
                point=self._point.number,
                capture=self._point.capture,
            ),
            networks=self._request.networks,
            keep_mac=not self._is_copy if keep_mac is None else keep_mac,
            nvram_path=None if nvram is None else nvram.path,
            has_tpm_state="tpm" in self._origin.files,
            in_place=replaced is not None and self._request.replace,
            genid=str(uuids.uuid4()),
        )

    def _try(self, check: Callable[[], None]) -> None:
        try:
            check()
        except DrsyncError as err:
            self._errors.append(err)


def _safe(name: str) -> str:
    """A name as a part of a file's or volume's name."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", name).lstrip("-.") or "domain"


class PlannedRoom:
    """Adds up what the VMs of a plan take: each of them may fit alone, and not all together."""

    def __init__(self) -> None:
        self._disks: dict[str, list[Room]] = {}

    def add(self, plan: RecoveryPlan) -> Sequence[DrsyncError]:
        """Take a plan in; what refuses it beside those that came before."""
        if plan.place is None:
            return []
        rooms = self._disks.setdefault(plan.place.description, [])
        is_first = not rooms
        rooms += [Room(size_bytes=disk.size_bytes, live_bytes=disk.live_bytes) for disk in plan.disks]
        if is_first:  # was checked with the plan itself
            return []
        try:
            plan.place.check_room(rooms)
        except DrsyncError as err:
            return [] if plan.errors else [err]
        return []
