"""Which keys can name an object: one rule for every store, so that they all agree.

A key becomes an object name in S3 and a path in a directory store, and some keys
are read from the repository itself, which may be hostile. So the rule is strict:
parts of letters, digits and ``._-`` joined by single slashes, none of them
starting with a dot. That leaves no room for ``..``, absolute paths, NUL, or the
directory store's own ``.tmp``.
"""

import re

from drsync.errors import KeyUnusable

MAX_KEY_BYTES = 900
"""S3 takes 1024 bytes; the rest is left for the repository's prefix."""

MAX_PART_BYTES = 255
"""The longest file name of the usual file systems."""

_PART = r"[A-Za-z0-9_][A-Za-z0-9._-]*"
_KEY = re.compile(rf"{_PART}(?:/{_PART})*")


def is_key(text: str) -> bool:
    """Whether `text` can name an object."""
    return (
        len(text) <= MAX_KEY_BYTES
        and _KEY.fullmatch(text) is not None
        and all(len(part) <= MAX_PART_BYTES for part in text.split("/"))
    )


def check_key(key: str, url: str) -> None:
    """Refuse a key that can't name an object.

    Raises:
        KeyUnusable: nothing was read or written.
    """
    if not is_key(key):
        raise KeyUnusable(key=repr(key[:200]), url=url)


def check_folder(prefix: str, url: str) -> None:
    """Refuse what is no beginning of keys that ends with a slash; "" is one, too.

    Raises:
        KeyUnusable: nothing was listed.
    """
    check_prefix(prefix, url)
    if prefix and not prefix.endswith("/"):
        raise KeyUnusable(key=repr(prefix[:200]), url=url)


def check_prefix(prefix: str, url: str) -> None:
    """Refuse a prefix that no key can start with: "" and all that a key starts with are fine.

    Raises:
        KeyUnusable: nothing was listed.
    """
    if prefix:
        check_key(prefix.removesuffix("/"), url)
