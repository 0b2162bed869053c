"""The repository as a whole, and its key."""

from drsync.errors.base import DrsyncError


class RepositoryError(DrsyncError):
    """The repository as a whole, or its key."""


class RepositoryMissing(RepositoryError):
    """There is no repository at the URL."""

    code = 20
    template = "no repository at {url}"
    remedy_template = "drsync init   (or set [repository] url to the one that exists)"


class RepositoryExists(RepositoryError):
    """A repository is there already; it was left as it is."""

    code = 21
    template = "a repository exists at {url} already"
    remedy_template = (
        "drsync key recover   (to use it here; or set [repository] url to an empty place, then: drsync init)"
    )


class RepositoryTooNew(RepositoryError):
    """The repository needs a newer drsync; nothing was read or written."""

    code = 22
    template = "repository at {url} needs {needed}, which this drsync does not know"
    remedy_template = "pip install --upgrade drsync"


class WrongKey(RepositoryError):
    """The key is not this repository's; nothing was read or written."""

    code = 23
    template = "the key in {path} does not open the repository at {url}"
    remedy_template = "drsync key recover   (writes the right key file from the recovery key)"


class KeyFileMissing(RepositoryError):
    """There is no key file at the path, or it can't be read."""

    code = 24
    template = "no usable key file at {path}: {problem}"
    remedy_template = "drsync key recover   (writes it from the recovery key)"


class KeyFileExists(RepositoryError):
    """A key file is there already; it was left as it is, since it may be the only copy."""

    code = 25
    template = "a key file exists at {path} already"
    remedy_template = "mv {path} {path}.old   (then run the command again)"


class KeyFileExposed(RepositoryError):
    """Others than its owner may read the key file."""

    code = 26
    template = "key file {path} has mode {mode}: others can read it"
    remedy_template = "chmod 600 {path}"


class WrongRecoveryKey(RepositoryError):
    """What was given is not the recovery key, or passphrase, of this repository."""

    code = 27
    template = "the {what} does not open the repository at {url}: {problem}"
    remedy_template = "drsync key list   (shows what opens it; type the recovery key as it was printed)"


class KeyMissing(RepositoryError):
    """The key file has not the key that this needs: of another VM, or of a newer generation; nothing was changed."""

    code = 28
    template = "the key file {path} has no {wanted}; it has {held}"
    remedy_template = (
        "drsync key export {vm} --output FILE   (where the root key is; FILE then goes in the place of this host's "
        "key file. A host that has the root key: drsync key recover)"
    )


class KmsUnusable(RepositoryError):
    """KMS does not wrap or open a slot: access denied, key deleted or disabled, or nobody answers."""

    code = 29
    template = "slot {slot}: KMS can't {operation} with key {key}: {problem}"
    remedy_template = (
        "drsync key recover --unlock recovery   (opens the repository without KMS; `drsync key remove {slot}` takes "
        "the slot out)"
    )
