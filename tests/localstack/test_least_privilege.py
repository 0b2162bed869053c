"""Every request that drsync sends is allowed by its role's policy, and nothing in the policy is for nothing.

LocalStack enforces no policies. So the requests are recorded, and the policies evaluated (iam_evaluator.py).
"""

import copy
import hashlib
import re
from collections.abc import Callable
from typing import Any

import pytest
from ec2_lab import Cloud
from iam_evaluator import Asked, is_allowed, needs, operations_of, refused
from s3_lab import ROOT, Bucket

from drsync.errors import CloudError, GuestNotImportable
from drsync.model import BLOCK_SIZE, SystemClock
from drsync.store.s3 import S3Options, S3Store
from drsync.target.ec2.aws import Aws, Call
from drsync.target.ec2.import_kinds import ImageTasks
from drsync.target.ec2.import_task import (
    DiskImport,
    ImageImport,
    ImportPlace,
    Tuning,
    import_disk,
    import_image,
    remove_leftovers,
    upload_disk,
)
from drsync.target.ec2.policy import IMPORTED, Document, Role, Scope, policy
from drsync.target.ec2.role import ImportSetup, account_of
from drsync.units import MiB

pytestmark = pytest.mark.localstack

FAST = Tuning(part_bytes=5 * MiB, journal_every_s=0, poll_first_s=0.05, poll_longest_s=0.2, time_limit_s=60)
IMPORT_MODULES = ("upload.py", "import_task.py", "import_kinds.py")


def actions(document: Document) -> set[str]:
    return {one for statement in document["Statement"] if statement["Effect"] == "Allow" for one in statement["Action"]}


def without(document: Document, action: str) -> Document:
    """A policy that lacks one action."""
    made = copy.deepcopy(document)
    for statement in made["Statement"]:
        if statement["Effect"] == "Allow":
            statement["Action"] = [one for one in statement["Action"] if one != action]
    return made


def disk(name: str, read: Callable[[int], Any]) -> tuple[DiskImport, Callable[[int], Any]]:
    return DiskImport(name=name, size_bytes=MiB, data_bytes=BLOCK_SIZE, tags={"drsync:vm": "vm"}), read


def bootable(_first: int) -> list[tuple[int, bytes]]:
    block = bytearray(BLOCK_SIZE)
    block[450], block[510:512] = 0x83, b"\x55\xaa"
    return [(0, bytes(block))]


def broken(_first: int) -> list[tuple[int, bytes]]:
    raise OSError("the repository is gone")


@pytest.fixture
def place(cloud: Cloud) -> ImportPlace:
    cloud.s3.create_bucket(Bucket=f"import-{cloud.account}")
    cloud.make_role()
    return ImportPlace(bucket=f"import-{cloud.account}")


def import_in_every_way(cloud: Cloud, aws: Aws, place: ImportPlace) -> None:
    """Imports that go well, fail, are cancelled and taken up again, until all that the code can send was sent."""
    clock = SystemClock()
    snapshot_disk, read = disk("a", bootable)
    for _ in range(2):  # the second finds the task of the first
        import_disk(aws, place, snapshot_disk, read, clock=clock, tuning=FAST)
    source = upload_disk(aws, place, *disk("b", bootable), clock=clock, tuning=FAST)
    for _ in range(2):
        import_image(aws, place, ImageImport(name="image"), [source], clock=clock, tuning=FAST)
    source = upload_disk(aws, place, *disk("c", lambda _: [(5, b"x" * BLOCK_SIZE)]), clock=clock, tuning=FAST)
    with pytest.raises(GuestNotImportable):  # what the task has made is removed
        import_image(aws, place, ImageImport(name="no-image"), [source], clock=clock, tuning=FAST)
    kept = ImportPlace(bucket=place.bucket, keep_on_error=True)
    with pytest.raises(OSError, match="is gone"):  # an upload is begun, looked for again, and aborted
        upload_disk(aws, kept, *disk("d", broken), clock=clock, tuning=FAST)
    with pytest.raises(OSError, match="is gone"):
        upload_disk(aws, place, *disk("d", broken), clock=clock, tuning=FAST)
    cancel_an_image(cloud, aws, place)
    cloud.faults(import_step_s=30)
    kept_timeout = Tuning(poll_first_s=0.05, poll_longest_s=0.05, time_limit_s=0.2)
    with pytest.raises(CloudError):
        import_disk(aws, kept, *disk("e", bootable), clock=clock, tuning=kept_timeout)
    cloud.faults()
    remove_leftovers(aws, place, ["e"], clock=clock, tuning=FAST)


def cancel_an_image(cloud: Cloud, aws: Aws, place: ImportPlace) -> None:
    """A task that completes just when it is to be cancelled: its image goes."""
    tasks = ImageTasks(aws, "image")
    (done,) = tasks.known()
    tasks.remove_result(done)
    assert not cloud.ec2.describe_images(Owners=["self"], Filters=[{"Name": "image-id", "Values": [done.image_id]}])[
        "Images"
    ]


