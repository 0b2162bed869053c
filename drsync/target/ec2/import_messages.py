"""What VM Import says when it gives up, and what to do about it.

Known are these texts from the VM Import guide ("Troubleshooting VM Import/Export") and from tasks that others have
shown (osbuild-composer#706, aws/aws-sdk#808, windows10-ec2#3, gentoo-ami-builder). A text may have more around
it, so parts of it are looked for, in any case; the first that is found counts. One that nobody knows is passed on.
"""

from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from drsync.boto import one_line
from drsync.errors import CloudError, GuestNotImportable, ImageUnfit, ImportFailed, ImportNotSetUp

MAX_MESSAGE: Final = 400


class Cause(Enum):
    """Where the mistake is."""

    GUEST = auto()
    SETUP = auto()
    IMAGE = auto()
    OTHER = auto()


@dataclass(frozen=True, slots=True)
class Known:
    """A message that is known: a part of it, where the mistake is, and what to do."""

    part: str
    cause: Cause
    advice: str


_WITHOUT_CONVERSION: Final = "restore without --convert-guest (the guest then needs the nvme and ena drivers itself)"
_GUIDE: Final = "(VM Import guide, Requirements: each system has its list of kernels)"

KNOWN: Final = (
    Known("service role", Cause.SETUP, "the role is missing, or lacks a permission"),
    Known("We do not have access to the given resource", Cause.SETUP, "the role can't read the object"),
    Known("not local to the Region", Cause.SETUP, "the bucket must be in the region of the import"),
    Known("Invalid S3 source location", Cause.SETUP, "the bucket's name is wrong, or nobody may read it"),
    Known("Unsupported VMDK File Format", Cause.IMAGE, "VM Import does not take the image for a stream-optimised VMDK"),
    Known("Unsupported specified file format", Cause.IMAGE, "the object is no VMDK: somebody has replaced it"),
    Known("Uncompressed data has an invalid length", Cause.IMAGE, "the object was damaged on its way"),
    Known("Disk size of", Cause.IMAGE, "VM Import takes disks up to 16 TiB"),
    Known("Disk validation failed", Cause.IMAGE, "VM Import can't read the image"),
    Known(
        "Unsupported kernel version", Cause.GUEST, f"boot a kernel that AWS lists {_GUIDE}; or {_WITHOUT_CONVERSION}"
    ),
    Known("Unknown OS / Missing OS files", Cause.GUEST, f"AWS does not know the system; {_WITHOUT_CONVERSION}"),
    Known("No valid partition", Cause.GUEST, f"the first disk has no partition table; {_WITHOUT_CONVERSION}"),
    Known("No bootable partition", Cause.GUEST, f"no partition of the first disk boots; {_WITHOUT_CONVERSION}"),
    Known(
        "Multiple different grub",
        Cause.GUEST,
        f"leave one grub.cfg, grub.conf or menu.lst in the guest, then capture again; or {_WITHOUT_CONVERSION}",
    ),
    Known(
        "BLSC-style GRUB",
        Cause.GUEST,
        "in the guest: grub2-set-default 0 && grub2-mkconfig -o /boot/grub2/grub.cfg, then capture again;"
        f" or {_WITHOUT_CONVERSION}",
    ),
    Known(
        "initramfs",
        Cause.GUEST,
        f"in the guest: update-initramfs -u -k all, or dracut -f, then capture again; or {_WITHOUT_CONVERSION}",
    ),
    Known("Could not read fstab", Cause.GUEST, f"the guest has more than one /etc or no fstab; {_WITHOUT_CONVERSION}"),
    Known("Multiple directories found", Cause.GUEST, f"the guest has more than one system; {_WITHOUT_CONVERSION}"),
    Known(
        "Logical volume group activation failed",
        Cause.GUEST,
        f"check the volume group in the guest (vgck), and that all its disks are restored; or {_WITHOUT_CONVERSION}",
    ),
    Known(
        "FirstBootFailure",
        Cause.GUEST,
        "Windows did not come up with DHCP: switch off anti-virus and firewall, remove the Hyper-V role,"
        " then capture again",
    ),
    Known("Booter Networking", Cause.GUEST, "install .NET Framework 3.5 SP1 or later in Windows, then capture again"),
)


def failure(message: str, *, task: str, region: str, bucket: str, disk: str) -> CloudError:
    """The error that a task's last message means."""
    text = clean(message)
    found = next((known for known in KNOWN if known.part.lower() in text.lower()), None)
    told = text.removeprefix("ClientError: ").removeprefix("ServerError: ").rstrip(".")
    match found:
        case Known(cause=Cause.SETUP, advice=advice):
            return ImportNotSetUp(region=region, bucket=bucket, problem=f"{told} ({advice})", task=task, message=text)
        case Known(cause=Cause.IMAGE, advice=advice):
            return ImageUnfit(disk=disk, problem=f"{told} ({advice})", task=task, message=text)
        case Known(cause=Cause.GUEST, advice=advice):
            return GuestNotImportable(task=task, region=region, message=told, advice=advice)
        case _:
            advice = "run the same command again; if it fails again, restore with --via ebs, which needs no VM Import"
            return ImportFailed(task=task, region=region, message=told, advice=advice)


def clean(message: str) -> str:
    """One short line that can be printed, whatever AWS has read in the guest."""
    return one_line(message, MAX_MESSAGE)
