"""Points that have lost a part of what they held."""

from drsync.errors.base import DrsyncError


class DamageError(DrsyncError):
    """Points have lost a part of what they held."""


class PointDamaged(DamageError):
    """The point has lost blocks, or its log is broken before it; nothing was restored."""

    code = 94
    template = "point {point} of VM {vm} is damaged: {what}"
    remedy_template = "drsync restore {vm} --to image --output DIRECTORY --point {whole}"


class RestoredInPart(DamageError):
    """The disks were restored but for what is lost of them; the lost blocks are marked in them, and listed."""

    code = 95
    template = "point {point} of VM {vm} was restored without {lost}: {path} lists what is missing"
    remedy_template = "drsync repair {vm}   (tells which points are whole)"


class PointsHurt(DamageError):
    """Points have lost something that nothing in the repository has any more."""

    code = 96
    template = "{hurt} of {total} points of VM {vm} are damaged: {points}"
    remedy_template = "drsync capture {vm}   (a new point is whole: it reads again what the newest one has lost)"


class MapUnwritable(DamageError):
    """A block map could not be made anew; points restore without it, only slower."""

    code = 97
    template = "no block map of point {point} of VM {vm} could be written: {problem}"
    remedy_template = "drsync repair {vm}   (when the store can be written)"
