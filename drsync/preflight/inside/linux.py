"""A Linux guest's facts, read from its tree."""

import re
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Final

from drsync.preflight.facts import Crypt, Driver, Interface, Kernel, Linux, Mount, plain
from drsync.preflight.inside import network
from drsync.preflight.inside.files import Tree, Unreadable
from drsync.preflight.inside.initramfs import Initramfs, module_name, read_initramfs
from drsync.preflight.inside.kernel_image import built_in, version_of

MAX_KERNELS: Final = 5
_READ_INITRAMFS: Final = 2
"""Of the newest kernels: a machine boots one of them, and each costs 30 to 100 MiB to read."""
_MODULES_BYTES: Final = 4 * 1024 * 1024
_MAX_FILES: Final = 64
_MACHINES: Final = {
    0x3E: "x86_64",
    0xB7: "aarch64",
    0x03: "i386",
    0x28: "arm",
    0xF3: "riscv64",
    0x15: "ppc64",
    0x16: "s390x",
}
_KERNEL: Final = re.compile(r"(?:vmlinuz|vmlinux|kernel)-(.+)$")
_COMMAND_LINE: Final = re.compile(r"^\s*(?:linux|linux16|linuxefi|kernel|append|options)\s+(.+)$", re.IGNORECASE)
_BOOT_CONFIGURATIONS: Final = (
    "/boot/grub/grub.cfg",
    "/boot/grub2/grub.cfg",
    "/boot/grub/menu.lst",
    "/boot/grub/grub.conf",
    "/boot/extlinux/extlinux.conf",
    "/boot/extlinux.conf",
    "/boot/syslinux/syslinux.cfg",
    "/boot/syslinux.cfg",
    "/syslinux.cfg",
    "/extlinux.conf",
)
_VERSION_FILES: Final = {
    "debian": "/etc/debian_version",
    "centos": "/etc/redhat-release",
    "rhel": "/etc/redhat-release",
}
Problems = list[str]


def is_linux(tree: Tree) -> bool:
    """Whether a tree is a Linux system's root."""
    return any(map(tree.is_file, ("/etc/os-release", "/usr/lib/os-release", "/etc/fstab"))) and tree.exists("/etc")


def read_fstab(text: str) -> tuple[Mount, ...]:
    """The lines of /etc/fstab (fstab(5))."""
    found = [_fields(line, 4) for line in text.splitlines()]
    return tuple(
        Mount(source=row[0], target=row[1], kind=row[2], options=tuple(plain(o) for o in row[3].split(",")[:32] if o))
        for row in found[:512]
        if row is not None and len([f for f in row if f]) >= 3
    )[:256]


def _fields(line: str, count: int) -> list[str] | None:
    """The first fields of a line of a table; None for a comment or an empty line."""
    words = line.split()
    if not words or words[0].startswith("#"):
        return None
    unescaped = [re.sub(r"\\([0-7]{3})", lambda m: chr(int(m.group(1), 8) & 0xFF), w) for w in words[:count]]
    return [plain(w) for w in unescaped] + [""] * (count - len(unescaped))


def read_crypttab(text: str) -> tuple[Crypt, ...]:
    """The lines of /etc/crypttab (crypttab(5))."""
    found = [_fields(line, 4) for line in text.splitlines()]
    return tuple(
        Crypt(name=row[0], source=row[1], key=row[2], options=tuple(plain(o) for o in row[3].split(",")[:32] if o))
        for row in found[:64]
        if row is not None and row[1]
    )


