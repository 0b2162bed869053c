"""How a person gets in."""

from collections.abc import Sequence

from drsync.preflight.checks.network import knows_ec2
from drsync.preflight.facts import Facts, Linux
from drsync.preflight.findings import Finding, ok, unknown, warning
from drsync.preflight.machine import Machine


def check_console(_machine: Machine, facts: Facts) -> Sequence[Finding]:
    """Whether EC2's serial console shows the boot, and offers a login."""
    if facts.linux:
        return [_console_of(linux, linux.command_lines) for linux in facts.linux]
    return [_console_of(None, volume.command_lines) for volume in facts.loose]


def _console_of(linux: Linux | None, lines: Sequence[str]) -> Finding:
    check = "console"
    if any("console=ttyS0" in line for line in lines):
        return ok(check, "the kernel's messages and a login are on the serial console (ttyS0)")
    action = (
        'in the guest: GRUB_CMDLINE_LINUX="console=tty0 console=ttyS0,115200" in /etc/default/grub, then update-grub'
    )
    if linux is not None and linux.serial_getty:
        return warning(check, "the serial console has a login, but the boot's messages are not seen there", action)
    if not lines:
        return unknown(check, "no configuration of a boot loader was found", action)
    return warning(check, "nothing is on the serial console: if it does not come up, nothing tells why", action)


def check_access(_machine: Machine, facts: Facts) -> Sequence[Finding]:
    """Whether there is SSH, and cloud-init to bring keys."""
    return [_access_of(linux) for linux in facts.linux]


def _access_of(linux: Linux) -> Finding:
    check = "access"
    if linux.cloud_init and not knows_ec2(linux):
        reason = f"cloud-init looks for {', '.join(linux.datasources)} only: it brings no keys, and may wait at boot"
        return warning(check, reason, "in the guest: add Ec2 to datasource_list in /etc/cloud/cloud.cfg.d")
    if linux.sshd and linux.sshd_enabled:
        keys = "; cloud-init adds the instance's key" if linux.cloud_init else ""
        return ok(check, f"an SSH server starts at boot{keys}")
    if linux.sshd:
        return warning(
            check, "an SSH server is installed, but does not start by itself", "in the guest: systemctl enable ssh"
        )
    return warning(check, "there is no SSH server", "have another way in: the serial console with a password, or SSM")
