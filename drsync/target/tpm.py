"""The state of an emulated TPM, put where libvirt's swtpm looks for it.

    /var/lib/libvirt/swtpm/<uuid of the domain>/tpm2/tpm2-00.permall

libvirt gives it to swtpm's user when the domain starts (qemu_tpm.c, qemuTPMEmulatorPrepareHost).
"""

import io
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Final

from drsync.errors import TargetUnusable, VolumeExists
from drsync.target.domain.definition import MAX_FILE_BYTES
from drsync.target.partial import translated

STATE_ROOT: Final = Path("/var/lib/libvirt/swtpm")
_FOLDERS: Final = frozenset({"tpm1.2", "tpm2"})
_MAX_MEMBERS: Final = 64


class TpmState:
    """The TPM state of one domain, old and new."""

    def __init__(self, uuid: str, *, vm: str, root: Path = STATE_ROOT) -> None:
        self.path = root / uuid
        self._aside = root / f"{uuid}.before-restore"
        self._vm = vm
        self._was_put = False

    def put(self, tar: bytes, *, version: str, replace: bool) -> None:
        """Write the state; with `replace`, what is there is set aside.

        Raises:
            VolumeExists: there is a state already.
            TargetUnusable: it can't be written, or the tar is not one of a TPM's state.
        """
        files = self._members(tar, version)
        with translated(self.path):
            if self.path.exists():
                if not replace:
                    raise VolumeExists(path=self.path, vm=self._vm)
                shutil.rmtree(self._aside, ignore_errors=True)
                self.path.rename(self._aside)
            self._was_put = True
            for name, content in files:
                path = self.path / name
                path.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
                path.touch(mode=0o600, exist_ok=False)
                path.write_bytes(content)

    def _members(self, tar: bytes, version: str) -> Sequence[tuple[PurePosixPath, bytes]]:
        files = []
        try:
            with tarfile.open(fileobj=io.BytesIO(tar), mode="r:") as archive:
                for member in archive:
                    if member.isdir() or member.name.endswith("/.lock"):
                        continue
                    files.append((self._name(member, version), _content(archive, member)))
                    if len(files) > _MAX_MEMBERS:
                        raise self._unusable("it has too many files")
        except tarfile.TarError as err:
            raise self._unusable(str(err)) from err
        return files

    def _name(self, member: tarfile.TarInfo, version: str) -> PurePosixPath:
        """Where a member goes: its folder is that of its TPM's version, whatever was packed around it."""
        parts = [part for part in PurePosixPath(member.name).parts if part not in (".", "/")]
        if not member.isreg() or ".." in parts or member.size > MAX_FILE_BYTES or not parts:
            raise self._unusable(f"{member.name!r} is no file of a TPM's state")
        folder = next((part for part in parts[:-1] if part in _FOLDERS), version)
        return PurePosixPath(folder, parts[-1])

    def _unusable(self, problem: str) -> TargetUnusable:
        return TargetUnusable(path=self.path, problem=f"the TPM's state in the point can't be used: {problem}")

    def put_back(self) -> None:
        """Undo `put`, as far as it came."""
        if not self._was_put:
            return
        with translated(self.path):
            shutil.rmtree(self.path, ignore_errors=True)
            if self._aside.exists():
                self._aside.rename(self.path)

    def forget_old(self) -> None:
        """The new domain runs: what was set aside is needed no more."""
        with translated(self._aside):
            shutil.rmtree(self._aside, ignore_errors=True)


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = archive.extractfile(member)
    return b"" if stream is None else stream.read(MAX_FILE_BYTES)
