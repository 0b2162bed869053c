"""The policies as documents: what each role never may, what IAM takes, and that the examples are them."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from iam_evaluator import ACCOUNT, Asked, action_of, is_allowed, operations_of

from drsync.target.ec2.policy import IMPORTED, OURS, Role, Scope, documents, import_service_policy, import_trust, policy
from drsync.target.ec2.role import trusts_vm_import

EXAMPLES = Path(__file__).parents[4] / "examples/iam"
SCOPE = Scope(repository_bucket="my-bucket", repository_prefix="site-1", import_bucket="my-import-bucket", lock_days=31)
POINT = "arn:aws:s3:::my-bucket/site-1/vm/web/log/0000000000000001"
IMAGE = "arn:aws:s3:::my-import-bucket/drsync-import/web.vmdk"
SNAPSHOT = "arn:aws:ec2:eu-west-1::snapshot/snap-1"
CREATE = {"s3:if-none-match": "*"}


def allowed(role: Role, action: str, resource: str, context: Mapping[str, str] | None = None) -> bool:
    return is_allowed(policy(role, SCOPE), Asked(action=action, resource=resource, context=context or {}))


@pytest.mark.parametrize("name", documents(SCOPE))
def test_the_example_is_what_the_code_makes(name: str) -> None:
    """drsync cloud setup --print --bucket my-import-bucket --repository s3://my-bucket/site-1 --output examples/iam"""
    assert json.loads((EXAMPLES / f"{name}.json").read_text()) == documents(SCOPE)[name]


def test_there_is_no_other_example() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.json")} == set(documents(SCOPE))


@pytest.mark.parametrize("name", [name for name in documents(SCOPE) if name != "vmimport-trust"])
def test_iam_takes_it_as_a_managed_policy(name: str) -> None:
    """IAM and STS quotas: 6,144 characters, white space not counted; a Sid has letters and digits alone."""
    document = documents(SCOPE)[name]
    assert len(json.dumps(document, separators=(",", ":"))) <= 6144
    sids = [statement["Sid"] for statement in document["Statement"]]
    assert len(set(sids)) == len(sids)
    assert all(sid.isalnum() for sid in sids)


def test_every_operation_that_the_package_calls_is_in_a_policy() -> None:
    known = {
        action
        for role in (Role.RECOVERY, Role.CLOUD_SYNC, Role.FAILBACK, Role.SETUP)
        for statement in policy(role, SCOPE)["Statement"]
        if statement["Effect"] == "Allow"
        for action in statement["Action"]
    }
    called = {action_of(*operation) for operation in operations_of("*.py")}
    assert "ec2:ImportSnapshot" in called
    assert called - known == {"sts:GetCallerIdentity"}, "which needs no permission"


def test_a_host_adds_to_the_repository_and_changes_nothing_there() -> None:
    assert allowed(Role.HOST, "s3:PutObject", POINT, CREATE)
    assert allowed(Role.HOST, "s3:GetObject", POINT)
    assert allowed(Role.HOST, "s3:PutObject", "arn:aws:s3:::my-bucket/site-1/host/alpha.json")
    assert not allowed(Role.HOST, "s3:PutObject", POINT)
    assert not allowed(Role.HOST, "s3:PutObject", "arn:aws:s3:::my-bucket/site-1/repo.json")
    for action in (
        "s3:DeleteObject",
        "s3:DeleteObjectVersion",
        "s3:BypassGovernanceRetention",
        "s3:PutLifecycleConfiguration",
        "s3:PutBucketPolicy",
    ):
        assert not allowed(Role.HOST, action, POINT), action
        assert not allowed(Role.HOST, action, "arn:aws:s3:::my-bucket"), action


DAYS = "s3:object-lock-remaining-retention-days"


def key(name: str) -> str:
    return f"arn:aws:s3:::my-bucket/site-1/{name}"


def test_a_host_locks_what_it_creates_and_nobody_locks_for_longer_than_is_meant() -> None:
    assert allowed(Role.HOST, "s3:PutObjectRetention", POINT, {DAYS: "30"})
    for role in Role:
        assert not allowed(role, "s3:PutObjectRetention", POINT, {DAYS: "32"}), role
        assert not allowed(role, "s3:PutObject", POINT, {**CREATE, DAYS: "32"}), role
    assert not allowed(Role.HOST, "s3:PutObjectRetention", key("repo.json"), {DAYS: "30"}), "it is the witness"
    assert allowed(Role.PRUNE, "s3:PutObjectRetention", key("repo.json"), {DAYS: "30"})
    plain = Scope(repository_bucket="my-bucket", repository_prefix="site-1")
    for role in Role:
        if role is not Role.SETUP:
            asked = Asked(action="s3:PutObjectRetention", resource=POINT, context={DAYS: "1"})
            assert not is_allowed(policy(role, plain), asked)


