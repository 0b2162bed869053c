"""Which blocks of an EBS snapshot hold data, or differ from an older one; and those blocks, checked.

    ListChangedBlocks   older ─┬─▶ pages of indexes, with a token to read each ─▶ GetSnapshotBlock ─▶ SHA-256
    ListSnapshotBlocks  alone ─┘

AWS's rules (EBS direct API reference): only completed snapshots are read; a page has 100 to 10,000 blocks, or none
although there is a next one; a block that the newer snapshot lacks has no token there, and reads as zeros; tokens of
blocks hold for 7 days, those of pages for an hour. Two snapshots can be compared if they are of one lineage, else the
reason is UNRELATED_SNAPSHOTS. A snapshot of a volume that was made from a snapshot is of its lineage (EBS user guide,
"Incremental snapshots"); it was not tried on AWS.

Tokens are long, and a listing may have millions of them. So of a listing only the indexes are kept, 4 bytes each, and
tokens are listed again page by page while blocks are read; that is also why none of them gets too old.
"""

import base64
import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from drsync.errors import BlockUnreadable, CloudNotFound, CloudRefused, CloudUnavailable
from drsync.model import NoPace, Pace
from drsync.target.ec2.aws import Aws
from drsync.target.ec2.snapshot import BLOCK_BYTES, ZERO_BLOCK, Indexes

LISTED_AT_ONCE: Final = 10_000
TOKENS_AT_ONCE: Final = 1000
"""Of a page that is listed for its tokens: 500 MiB, one listing to a thousand blocks."""
_PAGES: Final = 4
_TRIES: Final = 4
"""Of a body that breaks off or is not what its checksum says: botocore repeats requests, not the reading of answers."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """A completed snapshot, and the older one that it is compared with; alone, all that it holds counts."""

    snapshot: str
    older: str | None = None


@dataclass(frozen=True, slots=True)
class _Page:
    first: int
    end: float
    """The first index behind the page; infinity: it is the last one."""
    tokens: dict[int, str]


class ChangedBlocks:
    """The blocks of one comparison. May be used from several threads."""

    def __init__(
        self,
        aws: Aws,
        comparison: Comparison,
        *,
        pace: Pace | None = None,
        tokens_at_once: int = TOKENS_AT_ONCE,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`pace` holds the bytes that are read."""
        self._aws = aws
        self.comparison = comparison
        self._pace = pace or NoPace()
        self._tokens_at_once = tokens_at_once
        self._sleep = sleep
        self._pages: OrderedDict[int, _Page] = OrderedDict()
        self._lock = threading.Lock()
        self._count_lock = threading.Lock()
        self.list_requests = self.get_requests = 0
        """How many were sent, for their costs."""

    def indexes(self) -> Indexes:
        """The blocks that differ, or all that hold anything, ascending.

        Raises:
            CloudRefused: the two are not of one lineage (see `is_unrelated`), or one is not completed.
            CloudError: AWS can't be asked.
        """
        found = [np.fromiter((index for index, _ in page), np.uint32) for page, _ in self._listing(0, LISTED_AT_ONCE)]
        return np.unique(np.concatenate([np.zeros(0, np.uint32), *found])).astype(np.uint32)

    def read(self, index: int) -> bytes:
        """A block: 512 KiB, zeros if the snapshot has none there.

        Raises:
            BlockUnreadable: it does not arrive as AWS says that it is.
            CloudError: AWS refuses, or does not answer.
        """
        token = self._token(index)
        return ZERO_BLOCK if token is None else self._read(index, token)

    def _read(self, index: int, token: str) -> bytes:
        retrying = Retrying(
            retry=retry_if_exception_type((CloudUnavailable, BlockUnreadable)),
            stop=stop_after_attempt(_TRIES),
            wait=wait_random_exponential(multiplier=0.2, max=5.0),
            reraise=True,
            sleep=self._sleep,
        )
        return retrying(self._read_once, index, token)

    def _read_once(self, index: int, token: str) -> bytes:
        self._pace.take(BLOCK_BYTES)
        snapshot = self.comparison.snapshot
        with self._count_lock:
            self.get_requests += 1
        with self._aws.translated(f"GetSnapshotBlock {snapshot}/{index}"):
            answer = self._aws.ebs.get_snapshot_block(SnapshotId=snapshot, BlockIndex=index, BlockToken=token)
            data = answer["BlockData"].read(BLOCK_BYTES + 1)
        problem = _problem_of(data, answer)
        if problem:
            raise BlockUnreadable(index=index, snapshot=snapshot, region=self._aws.region, problem=problem)
        return data

    # Tokens

    def _token(self, index: int) -> str | None:
        with self._lock:
            page = next((p for p in self._pages.values() if p.first <= index < p.end), None)
            if page is None:
                page = self._page_from(index)
                self._pages[page.first] = page
                if len(self._pages) > _PAGES:
                    self._pages.popitem(last=False)
            return page.tokens.get(index)

    def _page_from(self, index: int) -> _Page:
        tokens: dict[int, str] = {}
        for blocks, is_last in self._listing(index, self._tokens_at_once):
            tokens = {number: token for number, token in blocks if token}
            if is_last:
                return _Page(index, float("inf"), tokens)
            if blocks:
                return _Page(index, blocks[-1][0] + 1, tokens)
        return _Page(index, float("inf"), tokens)

    def _listing(self, start: int, at_once: int) -> Iterator[tuple[list[tuple[int, str]], bool]]:
        """The pages from an index on, each with whether it is the last.

        A token is empty where the newer snapshot has no block, which reads as zeros.
        """
        request: dict[str, Any] = {"MaxResults": at_once, "StartingBlockIndex": start}
        while True:
            with self._count_lock:
                self.list_requests += 1
            blocks, next_token = self._page(request)
            yield blocks, next_token is None
            if next_token is None:
                return
            request = {"MaxResults": at_once, "NextToken": next_token}

    def _page(self, request: dict[str, Any]) -> tuple[list[tuple[int, str]], str | None]:
        snapshot, older = self.comparison.snapshot, self.comparison.older
        if older is None:
            with self._aws.translated(f"ListSnapshotBlocks {snapshot}"):
                held = self._aws.ebs.list_snapshot_blocks(SnapshotId=snapshot, **request)
            return [(block["BlockIndex"], block["BlockToken"]) for block in held["Blocks"]], held.get("NextToken")
        with self._aws.translated(f"ListChangedBlocks {older} {snapshot}"):
            found = self._aws.ebs.list_changed_blocks(FirstSnapshotId=older, SecondSnapshotId=snapshot, **request)
        changed = [(block["BlockIndex"], block.get("SecondBlockToken", "")) for block in found["ChangedBlocks"]]
        return changed, found.get("NextToken")


def is_unrelated(err: CloudRefused) -> bool:
    """Whether a comparison was refused since the two are not of one lineage, or the older one is not there."""
    return isinstance(err, CloudNotFound) or err.fields.get("reason") in ("UNRELATED_SNAPSHOTS", "SNAPSHOT_NOT_FOUND")


def _problem_of(data: bytes, answer: Any) -> str:
    """What is wrong with a block; empty if it is whole."""
    if len(data) != BLOCK_BYTES or answer["DataLength"] != BLOCK_BYTES:
        return f"it has {len(data)} bytes, not {BLOCK_BYTES}"
    if answer["ChecksumAlgorithm"] != "SHA256":
        return f"its checksum is a {answer['ChecksumAlgorithm']}"
    if base64.b64encode(hashlib.sha256(data).digest()).decode() != answer["Checksum"]:
        return "its bytes do not match its SHA-256"
    return ""
