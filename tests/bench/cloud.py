"""How fast a point gets into EBS, beside what the store and the endpoint can give alone, in the same run.

    PYTHONPATH=tests .venv/bin/python tests/bench/cloud.py --size-mib 512 --runs 3

Steps: the repository alone (every block read, authenticated, thrown away), the endpoint alone (the same number of
blocks put by as many threads through the same client), both together (a snapshot of the point), then an increment of
one changed 64 KiB in every 16th block of 512 KiB. The endpoint is a LocalStack, on this very machine: its own work is
in the figures, and what AWS would do is not.
"""

import argparse
import os
import resource
import secrets
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from s3_lab import CREDENTIALS, REGION, running_localstack
from shipped_vm import DiskStep, ShippedVm, Step

from drsync.format.keys import RootKey
from drsync.image import load_image
from drsync.mapped import load_mapped_image
from drsync.model import SystemClock
from drsync.recovery.cloud.blocks import PER_BLOCK, CloudDisk, beside
from drsync.ship import ShipLimits
from drsync.store.directory import DirectoryStore
from drsync.target.ec2 import tags
from drsync.target.ec2.aws import Aws, CloudOptions
from drsync.target.ec2.snapshot import BLOCK_BYTES, WORKERS, SnapshotJob, Snapshots

MIB = 1024 * 1024


class Bench:
    """One repository, one account."""

    def __init__(self, place: Path, endpoint_url: str, size_mib: int) -> None:
        self.vm = ShippedVm(place, store=DirectoryStore(place / "repository"), root=RootKey.generate())
        self.size_bytes = size_mib * MIB
        self.aws = Aws(CloudOptions(region=REGION, endpoint_url=endpoint_url, connections=WORKERS))
        self.snapshots = Snapshots(self.aws, SystemClock())
        everything = {number: 2 * (number + 1) for number in range(self.size_bytes // 65536)}
        self._capture(everything)

    def _capture(self, writes: dict[int, int]) -> None:
        disk = DiskStep(size_bytes=self.size_bytes, writes=writes)
        self.vm.capture(Step(disks={"root": disk}, limits=ShipLimits()))

    def change(self) -> None:
        """One block of 64 KiB in every 16th of 512 KiB."""
        self._capture({n: 2 * n + 100_001 for n in range(0, self.size_bytes // 65536, 16 * PER_BLOCK)})

    def disk(self, seq: int, before: int | None = None) -> CloudDisk:
        log = self.vm.log
        if before is None:
            return CloudDisk(objects=log.objects, image=load_image(log, seq), name="root")
        older = load_mapped_image(log, before)
        return CloudDisk(objects=log.objects, image=beside(log, older, seq), name="root", before=older)

    def store_alone(self) -> tuple[float, int]:
        disk, began_s = self.disk(1), time.monotonic()
        count = sum(1 for _ in disk.read(disk.plan()))
        return time.monotonic() - began_s, count

    def endpoint_alone(self, count: int) -> float:
        data = [secrets.token_bytes(BLOCK_BYTES) for _ in range(8)]
        snapshot_id = self.aws.ebs.start_snapshot(VolumeSize=64)["SnapshotId"]
        began_s = time.monotonic()
        with ThreadPoolExecutor(WORKERS) as pool:
            list(pool.map(lambda n: self.snapshots.put(snapshot_id, n, data[n % 8], began_s), range(count)))
        return time.monotonic() - began_s

    def together(self, seq: int, *, before: int | None = None, parent: str | None = None) -> tuple[float, int, str]:
        began_s = time.monotonic()
        disk = self.disk(seq, before)
        blocks = disk.plan()
        of = tags.PointTags(repository=secrets.token_hex(16), vm="web", capture=secrets.token_hex(8), point=seq)
        job = SnapshotJob(of=of, disk="root", size_bytes=self.size_bytes, blocks=blocks, parent=parent)
        with self.snapshots.open(job) as writer:
            for index, data in disk.read(blocks):
                writer.put(index, data)
            writer.finish()
            return time.monotonic() - began_s, len(blocks), writer.id


def rate(count: int, took_s: float) -> str:
    return f"{count * BLOCK_BYTES / MIB / took_s:7.1f} MiB/s  ({count} blocks in {took_s:.2f} s)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-mib", type=int, default=512)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--localstack", default="", help="An endpoint; else one is started.")
    options = parser.parse_args()

    os.environ.update(CREDENTIALS)
    with tempfile.TemporaryDirectory() as place, running_localstack(options.localstack) as endpoint_url:
        bench = Bench(Path(place), endpoint_url, options.size_mib)
        bench.change()
        for run in range(1, options.runs + 1):
            store_s, count = bench.store_alone()
            endpoint_s = bench.endpoint_alone(count)
            full_s, _, snapshot_id = bench.together(1)
            small_s, changed, _ = bench.together(2, before=1, parent=snapshot_id)
            best_s = max(store_s, endpoint_s)
            print(f"run {run}: store alone     {rate(count, store_s)}")
            print(f"run {run}: endpoint alone  {rate(count, endpoint_s)}")
            print(f"run {run}: both together   {rate(count, full_s)}, {best_s / full_s:.0%} of the slower one alone")
            print(f"run {run}: increment       {rate(changed, small_s)}, {changed / count:.1%} of the blocks")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"peak memory of this process, the made-up disk of {options.size_mib} MiB included: {peak:.0f} MiB")
        bench.aws.close()


if __name__ == "__main__":
    main()
