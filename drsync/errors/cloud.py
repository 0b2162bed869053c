"""AWS, where a VM comes back as an instance: 100-109 what AWS says, 110-117 VM Import, 118-121 the guest's fitness."""

from drsync.errors.base import DrsyncError


class CloudError(DrsyncError):
    """AWS, where a VM comes back as an instance."""


class CloudUnavailable(CloudError):
    """AWS did not answer, or answered that it can't now; a request may or may not have been carried out."""

    code = 100
    retryable = True
    template = "{operation} does not work now in {region}: {problem}"
    remedy_template = (
        "aws ec2 describe-regions --region {region}   (when AWS answers, run the same command again: it goes on)"
    )


class CloudDenied(CloudError):
    """AWS refuses these credentials (none, wrong, expired, or not allowed this)."""

    code = 101
    template = "{operation} in {region} is denied: {problem}"
    remedy_template = "aws sts get-caller-identity   (then compare its policy with docs/ec2.md)"


class CloudRefused(CloudError):
    """AWS refuses a request as it is; `fields["aws_code"]` is AWS's own code. The same request is refused again."""

    code = 102
    template = "{operation} was refused in {region}: {aws_code}: {problem}"
    remedy_template = "aws ec2 describe-account-attributes --region {region}   (docs/ec2.md lists AWS's limits)"


class CloudNotFound(CloudRefused):
    """What the request names is not there: never made, deleted, of another account or region, or not visible yet."""

    code = 103
    template = "{operation} in {region} names what is not there: {aws_code}: {problem}"
    remedy_template = "aws sts get-caller-identity   (is it this account, and region {region}?)"


class CloudLimit(CloudError):
    """A quota of the account is used up, or AWS has no such machine free; what was made before is as it was."""

    code = 104
    retryable = True
    template = "{operation} meets a limit in {region}: {aws_code}: {problem}"
    remedy_template = (
        "aws service-quotas list-service-quotas --service-code ec2 --region {region}"
        "   (raise it, free something, or choose another --instance-type)"
    )


class CloudMisconfigured(CloudError):
    """No region is chosen, or the endpoint can't be one; nothing was sent."""

    code = 105
    template = "can't reach AWS as configured: {problem}"
    remedy_template = "aws configure list   (or say --region, and see that AWS_ENDPOINT_URL is not set by mistake)"


class WontBoot(CloudError):
    """The point would not boot in EC2, as far as can be seen; nothing was written."""

    code = 118
    template = "VM {vm} would not come up in EC2 from point {point}: {problems}"
    remedy_template = "drsync preflight {vm} --to ec2 --point {point}   (says what to do about each)"


class FixUnavailable(CloudError):
    """What changes a guest's disks offline is not installed, or does not work here; nothing was written."""

    code = 119
    template = "can't prepare the guest on {path}: {problem}"
    remedy_template = "apt install python3-guestfs libguestfs-tools   (then: libguestfs-test-tool)"


class FixFailed(CloudError):
    """The guest on a restored copy could not be prepared; the copy may be half changed, the repository is untouched."""

    code = 120
    template = "preparing the guest on {path} failed at {step}: {problem}"
    remedy_template = (
        "drsync restore {vm} --to image --output OTHER-DIRECTORY   (without --fix-guest; then repair by hand)"
    )
