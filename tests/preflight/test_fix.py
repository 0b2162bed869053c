"""Preparing a guest for EC2: rewritten texts, and the steps on a guest in memory.

The same steps on a real guest by libguestfs: test_fix_real.py.
"""

from collections.abc import Sequence

import pytest

from drsync.preflight.fix import StepFailed, rewrite
from drsync.preflight.fix.steps import STEPS, fix_boot_loader, fix_fstab, fix_initramfs, fix_labels, fix_network
from drsync.preflight.inside.network import ifupdown, netplan, network_manager, networkd, sysconfig

UUIDS = {"/dev/vda1": "aaaa", "/dev/vda5": "ssss"}


class MemoryGuest:
    """A guest's files, and the commands that were run in it (see fix.Guest)."""

    def __init__(self, files: dict[str, str]) -> None:
        self.files = dict(files)
        self.commands: list[str] = []

    def exists(self, path: str) -> bool:
        return path in self.files or any(name.startswith(f"{path}/") for name in self.files)

    def read(self, path: str) -> str:
        return self.files[path]

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        if path in self.files:
            self.files.setdefault(f"{path}.drsync", self.files[path])
        self.files[path] = text

    def put_aside(self, path: str) -> None:
        self.files[f"{path}.drsync"] = self.files.pop(path)

    def names(self, directory: str) -> Sequence[str]:
        start = f"{directory}/"
        return sorted({name.removeprefix(start).split("/")[0] for name in self.files if name.startswith(start)})

    def run(self, command: str) -> str:
        self.commands.append(command)
        return "aaaa\n" if command.startswith("findmnt") else ""

    def uuid_of(self, device: str) -> str:
        return UUIDS.get(device, "")


FSTAB = """# /etc/fstab: kept as it is
/dev/vda1   /     ext4  errors=remount-ro 0 1
UUID=bbbb  /boot  ext4  defaults  0 2
/dev/vda5 none swap sw 0 0
/dev/vdc1 /gone xfs
/dev/vdd1 /gone2 xfs defaults,nofail 0 0
share /mnt/host virtiofs defaults 0 0
/dev/sr0 /media/cdrom0 udf,iso9660 user,noauto 0 0
"""
FIXED = """# /etc/fstab: kept as it is
UUID=aaaa   /     ext4  errors=remount-ro 0 1
UUID=bbbb  /boot  ext4  defaults  0 2
UUID=ssss none swap sw 0 0
/dev/vdc1\t/gone\txfs\tdefaults,nofail\t0\t0
/dev/vdd1 /gone2 xfs defaults,nofail 0 0
share\t/mnt/host\tvirtiofs\tdefaults,nofail\t0\t0
/dev/sr0 /media/cdrom0 udf,iso9660 user,noauto 0 0
"""


def test_fstab_names_file_systems_by_uuid() -> None:
    guest = MemoryGuest({"/etc/fstab": FSTAB})
    assert len(fix_fstab(guest)) == 4
    assert guest.files == {"/etc/fstab": FIXED, "/etc/fstab.drsync": FSTAB}
    assert fix_fstab(guest) == []
    assert fix_fstab(MemoryGuest({})) == []


def test_grub_gets_a_serial_console_and_a_root_by_uuid() -> None:
    before = (
        'GRUB_TIMEOUT=5\nGRUB_CMDLINE_LINUX="root=/dev/vda1 resume=/dev/vda5 quiet"\nGRUB_DISABLE_LINUX_UUID=true\n'
    )
    text, changes = rewrite.grub_defaults(before, "aaaa")
    assert 'GRUB_CMDLINE_LINUX="root=UUID=aaaa quiet"' in text
    assert "#GRUB_DISABLE_LINUX_UUID=true" in text
    assert text.endswith(f'GRUB_CMDLINE_LINUX="$GRUB_CMDLINE_LINUX {rewrite.CONSOLE}"\n')
    assert len(changes) == 4
    assert rewrite.grub_defaults(text, "aaaa") == (text, [])


@pytest.mark.parametrize(
    ("tool", "command"),
    [("/usr/sbin/update-grub", "update-grub"), ("/usr/sbin/grubby", "grubby"), ("/boot/grub2/grub.cfg", "mkconfig")],
)
def test_the_boot_loaders_own_tool_writes_its_configuration(tool: str, command: str) -> None:
    guest = MemoryGuest({"/etc/default/grub": 'GRUB_CMDLINE_LINUX=""\n', tool: "x"})
    assert fix_boot_loader(guest)
    assert command in guest.commands[-1]
    count = len(guest.commands)
    assert fix_boot_loader(guest) == []
    assert len(guest.commands) == count + 1, "only the root was asked for"


def test_another_boot_loader_stays_as_it_is_and_that_is_said() -> None:
    (said,) = fix_boot_loader(MemoryGuest({"/boot/extlinux/extlinux.conf": "x"}))
    assert "stays as it is" in said
    guest = MemoryGuest({"/etc/default/grub": 'GRUB_CMDLINE_LINUX=""\n'})
    for _ in range(2):  # what failed is not taken for done
        with pytest.raises(StepFailed, match=r"no grub\.cfg"):
            fix_boot_loader(guest)


class Interrupted(MemoryGuest):
    """A guest whose initramfs can't be made."""

    def run(self, command: str) -> str:
        raise StepFailed("killed")


def test_an_initramfs_that_was_not_made_is_made_by_the_next_run() -> None:
    for tool in ("/usr/sbin/update-initramfs", "/usr/bin/dracut"):
        files = {tool: "x", "/lib/modules/6.1/x": "x", "/boot/initramfs-6.1.img": "x"}
        broken = Interrupted(files)
        with pytest.raises(StepFailed, match="killed"):
            fix_initramfs(broken)
        assert fix_initramfs(MemoryGuest(broken.files))


