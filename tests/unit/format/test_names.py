"""The names of objects: docs/format.md, "Names"."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import names as vm_names

from drsync.format import Malformed, names
from drsync.model import is_name
from drsync.store.key import is_key

OBJECT = bytes(range(16))


def test_every_name_is_built_as_the_format_says() -> None:
    assert names.REPOSITORY == "repo.json"
    assert names.recovery_slot(OBJECT) == "keys/recovery-000102030405060708090a0b0c0d0e0f.json"
    assert names.segment("web", 42) == "vm/web/log/000000000000002a"
    assert names.pack("web", OBJECT) == "vm/web/pack/000102030405060708090a0b0c0d0e0f"
    assert names.block_map("web", 42, OBJECT) == "vm/web/map/000000000000002a-000102030405060708090a0b0c0d0e0f"
    assert names.heartbeat("host-1") == "host/host-1.json"


@given(vm_names, st.integers(1, names.MAX_SEQ), st.binary(min_size=16, max_size=16))
def test_names_can_be_read_back_and_can_name_an_object(vm: str, seq: int, object_id: bytes) -> None:
    segment, pack, block_map = names.segment(vm, seq), names.pack(vm, object_id), names.block_map(vm, seq, object_id)
    assert names.seq_of_segment(segment) == seq
    assert names.seq_of_map(block_map) == seq
    assert names.object_id_of(pack) == names.object_id_of(block_map) == object_id
    assert all(is_key(name) for name in (segment, pack, block_map, names.heartbeat(vm)))
    assert segment.startswith(names.log_prefix(vm))
    assert pack.startswith(names.pack_prefix(vm))
    assert block_map.startswith(names.map_prefix(vm))


@given(vm_names, st.lists(st.integers(1, names.MAX_SEQ), max_size=5))
def test_segments_sort_by_their_numbers(vm: str, numbers: list[int]) -> None:
    assert sorted(names.segment(vm, n) for n in numbers) == [names.segment(vm, n) for n in sorted(numbers)]


@pytest.mark.parametrize(
    "name",
    [
        "",
        "vm/web/log/" + "\u0660" * 16,
        "vm/web/log/2a",
        "vm/web/log/000000000000002A",
        "vm/web/log/000000000000002a0",
        "vm/web/log/000000000000002a.tmp",
        "vm/web/log/sub/000000000000002a",
        "vm//log/000000000000002a",
        "x/vm/web/log/000000000000002a",
        "vm/web/log/000000000000002a\n",
        "vm/web/log/" + "\u0660" * 16,
        "vm/web/log/0000000000000000",  # numbers begin with 1
        "vm/web/log/8000000000000000",  # and end before this one
    ],
)
def test_what_is_no_segments_name_is_refused(name: str) -> None:
    with pytest.raises(Malformed):
        names.seq_of_segment(name)


@given(st.text())
def test_any_text_is_a_name_or_malformed(text: str) -> None:
    for read in (names.seq_of_segment, names.seq_of_map, names.object_id_of):
        for tried in (text, f"vm/web/log/{text}", f"vm/web/map/{text}"):
            with pytest.raises(Malformed):
                read(tried)


@given(vm_names)
def test_f2_what_matches_is_a_name(name: str) -> None:
    assert is_name(name)


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "-a", "_a", "A", "ä", "a\n", "a\0", "a" * 64, "a b"])
def test_f2_what_could_lead_elsewhere_is_no_name(name: str) -> None:
    assert not is_name(name)
