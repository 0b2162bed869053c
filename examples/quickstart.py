"""The quickstart's story, step by step; `bash examples/quickstart.sh` does the set-up and runs it.

Every drsync command is printed before it runs, and can be typed again afterwards.
"""

import argparse
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import boto3
from botocore.exceptions import BotoCoreError, ClientError
from guest import Guest, GuestDisk, GuestFailed

ROOT = Path(__file__).parents[1]
IMAGE = ROOT / ".lab/guest/guest.qcow2"
LAB = Path(".lab/quickstart")
CONFIG = LAB / "drsync.toml"
VM = "demo"
BUCKET = "drsync-quickstart"
REGION = "us-east-1"
MIB = 1024 * 1024

CONFIG_TEXT = """\
[repository]
{repository}
key_file = "{lab}/repository.key"

[spool]
path = "{lab}/spool"
reserve = "256MiB"

[[vm]]
name = "{vm}"
source = "qmp"
socket = "{socket}"
rpo = "5m"
disks = {{ root = "d0" }}
"""


class QuickstartFailed(Exception):
    """A step did not do what it should."""


@dataclass(kw_only=True)
class Story:
    """What is known so far: the story's only state."""

    s3_url: str | None = None
    """LocalStack's endpoint; None for a repository in a directory."""
    step: int = 0
    title: str = "preparations"
    points: list[dict[str, Any]] = field(default_factory=list)
    lost_at: datetime | None = None
    rto_s: float = 0.0

    def begin(self, title: str) -> None:
        """Announce the next step."""
        self.step += 1
        self.title = title
        print(f"\n── {self.step}. {title} ".ljust(100, "─"))


def tell(text: str) -> None:
    """Say a line of the story."""
    print(f"   {text}")


def drsync(*arguments: str) -> None:
    """Run drsync as a user would, its output on the terminal."""
    command = [".venv/bin/drsync", "--config", str(CONFIG), *arguments]
    print(f"\n$ {' '.join(command)}")
    status = subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode
    if status != 0:
        raise QuickstartFailed(f"`{' '.join(command)}` ended with status {status}")


def read_points() -> list[dict[str, Any]]:
    """The VM's points, oldest first, as drsync tells them to programs."""
    command = [".venv/bin/drsync", "--config", str(CONFIG), "--json", "points", VM]
    answer = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=False)
    if answer.returncode != 0:
        raise QuickstartFailed(f"`{' '.join(command)}` ended with status {answer.returncode}")
    points: list[dict[str, Any]] = json.loads(answer.stdout)
    return sorted(points, key=lambda point: int(point["point"]))


def capture(story: Story, expected_kind: str) -> None:
    """Take a point, and check that it is of the kind that the story claims."""
    drsync("capture", VM)
    before, story.points = len(story.points), read_points()
    if len(story.points) != before + 1 or story.points[-1]["kind"] != expected_kind:
        raise QuickstartFailed(f"expected one {expected_kind} point more, but there are: {story.points}")


def in_guest(guest: Guest, command: str) -> str:
    """Run a command in the guest, for the user to see."""
    print(f"\n{VM}# {command}")
    output = guest.check(command, timeout_s=300)
    for line in output.splitlines():
        tell(line)
    return output


def write_config(story: Story, guest: Guest) -> None:
    """Write the configuration file and show it."""
    lab = ROOT / LAB
    if story.s3_url is None:
        repository = f'url = "file://{lab}/repository"'
    else:
        prefix = f"run-{datetime.now(UTC):%Y%m%dT%H%M%S}"  # an earlier run's repository may be there
        repository = f'url = "s3://{BUCKET}/{prefix}"\nendpoint_url = "{story.s3_url}"\nregion = "{REGION}"'
    text = CONFIG_TEXT.format(repository=repository, lab=lab, vm=VM, socket=guest.qmp_socket)
    CONFIG.write_text(text)
    tell(f"{CONFIG}:")
    print("\n".join(f"   │ {line}" for line in text.splitlines()))


