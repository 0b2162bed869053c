"""Rule 7: whoever has a host's credentials and key deletes, overwrites and unlocks nothing; old points restore.

LocalStack enforces no policies, but Object Lock. So the thief's client asks the policies before each request
(iam_evaluator.py), as S3 would, and what they let through is really done. Then the same with a policy that is far
too wide: what Object Lock alone still keeps.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from botocore.exceptions import ClientError
from iam_evaluator import is_allowed, needs
from s3_lab import Bucket, make_client
from shipped_vm import DiskStep, ShippedVm, Step, restored

from drsync import catalog
from drsync.errors import StoreDenied
from drsync.format import names
from drsync.locks import LockState, extend_locks, lock_status
from drsync.log import Log
from drsync.model import BLOCK_SIZE, SystemClock
from drsync.prune.run import PruneOptions, prune_vm
from drsync.repository import Repository, open_repository
from drsync.retention import Pin, Rules
from drsync.store import ObjectStore
from drsync.store.lock import LockMode, LockPolicy
from drsync.store.retry import RetryingStore
from drsync.store.s3 import S3Options, S3Store
from drsync.target.ec2.aws import Call
from drsync.target.ec2.policy import Document, Role, Scope, documents, policy

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

pytestmark = pytest.mark.localstack

PREFIX = "site"
POLICY = LockPolicy(mode=LockMode.COMPLIANCE, period=timedelta(days=30))
SAFE = {"aws:SecureTransport": "true"}


def scope_of(bucket: Bucket) -> Scope:
    return Scope(repository_bucket=bucket.name, repository_prefix=PREFIX, host="alpha", vms=("web",), lock_days=31)


def enforce(client: "S3Client", *identity: Document, resource: Document | None = None) -> "S3Client":
    """A client whose every request is first put to the policies, as S3 would."""
    statements = [one for document in identity for one in document["Statement"]]
    statements += resource["Statement"] if resource else []
    document = {"Statement": statements}

    def ask(params: dict[str, Any], model: Any, **_: Any) -> None:
        for asked in needs(Call("s3", model.name, dict(params)), {}):
            wanted = type(asked)(action=asked.action, resource=asked.resource, context={**SAFE, **asked.context})
            if not is_allowed(document, wanted):
                reply = {
                    "Error": {"Code": "AccessDenied", "Message": f"{wanted.action} on {wanted.resource}"},
                    "ResponseMetadata": {"HTTPStatusCode": 403},
                }
                raise ClientError(reply, model.name)  # type: ignore[arg-type]  # a part of a reply is enough

    client.meta.events.register("provide-client-params.s3", ask)
    return client


def store_of(bucket: Bucket, *identity: Document, lock: LockPolicy | None = POLICY) -> S3Store:
    """drsync's own store, under policies if there are any."""
    store = S3Store(S3Options(bucket=bucket.name, prefix=PREFIX, endpoint_url=bucket.endpoint_url), lock=lock)
    if identity:
        enforce(store._client, *identity)
    return store


@pytest.fixture
def locked(localstack: str, s3_client: "S3Client", bucket: Bucket) -> Iterator[Bucket]:
    """A bucket with Object Lock; `bucket` brings the credentials. It stays: nobody can empty it, that is the point."""
    made = Bucket(name=f"{bucket.name}-lock", endpoint_url=localstack, client=s3_client)
    s3_client.create_bucket(Bucket=made.name, ObjectLockEnabledForBucket=True)
    yield made


@pytest.fixture
def vm(locked: Bucket, tmp_path: Path) -> ShippedVm:
    """A VM with two points, written with the rights of owner and host and nothing more."""
    owner, host = (policy(role, scope_of(locked)) for role in (Role.OWNER, Role.HOST))
    begun = ShippedVm(tmp_path, store=RetryingStore(store_of(locked, owner)))
    under_host = open_repository(RetryingStore(store_of(locked, host)), begun.root, "key")
    made = ShippedVm(tmp_path, repository=under_host, root=begun.root)
    for value in (1, 2):
        made.capture(step(value))
    return made


