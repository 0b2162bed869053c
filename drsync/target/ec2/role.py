"""What VM Import needs in an account: a bucket for images, and a role that AWS's service reads it as.

`findings` says what is missing or wrong, `apply` makes what is missing. What is there and is not as drsync would make
it is mended only where drsync made it (the role's policy named POLICY_NAME, the bucket's rule named RULE_ID);
everything else is reported and left to its owner.

An image is a whole disk, not encrypted by drsync: AWS must be able to read it. So the bucket is private, S3 encrypts
what lies in it (always, since 2023), and a rule removes what a killed import has left after KEPT_DAYS.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

from drsync.errors import CloudDenied, CloudNotFound, CloudRefused
from drsync.target.ec2.aws import Aws
from drsync.target.ec2.policy import EXTERNAL_ID, SERVICE, Document, Scope, import_service_policy, import_trust

if TYPE_CHECKING:
    from mypy_boto3_s3.type_defs import LifecycleRuleUnionTypeDef, PublicAccessBlockConfigurationTypeDef

POLICY_NAME: Final = "drsync-vmimport"
RULE_ID: Final = "drsync-import-leftovers"
KEPT_DAYS: Final = 7
"""As long as AWS lists import tasks."""
_PRIVATE: Final["PublicAccessBlockConfigurationTypeDef"] = {
    "BlockPublicAcls": True,
    "IgnorePublicAcls": True,
    "BlockPublicPolicy": True,
    "RestrictPublicBuckets": True,
}


class State(StrEnum):
    """How something is."""

    GOOD = "good"
    MISSING = "missing"
    WRONG = "wrong"
    UNSURE = "unsure"
    """It may be enough, but only its owner can say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    what: str
    state: State
    problem: str = ""
    mended_by_apply: bool = False


