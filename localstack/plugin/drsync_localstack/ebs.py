"""EBS direct as LocalStack serves it: catalog.py's rules behind botocore's shapes."""

import base64
import binascii
import bisect
from datetime import UTC, datetime
from typing import Any

from localstack.aws.api import RequestContext, handler

from drsync_localstack.blocks import BLOCK_BYTES
from drsync_localstack.catalog import Place, Snapshot, StartRequest
from drsync_localstack.ec2_snapshots import announce
from drsync_localstack.lab import Lab
from drsync_localstack.refusal import invalid
from drsync_localstack.translate import served

MIN_PAGE, MAX_PAGE = 100, 10000


class EbsProvider:
    """The six operations."""

    service = "ebs"
    version = "2019-11-02"

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.faults = lab.faults
        self.catalog = lab.catalog

    @handler("StartSnapshot", expand=False)
    @served
    def start_snapshot(self, context: RequestContext, request: Any) -> Any:
        place = Place(context.account_id, context.region)
        wanted = StartRequest(
            volume_gib=request["VolumeSize"],
            parent=request.get("ParentSnapshotId") or "",
            description=request.get("Description") or "",
            tags=tuple((tag["Key"], tag["Value"]) for tag in request.get("Tags") or ()),
            encrypted=request.get("Encrypted"),
            kms_key=request.get("KmsKeyArn") or "",
            timeout_min=request.get("Timeout", 60),
        )
        snapshot, is_new = self.catalog.start(place, wanted, request.get("ClientToken") or "")
        if is_new:
            announce(self.catalog, snapshot)
        return _started(snapshot)

    @handler("PutSnapshotBlock", expand=False)
    @served
    def put_snapshot_block(self, context: RequestContext, request: Any) -> Any:
        data = request["BlockData"]
        body = data if isinstance(data, bytes) else data.read(BLOCK_BYTES + 1)
        if request["DataLength"] != len(body):
            raise invalid(f"DataLength is {request['DataLength']}, but {len(body)} bytes were sent.", "INVALID_BLOCK")
        place = Place(context.account_id, context.region)
        digest = _digest(request["Checksum"])
        self.catalog.put(place, request["SnapshotId"], request["BlockIndex"], body, digest)
        return {"Checksum": request["Checksum"], "ChecksumAlgorithm": "SHA256"}

    @handler("CompleteSnapshot", expand=False)
    @served
    def complete_snapshot(self, context: RequestContext, request: Any) -> Any:
        checksum = request.get("Checksum")
        if checksum and request.get("ChecksumAggregationMethod", "LINEAR") != "LINEAR":
            raise invalid("The only aggregation method is LINEAR.")
        place = Place(context.account_id, context.region)
        aggregate = _digest(checksum) if checksum else None
        snapshot = self.catalog.complete(place, request["SnapshotId"], request["ChangedBlocksCount"], aggregate)
        return {"Status": snapshot.state.value}

    @handler("ListSnapshotBlocks", expand=False)
    @served
    def list_snapshot_blocks(self, context: RequestContext, request: Any) -> Any:
        snapshot = self.catalog.readable(Place(context.account_id, context.region), request["SnapshotId"])
        indexes = sorted(snapshot.blocks)
        page, answer = self._page(request, snapshot, snapshot.id, indexes)
        tokens = self.lab.tokens
        answer["Blocks"] = [{"BlockIndex": index, "BlockToken": tokens.block(snapshot.id, index)} for index in page]
        return answer

    @handler("ListChangedBlocks", expand=False)
    @served
    def list_changed_blocks(self, context: RequestContext, request: Any) -> Any:
        place = Place(context.account_id, context.region)
        first, second = request.get("FirstSnapshotId"), request["SecondSnapshotId"]
        snapshot, changes = self.catalog.changed(place, first, second)
        by_index = {index: (before, after) for index, before, after in changes}
        page, answer = self._page(request, snapshot, f"{first} {second}", list(by_index))
        answer["ChangedBlocks"] = []
        for index in page:
            before, after = by_index[index]
            change: dict[str, Any] = {"BlockIndex": index}
            if before is not None:
                change["FirstBlockToken"] = self.lab.tokens.block(first, index)
            if after is not None:
                change["SecondBlockToken"] = self.lab.tokens.block(second, index)
            answer["ChangedBlocks"].append(change)
        return answer

    @handler("GetSnapshotBlock", expand=False)
    @served
    def get_snapshot_block(self, context: RequestContext, request: Any) -> Any:
        index = request["BlockIndex"]
        snapshot = self.catalog.readable(Place(context.account_id, context.region), request["SnapshotId"])
        self.lab.tokens.check_block(request["BlockToken"], snapshot.id, index)
        block = snapshot.own.get(index) or snapshot.inherited[index]  # the token says that there is one
        return {
            "DataLength": BLOCK_BYTES,
            "BlockData": self.faults.as_read(self.catalog.store.read(block.digest)),
            "Checksum": base64.b64encode(block.digest).decode(),
            "ChecksumAlgorithm": "SHA256",
        }

    def _page(
        self, request: Any, snapshot: Snapshot, listing: str, indexes: list[int]
    ) -> tuple[list[int], dict[str, Any]]:
        """The blocks of one page of a listing, and what each answer has beside them."""
        limit = request.get("MaxResults", MAX_PAGE)
        if not MIN_PAGE <= limit <= MAX_PAGE:
            raise invalid(f"MaxResults is {MIN_PAGE} to {MAX_PAGE}.")
        token = request.get("NextToken")
        start = self.lab.tokens.check_page(token, listing) if token else request.get("StartingBlockIndex") or 0
        if not token and self.faults.settings.empty_pages:
            self.faults.note("empty_pages")
            limit = 0
        rest = indexes[bisect.bisect_left(indexes, start) :]
        answer: dict[str, Any] = {
            "VolumeSize": snapshot.request.volume_gib,
            "BlockSize": BLOCK_BYTES,
            "ExpiryTime": datetime.fromtimestamp(self.lab.tokens.expiry(), UTC),
        }
        if len(rest) > limit:
            answer["NextToken"] = self.lab.tokens.page(listing, rest[limit])
        return rest[:limit], answer


def _started(snapshot: Snapshot) -> dict[str, Any]:
    request = snapshot.request
    answer: dict[str, Any] = {
        "SnapshotId": snapshot.id,
        "OwnerId": snapshot.place.account,
        "Status": snapshot.state.value,
        "StartTime": datetime.fromtimestamp(snapshot.started_at, UTC),
        "VolumeSize": request.volume_gib,
        "BlockSize": BLOCK_BYTES,
    }
    if request.parent:
        answer["ParentSnapshotId"] = request.parent
    if request.description:
        answer["Description"] = request.description
    if request.tags:
        answer["Tags"] = [{"Key": key, "Value": value} for key, value in request.tags]
    if request.kms_key:
        answer["KmsKeyArn"] = request.kms_key
    return answer


def _digest(checksum: str) -> bytes:
    try:
        return base64.b64decode(checksum, validate=True)
    except binascii.Error:
        raise invalid("The checksum is not base64.") from None
