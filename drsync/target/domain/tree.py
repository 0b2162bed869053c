"""XML in and out. What comes in was sealed by drsync, yet is read as if a stranger had sent it."""

import xml.etree.ElementTree as ET
from collections.abc import Iterator
from typing import Final, NoReturn

MAX_XML_BYTES: Final = 4 * 1024 * 1024
"""A domain with hundreds of devices takes some 200 KiB; capabilities of a large NUMA host about as much."""
MAX_ELEMENTS: Final = 100_000
MAX_DEPTH: Final = 64
QEMU_NAMESPACE: Final = "http://libvirt.org/schemas/domain/qemu/1.0"
DRSYNC_NAMESPACE: Final = "urn:drsync:domain:1"

ET.register_namespace("qemu", QEMU_NAMESPACE)  # else people would read ns0:commandline
ET.register_namespace("drsync", DRSYNC_NAMESPACE)
ET.register_namespace("libosinfo", "http://libosinfo.org/xmlns/libvirt/domain/1.0")


class NotReadable(ValueError):
    """The text is not XML of the kind that is expected; the message says what is wrong."""


class _Builder(ET.TreeBuilder):
    """Builds a tree of bounded size; entities, which only a document type can define, are not taken."""

    def __init__(self) -> None:
        super().__init__()
        self._depth = self._elements = 0

    def start(self, tag: str, attrs: dict[str, str], /) -> ET.Element:
        self._depth += 1
        self._elements += 1
        if self._depth > MAX_DEPTH or self._elements > MAX_ELEMENTS:
            raise NotReadable("has too many elements")
        return super().start(tag, attrs)

    def end(self, tag: str, /) -> ET.Element:
        self._depth -= 1
        return super().end(tag)

    def doctype(self, _name: str, _public: str | None, _system: str | None, /) -> NoReturn:
        raise NotReadable("has a document type")


def parse(text: str, root: str) -> ET.Element:
    """The element `root` that `text` consists of.

    Raises:
        NotReadable: it is something else, too large, or has a document type.
    """
    if len(text) > MAX_XML_BYTES:
        raise NotReadable(f"is longer than {MAX_XML_BYTES} bytes")
    parser = ET.XMLParser(target=_Builder())  # noqa: S314  bounded, and without a document type there are no entities
    try:
        parser.feed(text)
        element: ET.Element = parser.close()
    except (ET.ParseError, ValueError) as err:
        raise err if isinstance(err, NotReadable) else NotReadable(f"is not XML: {err}") from err
    if element.tag != root:
        raise NotReadable(f"is <{element.tag[:80]}>, not <{root}>")
    return element


def text(element: ET.Element) -> str:
    """The element as text, indented for people."""
    ET.indent(element)
    return ET.tostring(element, encoding="unicode")


def value(element: ET.Element, path: str) -> str:
    """The text of a child, without blanks around it; empty if there is no such child."""
    return (element.findtext(path) or "").strip()


def attribute(element: ET.Element, path: str, name: str) -> str:
    """An attribute of a child; empty if there is no such child or attribute."""
    child = element.find(path)
    return "" if child is None else child.get(name, "")


def child(element: ET.Element, path: str) -> ET.Element:
    """The child at `path` (tags and slashes); what is missing of it is made."""
    for tag in path.split("/"):
        found = element.find(tag)
        element = ET.SubElement(element, tag) if found is None else found
    return element


def drop(element: ET.Element, path: str) -> list[ET.Element]:
    """Remove every child at `path`; what was removed."""
    head, _, tag = path.rpartition("/")
    parents = element.findall(head) if head else [element]
    gone = []
    for parent in parents:
        for found in parent.findall(tag):
            parent.remove(found)
            gone.append(found)
    return gone


def drop_empty(element: ET.Element, *paths: str) -> None:
    """Remove children that hold nothing any more."""
    for path in paths:
        head, _, tag = path.rpartition("/")
        for parent in element.findall(head) if head else [element]:
            for found in parent.findall(tag):
                if not len(found) and not found.attrib and not (found.text or "").strip():
                    parent.remove(found)


def devices(domain: ET.Element, *tags: str) -> Iterator[tuple[ET.Element, ET.Element]]:
    """The devices of these kinds, each with its parent; they may be removed on the way."""
    for parent in domain.findall("devices"):
        for found in list(parent):
            if not tags or found.tag in tags:
                yield parent, found


def parse_set(text_: str) -> set[int]:
    """The numbers of a set as libvirt writes it: "0-3,^2,8". Numbers beyond 2^20 are refused.

    Raises:
        ValueError: it is no such set.
    """
    chosen: set[int] = set()
    for part in filter(None, (piece.strip() for piece in text_.split(","))):
        first, _, last = part.lstrip("^").partition("-")
        low, high = int(first), int(last or first)
        if not 0 <= low <= high < 2**20:
            raise ValueError(f"{part} is out of range")
        numbers = range(low, high + 1)
        if part.startswith("^"):
            chosen.difference_update(numbers)
        else:
            chosen.update(numbers)
    return chosen


_UNITS: Final = {
    "b": 1,
    "bytes": 1,
    "kb": 1000,
    "k": 1024,
    "kib": 1024,
    "mb": 10**6,
    "m": 2**20,
    "mib": 2**20,
    "gb": 10**9,
    "g": 2**30,
    "gib": 2**30,
    "tb": 10**12,
    "t": 2**40,
    "tib": 2**40,
}


def size_bytes(element: ET.Element | None) -> int:
    """Bytes of a <memory>-like element; 0 if it is missing or unreadable. libvirt's default unit is KiB."""
    if element is None:
        return 0
    try:
        return int((element.text or "0").strip()) * _UNITS.get(element.get("unit", "KiB").lower(), 1024)
    except ValueError:
        return 0
