"""The steps of preparing a guest for EC2, in order. Each returns what it changed, as lines for people."""

import logging
import re
from collections.abc import Callable, Sequence
from typing import Final

from drsync.preflight.fix import Guest, StepFailed, rewrite

_LOGGER = logging.getLogger(__name__)
_DONE: Final = "# drsync: the initramfs were made with this"
"""Stands where it came to its end: a run that was interrupted does it again."""
_GRUB_CONFIGURATIONS: Final = ("/boot/grub2/grub.cfg", "/boot/grub/grub.cfg")


def fix_fstab(guest: Guest) -> Sequence[str]:
    """Name file systems by UUID."""
    if not guest.exists("/etc/fstab"):
        return []
    text, changes = rewrite.fstab_by_uuid(guest.read("/etc/fstab"), guest.uuid_of)
    if changes:
        guest.write("/etc/fstab", text)
    return [f"fstab: {change}" for change in changes]


def fix_network(guest: Guest) -> Sequence[str]:
    """Have the first interface configured by DHCP, whatever its name and MAC address."""
    changes = _forget_addresses(guest)
    if guest.exists("/usr/bin/cloud-init") and not guest.exists("/etc/cloud/cloud-init.disabled"):
        return [*changes, "network: left to cloud-init"]
    for is_used, configure in _NETWORKS:
        if is_used(guest):
            return [*changes, *configure(guest)]
    raise StepFailed(
        "it was not found what configures the network (netplan, NetworkManager, systemd-networkd, ifupdown)"
    )


def _forget_addresses(guest: Guest) -> list[str]:
    rules = "/etc/udev/rules.d/70-persistent-net.rules"
    if not guest.exists(rules):
        return []
    guest.put_aside(rules)
    return ["network: names that udev tied to MAC addresses are forgotten"]


def _enabled(guest: Guest, unit: str) -> bool:
    return any(
        unit in guest.names(f"/etc/systemd/system/{wants}.wants")
        for wants in ("multi-user.target", "network-online.target", "sysinit.target")
    )


def _netplan(guest: Guest) -> Sequence[str]:
    name = "99-drsync-ec2.yaml"
    for other in guest.names("/etc/netplan"):
        if other.endswith(".yaml") and other != name:
            guest.put_aside(f"/etc/netplan/{other}")
    guest.write(f"/etc/netplan/{name}", rewrite.NETPLAN, 0o600)
    return ["network: netplan, DHCP on any interface"]


def _network_manager(guest: Guest) -> Sequence[str]:
    directory, name = "/etc/NetworkManager/system-connections", "drsync-ec2.nmconnection"
    guest.write(f"{directory}/{name}", rewrite.NETWORK_MANAGER, 0o600)
    return ["network: NetworkManager, DHCP on any interface"]


def _networkd(guest: Guest) -> Sequence[str]:
    guest.write("/etc/systemd/network/00-drsync-ec2.network", rewrite.NETWORKD)
    return ["network: systemd-networkd, DHCP on any interface"]


def _ifupdown(guest: Guest) -> Sequence[str]:
    if guest.read("/etc/network/interfaces") == rewrite.IFUPDOWN:
        return []
    for other in guest.names("/etc/network/interfaces.d"):
        if not other.endswith(".drsync"):
            guest.put_aside(f"/etc/network/interfaces.d/{other}")
    guest.write("/etc/network/interfaces", rewrite.IFUPDOWN)
    return ["network: ifupdown, DHCP on ens5 or eth0"]


def _sysconfig(guest: Guest) -> Sequence[str]:
    directory = "/etc/sysconfig/network-scripts"
    for other in guest.names(directory):
        if other.startswith("ifcfg-") and other not in {"ifcfg-lo", "ifcfg-ens5", "ifcfg-eth0"}:
            guest.put_aside(f"{directory}/{other}")
    for name in ("ens5", "eth0"):
        guest.write(f"{directory}/ifcfg-{name}", rewrite.ifcfg(name))
    return ["network: ifcfg files, DHCP on ens5 or eth0"]


_NETWORKS: Final[tuple[tuple[Callable[[Guest], bool], Callable[[Guest], Sequence[str]]], ...]] = (
    (lambda guest: any(name.endswith(".yaml") for name in guest.names("/etc/netplan")), _netplan),
    (lambda guest: _enabled(guest, "NetworkManager.service"), _network_manager),
    (lambda guest: _enabled(guest, "systemd-networkd.service"), _networkd),
    (lambda guest: guest.exists("/etc/network/interfaces") and guest.exists("/sbin/ifup"), _ifupdown),
    (lambda guest: guest.exists("/etc/sysconfig/network-scripts"), _sysconfig),
)


