"""The processor that the guest sees, mapped to what the target can give.

    host-passthrough ─▶ the same; without KVM maximum, or host-model
    host-model       ─▶ the same
    custom           ─▶ the same if the target's libvirt says that it fits; else the richest that both have
                        (baselineHypervisorCPU); else, of another vendor, what the target's host-model is

A guest that comes up on another model boots anew, so it sees the new features from
its start; only what was compiled for one model, or licensed to it, can notice.
"""

import copy
import xml.etree.ElementTree as ET
from typing import Final

from drsync.target.domain import tree
from drsync.target.domain.values import Notes, Origin, Target

_KEPT: Final = frozenset({"topology", "numa", "cache", "maxphysaddr"})
"""Children of <cpu> that are no matter of the model."""
_FALLBACKS: Final = ("host-passthrough", "maximum", "host-model")


def map_cpu(domain: ET.Element, target: Target, origin: Origin, notes: Notes) -> None:
    """Give the domain a processor that the target has."""
    cpu = domain.find("cpu")
    if cpu is None:
        return
    mode = cpu.get("mode", "custom")
    if mode == "custom":
        if cpu.find("model") is not None:
            _map_model(cpu, target, notes)
        return
    _map_mode(cpu, mode, target, notes)
    _drop_features(cpu, target, notes)
    before, now = _name(origin.cpu_xml), _name(target.host.cpu_xml)
    if before and now and before != now:
        notes.changed("cpu", f"the guest sees the host's processor, as before: now {now}, it was {before}")


def _map_mode(cpu: ET.Element, mode: str, target: Target, notes: Notes) -> None:
    modes = target.offer.cpu_modes
    if not modes or mode in modes:
        return
    instead = next((other for other in _FALLBACKS if other in modes), None)
    if instead is None:
        notes.problem("cpu", f"mode {mode} is not offered; there are: {', '.join(sorted(modes))}")
        return
    notes.changed("cpu", f"mode {mode} is not offered here and becomes {instead}")
    cpu.set("mode", instead)
    for name in ("match", "check", *(() if instead == "host-passthrough" else ("migratable",))):
        cpu.attrib.pop(name, None)
    _drop_passthrough_details(cpu)


def _map_model(cpu: ET.Element, target: Target, notes: Notes) -> None:
    misfit = target.judge.misfit(_bare(cpu))
    if not misfit:
        return
    before = tree.value(cpu, "model")
    host_model = target.offer.host_model_xml
    common = target.judge.baseline([_bare(cpu), host_model]) if host_model else None
    if common is not None and not target.judge.misfit(common):
        _take_over(cpu, tree.parse(common, "cpu"))
        what = f"{tree.value(cpu, 'model')} with the features that both have"
    elif host_model:
        _take_over(cpu, tree.parse(host_model, "cpu"))
        what = f"{tree.value(cpu, 'model')}, what this host has"
    elif "maximum" in target.offer.cpu_modes:
        _take_over(cpu, ET.Element("cpu", {"mode": "maximum"}))
        what = "the most that this host can give"
    else:
        notes.problem("cpu", f"model {before} can't run here, and there is nothing to map it to: {misfit}")
        return
    notes.changed("cpu", f"model {before} can't run here ({misfit}) and becomes {what}")


def _take_over(cpu: ET.Element, model: ET.Element) -> None:
    """Make `cpu` be `model`, with the topology that it had."""
    kept = [part for part in cpu if part.tag in _KEPT]
    for part in list(cpu):
        cpu.remove(part)
    cpu.attrib.clear()
    cpu.attrib.update({"mode": "custom", "match": "exact", "check": "partial"} | dict(model.attrib))
    if cpu.get("mode") != "custom":
        del cpu.attrib["match"], cpu.attrib["check"]
    cpu.extend(part for part in model if part.tag not in _KEPT)
    cpu.extend(kept)
    _drop_passthrough_details(cpu)


def _drop_passthrough_details(cpu: ET.Element) -> None:
    """Take away what only a processor that is passed through can have."""
    if cpu.get("mode") == "host-passthrough":
        return
    for tag in ("cache", "maxphysaddr"):
        for part in cpu.findall(tag):
            if part.get("mode") == "passthrough":
                cpu.remove(part)


def _drop_features(cpu: ET.Element, target: Target, notes: Notes) -> None:
    """Without a model of its own a domain may still demand features; those that are not here would stop its start."""
    there = target.offer.features
    for feature in cpu.findall("feature"):
        name = feature.get("name", "")
        if there and feature.get("policy", "require") in ("require", "force") and name not in there:
            cpu.remove(feature)
            notes.lost("cpu", f"feature {name} is not here and is left out")


def _bare(cpu: ET.Element) -> str:
    """The model and its features alone: what libvirt compares."""
    bare = copy.deepcopy(cpu)
    for part in list(bare):
        if part.tag in _KEPT:
            bare.remove(part)
    return tree.text(bare)


def _name(cpu_xml: str) -> str:
    if not cpu_xml:
        return ""
    try:
        cpu = tree.parse(cpu_xml, "cpu")
    except tree.NotReadable:
        return ""
    return " ".join(filter(None, (tree.value(cpu, "vendor"), tree.value(cpu, "model"))))
