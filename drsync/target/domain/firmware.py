"""Loader, NVRAM and TPM: what a guest needs to find its boot loader and its keys again."""

import xml.etree.ElementTree as ET
from pathlib import PurePosixPath

from drsync.target.domain import tree
from drsync.target.domain.values import Notes, Request, Surroundings, Target


def map_firmware(domain: ET.Element, request: Request, target: Target, notes: Notes) -> None:
    """Point loader and NVRAM to what is on the target."""
    system = tree.child(domain, "os")
    if system.get("firmware"):
        _choose_anew(system, target, notes)
    else:
        _map_loader(system, target, notes)
    _set_nvram(system, request, notes)
    for tag in ("kernel", "initrd", "dtb"):
        _check_file(system, tag, target.around, notes)
    for table in system.findall("acpi/table"):
        if target.around.has_path((table.text or "").strip()) is False:
            notes.problem("acpi", f"table {(table.text or '').strip()} is not here; copy it")


def _choose_anew(system: ET.Element, target: Target, notes: Notes) -> None:
    """libvirt chooses the firmware's files by what the domain demands of them."""
    kind = system.get("firmware", "")
    if target.offer.firmware and kind not in target.offer.firmware:
        offered = ", ".join(sorted(target.offer.firmware))
        notes.problem("firmware", f"{kind} is not offered; there is {offered} (is package ovmf installed?)")
    loader = system.find("loader")
    if loader is not None:
        loader.text = None
        for name in ("type", "readonly", "format", "stateless"):
            loader.attrib.pop(name, None)
        if not loader.attrib:
            system.remove(loader)
    _forget_template(system)


def _map_loader(system: ET.Element, target: Target, notes: Notes) -> None:
    loader = system.find("loader")
    path = (loader.text or "").strip() if loader is not None else ""
    if loader is None or not path:
        return
    there = target.offer.loaders
    if path in there or target.around.has_path(path) is True:
        return
    same_name = sorted(p for p in there if PurePosixPath(p).name == PurePosixPath(path).name)
    _forget_template(system)
    if same_name:
        loader.text = same_name[0]
        notes.changed("firmware", f"loader {path} is here as {same_name[0]}")
    elif loader.get("type") == "pflash" and "efi" in target.offer.firmware:
        system.set("firmware", "efi")
        secure = loader.get("secure", "no")
        system.remove(loader)
        if secure == "yes":
            system.append(ET.Element("loader", {"secure": "yes"}))
        notes.changed("firmware", f"loader {path} is not here: libvirt chooses a UEFI of this host")
    else:
        known = ", ".join(sorted(there)) or "none"
        notes.problem("firmware", f"loader {path} is not here; there are: {known} (package ovmf has more)")


def _forget_template(system: ET.Element) -> None:
    nvram = system.find("nvram")
    if nvram is not None:
        nvram.attrib.pop("template", None)
        nvram.attrib.pop("templateFormat", None)


def _set_nvram(system: ET.Element, request: Request, notes: Notes) -> None:
    uses_nvram = system.get("firmware") == "efi" or tree.attribute(system, "loader", "type") == "pflash"
    if tree.attribute(system, "loader", "stateless") == "yes" or not (uses_nvram or system.find("nvram") is not None):
        return
    if request.nvram_path is not None:
        nvram = tree.child(system, "nvram")
        tree.drop(nvram, "source")
        for name in ("type", "format"):
            nvram.attrib.pop(name, None)
        nvram.text = request.nvram_path
        return
    tree.drop(system, "nvram")  # libvirt makes one from the loader's template
    notes.lost("nvram", "the point has no NVRAM: UEFI starts with its defaults, and looks for \\EFI\\BOOT")


def _check_file(system: ET.Element, tag: str, around: Surroundings, notes: Notes) -> None:
    path = tree.value(system, tag)
    if path and around.has_path(path) is False:
        notes.problem(tag, f"{path} is not here, and the domain boots from it; copy it, or let the guest boot itself")


def map_tpm(domain: ET.Element, request: Request, target: Target, notes: Notes) -> None:
    """Check that the target can emulate the TPM, and say whether its state came along."""
    for parent, tpm in tree.devices(domain, "tpm"):
        backend = tpm.find("backend")
        kind = backend.get("type", "") if backend is not None else ""
        if kind == "passthrough":
            parent.remove(tpm)
            notes.lost("tpm", "it was the other host's own TPM and is left out: what was sealed in it is gone")
            continue
        if not target.offer.has_tpm or (target.offer.tpm_backends and kind not in target.offer.tpm_backends):
            notes.problem("tpm", "this host can't emulate a TPM (install package swtpm)")
        if backend is not None:
            tree.drop(backend, "source")  # the state's place is libvirt's to choose, and the restore follows it
            _check_secret(backend, target.around, notes)
        if kind == "emulator" and not request.has_tpm_state:
            notes.lost("tpm", "the point has no TPM state: it starts empty, what was sealed in it is gone")


def _check_secret(backend: ET.Element, around: Surroundings, notes: Notes) -> None:
    secret = tree.attribute(backend, "encryption", "secret")
    if secret and secret not in around.secrets:
        notes.problem("tpm", f"its state is encrypted by secret {secret}, which is not here (virsh secret-define)")
