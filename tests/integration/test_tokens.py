"""Tokens from end to end: `serve` with a secret and with published keys, and the commands that talk to it."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Subprotocol

from tests.gateway.issuer import SECRET, Publisher, key, key_set, publisher, signed
from tests.integration.events import fresh_id, started
from tests.live import SCRIPT, LiveStack, until

pytestmark = pytest.mark.integration

LONG_MS = 7_200_000
FAR_S = 4_000_000_000
TELLTALE = "aud1ence-of-this-test"


def secret_token(**claims: Any) -> str:
    """A token that lives for decades."""
    return signed({"alg": "HS256"}, SECRET, {"sub": "tester", "exp": FAR_S, "aud": TELLTALE} | claims)


def authorized(made: str) -> dict[str, str]:
    """The header of a token."""
    return {"Authorization": f"Bearer {made}"}


def socket(stack: LiveStack, auction_id: str, query: str = "", **options: Any) -> ClientConnection:
    """A socket, opened as the options say."""
    url = stack.url.replace("http", "ws", 1) + f"/auctions/{auction_id}/updates{query}"
    return connect(url, compression=None, proxy=None, **options)


def command(stack: LiveStack, *arguments: str, stdin: str = "", **env: str) -> "subprocess.CompletedProcess[str]":
    """Run a command of the front door against a stack."""
    name, *rest = arguments
    return subprocess.run(
        [*SCRIPT, name, *rest, "--url", stack.url],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=stack.data_dir.parent,
        env={key: value for key, value in os.environ.items() if not key.startswith("AUCTION_TIMER_")} | env,
    )


@pytest.mark.requirement("R20", "R24")
def test_a_stack_with_a_secret_serves_whoever_has_a_token(short_tmp: Path) -> None:
    """Routes by scope, sockets in all their ways, commands by their environment; no token and no secret is logged."""
    stack = LiveStack(
        short_tmp, env={"AUCTION_TIMER_JWT_SECRET": SECRET, "AUCTION_TIMER_JWT_AUDIENCE": TELLTALE}
    )  # fmt: skip
    try:
        auction_id = fresh_id()
        writer, viewer, operator = secret_token(scope="events:write"), secret_token(), secret_token(scope="ops")
        start = started(auction_id, 1_000, FAR_S * 1_000)
        # By scope.
        assert stack.http.get("/readyz").status_code == 200
        assert stack.http.get("/auctions").status_code == 401
        assert stack.http.post("/events", json=start, headers=authorized(viewer)).status_code == 403
        assert stack.http.post("/events", json=start, headers=authorized(writer)).status_code == 202
        assert stack.http.get("/metrics", headers=authorized(writer)).status_code == 403
        assert "auctions_gateway_connections" in stack.http.get("/metrics", headers=authorized(operator)).text
        other_audience = secret_token(aud="elsewhere")
        assert stack.http.get("/auctions", headers=authorized(other_audience)).status_code == 401
        stack.http.headers.update(authorized(viewer))
        stack.until_status(auction_id, "ACTIVE")
        # Sockets.
        protocols = [Subprotocol("auction-timer.v1"), Subprotocol(f"bearer.{viewer}")]
        ways: list[tuple[str, dict[str, Any], str | None]] = [
            ("", {"additional_headers": authorized(viewer)}, None),
            ("", {"subprotocols": protocols}, protocols[0]),
            ("", {"subprotocols": protocols[1:]}, protocols[1]),
            (f"?token={viewer}", {}, None),
        ]
        for query, options, chosen in ways:
            with socket(stack, auction_id, query, **options) as line:
                assert json.loads(line.recv(timeout=10))["type"] == "timer.snapshot"
                assert line.subprotocol == chosen
        for asked in (auction_id, fresh_id()):
            with pytest.raises(InvalidStatus) as refused:
                socket(stack, asked, f"?token={viewer[:-4]}AAAA")
            assert refused.value.response.status_code == 401
        # Commands.
        line_of = json.dumps(started(fresh_id(), 1_000, FAR_S * 1_000))
        refused_command = command(stack, "emit", "-", stdin=line_of)
        assert refused_command.returncode == 1
        assert "UNAUTHENTICATED" in refused_command.stderr
        assert "AUCTION_TIMER_TOKEN" in refused_command.stderr
        emitted = command(stack, "emit", "-", stdin=line_of, AUCTION_TIMER_TOKEN=writer)
        assert (emitted.returncode, emitted.stdout.split()[:2]) == (0, ["accepted", "1"]), emitted.stderr
        given = command(stack, "emit", "-", "--token", writer, stdin=line_of, AUCTION_TIMER_TOKEN="")
        assert (given.returncode, given.stdout.split()[2:4]) == (0, ["duplicate", "1"]), given.stderr
        for ran in (refused_command, emitted, given):
            assert writer not in ran.stdout + ran.stderr
        # What stands nowhere.
        logged = stack.logged()
        assert SECRET not in logged
        assert not any(part in logged for made in (writer, viewer) for part in made.split(".")[1:])
        assert "token=" not in logged
    finally:
        assert stack.stop() == 0
    assert SECRET not in stack_log(short_tmp)


def stack_log(directory: Path) -> str:
    """Everything a stack that has ended wrote."""
    return "".join(path.read_text(errors="replace") for path in directory.glob("serve-*.log"))


@pytest.fixture
def issuer() -> Any:
    """An issuer on loopback that publishes one key."""
    with publisher(key_set(key("first"))) as made:
        yield made


def read_on(line: ClientConnection) -> None:
    """Read frames until the socket is closed, which raises."""
    while True:
        line.recv(timeout=30)


def keyed_token(name: str) -> str:
    """A token signed with a published key."""
    return signed({"alg": "EdDSA", "kid": name}, key(name), {"sub": "tester", "exp": FAR_S, "scope": "events:write"})


@pytest.mark.requirement("R24")
def test_a_stack_with_published_keys_follows_their_rotation(short_tmp: Path, issuer: Publisher) -> None:
    """A new key counts without a restart, a forged one never does, and an issuer that is gone takes nobody with it."""
    stack = LiveStack(short_tmp, env={"AUCTION_TIMER_JWKS_URL": issuer.url})
    try:

        def status(name: str) -> int:
            return int(stack.http.get("/auctions", headers=authorized(keyed_token(name))).status_code)

        assert stack.http.get("/readyz").json()["checks"]["keys"] == "ok"
        assert status("first") == 200
        assert status("second") == 401
        issuer.body = key_set(key("first"), key("second"))
        until(lambda: status("second") == 200, "the new key counts")
        issuer.stop()
        assert (status("first"), status("second")) == (200, 200)
        assert stack.http.get("/readyz").status_code == 200
    finally:
        stack.stop()


def test_a_socket_is_closed_when_its_token_expires(short_tmp: Path) -> None:
    """With the real clock: a token at the end of its leeway opens a socket that ends with 4401 soon."""
    path = short_tmp / "keys.json"
    path.write_bytes(key_set(key("first")))
    stack = LiveStack(short_tmp, env={"AUCTION_TIMER_JWKS_FILE": "keys.json"})
    try:
        auction_id = fresh_id()
        stack.http.headers.update(authorized(keyed_token("first")))
        stack.post(started(auction_id, 1_000, FAR_S * 1_000))
        now = stack.until_status(auction_id, "ACTIVE")["server_time"]
        short = signed({"alg": "EdDSA", "kid": "first"}, key("first"), {"sub": "tester", "exp": now // 1_000 - 22})
        with socket(stack, auction_id, additional_headers=authorized(short)) as line:
            with pytest.raises(ConnectionClosed) as closed:
                read_on(line)
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == 4401
        with pytest.raises(InvalidStatus):
            socket(stack, auction_id, additional_headers=authorized(short))
    finally:
        stack.stop()


@pytest.mark.parametrize(
    ("env", "word"),
    [
        ({"AUCTION_TIMER_HOST": "0.0.0.0"}, "AUCTION_TIMER_JWT_SECRET"),
        ({"AUCTION_TIMER_JWKS_FILE": "nowhere.json"}, "nowhere.json"),
        ({"AUCTION_TIMER_JWKS_URL": "http://keys.example/jwks"}, "jwks_url"),
    ],
)
def test_what_would_leave_the_door_open_does_not_start(short_tmp: Path, env: dict[str, str], word: str) -> None:
    """Exit code 78 and a sentence, before anything is started."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AUCTION_TIMER_")}
    ran = subprocess.run(
        [*SCRIPT, "serve", "--port", "0"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=short_tmp,
        env=environment | env,
    )
    assert ran.returncode == 78
    assert word in ran.stderr
    assert not (short_tmp / "auction-timer-data").exists()


def test_check_config_shows_no_secret(short_tmp: Path) -> None:
    """Neither the secret nor the token of the command line."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AUCTION_TIMER_")}
    ran = subprocess.run(
        [*SCRIPT, "check-config"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=short_tmp,
        env=environment | {"AUCTION_TIMER_JWT_SECRET": SECRET, "AUCTION_TIMER_TOKEN": "t0ken-of-mine"},
    )
    assert ran.returncode == 0
    assert "jwt_secret = ***" in ran.stdout
    assert "token = ***" in ran.stdout
    assert SECRET not in ran.stdout + ran.stderr
    assert "t0ken-of-mine" not in ran.stdout + ran.stderr