def scope(bucket: str) -> Scope:
    return Scope(repository_bucket="repository", repository_prefix="site", import_bucket=bucket)


def test_recovery_may_send_all_that_an_import_sends_and_needs_all_that_it_may(
    cloud: Cloud, aws: Aws, place: ImportPlace, calls: list[Call]
) -> None:
    import_in_every_way(cloud, aws, place)
    sent = {call.operation for call in calls}
    assert {name for _, name in operations_of(*IMPORT_MODULES)} <= sent, (
        "a request of the code was not driven by this test"
    )
    document = policy(Role.RECOVERY, scope(place.bucket))
    tags = {IMPORTED: "x"}
    assert refused(document, calls, tags) == []
    check_tagged_before_removed(calls)
    imports = {one for s in document["Statement"] if s["Sid"] in IMPORT_SIDS for one in s["Action"]}
    for action in imports - {"ec2:DescribeImages"}:
        assert refused(without(document, action), calls, tags), f"{action} is for nothing"
    for other in (Role.HOST, Role.CLOUD_SYNC, Role.PRUNE):
        assert len(refused(policy(other, scope(place.bucket)), calls, tags)) >= len(calls) / 2


IMPORT_SIDS = (
    "FindUploads",
    "HandOverImages",
    "Import",
    "CancelImports",
    "TagImports",
    "RemoveImported",
    "LetVmImportRead",
)


def check_tagged_before_removed(calls: list[Call]) -> None:
    """What VM Import makes has no tags: the order of the requests is what lets it be deleted."""
    tagged: set[str] = set()
    for call in calls:
        if call.operation == "CreateTags":
            tagged |= set(call.parameters["Resources"])
        elif call.operation in ("DeleteSnapshot", "DeregisterImage"):
            removed = call.parameters.get("SnapshotId") or call.parameters["ImageId"]
            assert removed in tagged


def test_setup_may_do_all_that_it_does_and_nothing_else(cloud: Cloud, aws: Aws, calls: list[Call]) -> None:
    where = Scope(repository_bucket="r", import_bucket=f"setup-{cloud.account}", account=account_of(aws))
    setup = ImportSetup(aws, where)
    setup.apply()
    cloud.iam.delete_role_policy(RoleName="vmimport", PolicyName="drsync-vmimport")
    setup.findings()
    assert operations_of("role.py") == {(call.service, call.operation) for call in calls}
    document = policy(Role.SETUP, Scope(repository_bucket="r", import_bucket=where.import_bucket))
    assert refused(document, calls) == []
    for action in actions(document) - {"s3:ListBucket"}:
        assert refused(without(document, action), calls), f"{action} is for nothing"


def recorded(store: S3Store) -> list[Call]:
    """The requests that a store sends from now on."""
    found: list[Call] = []
    client = store._client
    client.meta.events.register(
        "provide-client-params.s3", lambda params, model, **_: found.append(Call("s3", model.name, dict(params)))
    )
    return found


def test_a_host_may_do_all_that_its_store_does_and_nothing_else(bucket: Bucket) -> None:
    store = S3Store(S3Options(bucket=bucket.name, prefix="site", endpoint_url=bucket.endpoint_url))
    calls = recorded(store)
    for key in ("vm/web/log/0000000000000001", "vm/web/pack/1", "vm/web/map/1-2"):
        store.create(key, b"abc", sha256=hashlib.sha256(b"abc").digest())
    store.replace("host/alpha.json", b"abc")
    store.get("repo.json", limit_bytes=10)
    store.get_range("repo.json", 1, 2)
    store.get_range("repo.json", 1, 0)
    store.get_tail("repo.json", 0)
    store.get_tail("repo.json", 2)
    list(store.list("vm/web/log/"))
    assert {call.operation for call in calls} == {"PutObject", "GetObject", "HeadObject", "ListObjectsV2"}
    source = (ROOT / "drsync/store/s3.py").read_text()
    used = set(re.findall(r"_client\.([a-z_0-9]+)\(", source))
    assert used == {"put_object", "get_object", "head_object", "list_objects_v2"}, "the test must drive it, too"
    document = policy(Role.HOST, Scope(repository_bucket=bucket.name, repository_prefix="site"))
    assert refused(document, calls) == []
    for action in actions(document):
        assert refused(without(document, action), calls), f"{action} is for nothing"
    calls.clear()
    store.replace("vm/web/log/0000000000000001", b"abc")
    assert refused(document, calls), "a point can't be overwritten"


def test_what_the_evaluator_does_not_know_is_an_error() -> None:
    with pytest.raises(NotImplementedError):
        list(needs(Call("ec2", "DeleteVpc", {}), {}))
    with pytest.raises(NotImplementedError):
        document = {
            "Statement": [
                {"Effect": "Allow", "Action": "a", "Resource": "*", "Condition": {"NumericEquals": {"x": "1"}}}
            ]
        }
        is_allowed(document, Asked(action="a", resource="b"))
