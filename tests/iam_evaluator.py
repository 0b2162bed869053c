"""What IAM would say to a request under one policy: enough of its rules for the documents of drsync, and no more.

From the IAM user guide, "Policy evaluation logic" and "Condition operators": a matching Deny wins, else a matching
Allow, else it is denied. Actions match without case, * and ? are wildcards. A condition's key that the request lacks
fails every operator but ...IfExists and Null. What is not known here is an error, never a yes.
"""

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from s3_lab import ROOT

from drsync.target.ec2.aws import Call

PACKAGE = ROOT / "drsync/target/ec2"
ACCOUNT, REGION = "111122223333", "us-east-1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One thing that a request needs to be allowed."""

    action: str
    resource: str
    context: Mapping[str, str] = field(default_factory=dict)


def is_allowed(document: Mapping[str, Any], asked: Asked) -> bool:
    """Whether one policy, alone, allows it."""
    effects = {one["Effect"] for one in document["Statement"] if _matches(one, asked)}
    return "Allow" in effects and "Deny" not in effects


def refused(document: Mapping[str, Any], calls: Sequence[Call], tags: Mapping[str, str] | None = None) -> list[Asked]:
    """What a policy does not allow of these calls; `tags` are those of the things that they name."""
    return [asked for call in calls for asked in needs(call, tags or {}) if not is_allowed(document, asked)]


def _matches(statement: Mapping[str, Any], asked: Asked) -> bool:
    known = {"Sid", "Effect", "Action", "Resource", "Condition", "Principal"}
    if statement.keys() - known or statement.get("Principal", "*") != "*":
        raise NotImplementedError(f"elements {statement.keys() - known}")
    actions, resources = _listed(statement["Action"]), _listed(statement["Resource"])
    return (
        any(_like(action.lower(), asked.action.lower()) for action in actions)
        and any(_like(resource, asked.resource) for resource in resources)
        and all(
            _holds(operator, key, _listed(values), asked.context)
            for operator, keys in statement.get("Condition", {}).items()
            for key, values in keys.items()
        )
    )


def _holds(operator: str, key: str, values: Sequence[str], context: Mapping[str, str]) -> bool:
    value = context.get(key)
    if operator == "Null":
        return (value is None) == (values == ["true"])
    if operator.endswith("IfExists") and value is None:
        return True
    match operator.removesuffix("IfExists"):
        case "StringEquals":
            return value is not None and value in values
        case "StringLike":
            return value is not None and any(_like(one, value) for one in values)
        case "Bool":
            return value is not None and value.lower() in values
        case "NumericGreaterThan":
            return value is not None and any(float(value) > float(one) for one in values)
    raise NotImplementedError(operator)


def _like(pattern: str, text: str) -> bool:
    parts = (".*" if c == "*" else "." if c == "?" else re.escape(c) for c in pattern)
    return re.fullmatch("".join(parts), text, re.DOTALL) is not None


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def operations_of(*modules: str) -> set[tuple[str, str]]:
    """(service, operation) of all that modules of drsync/target/ec2 call, by their source: `aws.s3.put_object(…)`."""
    found: set[tuple[str, str]] = set()
    for path in (path for module in modules for path in sorted(PACKAGE.glob(module))):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Attribute(
                    value=ast.Attribute(attr="ec2" | "s3" | "iam" | "sts" | "ebs" as service), attr=name
                ):
                    found.add((service, name))
                case ast.Call(
                    func=ast.Attribute(value=ast.Attribute(attr=service), attr="get_paginator"),
                    args=[ast.Constant(value=name)],
                ):
                    found.add((service, str(name)))
    not_operations = ("get_paginator", "meta", "close", "exceptions")
    return {(service, _operation(name)) for service, name in found if name not in not_operations}


def action_of(service: str, operation: str) -> str:
    """The action that an operation needs first of all."""
    known = {**S3_BUCKET, **S3_OBJECT} if service == "s3" else {}
    return known.get(operation, f"{service}:{operation}")


def _operation(method: str) -> str:
    """boto3's put_object is PutObject."""
    return "".join(part.capitalize() for part in method.split("_"))


# --- What a call of drsync needs: "Actions, resources, and condition keys" of S3, EC2, EBS, IAM and STS ---------------

