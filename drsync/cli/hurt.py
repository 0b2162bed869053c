"""The table of points that do not restore as they were captured."""

from collections.abc import Iterator, Sequence
from typing import Final

from drsync.cli import render
from drsync.hurt import HurtDisk, HurtPoint
from drsync.model import BLOCK_SIZE
from drsync.units import format_size

COLUMNS: Final = ("points", "disk", "lost", "where, in bytes of the disk", "with")
_SHOWN: Final = 3
"""Ranges and objects of a row; --json has all."""

Row = tuple[str, ...]


def print_hurt(vm: str, points: int, hurt: Sequence[HurtPoint]) -> None:
    """Which points are hurt, and where; nothing if none is."""
    if not hurt:
        return
    render.line(f"{vm}: {len(hurt)} of {points} points do not restore as they were captured:")
    render.table(COLUMNS, [(_numbers(numbers), *row) for row, numbers in _rows(hurt)], right=("lost",))


def _rows(hurt: Sequence[HurtPoint]) -> Iterator[tuple[Row, list[int]]]:
    """Rows with the points that they are of: neighbours that have lost the same share one."""
    rows: dict[Row, list[int]] = {}
    for point in hurt:
        for row in _rows_of(point):
            rows.setdefault(row, []).append(point.point)
    yield from rows.items()


def _rows_of(point: HurtPoint) -> Iterator[Row]:
    if point.broken is not None:
        yield "(all)", "", "nothing vouches for it", str(point.broken)
    for disk in point.disks:
        yield disk.name, format_size(disk.blocks * BLOCK_SIZE), _ranges(disk), _few(disk.objects)


def _ranges(disk: HurtDisk) -> str:
    shown = [f"{first * BLOCK_SIZE}+{count * BLOCK_SIZE}" for first, count in disk.runs[:_SHOWN]]
    return ", ".join([*shown, *([f"and {len(disk.runs) - _SHOWN} more"] if len(disk.runs) > _SHOWN else [])])


def _few(names: Sequence[str]) -> str:
    return ", ".join([*names[:_SHOWN], *([f"and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else [])])


def _numbers(numbers: Sequence[int]) -> str:
    """Point numbers, neighbours joined: 3-7, 9."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