def step(value: int) -> Step:
    return Step(disks={"root": DiskStep(size_bytes=4 * BLOCK_SIZE, writes={0: value})})


def check_old_points(vm: ShippedVm, store: ObjectStore) -> None:
    """What was captured before the theft restores to what it was."""
    log = Log(Repository(store, vm.repository.record, vm.root).vm(vm.vm))
    for number in (1, 2):
        assert restored(log, number) == vm.points[number]


@contextmanager
def denied() -> Iterator[None]:
    with pytest.raises(ClientError) as caught:
        yield
    assert caught.value.response["Error"]["Code"] in ("AccessDenied", "MethodNotAllowed"), caught.value


def attacks(bucket: Bucket) -> Mapping[str, Callable[["S3Client"], object]]:
    """All that a thief could try."""
    point = f"{PREFIX}/{names.segment('web', 1)}"
    at = {"Bucket": bucket.name, "Key": point}
    version = bucket.client.list_object_versions(Bucket=bucket.name, Prefix=point)["Versions"][0]["VersionId"]
    soon = datetime.now(UTC) + timedelta(seconds=5)
    late = datetime.now(UTC) + timedelta(days=3000)
    rule: Any = {"ID": "x", "Status": "Enabled", "Filter": {"Prefix": ""}, "Expiration": {"Days": 1}}
    keeping: Any = {"Mode": "COMPLIANCE", "RetainUntilDate": late}
    return {
        "delete a point": lambda c: c.delete_object(**at),
        "delete its version": lambda c: c.delete_object(**at, VersionId=version),
        "delete it with others": lambda c: c.delete_objects(Bucket=bucket.name, Delete={"Objects": [{"Key": point}]}),
        "delete it past its lock": lambda c: c.delete_object(**at, VersionId=version, BypassGovernanceRetention=True),
        "overwrite a point": lambda c: c.put_object(**at, Body=b"x"),
        "overwrite it by a copy": lambda c: c.copy_object(**at, CopySource=f"{bucket.name}/{PREFIX}/repo.json"),
        "overwrite repo.json": lambda c: c.put_object(Bucket=bucket.name, Key=f"{PREFIX}/repo.json", Body=b"{}"),
        "replace repo.json": lambda c: c.put_object(
            Bucket=bucket.name, Key=f"{PREFIX}/repo.json", Body=b"{}", IfNoneMatch="*"
        ),
        "add a key slot": lambda c: c.put_object(
            Bucket=bucket.name, Key=f"{PREFIX}/keys/mine.json", Body=b"{}", IfNoneMatch="*"
        ),
        "shorten its lock": lambda c: c.put_object_retention(
            **at, Retention={"Mode": "GOVERNANCE", "RetainUntilDate": soon}, BypassGovernanceRetention=True
        ),
        "lock for ever": lambda c: c.put_object_retention(**at, Retention=keeping),
        "create for ever": lambda c: c.put_object(
            Bucket=bucket.name,
            Key=f"{PREFIX}/vm/web/pack/{'0' * 32}",
            Body=b"x",
            IfNoneMatch="*",
            ObjectLockMode="COMPLIANCE",
            ObjectLockRetainUntilDate=late,
        ),
        "silence the alarm": lambda c: c.put_object_retention(
            Bucket=bucket.name,
            Key=f"{PREFIX}/repo.json",
            Retention={"Mode": "COMPLIANCE", "RetainUntilDate": datetime.now(UTC) + timedelta(days=30, hours=12)},
        ),
        "let a rule delete": lambda c: c.put_bucket_lifecycle_configuration(
            Bucket=bucket.name, LifecycleConfiguration={"Rules": [rule]}
        ),
        "stop versions": lambda c: c.put_bucket_versioning(
            Bucket=bucket.name, VersioningConfiguration={"Status": "Suspended"}
        ),
        "stop locks": lambda c: c.put_object_lock_configuration(
            Bucket=bucket.name, ObjectLockConfiguration={"ObjectLockEnabled": "Enabled"}
        ),
        "open the bucket": lambda c: c.put_bucket_policy(Bucket=bucket.name, Policy="{}"),
        "close the bucket's policy": lambda c: c.delete_bucket_policy(Bucket=bucket.name),
        "remove the bucket": lambda c: c.delete_bucket(Bucket=bucket.name),
        "read another VM": lambda c: c.get_object(Bucket=bucket.name, Key=f"{PREFIX}/{names.segment('db', 1)}"),
        "write another VM": lambda c: c.put_object(
            Bucket=bucket.name, Key=f"{PREFIX}/{names.segment('db', 9)}", Body=b"x", IfNoneMatch="*"
        ),
        "play another host": lambda c: c.put_object(Bucket=bucket.name, Key=f"{PREFIX}/host/beta.json", Body=b"x"),
        "drop points by a horizon": lambda c: c.put_object(
            Bucket=bucket.name, Key=f"{PREFIX}/vm/web/horizon/9", Body=b"x", IfNoneMatch="*"
        ),
        "unpin": lambda c: c.put_object(
            Bucket=bucket.name, Key=f"{PREFIX}/{names.pin('web', 1)}", Body=b"x", IfNoneMatch="*"
        ),
        "read the wrapped keys": lambda c: c.get_object(Bucket=bucket.name, Key=f"{PREFIX}/keys/x.json"),
    }


