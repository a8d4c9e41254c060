"""Tests for gateway.asyncapi: the document in itself, and the frames of every decision against it."""

from collections.abc import Iterator
from typing import Any

import jsonschema_rs
import orjson
import pytest

from auction_timer.client import HEARTBEAT_MS as CLIENT_HEARTBEAT_MS
from engine.contract.frames import announce, is_frame
from engine.contract.timers import TimerRecord, tick_line
from engine.domain.decide import Fact
from engine.domain.policy import TICK_INTERVAL_MS_MAX
from engine.store.protocol import UpdateEntry
from gateway.asyncapi import CLIENT_SYNC, document, frame_schemas
from gateway.closing import CloseCode
from gateway.connection import REPORTED_MS_MAX
from gateway.stale import StaleTicks
from tests.engine.contract.test_frames import BUYER, DECISIONS, NOW
from tests.gateway.front import front
from tests.gateway.house import AUCTION, House, Listener, record, told

DOCUMENT: dict[str, Any] = orjson.loads(orjson.dumps(document("1.2.3")))


def faults_of(frame: dict[str, Any], schema: str | None = None) -> list[str]:
    """What is wrong with a frame by the document: every error, and every field that is not described."""
    schemas = DOCUMENT["components"]["schemas"]
    name = schema or frame["type"]
    if name not in schemas:
        return [f"no schema for {name}"]
    validator = jsonschema_rs.Draft7Validator(DOCUMENT | {"$ref": f"#/components/schemas/{name}"})
    faults = [f"{name}: {error.instance_path} {error.message}" for error in validator.iter_errors(frame)]
    known = {"": schemas[name], "timer": schemas["Timer"]}
    for path, part in {"": frame, "timer": frame.get("timer", {})}.items():
        faults += [
            f"{name}: {path}.{field} is not described" for field in part.keys() - known[path]["properties"].keys()
        ]
    return faults


def refs(node: Any) -> Iterator[str]:
    """Every reference in the document."""
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for value in node.values():
            yield from refs(value)
    elif isinstance(node, list):
        for value in node:
            yield from refs(value)


def found(ref: str) -> Any:
    """What a reference leads to."""
    node: Any = DOCUMENT
    for step in ref.removeprefix("#/").split("/"):
        node = node[step]
    return node


def test_every_reference_leads_somewhere_and_nothing_stands_unused() -> None:
    """Each message is in a channel, each schema in a message or another schema, and each reference resolves."""
    used = set(refs(DOCUMENT))
    for ref in used:
        assert ref.startswith("#/")
        assert found(ref) is not None
    for kind in ("messages", "schemas", "securitySchemes"):
        assert {f"#/components/{kind}/{name}" for name in DOCUMENT["components"][kind]} <= used
    for name, channel in DOCUMENT["channels"].items():
        sent = {
            message["$ref"]
            for operation in DOCUMENT["operations"].values()
            for part in (operation, operation.get("reply", {}))
            if part.get("channel", {}).get("$ref") == f"#/channels/{name}"
            for message in part["messages"]
        }
        assert sent == {f"#/channels/{name}/messages/{message}" for message in channel["messages"]}


def test_the_document_has_the_shape_of_asyncapi_3() -> None:
    """What version 3.0.0 of the specification requires of each object that is used here."""
    assert DOCUMENT["asyncapi"] == "3.0.0"
    assert DOCUMENT["info"]["version"] == "1.2.3"
    for channel in DOCUMENT["channels"].values():
        assert {part[1:-1] for part in channel["address"].split("/") if part.startswith("{")} == set(
            channel["parameters"]
        )
    for operation in DOCUMENT["operations"].values():
        assert operation["action"] in {"send", "receive"}
        assert operation["channel"].keys() == {"$ref"}
    for message in DOCUMENT["components"]["messages"].values():
        assert message.keys() >= {"name", "payload", "summary"}
    for name, schema in DOCUMENT["components"]["schemas"].items():
        jsonschema_rs.meta.validate({"$schema": "http://json-schema.org/draft-07/schema#"} | schema)
        assert set(schema["required"]) <= schema["properties"].keys(), name


def test_every_close_code_is_named_with_what_to_do() -> None:
    """The codes are the catalogue's, and so are the sentences."""
    codes = {entry["code"]: entry["meaning"] for entry in DOCUMENT["channels"]["updates"]["x-close-codes"]}
    assert set(codes) == {code.value for code in CloseCode}
    assert codes[4000] == "Nothing more will come. Stop."
    assert all(codes.values())