def read_linux(tree: Tree, root: str, problems: Problems) -> Linux:
    """All that is asked of a Linux system. What can't be read is noted in `problems`, and the rest goes on."""
    look: Callable[..., str] = partial(_text, tree, problems)
    release = network.shell_values(look("/etc/os-release") or look("/usr/lib/os-release"))
    fstab = look("/etc/fstab") if tree.is_file("/etc/fstab") else None
    datasources, may_configure = _cloud_init(tree, look)
    interfaces, tools = _network(tree, look, problems)
    distribution = plain(release.get("ID", "")).lower()
    return Linux(
        root=root,
        id=distribution,
        version=_version(distribution, plain(release.get("VERSION_ID", "")), look),
        name=plain(release.get("PRETTY_NAME", "")),
        machine=_machine(tree, problems),
        kernels=read_kernels(tree, "/boot", problems) or read_kernels(tree, "", problems),
        fstab=None if fstab is None else read_fstab(fstab),
        crypttab=read_crypttab(look("/etc/crypttab")),
        command_lines=read_command_lines(tree, look),
        interfaces=interfaces,
        network_by=tools,
        fixed_names=_fixed_names(tree, look),
        cloud_init=_is_there(tree, "/usr/bin/cloud-init", "/usr/local/bin/cloud-init")
        and not tree.exists("/etc/cloud/cloud-init.disabled"),
        cloud_init_network=may_configure,
        datasources=datasources,
        sshd=_is_there(tree, "/usr/sbin/sshd", "/usr/bin/sshd", "/usr/sbin/dropbear"),
        sshd_enabled=_sshd_enabled(tree),
        serial_getty=_serial_getty(tree, look),
        systemd=_is_there(tree, "/usr/lib/systemd/systemd", "/lib/systemd/systemd"),
    )


def _text(tree: Tree, problems: Problems, path: str) -> str:
    """A file's text; empty if it is not there or can't be read, which is noted."""
    try:
        return tree.text(path) or ""
    except Unreadable as err:
        problems.append(plain(err))
        return ""


def _is_there(tree: Tree, *paths: str) -> bool:
    return any(map(tree.exists, paths))


def _version(distribution: str, told: str, look: Callable[[str], str]) -> str:
    """The distribution's version with its minor number, where os-release leaves that out."""
    path = _VERSION_FILES.get(distribution)
    if path is None or "." in told:
        return told
    found = re.search(r"\d+(?:\.\d+)+", look(path)[:256])
    return plain(found.group()) if found is not None and found.group().split(".")[0] == told else told


def _machine(tree: Tree, problems: Problems) -> str:
    for path in ("/bin/sh", "/sbin/init", "/usr/bin/env"):
        try:
            head = tree.read(path, 20)
        except Unreadable as err:
            problems.append(plain(err))
            continue
        if head is not None and len(head) == 20 and head[:4] == b"\x7fELF":
            (machine,) = struct.unpack_from("<H" if head[5] == 1 else ">H", head, 18)
            return _MACHINES.get(machine, f"ELF machine {machine}")
    return ""


def read_kernels(tree: Tree, directory: str, problems: Problems) -> tuple[Kernel, ...]:
    """The kernels in a directory, newest first; without rescue kernels."""
    names = tree.names(directory or "/")
    found: dict[str, str] = {}
    for name in names:
        match = _KERNEL.match(name)
        if match and "rescue" not in name and not name.endswith((".old", ".hmac", ".sig")):
            found.setdefault(match.group(1), f"{directory}/{name}")
    for name in () if found else ("vmlinuz", "linux", "bzImage"):  # without a version in its name
        if name in names and tree.is_file(f"{directory}/{name}"):
            found[_bz_version(tree, f"{directory}/{name}")] = f"{directory}/{name}"
    newest = sorted(found, key=_version_key, reverse=True)[:MAX_KERNELS]
    return tuple(
        _kernel(tree, version, found[version], names, directory, problems, unpack=place < _READ_INITRAMFS)
        for place, version in enumerate(newest)
    )


def _version_key(version: str) -> list[tuple[int, int, str]]:
    return [(1, int(p), "") if p.isdigit() else (0, 0, p) for p in re.findall(r"\d+|[a-z]+", version)]


def _bz_version(tree: Tree, path: str) -> str:
    with suppress(Unreadable):
        return version_of(tree.read(path, 65536) or b"")
    return ""


def _has_nvme(tree: Tree, path: str) -> bool:
    """Whether the kernel's image itself has the driver."""
    try:
        file = tree.open(path)
        return file is not None and built_in(file, (b"nvme.io_queue_depth", b"nvme.use_threaded_interrupts"))
    except Exception:  # noqa: BLE001 - decompressors and file systems raise what they stumble with; then it is not known
        return False