CREATED = {
    "repo.json": {Role.OWNER},
    "keys/recovery-0.json": {Role.OWNER},
    "vm/web/log/0000000000000001": {Role.HOST, Role.FAILBACK, Role.PRUNE},
    "vm/web/pack/0": {Role.HOST, Role.FAILBACK, Role.PRUNE},
    "vm/web/map/0-1": {Role.HOST, Role.FAILBACK, Role.PRUNE},
    "vm/web/pin/0000000000000001": {Role.OWNER, Role.PRUNE},
    "vm/web/merged/0000000000000001-0": {Role.PRUNE},
    "vm/web/horizon/1": {Role.PRUNE},
    "vm/web/damage/1": {Role.HOST, Role.FAILBACK, Role.VERIFY, Role.PRUNE},
    "host/alpha.json": {Role.HOST, Role.FAILBACK},
}
DELETED = {
    **{name: {Role.PRUNE} for name in ("vm/web/log/0000000000000001", "vm/web/pack/0", "vm/web/map/0-1")},
    "vm/web/merged/0000000000000001-0": {Role.PRUNE},
}


@pytest.mark.parametrize("name", CREATED)
def test_who_creates_overwrites_and_deletes_what(name: str) -> None:
    """The table at the head of repository_policy.py."""
    assert {role for role in Role if allowed(role, "s3:PutObject", key(name), CREATE)} == CREATED[name]
    overwriters = {Role.HOST, Role.FAILBACK} if name.startswith("host/") else set()
    assert {role for role in Role if allowed(role, "s3:PutObject", key(name))} == overwriters
    assert {role for role in Role if allowed(role, "s3:DeleteObject", key(name))} == DELETED.get(name, set())
    for action in ("s3:DeleteObjectVersion", "s3:BypassGovernanceRetention", "s3:PutObjectLegalHold"):
        assert not {role for role in Role if allowed(role, action, key(name))}


def test_a_host_reads_its_own_vms_and_no_others() -> None:
    own = policy(
        Role.HOST,
        Scope(repository_bucket="my-bucket", repository_prefix="site-1", host="alpha", vms=("web", "db"), lock_days=31),
    )

    def may(action: str, name: str, **context: str) -> bool:
        return is_allowed(own, Asked(action=action, resource=key(name), context=context))

    for name in ("vm/web/log/1", "vm/db/pack/1", "vm/db/pin/1"):
        assert may("s3:GetObject", name)
    for name in ("vm/other/log/1", "vm/web2/log/1", "vm/we/log/1", "keys/recovery-0.json"):
        assert not may("s3:GetObject", name), name
        assert not is_allowed(own, Asked(action="s3:PutObject", resource=key(name), context=CREATE)), name
        assert not is_allowed(own, Asked(action="s3:PutObjectRetention", resource=key(name), context={DAYS: "1"})), name
    assert is_allowed(own, Asked(action="s3:PutObject", resource=key("vm/web/log/2"), context=CREATE))
    assert may("s3:PutObject", "host/alpha.json")
    assert not may("s3:PutObject", "host/beta.json")
    assert may("s3:GetObject", "host/beta.json"), "a restore asks every heartbeat for the newest point"


def test_what_the_buckets_policy_denies_is_denied_to_everybody() -> None:
    everything = {"Sid": "All", "Effect": "Allow", "Action": "*", "Resource": "*"}
    document = {"Statement": [everything, *documents(SCOPE)["bucket"]["Statement"]]}
    safe = {"aws:SecureTransport": "true"}

    def may(action: str, resource: str, context: Mapping[str, str]) -> bool:
        return is_allowed(document, Asked(action=action, resource=resource, context={**safe, **context}))

    assert may("s3:PutObject", POINT, CREATE)
    assert not may("s3:PutObject", POINT, {})
    assert not may("s3:PutObject", POINT, {**CREATE, DAYS: "40"})
    assert may("s3:PutObject", key("host/alpha.json"), {})
    assert may("s3:DeleteObject", POINT, {})
    assert not may("s3:GetObject", POINT, {"aws:SecureTransport": "false"})
    for action in ("s3:DeleteObjectVersion", "s3:BypassGovernanceRetention"):
        assert not may(action, POINT, {})
    for action in ("s3:PutLifecycleConfiguration", "s3:PutBucketVersioning", "s3:PutBucketObjectLockConfiguration"):
        assert not may(action, "arn:aws:s3:::my-bucket", {})


def test_a_host_can_not_delete_even_if_another_policy_allows_it() -> None:
    everything = {"Effect": "Allow", "Action": "s3:*", "Resource": "*"}
    document = policy(Role.HOST, SCOPE)
    document["Statement"].append(everything)
    assert is_allowed(document, Asked(action="s3:GetObject", resource="arn:aws:s3:::other/key"))
    assert not is_allowed(document, Asked(action="s3:DeleteObject", resource=POINT))
    assert not is_allowed(document, Asked(action="s3:PutObject", resource=POINT))


