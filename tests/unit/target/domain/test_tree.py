"""XML that comes in is bounded and has no entities."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drsync.target.domain import tree

LAUGHS = '<!DOCTYPE d [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;">]><domain><name>&b;</name></domain>'


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (LAUGHS, "has a document type"),
        ('<!DOCTYPE domain SYSTEM "file:///etc/passwd"><domain/>', "has a document type"),
        ("<domain>", "is not XML"),
        ("", "is not XML"),
        ("<network/>", "is <network>, not <domain>"),
        ("<domain>" + "<a>" * 100 + "</a>" * 100 + "</domain>", "has too many elements"),
        ("<domain>" + "<a/>" * tree.MAX_ELEMENTS + "</domain>", "has too many elements"),
        (" " * (tree.MAX_XML_BYTES + 1), "is longer than"),
        ("<domain>\ud800</domain>", "is not XML"),
    ],
)
def test_what_is_no_plain_document_is_refused(text: str, problem: str) -> None:
    with pytest.raises(tree.NotReadable, match=problem):
        tree.parse(text, "domain")


@given(st.text(max_size=200))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        tree.parse(f"<domain>{text}</domain>", "domain")
    except tree.NotReadable:
        return


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("0", {0}), ("0-3", {0, 1, 2, 3}), ("0-3,^2", {0, 1, 3}), ("1, 4-5", {1, 4, 5}), ("", set())],
)
def test_a_set_of_numbers_is_read_as_libvirt_writes_it(text: str, numbers: set[int]) -> None:
    assert tree.parse_set(text) == numbers


@pytest.mark.parametrize("text", ["x", "3-1", "0-4294967295", "-5", "1-x"])
def test_what_is_no_set_of_numbers_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        tree.parse_set(text)


def test_sizes_have_libvirts_units() -> None:
    document = tree.parse(
        "<domain><memory unit='GiB'>2</memory><memory>3</memory><memory>x</memory></domain>", "domain"
    )
    assert [tree.size_bytes(m) for m in document] == [2 << 30, 3 << 10, 0]
    assert tree.size_bytes(None) == 0