def _kernel(
    tree: Tree, version: str, image: str, names: list[str], directory: str, problems: Problems, *, unpack: bool
) -> Kernel:
    initramfs = _initramfs_of(version, names, directory)
    held = _unpacked(tree, initramfs) if initramfs and unpack else None
    base = next((b for b in ("/lib/modules", "/usr/lib/modules") if version and tree.exists(f"{b}/{version}")), None)
    own = _modules(tree, f"{base}/{version}/modules.builtin", problems) if base else None
    modules = _modules(tree, f"{base}/{version}/modules.dep", problems) if base else None

    def where(name: str) -> Driver:
        if own is not None and name in own:
            return Driver.BUILT_IN
        if held is not None and name in held.modules:
            return Driver.INITRAMFS
        if modules is not None and name in modules:
            return Driver.MODULE
        return Driver.MISSING if modules else Driver.UNKNOWN

    nvme = where("nvme")
    if nvme is Driver.UNKNOWN and _has_nvme(tree, image):
        nvme = Driver.BUILT_IN
    return Kernel(
        version=plain(version),
        image=plain(image),
        initramfs=plain(initramfs),
        nvme=nvme,
        ena=where("ena"),
        problem=plain(held.problem) if held is not None else "" if unpack or not initramfs else "it was not unpacked",
    )


def _initramfs_of(version: str, names: list[str], directory: str) -> str:
    wanted = [f"initrd.img-{version}", f"initramfs-{version}.img", f"initrd-{version}", f"initramfs-{version}"]
    plainly = ["initrd.img", "initrd.gz", "initramfs.img", "initrd", "initramfs-linux.img"]
    found = next((n for n in [*wanted, *plainly] if n in names), "")
    return f"{directory}/{found}" if found else ""


def _unpacked(tree: Tree, path: str) -> Initramfs:
    try:
        file = tree.open(path)
    except Unreadable as err:
        return Initramfs(modules=frozenset(), problem=str(err))
    if file is None:
        return Initramfs(modules=frozenset(), problem="it is not there")
    return read_initramfs(file)


def _modules(tree: Tree, path: str, problems: Problems) -> frozenset[str] | None:
    """The modules in a file of depmod's: the first path of each line."""
    try:
        raw = tree.read(path, _MODULES_BYTES)
    except Unreadable as err:
        problems.append(plain(err))
        return None
    if raw is None:
        return None
    lines = raw.decode("utf-8", "replace").splitlines()
    return frozenset(filter(None, (module_name(line.split(":")[0].strip()) for line in lines)))


def read_command_lines(tree: Tree, look: Callable[[str], str]) -> tuple[str, ...]:
    """The kernel's command lines in the configurations of boot loaders, each once."""
    paths = [path for path in _BOOT_CONFIGURATIONS if tree.is_file(path)]
    entries = [f"/boot/loader/entries/{n}" for n in tree.names("/boot/loader/entries")[:16] if n.endswith(".conf")]
    shared = _grub_variables(tree, look)
    found: list[str] = []
    for path in [*paths, *entries]:
        for line in look(path).splitlines():
            match = _COMMAND_LINE.match(line)
            if match and "=" in line and not re.search(r"\b(?:recovery|single|rescue|memtest)\b", match.group(1)):
                found.append(
                    plain(re.sub(r"\$\{?(\w+)\}?", lambda m: shared.get(m.group(1), m.group(0)), match.group(1)))
                )
    return tuple(dict.fromkeys(found))[:16]


def _grub_variables(tree: Tree, look: Callable[[str], str]) -> dict[str, str]:
    """`kernelopts` and the like, which boot loader entries of Red Hat's refer to."""
    for path in ("/boot/grub2/grubenv", "/boot/grub/grubenv"):
        if tree.is_file(path):
            return {k: v[:1024] for k, _, v in (line.partition("=") for line in look(path).splitlines()) if v}
    return {}


def _configurations(tree: Tree, directory: str, suffixes: tuple[str, ...]) -> Iterator[str]:
    for name in tree.names(directory)[:_MAX_FILES]:
        if name.endswith(suffixes):
            yield f"{directory}/{name}"


