"""Where objects live."""

from drsync.errors.base import DrsyncError


class StoreError(DrsyncError):
    """Where objects live."""


class StoreUnavailable(StoreError):
    """The store did not answer, or answered that it can't now; a write may or may not have happened."""

    code = 30
    retryable = True
    template = "store {url} does not work now: {problem}"
    remedy_template = "drsync config check   (what waits in the spool is shipped when the store answers again)"


class StoreDenied(StoreError):
    """The store refuses these credentials (none, wrong, expired, or not allowed this)."""

    code = 31
    template = "store {url} refuses {operation}: {problem}"
    remedy_template = "aws sts get-caller-identity   (then check the credentials and the bucket's policy)"


class ObjectMissing(StoreError):
    """The object is not there."""

    code = 32
    template = "object {key} is missing from {url}"
    remedy_template = "drsync verify"


class ObjectExists(StoreError):
    """An object with this key is there already; it was left as it is."""

    code = 33
    template = "object {key} exists in {url} already"
    remedy_template = "drsync verify"


class StoreUnsafe(StoreError):
    """The store overwrote an object that it was told only to create: points could be lost on it."""

    code = 34
    template = "store {url} does not honour create-only writes (If-None-Match): two writers could overwrite each other"
    remedy_template = "use a store that does (docs/stores.md lists them), then: drsync config check"


class StoreFull(StoreError):
    """No room is left where objects live."""

    code = 35
    retryable = True
    template = "store {url} is full: {problem}"
    remedy_template = "df -h {path}"


class StoreMisconfigured(StoreError):
    """The URL, bucket or region is not one that can be used."""

    code = 36
    template = "store {url}: {problem}"
    remedy_template = "drsync config check"


class KeyUnusable(StoreError):
    """No object can have this key; it may come from a damaged or hostile repository."""

    code = 37
    template = "{key} can't name an object in {url}"
    remedy_template = "drsync verify"


class DirectoryDenied(StoreDenied):
    """The file system refuses drsync access to the directory where objects live."""

    code = 38
    template = "store {url} refuses {operation}: {problem}"
    remedy_template = "ls -ld {path}   (drsync's user must own it, and its file system must be writable)"
