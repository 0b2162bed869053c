"""docs/cost.md says what drsync asks of a store, and what that costs: counted here, around real captures."""

from pathlib import Path

import pytest
from cost_page import bill, counts_of, page_with
from request_counts import Counts, measure

PAGE = Path(__file__).parents[2] / "docs" / "cost.md"
AGAIN = "PYTHONPATH=tests:examples/guest .venv/bin/python tests/bench/cost.py --write"


@pytest.mark.qemu
def test_the_page_has_the_counts_that_are_measured(tmp_path: Path) -> None:
    measured = measure(tmp_path)
    told = counts_of(PAGE.read_text())
    for name, counts in measured.items():
        for kind in ("put", "get", "list"):
            assert getattr(told[name], kind) == pytest.approx(getattr(counts, kind), abs=0.001), (name, kind, AGAIN)
    assert (measured["idle"].put, measured["idle"].get, measured["idle"].list) == (0, 0, 0)


def test_the_pages_tables_are_what_its_counts_and_prices_come_to() -> None:
    page = PAGE.read_text()
    assert page_with(page, counts_of(page)) == page, AGAIN


def test_an_idle_vm_costs_almost_nothing_at_any_rpo() -> None:
    counts = counts_of(PAGE.read_text())
    for rpo_s in (10, 60, 300, 3600):
        assert bill(counts, rpo_s, 0).usd < 0.05


def test_a_bill_is_the_points_of_a_month_and_a_share_of_the_heartbeats() -> None:
    one = Counts(put=1, get=0, list=0)
    nothing = Counts(put=0, get=0, list=0)
    found = bill({"point": one, "look": nothing, "heartbeat": nothing}, 60, 1)
    assert (found.usd, found.points) == pytest.approx((46105.26 * 5e-6, 46105.26), rel=1e-5)
    larger = bill({"point": one, "look": nothing, "heartbeat": nothing}, 3600, 50)
    assert larger.usd == pytest.approx(768.4 * 5e-6 * 64, rel=0.01)  # 2 GiB an hour are 64 objects