@contextmanager
def localstack() -> Iterator[str]:
    """The endpoint of a LocalStack: one that runs already, else one that ends with the story."""
    given = os.environ.get("LOCALSTACK_URL")
    if given:
        yield given
        return
    ran_before = shell("root=$PWD; source localstack/instance.sh && is_healthy").returncode == 0
    try:
        started = shell("bash localstack/start.sh")
        if started.returncode != 0:
            raise QuickstartFailed("LocalStack did not start")
        yield started.stdout.splitlines()[-1]
    finally:
        if not ran_before:
            shell("bash localstack/stop.sh")


def shell(script: str) -> subprocess.CompletedProcess[str]:
    """Run a line of bash; what it says to people goes to the terminal."""
    return subprocess.run(
        ["bash", "-c", script], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=False
    )


def use_bucket(endpoint_url: str) -> None:
    """Set the credentials that LocalStack expects (any will do), and create the bucket unless an earlier run did."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[name]  # the user's real AWS has no part in this
    os.environ |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_CONFIG_FILE": os.devnull}
    client = boto3.client("s3", endpoint_url=endpoint_url, region_name=REGION)
    if BUCKET not in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]:
        client.create_bucket(Bucket=BUCKET)


@contextmanager
def site(story: Story) -> Iterator[Guest]:
    """The site that will be lost: a running VM."""
    story.begin("The site: a VM runs")
    disk = LAB / "site/demo.qcow2"
    disk.parent.mkdir(parents=True)
    shutil.copyfile(IMAGE, disk)
    started = time.monotonic()
    with Guest(LAB / "site", [GuestDisk(node="d0", path=disk)]) as guest:
        tell(f"QEMU runs as process {guest.pid}, the guest was up after {time.monotonic() - started:.1f} s")
        in_guest(guest, "uname -sr; df -h /mnt")
        yield guest


def protect(story: Story, guest: Guest) -> None:
    """Make the repository, and take three points while the guest works."""
    story.begin("Protect it: configuration, repository, key")
    write_config(story, guest)
    drsync("init")
    drsync("config", "check")

    story.begin("The guest works; the first point holds everything")
    in_guest(guest, "mkdir /mnt/files; cd /mnt/files; dd if=/dev/urandom of=photos.bin bs=1M count=40 2>&1 | tail -n 1")
    in_guest(guest, "cd /mnt/files; echo 'first entry' > diary.txt; sha256sum * > ../SHA256SUMS; sync; ls -l")
    capture(story, "full")

    story.begin("The guest works on; the next point holds only what changed")
    in_guest(
        guest, "cd /mnt/files; dd if=/dev/urandom of=photos.bin bs=1M seek=10 count=4 conv=notrunc 2>&1 | tail -n 1"
    )
    in_guest(guest, "cd /mnt/files; echo 'second entry' >> diary.txt; sha256sum * > ../SHA256SUMS; sync")
    capture(story, "incremental")

    story.begin("Once more")
    in_guest(guest, "cd /mnt/files; dd if=/dev/urandom of=music.bin bs=1M count=8 2>&1 | tail -n 1")
    in_guest(guest, "cd /mnt/files; echo 'third entry' >> diary.txt; sha256sum * > ../SHA256SUMS; sync; cat diary.txt")
    capture(story, "incremental")
    drsync("points", VM)


def lose(story: Story, guest: Guest) -> None:
    """Kill QEMU and delete everything but the repository, its key and the configuration."""
    story.begin("The site is lost")
    in_guest(guest, "echo 'written after the last point' > /mnt/files/too-late.txt; sync")
    story.lost_at = datetime.now(UTC)
    tell(f"kill -9 {guest.pid}")
    guest.kill()
    for path in (LAB / "site", LAB / "spool"):
        shutil.rmtree(path)
        tell(f"rm -r {path}")


def recover(story: Story) -> None:
    """Check the repository, restore the newest point and boot it."""
    story.begin("Is the repository whole? Every stored frame is read and authenticated")
    drsync("verify", "--read-data")

    story.begin("The VM comes back")
    started = time.monotonic()
    drsync("restore", VM, "--to", "image", "--output", str(LAB / "restored"))
    with boot(LAB / "restored") as guest:
        story.rto_s = time.monotonic() - started
        tell(f"the guest is up, {story.rto_s:.1f} s after the restore began")
        in_guest(guest, "cat /mnt/boots; ls -l /mnt/files; cat /mnt/files/diary.txt")
        in_guest(guest, "cd /mnt/files; sha256sum -c ../SHA256SUMS")
        in_guest(guest, "test ! -e /mnt/files/too-late.txt && echo 'what came after the last point is gone: the RPO'")


def recover_earlier(story: Story) -> None:
    """Restore the first point, too: every point is a full."""
    story.begin("Any point can come back: the first one")
    first = str(story.points[0]["point"])
    drsync("restore", VM, "--point", first, "--to", "image", "--output", str(LAB / "restored-first"))
    with boot(LAB / "restored-first") as guest:
        in_guest(guest, "cd /mnt/files; ls -l; sha256sum -c ../SHA256SUMS")
        if in_guest(guest, "cat /mnt/files/diary.txt") != "first entry\n":
            raise QuickstartFailed("the first point does not hold the first diary")


@contextmanager
def boot(directory: Path) -> Iterator[Guest]:
    """Boot the VM that was restored into `directory`."""
    with Guest(directory, [GuestDisk(node="d0", path=directory / "root.qcow2")]) as guest:
        yield guest


def summary(story: Story) -> None:
    """Show what was reached."""
    story.begin("What was reached")
    print(f"\n   {'point':>5}  {'kind':<12} {'time':<20} {'changed':>11} {'stored':>11}")
    for point in story.points:
        changed = sum(disk["changed_bytes"] for disk in point["disks"])
        cells = f"{point['point']:>5}  {point['kind']:<12} {point['time'][:19] + 'Z':<20}"
        print(f"   {cells} {mib(changed):>11} {mib(point['stored_bytes']):>11}")
    if story.lost_at is None:
        raise QuickstartFailed("the site was never lost")
    rpo_s = (story.lost_at - datetime.fromisoformat(story.points[-1]["time"])).total_seconds()
    print(f"\n   RPO reached  {rpo_s:6.1f} s   from the last point to the loss")
    print(f"   RTO reached  {story.rto_s:6.1f} s   from the start of the restore until the guest was up")
    if story.s3_url is None:
        print(f"\n   The repository is still there; try: .venv/bin/drsync --config {CONFIG} points {VM}")


def mib(size_bytes: int) -> str:
    """A size in MiB, for a column of them."""
    return f"{size_bytes / MIB:.2f} MiB"


def tell_story(story: Story) -> None:
    """All of it, in order."""
    shutil.rmtree(LAB, ignore_errors=True)
    LAB.mkdir(parents=True)
    if story.s3_url is not None:
        use_bucket(story.s3_url)
    with site(story) as guest:
        protect(story, guest)
        lose(story, guest)
    recover(story)
    recover_earlier(story)
    summary(story)


@contextmanager
def only_one() -> Iterator[None]:
    """Wait until no other quickstart uses this directory."""
    with Path(".lab/quickstart.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("quickstart: waiting for another one in this directory to end")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def stop(signal_number: int, _frame: object) -> None:
    """End through the `finally`s, so that no QEMU is left behind."""
    sys.exit(128 + signal_number)


def main(arguments: Sequence[str]) -> int:
    """Run the quickstart; 0 if every step did what it should."""
    parser = argparse.ArgumentParser(prog="examples/quickstart.sh")
    parser.add_argument("--s3", action="store_true", help="use LocalStack's S3 as the repository")
    use_s3 = parser.parse_args(arguments).s3
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr] # in order also when piped to a file
    os.chdir(ROOT)
    signal.signal(signal.SIGTERM, stop)
    story = Story()
    try:
        with only_one():
            if use_s3:
                with localstack() as story.s3_url:
                    tell_story(story)
            else:
                tell_story(story)
    except (QuickstartFailed, GuestFailed, OSError, BotoCoreError, ClientError) as err:
        print(f"\nquickstart: failed at step {story.step} ({story.title}): {err}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nquickstart: stopped at step {story.step} ({story.title})", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
