"""Configuration files, rewritten for EC2. Pure: texts in, texts out."""

import re
from collections.abc import Callable, Sequence
from typing import Final

_KERNEL_NAME: Final = re.compile(r"/dev/(?:(?:sd|vd|hd|xvd)[a-z]+\d*|nvme\d+n\d+(?:p\d+)?|disk/by-(?:path|id)/\S+)$")
_REMOVABLE: Final = re.compile(r"/dev/(?:sr\d+|cdrom|dvd|fd\d+)$")
_OF_THE_HOST: Final = frozenset({"9p", "virtiofs", "vboxsf"})
CONSOLE: Final = "console=tty0 console=ttyS0,115200"
DRIVERS: Final = ("nvme", "ena")

NETPLAN: Final = """# Written by drsync for EC2: any interface, by DHCP. What was here before is beside it, as *.drsync.
network:
  version: 2
  ethernets:
    ec2:
      match: {name: "e*"}
      dhcp4: true
      dhcp6: true
      dhcp-identifier: mac
"""
NETWORKD: Final = """# Written by drsync for EC2: any interface, by DHCP.
[Match]
Name=e*

[Network]
DHCP=yes
"""
NETWORK_MANAGER: Final = """# Written by drsync for EC2: any interface, by DHCP.
[connection]
id=drsync-ec2
type=ethernet
autoconnect-priority=999
multi-connect=3

[ipv4]
method=auto

[ipv6]
method=auto
"""
IFUPDOWN: Final = """# Written by drsync for EC2: by DHCP, whatever it is called. Before: interfaces.drsync
auto lo
iface lo inet loopback

allow-hotplug ens5
iface ens5 inet dhcp

allow-hotplug eth0
iface eth0 inet dhcp
"""


def ifcfg(name: str) -> str:
    """An ifcfg file for an interface, by DHCP."""
    return f"# Written by drsync for EC2.\nDEVICE={name}\nTYPE=Ethernet\nBOOTPROTO=dhcp\nONBOOT=yes\n"


def fstab_by_uuid(text: str, uuid_of: Callable[[str], str]) -> tuple[str, Sequence[str]]:
    """fstab(5) with UUIDs in place of devices' names, and what was changed.

    A device that is not among the disks gets `nofail`, so that the boot does not stop at it; so do directories of the
    host's. Every other line stays as it is, to the letter.
    """
    lines, changes = [], list[str]()
    for line in text.splitlines():
        new, change = _fstab_line(line, uuid_of)
        lines.append(new)
        changes += [change] if change else []
    return "\n".join(lines) + "\n", changes


def _fstab_line(line: str, uuid_of: Callable[[str], str]) -> tuple[str, str]:
    words = line.split()
    if len(words) < 3 or words[0].startswith("#") or _REMOVABLE.match(words[0]):
        return line, ""
    source, target, kind = words[:3]
    if kind in _OF_THE_HOST:
        return _with_nofail(line, words)
    if not _KERNEL_NAME.match(source):
        return line, ""
    uuid = uuid_of(source)
    if not uuid:
        return _with_nofail(line, words)
    start = line.index(source)
    return f"{line[:start]}UUID={uuid}{line[start + len(source) :]}", f"{target}: {source} is now UUID={uuid}"


def _with_nofail(line: str, words: Sequence[str]) -> tuple[str, str]:
    options = words[3].split(",") if len(words) > 3 else ["defaults"]
    if "nofail" in options or "noauto" in options:
        return line, ""
    new = [*words[:3], ",".join([*options, "nofail"]), *(words[4:6] or ["0", "0"])]
    return "\t".join(new), f"{words[1]}: {words[0]} is not there in EC2; nofail"


def grub_defaults(text: str, root_uuid: str) -> tuple[str, Sequence[str]]:
    """/etc/default/grub with a serial console, and with the root by UUID; and what was changed."""
    changes: list[str] = []
    lines: list[str] = []
    for line in text.splitlines():
        if re.match(r"\s*GRUB_DISABLE_(?:LINUX_UUID|UUID)=[\"']?true", line):
            changes.append("the root is named by UUID")
            line = f"#{line}"  # noqa: PLW2901 - the line as it goes on
        match = re.match(r"(GRUB_CMDLINE_LINUX(?:_DEFAULT)?)=([\"']?)(.*?)\2\s*$", line)
        if match:
            words = [_argument(word, root_uuid, changes) for word in match[3].split()]
            line = f'{match[1]}="{" ".join(filter(None, words))}"'  # noqa: PLW2901 - as above
        lines.append(line)
    if not any(re.match(r"GRUB_CMDLINE_LINUX(?:_DEFAULT)?=.*console=ttyS0", line) for line in lines):
        lines.append(f'GRUB_CMDLINE_LINUX="$GRUB_CMDLINE_LINUX {CONSOLE}"')
        changes.append("the console is on ttyS0, too")
    return "\n".join(lines) + "\n", changes


def _argument(word: str, root_uuid: str, changes: list[str]) -> str:
    key, _, value = word.partition("=")
    if key == "root" and _KERNEL_NAME.match(value) and root_uuid:
        changes.append(f"root={value} is now by UUID")
        return f"root=UUID={root_uuid}"
    if key == "resume" and _KERNEL_NAME.match(value):
        changes.append(f"resume={value} is left out")
        return ""
    return word


def with_lines(text: str, wanted: Sequence[str]) -> str:
    """A text with each of these lines in it."""
    held = [line.strip() for line in text.splitlines()]
    missing = [line for line in wanted if line not in held]
    return "\n".join([*text.splitlines(), *missing]) + "\n" if missing else text
