"""What QEMU tells of a VM beside its disks: kept with every point, for whoever has to rebuild it."""

from collections.abc import Mapping
from typing import Final

from drsync.source.monitor import CommandRefused, Monitor
from drsync.source.nodes import Node

_QUESTIONS: Final[Mapping[str, tuple[str, Mapping[str, object] | None]]] = {
    "version": ("query-version", None),
    "name": ("query-name", None),
    "uuid": ("query-uuid", None),
    "target": ("query-target", None),
    "machine": ("qom-get", {"path": "/machine", "property": "type"}),
    "accelerator": ("query-kvm", None),
    "memory": ("query-memory-size-summary", None),
    "cpus": ("query-cpus-fast", None),
}
"""Key → command. A qemu-storage-daemon knows only the first: what is refused is left out."""


def describe(monitor: Monitor, disks: Mapping[str, Node]) -> dict[str, object]:
    """The VM as JSON-able values: versions, machine, memory, processors, and what each disk is made of.

    Raises:
        SourceLost: QEMU went away.
    """
    known: dict[str, object] = {}
    for key, (command, arguments) in _QUESTIONS.items():
        try:
            known[key] = monitor.execute(command, arguments)
        except CommandRefused:
            continue
    known["cpus"] = _processors(monitor, known.get("cpus"))
    known["disks"] = {name: _disk(node) for name, node in disks.items()}
    return {key: value for key, value in known.items() if value is not None}


def _processors(monitor: Monitor, cpus: object) -> object:
    """How many there are and of which model; the threads' ids are of no use later."""
    if not isinstance(cpus, list) or not cpus or not isinstance(cpus[0], dict):
        return None
    try:
        model = monitor.execute("qom-get", {"path": cpus[0].get("qom-path"), "property": "type"})
    except CommandRefused:
        model = None
    return {"count": len(cpus), "model": model}


def _disk(node: Node) -> dict[str, object]:
    return {
        "node": node.node_name,
        "driver": node.drv,
        "filename": node.image.filename,
        "size_bytes": node.image.virtual_size,
    }
