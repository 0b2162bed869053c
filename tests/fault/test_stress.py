"""Everything at once, from one seed: guest, hosts, store, crashes and clocks; every surviving point equals the model.

    pytest tests/fault/test_stress.py --seed 4711      the same again, bit for bit

In the long form (tests/run.sh --soak) worlds follow each other for as long as is wanted.
"""

import hashlib
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from simulated import Trouble, deterministic
from soak import STRESS_S
from stress import World

WORLDS = 10
LEAST_WORLDS = 4
USUAL_S = 30.0
"""No world is begun later than this, beyond the least; all ten take 25 s on two processors that nobody else uses."""
STEPS = 200
"""In each world: a log of about 40 points, which is walked once a point at the end."""
OUTCOMES = {
    "committed",
    "unchanged",
    "seeding",
    "crash",
    "Fenced",
    "StoreUnavailable",
    "SourceLost",
    "CaptureRunning",
    "PointLost",
}
"""How cycles of any 800 steps have ended, in all that was ever played."""


@pytest.fixture
def place() -> Iterator[Path]:
    """In memory, where there is such a place: nothing here needs a disk."""
    memory = Path("/dev/shm")  # noqa: S108 - a directory of our own is made in it
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as directory:
        yield Path(directory)


def play(seed: str, place: Path, steps: int) -> tuple[str, Counter[str], Counter[Trouble]]:
    """One world from its beginning to its end; a hash of all that happened and all that was stored."""
    with deterministic(seed):
        world = World(seed, place)
        try:
            for _ in range(steps):
                world.step()
            world.settle()
            stored = world.audit()
        except BaseException as err:
            again = f"again: pytest tests/fault/test_stress.py --seed {seed.partition('/')[0]}"
            err.add_note("\n".join([*world.trace[-20:], f"then it failed; {again}"]))
            raise
    told = "\n".join([*world.trace, stored])
    return hashlib.sha256(told.encode()).hexdigest(), world.done, world.store.troubles


def _goes_on(worlds: int, passed_s: float) -> bool:
    return passed_s < STRESS_S if STRESS_S else worlds < WORLDS and passed_s < USUAL_S


@pytest.mark.timeout(STRESS_S + 600)
def test_after_anything_that_can_happen_every_point_is_what_the_disks_held(seed: int, place: Path) -> None:
    done: Counter[str] = Counter()
    troubles: Counter[Trouble] = Counter()
    began_s = time.monotonic()
    number = 0
    while number < LEAST_WORLDS or _goes_on(number, time.monotonic() - began_s):
        _, what, failed = play(f"{seed}/{number}", place / str(number), STEPS)
        done.update(what)
        troubles.update(failed)
        number += 1
    assert set(Trouble) == set(troubles), "a fault never happened"
    assert set(done) >= OUTCOMES, "a way to end never happened"
    assert set(done) >= set(World.happenings()), "something never happened"
    assert done["repaired maps"] > 0, "nothing was ever repaired"


def test_the_same_seed_does_the_same_bit_for_bit(seed: int, place: Path) -> None:
    first, second = (play(f"{seed}/0", place / name, 60) for name in ("first", "second"))
    other = play(f"{seed}/1", place / "other", 60)
    assert first == second
    assert first[0] != other[0]


def test_a_model_that_differs_is_noticed(seed: int, place: Path) -> None:
    """The oracle is not blind: one byte of one point is enough."""
    with deterministic(f"{seed}/0"):
        world = World(f"{seed}/0", place)
        world.settle()
        world.audit()
        capture, disks = next(reversed(world.seen.items()))
        size, _ = disks["root"]
        world.seen[capture] = {**disks, "root": (size, hashlib.sha256(b"other").hexdigest())}
        with pytest.raises(AssertionError, match="is not as captured"):
            world.audit()
