"""The processes of the fan-out benchmarks: clients, servers, and the real gateway."""

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import httpx

from auction_timer.processes import ChildSpec, ChildSupervisor, console_script
from auction_timer.roles import listen, url_of
from benchmarks.harness import Bench
from benchmarks.machine import CLIENT_CORE, SERVER_CORE, pin

ROOT: Final = Path(__file__).parent.parent
ANSWER_WITHIN_S: Final = 180.0
READY_WITHIN_S: Final = 30.0


class Part:
    """A child that takes a JSON object a line and answers with one."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.pid = process.pid

    def tell(self, **command: Any) -> None:
        """Send a command; its answer is read with `answer`."""
        self.tell_line(json.dumps(command).encode())

    def tell_line(self, line: bytes) -> None:
        """Send a line."""
        assert self._process.stdin is not None
        self._process.stdin.write(line + b"\n")

    async def answer(self) -> dict[str, Any]:
        """The next answer.

        Raises:
            TimeoutError: none came.
            EOFError: the child has ended.
        """
        assert self._process.stdout is not None
        async with asyncio.timeout(ANSWER_WITHIN_S):
            line = await self._process.stdout.readline()
        if not line:
            raise EOFError("a process of the benchmark ended; what it said stands above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    async def ask(self, do: str, **command: Any) -> dict[str, Any]:
        """Send a command, and wait for its answer."""
        self.tell(do=do, **command)
        return await self.answer()


@asynccontextmanager
async def part(module: str, *args: str, pass_fds: tuple[int, ...] = ()) -> AsyncIterator[Part]:
    """Run a module of the benchmarks as a child."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", module, *args),
        cwd=ROOT,
        pass_fds=pass_fds,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        yield Part(process)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


@asynccontextmanager
async def client() -> AsyncIterator[Part]:
    """A `benchmarks.fanout_client`."""
    async with part("benchmarks.fanout_client", str(CLIENT_CORE)) as made:
        yield made


class GatewayProcess:
    """A gateway as `serve` starts it: restarted when it dies, its port open all the while."""

    def __init__(self, children: ChildSupervisor, url: str, port: int) -> None:
        self._children = children
        self.url = url
        self.port = port

    @property
    def pid(self) -> int:
        """Of the process that runs now.

        Raises:
            ProcessLookupError: none does at the moment.
        """
        (child,) = self._children.children
        if child.pid is None:
            raise ProcessLookupError("the gateway is being restarted")
        return child.pid

    async def until_alive(self) -> None:
        """Wait until it answers, and keep it on its core.

        Raises:
            TimeoutError: it does not.
        """
        async with asyncio.timeout(READY_WITHIN_S), httpx.AsyncClient(trust_env=False) as http:
            while True:
                with contextlib.suppress(httpx.HTTPError, ProcessLookupError):
                    if (await http.get(f"{self.url}/healthz")).status_code == httpx.codes.OK:
                        pin(self.pid, SERVER_CORE)
                        return
                await asyncio.sleep(0.02)

    async def counted(self, sample: str) -> float:
        """A sample of its metrics, such as `auctions_gateway_disconnects_total{code="4101"}`; 0 if there is none."""
        async with httpx.AsyncClient(trust_env=False) as http:
            text = (await http.get(f"{self.url}/metrics")).text
        found = [line.rpartition(" ")[2] for line in text.splitlines() if line.startswith(sample + " ")]
        return float(found[0]) if found else 0.0


@asynccontextmanager
async def gateway_process(made: Bench, shards: int) -> AsyncIterator[GatewayProcess]:
    """A gateway on a free port."""
    with contextlib.closing(listen("127.0.0.1", 0)) as listener:
        fd = listener.fileno()
        env = os.environ | {"AUCTION_TIMER_REDIS_URL": made.url, "AUCTION_TIMER_SHARDS": str(shards)}
        env |= {"AUCTION_TIMER_LOG_LEVEL": "error"}
        async with ChildSupervisor() as children:
            argv = (*console_script(), "gateway", "--parent", str(os.getpid()), "--fd", str(fd))
            await children.start(ChildSpec("gateway", argv, env, pass_fds=(fd,)))
            found = GatewayProcess(children, url_of(listener), listener.getsockname()[1])
            await found.until_alive()
            yield found
