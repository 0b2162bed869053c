"""Heartbeats of the daemon: soon after news, not too often, and none without news."""

import threading
import time
from itertools import pairwise

from drsync.heart import Heart


class Beats:
    """A heartbeat that is only counted."""

    def __init__(self, *, fails: bool = False) -> None:
        self.times: list[float] = []
        self.came = threading.Semaphore(0)
        self._fails = fails

    def beat(self) -> None:
        self.times.append(time.monotonic())
        self.came.release()
        if self._fails:
            raise RuntimeError("scripted")


def test_the_first_news_is_told_at_once_and_what_follows_together() -> None:
    beats = Beats()
    heart = Heart(beats.beat, every_s=0.3)
    heart.start()
    for _ in range(100):
        heart.tell()
        time.sleep(0.005)
    assert beats.came.acquire(timeout=5)
    assert beats.came.acquire(timeout=5)
    before_stop = list(beats.times)
    heart.stop()
    assert heart.wait(5)
    assert len(before_stop) >= 2
    assert all(later - earlier >= 0.29 for earlier, later in pairwise(before_stop))


def test_without_news_there_is_no_heartbeat() -> None:
    beats = Beats()
    heart = Heart(beats.beat, every_s=0.01)
    heart.start()
    heart.tell()
    assert beats.came.acquire(timeout=5)
    time.sleep(0.2)
    assert len(beats.times) == 1


def test_what_there_was_to_tell_is_told_at_the_stop_and_what_comes_later_too() -> None:
    beats = Beats()
    heart = Heart(beats.beat, every_s=3600)
    heart.start()
    heart.tell()
    assert beats.came.acquire(timeout=5)
    heart.tell()
    heart.stop()
    assert heart.wait(5)
    told = len(beats.times)
    assert told >= 2
    heart.tell()
    assert len(beats.times) == told + 1


def test_a_heartbeat_that_fails_is_not_the_last_one() -> None:
    beats = Beats(fails=True)
    heart = Heart(beats.beat, every_s=0.01)
    heart.start()
    heart.tell()
    assert beats.came.acquire(timeout=5)
    heart.tell()
    assert beats.came.acquire(timeout=5)
    heart.stop()
    assert heart.wait(5)