def _network(
    tree: Tree, look: Callable[[str], str], problems: Problems
) -> tuple[tuple[Interface, ...], tuple[str, ...]]:
    """The interfaces that are configured, and by what."""
    found: list[Interface] = []
    tools: list[str] = []

    def note(tool: str, interfaces: list[Interface]) -> None:
        found.extend(interfaces)
        if tool not in tools:
            tools.append(tool)

    for path in _configurations(tree, "/etc/netplan", (".yaml",)):
        try:
            note("netplan", network.netplan(path, look(path)))
        except ValueError as err:
            problems.append(plain(f"{path}: {err}"))
    ifupdown = ["/etc/network/interfaces", *_configurations(tree, "/etc/network/interfaces.d", ("",))]
    if _is_there(tree, "/sbin/ifup", "/usr/sbin/ifup", "/sbin/ifupdown-ng") and tree.is_file(ifupdown[0]):
        for path in ifupdown:
            note("ifupdown", network.ifupdown(path, look(path)))
    if _enabled(tree, "systemd-networkd.service"):
        for directory in ("/etc/systemd/network", "/usr/lib/systemd/network"):
            for path in _configurations(tree, directory, (".network",)):
                if directory.startswith("/etc") or "ethernet" in path:
                    note("systemd-networkd", network.networkd(path, look(path)))
    for directory in ("/etc/sysconfig/network-scripts", "/etc/sysconfig/network"):
        for path in [f"{directory}/{n}" for n in tree.names(directory)[:_MAX_FILES] if n.startswith("ifcfg-")]:
            note("sysconfig", network.sysconfig(path, look(path)))
    if _enabled(tree, "NetworkManager.service"):
        _network_manager(tree, look, note)
    return tuple(found)[:256], tuple(tools)


def _network_manager(tree: Tree, look: Callable[[str], str], note: Callable[[str, list[Interface]], None]) -> None:
    """NetworkManager's connections, and what it does for an interface that has none: DHCP, unless that is forbidden."""
    note("NetworkManager", [])
    for path in _configurations(tree, "/etc/NetworkManager/system-connections", ("",)):
        note("NetworkManager", network.network_manager(path, look(path)))
    main = "/etc/NetworkManager/NetworkManager.conf"
    configurations = [main, *_configurations(tree, "/etc/NetworkManager/conf.d", (".conf",))]
    forbidden = any(re.search(r"^\s*no-auto-default\s*=\s*\S", look(p), re.MULTILINE) for p in configurations)
    if not forbidden:
        note("NetworkManager", [Interface(file="NetworkManager's default", dhcp=True)])


def _enabled(tree: Tree, unit: str) -> bool:
    base = "/etc/systemd/system"
    wants = ("multi-user.target.wants", "network-online.target.wants", "sockets.target.wants", "sysinit.target.wants")
    return any(tree.link(f"{base}/{want}/{unit}") is not None or tree.exists(f"{base}/{want}/{unit}") for want in wants)


def _sshd_enabled(tree: Tree) -> bool:
    if any(
        _enabled(tree, unit)
        for unit in ("ssh.service", "sshd.service", "ssh.socket", "sshd.socket", "dropbear.service")
    ):
        return True
    started = [n for level in ("2", "3") for n in tree.names(f"/etc/rc{level}.d")]
    return any(re.match(r"S\d\d(?:ssh|sshd|dropbear)$", n) for n in started) or tree.exists(
        "/etc/runlevels/default/sshd"
    )


def _serial_getty(tree: Tree, look: Callable[[str], str]) -> bool:
    unit = "/etc/systemd/system/getty.target.wants/serial-getty@ttyS0.service"
    if tree.link(unit) is not None or tree.exists(unit):
        return True
    return any("ttyS0" in line for line in look("/etc/inittab").splitlines() if not line.startswith("#"))


def _cloud_init(tree: Tree, look: Callable[[str], str]) -> tuple[tuple[str, ...], bool]:
    """The data sources that cloud-init is restricted to, and whether it may configure the network."""
    sources: tuple[str, ...] = ()
    may_configure = True
    for path in ["/etc/cloud/cloud.cfg", *_configurations(tree, "/etc/cloud/cloud.cfg.d", (".cfg",))]:
        text = "\n".join(line.split("#")[0] for line in look(path).splitlines())
        listed = re.search(r"datasource_list:\s*\[([^\]]{0,512})\]", text)
        if listed:
            sources = tuple(plain(s.strip(" '\"\n")) for s in listed.group(1).split(",") if s.strip(" '\"\n"))[:32]
        if re.search(r"network:\s*\{?\s*config:\s*[\"']?disabled", text):
            may_configure = False
    return sources, may_configure


def _fixed_names(tree: Tree, look: Callable[[str], str]) -> tuple[str, ...]:
    found = network.fixed_names(look("/etc/udev/rules.d/70-persistent-net.rules"))
    links = [network.link_name(look(p)) for p in _configurations(tree, "/etc/systemd/network", (".link",))]
    return tuple(dict.fromkeys(filter(None, [*found, *links])))[:64]