def test_rule_7_stolen_host_credentials_destroy_nothing_and_old_points_restore(locked: Bucket, vm: ShippedVm) -> None:
    scope = scope_of(locked)
    host, own = policy(Role.HOST, scope), documents(scope)["bucket"]
    thief = enforce(make_client(locked.endpoint_url), host, resource=own)
    tried = attacks(locked)
    for what, attack in tried.items():
        with denied():
            attack(thief)
            pytest.fail(f"allowed: {what}")
    # What he may do, and does: write false points, and lock them for as long as the host may.
    vm.capture(step(3))
    restoring = RetryingStore(store_of(locked, policy(Role.RESTORE, scope)))
    check_old_points(vm, restoring)
    with pytest.raises(StoreDenied):
        restoring.create("vm/web/pack/x", b"", sha256=hashlib.sha256(b"").digest())


TOO_WIDE: Document = {"Statement": [{"Sid": "All", "Effect": "Allow", "Action": "s3:*", "Resource": "*"}]}


def test_rule_7_what_a_too_wide_policy_lets_pass_the_lock_still_keeps(locked: Bucket, vm: ShippedVm) -> None:
    """No policy of ours at all: a delete puts its mark, the bytes stay, and taking the mark away brings them back."""
    thief = enforce(make_client(locked.endpoint_url), TOO_WIDE)
    point = f"{PREFIX}/{names.segment('web', 1)}"
    version = locked.client.list_object_versions(Bucket=locked.name, Prefix=point)["Versions"][0]["VersionId"]
    soon = datetime.now(UTC) + timedelta(seconds=5)
    for bypass in (False, True):
        with denied():
            thief.delete_object(Bucket=locked.name, Key=point, VersionId=version, BypassGovernanceRetention=bypass)
    with denied():
        thief.put_object_retention(
            Bucket=locked.name, Key=point, Retention={"Mode": "COMPLIANCE", "RetainUntilDate": soon}
        )
    marker = thief.delete_object(Bucket=locked.name, Key=point)["VersionId"]
    assert list(store_of(locked).list(names.segment("web", 1))) == []
    locked.client.delete_object(Bucket=locked.name, Key=point, VersionId=marker)
    check_old_points(vm, store_of(locked))


