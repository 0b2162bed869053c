"""The policies under which drsync needs no more than it is: one for each role, as IAM documents. Pure.

    role         runs                                     may                            must not
    owner        `drsync init`, `key`, `pin`              begin it, its keys, its pins   touch points
    host         the daemon on a KVM host                 read and add to the repository  change or delete anything
    cloud-sync   `drsync cloud sync`, its daemon          read it, write snapshots        delete what is not drsync's
    restore      `drsync restore` to files and libvirt    read it                        touch the repository
    recovery     `drsync restore --to ec2`                that, import, start instances   touch the repository
    failback     `drsync failback --from ec2`             read own snapshots, add to it   change anything in it
    verify       `drsync verify`                          read it, note damage           touch anything else
    prune        `drsync prune`, the maintenance          copy forward, delete, lock     change repo.json and keys
    setup        `drsync cloud setup`                     make the role and the bucket    anything else

What IAM knows of each action (its resource, its condition keys) is AWS's word, "Actions, resources, and condition
keys" of Amazon S3, EC2, EBS and IAM. Two things it can't say:

- a pending snapshot can't be told from another one before it is tagged, so StartSnapshot needs the tag in its request;
- whoever may tag a snapshot may then delete it as drsync's. What VM Import makes has no tags, and who began the
  import must tag it, so the recovery role's limit is one against mistakes, not against malice. `ec2 lock-snapshot`
  keeps a snapshot from everybody.

What the roles may do with the repository itself is in repository_policy.py.
"""

from collections.abc import Sequence
from enum import StrEnum
from typing import Final

from drsync.target.ec2 import repository_policy
from drsync.target.ec2.iam import (
    Document,
    Scope,
    allow,
    deny_repository_writes,
    read_repository,
    within,
)

__all__ = ["Document", "Role", "Scope", "documents", "import_service_policy", "import_trust", "policy"]

VERSION: Final = "2012-10-17"
OURS: Final = "drsync:repository"
"""The tag by which drsync knows its own (tags.py)."""
IMPORTED: Final = "drsync:import"
"""The tag of what an import makes (import_kinds.py)."""
SERVICE: Final = "vmie.amazonaws.com"
EXTERNAL_ID: Final = "vmimport"


class Role(StrEnum):
    """Who works with AWS."""

    OWNER = "owner"
    HOST = "host"
    CLOUD_SYNC = "cloud-sync"
    RESTORE = "restore"
    RECOVERY = "recovery"
    FAILBACK = "failback"
    VERIFY = "verify"
    PRUNE = "prune"
    SETUP = "setup"


def policy(role: Role, scope: Scope) -> Document:
    """What a role may do, and nothing more."""
    statements = {
        Role.OWNER: repository_policy.owner,
        Role.HOST: repository_policy.host,
        Role.CLOUD_SYNC: _cloud_sync,
        Role.RECOVERY: _recovery,
        Role.RESTORE: repository_policy.restore,
        Role.VERIFY: repository_policy.verify,
        Role.PRUNE: repository_policy.prune,
        Role.FAILBACK: _failback,
        Role.SETUP: _setup,
    }[role](scope)
    return {"Version": VERSION, "Statement": statements}


def import_trust(scope: Scope) -> Document:
    """Who may be the role that VM Import reads the bucket as: the service, for this account."""
    condition: Document = {"StringEquals": {"sts:ExternalId": EXTERNAL_ID}}
    if scope.account != "*":
        condition["StringEquals"]["aws:SourceAccount"] = scope.account
    allowed = {"Effect": "Allow", "Principal": {"Service": SERVICE}, "Action": "sts:AssumeRole", "Condition": condition}
    return {"Version": VERSION, "Statement": [allowed]}