S3_BUCKET = {
    "CreateBucket": "s3:CreateBucket",
    "DeleteBucket": "s3:DeleteBucket",
    "DeleteBucketLifecycle": "s3:PutLifecycleConfiguration",
    "DeleteBucketPolicy": "s3:DeleteBucketPolicy",
    "GetBucketLifecycleConfiguration": "s3:GetLifecycleConfiguration",
    "GetBucketLocation": "s3:GetBucketLocation",
    "GetBucketVersioning": "s3:GetBucketVersioning",
    "GetObjectLockConfiguration": "s3:GetBucketObjectLockConfiguration",
    "GetPublicAccessBlock": "s3:GetBucketPublicAccessBlock",
    "ListMultipartUploads": "s3:ListBucketMultipartUploads",
    "ListObjectVersions": "s3:ListBucketVersions",
    "ListObjectsV2": "s3:ListBucket",
    "PutBucketLifecycleConfiguration": "s3:PutLifecycleConfiguration",
    "PutBucketPolicy": "s3:PutBucketPolicy",
    "PutBucketVersioning": "s3:PutBucketVersioning",
    "PutObjectLockConfiguration": "s3:PutBucketObjectLockConfiguration",
    "PutPublicAccessBlock": "s3:PutBucketPublicAccessBlock",
}
S3_OBJECT = {
    "AbortMultipartUpload": "s3:AbortMultipartUpload",
    "CompleteMultipartUpload": "s3:PutObject",
    "CreateMultipartUpload": "s3:PutObject",
    "DeleteObject": "s3:DeleteObject",
    "CopyObject": "s3:PutObject",
    "GetObject": "s3:GetObject",
    "GetObjectRetention": "s3:GetObjectRetention",
    "HeadObject": "s3:GetObject",
    "ListParts": "s3:ListMultipartUploadParts",
    "PutObject": "s3:PutObject",
    "PutObjectLegalHold": "s3:PutObjectLegalHold",
    "PutObjectRetention": "s3:PutObjectRetention",
    "UploadPart": "s3:PutObject",
}
"""Of S3's operations: the action, which is not always called as the operation."""
KINDS = {
    "snap": "snapshot",
    "ami": "image",
    "i": "instance",
    "vol": "volume",
    "eni": "network-interface",
    "import-snap": "import-snapshot-task",
    "import-ami": "import-image-task",
}
NAMED = {
    "CancelImportTask": "ImportTaskId",
    "DeleteSnapshot": "SnapshotId",
    "DeregisterImage": "ImageId",
    "StartInstances": "InstanceIds",
    "StopInstances": "InstanceIds",
    "TerminateInstances": "InstanceIds",
}
"""Operations on things that are there, and the parameter that names them."""
LAUNCHED = ("image", "snapshot", "subnet", "security-group", "network-interface")
MADE_BY_LAUNCH = ("instance", "volume")


def needs(call: Call, tags: Mapping[str, str]) -> Iterator[Asked]:
    """All that must be allowed for a call."""
    yield from {"s3": _s3, "ec2": _ec2, "ebs": _ebs, "iam": _iam, "sts": _sts}[call.service](call, tags)


def _s3(call: Call, _tags: Mapping[str, str]) -> Iterator[Asked]:
    bucket = f"arn:aws:s3:::{call.parameters['Bucket']}"
    if call.operation in S3_BUCKET:
        context = {"s3:prefix": call.parameters["Prefix"]} if "Prefix" in call.parameters else {}
        yield Asked(action=S3_BUCKET[call.operation], resource=bucket, context=context)
        return
    if call.operation == "DeleteObjects":  # each as if it were asked for alone
        for one in call.parameters["Delete"]["Objects"]:
            yield from _s3(Call("s3", "DeleteObject", call.parameters | one), _tags)
        return
    context = {"s3:if-none-match": call.parameters["IfNoneMatch"]} if "IfNoneMatch" in call.parameters else {}
    resource = f"{bucket}/{call.parameters['Key']}"
    action = S3_OBJECT[call.operation]
    if "VersionId" in call.parameters and action in ("s3:GetObject", "s3:DeleteObject"):
        action += "Version"
    lock = _lock_of(call)
    yield Asked(action=action, resource=resource, context=context | lock)
    if lock and call.operation == "PutObject":
        yield Asked(action="s3:PutObjectRetention", resource=resource, context=lock)
    if call.parameters.get("BypassGovernanceRetention"):
        yield Asked(action="s3:BypassGovernanceRetention", resource=resource)
    if call.operation in ("GetObject", "HeadObject"):  # else what is not there is a 403
        yield Asked(action="s3:ListBucket", resource=bucket)


def _lock_of(call: Call) -> dict[str, str]:
    """The context key of a request that locks an object: for how many days from now."""
    until = call.parameters.get("ObjectLockRetainUntilDate") or call.parameters.get("Retention", {}).get(
        "RetainUntilDate"
    )
    days = None if until is None else (until - datetime.now(UTC)).total_seconds() / 86400
    return {} if days is None else {"s3:object-lock-remaining-retention-days": f"{days:.6f}"}