def test_18_in_a_bucket_that_locks_everything_by_itself_all_works(locked: Bucket, tmp_path: Path) -> None:
    """Default retention: heartbeats are overwritten, points deleted, locks extended; nothing of it fails."""
    locked.client.put_object_lock_configuration(
        Bucket=locked.name,
        ObjectLockConfiguration={
            "ObjectLockEnabled": "Enabled",
            "Rule": {"DefaultRetention": {"Mode": "GOVERNANCE", "Days": 7}},
        },
    )
    for lock in (None, POLICY):
        store = store_of(locked, lock=lock)
        key = names.segment("web", 1 if lock else 2)
        store.create(key, b"abc", sha256=hashlib.sha256(b"abc").digest())
        store.replace("host/alpha.json", b"1")
        store.replace("host/alpha.json", b"2")
        found = store.lock_of(key)
        assert found is not None
        assert found.mode is (LockMode.COMPLIANCE if lock else LockMode.GOVERNANCE)
        store.delete(key)
        assert list(store.list("vm/")) == []
    assert store.lock_support().default == "governance for 7 days"


def test_18_the_maintenance_prunes_a_locked_bucket_with_its_own_rights_and_nothing_is_destroyed(
    locked: Bucket, vm: ShippedVm
) -> None:
    """What prune deletes is gone for drsync, and all there for who takes the marks away."""
    for value in range(3, 9):
        vm.capture(step(value))
    before = {entry["Key"] for entry in locked.client.list_objects_v2(Bucket=locked.name)["Contents"]}
    maintenance = RetryingStore(store_of(locked, policy(Role.PRUNE, scope_of(locked))))
    log = Log(Repository(maintenance, vm.repository.record, vm.root).vm(vm.vm))
    at_once = PruneOptions(grace=timedelta(0), orphan_grace=timedelta(days=14))
    pins, rules = [Pin(2, None)], Rules(last=1)
    done = prune_vm(log, rules, pins, committed=0, now=maintenance.now(), options=at_once)
    assert [v.point for v in done.dropped] == [7, 6, 5, 4, 3, 1]
    later = maintenance.now() + timedelta(seconds=2)  # S3 tells the time in whole seconds
    again = prune_vm(log, rules, pins, committed=0, now=later, options=at_once)
    assert done.deleted_objects + again.deleted_objects == 5
    assert done.denied_objects + again.denied_objects == 0
    reading = RetryingStore(store_of(locked, policy(Role.RESTORE, scope_of(locked))))
    kept = Log(Repository(reading, vm.repository.record, vm.root).vm(vm.vm))
    assert [point.number for point in catalog.points(kept)] == [2, 8]
    for number in (2, 8):
        assert restored(kept, number) == vm.points[number]
    listed = {entry["Key"] for entry in locked.client.list_objects_v2(Bucket=locked.name)["Contents"]}
    versions = {entry["Key"] for entry in locked.client.list_object_versions(Bucket=locked.name)["Versions"]}
    assert before - listed, "something was deleted"
    assert before <= versions, "and nothing destroyed"
    vm.capture(step(9))  # the host goes on behind the horizon
    assert restored(kept, vm.log.newest()) == vm.points[vm.log.newest()]


def test_19_when_the_maintenance_is_dead_the_alarm_comes_before_the_locks_end(locked: Bucket) -> None:
    """With the rights of each role: the host notices, the maintenance extends."""
    scope, clock = scope_of(locked), SystemClock()
    short = LockPolicy(mode=LockMode.COMPLIANCE, period=timedelta(days=5))
    owner, host, prune = (
        store_of(locked, policy(role, scope), lock=short) for role in (Role.OWNER, Role.HOST, Role.PRUNE)
    )
    body = hashlib.sha256(b"abc").digest()
    owner.create("repo.json", b"abc", sha256=body)
    for number in (1, 2):
        host.create(names.segment("web", number), b"abc", sha256=body)
    now = clock.now()
    assert lock_status(host, short, now).state is LockState.LOCKED
    assert lock_status(host, short, now + timedelta(days=4)).state is LockState.LAPSING
    assert lock_status(host, short, now + timedelta(days=6)).state is LockState.LAPSED
    found = extend_locks(prune, prune, POLICY, clock, budget_s=60)
    assert (found.problem, found.seen, found.extended, found.done) == (None, 2, 2, True)
    assert lock_status(host, POLICY, now + timedelta(days=6)).state is LockState.LOCKED
    again = extend_locks(prune, prune, POLICY, clock, budget_s=60)
    assert again.extended == 0
