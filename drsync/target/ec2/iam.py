"""What IAM documents are made of, and what they are about. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Document = dict[str, Any]


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
    """What snapshots are encrypted with."""
    slot_key_arn: str = ""
    """The KMS key of a slot of the repository's key ring."""
    host: str = "*"
    """The host's name in the repository."""
    vms: Sequence[str] = ("*",)
    """The VMs of the host: it may read and add to no others."""
    lock_days: int = 0
    """Nobody may lock an object for more days than these; 0: nobody may lock any."""

    def __post_init__(self) -> None:
        if self.import_bucket == self.repository_bucket and f"{self.import_prefix}/".startswith(self.root):
            raise ValueError("images can't lie inside the repository: hosts may read there, and nobody delete")

    @property
    def repository(self) -> str:
        return f"arn:{self.partition}:s3:::{self.repository_bucket}"

    def objects(self, *parts: str) -> list[str]:
        """Objects of the repository, by what their names look like."""
        return [f"{self.repository}/{self.root}{part}" for part in parts]

    def of_vms(self, *kinds: str) -> list[str]:
        """These kinds of objects of the host's VMs."""
        return self.objects(*(f"vm/{vm}/{kind}" for vm in self.vms for kind in kinds))

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


def read_repository(scope: Scope) -> list[Document]:
    """List and read all of the repository."""
    listing = allow("ListRepository", ["s3:ListBucket"], [scope.repository])
    return [
        listing | (within(scope.root) if scope.root else {}),
        allow("ReadRepository", ["s3:GetObject"], [f"{scope.repository}/{scope.root}*"]),
    ]


def within(prefix: str) -> Document:
    """Only keys with this prefix are listed.

    IfExists: with no right to list at all, S3 answers 403 instead of 404 to who asks for an object that is not there,
    and such a request has no prefix (S3 API reference, GetObject and HeadObject, "Permissions").
    """
    return {"Condition": {"StringLikeIfExists": {"s3:prefix": [f"{prefix}*"]}}}


def deny_repository_writes(scope: Scope) -> Document:
    """Also if another policy of the same role allows it."""
    return deny(
        "LeaveRepository",
        ["s3:DeleteObject*", "s3:PutObject*", "s3:PutLifecycleConfiguration", "s3:PutBucketPolicy"],
        [scope.repository, f"{scope.repository}/{scope.root}*"],
    )


def allow(sid: str, actions: Sequence[str], resources: Sequence[str]) -> Document:
    """A statement that allows."""
    return {"Sid": sid, "Effect": "Allow", "Action": sorted(actions), "Resource": list(resources)}


def deny(sid: str, actions: Sequence[str], resources: Sequence[str]) -> Document:
    """A statement that denies, whatever another one allows."""
    return {"Sid": sid, "Effect": "Deny", "Action": sorted(actions), "Resource": list(resources)}
