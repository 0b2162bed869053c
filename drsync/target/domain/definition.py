"""What a point knows of its VM, read as values: a libvirt domain with all that belongs to it.

Written by drsync/source; sealed with the point, yet every size is checked.
"""

import base64
import binascii
import hashlib
from collections.abc import Mapping
from typing import Final

import msgspec
import zstandard

from drsync.target.domain import tree
from drsync.units import MiB

MAX_FILE_BYTES: Final = 64 * MiB
"""NVRAM has at most 4 MiB, a TPM's state some 100 KiB."""


class Domain(msgspec.Struct, frozen=True, kw_only=True):
    """The domain."""

    name: str
    uuid: str
    xml: str | None = None
    """Inactive: what a start would use."""
    live_xml: str | None = None
    autostart: bool = False


class Host(msgspec.Struct, frozen=True, kw_only=True):
    """The host that it was captured on."""

    machine: str | None = None
    """Canonical machine type."""
    cpu: str | None = None


class Disk(msgspec.Struct, frozen=True, kw_only=True):
    """A captured disk."""

    target: str = ""
    format: str | None = None


class File(msgspec.Struct, frozen=True, kw_only=True):
    """A small file without which the domain does not start, or has lost its keys."""

    role: str
    encoding: str
    size_bytes: int
    sha256: str
    data: str

    def content(self) -> bytes:
        """Its bytes.

        Raises:
            NotReadable: they are not what the point says they are.
        """
        if self.encoding != "zstd+base64" or not 0 <= self.size_bytes <= MAX_FILE_BYTES:
            raise tree.NotReadable(f"holds a file ({self.role}) in a way that this drsync does not know")
        try:
            packed = base64.b64decode(self.data, validate=True)
            with zstandard.ZstdDecompressor().stream_reader(packed) as reader:
                content = reader.read(self.size_bytes + 1)
        except (binascii.Error, zstandard.ZstdError) as err:
            raise tree.NotReadable(f"holds a damaged file ({self.role}): {err}") from err
        if len(content) != self.size_bytes or hashlib.sha256(content).hexdigest() != self.sha256.lower():
            raise tree.NotReadable(f"holds a damaged file ({self.role})")
        return content


class LibvirtDefinition(msgspec.Struct, frozen=True, kw_only=True):
    """What a point of a libvirt domain holds beside its disks, as far as it is used here."""

    domain: Domain
    host: Host = Host()
    disks: dict[str, Disk] = {}
    pools: dict[str, object] = {}
    files: list[File] = []

    def file(self, role: str) -> bytes | None:
        """The content of the file with that role, if there is one."""
        return next((file.content() for file in self.files if file.role == role), None)


def is_libvirt(definition: Mapping[str, object]) -> bool:
    """Whether the point is of a libvirt domain."""
    return definition.get("source") == "libvirt"


def read_definition(definition: Mapping[str, object]) -> LibvirtDefinition:
    """The definition of a point of a libvirt domain.

    Raises:
        NotReadable: it is none.
    """
    try:
        return msgspec.convert(definition, LibvirtDefinition)
    except msgspec.ValidationError as err:
        raise tree.NotReadable(f"is not a libvirt domain's: {err}") from err
