"""What is mounted at boot, and by which names: EC2 calls disks /dev/nvme0n1 and so on, in any order."""

import re
from collections.abc import Sequence
from typing import Final

from drsync.preflight.facts import Facts, Linux, Mount, Volume
from drsync.preflight.findings import Finding, Verdict, fails, ok, unknown, warning
from drsync.preflight.machine import Machine
from drsync.preflight.naming import names_volume

_KERNEL_NAME: Final = re.compile(r"/dev/(?:(?:sd|vd|hd|xvd)[a-z]+\d*|nvme\d+n\d+(?:p\d+)?)$")
_BY_PLACE: Final = ("/dev/disk/by-path/", "/dev/disk/by-id/")
_BY_CONTENT: Final = re.compile(r"(?:UUID|LABEL|PARTUUID|PARTLABEL)=|/dev/disk/by-(?:uuid|label|partuuid|partlabel)/")
_PSEUDO: Final = frozenset(
    [
        "proc",
        "sysfs",
        "tmpfs",
        "devpts",
        "devtmpfs",
        "cgroup",
        "cgroup2",
        "debugfs",
        "tracefs",
        "securityfs",
        "hugetlbfs",
        "mqueue",
        "fusectl",
        "configfs",
        "pstore",
        "efivarfs",
        "binfmt_misc",
        "none",
        "rpc_pipefs",
        "overlay",
        "squashfs",
        "autofs",
        "fuse",
    ]
)
_REMOTE: Final = frozenset(
    ["nfs", "nfs4", "cifs", "smb3", "smbfs", "ceph", "glusterfs", "fuse.sshfs", "fuse.glusterfs", "afs", "lustre"]
)
_OF_THE_HOST: Final = frozenset({"9p", "virtiofs", "vboxsf", "vmhgfs", "fuse.vmhgfs-fuse"})
_REMOVABLE: Final = re.compile(r"/dev/(?:sr\d+|cdrom|dvd|fd\d+)$")
_HIDING: Final = frozenset({"crypto_LUKS", "linux_raid_member", "zfs_member", "BitLocker"})
_FIX: Final = "in the guest: blkid shows UUIDs; put them into /etc/fstab (or restore with --fix-guest ec2)"


def check_fstab(_machine: Machine, facts: Facts) -> Sequence[Finding]:
    """Whether every file system of /etc/fstab is found in EC2."""
    return [finding for linux in facts.linux for finding in _fstab_of(linux, facts)]


def _fstab_of(linux: Linux, facts: Facts) -> Sequence[Finding]:
    check = "fstab"
    if linux.fstab is None:
        return [ok(check, "there is no /etc/fstab: the boot loader names the root")]
    found = [finding for mount in linux.fstab for finding in _judge(mount, facts)]
    bad = [f for f in found if f.verdict is not Verdict.OK]
    count = len([m for m in linux.fstab if not _is_passed_over(m)])
    return bad or [ok(check, f"{count} file systems, all by UUID, label or logical volume")]


def _is_passed_over(mount: Mount) -> bool:
    local_file = mount.source.startswith("/") and not mount.source.startswith("/dev/")
    return mount.kind in _PSEUDO or "noauto" in mount.options or local_file or "bind" in mount.options


def _judge(mount: Mount, facts: Facts) -> Sequence[Finding]:
    check, what = "fstab", f"{mount.target} ({mount.source})"
    if mount.kind == "swap" or mount.target in {"none", "swap"}:
        what = f"swap ({mount.source})"
    may_be_missing = "nofail" in mount.options or mount.kind == "swap"
    judge = warning if may_be_missing else fails
    if mount.kind in _OF_THE_HOST:
        return [
            judge(
                check, f"{what} is a directory of the host's, which EC2 does not have", "add nofail, or remove the line"
            )
        ]
    if _is_passed_over(mount) or _REMOVABLE.match(mount.source):
        return []
    if mount.kind in _REMOTE:
        reason = f"{what} is on another machine, which EC2 must reach"
        action = "add nofail,_netdev, so that the boot does not wait for it; or have it reachable from the subnet"
        return [] if "nofail" in mount.options else [warning(check, reason, action)]
    if _KERNEL_NAME.match(mount.source):
        reason = f"{what} is named by the device that it is here; EC2's disks have other names"
        return [judge(check, reason, _FIX)]
    if mount.source.startswith(_BY_PLACE):
        return [judge(check, f"{what} is named by where its disk is plugged in, which is another place in EC2", _FIX)]
    return _judge_presence(mount, facts, what)


