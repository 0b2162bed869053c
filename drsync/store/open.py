"""From a URL to the store that it names."""

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from drsync.errors import StoreMisconfigured
from drsync.model import NoPace, Pace
from drsync.store import ObjectStore
from drsync.store.directory import DirectoryStore
from drsync.store.lock import LockPolicy
from drsync.store.paced import PacedStore


def open_store(
    url: str,
    *,
    endpoint_url: str | None,
    region: str | None,
    pace: Pace | None = None,
    read_pace: Pace | None = None,
    lock: LockPolicy | None = None,
) -> ObjectStore:
    """The store at `url`: "file:///absolute/path" or "s3://bucket/prefix". Nothing is read or written yet.

    `endpoint_url`, `region` and `lock` matter to S3 stores only. What is written keeps to
    `pace`, what is read to `read_pace`. It does not retry: wrap it in a RetryingStore.

    Raises:
        StoreMisconfigured: the URL can't be used.
    """
    try:
        parts = urlsplit(url)
    except ValueError as err:
        raise StoreMisconfigured(url=_shown(url), problem=str(err)) from err
    if parts.query or parts.fragment or parts.scheme not in {"file", "s3"}:
        problem = "it must be file:///absolute/path or s3://bucket/prefix (write ? as %3F and # as %23)"
        raise StoreMisconfigured(url=_shown(url), problem=problem)
    if parts.scheme == "file":
        directory = _open_directory(url, parts.netloc, unquote(parts.path))
        if pace is None and read_pace is None:
            return directory
        return PacedStore(directory, pace or NoPace(), read_pace or NoPace())
    # boto3 takes a third of a second to import, which only those who use S3 shall pay.
    from drsync.store.s3 import S3Options, S3Store  # noqa: PLC0415

    if "@" in parts.netloc:
        problem = "credentials do not belong in it; boto3 finds them in the environment or in ~/.aws"
        raise StoreMisconfigured(url=_shown(url), problem=problem)
    options = S3Options(bucket=parts.netloc, prefix=parts.path.strip("/"), endpoint_url=endpoint_url, region=region)
    return S3Store(options, pace=pace, read_pace=read_pace, lock=lock)


def _open_directory(url: str, host: str, path: str) -> DirectoryStore:
    if host not in {"", "localhost"}:
        raise StoreMisconfigured(url=_shown(url), problem="a file URL has three slashes and an absolute path")
    if not path.startswith("/") or "\0" in path or not path.strip("/"):
        raise StoreMisconfigured(url=_shown(url), problem="it does not name a directory")
    return DirectoryStore(Path(path))


def _shown(url: str) -> str:
    """The URL for a message, without what may be a password."""
    return re.sub(r"//[^/@]*@", "//***@", url)