@pytest.mark.requirement("R7")
@pytest.mark.parametrize("fact", DECISIONS)
async def test_whatever_a_decision_announces_is_described(fact: Fact) -> None:
    """The frames of every fact, as a gateway sends them on: valid, and without a field that is not described."""
    decision = DECISIONS[fact]
    auction = decision.after
    house = House()
    if not auction.status.is_public:
        return
    standing = TimerRecord(auction, "trace-1", "req-0")
    house.put(record(auction.auction_id, version=1))
    room = await house.hub.room(auction.auction_id)
    assert room is not None
    listener = Listener()
    room.writable.add(listener)
    updates = announce(decision, standing, actor=BUYER, trace_id="trace-2", correlation_id="req-2", now=NOW)
    entries: list[UpdateEntry] = [
        house.append(update.auction_id, update.type, update.body, update.version) for update in updates
    ]
    await house.read_lane()
    frames = told(listener.sent)
    assert [frame["type"] for frame in frames] == [entry.type for entry in entries if is_frame(entry.type)]
    house.hub.on_ticks(0, tick_line(standing, house.clock.now_ms()))
    for frame in [*told(listener.sent), orjson.loads(house.hub.greeting(room, None).snapshot.payload)]:
        assert faults_of(frame) == []


async def test_what_a_gateway_says_by_itself_is_described() -> None:
    """A snapshot with and without what was missed, a tick from memory, a resynchronisation after a failover."""
    house = House()
    house.put(record())
    room = await house.hub.room(AUCTION)
    assert room is not None
    listener = Listener()
    room.writable.add(listener)
    house.hub.stale = lambda: True
    StaleTicks(house.hub).look()
    await house.hub.reload(0, "failover")
    frames = [
        *told(listener.sent),
        *(orjson.loads(house.hub.greeting(room, since).snapshot.payload) for since in ("0.0-0", "x")),
    ]
    assert [frame["type"] for frame in frames] == ["timer.tick", "timer.resynced", "timer.snapshot", "timer.snapshot"]
    assert frames[0]["stale"] is True
    for frame in frames:
        assert faults_of(frame) == []


def test_a_frame_that_is_wrong_is_found() -> None:
    """The check can fail: a missing field, a wrong type, an unknown field in the frame and in its timer."""
    good = {"type": "sync", "auction_id": "a", "server_time": 1, "trace_id": "t", "t0": 1.5, "t1": 2, "t2": 3}
    assert faults_of(good) == []
    for change in ({"t1": "2"}, {"t1": 2.5}, {"colour": "red"}, {"timer": {"colour": "red"}}):
        assert faults_of(good | change)
    for field in good:
        assert (
            faults_of({name: value for name, value in good.items() if name != field} | {"type": "sync"})
            or field == "type"
        )
    assert faults_of({"type": "unheard.of"}) == ["no schema for unheard.of"]
    assert len(frame_schemas()) == 14


def test_the_reports_of_a_client_have_their_bounds() -> None:
    """As the socket checks them: a drift has two directions, a round trip has not."""
    for name, reported, is_fault in [
        ("drift_ms", -REPORTED_MS_MAX, False),
        ("drift_ms", -REPORTED_MS_MAX - 1, True),
        ("rtt_ms", 0, False),
        ("rtt_ms", -0.5, True),
        ("rtt_ms", REPORTED_MS_MAX + 1, True),
        ("rtt_ms", None, False),
    ]:
        assert bool(faults_of({"type": "sync", "t0": 1, name: reported}, CLIENT_SYNC)) is is_fault, (name, reported)


def test_a_client_that_goes_by_the_heartbeat_suspects_no_healthy_connection() -> None:
    """It is longer than the slowest ticks are apart, by more than they are ever late."""
    heartbeat_ms = frame_schemas()["timer.snapshot"]["properties"]["heartbeat_ms"]["const"]
    assert heartbeat_ms >= TICK_INTERVAL_MS_MAX + 5_000
    assert heartbeat_ms == CLIENT_HEARTBEAT_MS


async def test_the_description_is_served_to_everybody() -> None:
    """At `/asyncapi.json`, without a token, with the version of the package."""
    async with front(jwt_secret="s" * 48) as made:
        answer = await made.http.get("/asyncapi.json")
        assert (answer.status_code, answer.json()["asyncapi"]) == (200, "3.0.0")