def _judge_presence(mount: Mount, facts: Facts, what: str) -> Sequence[Finding]:
    """A name that stands for content is good, if a disk of the point has it."""
    hidden = any(v.kind in _HIDING or (v.kind == "LVM2_member" and not facts.reader) for v in facts.volumes)
    if not _BY_CONTENT.match(mount.source) or hidden or any(names_volume(mount.source, v) for v in facts.volumes):
        return []
    action = "protect that disk, too; or add nofail; or correct the line"
    if "nofail" in mount.options or mount.kind == "swap":
        return [warning("fstab", f"{what} is on no disk of the point", action)]
    return [fails("fstab", f"{what} is on no disk of the point: the boot would wait for it and stop", action)]


def check_root(_machine: Machine, facts: Facts) -> Sequence[Finding]:
    """Whether the kernel is told its root in a way that holds in EC2."""
    return [_root_of(linux) for linux in facts.linux]


def _root_of(linux: Linux) -> Finding:
    check = "root"
    named = list(dict.fromkeys(m for line in linux.command_lines for m in re.findall(r"(?:^|\s)root=(\S+)", line)))
    resumed = list(dict.fromkeys(m for line in linux.command_lines for m in re.findall(r"(?:^|\s)resume=(\S+)", line)))
    if not linux.command_lines:
        return unknown(check, "no configuration of a boot loader was found", "in the guest: cat /proc/cmdline")
    bad = [name for name in named if _KERNEL_NAME.match(name) or name.startswith(_BY_PLACE)]
    if bad:
        action = "in the guest: remove GRUB_DISABLE_LINUX_UUID from /etc/default/grub, or write UUIDs; then update-grub"
        return fails(check, f"the boot loader names the root {bad[0]}, which has another name in EC2", action)
    if any(_KERNEL_NAME.match(name) for name in resumed):
        action = "in the guest: name it by UUID, or remove resume="
        return warning(check, f"resume={resumed[0]} has another name in EC2: the boot may wait for it", action)
    return ok(check, f"root={named[0]}" if named else "the boot loader leaves the root to the initramfs")


def check_encryption(_machine: Machine, facts: Facts) -> Sequence[Finding]:
    """Whether somebody has to type a passphrase."""
    check = "encryption"
    found: list[Finding] = []
    for volume in facts.volumes:
        if volume.kind == "crypto_LUKS":
            found.append(_encrypted(volume, facts))
        elif volume.kind == "BitLocker":
            action = "suspend BitLocker before the point is taken: its key is in a TPM that EC2 does not have"
            found.append(fails(check, f"{volume.name} is encrypted with BitLocker", action))
    return found or [ok(check, "no volume is encrypted")]


def _encrypted(volume: Volume, facts: Facts) -> Finding:
    check = "encryption"
    rows = [c for linux in facts.linux for c in linux.crypttab if names_volume(c.source, volume)]
    with_file = [c for c in rows if c.key not in {"", "none", "-"} and "tpm2-device" not in " ".join(c.options)]
    if with_file:
        return ok(check, f"{volume.name} is encrypted; its key is the file that /etc/crypttab names")
    reason = (
        f"{volume.name} is encrypted (LUKS): what is inside is not known here, and it asks for a passphrase at boot"
    )
    action = (
        "type it on the EC2 serial console, or unlock it by network (clevis, dropbear);"
        " VM Import refuses encrypted volumes: use --via ebs, and let EBS encrypt"
    )
    return warning(check, reason, action) if facts.linux else unknown(check, reason, action)
