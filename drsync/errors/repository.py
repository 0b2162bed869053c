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
    """What was given is not the recovery key of this repository."""

    code = 27
    template = "the recovery key does not open the repository at {url}: {problem}"
    remedy_template = "drsync key recover   (type the key as `drsync init` printed it)"
