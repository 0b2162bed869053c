"""What was found on a VM's disks: plain values that come out of the fence.

They are a guest's word and no more: bounded in number and length (MAX_TEXT, MAX_ITEMS), free of control
characters, checked for their types, and never used as a path or a command here. What is not known is None or "unknown".
"""

from enum import StrEnum
from typing import Annotated, Final

import msgspec

MAX_TEXT: Final = 512
MAX_ITEMS: Final = 512
JOURNAL_WAITS: Final = "its journal has not been played back"
"""The problem of a volume that was in use when the point was taken; dissect reads it as it lies there."""
MAX_FACTS_BYTES: Final = 4 * 1024 * 1024
"""Of the whole document: disks, volumes and lines of many files fit many times."""

Text = Annotated[str, msgspec.Meta(max_length=MAX_TEXT)]
_BOUND = msgspec.Meta(max_length=MAX_ITEMS)


def plain(text: object, limit: int = MAX_TEXT) -> str:
    """`text` as facts may carry it: cut, and without what would move a terminal's cursor."""
    shown = "".join(c if c.isprintable() else "?" for c in str(text)[:limit])
    return shown.encode("utf-8", "replace").decode()


class _Fact(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A group of values."""


class Table(StrEnum):
    """How a disk is divided."""

    GPT = "gpt"
    MBR = "mbr"
    NONE = "none"
    """A file system, or an LVM volume, on the whole disk."""
    EMPTY = "empty"
    """Nothing is there that is known."""


class BootCode(StrEnum):
    """What a BIOS finds in a disk's first sector."""

    GRUB = "grub"
    SYSLINUX = "syslinux"
    WINDOWS = "windows"
    OTHER = "other"
    NONE = "none"


class Driver(StrEnum):
    """Where a kernel has a driver."""

    BUILT_IN = "built-in"
    INITRAMFS = "initramfs"
    MODULE = "module"
    """On the root file system only: found there after the root is mounted."""
    MISSING = "missing"
    UNKNOWN = "unknown"


class Partition(_Fact, frozen=True):
    """A part of a disk."""

    number: int
    start_bytes: int
    size_bytes: int
    type: Text
    """GPT: the type's GUID; MBR: its number in hex, as 0x83."""
    active: bool = False
    """MBR: marked as the one to boot."""
    uuid: Text = ""
    label: Text = ""


class Disk(_Fact, frozen=True):
    """A disk of the point."""

    name: Text
    size_bytes: int
    table: Table
    boot_code: BootCode
    core: bool | None = None
    """Whether what the first sector loads next is there (GRUB's core image, the active partition's boot sector)."""
    core_place: Text = ""
    partitions: Annotated[tuple[Partition, ...], _BOUND] = ()
    problem: Text = ""
    """What is wrong with the table; empty if nothing is."""


class Volume(_Fact, frozen=True):
    """Something that holds data: a partition, a whole disk, a logical volume."""

    name: Text
    """As `vda1`, `vda`, `vg0/root`."""
    disk: Text
    """The disk it lies on; empty for a logical volume."""
    size_bytes: int
    kind: Text
    """As blkid says it: ext4, xfs, vfat, ntfs, swap, crypto_LUKS, LVM2_member …; empty: nothing known."""
    uuid: Text = ""
    label: Text = ""
    partuuid: Text = ""
    partlabel: Text = ""
    esp: bool = False
    efi_files: Annotated[tuple[Text, ...], _BOUND] = ()
    """Of an EFI system partition: the .EFI files below \\EFI, upper case."""
    fallback_machine: Text = ""
    """What \\EFI\\BOOT\\BOOTX64.EFI or BOOTAA64.EFI was made for: x86_64, aarch64; empty: there is none."""
    fallback_is_shim: bool = False
    read: bool | None = None
    """Whether its files could be read; None: it has none, or nothing here can read this kind."""
    problem: Text = ""


class Kernel(_Fact, frozen=True):
    """A kernel that could be booted."""

    version: Text
    image: Text
    initramfs: Text = ""
    """Path; empty: there is none for this kernel."""
    nvme: Driver = Driver.UNKNOWN
    ena: Driver = Driver.UNKNOWN
    problem: Text = ""
    """Why the initramfs could not be read."""


class Mount(_Fact, frozen=True):
    """A line of /etc/fstab."""

    source: Text
    target: Text
    kind: Text
    options: Annotated[tuple[Text, ...], _BOUND] = ()


class Crypt(_Fact, frozen=True):
    """A line of /etc/crypttab."""

    name: Text
    source: Text
    key: Text = ""
    options: Annotated[tuple[Text, ...], _BOUND] = ()


class Interface(_Fact, frozen=True):
    """A network configuration of the guest."""

    file: Text
    name: Text = ""
    """The interface's name, or a pattern; empty: any."""
    mac: Text = ""
    """The address it must have; empty: any."""
    dhcp: bool | None = None
    """None: it is not told."""
    addresses: Annotated[tuple[Text, ...], _BOUND] = ()
    by_cloud_init: bool = False
    """cloud-init wrote the file, and writes it anew on another machine."""


class Linux(_Fact, frozen=True):
    """A Linux system."""

    root: Text
    """The volume with its root file system."""
    id: Text = ""
    version: Text = ""
    """Of the distribution, as exactly as it tells: 12.7, 24.04."""
    name: Text = ""
    machine: Text = ""
    """x86_64, aarch64, i386 …, from an executable's header."""
    kernels: Annotated[tuple[Kernel, ...], _BOUND] = ()
    """Newest first."""
    fstab: Annotated[tuple[Mount, ...], _BOUND] | None = None
    """None: there is none."""
    crypttab: Annotated[tuple[Crypt, ...], _BOUND] = ()
    command_lines: Annotated[tuple[Text, ...], _BOUND] = ()
    """Of the boot loader's entries."""
    interfaces: Annotated[tuple[Interface, ...], _BOUND] = ()
    network_by: Annotated[tuple[Text, ...], _BOUND] = ()
    """What configures the network: netplan, ifupdown, NetworkManager, systemd-networkd, sysconfig."""
    fixed_names: Annotated[tuple[Text, ...], _BOUND] = ()
    """Names that udev gives by MAC address."""
    cloud_init: bool = False
    cloud_init_network: bool = True
    """Whether cloud-init may write the network's configuration."""
    datasources: Annotated[tuple[Text, ...], _BOUND] = ()
    """cloud-init's, if they are restricted."""
    sshd: bool = False
    sshd_enabled: bool = False
    serial_getty: bool = False
    systemd: bool = False


class Windows(_Fact, frozen=True):
    """A Windows system."""

    root: Text
    build: int | None = None
    machine: Text = ""
    drivers: Annotated[tuple[Text, ...], _BOUND] = ()
    """Of those that matter here, which are in System32\\drivers; lower case."""
    bcd: Annotated[tuple[Text, ...], _BOUND] = ()
    """Where a boot configuration is: `vda1:/Boot/BCD`."""
    hibernated: bool = False


class Loose(_Fact, frozen=True):
    """Kernels on a volume without a system: a guest that lives in its initramfs, or a /boot of its own."""

    volume: Text
    kernels: Annotated[tuple[Kernel, ...], _BOUND] = ()
    command_lines: Annotated[tuple[Text, ...], _BOUND] = ()


class Facts(_Fact, frozen=True):
    """All that was found."""

    reader: Text = ""
    """What read the file systems: `dissect`, `libguestfs`; empty: nothing could."""
    disks: Annotated[tuple[Disk, ...], _BOUND] = ()
    volumes: Annotated[tuple[Volume, ...], _BOUND] = ()
    linux: Annotated[tuple[Linux, ...], _BOUND] = ()
    windows: Annotated[tuple[Windows, ...], _BOUND] = ()
    loose: Annotated[tuple[Loose, ...], _BOUND] = ()
    problems: Annotated[tuple[Text, ...], _BOUND] = ()
    """What could not be found out."""
    complete: bool = False
    """Whether the search came to its end."""


def decode_facts(raw: bytes) -> Facts:
    """The facts in a document from inside the fence.

    Raises:
        ValueError: it is no such document, or larger than one may be.
    """
    if len(raw) > MAX_FACTS_BYTES:
        raise ValueError(f"{len(raw)} bytes of facts")
    return msgspec.json.decode(raw, type=Facts)  # msgspec.ValidationError and DecodeError are ValueErrors
