"""The configuration file: TOML in, frozen values out.

    key.py        how one value is read
    settings.py   every key: name, default, and why that default; vms.py has those of [[vm]] and [[protect]],
                  limits.py of [limits], retention.py and prune.py of theirs
    plan.py       a recovery plan, a file of its own; plan_sites.py its sites, plan_values.py its values
    reading.py    the whole file, with all of its problems

Every message names the key, where it stands, its value and what is right.
"""

from pathlib import Path
from typing import Final

from drsync.config.limits import LimitsSettings
from drsync.config.prune import PruneSettings
from drsync.config.reading import load_config, parse_config
from drsync.config.retention import Retention
from drsync.config.settings import CloudSettings, Config, DaemonSettings, RepositorySettings, SpoolSettings
from drsync.config.vms import LibvirtSource, ProtectSettings, QmpSource, VmSettings, captured_together

DEFAULT_PATH: Final = Path("/etc/drsync/drsync.toml")
"""Where the file is when neither --config nor DRSYNC_CONFIG names one."""

__all__ = [
    "DEFAULT_PATH",
    "CloudSettings",
    "Config",
    "DaemonSettings",
    "LibvirtSource",
    "LimitsSettings",
    "ProtectSettings",
    "PruneSettings",
    "QmpSource",
    "RepositorySettings",
    "Retention",
    "SpoolSettings",
    "VmSettings",
    "captured_together",
    "load_config",
    "parse_config",
]
