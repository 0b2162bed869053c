"""The checks: pure functions from what was found to findings.

Each takes the machine and the facts, and returns its findings: at least one wherever it has something to look at.
A check that can't know says so (`unknown`) rather than nothing. The names of checks are part of the JSON contract
(docs/preflight.md).
"""

from collections.abc import Callable, Sequence
from typing import Final

from drsync.preflight.checks.access import check_access, check_console
from drsync.preflight.checks.boot import check_boot_mode, check_loader, check_partition_table
from drsync.preflight.checks.drivers import check_ena, check_kernel, check_nvme
from drsync.preflight.checks.limits import check_devices, check_limits
from drsync.preflight.checks.mounts import check_encryption, check_fstab, check_root
from drsync.preflight.checks.network import check_network
from drsync.preflight.checks.reading import check_reading
from drsync.preflight.checks.system import check_architecture, check_file_systems, check_os_list
from drsync.preflight.checks.windows import check_windows
from drsync.preflight.facts import Facts
from drsync.preflight.findings import Finding
from drsync.preflight.machine import Machine

Check = Callable[[Machine, Facts], Sequence[Finding]]

EC2_CHECKS: Final[tuple[Check, ...]] = (
    check_reading,
    check_architecture,
    check_boot_mode,
    check_partition_table,
    check_loader,
    check_kernel,
    check_nvme,
    check_ena,
    check_root,
    check_fstab,
    check_encryption,
    check_network,
    check_console,
    check_access,
    check_windows,
    check_file_systems,
    check_os_list,
    check_limits,
    check_devices,
)
"""In the order of a boot."""