def fix_boot_loader(guest: Guest) -> Sequence[str]:
    """A serial console, and the root by UUID, in GRUB's configuration."""
    if not guest.exists("/etc/default/grub"):
        return ["boot loader: it is not GRUB 2 with /etc/default/grub, and stays as it is"]
    root_uuid = guest.run("findmnt -n -o UUID / || true").strip()
    before = guest.read("/etc/default/grub")
    text, changes = rewrite.grub_defaults(before, root_uuid)
    if not changes:
        return []
    guest.write("/etc/default/grub", text)
    try:
        _write_grub_configuration(guest)
    except StepFailed:
        guest.write("/etc/default/grub", before)  # so that another run does it again
        raise
    return [f"boot loader: {change}" for change in dict.fromkeys(changes)]


def _write_grub_configuration(guest: Guest) -> None:
    """Have GRUB's configuration written by the guest's own tool."""
    if guest.exists("/usr/sbin/grubby") or guest.exists("/sbin/grubby"):  # boot loader entries of Red Hat's
        guest.run(f"grubby --update-kernel=ALL --args='{rewrite.CONSOLE}'")
    elif guest.exists("/usr/sbin/update-grub"):
        guest.run("update-grub")
    else:
        target = next((path for path in _GRUB_CONFIGURATIONS if guest.exists(path)), "")
        if not target:
            raise StepFailed("there is no grub.cfg to write anew")
        guest.run(f"PATH=$PATH:/usr/sbin:/sbin; $(command -v grub2-mkconfig || command -v grub-mkconfig) -o {target}")


def fix_initramfs(guest: Guest) -> Sequence[str]:
    """Have nvme and ena in every initramfs, made by the guest's own tools."""
    if guest.exists("/usr/sbin/update-initramfs"):
        return _initramfs_tools(guest)
    if guest.exists("/usr/bin/dracut") or guest.exists("/sbin/dracut"):
        return _dracut(guest)
    raise StepFailed("the guest has neither initramfs-tools nor dracut")


def _initramfs_tools(guest: Guest) -> Sequence[str]:
    path, options = "/etc/initramfs-tools/modules", "/etc/initramfs-tools/conf.d/drsync-ec2"
    if guest.exists(options) and _DONE in guest.read(options):
        return []
    before = guest.read(path) if guest.exists(path) else ""
    guest.write(path, rewrite.with_lines(before, rewrite.DRIVERS))
    # `dep` would be made for the hardware that this runs on, which is neither here nor there.
    choice = "MODULES=most\n" if _is_made_for_its_hardware(guest) else ""
    guest.write(options, choice)
    guest.run("update-initramfs -u -k all")
    guest.write(options, f"{choice}{_DONE}\n")
    return ["initramfs: nvme and ena are in it (initramfs-tools)"]


def _is_made_for_its_hardware(guest: Guest) -> bool:
    directory = "/etc/initramfs-tools"
    files = [
        f"{directory}/initramfs.conf",
        *(f"{directory}/conf.d/{name}" for name in guest.names(f"{directory}/conf.d")),
    ]
    return any(re.search(r"^\s*MODULES=[\"']?dep", guest.read(f), re.MULTILINE) for f in files if guest.exists(f))


def _dracut(guest: Guest) -> Sequence[str]:
    path = "/etc/dracut.conf.d/drsync-ec2.conf"
    options = f'hostonly="no"\nadd_drivers+=" {" ".join(rewrite.DRIVERS)} "\n'
    if guest.exists(path) and guest.read(path) == f"{options}{_DONE}\n":
        return []
    guest.write(path, options)
    for version in guest.names("/lib/modules"):
        image = _dracut_image(guest, version)
        if image:
            guest.run(f"dracut --force --no-hostonly '{image}' '{version}'")
    guest.write(path, f"{options}{_DONE}\n")
    return ["initramfs: nvme and ena are in it (dracut)"]


def _dracut_image(guest: Guest, version: str) -> str:
    """The image of a kernel, by the name that the distribution gives it; empty if that kernel has none."""
    if not re.fullmatch(r"[A-Za-z0-9._+~-]{1,128}", version):
        raise StepFailed(f"a kernel's version is {version[:64]!r}")
    names = (f"/boot/initramfs-{version}.img", f"/boot/initrd.img-{version}", f"/boot/initrd-{version}")
    return next((name for name in names if guest.exists(name)), "")


def fix_labels(guest: Guest) -> Sequence[str]:
    """Have SELinux label the changed files at the first boot."""
    path = "/etc/selinux/config"
    if not guest.exists(path) or not re.search(r"^SELINUX=(?:enforcing|permissive)", guest.read(path), re.MULTILINE):
        return []
    guest.write("/.autorelabel", "")
    return ["SELinux: the first boot labels all files anew, and starts once more"]


STEPS: Final[tuple[tuple[str, Callable[[Guest], Sequence[str]]], ...]] = (
    ("fstab", fix_fstab),
    ("network", fix_network),
    ("boot loader", fix_boot_loader),
    ("initramfs", fix_initramfs),
    ("labels", fix_labels),
)
