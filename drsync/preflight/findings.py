"""What a check says: a verdict, the reason, what to do."""

from enum import StrEnum

import msgspec


class Verdict(StrEnum):
    """How a check came out."""

    OK = "ok"
    WARNING = "warning"
    """It boots, but something will be missing, slow or otherwise."""
    FAILS = "fails"
    """It does not boot, or boots and nobody reaches it."""
    UNKNOWN = "unknown"
    """It could not be found out."""


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One line of a report."""

    check: str
    verdict: Verdict
    reason: str
    action: str = ""
    """What to do; empty if nothing."""


def ok(check: str, reason: str) -> Finding:
    """All is well."""
    return Finding(check=check, verdict=Verdict.OK, reason=reason)


def warning(check: str, reason: str, action: str) -> Finding:
    """It boots, but …"""
    return Finding(check=check, verdict=Verdict.WARNING, reason=reason, action=action)


def fails(check: str, reason: str, action: str) -> Finding:
    """It does not come up, or out of reach."""
    return Finding(check=check, verdict=Verdict.FAILS, reason=reason, action=action)


def unknown(check: str, reason: str, action: str) -> Finding:
    """It could not be found out."""
    return Finding(check=check, verdict=Verdict.UNKNOWN, reason=reason, action=action)
