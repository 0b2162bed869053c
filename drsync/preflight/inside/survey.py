"""Looks through a VM's disks, and tells what it finds as it finds it.

    disks ─▶ tables, boot code ─▶ volumes ─▶ LVM ─▶ file systems ─▶ systems: Linux, Windows, loose kernels

After each stage the facts so far are handed out: whatever ends this process, they are not lost.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import BinaryIO, Final, Protocol

import msgspec

from drsync.preflight.facts import MAX_ITEMS, Disk, Facts, Kernel, Linux, Loose, Mount, Table, Volume, Windows, plain
from drsync.preflight.inside.boot_code import read_boot_code
from drsync.preflight.inside.files import FileSystem, Node, Path, Tree, Unreadable
from drsync.preflight.inside.linux import is_linux, read_command_lines, read_fstab, read_kernels, read_linux
from drsync.preflight.inside.partitions import ESP_TYPE, MBR_ESP_TYPE, read_layout
from drsync.preflight.inside.signatures import identify
from drsync.preflight.inside.source import Part, Source
from drsync.preflight.inside.windows import is_windows, pe_machine, read_windows
from drsync.preflight.naming import names_volume

_MOUNTED: Final = ("/boot", "/boot/efi", "/efi", "/usr", "/etc", "/var")
"""What is mounted, if fstab says so: nothing else is looked into."""
_SUBVOLUMES: Final = ("@", "root", "@rootfs", "@/.snapshots/1/snapshot")
"""Where distributions have a system on btrfs, if not in its default subvolume."""
_FALLBACKS: Final = ("BOOTX64.EFI", "BOOTAA64.EFI")
_SHIM_BYTES: Final = 2 * 1024 * 1024


class Opener(Protocol):
    """What reads file systems."""

    name: str
    readable: frozenset[str]

    def open_files(self, kind: str, source: Source, name: str) -> FileSystem:
        """The files of a file system on the volume `name`. Raises Unreadable."""
        ...

    def logical_volumes(self, members: Sequence[Source]) -> Sequence[tuple[str, Source | None, str]]:
        """The logical volumes on LVM's physical volumes: name, source or None, why none. Raises Unreadable."""
        ...


@dataclass(slots=True)
class _Held:
    """A volume while it is looked at."""

    fact: Volume
    source: Source
    files: FileSystem | None = None


@dataclass(slots=True)
class _Found:
    """What there is so far."""

    reader: str
    disks: list[Disk] = field(default_factory=list)
    volumes: list[_Held] = field(default_factory=list)
    linux: list[Linux] = field(default_factory=list)
    windows: list[Windows] = field(default_factory=list)
    loose: list[Loose] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def facts(self, *, complete: bool) -> Facts:
        return Facts(
            reader=self.reader,
            disks=tuple(self.disks[:MAX_ITEMS]),
            volumes=tuple(held.fact for held in self.volumes[:MAX_ITEMS]),
            linux=tuple(self.linux[:16]),
            windows=tuple(self.windows[:16]),
            loose=tuple(self.loose[:16]),
            problems=tuple(dict.fromkeys(self.problems))[:MAX_ITEMS],
            complete=complete,
        )


def survey(disks: Mapping[str, Source], opener: Opener | None, tell: Callable[[Facts], None]) -> None:
    """Look through `disks`, and `tell` what there is after each stage; the last time, it is complete."""
    found = _Found(reader=opener.name if opener is not None else "")
    for name, source in disks.items():
        _divide(found, name, source)
    tell(found.facts(complete=False))
    if opener is not None:
        _find_logical(found, opener)
        for held in found.volumes:
            _open(found, held, opener)
        tell(found.facts(complete=False))
        _find_systems(found, lambda: tell(found.facts(complete=False)))
    tell(found.facts(complete=True))


def _divide(found: _Found, name: str, source: Source) -> None:
    """A disk's table and boot code, and its volumes."""
    layout = read_layout(source)
    whole = identify(source)
    if layout.table is Table.NONE and not whole.kind:
        layout = replace(layout, table=Table.EMPTY)
    boot = read_boot_code(source, layout)
    found.disks.append(
        Disk(
            name=plain(name),
            size_bytes=source.size_bytes,
            table=layout.table,
            boot_code=boot.code,
            core=boot.core,
            core_place=plain(boot.place),
            partitions=layout.partitions,
            problem=plain(layout.problem),
        )
    )
    if layout.table is Table.NONE:
        _add(found, name, name, source)
    for partition in layout.partitions:
        if len(found.volumes) < MAX_ITEMS:
            part = Part(source, partition.start_bytes, partition.size_bytes)
            _add(
                found,
                f"{name}{'p' if name[-1:].isdigit() else ''}{partition.number}",
                name,
                part,
                partuuid=partition.uuid,
                partlabel=partition.label,
                esp=partition.type in {ESP_TYPE, MBR_ESP_TYPE},
            )


def _add(found: _Found, name: str, disk: str, source: Source, **more: str | bool) -> None:
    signature = identify(source)
    fact = Volume(
        name=plain(name),
        disk=plain(disk),
        size_bytes=source.size_bytes,
        kind=signature.kind,
        uuid=signature.uuid,
        label=signature.label,
        problem=signature.note,
        **more,  # type: ignore[arg-type]  # the two callers name fields of Volume
    )
    found.volumes.append(_Held(fact, source))


