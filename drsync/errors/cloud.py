"""AWS, where a VM comes back as an instance: 100-109 what AWS says, 110-115 VM Import, 116, 117, 121 the way home,
118-120 the guest's fitness."""

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


class CantRunInCloud(CloudError):
    """The VM can't become an instance as it is, or as it was asked for; nothing was made."""

    code = 106
    template = "VM {vm} can't come up in {region}: {problem}"
    remedy_template = "drsync restore {vm} --to ec2 --dry-run   (lists all; docs/ec2.md explains)"


class SnapshotFailed(CloudError):
    """AWS does not have in a snapshot what was written; the snapshot is of no use."""

    code = 107
    retryable = True
    template = "snapshot {snapshot} in {region} is not what was written: {problem}"
    remedy_template = "run the same command again: the snapshot is made anew"


class InstanceNotUp(CloudError):
    """The instance is there, and does not run or does not pass EC2's checks; it was left as it is."""

    code = 108
    template = "instance {instance} in {region} is not up: {problem}"
    remedy_template = "aws ec2 get-console-output --latest --region {region} --instance-id {instance} --output text"


class CloudLeftovers(CloudError):
    """What was made can't be removed; it goes on costing."""

    code = 109
    retryable = True
    template = "{problem}; left behind in {region}: {left}"
    remedy_template = "{commands}"


class ImportFailed(CloudError):
    """VM Import gave a task up; what it made is gone. `fields["message"]` is AWS's own message."""

    code = 110
    template = "VM Import gave up {task} in {region}: {message}"
    remedy_template = "{advice}"


class GuestNotImportable(CloudError):
    """VM Import can't convert this guest: its system, kernel, boot loader or partitions; the same task fails again."""

    code = 111
    template = "VM Import can't convert the guest ({task} in {region}): {message}"
    remedy_template = "{advice}"


class ImportNotSetUp(CloudError):
    """The role, the bucket or a policy that VM Import needs is missing or wrong."""

    code = 112
    template = "VM Import is not set up in {region}: {problem}"
    remedy_template = "drsync cloud setup --bucket {bucket} --check   (--apply mends what it may)"


class ImportCancelled(CloudError):
    """Somebody else cancelled the task, or an answer that it ended well never came."""

    code = 113
    template = "{task} in {region} was cancelled"
    remedy_template = "run the same command again: a new task is begun"


class ImportTimeout(CloudError):
    """The task goes on longer than we wait; it was cancelled, or left to itself with --keep-on-error."""

    code = 114
    retryable = True
    template = "{task} in {region} did not end within {waited}; last it said: {message}"
    remedy_template = "aws ec2 {describe} --region {region} --import-task-ids {task}"


class ImageUnfit(CloudError):
    """The disk can't be sent as an image that VM Import takes."""

    code = 115
    template = "disk {disk} can't go through VM Import: {problem}"
    remedy_template = "use --via ebs instead of --via vm-import: it takes disks of any content up to 64 TiB"


class BlockUnreadable(CloudError):
    """A block of a snapshot can't be had as AWS says that it is; what was read before stays."""

    code = 116
    retryable = True
    template = "block {index} of snapshot {snapshot} in {region} can't be read: {problem}"
    remedy_template = "run the same command again: it goes on where it was"


class CantFailBack(CloudError):
    """The VM's instance, or its volumes, are not there or can't be told; nothing was made."""

    code = 117
    template = "VM {vm} can't be failed back from {region}: {problem}"
    remedy_template = "drsync failback {vm} --from ec2 --dry-run   (docs/ec2.md explains it in 'The way home')"


class WontBoot(CloudError):
    """The point would not boot in EC2, as far as can be seen; nothing was written."""

    code = 118
    template = "VM {vm} would not come up in EC2 from point {point}: {problems}"
    remedy_template = (
        "drsync preflight {vm} --to ec2 --point {point}   (says what to do about each; "
        "restore --fix-guest mends most of it, --skip-preflight brings it up all the same)"
    )


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


class StillProtected(CloudError):
    """The VM's log went on without the instance, so somebody else may still run the VM; nothing was made."""

    code = 121
    template = "VM {vm} went on without instance {instance}: {problem}"
    remedy_template = (
        "drsync failback {vm} --from ec2 --instance {instance} --take-over   (only if the instance is what counts)"
    )
