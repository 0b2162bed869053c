"""Prepares restored images for EC2 (see the package)."""

from collections.abc import Callable, Sequence

from drsync.errors import FixFailed, FixUnavailable
from drsync.preflight.facts import plain
from drsync.preflight.fix import Image, StepFailed
from drsync.preflight.fix.libguestfs import LibguestfsGuest, Unavailable, check_installed
from drsync.preflight.fix.steps import STEPS


def check_available(path: object) -> None:
    """Check, before anything is restored, that guests can be prepared here.

    Raises:
        FixUnavailable: libguestfs is not installed.
    """
    try:
        check_installed()
    except Unavailable as err:
        raise FixUnavailable(path=path, problem=err) from err


def prepare(vm: str, images: Sequence[Image], tell: Callable[[str], None]) -> Sequence[str]:
    """Change the guest on these images so that it comes up in EC2; what was changed. `tell` hears it as it happens.

    Raises:
        FixUnavailable: libguestfs does not work here; nothing was changed.
        FixFailed: a step could not be done; those before it were.
    """
    changes: list[str] = []
    step = "opening the disks"
    try:
        with LibguestfsGuest(images) as guest:
            for step, do in STEPS:  # noqa: B007 - named in the error
                for change in map(plain, do(guest)):  # there are a guest's own words in it
                    changes.append(change)
                    tell(change)
            step = "closing the disks"
    except Unavailable as err:
        raise FixUnavailable(path=images[0].path, problem=err) from err
    except StepFailed as err:
        raise FixFailed(vm=vm, path=images[0].path, step=step, problem=plain(err)) from err
    return changes
