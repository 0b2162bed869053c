"""Faults hit as often as they were told to, and say so."""

import math

import pytest
from drsync_localstack.faults import Faults, parse_settings
from drsync_localstack.refusal import Refused


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def hits(faults: Faults, operation: str, *, after: bool = False) -> str:
    """The code with which a call fails; "" if it does not."""
    try:
        faults.hit(operation, after=after)
    except Refused as err:
        return err.code
    return ""


def test_without_settings_nothing_hits() -> None:
    faults = Faults()
    assert [hits(faults, "PutSnapshotBlock"), hits(faults, "PutSnapshotBlock", after=True)] == ["", ""]
    assert faults.fired() == {}
    assert faults.next_import_failure() is None


def test_a_rule_hits_its_operation_so_many_times_and_counts_it() -> None:
    faults = Faults()
    faults.set({"rules": [{"operation": "StartSnapshot", "times": 2, "error": {"code": "Internal", "status": 500}}]})
    assert hits(faults, "PutSnapshotBlock") == ""
    assert [hits(faults, "StartSnapshot") for _ in range(3)] == ["Internal", "Internal", ""]
    assert faults.fired() == {"StartSnapshot": 2}


def test_a_rule_with_after_hits_when_the_deed_is_done() -> None:
    faults = Faults()
    faults.set({"rules": [{"operation": "CompleteSnapshot", "times": 1, "after": True, "error": {"code": "Lost"}}]})
    assert hits(faults, "CompleteSnapshot") == ""
    assert hits(faults, "CompleteSnapshot", after=True) == "Lost"


@pytest.mark.parametrize(
    ("operation", "code", "status"),
    [("PutSnapshotBlock", "RequestThrottledException", 400), ("RunInstances", "RequestLimitExceeded", 503)],
)
def test_each_service_throttles_in_its_own_words(operation: str, code: str, status: int) -> None:
    faults = Faults()
    faults.set({"rules": [{"operation": operation, "times": 1, "error": "throttle"}]})
    with pytest.raises(Refused) as refused:
        faults.hit(operation)
    assert (refused.value.code, refused.value.status) == (code, status)


def test_a_rate_lets_one_seconds_requests_through_at_once_and_then_as_they_come() -> None:
    clock = Clock()
    faults = Faults(clock)
    faults.set({"rates": {"PutSnapshotBlock": 3}})
    assert [hits(faults, "PutSnapshotBlock") != "" for _ in range(5)] == [False, False, False, True, True]
    assert hits(faults, "GetSnapshotBlock") == ""
    clock.now_s += 1 / 3 + 0.001
    assert [hits(faults, "PutSnapshotBlock") != "" for _ in range(2)] == [False, True]
    clock.now_s += 3600
    assert sum(hits(faults, "PutSnapshotBlock") == "" for _ in range(10)) == 3
    assert faults.fired() == {"PutSnapshotBlock": 10}


def test_import_failures_hit_the_next_tasks_in_their_order() -> None:
    faults = Faults()
    faults.set({"import_failures": ["one", "two"]})
    assert [faults.next_import_failure() for _ in range(3)] == ["one", "two", None]
    assert faults.fired() == {"import_failures": 2}


def test_new_settings_replace_all_and_forget_what_has_fired() -> None:
    faults = Faults()
    faults.set({"rates": {"RunInstances": 0}, "import_failures": ["one"], "pending_limit": 3})
    assert hits(faults, "RunInstances") != ""
    faults.set({})
    assert hits(faults, "RunInstances") == ""
    assert (faults.fired(), faults.next_import_failure(), faults.settings.pending_limit) == ({}, None, 100)


@pytest.mark.parametrize(
    "document",
    [
        {"visibility_delay": 2},
        {"visibility_delay_s": "2"},
        {"import_step_s": -1},
        {"completion_delay_s": math.nan},
        {"pending_limit": "all"},
        {"empty_pages": "yes"},
        {"rates": 5},
        {"rates": {"PutSnapshotBlock": "many"}},
        {"import_failures": "ClientError: one text, not a list"},
        {"rules": [{"operation": "StartSnapshot"}]},
        {"rules": [{"times": 1}]},
        {"rules": [{"operation": "StartSnapshot", "times": "1"}]},
        {"rules": [{"operation": "StartSnapshot", "times": 1, "delay_s": "1"}]},
        {"rules": [{"operation": "StartSnapshot", "times": 1, "error": {}}]},
        {"rules": [{"operation": "StartSnapshot", "times": 1, "error": "trottle"}]},
        {"rules": {}},
        {"rules": ["x"]},
        ["rules"],
        "rules",
        None,
    ],
    ids=str,
)
def test_what_is_no_setting_is_refused_when_it_is_set_and_changes_nothing(document: object) -> None:
    faults = Faults()
    faults.set({"pending_limit": 7})
    with pytest.raises(ValueError, match="not a setting of faults"):
        faults.set(document)
    assert faults.settings.pending_limit == 7
    assert hits(faults, "StartSnapshot") == ""


def test_a_whole_document_is_understood() -> None:
    settings = parse_settings(
        {
            "visibility_delay_s": 2,
            "empty_pages": True,
            "rates": {"PutSnapshotBlock": 1000},
            "rules": [{"operation": "PutSnapshotBlock", "times": 1, "delay_s": 30}],
            "import_failures": ["ClientError: Unsupported kernel version 5.9"],
        }
    )
    assert settings.visibility_delay_s == 2
    assert (settings.rules[0].delay_s, settings.rules[0].error) == (30, None)
