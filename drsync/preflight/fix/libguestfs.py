"""A guest through libguestfs: a small VM of its own has the disks, so nothing of the guest runs on this host.

The guest's tools run in that VM, in a chroot on the guest's file systems, without network.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from drsync.preflight.fix import Image, StepFailed

_MAX_TEXT: Final = 1024 * 1024
_SAID: Final = 400
Result = TypeVar("Result")


class Unavailable(Exception):
    """libguestfs is not installed, or can't start its VM; the text says why."""


def _binding() -> Any:
    try:
        import guestfs  # noqa: PLC0415 - a package of the distribution's, needed for this alone
    except ImportError as err:
        raise Unavailable(f"Python's binding of libguestfs can't be loaded: {err}") from err
    return guestfs


def check_installed() -> None:
    """Check that there is a libguestfs.

    Raises:
        Unavailable: there is none.
    """
    _binding()


class LibguestfsGuest:
    """A guest on image files (see fix.Guest). A context manager; left without an error, the images are whole."""

    def __init__(self, images: Sequence[Image]) -> None:
        self._images = images
        self._handle: Any = None
        self._devices: Mapping[str, str] = {}

    def __enter__(self) -> Self:
        self._handle = _binding().GuestFS(python_return_dict=True)
        try:
            for image in self._images:
                self._handle.add_drive_opts(str(image.path), format=image.format, readonly=0)
            self._handle.launch()
        except RuntimeError as err:
            self._handle.close()
            raise Unavailable(f"libguestfs can't start: {err}") from err
        try:
            self._mount()
        except BaseException:
            self._handle.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._call(lambda g: (g.umount_all(), g.shutdown()))
        finally:
            with suppress(RuntimeError):
                self._handle.close()

    def _call(self, operation: Callable[[Any], Result]) -> Result:
        try:
            return operation(self._handle)
        except RuntimeError as err:
            raise StepFailed(" ".join(str(err).split())[-_SAID:]) from err

    def _mount(self) -> None:
        """Mount what the guest mounts itself."""
        roots = self._call(lambda g: g.inspect_os())
        if len(roots) != 1:
            raise StepFailed("no operating system was found" if not roots else "there are several operating systems")
        if self._call(lambda g: g.inspect_get_type(roots[0])) != "linux":
            raise StepFailed("it is no Linux; for Windows use --via vm-import --convert-guest")
        mounts: Mapping[str, str] = self._call(lambda g: g.inspect_get_mountpoints(roots[0]))
        for target in sorted(mounts, key=len):
            try:
                self._call(lambda g, t=target: g.mount(mounts[t], t))  # type: ignore[misc]  # the default binds it
            except StepFailed:
                if target == "/":
                    raise
        self._devices = mounts

    def exists(self, path: str) -> bool:
        return bool(self._call(lambda g: g.is_file(path, followsymlinks=True) or g.is_dir(path, followsymlinks=True)))

    def read(self, path: str) -> str:
        if self._call(lambda g: g.filesize(path)) > _MAX_TEXT:
            raise StepFailed(f"{path} is too long for what it should be")
        raw = self._call(lambda g: g.read_file(path))
        return raw.decode("utf-8", "surrogateescape") if isinstance(raw, bytes) else str(raw)

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        parent = path.rpartition("/")[0] or "/"
        self._call(lambda g: g.mkdir_p(parent))
        if self._call(lambda g: g.is_file(path)) and not self._call(lambda g: g.exists(f"{path}.drsync")):
            self._call(lambda g: g.cp_a(path, f"{path}.drsync"))
        self._call(lambda g: g.write(path, text.encode("utf-8", "surrogateescape")))
        self._call(lambda g: g.chmod(mode, path))

    def put_aside(self, path: str) -> None:
        self._call(lambda g: g.mv(path, f"{path}.drsync"))

    def names(self, directory: str) -> Sequence[str]:
        if not self._call(lambda g: g.is_dir(directory, followsymlinks=True)):
            return []
        return sorted(self._call(lambda g: g.ls(directory)))

    def run(self, command: str) -> str:
        path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        return str(self._call(lambda g: g.sh(f"export {path} LC_ALL=C; {command}")))

    def uuid_of(self, device: str) -> str:
        here = self._here(device)
        if not here:
            return ""
        try:
            return str(self._call(lambda g: g.vfs_uuid(here)))
        except StepFailed:
            return ""

    def _here(self, device: str) -> str:
        """What a device of the guest's is called in libguestfs' VM: its disks are sda, sdb … as they were added."""
        found = re.fullmatch(r"/dev/(?:sd|vd|hd|xvd)([a-z])(\d*)", device)
        if found is None:
            return ""
        here = f"/dev/sd{found[1]}{found[2]}"
        known = self._call(lambda g: [*g.list_partitions(), *g.list_devices()])
        return here if here in known else ""
