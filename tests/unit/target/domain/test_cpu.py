"""The processor that the guest sees."""

from dataclasses import replace

import pytest
from domain_bench import Judge, host, offer, request, run, small_request, without_kvm, xml_of

from drsync.target.domain.values import Origin

SKYLAKE = "Skylake-Client-IBRS"
LACKING = {SKYLAKE: "Host CPU does not provide required features: pcid, rtm"}
COMMON = (
    "<cpu mode='custom' match='exact' check='partial'><model fallback='forbid'>kvm64</model>"
    "<feature policy='require' name='avx2'/></cpu>"
)


def test_a_model_that_fits_stays_as_it_is() -> None:
    judge = Judge()
    outcome = run(xml_of("shop"), request(), judge=judge)
    assert outcome.value("cpu/model") == SKYLAKE
    assert not outcome.notes("cpu")
    assert "topology" not in judge.asked[0]  # libvirt compares models, not sockets


def test_a_model_that_does_not_fit_becomes_what_both_have() -> None:
    outcome = run(xml_of("shop"), request(), judge=Judge(LACKING, COMMON))
    assert outcome.attributes("cpu") == {"mode": "custom", "match": "exact", "check": "partial"}
    assert outcome.value("cpu/model") == "kvm64"
    assert [f.get("name") for f in outcome.domain.findall("cpu/feature")] == ["avx2"]
    assert not outcome.has("cpu/vendor")
    assert outcome.attributes("cpu/topology") == {"sockets": "1", "dies": "1", "cores": "2", "threads": "2"}
    assert outcome.notes("cpu") == [
        f"model {SKYLAKE} can't run here ({LACKING[SKYLAKE]}) and becomes kvm64 with the features that both have"
    ]


def test_a_model_of_another_vendor_becomes_the_hosts() -> None:
    outcome = run(xml_of("shop"), request(), judge=Judge(LACKING, None))
    assert (outcome.value("cpu/model"), outcome.value("cpu/vendor")) == ("EPYC-Milan", "AMD")
    assert outcome.has("cpu/topology")
    assert outcome.notes("cpu")[0].endswith("and becomes EPYC-Milan, what this host has")


def test_what_both_have_is_not_taken_if_libvirt_does_not_take_it_itself() -> None:
    outcome = run(xml_of("shop"), request(), judge=Judge({**LACKING, "kvm64": "no"}, COMMON))
    assert outcome.value("cpu/model") == "EPYC-Milan"


def test_without_a_host_model_the_most_is_taken_and_without_that_it_is_a_problem() -> None:
    bare = replace(offer(), host_model_xml="")
    outcome = run(xml_of("shop"), request(), offered=bare, judge=Judge(LACKING))
    assert outcome.attributes("cpu") == {"mode": "maximum"}
    nothing = replace(bare, cpu_modes=frozenset({"custom"}))
    outcome = run(xml_of("shop"), request(), offered=nothing, judge=Judge(LACKING))
    assert outcome.problems[0].startswith(f"cpu: model {SKYLAKE} can't run here")


def test_a_processor_that_is_passed_through_stays_so_with_kvm() -> None:
    origin = Origin(cpu_xml="<cpu><arch>x86_64</arch><model>Skylake-Client</model><vendor>Intel</vendor></cpu>")
    outcome = run(xml_of("small"), small_request(), origin=origin)
    assert (outcome.attributes("cpu") or {})["mode"] == "host-passthrough"
    assert outcome.has("cpu/cache")
    now = f"AMD {host().cpu_xml.split('<model>')[1].split('<')[0]}"
    assert outcome.notes("cpu") == [
        f"the guest sees the host's processor, as before: now {now}, it was Intel Skylake-Client"
    ]


def test_a_processor_that_is_passed_through_becomes_the_most_without_kvm() -> None:
    outcome = run(xml_of("small"), small_request(), capabilities=without_kvm(host()))
    assert outcome.attributes("cpu") == {"mode": "maximum"}
    assert not outcome.has("cpu/cache")
    assert outcome.notes("cpu") == ["mode host-passthrough is not offered here and becomes maximum"]


def test_a_mode_that_is_offered_nowhere_is_a_problem() -> None:
    offered = replace(offer(), cpu_modes=frozenset({"custom"}))
    outcome = run(xml_of("small"), small_request(), offered=offered)
    assert outcome.problems == ["cpu: mode host-passthrough is not offered; there are: custom"]


@pytest.mark.parametrize("features", [frozenset({"avx", "vmx"}), frozenset()])
def test_a_demanded_feature_that_is_here_stays(features: frozenset[str]) -> None:
    outcome = run(xml_of("small"), small_request(), offered=replace(offer(), features=features))
    assert outcome.has("cpu/feature")


def test_a_demanded_feature_that_is_not_here_is_left_out() -> None:
    outcome = run(xml_of("small"), small_request(), offered=replace(offer(), features=frozenset({"avx"})))
    assert not outcome.has("cpu/feature")
    assert "feature vmx is not here and is left out" in outcome.notes("cpu")


def test_host_model_stays() -> None:
    outcome = run(xml_of("model"), small_request(name="model"))
    assert outcome.attributes("cpu") == {"mode": "host-model", "check": "partial"}


def test_a_domain_without_a_processor_of_its_own_is_left_so() -> None:
    xml = "<domain type='kvm'><name>x</name><os><type arch='x86_64' machine='pc'>hvm</type></os></domain>"
    outcome = run(xml, small_request(disks={}))
    assert not outcome.has("cpu")
