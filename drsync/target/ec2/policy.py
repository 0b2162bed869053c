"""The policies under which drsync needs no more than it is: one for each role, as IAM documents. Pure.

    role         runs                                     may                            must not
    host         the daemon on a KVM host                 read and add to the repository  change or delete anything
    cloud-sync   `drsync cloud sync`, its daemon          read it, write snapshots        delete what is not drsync's
    recovery     `drsync restore --to ec2`                that, import, start instances   touch the repository
    failback     `drsync failback --from ec2`             read own snapshots, add to it   change anything in it
    prune        `drsync prune`                           copy forward and delete         change repo.json and keys
    setup        `drsync cloud setup`                     make the role and the bucket    anything else

What IAM knows of each action (its resource, its condition keys) is AWS's word, "Actions, resources, and condition
keys" of Amazon S3, EC2, EBS and IAM. Two things it can't say:

- a pending snapshot can't be told from another one before it is tagged, so StartSnapshot needs the tag in its request;
- whoever may tag a snapshot may then delete it as drsync's. What VM Import makes has no tags, and who began the
  import must tag it, so the recovery role's limit is one against mistakes, not against malice. `ec2 lock-snapshot`
  keeps a snapshot from everybody.

The host's policy enforces in S3 what the format promises: objects are created, never overwritten (s3:if-none-match),
but for the heartbeat.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

Document = dict[str, Any]

VERSION: Final = "2012-10-17"
OURS: Final = "drsync:repository"
"""The tag by which drsync knows its own (tags.py)."""
IMPORTED: Final = "drsync:import"
"""The tag of what an import makes (import_kinds.py)."""
SERVICE: Final = "vmie.amazonaws.com"
EXTERNAL_ID: Final = "vmimport"


class Role(StrEnum):
    """Who works with AWS."""

    HOST = "host"
    CLOUD_SYNC = "cloud-sync"
    RECOVERY = "recovery"
    FAILBACK = "failback"
    PRUNE = "prune"
    SETUP = "setup"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """What the policies are about."""

    repository_bucket: str
    repository_prefix: str = ""
    import_bucket: str = ""
    """Empty: no VM Import."""
    import_prefix: str = "drsync-import"
    import_role: str = "vmimport"
    account: str = "*"
    """Narrows the role that may be passed; the 12 digits."""
    region: str = "*"
    partition: str = "aws"
    kms_key_arn: str = ""

    def __post_init__(self) -> None:
        if self.import_bucket == self.repository_bucket and f"{self.import_prefix}/".startswith(self.root):
            raise ValueError("images can't lie inside the repository: hosts may read there, and nobody delete")

    @property
    def repository(self) -> str:
        return f"arn:{self.partition}:s3:::{self.repository_bucket}"

    @property
    def root(self) -> str:
        """What keys of the repository begin with."""
        return f"{self.repository_prefix}/" if self.repository_prefix else ""

    @property
    def images(self) -> str:
        return f"arn:{self.partition}:s3:::{self.import_bucket}"

    @property
    def import_role_arn(self) -> str:
        return f"arn:{self.partition}:iam::{self.account}:role/{self.import_role}"

    def ec2(self, what: str) -> str:
        """Something of EC2's; snapshots and images have no account in their names."""
        account = "" if what.startswith(("snapshot/", "image/")) else self.account
        return f"arn:{self.partition}:ec2:{self.region}:{account}:{what}"


def policy(role: Role, scope: Scope) -> Document:
    """What a role may do, and nothing more."""
    statements = {
        Role.HOST: _host,
        Role.CLOUD_SYNC: _cloud_sync,
        Role.RECOVERY: _recovery,
        Role.FAILBACK: _failback,
        Role.PRUNE: _prune,
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
        _allow("FindImages", ["s3:GetBucketLocation", "s3:ListBucket"], [scope.images]),
        _allow("ReadImages", ["s3:GetObject"], [f"{scope.images}/{scope.import_prefix}/*"]),
        _allow(
            "MakeSnapshots",
            ["ec2:CopySnapshot", "ec2:Describe*", "ec2:ModifySnapshotAttribute", "ec2:RegisterImage"],
            ["*"],
        ),
    ]
    if scope.kms_key_arn:
        encrypt = ["kms:CreateGrant", "kms:Decrypt", "kms:DescribeKey", "kms:Encrypt", "kms:GenerateDataKey*"]
        statements.append(_allow("Encrypt", [*encrypt, "kms:ReEncrypt*"], [scope.kms_key_arn]))
    return {"Version": VERSION, "Statement": statements}


