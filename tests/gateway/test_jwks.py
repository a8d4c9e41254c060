"""Tests for gateway.jwks: what a key set is, where it comes from, and what happens while it does not."""

import asyncio
import gzip
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from joserfc.jwk import OctKey, RSAKey

from gateway import jwks
from gateway.jwks import (
    JWKS_BYTES_MAX,
    KEYS_MAX,
    READINGS_GAP_MS,
    REFRESH_EVERY_S,
    FileSource,
    KeysError,
    PublicKeys,
    UrlSource,
    parse_jwks,
)
from tests.fakes.clock import ManualClock
from tests.fakes.loop import run
from tests.gateway.issuer import Publisher, key, key_set, publisher


class Shelf:
    """Implements `gateway.jwks.KeySource`: a key set in memory, or none."""

    def __init__(self, body: bytes | None) -> None:
        self.body = body
        self.asked = 0
        self.open = asyncio.Event()
        self.open.set()

    def __str__(self) -> str:
        return "shelf"

    async def read(self) -> bytes:
        self.asked += 1
        await self.open.wait()
        if self.body is None:
            raise KeysError("empty")
        return self.body


def kids(keys: PublicKeys) -> list[str | None]:
    """The ids of the keys that are known."""
    return [made.kid for made in keys.named(None)]


# What a key set is.