OTHERS = [
    ("s3:GetObject", "arn:aws:s3:::my-bucket/site-2/repo.json"),
    ("s3:GetObject", "arn:aws:s3:::other/site-1/repo.json"),
    ("s3:PutObject", "arn:aws:s3:::my-bucket/site-2/vm/web/log/0000000000000001"),
    ("s3:DeleteBucket", "arn:aws:s3:::my-bucket"),
    ("s3:PutBucketPolicy", "arn:aws:s3:::my-bucket"),
    ("iam:CreateUser", f"arn:aws:iam::{ACCOUNT}:user/x"),
    ("iam:AttachRolePolicy", f"arn:aws:iam::{ACCOUNT}:role/vmimport"),
    ("ec2:TerminateInstances", f"arn:aws:ec2:eu-west-1:{ACCOUNT}:instance/i-1"),
    ("ec2:DeleteVolume", f"arn:aws:ec2:eu-west-1:{ACCOUNT}:volume/vol-1"),
    ("ec2:ModifySnapshotAttribute", SNAPSHOT),
    ("ec2:DeleteSnapshot", SNAPSHOT),
    ("ec2:DeregisterImage", "arn:aws:ec2:eu-west-1::image/ami-1"),
    ("sts:AssumeRole", f"arn:aws:iam::{ACCOUNT}:role/vmimport"),
]


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize(("action", "resource"), OTHERS, ids=lambda value: value)
def test_no_role_touches_what_is_not_drsyncs(role: Role, action: str, resource: str) -> None:
    assert not allowed(role, action, resource, CREATE)


@pytest.mark.parametrize("role", [Role.CLOUD_SYNC, Role.RECOVERY])
def test_who_recovers_reads_the_repository_and_leaves_it_as_it_is(role: Role) -> None:
    assert allowed(role, "s3:GetObject", POINT)
    assert allowed(role, "s3:ListBucket", "arn:aws:s3:::my-bucket", {"s3:prefix": "site-1/vm/"})
    assert not allowed(role, "s3:ListBucket", "arn:aws:s3:::my-bucket", {"s3:prefix": "site-2/"})
    assert not allowed(role, "s3:PutObject", POINT, CREATE)
    assert not allowed(role, "s3:DeleteObject", POINT)


@pytest.mark.parametrize("role", [Role.CLOUD_SYNC, Role.RECOVERY])
def test_snapshots_are_written_and_deleted_only_if_they_are_tagged(role: Role) -> None:
    ours, asked = {f"aws:ResourceTag/{OURS}": "r"}, {f"aws:RequestTag/{OURS}": "r"}
    assert allowed(role, "ebs:StartSnapshot", SNAPSHOT, asked)
    assert not allowed(role, "ebs:StartSnapshot", SNAPSHOT)
    for action in ("ebs:PutSnapshotBlock", "ebs:CompleteSnapshot", "ec2:DeleteSnapshot"):
        assert allowed(role, action, SNAPSHOT, ours), action
        assert not allowed(role, action, SNAPSHOT), action


def test_only_recovery_starts_instances_and_imports() -> None:
    instance = f"arn:aws:ec2:eu-west-1:{ACCOUNT}:instance/new"
    asked = {f"aws:RequestTag/{OURS}": "r"}
    passed = {"iam:PassedToService": "vmie.amazonaws.com"}
    role = f"arn:aws:iam::{ACCOUNT}:role/vmimport"
    for one in Role:
        is_recovery = one is Role.RECOVERY
        assert allowed(one, "ec2:RunInstances", instance, asked) == is_recovery
        assert allowed(one, "ec2:ImportSnapshot", SNAPSHOT) == is_recovery
        assert allowed(one, "s3:PutObject", IMAGE) == is_recovery
        assert allowed(one, "s3:DeleteObject", IMAGE) == is_recovery
        assert allowed(one, "iam:PassRole", role, passed) == is_recovery
    assert not allowed(Role.RECOVERY, "ec2:RunInstances", instance)
    assert not allowed(Role.RECOVERY, "iam:PassRole", role, {"iam:PassedToService": "ec2.amazonaws.com"})
    assert not allowed(Role.RECOVERY, "iam:PassRole", f"arn:aws:iam::{ACCOUNT}:role/admin", passed)
    imported = {f"aws:ResourceTag/{IMPORTED}": "x"}
    assert allowed(Role.RECOVERY, "ec2:DeleteSnapshot", SNAPSHOT, imported)


