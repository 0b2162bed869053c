"""JSON of the repository: repo.json, slots, heartbeats, headers and metadata, all hostile."""

from typing import TypeVar

import msgspec

from drsync.format import Malformed

_Record = TypeVar("_Record", bound=msgspec.Struct)


def decode_record(raw: bytes, kind: type[_Record]) -> _Record:
    """The record in `raw`.

    Raises:
        Malformed: it is not one of this kind. That is also what JSON becomes
            that is not UTF-8, or nested so deep that reading it would fail.
    """
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as err:
        raise Malformed(f"it is not a {kind.__name__}") from err
