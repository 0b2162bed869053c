"""What the rest of drsync does with a source, for tests: captures become points, or are thrown away."""

import itertools
from collections.abc import Sequence
from pathlib import Path

from source_bench import SIZES, Replica, SourceBench

from drsync.model import CaptureId, Kind, new_capture_id
from drsync.source import Base, BaseDisk, CaptureResult, DiskSurvey, Instant, Source, at_once

BOTH_FULL = dict.fromkeys(SIZES, Kind.FULL)
BOTH_INCREMENTAL = dict.fromkeys(SIZES, Kind.INCREMENTAL)


def ours(bench: SourceBench, disk: str, capture: CaptureId) -> str:
    return f"{disk}/{bench.bitmap(disk, capture)}"


class Protection:
    """Protects a bench's VM; its points make up a replica."""

    def __init__(self, bench: SourceBench, spool: Path) -> None:
        self.bench = bench
        self.base: Base | None = None
        self.replica = Replica()
        self.surveys: Sequence[DiskSurvey] = ()
        self.result: CaptureResult | None = None
        self._spool = spool
        self._numbers = itertools.count()

    def layers(self, surveys: Sequence[DiskSurvey]) -> dict[str, Path]:
        number = next(self._numbers)
        return {survey.name: self._spool / f"{number}-{survey.name}.qcow2" for survey in surveys}

    def capture(
        self,
        source: Source,
        *,
        full: bool = False,
        timeout_s: float = 60,
        keep_free_bytes: int = 0,
        instant: Instant = at_once,
    ) -> tuple[Base, dict[str, Path]]:
        """A capture that nobody has committed yet."""
        self.surveys = source.survey(self.base, full=full)
        layers = self.layers(self.surveys)
        capture = new_capture_id()
        self.result = source.capture(
            capture,
            self.base,
            self.surveys,
            layers,
            timeout_s=timeout_s,
            keep_free_bytes=keep_free_bytes,
            instant=instant,
        )
        disks = [BaseDisk(name=survey.name, size_bytes=survey.size_bytes) for survey in self.surveys]
        return Base(capture=capture, disks=disks, definition=self.result.definition), layers

    def commit(self, point: Base, layers: dict[str, Path]) -> None:
        """The repository has the point now."""
        self.replica.apply(self.surveys, layers)
        self.base = point

    def point(self, *, full: bool = False, disks: dict[str, str] | None = None) -> dict[str, Path]:
        """A whole cycle in a session of its own; returns its layers."""
        with self.bench.open(disks=disks) as source:
            point, layers = self.capture(source, full=full)
            self.commit(point, layers)
            source.release(point.capture)
        return layers

    def survey(self) -> Sequence[DiskSurvey]:
        with self.bench.open() as source:
            return source.survey(self.base)

    def kinds(self) -> dict[str, Kind]:
        return {survey.name: survey.kind for survey in self.surveys}
