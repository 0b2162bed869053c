"""Loader, NVRAM, files that a domain boots from, TPM."""

from dataclasses import replace

import pytest
from domain_bench import around, offer, request, run, small_request, xml_of

from drsync.target.domain.values import Effect

CODE = "/usr/share/OVMF/OVMF_CODE_4M.fd"
NO_LOADERS = replace(offer(), loaders=frozenset(), firmware=frozenset())
TPM = "<devices><tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>"


def test_a_loader_that_is_here_stays_and_the_restored_nvram_is_used() -> None:
    offered = replace(offer(), loaders=frozenset({CODE}))
    outcome = run(xml_of("shop"), request(nvram_path="/pool/shop-nvram.fd"), offered=offered)
    assert outcome.value("os/loader") == CODE
    assert outcome.value("os/nvram") == "/pool/shop-nvram.fd"
    assert outcome.attributes("os/nvram") == {"template": "/usr/share/OVMF/OVMF_VARS_4M.fd"}
    assert not outcome.notes("firmware")
    assert not outcome.notes("nvram")


def test_a_loader_in_another_directory_is_found_by_its_name() -> None:
    offered = replace(offer(), loaders=frozenset({"/usr/share/edk2/ovmf/OVMF_CODE_4M.fd", "/usr/share/x/OVMF_CODE.fd"}))
    outcome = run(xml_of("shop"), request(nvram_path="/pool/n"), offered=offered)
    assert outcome.value("os/loader") == "/usr/share/edk2/ovmf/OVMF_CODE_4M.fd"
    assert outcome.attributes("os/nvram") == {}
    assert outcome.notes("firmware", Effect.CHANGED)


@pytest.mark.parametrize("secure", ["yes", "no"])
def test_a_loader_of_another_name_is_chosen_anew_by_libvirt(secure: str) -> None:
    xml = xml_of("shop").replace("type='pflash'", f"type='pflash' secure='{secure}'")
    outcome = run(xml, request(nvram_path="/pool/n"), offered=replace(NO_LOADERS, firmware=frozenset({"efi", "bios"})))
    assert outcome.attributes("os") == {"firmware": "efi"}
    assert outcome.attributes("os/loader") == ({"secure": "yes"} if secure == "yes" else None)
    assert outcome.value("os/nvram") == "/pool/n"


def test_a_loader_without_anything_like_it_is_a_problem() -> None:
    outcome = run(xml_of("shop"), request(nvram_path="/pool/n"), offered=NO_LOADERS)
    assert f"firmware: loader {CODE} is not here; there are: none (package ovmf has more)" in outcome.problems


def test_without_nvram_in_the_point_libvirt_makes_a_fresh_one() -> None:
    outcome = run(xml_of("shop"), request(), offered=replace(offer(), loaders=frozenset({CODE})))
    assert not outcome.has("os/nvram")
    assert outcome.notes("nvram", Effect.LOST)


def test_firmware_that_libvirt_chose_is_chosen_anew() -> None:
    xml = (
        xml_of("small")
        .replace("<os>", "<os firmware='efi'>")
        .replace(
            "</os>",
            "<loader readonly='yes' type='pflash' secure='yes'>/old/CODE.fd</loader><nvram template='/old/V'/></os>",
        )
    )
    outcome = run(xml, small_request(nvram_path="/pool/n"), offered=replace(offer(), firmware=frozenset({"efi"})))
    assert outcome.attributes("os/loader") == {"secure": "yes"}
    assert outcome.value("os/loader") == ""
    assert outcome.value("os/nvram") == "/pool/n"
    outcome = run(xml, small_request(), offered=replace(offer(), firmware=frozenset({"bios"})))
    assert outcome.problems[0].startswith("firmware: efi is not offered")


def test_a_bios_guest_gets_no_nvram() -> None:
    outcome = run(xml_of("small"), small_request(nvram_path="/pool/n"))
    assert not outcome.has("os/nvram")


@pytest.mark.parametrize("tag", ["kernel", "initrd", "dtb"])
def test_a_kernel_on_the_old_host_is_a_problem(tag: str) -> None:
    xml = xml_of("small").replace("</os>", f"<{tag}>/boot/x</{tag}></os>")
    assert run(xml, small_request()).problems[0].startswith(f"{tag}: /boot/x is not here")
    assert not run(xml, small_request(), surroundings=around(has_path=lambda _p: True)).problems


def test_an_emulated_tpm_needs_swtpm_and_its_state() -> None:
    xml = xml_of("small").replace("<devices>", TPM)
    offered = replace(offer(), tpm_backends=frozenset({"passthrough", "emulator"}))
    outcome = run(xml, small_request(has_tpm_state=True), offered=offered)
    assert outcome.has("devices/tpm")
    assert not outcome.notes("tpm")
    outcome = run(xml, small_request(), offered=offered)
    assert outcome.notes("tpm", Effect.LOST) == [
        "the point has no TPM state: it starts empty, what was sealed in it is gone"
    ]
    outcome = run(
        xml, small_request(has_tpm_state=True), offered=replace(offer(), tpm_backends=frozenset({"passthrough"}))
    )
    assert outcome.problems == ["tpm: this host can't emulate a TPM (install package swtpm)"]


def test_a_tpm_of_the_old_host_is_left_out() -> None:
    tpm = "<devices><tpm model='tpm-tis'><backend type='passthrough'><device path='/dev/tpm0'/></backend></tpm>"
    outcome = run(xml_of("small").replace("<devices>", tpm), small_request())
    assert not outcome.has("devices/tpm")
    assert outcome.notes("tpm", Effect.LOST)


def test_a_tpms_secret_must_be_here() -> None:
    xml = xml_of("small").replace("<devices>", TPM.replace("/></tpm>", "><encryption secret='s-1'/></backend></tpm>"))
    offered = replace(offer(), tpm_backends=frozenset({"emulator"}))
    assert (
        run(xml, small_request(has_tpm_state=True), offered=offered)
        .problems[0]
        .startswith("tpm: its state is encrypted")
    )
    there = around(secrets=frozenset({"s-1"}))
    assert not run(xml, small_request(has_tpm_state=True), offered=offered, surroundings=there).problems
