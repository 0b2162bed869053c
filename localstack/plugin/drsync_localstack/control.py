"""The HTTP endpoints that AWS doesn't have, below /_drsync.

    GET  /_drsync/faults              the faults that are on, and how often each has fired
    PUT  /_drsync/faults              set them (faults.py); {} switches all off
    POST /_drsync/clock               {"advance_s": 3600}: the time of snapshots, tokens and tasks moves on
    GET  /_drsync/volumes/ID          {"size_bytes", "blocks"}: a volume, how many blocks it has
    GET  /_drsync/volumes/ID/blocks   its blocks, each as its index (8 bytes, big endian) and its 512 KiB
    PUT  /_drsync/volumes/ID/blocks   write blocks in that form, as the instance would

The two last are what a disk is taken out and put back with; volume_files.py is their client.
"""

import dataclasses
import json
import struct
from collections.abc import Iterator
from typing import Any

from localstack.http import Request, Response
from moto.ec2.models import ec2_backends

from drsync_localstack.blocks import BLOCK_BYTES, BLOCKS_PER_GIB
from drsync_localstack.catalog import Volume
from drsync_localstack.lab import Lab

INDEX = struct.Struct(">Q")


def add_routes(router: Any, lab: Lab) -> None:
    """Serve the endpoints."""
    control = Control(lab)
    router.add("/_drsync/faults", control.get_faults, methods=["GET"])
    router.add("/_drsync/faults", control.put_faults, methods=["PUT"])
    router.add("/_drsync/clock", control.move_clock, methods=["POST"])
    router.add("/_drsync/volumes/<volume_id>", control.get_volume, methods=["GET"])
    router.add("/_drsync/volumes/<volume_id>/blocks", control.get_blocks, methods=["GET"])
    router.add("/_drsync/volumes/<volume_id>/blocks", control.put_blocks, methods=["PUT"])


class Control:
    """The endpoints' handlers."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab

    def get_faults(self, request: Request) -> Response:
        """The faults that are on."""
        on = self.lab.faults.settings
        settings = {field.name: getattr(on, field.name) for field in dataclasses.fields(on)}
        rules = [{"operation": rule.operation, "left": rule.times} for rule in on.rules]
        return _json({**settings, "rules": rules, "fired": self.lab.faults.fired()})

    def put_faults(self, request: Request) -> Response:
        """Set the faults."""
        try:
            self.lab.faults.set(json.loads(request.get_data()))
        except ValueError as err:
            return _json({"error": str(err)}, 400)
        return self.get_faults(request)

    def move_clock(self, request: Request) -> Response:
        """Move the clock on."""
        self.lab.clock.ahead_s += float(json.loads(request.get_data())["advance_s"])
        return _json({"ahead_s": self.lab.clock.ahead_s})

    def get_volume(self, request: Request, volume_id: str) -> Response:
        """A volume's size, and how many blocks it has."""
        found = self._find(volume_id)
        if found is None:
            return _json({"error": f"there is no volume {volume_id}"}, 404)
        volume, size_gib = found
        return _json({"size_bytes": size_gib * 2**30, "blocks": len(volume.blocks)})

    def get_blocks(self, request: Request, volume_id: str) -> Response:
        """A volume's blocks."""
        found = self._find(volume_id)
        if found is None:
            return _json({"error": f"there is no volume {volume_id}"}, 404)
        return Response(self._stream(found[0]), mimetype="application/octet-stream")

    def put_blocks(self, request: Request, volume_id: str) -> Response:
        """Write blocks of a volume."""
        found = self._find(volume_id)
        if found is None:
            return _json({"error": f"there is no volume {volume_id}"}, 404)
        volume, size_gib = found
        count = 0
        while head := request.stream.read(INDEX.size):
            index = INDEX.unpack(head)[0] if len(head) == INDEX.size else -1
            data = request.stream.read(BLOCK_BYTES)
            if not 0 <= index < size_gib * BLOCKS_PER_GIB or len(data) != BLOCK_BYTES:
                return _json({"error": f"block {index} of {len(data)} bytes is none of the volume"}, 400)
            self.lab.catalog.write_volume(volume, index, data)
            count += 1
        return _json({"written": count})

    def _stream(self, volume: Volume) -> Iterator[bytes]:
        for index, block in sorted(volume.blocks.items()):
            yield INDEX.pack(index) + self.lab.catalog.store.read(block.digest)

    def _find(self, volume_id: str) -> tuple[Volume, int] | None:
        """A volume of any account and Region, and its size in GiB."""
        for regions in list(ec2_backends.values()):
            for backend in list(regions.values()):
                if known := backend.volumes.get(volume_id):
                    return self.lab.catalog.volume(volume_id, known.snapshot_id), known.size
        return None


def _json(document: Any, status: int = 200) -> Response:
    return Response(json.dumps(document), status=status, mimetype="application/json")
