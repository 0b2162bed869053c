"""What each role may do with the repository itself, and what nobody may: S3 enforces what the format promises. Pure.

    objects                       created by          overwritten by   deleted by   locked by
    repo.json                     owner               -                -            owner, prune
    keys/*                        owner               -                -            owner, prune
    vm/*/log, pack, map           its host, prune     -                prune        its host, prune
    vm/*/pin                      owner, prune        -                -            owner, prune
    vm/*/merged                   prune               -                prune        prune
    vm/*/horizon                  prune               -                -            prune
    vm/*/damage                   verify, its host,   -                -            verify, its host,
                                  prune                                             prune
    host/*                        its host            its host         -            -

"Created" is PutObject with If-None-Match, which the key s3:if-none-match demands (S3 user guide, "Enforce conditional
writes"). A PutObject that locks needs s3:PutObjectRetention as well, whose key s3:object-lock-remaining-retention-days
caps how long (Service Authorization Reference, Amazon S3). repo.json's lock is the witness of all others
(drsync/locks.py), so no host may touch it: it could silence the alarm.

What is denied is denied also if another policy of the same role allows it. The bucket's policy says the same
for everybody, whichever role he has: to lift that, somebody has to change the bucket's policy first.
"""

from collections.abc import Sequence
from typing import Final

from drsync.target.ec2.iam import Document, Scope, allow, deny, deny_repository_writes, read_repository, within

POINTS: Final = ("log/*", "pack/*", "map/*")
"""What hosts add, and prune deletes."""
_DESTROY: Final = (
    "s3:BypassGovernanceRetention",
    "s3:DeleteBucket",
    "s3:DeleteObjectVersion",
    "s3:PutBucketObjectLockConfiguration",
    "s3:PutBucketVersioning",
    "s3:PutLifecycleConfiguration",
    "s3:PutObjectLegalHold",
)
"""What destroys versions, or lets others do it. No role of drsync's needs any."""
_IF_CREATED: Final[Document] = {"Condition": {"Null": {"s3:if-none-match": "false"}}}
_IF_OVERWRITTEN: Final[Document] = {"Condition": {"Null": {"s3:if-none-match": "true"}}}
_DAYS: Final = "s3:object-lock-remaining-retention-days"


def owner(scope: Scope) -> list[Document]:
    """Who begins the repository, and has its keys: `drsync init`, `drsync key`, `drsync pin`."""
    own = ("repo.json", "keys/*", "vm/*/pin/*")
    return [
        *read_repository(scope),
        allow("Begin", ["s3:PutObject"], scope.objects(*own)) | _IF_CREATED,
        *_slot(scope, "kms:Encrypt", "kms:Decrypt"),
        *_locks(scope, scope.objects(*own)),
        *_never(scope),
    ]


def host(scope: Scope) -> list[Document]:
    """A KVM host: reads and adds to its VMs, and notes what it finds damaged. It sees the names of all objects."""
    listing = allow("ListRepository", ["s3:ListBucket"], [scope.repository])
    points = scope.of_vms(*POINTS, "damage/*")
    readable = [*scope.objects("repo.json", "host/*"), *scope.of_vms("*")]
    return [
        listing | (within(scope.root) if scope.root else {}),
        allow("ReadRepository", ["s3:GetObject"], readable),
        allow("AddPoints", ["s3:PutObject"], points) | _IF_CREATED,
        allow("Heartbeat", ["s3:PutObject"], scope.objects(f"host/{scope.host}.json")),
        *_locks(scope, points),
        deny("CreateOnly", ["s3:PutObject"], scope.objects("vm/*")) | _IF_OVERWRITTEN,
        deny(
            "NotItsOwn",
            ["s3:PutObject*"],
            scope.objects("repo.json", "keys/*", *(f"vm/*/{kind}/*" for kind in ("pin", "merged", "horizon"))),
        ),
        *_never(scope, "s3:DeleteObject*", "s3:PutBucketPolicy"),
    ]


