"""Each message of VM Import that is known becomes an error that says what to do."""

import pytest

from drsync.errors import DrsyncError, GuestNotImportable, ImageUnfit, ImportFailed, ImportNotSetUp
from drsync.target.ec2.import_messages import KNOWN, MAX_MESSAGE, failure


def error_of(message: str) -> DrsyncError:
    return failure(message, task="import-snap-1", region="eu-west-1", bucket="images", disk="vda")


SEEN = [
    ("The service role vmimport provided does not exist or does not have sufficient permissions", ImportNotSetUp),
    (
        "ClientError: Disk validation failed [We do not have access to the given resource. Reason 403 Forbidden]",
        ImportNotSetUp,
    ),
    ("The given S3 bucket is not local to the Region", ImportNotSetUp),
    ("Invalid S3 source location", ImportNotSetUp),
    ("ClientError: Disk validation failed [Unsupported VMDK File Format]", ImageUnfit),
    ("ClientError: Disk validation failed [Unsupported specified file format]", ImageUnfit),
    ("ClientError: Disk validation failed [OVF file parsing error]", ImageUnfit),
    ("ClientError: Uncompressed data has an invalid length", ImageUnfit),
    ("ClientError: Unsupported kernel version 5.4.66-gentoo-x86_64", GuestNotImportable),
    ("ClientError: Unknown OS / Missing OS files.", GuestNotImportable),
    ("ClientError: No valid partitions. Not a valid volume.", GuestNotImportable),
    ("ClientError: No bootable partition found", GuestNotImportable),
    ("ClientError: Multiple different grub/menu.lst files found.", GuestNotImportable),
    ("ClientError: BLSC-style GRUB found, but unable to detect default kernel", GuestNotImportable),
    (
        "ClientError: We were unable to read your import's initramfs/initrd to determine what drivers"
        " your import requires to run in EC2",
        GuestNotImportable,
    ),
    ("ClientError: Invalid configuration - Could not read fstab", GuestNotImportable),
    ("ClientError: Unsupported configuration - Multiple directories found", GuestNotImportable),
    ("ClientError: Unsupported configuration - Logical volume group activation failed", GuestNotImportable),
    ("FirstBootFailure: This import request failed because the Windows instance failed to boot", GuestNotImportable),
    ("ClientError: Booter Networking failure/instance not reachable", GuestNotImportable),
    ("ServerError: an internal error has occurred", ImportFailed),
    ("", ImportFailed),
]


@pytest.mark.parametrize(("message", "kind"), SEEN, ids=lambda value: str(value)[:60])
def test_a_message_is_passed_on_with_what_to_do(message: str, kind: type[DrsyncError]) -> None:
    error = error_of(message)
    assert type(error) is kind
    assert message.removeprefix("ClientError: ").removeprefix("ServerError: ").rstrip(".") in str(error)
    assert error.remedy
    assert not error.retryable


def test_every_known_message_was_seen_and_none_hides_another() -> None:
    for known in KNOWN:
        if known.part == "Disk size of":
            continue  # the double's own
        assert any(known.part.lower() in message.lower() for message, _ in SEEN), known.part
    for place, known in enumerate(KNOWN):
        assert not any(before.part.lower() in known.part.lower() for before in KNOWN[:place])


@pytest.mark.parametrize(
    ("message", "advice"),
    [
        ("ClientError: Unsupported kernel version 6.1", "without --convert-guest"),
        ("ClientError: BLSC-style GRUB found", "grub2-mkconfig -o /boot/grub2/grub.cfg"),
        ("The service role vmimport does not exist", "drsync cloud setup --bucket images --check"),
        ("ClientError: Disk validation failed [x]", "--via ebs"),
        ("something new", "--via ebs"),
    ],
)
def test_the_remedy_is_something_to_run(message: str, advice: str) -> None:
    assert advice in error_of(message).remedy


def test_what_aws_read_in_the_guest_can_not_take_over_the_terminal() -> None:
    error = error_of("ClientError: Unknown \x1b[2J\nOS " + "x" * 5000)
    assert str(error).isprintable()
    assert len(str(error)) < MAX_MESSAGE + 100
