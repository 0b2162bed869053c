"""Bytes at rest: the twin of docs/format.md, which describes each byte.

keys.py      root key → VM key → object keys, of each generation; recovery key
keytext.py   the text of a key file: the root keys, or the keys of some VMs
ring.py      the key ring: all root keys, and the slots that open it (recovery, passphrase, KMS)
names.py     the names of objects; the only place that builds one
record.py    JSON, decoded
frame.py     one block: compressed, encrypted
seal.py      what segments, packs and maps have in common: frames, header, sealed index, footer
segment.py   the index of a segment or pack: metadata and columns
blockmap.py  pages and index of a block map
horizon.py   which points survive, and what stands for the others
columns.py   numbers back to back, each column checked against the bytes that are there

Everything read is hostile until authenticated: sizes are bounded before they
are used, and what does not fit raises `Malformed`, which the reader of the
object turns into an ObjectDamaged that names it.
"""

from typing import Final

FORMAT_VERSION: Final = 1
"""The version of docs/format.md that this code writes. A reader refuses higher ones."""

FEATURES: Final[frozenset[str]] = frozenset()
"""Required features that this code knows; a repository that lists another one is refused."""


class Malformed(ValueError):
    """Bytes do not follow docs/format.md; the message says which rule, never the content."""
