"""A Source that passes everything on to another one: for those that watch or rename on the way."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from drsync.model import CaptureId, Pace, Progress
from drsync.source import NO_PACE, Base, CaptureResult, DiskSurvey, Instant, LiveView, Source, at_once


class ForwardingSource:
    """What is not overridden is done by `inner`."""

    def __init__(self, inner: Source) -> None:
        self.inner = inner

    def survey(
        self, base: Base | None, *, full: bool = False, tidy: bool = True, keep: Collection[CaptureId] = ()
    ) -> Sequence[DiskSurvey]:
        return self.inner.survey(base, full=full, tidy=tidy, keep=keep)

    def check_live(self, disks: Sequence[DiskSurvey]) -> None:
        self.inner.check_live(disks)

    def begin_recording(self, capture: CaptureId, disks: Sequence[DiskSurvey]) -> Mapping[str, object]:
        return self.inner.begin_recording(capture, disks)

    def open_live(self, base: Base | None, disks: Sequence[DiskSurvey], *, pace: Pace) -> LiveView:
        return self.inner.open_live(base, disks, pace=pace)

    def incarnation(self) -> str:
        return self.inner.incarnation()

    def capture(
        self,
        capture: CaptureId,
        base: Base | None,
        disks: Sequence[DiskSurvey],
        layers: Mapping[str, Path],
        *,
        timeout_s: float,
        keep_free_bytes: int = 0,
        progress: Progress | None = None,
        instant: Instant = at_once,
        pace: Pace = NO_PACE,
    ) -> CaptureResult:
        return self.inner.capture(
            capture,
            base,
            disks,
            layers,
            timeout_s=timeout_s,
            keep_free_bytes=keep_free_bytes,
            progress=progress,
            instant=instant,
            pace=pace,
        )

    def is_running(self) -> bool:
        return self.inner.is_running()

    def pause(self, *, timeout_s: float) -> bool:
        return self.inner.pause(timeout_s=timeout_s)

    def resume(self, *, timeout_s: float) -> None:
        self.inner.resume(timeout_s=timeout_s)

    def release(self, keep: CaptureId) -> None:
        self.inner.release(keep)

    def close(self) -> None:
        self.inner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