def test_prune_deletes_points_and_nothing_else() -> None:
    assert allowed(Role.PRUNE, "s3:DeleteObject", POINT)
    assert allowed(Role.PRUNE, "s3:PutObject", POINT, CREATE)
    assert not allowed(Role.PRUNE, "s3:PutObject", POINT)
    for key in ("repo.json", "keys/0.json", "host/alpha.json"):
        assert not allowed(Role.PRUNE, "s3:DeleteObject", f"arn:aws:s3:::my-bucket/site-1/{key}")
        assert not allowed(Role.PRUNE, "s3:PutObject", f"arn:aws:s3:::my-bucket/site-1/{key}", CREATE)


def test_vm_import_itself_reads_images_and_nothing_else() -> None:
    """What the VM Import guide lists ("Required service role"), with the bucket narrowed to our prefix."""
    document = import_service_policy(SCOPE)

    def may(action: str, resource: str = "*") -> bool:
        return is_allowed(document, Asked(action=action, resource=resource))

    bucket = "arn:aws:s3:::my-import-bucket"
    assert may("s3:GetBucketLocation", bucket)
    assert may("s3:ListBucket", bucket)
    assert may("s3:GetObject", IMAGE)
    assert all(
        may(f"ec2:{one}") for one in ("ModifySnapshotAttribute", "CopySnapshot", "RegisterImage", "DescribeTags")
    )
    assert not may("s3:GetObject", POINT)
    assert not may("s3:GetObject", f"{bucket}/other")
    assert not may("s3:PutObject", IMAGE)
    assert not may("kms:Decrypt", "arn:aws:kms:eu-west-1:1:key/k")


def test_with_a_key_it_encrypts_with_that_one() -> None:
    key = "arn:aws:kms:eu-west-1:1:key/k"
    document = import_service_policy(Scope(repository_bucket="a", import_bucket="b", kms_key_arn=key))
    for action in (
        "CreateGrant",
        "Decrypt",
        "DescribeKey",
        "Encrypt",
        "GenerateDataKeyWithoutPlaintext",
        "ReEncryptTo",
    ):
        assert is_allowed(document, Asked(action=f"kms:{action}", resource=key))
        assert not is_allowed(document, Asked(action=f"kms:{action}", resource=f"{key}2"))


def test_the_key_of_a_slot_is_for_who_opens_the_ring() -> None:
    slot = "arn:aws:kms:eu-central-1:111122223333:key/slot"
    scope = replace(SCOPE, slot_key_arn=slot)

    def able(action: str, key: str) -> set[Role]:
        return {role for role in Role if is_allowed(policy(role, scope), Asked(action=action, resource=key))}

    assert able("kms:Encrypt", slot) == {Role.OWNER}
    assert Role.OWNER in able("kms:Decrypt", slot)
    assert Role.RESTORE in able("kms:Decrypt", slot)
    assert not able("kms:Decrypt", slot) & {Role.HOST, Role.VERIFY, Role.PRUNE}
    assert not able("kms:Decrypt", slot.replace("slot", "other"))
    assert not any("kms:" in str(policy(role, SCOPE)) for role in (Role.OWNER, Role.RESTORE))


def test_the_trust_is_for_this_account_and_no_confused_deputy() -> None:
    trust = import_trust(Scope(repository_bucket="a", import_bucket="b", account=ACCOUNT))
    assert trusts_vm_import(trust)
    (statement,) = trust["Statement"]
    assert statement["Condition"]["StringEquals"] == {"sts:ExternalId": "vmimport", "aws:SourceAccount": ACCOUNT}


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({}, True),
        ({"Effect": "Deny"}, False),
        ({"Principal": {"Service": ["ec2.amazonaws.com", "vmie.amazonaws.com"]}}, True),
        ({"Principal": {"Service": "ec2.amazonaws.com"}}, False),
        ({"Principal": "*"}, False),
        ({"Action": ["sts:AssumeRole"]}, True),
        ({"Action": "sts:TagSession"}, False),
        ({"Condition": {}}, True),
        ({"Condition": {"StringEquals": {"sts:ExternalId": ["vmimport", "other"]}}}, True),
        ({"Condition": {"StringEquals": {"sts:ExternalId": "other"}}}, False),
    ],
    ids=str,
)
def test_whether_a_role_trusts_vm_import(change: dict[str, Any], wanted: bool) -> None:
    trust = import_trust(SCOPE)
    trust["Statement"][0].update(change)
    assert trusts_vm_import(trust) is wanted
    assert trusts_vm_import({"Statement": trust["Statement"][0]}) is wanted


def test_images_do_not_lie_in_the_repository() -> None:
    with pytest.raises(ValueError, match="inside the repository"):
        Scope(repository_bucket="a", import_bucket="a")
    with pytest.raises(ValueError, match="inside the repository"):
        Scope(repository_bucket="a", repository_prefix="x", import_bucket="a", import_prefix="x/images")
    Scope(repository_bucket="a", repository_prefix="x", import_bucket="a", import_prefix="images")
