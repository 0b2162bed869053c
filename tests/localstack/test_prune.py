"""Prune on S3: listings, times, deletions and unfinished uploads as a bucket has them."""

from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from pruned_vm import AT_ONCE
from s3_lab import Bucket
from shipped_vm import DiskStep, ShippedVm, Step, restored

from drsync import catalog
from drsync.log import Log
from drsync.model import BLOCK_SIZE
from drsync.prune.planning import Prices
from drsync.prune.run import PruneOptions, prune_vm
from drsync.retention import Rules
from drsync.store.retry import RetryingStore
from drsync.store.s3 import S3Options, S3Store

pytestmark = pytest.mark.localstack


def step(number: int) -> Step:
    writes = {n: 2 * number + 40 * n + 2 for n in range(6)} | {6 + number: 3}
    return Step(disks={"root": DiskStep(size_bytes=16 * BLOCK_SIZE, writes=writes)})


@pytest.mark.parametrize("versioned", [False, True])
def test_a_log_in_a_bucket_is_pruned_and_every_point_that_stays_restores(
    bucket: Bucket, tmp_path: Path, *, versioned: bool
) -> None:
    if versioned:
        bucket.client.put_bucket_versioning(Bucket=bucket.name, VersioningConfiguration={"Status": "Enabled"})
    options = S3Options(bucket=bucket.name, prefix="dr/a", endpoint_url=bucket.endpoint_url, region=bucket.region)
    store = RetryingStore(S3Store(options))
    vm = ShippedVm(tmp_path, store=store).run(map(step, range(8)))

    def prune(how: PruneOptions) -> int:
        done = prune_vm(vm.log, Rules(last=2), [], committed=8, now=store.now(), options=how)
        for verdict in done.dropped:
            del vm.points[verdict.point]
        log = Log(vm.repository.vm(vm.vm))
        assert [p.number for p in catalog.points(log)] == sorted(vm.points)
        for number, disks in vm.points.items():
            assert restored(log, number) == disks
        return done.deleted_objects

    before = len(list(store.list("vm/")))
    assert prune(PruneOptions(grace=timedelta(hours=1))) == 0
    deleted = prune(AT_ONCE)
    assert deleted > 0
    assert len(list(store.list("vm/"))) < before
    assert prune(replace(AT_ONCE, prices=Prices())) == 0
    vm.run([step(8)])
    prune(replace(AT_ONCE, prices=Prices()))
    assert sorted(vm.points) == [8, 10], "9 is prune's own, since nobody wrote between the horizon and the deletion"
