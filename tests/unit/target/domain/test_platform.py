"""Hypervisor, machine type, memory, processors and pins."""

from dataclasses import replace

import pytest
from domain_bench import host, offer, request, run, small_request, without_kvm, xml_of

from drsync.target.domain import tree
from drsync.target.domain.platform import choose_machine, choose_platform
from drsync.target.domain.values import Effect, Notes, Origin

DEBIAN = {
    "pc": "pc-i440fx-7.2",
    "pc-i440fx-7.2": "pc-i440fx-7.2",
    "pc-i440fx-6.1": "pc-i440fx-6.1",
    "q35": "pc-q35-7.2",
    "pc-q35-7.2": "pc-q35-7.2",
    "pc-q35-7.1": "pc-q35-7.1",
    "pc-q35-2.10": "pc-q35-2.10",
    "pc-q35-2.9": "pc-q35-2.9",
    "isapc": "isapc",
}


@pytest.mark.parametrize(
    ("wanted", "chosen"),
    [
        ("pc-q35-7.2", "pc-q35-7.2"),
        ("q35", "pc-q35-7.2"),
        ("pc", "pc-i440fx-7.2"),
        ("pc-q35-9.0", "pc-q35-7.2"),  # the newest below
        ("pc-q35-7.1", "pc-q35-7.1"),
        ("pc-q35-6.2", "pc-q35-2.10"),  # as numbers: 2.10 is above 2.9
        ("pc-i440fx-6.0", "pc-i440fx-7.2"),  # nothing below: what the chipset's name stands for
        ("pc-q35-rhel9.2.0", "pc-q35-7.2"),
        ("pc-i440fx-jammy", "pc-i440fx-7.2"),
        ("", "pc-i440fx-7.2"),
        ("microvm", ""),
    ],
)
def test_the_machine_type_is_the_same_or_the_nearest(wanted: str, chosen: str) -> None:
    assert choose_machine(wanted, DEBIAN) == chosen


def test_what_is_offered_stays_and_is_not_mentioned() -> None:
    outcome = run(xml_of("shop"), request())
    assert outcome.attributes("os/type") == {"arch": "x86_64", "machine": "pc-q35-7.2"}
    assert outcome.domain.get("type") == "kvm"
    assert not outcome.notes("machine")
    assert not outcome.notes("hypervisor")


def test_a_newer_machine_type_is_lowered_and_said() -> None:
    outcome = run(xml_of("shop").replace("pc-q35-7.2", "pc-q35-9.1"), request())
    assert outcome.attributes("os/type") == {"arch": "x86_64", "machine": "pc-q35-7.2"}
    assert outcome.notes("machine") == [
        "pc-q35-9.1 becomes pc-q35-7.2, the newest of its family that is offered up to it"
    ]


def test_an_alias_is_taken_as_what_it_stood_for_on_the_old_host() -> None:
    outcome = run(xml_of("shop").replace("pc-q35-7.2", "q35"), request(), origin=Origin(machine="pc-q35-6.2"))
    assert outcome.attributes("os/type") == {"arch": "x86_64", "machine": "pc-q35-6.2"}


def test_a_machine_type_of_no_kind_that_is_offered_is_a_problem() -> None:
    notes = Notes()
    domain = tree.parse(xml_of("small").replace('machine="pc"', "").replace("pc-i440fx-7.2", "rpi-5"), "domain")
    domain.find("os/type").set("machine", "rpi-5")  # type: ignore[union-attr]
    assert choose_platform(domain, host(), notes) is None
    assert notes.all[0].effect is Effect.PROBLEM
    assert notes.all[0].text.startswith("rpi-5 is not offered, nor anything like it; there are: ")


def test_an_architecture_that_cannot_run_is_a_problem() -> None:
    notes = Notes()
    domain = tree.parse(xml_of("small").replace("arch='x86_64'", "arch='s390x'"), "domain")
    assert choose_platform(domain, host(), notes) is None
    assert notes.all[0].text == "guests of architecture s390x can't run here; there are: i686, x86_64"


def test_without_kvm_the_domain_is_emulated_and_loses_what_needs_it() -> None:
    outcome = run(xml_of("shop"), request(), capabilities=without_kvm(host()))
    assert outcome.domain.get("type") == "qemu"
    assert outcome.notes("hypervisor") == [
        "kvm is not offered for x86_64: it runs emulated, without KVM: the guest will be slow"
    ]
    assert not outcome.has("features/kvm")
    assert not outcome.has("features/hyperv")
    assert not outcome.has("features/ioapic")
    assert outcome.has("features/acpi")
    assert [t.get("name") for t in outcome.domain.findall("clock/timer")] == ["rtc"]
    assert len(outcome.notes("features")) == 3
    assert len(outcome.notes("clock")) == 2


def test_with_kvm_its_features_stay() -> None:
    outcome = run(xml_of("shop"), request())
    assert outcome.has("features/kvm")
    assert outcome.has("features/hyperv")


def test_pins_to_what_the_host_does_not_have_are_left_out() -> None:
    outcome = run(xml_of("shop"), request())
    assert outcome.attributes("vcpu") == {"placement": "static"}
    assert [part.tag for part in outcome.domain.find("cputune") or []] == ["shares"]
    assert not outcome.has("numatune")
    assert not outcome.has("memoryBacking")
    assert not outcome.has("resource")
    for subject in ("vcpu", "cputune", "numatune", "memory", "resource"):
        assert outcome.notes(subject, Effect.CHANGED), subject
    assert "set 0 B of them aside, 4 GiB are needed" in outcome.notes("memory")[0]


def test_pins_to_what_the_host_has_stay() -> None:
    large = replace(host(), cpus=frozenset(range(8)), cells=frozenset({0, 1}), page_sizes={4096: 10, 2 << 20: 4096})
    outcome = run(xml_of("shop"), request(), capabilities=large)
    assert outcome.attributes("vcpu") == {"placement": "static", "cpuset": "0-7"}
    assert len(outcome.domain.findall("cputune/vcpupin")) == 2
    assert outcome.has("numatune/memory")
    assert outcome.has("memoryBacking/hugepages")


def test_more_memory_than_the_host_has_is_a_problem() -> None:
    outcome = run(xml_of("shop"), request(), capabilities=replace(host(), memory_bytes=1 << 30))
    assert "memory: the domain has 4 GiB, the whole host 1 GiB" in outcome.problems


def test_more_processors_than_a_guest_can_have_are_a_problem_and_more_than_the_host_has_are_not() -> None:
    outcome = run(xml_of("shop"), request(), offered=replace(offer(), max_vcpus=2))
    assert "vcpu: 4 processors are more than the 2 that guests can have here" in outcome.problems
    outcome = run(xml_of("shop"), request())
    assert "4 processors share the host's 2: the guest will be slower" in outcome.notes("vcpu", Effect.CHANGED)


def test_the_emulator_is_the_hosts() -> None:
    outcome = run(xml_of("small").replace("/usr/bin/qemu-system-x86_64", "/usr/libexec/qemu-kvm"), small_request())
    assert outcome.value("devices/emulator") == "/usr/bin/qemu-system-x86_64"
    assert outcome.notes("emulator") == ["/usr/libexec/qemu-kvm becomes /usr/bin/qemu-system-x86_64"]


def test_memory_encryption_that_is_not_here_is_a_problem() -> None:
    xml = xml_of("small").replace(
        "</domain>", "<launchSecurity type='sev'><policy>0x1</policy></launchSecurity></domain>"
    )
    assert any(problem.startswith("launch security: ") for problem in run(xml, small_request()).problems)
