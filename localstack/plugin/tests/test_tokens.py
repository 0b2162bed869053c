"""Tokens are good for what they were given for, and for a time only."""

import base64

import pytest
from drsync_localstack.refusal import Refused
from drsync_localstack.tokens import BLOCK_TOKEN_S, PAGE_TOKEN_S, Tokens
from hypothesis import given
from hypothesis import strategies as st


class Clock:
    def __init__(self) -> None:
        self.now_s = 1_000_000.0

    def __call__(self) -> float:
        return self.now_s


def test_a_block_token_is_good_for_its_block_for_seven_days() -> None:
    clock = Clock()
    tokens = Tokens(clock)
    token = tokens.block("snap-1", 7)
    assert len(token) <= 256
    tokens.check_block(token, "snap-1", 7)
    for other in [("snap-1", 8), ("snap-2", 7), ("snap-", 17)]:
        with pytest.raises(Refused) as refused:
            tokens.check_block(token, *other)
        assert (refused.value.code, refused.value.reason) == ("ValidationException", "INVALID_BLOCK_TOKEN")
    assert tokens.expiry() == clock.now_s + BLOCK_TOKEN_S
    clock.now_s += BLOCK_TOKEN_S - 1
    tokens.check_block(token, "snap-1", 7)
    clock.now_s += 1
    with pytest.raises(Refused):
        tokens.check_block(token, "snap-1", 7)


def test_a_page_token_goes_on_where_its_listing_was_for_an_hour() -> None:
    clock = Clock()
    tokens = Tokens(clock)
    token = tokens.page("snap-1 snap-2", 4711)
    assert tokens.check_page(token, "snap-1 snap-2") == 4711
    with pytest.raises(Refused) as refused:
        tokens.check_page(token, "snap-1")
    assert refused.value.reason == "INVALID_PAGE_TOKEN"
    clock.now_s += PAGE_TOKEN_S
    with pytest.raises(Refused):
        tokens.check_page(token, "snap-1 snap-2")


def test_another_localstack_knows_nothing_of_a_token() -> None:
    with pytest.raises(Refused):
        Tokens(Clock()).check_block(Tokens(Clock()).block("snap-1", 7), "snap-1", 7)


@given(st.text(max_size=100) | st.binary(max_size=100).map(lambda raw: base64.b64encode(raw).decode()))
def test_what_is_no_token_is_refused_and_nothing_worse(token: str) -> None:
    tokens = Tokens(Clock())
    with pytest.raises(Refused):
        tokens.check_block(token, "snap-1", 7)
    with pytest.raises(Refused):
        tokens.check_page(token, "snap-1")
