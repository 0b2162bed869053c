"""Sizes and counts.

Sources: EC2 User Guide, "Amazon EBS volume limits for Amazon EC2 instances" and "EBS volume types" (64 TiB);
VM Import/Export User Guide, limitations (16 TiB an image, 8 TiB a disk of ImportImage, 21 volumes).
"""

from collections.abc import Sequence
from typing import Final

from drsync.preflight.facts import Facts
from drsync.preflight.findings import Finding, fails, ok, warning
from drsync.preflight.machine import Machine
from drsync.units import TiB, format_size

VOLUME_BYTES: Final = 64 * TiB
NITRO_ATTACHMENTS: Final = 27
"""Volumes beside one network interface, on most Nitro types; newer types take more."""
IMPORT_VOLUMES: Final = 21
IMPORT_DISK_BYTES: Final = 8 * TiB


def check_limits(machine: Machine, _facts: Facts) -> Sequence[Finding]:
    """Whether AWS takes disks of this number and size."""
    check, sizes = "limits", machine.disks
    found: list[Finding] = []
    for name, size in sizes.items():
        if size > VOLUME_BYTES:
            found.append(
                fails(
                    check, f"{name} has {format_size(size)}; an EBS volume holds 64 TiB", "divide the disk in the guest"
                )
            )
        elif size >= IMPORT_DISK_BYTES:
            found.append(
                warning(
                    check,
                    f"{name} has {format_size(size)}; VM Import takes disks below 8 TiB",
                    "restore with --via ebs",
                )
            )
    if len(sizes) > NITRO_ATTACHMENTS:
        reason = f"{len(sizes)} disks; most instance types take {NITRO_ATTACHMENTS}"
        found.append(
            warning(
                check, reason, "choose a type that takes more with --instance-type (aws ec2 describe-instance-types)"
            )
        )
    elif len(sizes) > IMPORT_VOLUMES:
        found.append(warning(check, f"{len(sizes)} disks; VM Import takes {IMPORT_VOLUMES}", "restore with --via ebs"))
    total = format_size(sum(sizes.values()))
    return found or [ok(check, f"{len(sizes)} {'disk' if len(sizes) == 1 else 'disks'}, {total}")]


def check_devices(machine: Machine, _facts: Facts) -> Sequence[Finding]:
    """What the VM has here and an instance has not."""
    found: list[Finding] = []
    if machine.nics is not None and machine.nics > 1:
        action = "attach more interfaces in EC2 afterwards (aws ec2 attach-network-interface)"
        found.append(warning("devices", f"{machine.nics} network interfaces; the instance comes up with one", action))
    if machine.nics == 0:
        found.append(
            warning("devices", "the VM has no network interface; an instance always has one", "mind the security group")
        )
    if machine.passed_through:
        action = "the guest must come up without them"
        found.append(
            warning("devices", f"{machine.passed_through} of the host's own devices are passed through", action)
        )
    if machine.tpm:
        action = "have what is sealed in it unlocked by a recovery key, too"
        found.append(warning("devices", "the VM has a TPM; EC2's begins empty: what was sealed in it is gone", action))
    return found