def _ec2(call: Call, tags: Mapping[str, str]) -> Iterator[Asked]:
    action, requested = f"ec2:{call.operation}", _requested(call)
    if call.operation.startswith("Describe"):
        yield Asked(action=action, resource="*")
    elif call.operation in ("ImportSnapshot", "ImportImage"):
        task = "import-snapshot-task" if call.operation == "ImportSnapshot" else "import-image-task"
        for kind in (task, "snapshot", *(("image",) if call.operation == "ImportImage" else ())):
            yield Asked(action=action, resource=_arn(f"{kind}/new"), context=requested)
        yield from _tagging(call)
        role = f"arn:aws:iam::{ACCOUNT}:role/{call.parameters['RoleName']}"
        yield Asked(action="iam:PassRole", resource=role, context={"iam:PassedToService": "vmie.amazonaws.com"})
    elif call.operation in ("RunInstances", "RegisterImage", "CreateSnapshots"):
        yield from _making(call, tags)
        yield from _tagging(call)
    elif call.operation == "CreateTags":
        asked = {f"aws:RequestTag/{tag['Key']}": tag["Value"] for tag in call.parameters["Tags"]}
        for resource in call.parameters["Resources"]:
            yield Asked(action=action, resource=_arn_of(resource), context={**_of(tags), **asked})
    elif call.operation in NAMED:
        named = call.parameters[NAMED[call.operation]]
        for resource in [named] if isinstance(named, str) else named:
            yield Asked(action=action, resource=_arn_of(resource), context=_of(tags))
    else:
        raise NotImplementedError(call.operation)


def _making(call: Call, tags: Mapping[str, str]) -> Iterator[Asked]:
    """What makes something of things that are there."""
    action = f"ec2:{call.operation}"
    of, made = {
        "RunInstances": ([f"{kind}/x-1" for kind in LAUNCHED], MADE_BY_LAUNCH),
        "RegisterImage": (["snapshot/snap-1"], ("image",)),
        "CreateSnapshots": (["instance/i-1", "volume/vol-1"], ("snapshot",)),
    }[call.operation]
    for resource in of:
        yield Asked(action=action, resource=_arn(resource), context=_of(tags))
    for kind in made:
        yield Asked(action=action, resource=_arn(f"{kind}/new"), context=_requested(call, kind))


def _ebs(call: Call, tags: Mapping[str, str]) -> Iterator[Asked]:
    named = ("SnapshotId", "FirstSnapshotId", "SecondSnapshotId")
    found = [call.parameters[name] for name in named if name in call.parameters]
    own = {f"aws:RequestTag/{tag['Key']}": tag["Value"] for tag in call.parameters.get("Tags", ())}
    for snapshot in found or ["new"]:
        yield Asked(action=f"ebs:{call.operation}", resource=_arn(f"snapshot/{snapshot}"), context={**_of(tags), **own})
    if own:
        yield Asked(action="ec2:CreateTags", resource=_arn("snapshot/new"), context=own)


def _iam(call: Call, _tags: Mapping[str, str]) -> Iterator[Asked]:
    role = f"arn:aws:iam::{ACCOUNT}:role/{call.parameters['RoleName']}"
    yield Asked(action=f"iam:{call.operation}", resource=role)


def _sts(call: Call, _tags: Mapping[str, str]) -> Iterator[Asked]:
    """Nobody needs a permission to ask who he is (AWS STS API reference, GetCallerIdentity)."""
    if call.operation != "GetCallerIdentity":
        raise NotImplementedError(call.operation)
    yield from ()


def _requested(call: Call, kind: str = "") -> dict[str, str]:
    """The context keys of the tags that a request makes something with."""
    specifications = call.parameters.get("TagSpecifications", ())
    return {
        f"aws:RequestTag/{tag['Key']}": tag["Value"]
        for one in specifications
        if kind in ("", one["ResourceType"])
        for tag in one["Tags"]
    }


def _tagging(call: Call) -> Iterator[Asked]:
    """Tags in a request need the right to tag what it makes."""
    for one in call.parameters.get("TagSpecifications", ()):
        kind = one["ResourceType"]
        yield Asked(action="ec2:CreateTags", resource=_arn(f"{kind}/new"), context=_requested(call, kind))


def _of(tags: Mapping[str, str]) -> dict[str, str]:
    return {f"aws:ResourceTag/{key}": value for key, value in tags.items()}


def _arn_of(resource_id: str) -> str:
    return _arn(f"{KINDS[resource_id.rpartition('-')[0]]}/{resource_id}")


def _arn(name: str) -> str:
    account = "" if name.startswith(("snapshot/", "image/")) else ACCOUNT
    return f"arn:aws:ec2:{REGION}:{account}:{name}"
