"""The catalog's snapshots as EC2 shows them: moto's own objects, kept in the state that the catalog says."""

from typing import Any

from moto.ec2.models import ec2_backends
from moto.ec2.models.elastic_block_store import Snapshot as Ec2Snapshot
from moto.ec2.models.elastic_block_store import Volume

from drsync_localstack.catalog import Catalog, Place, Snapshot

NO_VOLUME = "vol-ffffffff"
"""What AWS names as the volume of a snapshot that was never one (known: snapshots of EBS direct and CopySnapshot)."""


def backend_of(place: Place) -> Any:
    """moto's EC2 of an account and Region."""
    return ec2_backends[place.account][place.region]


def announce(catalog: Catalog, snapshot: Snapshot) -> None:
    """Make a snapshot known to DescribeSnapshots, CreateVolume and RegisterImage, or bring its state up to date."""
    backend = backend_of(snapshot.place)
    if snapshot.id not in backend.snapshots:
        request = snapshot.request
        volume = Volume(backend, NO_VOLUME, size=request.volume_gib, zone=None, encrypted=bool(request.encrypted))
        made = Ec2Snapshot(
            backend, snapshot.id, volume, request.description, bool(request.encrypted), request.kms_key or None
        )
        backend.snapshots[snapshot.id] = made
        made.add_tags(dict(request.tags))
    refresh(catalog, snapshot.place)


def refresh(catalog: Catalog, place: Place) -> None:
    """Give all of EC2's snapshots the state that they are in by now."""
    backend = backend_of(place)
    for snapshot_id, state in catalog.states(place).items():
        if snapshot_id in backend.snapshots:
            backend.snapshots[snapshot_id].status = state.value
