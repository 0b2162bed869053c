"""What the user wrote."""

from drsync.errors.base import DrsyncError


class ConfigError(DrsyncError):
    """What the user wrote can't be used."""


class ConfigMissing(ConfigError):
    """There is no configuration file at the path."""

    code = 10
    template = "no configuration file at {path}"
    remedy_template = "drsync --config FILE config check   (examples/drsync.toml shows every key)"


class ConfigInvalid(ConfigError):
    """The configuration file has a key or value that can't be used."""

    code = 11
    template = "{path}: {problem}"
    remedy_template = "edit {path}, then: drsync --config {path} config check"


class UnknownVm(ConfigError):
    """A command names a VM that is not configured (or, for reading, not in the repository)."""

    code = 12
    template = "no VM named {vm}; there are: {known}"
    remedy_template = "drsync config check"


class UnknownPoint(ConfigError):
    """A command asks for a point that the VM's log does not have."""

    code = 13
    template = "VM {vm} has no point {wanted}; it has {known}"
    remedy_template = "drsync points {vm}"


class UnknownDisk(ConfigError):
    """A command asks for a disk that the point does not have."""

    code = 14
    template = "point {point} of VM {vm} has no disk {disk}; it has {known}"
    remedy_template = "drsync points {vm} --json"


class PlanInvalid(ConfigError):
    """The recovery plan has a key or value that can't be used."""

    code = 18
    template = "{path}: {problem}"
    remedy_template = "edit {path}, then: drsync restore --plan {path} --dry-run   (docs/plan.md has every key)"


class UnknownSlot(ConfigError):
    """A command names a key slot that the repository does not have, or that can't be used so."""

    code = 15
    template = "the repository has no slot {slot} {use}; it has {known}"
    remedy_template = "drsync key list"


class SlotNeeded(ConfigError):
    """The last recovery slot can't be removed: without it the repository would depend on a service or a memory."""

    code = 16
    template = "{slot} is the last recovery slot, which can't be removed"
    remedy_template = "drsync key add recovery   (makes another one first)"


class PassphraseUnusable(ConfigError):
    """The passphrase can't be taken: too short, or the two that were typed differ; nothing was changed."""

    code = 17
    template = "the passphrase can't be used: {problem}"
    remedy_template = (
        "drsync key add passphrase   (with one of {least} characters or more, for example six random words)"
    )


class SlotExists(ConfigError):
    """A key slot of that name is there already, or there are as many as there can be; nothing was changed."""

    code = 19
    template = "slot {slot} can't be added: {problem}"
    remedy_template = "drsync key add --name NAME   (another name; drsync key list shows those that are taken)"