def _find_logical(found: _Found, opener: Opener) -> None:
    members = [held.source for held in found.volumes if held.fact.kind == "LVM2_member"]
    if not members:
        return
    try:
        volumes = opener.logical_volumes(members)
    except Unreadable as err:
        found.problems.append(plain(f"LVM: {err}"))
        return
    for name, source, problem in volumes[:MAX_ITEMS]:
        if source is None:
            found.problems.append(plain(f"logical volume {name}: {problem}"))
            continue
        try:
            _add(found, name, "", source)
        except Exception as err:  # noqa: BLE001 - a library's stream raises what it stumbles with
            found.problems.append(plain(f"logical volume {name}: {err or type(err).__name__}"))


def _open(found: _Found, held: _Held, opener: Opener) -> None:
    if held.fact.kind not in opener.readable:
        return
    try:
        held.files = opener.open_files(held.fact.kind, held.source, held.fact.name)
        held.fact = msgspec.structs.replace(held.fact, read=True)
        if held.fact.kind == "vfat":
            held.fact = _with_loaders(Tree(held.files), held.fact)
    except Unreadable as err:
        held.fact = msgspec.structs.replace(held.fact, read=False, problem=plain(err))
        found.problems.append(plain(f"{held.fact.name}: {err}"))


def _with_loaders(tree: Tree, fact: Volume) -> Volume:
    """What a UEFI finds on a FAT volume; a firmware takes any FAT with \\EFI\\BOOT, whatever its partition's type."""
    files = tuple(plain(p.upper()) for p in tree.walk("/EFI", "", depth=3, limit=128) if p.upper().endswith(".EFI"))
    fallback = next((f"/EFI/BOOT/{n}" for n in _FALLBACKS if tree.is_file(f"/EFI/BOOT/{n}")), "")
    head = tree.read(fallback, _SHIM_BYTES) or b"" if fallback else b""
    return msgspec.structs.replace(
        fact,
        efi_files=files,
        fallback_machine=pe_machine(head[:4096]) or ("no executable" if fallback else ""),
        fallback_is_shim=b"shim" in head and b"UEFI SHIM" in head,
    )


class _Below:
    """The part of a file system below one of its directories."""

    def __init__(self, files: FileSystem, at: Path) -> None:
        self._files = files
        self._at = at

    def look(self, path: Path) -> Node | None:
        return self._files.look(self._at + path)

    def names(self, path: Path) -> Sequence[str]:
        return self._files.names(self._at + path)

    def link(self, path: Path) -> str:
        return self._files.link(self._at + path)

    def open(self, path: Path) -> BinaryIO:
        return self._files.open(self._at + path)


def _find_systems(found: _Found, tell: Callable[[], None]) -> None:
    used: set[str] = set()
    for held in found.volumes:
        if held.files is not None:
            try:
                _look_for_system(found, held, used)
            except Unreadable as err:
                found.problems.append(plain(f"{held.fact.name}: {err}"))
            tell()
    for held in found.volumes:
        if held.files is not None and held.fact.name not in used:
            try:
                _look_for_kernels(found, held)
            except Unreadable as err:
                found.problems.append(plain(f"{held.fact.name}: {err}"))


def _look_for_system(found: _Found, held: _Held, used: set[str]) -> None:
    files = held.files
    if files is None:
        return
    if held.fact.kind == "ntfs":
        if is_windows(Tree(files)):
            found.windows.append(read_windows(Tree(files), held.fact.name, _bcd(found), found.problems))
        return
    root = _root_of(files, held.fact.kind)
    if root is None:
        return
    tree = Tree(root)
    used.add(held.fact.name)
    mounts = read_fstab(tree.text("/etc/fstab") or "")
    for mount in sorted(mounts, key=lambda m: m.target):
        other = _volume_of(found, mount) if mount.target in _MOUNTED else None
        if other is not None and other.files is not None:
            used.add(other.fact.name)
            tree.mount(mount.target, _subvolume(other.files, mount))
    found.linux.append(read_linux(tree, held.fact.name, found.problems))


def _root_of(files: FileSystem, kind: str) -> FileSystem | None:
    if is_linux(Tree(files)):
        return files
    for name in _SUBVOLUMES if kind == "btrfs" else ():
        below = _Below(files, tuple(name.split("/")))
        if is_linux(Tree(below)):
            return below
    return None


def _subvolume(files: FileSystem, mount: Mount) -> FileSystem:
    name = next((o.removeprefix("subvol=").strip("/") for o in mount.options if o.startswith("subvol=")), "")
    return _Below(files, tuple(name.split("/"))) if name else files


def _volume_of(found: _Found, mount: Mount) -> _Held | None:
    return next((held for held in found.volumes if names_volume(mount.source, held.fact)), None)


def _look_for_kernels(found: _Found, held: _Held) -> None:
    """Kernels on a volume without a system."""
    if held.files is None:
        return
    tree = Tree(held.files)
    kernels: tuple[Kernel, ...] = read_kernels(tree, "", found.problems) or read_kernels(tree, "/boot", found.problems)
    if kernels:
        lines = read_command_lines(tree, lambda path: _text(tree, path))
        found.loose.append(Loose(volume=held.fact.name, kernels=kernels, command_lines=lines))


def _text(tree: Tree, path: str) -> str:
    try:
        return tree.text(path) or ""
    except Unreadable:
        return ""


def _bcd(found: _Found) -> tuple[str, ...]:
    """Where boot configurations of Windows are."""
    places: list[str] = []
    for held in found.volumes:
        for path in ("/Boot/BCD", "/EFI/Microsoft/Boot/BCD") if held.files is not None else ():
            try:
                if held.files is not None and Tree(held.files).is_file(path):
                    places.append(f"{held.fact.name}:{path}")
            except Unreadable:
                continue
    return tuple(plain(p) for p in places)[:16]
