"""A table of a TOML file, read into a frozen dataclass whose fields say how (see key.Key)."""

import difflib
from collections.abc import Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TypeVar

from drsync.config.key import Key, shown

T = TypeVar("T")


class TableReading:
    """One pass over a parsed document that collects every problem."""

    def __init__(self, base: Path, *, defaults: Mapping[str, object] | None = None) -> None:
        """Relative paths start at `base`; `defaults` are those that only the machine knows."""
        self.problems: list[str] = []
        self._base = base
        self._defaults = defaults or {}

    def table(
        self, where: str, kind: type[T], table: object, *, also_known: set[str] | None = None, **given: object
    ) -> T | None:
        """One table's values, or None when a problem was noted; `given` replaces what was parsed."""
        if not isinstance(table, dict):
            self.problems.append(f"{where} = {shown(table)} is not a table")
            return None
        before = len(self.problems)
        known = names_of(kind) | (also_known or set())
        unknown = [name for name in table if name not in known]
        self.problems += [f"{where}: unknown key {shown(name)}; {self.nearest(name, known)}" for name in unknown]
        values = {attribute: self._value(where, key, table) for attribute, key in keys_of(kind).items()}
        return kind(**values | given) if len(self.problems) == before and None not in given.values() else None

    def _value(self, where: str, key: Key, table: Mapping[str, object]) -> object:
        if key.name not in table and key.required:
            self.problems.append(f"{where}: {key.name} is missing")
            return None
        default = [] if key.default == "[]" else key.default
        raw = table.get(key.name, self._defaults.get(key.name, default))
        if raw is None:
            return None
        try:
            value = key.parse(raw)
        except ValueError as err:
            self.problems.append(f"{where}: {key.name}: {err}")
            return None
        return self._base / value if isinstance(value, Path) else value

    def nearest(self, name: str, known: Collection[str]) -> str:
        """What the writer may have meant by an unknown key."""
        close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
        return f"did you mean {close[0]}?" if close else f"known: {', '.join(sorted(known))}"


def keys_of(table: type) -> Mapping[str, Key]:
    """The keys of one settings class, by the name of the attribute that holds the value."""
    return {field.name: field.type.__metadata__[0] for field in fields(table)}  # type: ignore[union-attr]


def names_of(kind: type) -> set[str]:
    """The names of a table's keys, as they are written."""
    return {key.name for key in keys_of(kind).values()}