def _host(scope: Scope) -> list[Document]:
    objects = f"{scope.repository}/{scope.root}"
    return [
        *_read_repository(scope),
        _allow("AddToRepository", ["s3:PutObject"], [f"{objects}*"]),
        {
            **_deny("CreateOnly", ["s3:PutObject"], [f"{objects}{part}" for part in ("repo.json", "keys/*", "vm/*")]),
            "Condition": {"Null": {"s3:if-none-match": "true"}},
        },
        _deny(
            "NeverDelete",
            [
                "s3:BypassGovernanceRetention",
                "s3:DeleteObject*",
                "s3:PutBucketPolicy",
                "s3:PutLifecycleConfiguration",
                "s3:PutObjectLegalHold",
                "s3:PutObjectRetention",
            ],
            [scope.repository, f"{scope.repository}/*"],
        ),
    ]


def _cloud_sync(scope: Scope) -> list[Document]:
    return [*_read_repository(scope), *_write_snapshots(scope), _deny_repository_writes(scope)]


def _recovery(scope: Scope) -> list[Document]:
    statements = [
        *_read_repository(scope),
        *_write_snapshots(scope),
        _allow(
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
        _allow("RegisterImages", ["ec2:RegisterImage"], [scope.ec2("image/*"), scope.ec2("snapshot/*")]),
        _only_ours("RemoveOwnImages", ["ec2:DeregisterImage"], [scope.ec2("image/*")]),
        _allow(
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
    return [*statements, _deny_repository_writes(scope)]


def _import_disks(scope: Scope) -> list[Document]:
    tasks = [scope.ec2("import-snapshot-task/*"), scope.ec2("import-image-task/*")]
    return [
        _allow("FindUploads", ["s3:ListBucket", "s3:ListBucketMultipartUploads"], [scope.images])
        | _within(f"{scope.import_prefix}/"),
        _allow(
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
        _allow(
            "Import",
            ["ec2:ImportImage", "ec2:ImportSnapshot"],
            [*tasks, scope.ec2("image/*"), scope.ec2("snapshot/*")],
        ),
        _allow("CancelImports", ["ec2:CancelImportTask"], tasks),
        _allow("TagImports", ["ec2:CreateTags"], [*tasks, scope.ec2("image/*"), scope.ec2("snapshot/*")])
        | {"Condition": {"Null": {f"aws:RequestTag/{IMPORTED}": "false"}}},
        _allow(
            "RemoveImported",
            ["ec2:DeleteSnapshot", "ec2:DeregisterImage"],
            [scope.ec2("snapshot/*"), scope.ec2("image/*")],
        )
        | {"Condition": {"Null": {f"aws:ResourceTag/{IMPORTED}": "false"}}},
        _allow("LetVmImportRead", ["iam:PassRole"], [scope.import_role_arn])
        | {"Condition": {"StringEquals": {"iam:PassedToService": SERVICE}}},
    ]


def _failback(scope: Scope) -> list[Document]:
    """A host's rights to the repository, and to read what is drsync's in EBS.

    CreateSnapshots needs each of the three kinds that it has to do with (Service authorization reference, EC2).
    """
    snapshots = [scope.ec2("snapshot/*")]
    return [
        *_host(scope),
        _only_ours(
            "ReadOwnSnapshots", ["ebs:GetSnapshotBlock", "ebs:ListChangedBlocks", "ebs:ListSnapshotBlocks"], snapshots
        ),
        _allow("Look", ["ec2:DescribeInstances", "ec2:DescribeSnapshots", "ec2:DescribeVolumes"], ["*"]),
        _only_ours("OfOwnInstances", ["ec2:CreateSnapshots"], [scope.ec2("instance/*"), scope.ec2("volume/*")]),
        _requested("MakeSnapshots", ["ec2:CreateSnapshots", "ec2:CreateTags"], snapshots),
        _only_ours("TagAndRemoveOwnSnapshots", ["ec2:CreateTags", "ec2:DeleteSnapshot"], snapshots),
        _only_ours("StopOwnInstances", ["ec2:StopInstances"], [scope.ec2("instance/*")]),
    ]


def _prune(scope: Scope) -> list[Document]:
    objects = f"{scope.repository}/{scope.root}"
    return [
        *_read_repository(scope),
        _allow("CopyForward", ["s3:PutObject"], [f"{objects}vm/*"])
        | {"Condition": {"Null": {"s3:if-none-match": "false"}}},
        _allow("Delete", ["s3:DeleteObject"], [f"{objects}vm/*"]),
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
        _allow("Bucket", buckets, [scope.images]),
        _allow("Role", roles, [scope.import_role_arn]),
    ]


def _read_repository(scope: Scope) -> list[Document]:
    listing = _allow("ListRepository", ["s3:ListBucket"], [scope.repository])
    return [
        listing | (_within(scope.root) if scope.root else {}),
        _allow("ReadRepository", ["s3:GetObject"], [f"{scope.repository}/{scope.root}*"]),
    ]


def _within(prefix: str) -> Document:
    """Only keys with this prefix are listed.

    IfExists: with no right to list at all, S3 answers 403 instead of 404 to who asks for an object that is not there,
    and such a request has no prefix (S3 API reference, GetObject and HeadObject, "Permissions").
    """
    return {"Condition": {"StringLikeIfExists": {"s3:prefix": [f"{prefix}*"]}}}


def _deny_repository_writes(scope: Scope) -> Document:
    """Also if another policy of the same role allows it."""
    return _deny(
        "LeaveRepository",
        ["s3:DeleteObject*", "s3:PutObject*", "s3:PutLifecycleConfiguration", "s3:PutBucketPolicy"],
        [scope.repository, f"{scope.repository}/{scope.root}*"],
    )


def _write_snapshots(scope: Scope) -> list[Document]:
    snapshots = [scope.ec2("snapshot/*")]
    return [
        _requested("StartSnapshots", ["ebs:StartSnapshot"], snapshots),
        _only_ours("WriteOwnSnapshots", ["ebs:CompleteSnapshot", "ebs:PutSnapshotBlock"], snapshots),
        _allow("LookAtSnapshots", ["ec2:DescribeSnapshots"], ["*"]),
        _requested("TagNewSnapshots", ["ec2:CreateTags"], snapshots),
        _only_ours("TagAndRemoveOwnSnapshots", ["ec2:CreateTags", "ec2:DeleteSnapshot"], snapshots),
    ]


def _requested(sid: str, actions: Sequence[str], resources: Sequence[str]) -> Document:
    """Allowed if the request tags what it makes as drsync's."""
    return _allow(sid, actions, resources) | {"Condition": {"Null": {f"aws:RequestTag/{OURS}": "false"}}}


def _only_ours(sid: str, actions: Sequence[str], resources: Sequence[str]) -> Document:
    """Allowed on what is tagged as drsync's."""
    return _allow(sid, actions, resources) | {"Condition": {"Null": {f"aws:ResourceTag/{OURS}": "false"}}}


def _allow(sid: str, actions: Sequence[str], resources: Sequence[str]) -> Document:
    return {"Sid": sid, "Effect": "Allow", "Action": sorted(actions), "Resource": list(resources)}


def _deny(sid: str, actions: Sequence[str], resources: Sequence[str]) -> Document:
    return {"Sid": sid, "Effect": "Deny", "Action": sorted(actions), "Resource": list(resources)}


def documents(scope: Scope) -> dict[str, Document]:
    """All documents, by name: a policy for each role, and the role's of VM Import itself."""
    found = {role.value: policy(role, scope) for role in Role if scope.import_bucket or role is not Role.SETUP}
    if scope.import_bucket:
        found["vmimport-trust"] = import_trust(scope)
        found["vmimport-policy"] = import_service_policy(scope)
    return found
