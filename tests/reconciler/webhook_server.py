"""A real receiver of webhooks on a free port, that fails when told to."""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

import orjson


@dataclass(frozen=True, slots=True)
class Request:
    """A request as it came, its header names in lower case."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def event(self) -> dict[str, Any]:
        """The body, as JSON."""
        event: dict[str, Any] = orjson.loads(self.body)
        return event

    @property
    def id(self) -> str:
        """The `webhook-id`."""
        return self.headers["webhook-id"]


@dataclass(frozen=True, slots=True)
class Answer:
    """What the receiver does with a request: `after` an event has been set, it sends `status` and `body`, or hangs up.

    `cut`: it hangs up in the middle of the body. `endless`: its body never ends. `hang_up`: it says nothing at all.
    """

    status: int = 204
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    after: asyncio.Event | None = None
    cut: bool = False
    endless: bool = False
    hang_up: bool = False


class WebhookServer:
    """Keeps every request. `answers` are given in order; when they are used up, `otherwise` decides."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.answers: deque[Answer] = deque()
        self.otherwise: Callable[[Request], Answer] = lambda _request: Answer()
        self.connections = 0
        self.in_flight = 0
        self.in_flight_most = 0
        self.endless_bytes = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    @property
    def url(self) -> str:
        """Where events are to be posted; part of it is a secret, as in the addresses that chats give out."""
        port = self._server.sockets[0].getsockname()[1]
        return f"http://user:pass-word@127.0.0.1:{port}/hooks/path-secret"

    @property
    def ids(self) -> list[str]:
        """The `webhook-id` of every request."""
        return [request.id for request in self.requests]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self.connections += 1
        try:
            # A cancelled handler would be reported by asyncio itself (before Python 3.12).
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                while await self._answer(await _request(reader), writer):
                    pass
        finally:
            writer.close()

    async def _answer(self, request: Request, writer: asyncio.StreamWriter) -> bool:
        """Answer one request; whether the connection stays open."""
        self.requests.append(request)
        self.in_flight += 1
        self.in_flight_most = max(self.in_flight_most, self.in_flight)
        try:
            return await self._send(self.answers.popleft() if self.answers else self.otherwise(request), writer)
        finally:
            self.in_flight -= 1

    async def _send(self, answer: Answer, writer: asyncio.StreamWriter) -> bool:
        if answer.after is not None:
            await answer.after.wait()
        if answer.hang_up:
            return False
        length = 10**9 if answer.endless else len(answer.body)
        head = [f"HTTP/1.1 {answer.status} Whatever", f"Content-Length: {length}", "Set-Cookie: a=b"]
        head += [f"{name}: {value}" for name, value in answer.headers.items()]
        body = answer.body[: len(answer.body) // 2] if answer.cut else answer.body
        writer.write("\r\n".join([*head, "", ""]).encode() + body)
        await writer.drain()
        while answer.endless:
            writer.write(b"x" * 65_536)
            await writer.drain()
            self.endless_bytes += 65_536
            await asyncio.sleep(0)
        return not answer.cut


async def _request(reader: asyncio.StreamReader) -> Request:
    head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
    return Request(head[0].split(" ")[1], headers, await reader.readexactly(int(headers["content-length"])))