class ImportSetup:
    """Looks at the role and the bucket, and makes them."""

    def __init__(self, aws: Aws, scope: Scope) -> None:
        """`scope` has the account and the Region."""
        self._aws = aws
        self._scope = scope

    def findings(self) -> list[Finding]:
        """Everything that VM Import needs, and how it is. Nothing is changed.

        Raises:
            CloudError: AWS failed, or refuses to tell.
        """
        bucket = self._bucket()
        role = self._role()
        return [
            bucket,
            *(() if bucket.state is State.MISSING else (self._privacy(), self._rule())),
            role,
            *(() if role.state is State.MISSING else (self._policy(),)),
        ]

    def apply(self) -> list[str]:
        """Make what is missing; what was made.

        Raises:
            CloudError: AWS failed or refused; what was made before is there, so call it again.
        """
        made = []
        for finding in self.findings():
            if finding.mended_by_apply:
                made += self._mend(finding)
        return made

    def _mend(self, finding: Finding) -> list[str]:
        scope = self._scope
        bucket, role = f"bucket {scope.import_bucket}", f"role {scope.import_role}"
        if finding.what == bucket:
            self._make_bucket()
            self._block_public()
            self._put_rule()
            return [f"{bucket} in {self._aws.region}, private, with the rule {RULE_ID}"]
        if finding.what == role:
            self._make_role()
            self._put_policy()
            return [f"{role} with the policy {POLICY_NAME}"]
        if finding.what == f"{bucket}, rule {RULE_ID}":
            self._put_rule()
        else:
            self._put_policy()
        return [finding.what]

    # --- The bucket ---------------------------------------------------------------------------------------------------

    def _bucket(self) -> Finding:
        what = f"bucket {self._scope.import_bucket}"
        try:
            with self._aws.translated("GetBucketLocation"):
                answer = self._aws.s3.get_bucket_location(
                    Bucket=self._scope.import_bucket, ExpectedBucketOwner=self._scope.account
                )
        except CloudNotFound:
            return Finding(what=what, state=State.MISSING, problem="there is no such bucket", mended_by_apply=True)
        except CloudDenied as err:
            problem = f"it can't be read; perhaps it is somebody else's ({err.fields['problem']})"
            return Finding(what=what, state=State.WRONG, problem=problem)
        told = str(answer.get("LocationConstraint", None))  # us-east-1 is told by no answer at all
        region = {"EU": "eu-west-1", "None": "us-east-1"}.get(told, told)
        if region != self._aws.region:
            problem = f"it is in {region}, but VM Import takes images only from {self._aws.region}"
            return Finding(what=what, state=State.WRONG, problem=problem)
        return Finding(what=what, state=State.GOOD)

    def _privacy(self) -> Finding:
        what = f"bucket {self._scope.import_bucket}, public access"
        try:
            with self._aws.translated("GetPublicAccessBlock"):
                found = self._aws.s3.get_public_access_block(Bucket=self._scope.import_bucket)
            open_by = [name for name, on in _PRIVATE.items() if found["PublicAccessBlockConfiguration"].get(name) != on]
        except (CloudNotFound, CloudRefused):
            open_by = list(_PRIVATE)
        if not open_by:
            return Finding(what=what, state=State.GOOD)
        problem = f"not switched on: {', '.join(open_by)}; images are whole disks, not encrypted by drsync"
        return Finding(what=what, state=State.UNSURE, problem=problem)

    def _rule(self) -> Finding:
        what = f"bucket {self._scope.import_bucket}, rule {RULE_ID}"
        state = State.GOOD if any(rule.get("ID") == RULE_ID for rule in self._rules()) else State.MISSING
        problem = "" if state is State.GOOD else "what a killed import leaves is never removed"
        return Finding(what=what, state=state, problem=problem, mended_by_apply=state is State.MISSING)

    def _rules(self) -> Sequence["LifecycleRuleUnionTypeDef"]:
        try:
            with self._aws.translated("GetBucketLifecycleConfiguration"):
                return self._aws.s3.get_bucket_lifecycle_configuration(Bucket=self._scope.import_bucket)["Rules"]
        except (CloudNotFound, CloudRefused):  # NoSuchLifecycleConfiguration
            return []

    def _make_bucket(self) -> None:
        where: Any = self._aws.region
        with self._aws.translated("CreateBucket"):
            if where == "us-east-1":  # which is the default, and refused as a constraint
                self._aws.s3.create_bucket(Bucket=self._scope.import_bucket)
            else:
                self._aws.s3.create_bucket(
                    Bucket=self._scope.import_bucket, CreateBucketConfiguration={"LocationConstraint": where}
                )

    def _block_public(self) -> None:
        with self._aws.translated("PutPublicAccessBlock"):
            self._aws.s3.put_public_access_block(
                Bucket=self._scope.import_bucket, PublicAccessBlockConfiguration=_PRIVATE
            )

    def _put_rule(self) -> None:
        """Ours beside those that are there: the request replaces all of them."""
        others: list[LifecycleRuleUnionTypeDef] = [rule for rule in self._rules() if rule.get("ID") != RULE_ID]
        ours: LifecycleRuleUnionTypeDef = {
            "ID": RULE_ID,
            "Status": "Enabled",
            "Filter": {"Prefix": f"{self._scope.import_prefix}/"},
            "Expiration": {"Days": KEPT_DAYS},
            "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": KEPT_DAYS},
        }
        with self._aws.translated("PutBucketLifecycleConfiguration"):
            self._aws.s3.put_bucket_lifecycle_configuration(
                Bucket=self._scope.import_bucket, LifecycleConfiguration={"Rules": [*others, ours]}
            )

    # --- The role -----------------------------------------------------------------------------------------------------

    def _role(self) -> Finding:
        what = f"role {self._scope.import_role}"
        try:
            with self._aws.translated("GetRole"):
                found = self._aws.iam.get_role(RoleName=self._scope.import_role)["Role"]
        except CloudNotFound:
            return Finding(what=what, state=State.MISSING, problem="there is no such role", mended_by_apply=True)
        if not trusts_vm_import(_document(found.get("AssumeRolePolicyDocument"))):
            problem = f"it does not trust {SERVICE} with the external id {EXTERNAL_ID}"
            return Finding(what=what, state=State.WRONG, problem=problem)
        return Finding(what=what, state=State.GOOD)

    def _policy(self) -> Finding:
        what = f"role {self._scope.import_role}, policy {POLICY_NAME}"
        name = self._scope.import_role
        try:
            with self._aws.translated("GetRolePolicy"):
                found = _document(
                    self._aws.iam.get_role_policy(RoleName=name, PolicyName=POLICY_NAME)["PolicyDocument"]
                )
        except CloudNotFound:
            return self._other_policies(what)
        if found == import_service_policy(self._scope):
            return Finding(what=what, state=State.GOOD)
        problem = "it is not what drsync needs for this bucket"
        return Finding(what=what, state=State.WRONG, problem=problem, mended_by_apply=True)

    def _other_policies(self, what: str) -> Finding:
        """A role that somebody else made may be able to read the bucket by other policies."""
        name = self._scope.import_role
        with self._aws.translated("ListRolePolicies"):
            others = self._aws.iam.list_role_policies(RoleName=name)["PolicyNames"]
        with self._aws.translated("ListAttachedRolePolicies"):
            attached = self._aws.iam.list_attached_role_policies(RoleName=name)["AttachedPolicies"]
        names = [*others, *(one["PolicyName"] for one in attached if "PolicyName" in one)]
        state = State.UNSURE if names else State.MISSING
        problem = f"not there, but {', '.join(names)} may do" if names else "the role may read nothing"
        return Finding(what=what, state=state, problem=problem, mended_by_apply=True)

    def _make_role(self) -> None:
        with self._aws.translated("CreateRole"):
            self._aws.iam.create_role(
                RoleName=self._scope.import_role,
                Description="VM Import reads images of drsync as this role",
                AssumeRolePolicyDocument=json.dumps(import_trust(self._scope)),
            )

    def _put_policy(self) -> None:
        with self._aws.translated("PutRolePolicy"):
            self._aws.iam.put_role_policy(
                RoleName=self._scope.import_role,
                PolicyName=POLICY_NAME,
                PolicyDocument=json.dumps(import_service_policy(self._scope)),
            )


def account_of(aws: Aws) -> str:
    """The account whose credentials these are.

    Raises:
        CloudError: AWS failed or refused.
    """
    with aws.translated("GetCallerIdentity"):
        return aws.sts.get_caller_identity()["Account"]


def trusts_vm_import(trust: Mapping[str, Any]) -> bool:
    """Whether the service may take a role with this trust policy on."""
    statements = trust.get("Statement", [])
    return any(_lets_in(one) for one in ([statements] if isinstance(statements, dict) else statements))


def _lets_in(statement: Mapping[str, Any]) -> bool:
    principal = statement.get("Principal", {})
    services = principal.get("Service", []) if isinstance(principal, dict) else []
    external = statement.get("Condition", {}).get("StringEquals", {}).get("sts:ExternalId", EXTERNAL_ID)
    return (
        statement.get("Effect") == "Allow"
        and SERVICE in ([services] if isinstance(services, str) else services)
        and "sts:AssumeRole" in _listed(statement.get("Action"))
        and EXTERNAL_ID in _listed(external)
    )


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def _document(value: Any) -> Document:
    """boto3 decodes policies; a double may not."""
    found: Document = json.loads(value) if isinstance(value, str) else dict(value or {})
    return found
