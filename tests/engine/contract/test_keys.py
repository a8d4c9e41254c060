"""Tests for engine.contract.keys."""

import re
from dataclasses import fields

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.contract import keys
from engine.contract.keys import ShardKeys, shard_of
from tests.engine.contract.strategies import auction_ids

PUBLISHED = {
    "events": "auction:events:{3}",
    "updates": "auction:updates:{3}",
    "audit": "auction:audit:{3}",
    "ticks": "auction:ticks:{3}",
    "deadlines": "auction:deadlines:{3}",
    "troubleshooting": "auction:troubleshooting:{3}",
    "lease": "auction:lease:{3}",
    "cursor": "auction:cursor:{3}",
}


def names(shard: int) -> dict[str, str]:
    """All names of one shard, by field."""
    shard_keys = ShardKeys.of(shard)
    return {field.name: getattr(shard_keys, field.name) for field in fields(ShardKeys) if field.name != "shard"}


@pytest.mark.parametrize(("field", "name"), PUBLISHED.items())
def test_the_names_are_the_published_ones(field: str, name: str) -> None:
    """Others read these names; they are the contract's, to the letter."""
    assert getattr(ShardKeys.of(3), field) == name


@pytest.mark.requirement("R1")
def test_the_names_that_carry_an_id() -> None:
    """A timer's hash ends in its auction's id, a reply stream in what the asker chose."""
    assert ShardKeys.of(3).timer("lot-7") == "auction:timer:{3}:lot-7"
    assert keys.replies("cli-1") == "auction:replies:cli-1"
    assert keys.META == "auction:meta"


@settings(max_examples=50, deadline=None)
@given(shard=st.integers(0, keys.SHARDS_MAX - 1), auction_id=auction_ids)
def test_all_names_of_a_shard_share_its_slot(shard: int, auction_id: str) -> None:
    """Every name has exactly one hash tag, the shard's own, also with an auction's id behind it: one slot per shard."""
    shard_keys = ShardKeys.of(shard)
    assert shard_keys.shard == shard
    for name in [*names(shard).values(), shard_keys.timer(auction_id)]:
        assert re.findall(r"\{(.*?)\}", name) == [str(shard)]


def test_no_two_names_are_the_same() -> None:
    """Within a shard and across shards, each name means one thing; no prefix is the beginning of another name."""
    everything = [name for shard in range(12) for name in names(shard).values()]
    assert len(set(everything)) == len(everything)
    prefixes = [name for name in everything if name.endswith(":")]
    assert prefixes
    for prefix in prefixes:
        assert [name for name in everything if name.startswith(prefix)] == [prefix]


def test_the_shard_is_crc32() -> None:
    """Any language's CRC-32 finds the shard: the check value of the algorithm is 0xCBF43926."""
    assert shard_of("123456789", 2**32) == 0xCBF43926
    assert shard_of("123456789", 16) == 0xCBF43926 % 16


@settings(max_examples=100, deadline=None)
@given(auction_id=auction_ids, shards=st.integers(1, keys.SHARDS_MAX))
def test_every_auction_has_a_shard(auction_id: str, shards: int) -> None:
    """The shard of an auction is one of those that exist, and always the same."""
    assert 0 <= shard_of(auction_id, shards) < shards
    assert shard_of(auction_id, shards) == shard_of(auction_id, shards)


def test_auctions_spread_over_the_shards() -> None:
    """A thousand consecutive ids leave no shard of eight empty or crowded."""
    count = [0] * 8
    for number in range(1_000):
        count[shard_of(f"lot-{number}", 8)] += 1
    assert min(count) > 60
    assert max(count) < 190