def import_service_policy(scope: Scope) -> Document:
    """What that role may do (VM Import guide, "Required service role"), with the bucket narrowed to our prefix."""
    statements = [
        allow("FindImages", ["s3:GetBucketLocation", "s3:ListBucket"], [scope.images]),
        allow("ReadImages", ["s3:GetObject"], [f"{scope.images}/{scope.import_prefix}/*"]),
        allow(
            "MakeSnapshots",
            ["ec2:CopySnapshot", "ec2:Describe*", "ec2:ModifySnapshotAttribute", "ec2:RegisterImage"],
            ["*"],
        ),
    ]
    if scope.kms_key_arn:
        encrypt = ["kms:CreateGrant", "kms:Decrypt", "kms:DescribeKey", "kms:Encrypt", "kms:GenerateDataKey*"]
        statements.append(allow("Encrypt", [*encrypt, "kms:ReEncrypt*"], [scope.kms_key_arn]))
    return {"Version": VERSION, "Statement": statements}


def _cloud_sync(scope: Scope) -> list[Document]:
    return [*read_repository(scope), *_write_snapshots(scope), deny_repository_writes(scope)]


def _recovery(scope: Scope) -> list[Document]:
    statements = [
        *read_repository(scope),
        *_write_snapshots(scope),
        allow(
            "Look",
            [
                "ec2:DescribeImages",
                "ec2:DescribeImportImageTasks",
                "ec2:DescribeImportSnapshotTasks",
                "ec2:DescribeInstanceStatus",
                "ec2:DescribeInstanceTypeOfferings",
                "ec2:DescribeInstanceTypes",
                "ec2:DescribeInstances",
                "ec2:DescribeNetworkInterfaces",
                "ec2:DescribeSecurityGroups",
                "ec2:DescribeSubnets",
                "ec2:DescribeVpcs",
            ],
            ["*"],
        ),
        allow("RegisterImages", ["ec2:RegisterImage"], [scope.ec2("image/*"), scope.ec2("snapshot/*")]),
        _only_ours("RemoveOwnImages", ["ec2:DeregisterImage"], [scope.ec2("image/*")]),
        allow(
            "LaunchFromImages",
            ["ec2:RunInstances"],
            [
                scope.ec2(f"{kind}/*")
                for kind in ("image", "snapshot", "subnet", "security-group", "network-interface", "key-pair")
            ],
        ),
        _requested("LaunchOwnInstances", ["ec2:RunInstances"], [scope.ec2("instance/*"), scope.ec2("volume/*")]),
        _requested(
            "TagWhatIsMade",
            ["ec2:CreateTags"],
            [scope.ec2(f"{kind}/*") for kind in ("image", "instance", "network-interface", "volume")],
        ),
        _only_ours("TagOwn", ["ec2:CreateTags"], [scope.ec2(f"{kind}/*") for kind in ("image", "instance", "volume")]),
        _only_ours(
            "RunOwnInstances",
            ["ec2:StartInstances", "ec2:StopInstances", "ec2:TerminateInstances"],
            [scope.ec2("instance/*")],
        ),
    ]
    if scope.import_bucket:
        statements += _import_disks(scope)
    return [*statements, deny_repository_writes(scope)]


def _import_disks(scope: Scope) -> list[Document]:
    tasks = [scope.ec2("import-snapshot-task/*"), scope.ec2("import-image-task/*")]
    return [
        allow("FindUploads", ["s3:ListBucket", "s3:ListBucketMultipartUploads"], [scope.images])
        | within(f"{scope.import_prefix}/"),
        allow(
            "HandOverImages",
            [
                "s3:AbortMultipartUpload",
                "s3:DeleteObject",
                "s3:GetObject",
                "s3:ListMultipartUploadParts",
                "s3:PutObject",
            ],
            [f"{scope.images}/{scope.import_prefix}/*"],
        ),
        allow(
            "Import",
            ["ec2:ImportImage", "ec2:ImportSnapshot"],
            [*tasks, scope.ec2("image/*"), scope.ec2("snapshot/*")],
        ),
        allow("CancelImports", ["ec2:CancelImportTask"], tasks),
        allow("TagImports", ["ec2:CreateTags"], [*tasks, scope.ec2("image/*"), scope.ec2("snapshot/*")])
        | {"Condition": {"Null": {f"aws:RequestTag/{IMPORTED}": "false"}}},
        allow(
            "RemoveImported",
            ["ec2:DeleteSnapshot", "ec2:DeregisterImage"],
            [scope.ec2("snapshot/*"), scope.ec2("image/*")],
        )
        | {"Condition": {"Null": {f"aws:ResourceTag/{IMPORTED}": "false"}}},
        allow("LetVmImportRead", ["iam:PassRole"], [scope.import_role_arn])
        | {"Condition": {"StringEquals": {"iam:PassedToService": SERVICE}}},
    ]