def weak_key() -> RSAKey:
    """An RSA key that is too short."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return RSAKey.generate_key(1_024, {"kid": "weak"})


def test_keys_that_cannot_be_used_are_left_out() -> None:
    """Unknown types, weak keys, symmetric keys and nonsense do not spoil the rest of the set."""
    good = json.loads(key_set(key("good"), key("curve", "P-256")))["keys"]
    odd: list[Any] = [
        {"kty": "AKP", "kid": "later"},
        {"kty": "RSA"},
        {"kty": "OKP", "crv": "Ed25519", "x": "!"},
        {"kty": ["RSA"]},
        {},
        7,
        None,
        good[0] | {"use": 7},
        good[0] | {"kid": 7},
        weak_key().as_dict(private=False),
        OctKey.generate_key(256, {"kid": "shared"}).as_dict(),
    ]
    assert [made.kid for made in parse_jwks(json.dumps({"keys": odd + good}).encode())] == ["good", "curve"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        b"[]",
        b"7",
        b"{}",
        b'{"keys": {}}',
        b'{"keys": null}',
        b'{"keys": []}',
        b'{"keys": [{}]}',
        b"\xff",
        json.dumps({"keys": [{}] * (KEYS_MAX + 1)}).encode(),
    ],
)
def test_what_is_no_key_set_is_an_error(body: bytes) -> None:
    """A set without one usable key is none: it would lock everyone out."""
    with pytest.raises(KeysError):
        parse_jwks(body)


def test_keys_are_found_by_their_id() -> None:
    """By name, or all of them."""
    keys = PublicKeys(Shelf(key_set(key("one"), key("two"))), ManualClock())
    asyncio.run(keys.refresh())
    assert [made.kid for made in keys.named("two")] == ["two"]
    assert keys.named("three") == []
    assert kids(keys) == ["one", "two"]


# When it is read.


async def test_readings_keep_their_distance() -> None:
    """One reading per 10 s, however often somebody names an unknown key."""
    clock, shelf = ManualClock(), Shelf(key_set(key("one")))
    keys = PublicKeys(shelf, clock)
    for _ in range(3):
        await keys.refresh()
    clock.advance(READINGS_GAP_MS - 1)
    await keys.refresh()
    assert shelf.asked == 1
    clock.advance(1)
    await keys.refresh()
    assert shelf.asked == 2


async def test_many_callers_at_once_cause_one_reading_and_all_wait_for_it() -> None:
    """Nobody is told that a key is unknown while it is being read."""
    shelf = Shelf(key_set(key("one")))
    shelf.open.clear()
    keys = PublicKeys(shelf, ManualClock())
    waiting = [asyncio.create_task(keys.refresh()) for _ in range(50)]
    await asyncio.sleep(0)
    assert not any(task.done() for task in waiting)
    shelf.open.set()
    await asyncio.gather(*waiting)
    assert shelf.asked == 1
    assert kids(keys) == ["one"]


async def test_what_was_read_last_stays_in_use_while_the_source_is_away_or_broken() -> None:
    """An issuer that is away takes nobody with it; when it is back, what it says counts, also what it no longer says."""
    clock, shelf = ManualClock(), Shelf(key_set(key("one")))
    keys = PublicKeys(shelf, clock)
    await keys.refresh()
    assert not keys.is_stale
    for broken in (None, b"<html>maintenance</html>", b'{"keys": []}'):
        shelf.body = broken
        clock.advance(READINGS_GAP_MS)
        await keys.refresh()
        assert keys.is_stale
        assert kids(keys) == ["one"]
    shelf.body = key_set(key("two"))
    clock.advance(READINGS_GAP_MS)
    await keys.refresh()
    assert not keys.is_stale
    assert kids(keys) == ["two"]


def test_keys_are_read_again_by_themselves() -> None:
    """A key that was withdrawn is forgotten within five minutes, without anybody asking."""
    clock, shelf = ManualClock(), Shelf(key_set(key("old"), key("new")))

    async def scenario() -> None:
        keys = PublicKeys(shelf, clock)
        task = asyncio.create_task(keys.run())
        await asyncio.sleep(1)
        assert kids(keys) == ["old", "new"]
        shelf.body = key_set(key("new"))
        await asyncio.sleep(REFRESH_EVERY_S - 2)
        assert kids(keys) == ["old", "new"]
        await asyncio.sleep(2)
        assert kids(keys) == ["new"]
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(clock.timeline, scenario)


# Where it comes from.


async def test_a_file_is_read_as_it_is_now(tmp_path: Path) -> None:
    """Whoever replaces the file rotates the keys; a file that is gone or too large is an error."""
    path = tmp_path / "jwks.json"
    source = FileSource(path)
    with pytest.raises(KeysError, match="No such file"):
        await source.read()
    for body in (key_set(key("one")), key_set(key("two"))):
        path.write_bytes(body)
        assert await source.read() == body
    path.write_bytes(b" " * (JWKS_BYTES_MAX + 1))
    with pytest.raises(KeysError, match="more than"):
        await source.read()
    assert str(source) == str(path)


@pytest.fixture
def published() -> Any:
    """A real HTTP server that publishes a key set."""
    with publisher(key_set(key("one"))) as made:
        yield made


async def test_a_url_is_read_as_it_is_now(published: Publisher, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reading is a request; proxies of the environment are not asked."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    source = UrlSource(published.url)
    assert await source.read() == key_set(key("one"))
    published.body = key_set(key("two"))
    assert await source.read() == key_set(key("two"))
    assert published.asked == 2


@pytest.mark.parametrize("status", [204, 302, 404, 500])
async def test_any_answer_but_200_is_none(published: Publisher, status: int) -> None:
    """Redirects are not followed either: the keys come from the URL of the settings alone."""
    published.status = status
    published.body = b""
    with pytest.raises(KeysError, match=str(status)):
        await UrlSource(published.url).read()
    assert published.asked == 1


async def test_an_endless_answer_is_cut_off(published: Publisher) -> None:
    """No more is held than the bound, whatever the server sends; a compressed answer is not unpacked."""
    published.body = b" " * (64 * JWKS_BYTES_MAX)
    with pytest.raises(KeysError, match="more than"):
        await UrlSource(published.url).read()
    published.body = gzip.compress(b" " * (64 * JWKS_BYTES_MAX))
    assert len(await UrlSource(published.url).read()) < JWKS_BYTES_MAX


async def test_a_server_that_does_not_answer_is_given_up(published: Publisher, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the time of one reading, and with a reason."""
    monkeypatch.setattr(jwks, "READ_WITHIN_S", 0.05)
    published.answering.clear()
    with pytest.raises(KeysError):
        await UrlSource(published.url).read()


async def test_a_server_that_is_gone_comes_back_where_it_was() -> None:
    """While nobody listens there, what was read stays; then the new keys count."""
    clock = ManualClock()
    with publisher(key_set(key("one"))) as first:
        keys = PublicKeys(UrlSource(first.url), clock)
        await keys.refresh()
    clock.advance(READINGS_GAP_MS)
    await keys.refresh()
    assert keys.is_stale
    assert kids(keys) == ["one"]
    clock.advance(READINGS_GAP_MS)
    with publisher(key_set(key("two")), port=first.port):
        await keys.refresh()
    assert kids(keys) == ["two"]


async def test_a_url_without_sense_is_an_error_like_any_other() -> None:
    """Not one that ends the process."""
    with pytest.raises(KeysError):
        await UrlSource("http://[/").read()


def test_a_password_in_the_url_is_not_shown() -> None:
    """What is logged names the place, not the way in."""
    assert str(UrlSource("http://me:s3cret@127.0.0.1/jwks")) == "http://***@127.0.0.1/jwks"
    assert str(UrlSource("http://127.0.0.1/jwks?sig=s3cret&v=1")) == "http://127.0.0.1/jwks?***"
