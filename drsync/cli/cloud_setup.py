"""`drsync cloud setup`: the bucket and the role of VM Import, and policies for drsync's own roles."""

from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import click

from drsync.cli import render
from drsync.cli.app import App, json_option, pass_app
from drsync.errors import ImportNotSetUp

if TYPE_CHECKING:
    from drsync.target.ec2.aws import Aws
    from drsync.target.ec2.policy import Scope
    from drsync.target.ec2.role import Finding


@click.command("setup")
@click.option("--check", "mode", flag_value="check", default="check", help="Say what is missing; changes nothing.")
@click.option("--print", "mode", flag_value="print", help="Print the policies, one for each role; AWS is not asked.")
@click.option("--apply", "mode", flag_value="apply", help="Make the bucket and the role, as far as they are missing.")
@click.option("--bucket", required=True, help="Where images lie while VM Import reads them; not the repository's.")
@click.option("--prefix", default="drsync-import", show_default=True, help="What the images' keys begin with.")
@click.option("--role-name", default="vmimport", show_default=True, help="The role that VM Import takes on.")
@click.option("--repository", help="s3://BUCKET/PREFIX; else that of the configuration file.")
@click.option("--region", help="The region; else AWS_REGION or the profile's.")
@click.option("--account", help="With --print: 12 digits, which narrow the policies to this account.")
@click.option("--kms-key", default="", help="ARN of the key that snapshots are encrypted with.")
@click.option("--slot-key", default="", help="With --print: ARN of the KMS key of a key slot (drsync key add kms).")
@click.option("--host", default="*", help="With --print: the host's name in the repository, for its own policy.")
@click.option(
    "--vm", "vms", multiple=True, help="With --print: a VM of that host, which may touch no others; repeat it."
)
@click.option(
    "--lock-days",
    type=click.IntRange(min=0),
    default=31,
    show_default=True,
    help="With --print: at most so long may be locked: a day more than [repository] lock; 0 = nothing.",
)
@click.option("--output", type=click.Path(path_type=Path), help="With --print: a directory for one file a document.")
@json_option
@pass_app
def setup(
    app: App,
    mode: str,
    bucket: str,
    prefix: str,
    role_name: str,
    repository: str | None,
    region: str | None,
    account: str | None,
    kms_key: str,
    slot_key: str,
    host: str,
    vms: tuple[str, ...],
    lock_days: int,
    output: Path | None,
) -> None:
    """Check or make what VM Import needs.

    That is a bucket in the region, and a role that AWS's service reads it as. --print shows the policies
    for drsync's own roles, too, and that of the repository's bucket. They are attached by hand.
    """
    app.set_up_logging()
    where = repository or app.config().repository.url
    names: dict[str, Any] = {"import_bucket": bucket, "import_prefix": prefix, "import_role": role_name}
    if mode == "print":
        names |= {"host": host, "vms": vms or ("*",), "lock_days": lock_days, "slot_key_arn": slot_key}
        _print(app, _scope(where, account=account or "*", region=region or "*", kms_key_arn=kms_key, **names), output)
        return
    from drsync.target.ec2.aws import Aws, CloudOptions  # noqa: PLC0415  boto3 takes a third of a second
    from drsync.target.ec2.role import account_of  # noqa: PLC0415  as above

    with Aws(CloudOptions(region=region)) as aws:
        scope = _scope(where, account=account_of(aws), region=aws.region, kms_key_arn=kms_key, **names)
        _check_or_apply(app, aws, scope, apply=mode == "apply")


def _check_or_apply(app: App, aws: "Aws", scope: "Scope", *, apply: bool) -> None:
    from drsync.target.ec2.role import ImportSetup, State  # noqa: PLC0415  as above

    work = ImportSetup(aws, scope)
    made = work.apply() if apply else []
    if any(what.startswith("role ") for what in made):
        render.note("what IAM was told takes effect within about a minute")
    findings = work.findings()
    bad = [finding for finding in findings if finding.state in (State.MISSING, State.WRONG)]
    if app.as_json and not bad:
        render.document({"region": aws.region, "made": made, "findings": [_shown(one) for one in findings]})
    elif not app.as_json:
        for what in made:
            render.line(f"made {what}")
        render.table(["what", "state", "problem"], [[one.what, one.state.value, one.problem] for one in findings])
    if bad:
        problem = "; ".join(f"{one.what}: {one.problem}" for one in bad)
        raise ImportNotSetUp(region=aws.region, bucket=scope.import_bucket, problem=problem)


def _print(app: App, scope: "Scope", output: Path | None) -> None:
    from drsync.target.ec2.policy import documents  # noqa: PLC0415  only where it is needed

    found = documents(scope)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        for name, document in found.items():
            (output / f"{name}.json").write_text(render.json_text(document) + "\n")
        render.note(f"wrote {len(found)} documents into {output}")
    if app.as_json or output is None:
        render.document(found)


def _scope(repository: str, **more: Any) -> "Scope":
    from drsync.target.ec2.policy import Scope  # noqa: PLC0415  only where it is needed

    parts = urlsplit(repository)
    if parts.scheme != "s3" or not parts.netloc:
        raise click.UsageError(f"{repository} is no repository in S3: say --repository s3://BUCKET/PREFIX")
    try:
        return Scope(repository_bucket=parts.netloc, repository_prefix=parts.path.strip("/"), **more)
    except ValueError as err:
        raise click.UsageError(str(err)) from err


def _shown(finding: "Finding") -> dict[str, Any]:
    return {
        "what": finding.what,
        "state": finding.state.value,
        "problem": finding.problem or None,
        "mended_by_apply": finding.mended_by_apply,
    }