def restore(scope: Scope) -> list[Document]:
    """Who restores reads everything, and writes nothing; `drsync key recover` may ask KMS for the keys."""
    return [*read_repository(scope), *_slot(scope, "kms:Decrypt"), *_looking(scope), deny_repository_writes(scope)]


def verify(scope: Scope) -> list[Document]:
    """Who verifies reads everything, and notes what is damaged."""
    notes = scope.objects("vm/*/damage/*")
    return [
        *read_repository(scope),
        allow("NoteDamage", ["s3:PutObject"], notes) | _IF_CREATED,
        *_locks(scope, notes),
        *_never(scope, "s3:DeleteObject*", "s3:PutBucketPolicy"),
    ]


def prune(scope: Scope) -> list[Document]:
    """The maintenance: copies forward, deletes what no point needs, extends locks; it can't destroy a version."""
    uploads = allow("FindUnfinished", ["s3:ListBucketMultipartUploads"], [scope.repository])
    return [
        *read_repository(scope),
        allow("CopyForward", ["s3:PutObject"], scope.objects("vm/*")) | _IF_CREATED,
        allow("Delete", ["s3:DeleteObject"], scope.objects(*(f"vm/*/{kind}" for kind in (*POINTS, "merged/*")))),
        uploads,
        allow("AbandonUnfinished", ["s3:AbortMultipartUpload"], scope.objects("*")),
        *_locks(scope, scope.objects("repo.json", "keys/*", "vm/*")),
        *_never(scope),
    ]


def bucket(scope: Scope) -> Document:
    """The bucket's own policy: it holds for everybody, also for roles that drsync knows nothing of."""
    everything = [scope.repository, f"{scope.repository}/*"]
    statements = [
        deny("EncryptedLinesOnly", ["s3:*"], everything) | {"Condition": {"Bool": {"aws:SecureTransport": "false"}}},
        deny("CreateOnly", ["s3:PutObject"], scope.objects("repo.json", "keys/*", "vm/*")) | _IF_OVERWRITTEN,
        deny("NeverDestroy", _DESTROY, everything),
    ]
    if scope.lock_days:
        statements.append(_too_long(scope))
    return {"Version": "2012-10-17", "Statement": [{"Principal": "*"} | one for one in statements]}


def _slot(scope: Scope, *operations: str) -> list[Document]:
    """Use the KMS key of the key ring's slot, and no other one."""
    return [allow("KeySlot", operations, [scope.slot_key_arn])] if scope.slot_key_arn else []


def _locks(scope: Scope, resources: Sequence[str]) -> list[Document]:
    """Lock what is created, and look how long everything is."""
    if not scope.lock_days:
        return _looking(scope)
    return [*_looking(scope), allow("Lock", ["s3:PutObjectRetention"], resources), _too_long(scope)]


def _looking(scope: Scope) -> list[Document]:
    """See how long everything is locked: the alarm is for everybody."""
    bucket_rules = ["s3:GetBucketObjectLockConfiguration", "s3:GetBucketVersioning"]
    looking = [allow("LookAtBucket", bucket_rules, [scope.repository])]
    if scope.lock_days:
        looking.append(allow("LookAtLocks", ["s3:GetObjectRetention"], scope.objects("*")))
    return looking


def _too_long(scope: Scope) -> Document:
    """Nobody makes anybody pay for objects for longer than this."""
    capped = deny("LockForNoLonger", ["s3:PutObject", "s3:PutObjectRetention"], [f"{scope.repository}/*"])
    return capped | {"Condition": {"NumericGreaterThan": {_DAYS: str(scope.lock_days)}}}


def _never(scope: Scope, *more: str) -> list[Document]:
    """What this role must not do, even if another policy allows it."""
    locking = [] if scope.lock_days else ["s3:PutObjectRetention"]
    return [deny("NeverDestroy", [*_DESTROY, *locking, *more], [scope.repository, f"{scope.repository}/*"])]
