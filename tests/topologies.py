"""Redis as it is run in production: a primary with replicas and sentinels, and a Cluster. Real processes on loopback.

Every server listens on a free port, lives in a directory of its own, and is killed by its own pid; the kernel kills it when
the test run dies.
"""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, TypeVar

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from engine.contract.keys import ShardKeys, shard_of
from tests.servers import _LAUNCHER, VALKEY

WITHIN_S: Final = 30.0
POLL_S: Final = 0.01
SERVICE: Final = "auction"
DOWN_AFTER_MS: Final = 1_000
QUICK: Final = ("ASK-PERIOD", "100", "INFO-PERIOD", "400", "PUBLISH-PERIOD", "200", "PING-PERIOD", "500")
"""Sentinels find each other and their replicas within half a second instead of 10 s.

Three periods of INFO bound the age of what is known of a replica that may be promoted by hand, and the sentinels look ten
times a second: at 0.1 s a loaded machine has none to promote. Five periods of pings bound it in an outage, in which INFO is
asked once a second. With a period of pings as long as `DOWN_AFTER_MS` a sentinel would take a new primary for dead at the
moment of its first ping.
"""


LOWEST: Final = 10_000
HIGHEST: Final = 21_999
"""Below the ports that the kernel gives to connections, with 10,000 added too: one of those could take the port of a server
that is down for a moment."""


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on; with 10,000 added they are free too, for the bus of a Cluster."""
    found: list[int] = []
    for port in random.SystemRandom().sample(range(LOWEST, HIGHEST + 1), HIGHEST + 1 - LOWEST):
        with socket.socket() as first, socket.socket() as second:
            try:
                first.bind(("127.0.0.1", port))
                second.bind(("127.0.0.1", port + 10_000))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise AssertionError(f"no {count} free ports")


def until(condition: Callable[[], Any], what: str, within_s: float = WITHIN_S) -> Any:
    """Poll a condition until it holds, taking an error of the server for "not yet"; fail with `what` after a deadline."""
    give_up = time.monotonic() + within_s
    while True:
        try:
            if found := condition():
                return found
        except (RedisError, OSError):
            pass
        if time.monotonic() > give_up:
            raise AssertionError(f"not within {within_s} s: {what}")
        time.sleep(POLL_S)


class Member:
    """One server of a topology."""

    def __init__(
        self, port: int, options: Sequence[str], *, config: str | None = None, env: Mapping[str, str] | None = None
    ) -> None:
        self.port = port
        self._env = os.environ | (env or {})
        self.options = list(options)
        self.directory = Path(tempfile.mkdtemp(prefix="at-", dir="/tmp"))
        self.log = self.directory / "log"
        if config is not None:
            (self.directory / "conf").write_text(config)
            self.options = [str(self.directory / "conf"), *options]
        self.start()

    def start(self) -> None:
        """Start it, or start it again with the data it has."""
        command = [
            str(VALKEY.program), *self.options,
            *("--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.directory), "--logfile", str(self.log)),
        ]  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), *command],
            env=self._env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    @property
    def address(self) -> str:
        """Its host and port."""
        return f"127.0.0.1:{self.port}"

    def ask(self, *command: str | int) -> Any:
        """One command, on a connection of its own."""
        with Redis(port=self.port, socket_timeout=2, retry=Retry(NoBackoff(), 0), decode_responses=True) as client:
            return client.execute_command(*command)

    def role(self) -> str:
        """`master` or `slave`, as the server says."""
        return str(self.ask("ROLE")[0])

    def kill(self) -> None:
        """SIGKILL, and wait for its end."""
        self.thaw()
        self.process.kill()
        self.process.wait()

    def freeze(self) -> None:
        """SIGSTOP: it keeps its connections and answers nothing."""
        os.kill(self.process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        if self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGCONT)

    def remove(self) -> None:
        """End it and forget its data."""
        if self.process.poll() is None:
            self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)


RANGES: Final = ((0, 5460), (5461, 10922), (10923, 16383))
"""The slots of the three primaries."""
SHARDS: Final = 8
"""As settings have it by default."""
_KEEPS: Final = (
    *("--appendonly", "yes", "--aof-use-rdb-preamble", "no", "--save", "", "--maxmemory-policy", "noeviction"),
    *("--repl-ping-replica-period", "1", "--repl-diskless-sync-delay", "0", "--shutdown-timeout", "1"),
    *("--enable-debug-command", "local"),
)


class SentinelGroup:
    """One primary, two replicas, which have `replica_env`, and three sentinels."""

    def __init__(self, *, down_after_ms: int = DOWN_AFTER_MS, replica_env: Mapping[str, str] | None = None) -> None:
        ports = free_ports(6)
        self._replica_env = replica_env
        self.members: list[Member] = []
        self.sentinels: list[Member] = []
        try:
            self._start(ports[:3], ports[3:], down_after_ms)
        except BaseException:
            self.stop()
            raise

    def _start(self, ports: list[int], sentinel_ports: list[int], down_after_ms: int) -> None:
        for port in ports:
            follows = () if port == ports[0] else ("--replicaof", f"127.0.0.1 {ports[0]}")
            self.members.append(Member(port, [*_KEEPS, *follows], env=self._replica_env if follows else None))
        for member in self.members:
            until(lambda member=member: member.ask("PING"), f"{member.address} answers")
        until(lambda: len(self.members[0].ask("ROLE")[2]) == 2, "both replicas are connected")
        for port in sentinel_ports:
            config = (
                f"sentinel monitor {SERVICE} 127.0.0.1 {ports[0]} 2\n"
                f"sentinel down-after-milliseconds {SERVICE} {down_after_ms}\n"
                f"sentinel failover-timeout {SERVICE} 5000\n"
                f"sentinel parallel-syncs {SERVICE} 1\n"
            )
            self.sentinels.append(Member(port, ["--sentinel"], config=config))
        for sentinel in self.sentinels:
            until(lambda sentinel=sentinel: sentinel.ask("PING"), f"sentinel {sentinel.address} answers")
            sentinel.ask("SENTINEL", "DEBUG", *QUICK)
        for sentinel in self.sentinels:
            until(lambda sentinel=sentinel: self._knows_all(sentinel), f"sentinel {sentinel.address} knows everyone")

    def _knows_all(self, sentinel: Member) -> bool:
        said = sentinel.ask("SENTINEL", "MASTER", SERVICE)
        state = said if isinstance(said, dict) else dict(zip(said[::2], said[1::2], strict=True))
        return int(state["num-slaves"]) == 2 and int(state["num-other-sentinels"]) == 2

    @property
    def url(self) -> str:
        """As settings spell it."""
        return f"redis+sentinel://{','.join(sentinel.address for sentinel in self.sentinels)}/{SERVICE}"

    @property
    def primary(self) -> Member:
        """The member that every sentinel holds for the primary, once it says so itself.

        All of them, not a majority: one that has not heard of a failover sends whoever asks it to the former primary, and if
        that is up again it takes writes until it is told to follow.
        """

        def named() -> Member | None:
            asked = [sentinel for sentinel in self.sentinels if sentinel.process.poll() is None]
            said = {str(sentinel.ask("SENTINEL", "GET-MASTER-ADDR-BY-NAME", SERVICE)[1]) for sentinel in asked}
            found = next((member for member in self.members if said == {str(member.port)}), None)
            return found if found is not None and found.role() == "master" else None

        found: Member = until(named, "the sentinels agree on a primary")
        return found

    def victim(self, _auction_ids: Sequence[str]) -> Member:
        """Whom to kill, so that these auctions feel it."""
        return self.primary

    def demote(self, primary: Member) -> None:
        """Ask for a failover by hand, as long as the sentinel takes this member for the primary.

        To be repeated: a failover that finds no replica fit to be promoted at that moment is given up without a word.
        """
        sentinel = self.sentinels[0]
        if str(sentinel.ask("SENTINEL", "GET-MASTER-ADDR-BY-NAME", SERVICE)[1]) == str(primary.port):
            with suppress(RedisError):  # one is under way
                sentinel.ask("SENTINEL", "FAILOVER", SERVICE)

    def wait_until_whole(self) -> Member:
        """Wait for one primary with two replicas that every sentinel knows to be well; the primary."""

        def whole() -> Member | None:
            # Asked anew each time: who was named a moment ago may have been told to follow somebody else.
            primary = self.primary
            role = primary.ask("ROLE")
            if role[0] not in (b"master", "master") or len(role[2]) != 2:
                return None
            return primary if all(self._is_well(sentinel, primary) for sentinel in self.sentinels) else None

        found: Member = until(whole, "every sentinel sees a primary with two replicas that are well", within_s=90)
        return found

    def _is_well(self, sentinel: Member, primary: Member) -> bool:
        if str(sentinel.ask("SENTINEL", "GET-MASTER-ADDR-BY-NAME", SERVICE)[1]) != str(primary.port):
            return False
        with Redis(port=sentinel.port, socket_timeout=2, decode_responses=True) as client:
            known = client.sentinel_slaves(SERVICE)
        well = [each for each in known if each["flags"] == "slave" and each["master-link-status"] == "ok"]
        return len(well) == 2

    @property
    def replicas(self) -> list[Member]:
        """The other members that run."""
        primary = self.primary
        return [member for member in self.members if member is not primary and member.process.poll() is None]

    @contextmanager
    def without_replicas(self, *, cut: bool = True) -> Iterator[Member]:
        """Stop the replicas and `cut` their links: what the primary writes now, nobody else has. The primary is given."""
        primary, replicas = self.primary, self.replicas
        for replica in replicas:
            replica.freeze()
        if cut:
            primary.ask("CLIENT", "KILL", "TYPE", "replica")
        try:
            yield primary
        finally:
            for replica in replicas:
                replica.thaw()

    def stop(self) -> None:
        """End all of it."""
        for each in (*self.sentinels, *self.members):
            each.remove()


class ClusterGroup:
    """Three primaries that share the slots, each with replicas: one, or two where a write must have one after a failover."""

    def __init__(self, *, replicas: int = 1, node_timeout_ms: int = DOWN_AFTER_MS) -> None:
        self.members: list[Member] = []
        self._alive = len(RANGES) * (1 + replicas)
        try:
            self._start(free_ports(self._alive), node_timeout_ms)
        except BaseException:
            self.stop()
            raise

    def _start(self, ports: list[int], node_timeout_ms: int) -> None:
        options = (
            *_KEEPS,
            *("--cluster-enabled", "yes", "--cluster-config-file", "nodes.conf"),
            *("--cluster-node-timeout", str(node_timeout_ms), "--cluster-require-full-coverage", "no"),
        )
        for port in ports:
            self.members.append(Member(port, options))
        for member in self.members:
            until(lambda member=member: member.ask("PING"), f"{member.address} answers")
        primaries, replicas = self.members[:3], self.members[3:]
        for number, (primary, (first, last)) in enumerate(zip(primaries, RANGES, strict=True), start=1):
            primary.ask("CLUSTER", "SET-CONFIG-EPOCH", number)
            primary.ask("CLUSTER", "ADDSLOTSRANGE", first, last)
        for member in self.members[1:]:
            self.members[0].ask("CLUSTER", "MEET", "127.0.0.1", member.port)
        for member in self.members:
            until(lambda member=member: self._sees_all(member), f"{member.address} knows everyone")
        for number, replica in enumerate(replicas):
            name = primaries[number % len(primaries)].ask("CLUSTER", "MYID")
            until(
                lambda replica=replica, name=name: replica.ask("CLUSTER", "REPLICATE", name),
                f"{replica.address} knows whom it follows",
            )
        self.wait_until_whole()

    def _sees_all(self, member: Member) -> bool:
        nodes = self._nodes(member)
        return len(nodes) == len(self.members) and all("handshake" not in flags for flags, _ in nodes.values())

    def _nodes(self, member: Member) -> dict[int, tuple[str, list[str]]]:
        """What a member says of each: flags and slots, by port."""
        with Redis(port=member.port, socket_timeout=2, retry=Retry(NoBackoff(), 0), decode_responses=True) as client:
            client.set_response_callback("CLUSTER NODES", lambda answer, **_: answer)
            said = str(client.execute_command("CLUSTER NODES"))
        rows = [line.split(" ") for line in said.splitlines()]
        return {int(row[1].partition("@")[0].rpartition(":")[2]): (row[2], row[8:]) for row in rows}

    def wait_until_whole(self) -> None:
        """Wait until each primary has a replica that is in step, and every member says the same of all."""

        def whole() -> bool:
            views = [self._nodes(member) for member in self.members]
            roles = [{port: "master" in flags for port, (flags, _) in view.items()} for view in views]
            failing = any("fail" in flags for view in views for flags, _ in view.values())
            if failing or any(each != roles[0] for each in roles) or sum(roles[0].values()) != len(RANGES):
                return False
            followed = [member.ask("ROLE")[2] for member in self.members if roles[0][member.port]]
            return all(each for each in followed) and sum(len(each) for each in followed) == self._alive - len(RANGES)

        until(whole, "every primary of the Cluster has its replicas")

    @property
    def url(self) -> str:
        """As settings spell it: a few nodes know the others."""
        return f"redis+cluster://{','.join(member.address for member in self.members[:2])}"

    def serving(self, name: str) -> Member:
        """The primary that serves a key."""

        def found() -> Member | None:
            for asked in self.members:
                if asked.process.poll() is not None:
                    continue
                slot = int(asked.ask("CLUSTER", "KEYSLOT", name))
                for first, last, primary, *_ in asked.ask("CLUSTER", "SLOTS"):
                    if first <= slot <= last:
                        member = next(member for member in self.members if member.port == primary[1])
                        return member if member.process.poll() is None else None
            return None

        member: Member = until(found, f"a node serves {name}")
        return member

    def victim(self, auction_ids: Sequence[str]) -> Member:
        """Whom to kill, so that some of these auctions feel it."""
        return self.serving(ShardKeys.of(shard_of(auction_ids[0], SHARDS)).events)

    def stop(self) -> None:
        """End all of it."""
        for each in self.members:
            each.remove()


G = TypeVar("G", SentinelGroup, ClusterGroup)


@contextmanager
def stopping(made: G) -> Iterator[G]:
    """A group that is stopped after the block."""
    try:
        yield made
    finally:
        made.stop()
