"""Every request that drsync sends is allowed by its role's policy, and nothing in the policy is for nothing.

LocalStack enforces no policies. So the requests are recorded, and the policies evaluated (iam_evaluator.py).
"""

import copy
import hashlib
import re
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from ec2_lab import Cloud
from iam_evaluator import Asked, is_allowed, needs, operations_of, refused
from s3_lab import ROOT, Bucket

from drsync.errors import CloudError, GuestNotImportable
from drsync.locks import extend_locks
from drsync.model import BLOCK_SIZE, SystemClock
from drsync.store.lock import LockMode, LockPolicy
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


@pytest.fixture
def locked(localstack: str, bucket: Bucket) -> Bucket:
    """A bucket with Object Lock; it stays, since nobody can empty it. `bucket` brings the credentials."""
    bucket.client.create_bucket(Bucket=f"{bucket.name}-lock", ObjectLockEnabledForBucket=True)
    return Bucket(name=f"{bucket.name}-lock", endpoint_url=localstack, client=bucket.client)


def create(store: S3Store, *keys: str) -> None:
    for key in keys:
        store.create(key, b"abc", sha256=hashlib.sha256(b"abc").digest())


def read(store: S3Store, key: str) -> None:
    """In every way that the store has."""
    store.get(key, limit_bytes=10)
    store.get_range(key, 1, 2)
    store.get_range(key, 1, 0)
    store.get_tail(key, 0)
    store.get_tail(key, 2)
    list(store.list("vm/web/log/"))


def work_of_owner(store: S3Store) -> None:
    create(store, "repo.json", "keys/recovery-0.json", "vm/web/pin/0000000000000001")
    read(store, "keys/recovery-0.json")
    store.lock_support()
    store.lock_of("repo.json")


def work_of_host(store: S3Store) -> None:
    create(store, POINT, "vm/web/pack/1", "vm/web/map/1-2", "vm/web/damage/1-3")
    store.replace("host/alpha.json", b"abc")
    read(store, "repo.json")
    read(store, "vm/web/pack/1")
    store.lock_support()
    store.lock_of("repo.json")


def work_of_prune(store: S3Store) -> None:
    store._client.create_multipart_upload(Bucket=store._options.bucket, Key="site/vm/web/pack/2")
    create(store, "vm/web/pack/3", "vm/web/horizon/1", "vm/web/damage/2")
    read(store, POINT)
    store.delete("vm/web/map/1-2")
    (left,) = store.unfinished()
    store.abandon(left)
    extended = extend_locks(
        store, store, LockPolicy(mode=LOCK.mode, period=2 * LOCK.period), SystemClock(), budget_s=60
    )
    assert extended.extended
    assert extended.problem is None
    store.lock_support()


def work_of_verify(store: S3Store) -> None:
    read(store, POINT)
    create(store, "vm/web/damage/1")
    store.lock_support()
    store.lock_of("repo.json")


def work_of_restore(store: S3Store) -> None:
    read(store, POINT)
    store.lock_support()
    store.lock_of("repo.json")


POINT = "vm/web/log/0000000000000001"
LOCK = LockPolicy(mode=LockMode.COMPLIANCE, period=timedelta(days=10))
WORK: dict[Role, Callable[[S3Store], None]] = {
    Role.OWNER: work_of_owner,
    Role.HOST: work_of_host,
    Role.VERIFY: work_of_verify,
    Role.RESTORE: work_of_restore,
    Role.PRUNE: work_of_prune,
}
"""In an order in which each finds what it needs."""


def test_each_role_may_do_all_that_its_store_does_and_nothing_else(locked: Bucket) -> None:
    scope = Scope(repository_bucket=locked.name, repository_prefix="site", lock_days=31)
    everything: list[Call] = []
    for role, work in WORK.items():
        store = S3Store(S3Options(bucket=locked.name, prefix="site", endpoint_url=locked.endpoint_url), lock=LOCK)
        calls = recorded(store)
        work(store)
        calls = [call for call in calls if call.operation != "CreateMultipartUpload"]  # the test's own
        document = policy(role, scope)
        assert refused(document, calls) == [], role
        for action in actions(document):
            assert refused(without(document, action), calls), f"{role}: {action} is for nothing"
        everything += calls
        store._client.close()
    source = (ROOT / "drsync/store/s3.py").read_text()
    used = set(re.findall(r"_client\.([a-z_0-9]+)\(", source)) - {"get_paginator"}
    used |= set(re.findall(r'get_paginator\("([a-z_0-9]+)"\)', source))
    sent = {call.operation.lower() for call in everything}
    assert {name.replace("_", "") for name in used} == sent, "the test must drive it, too"


def test_what_one_role_does_the_others_may_not(locked: Bucket) -> None:
    """A point can't be overwritten, nor deleted by whoever does not maintain."""
    scope = Scope(repository_bucket=locked.name, repository_prefix="site", lock_days=31)
    store = S3Store(S3Options(bucket=locked.name, prefix="site", endpoint_url=locked.endpoint_url))
    create(store, POINT)
    calls = recorded(store)
    store.replace(POINT, b"abc")
    assert all(refused(policy(role, scope), calls) for role in Role)
    calls.clear()
    store.delete(POINT)
    assert [role for role in Role if not refused(policy(role, scope), calls)] == [Role.PRUNE]


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