def _failback(scope: Scope) -> list[Document]:
    """A host's rights to the repository, and to read what is drsync's in EBS.

    CreateSnapshots needs each of the three kinds that it has to do with (Service authorization reference, EC2).
    """
    snapshots = [scope.ec2("snapshot/*")]
    return [
        *repository_policy.host(scope),
        _only_ours(
            "ReadOwnSnapshots", ["ebs:GetSnapshotBlock", "ebs:ListChangedBlocks", "ebs:ListSnapshotBlocks"], snapshots
        ),
        allow("Look", ["ec2:DescribeInstances", "ec2:DescribeSnapshots", "ec2:DescribeVolumes"], ["*"]),
        _only_ours("OfOwnInstances", ["ec2:CreateSnapshots"], [scope.ec2("instance/*"), scope.ec2("volume/*")]),
        _requested("MakeSnapshots", ["ec2:CreateSnapshots", "ec2:CreateTags"], snapshots),
        _only_ours("TagAndRemoveOwnSnapshots", ["ec2:CreateTags", "ec2:DeleteSnapshot"], snapshots),
        _only_ours("StopOwnInstances", ["ec2:StopInstances"], [scope.ec2("instance/*")]),
    ]


def _setup(scope: Scope) -> list[Document]:
    buckets = [
        "s3:CreateBucket",
        "s3:GetBucketLocation",
        "s3:GetBucketPublicAccessBlock",
        "s3:GetLifecycleConfiguration",
        "s3:ListBucket",
        "s3:PutBucketPublicAccessBlock",
        "s3:PutLifecycleConfiguration",
    ]
    roles = [
        "iam:CreateRole",
        "iam:GetRole",
        "iam:GetRolePolicy",
        "iam:ListAttachedRolePolicies",
        "iam:ListRolePolicies",
        "iam:PutRolePolicy",
    ]
    return [
        allow("Bucket", buckets, [scope.images]),
        allow("Role", roles, [scope.import_role_arn]),
    ]


def _write_snapshots(scope: Scope) -> list[Document]:
    snapshots = [scope.ec2("snapshot/*")]
    return [
        _requested("StartSnapshots", ["ebs:StartSnapshot"], snapshots),
        _only_ours("WriteOwnSnapshots", ["ebs:CompleteSnapshot", "ebs:PutSnapshotBlock"], snapshots),
        allow("LookAtSnapshots", ["ec2:DescribeSnapshots"], ["*"]),
        _requested("TagNewSnapshots", ["ec2:CreateTags"], snapshots),
        _only_ours("TagAndRemoveOwnSnapshots", ["ec2:CreateTags", "ec2:DeleteSnapshot"], snapshots),
    ]


def _requested(sid: str, actions: Sequence[str], resources: Sequence[str]) -> Document:
    """Allowed if the request tags what it makes as drsync's."""
    return allow(sid, actions, resources) | {"Condition": {"Null": {f"aws:RequestTag/{OURS}": "false"}}}


def _only_ours(sid: str, actions: Sequence[str], resources: Sequence[str]) -> Document:
    """Allowed on what is tagged as drsync's."""
    return allow(sid, actions, resources) | {"Condition": {"Null": {f"aws:ResourceTag/{OURS}": "false"}}}


def documents(scope: Scope) -> dict[str, Document]:
    """All documents, by name: a policy for each role, the bucket's own, and the role's of VM Import itself."""
    found = {role.value: policy(role, scope) for role in Role if scope.import_bucket or role is not Role.SETUP}
    found["bucket"] = repository_policy.bucket(scope)
    if scope.import_bucket:
        found["vmimport-trust"] = import_trust(scope)
        found["vmimport-policy"] = import_service_policy(scope)
    return found