def test_initramfs_tools() -> None:
    guest = MemoryGuest({"/usr/sbin/update-initramfs": "x", "/etc/initramfs-tools/modules": "# x\nvirtio_blk\nnvme\n"})
    assert fix_initramfs(guest)
    assert guest.files["/etc/initramfs-tools/modules"] == "# x\nvirtio_blk\nnvme\nena\n"
    assert "MODULES" not in guest.files["/etc/initramfs-tools/conf.d/drsync-ec2"]
    assert guest.commands == ["update-initramfs -u -k all"]
    assert fix_initramfs(guest) == []


def test_an_initramfs_for_its_own_hardware_becomes_one_for_any() -> None:
    files = {"/usr/sbin/update-initramfs": "x", "/etc/initramfs-tools/initramfs.conf": "# x\nMODULES=dep\n"}
    guest = MemoryGuest(files)
    assert fix_initramfs(guest)
    assert guest.files["/etc/initramfs-tools/conf.d/drsync-ec2"].startswith("MODULES=most\n")
    assert fix_initramfs(guest) == []


def test_dracut() -> None:
    files = {
        "/usr/bin/dracut": "x",
        "/lib/modules/5.14.0-1.el9/modules.dep": "x",
        "/boot/initramfs-5.14.0-1.el9.img": "x",
    }
    guest = MemoryGuest({**files, "/lib/modules/5.14.0-0.old/x": "x"})
    assert fix_initramfs(guest)
    assert guest.commands == ["dracut --force --no-hostonly '/boot/initramfs-5.14.0-1.el9.img' '5.14.0-1.el9'"]
    assert fix_initramfs(guest) == []


def test_a_hostile_kernel_version_is_no_command() -> None:
    guest = MemoryGuest({"/usr/bin/dracut": "x", "/lib/modules/'; rm -rf x/y": "x"})
    with pytest.raises(StepFailed, match="version"):
        fix_initramfs(guest)
    assert guest.commands == []


def test_a_guest_without_tools_for_an_initramfs_is_told() -> None:
    with pytest.raises(StepFailed, match="neither"):
        fix_initramfs(MemoryGuest({}))


@pytest.mark.parametrize(
    ("files", "file"),
    [
        ({"/etc/netplan/50-cloud-init.yaml": "x"}, "/etc/netplan/99-drsync-ec2.yaml"),
        (
            {"/etc/systemd/system/multi-user.target.wants/NetworkManager.service": "x"},
            "/etc/NetworkManager/system-connections/drsync-ec2.nmconnection",
        ),
        (
            {"/etc/systemd/system/multi-user.target.wants/systemd-networkd.service": "x"},
            "/etc/systemd/network/00-drsync-ec2.network",
        ),
        ({"/etc/network/interfaces": "x", "/sbin/ifup": "x"}, "/etc/network/interfaces"),
        ({"/etc/sysconfig/network-scripts/ifcfg-enp1s0": "x"}, "/etc/sysconfig/network-scripts/ifcfg-ens5"),
    ],
)
def test_the_network_is_configured_by_what_the_guest_has(files: dict[str, str], file: str) -> None:
    guest = MemoryGuest({**files, "/etc/udev/rules.d/70-persistent-net.rules": "x"})
    assert len(fix_network(guest)) == 2
    assert file in guest.files
    assert "/etc/udev/rules.d/70-persistent-net.rules" not in guest.files


def test_what_is_written_is_what_the_checks_want() -> None:
    assert [i.name for i in netplan("x", rewrite.NETPLAN) if i.dhcp and not i.mac] == ["e*"]
    assert [i.name for i in networkd("x", rewrite.NETWORKD) if i.dhcp] == ["e*"]
    assert [i.name for i in network_manager("x", rewrite.NETWORK_MANAGER) if i.dhcp] == [""]
    assert [i.name for i in ifupdown("x", rewrite.IFUPDOWN) if i.dhcp] == ["ens5", "eth0"]
    assert [i.name for i in sysconfig("/x/ifcfg-ens5", rewrite.ifcfg("ens5")) if i.dhcp] == ["ens5"]


def test_cloud_init_is_left_to_configure_the_network() -> None:
    guest = MemoryGuest({"/usr/bin/cloud-init": "x", "/etc/netplan/50-cloud-init.yaml": "x"})
    assert fix_network(guest) == ["network: left to cloud-init"]
    with pytest.raises(StepFailed, match="netplan, NetworkManager"):
        fix_network(MemoryGuest({}))


def test_selinux_labels_the_changed_files() -> None:
    guest = MemoryGuest({"/etc/selinux/config": "SELINUX=enforcing\n"})
    assert fix_labels(guest)
    assert "/.autorelabel" in guest.files
    assert fix_labels(MemoryGuest({"/etc/selinux/config": "SELINUX=disabled\n"})) == []


def test_a_second_run_of_all_steps_changes_nothing() -> None:
    files = {"/etc/fstab": FSTAB, "/etc/network/interfaces": "x", "/sbin/ifup": "x"}
    files |= {"/etc/default/grub": 'GRUB_CMDLINE_LINUX="quiet"\n', "/usr/sbin/update-grub": "x"}
    guest = MemoryGuest({**files, "/usr/sbin/update-initramfs": "x"})
    for _, step in STEPS:
        step(guest)
    after = dict(guest.files)
    assert [change for _, step in STEPS for change in step(guest)] == []
    assert guest.files == after
