"""The servers of a run, the proxies before them and the processes: started, broken as the schedule says, and calmed."""

from __future__ import annotations

import asyncio
import heapq
import signal
import time
from itertools import count
from typing import TYPE_CHECKING, Any

from redis import Redis
from redis.exceptions import RedisError

from tests.faults.application import ACCOUNTS, METADATA, STREAMS, accounts, engine_of
from tests.faults.children import Child
from tests.faults.consuming import GROUP
from tests.faults.databases import KINDS, durable_redis
from tests.faults.evidence import is_drained
from tests.faults.schedule import Fault, Targets, schedule
from tests.faults.settings import Settings
from tests.proxy import Proxy

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import ExitStack
    from pathlib import Path

    from tests.faults.databases import Kind
    from tests.faults.plan import Plan
    from tests.servers import Server

__all__ = ["Stage"]

START_SECONDS = 90.0
DRAIN_SECONDS = 90.0
MOST_FALLS = 20
"""Processes that may end by themselves before a run is given up."""

TELL_SECONDS = 2.0
BROKER_DELAY = 0.02
"""Seconds that an answer of Redis to a relay takes."""


class Stage:
    """The servers, the proxies before them, and the processes."""

    def __init__(self, stack: ExitStack, plan: Plan, folder: Path) -> None:
        self.children: dict[str, Child] = {}
        self.done: list[Fault] = []
        self.troubles: list[str] = []
        self._stack = stack
        self._plan = plan
        self._folder = folder
        self._kind: Kind = KINDS[plan.database]
        self._server = self._kind.create()
        self.redis = durable_redis()
        self._servers: dict[str, Server] = {"redis": self.redis}
        if self._server is not None:
            self._servers["database"] = self._server
        self._proxies: dict[str, list[Proxy]] = {}
        self._later: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()
        self._entries = 0
        self._told = 0.0

    @property
    def database_url(self) -> str:
        """Past the proxy."""
        return self._kind.url(self._server, self._folder)

    def open(self) -> None:
        for name, server in self._servers.items():
            self._stack.enter_context(server)
            self._proxies[name] = [self._proxy_of(server)]
        slow = self._proxy_of(self.redis)
        slow.delay = BROKER_DELAY
        self._proxies["redis"].append(slow)
        asyncio.run(_create_tables(self.database_url))
        plan = self._plan
        behind = next(iter(self._proxies.get("database", ())), None)
        settings = Settings(
            folder=str(self._folder),
            database=self._kind.url(self._server, self._folder, None if behind is None else behind.port),
            redis=f"redis://127.0.0.1:{self._proxies['redis'][0].port}/0",
            broker=f"redis://127.0.0.1:{slow.port}/0",
            seed=plan.seed,
            lease=plan.lease,
            batch=plan.batch,
            rate=plan.rate,
        )
        settings.save()
        command = ["-m", "pipeline_mediator", "relay", "tests.faults.relay:mediator", "--poll", "0.2"]
        command += ["--batch", str(plan.batch), "--lease", str(plan.lease)]
        parts = {f"writer-{n}": ["-m", "tests.faults.writer"] for n in range(1, plan.writers + 1)}
        # As the command line has it, and as an application does it by itself.
        parts |= {f"relay-{n}": command if n % 2 else ["-m", "tests.faults.relay"] for n in range(1, plan.relays + 1)}
        consume = ["-m", "pipeline_mediator", "consume", "tests.faults.consumer:consumer"]
        parts |= {
            f"consumer-{n}": consume if n % 2 else ["-m", "tests.faults.consumer"] for n in range(1, plan.consumers + 1)
        }
        for name, arguments in parts.items():
            child = self.children[name] = Child(name, arguments, settings)
            self._stack.callback(child.kill)
            child.start()
        self._wait_for_life()

    def _wait_for_life(self) -> None:
        """Until the first event has gone all the way to a consumer."""
        until = time.monotonic() + START_SECONDS
        while not self._is_consumed():
            if time.monotonic() > until:
                raise RuntimeError(f"nothing was consumed within {START_SECONDS:g} s:\n{self.logs()}")
            time.sleep(0.1)

    def _proxy_of(self, server: Server) -> Proxy:
        return self._stack.enter_context(Proxy(server.port))

    # -- faults --------------------------------------------------------------------------------------------------------

    def play(self, tell: Callable[[float, int, int], None]) -> None:
        """All faults of the schedule, each at its time."""
        names = list(self.children)
        targets = Targets(
            relays=[name for name in names if name.startswith("relay")],
            writers=[name for name in names if name.startswith("writer")],
            consumers=[name for name in names if name.startswith("consumer")],
            servers=list(self._servers),
        )
        began = time.monotonic()
        for fault in schedule(self._plan.seed, self._plan.seconds, targets, self._plan.lease):
            self._wait(began + fault.at, began, tell)
            self._break(fault)
            self.done.append(fault)
        self._wait(began + self._plan.seconds, began, tell)

    def _wait(self, until: float, began: float, tell: Callable[[float, int, int], None]) -> None:
        while (now := time.monotonic()) < until:
            self._do_what_is_due(now)
            self._replace_the_fallen()
            if now - self._told > TELL_SECONDS:
                self._told = now
                tell(now - began, len(self.done), self._stream_length())
            time.sleep(min(0.1, max(0.0, until - time.monotonic())))

    def _break(self, fault: Fault) -> None:
        match fault.kind:
            case "kill":
                child = self.children[fault.target]
                child.kill()
                child.start()
            case "stop":
                child = self.children[fault.target]
                child.signal(signal.SIGSTOP)
                self._after(fault.seconds, lambda: child.signal(signal.SIGCONT))
            case "restart":
                server = self._servers[fault.target]
                server.kill()
                self._after(fault.seconds, lambda: None if server.running else server.start())
            case "cut":
                for proxy in self._proxies[fault.target]:
                    proxy.cut()
            case "cut reply":
                self._cut_reply(fault.target)
            case "terminate":
                self._terminate(fault.target)
            case "stall":
                for proxy in self._proxies[fault.target]:
                    proxy.stall()
                    self._after(fault.seconds, proxy.release)

    def _cut_reply(self, target: str) -> None:
        # Redis has two proxies: one for consumers, and one for relays.
        wanted = (self._kind.commit,) if target == "database" else (b"XACK", b"XADD")
        for proxy, awaited in zip(self._proxies[target], wanted, strict=True):
            proxy.when(awaited, "cut reply")

    def _terminate(self, target: str) -> None:
        if target == "database":
            self._kind.terminate(self.database_url)
            return
        with self._client() as client:
            try:
                client.client_kill_filter(_type="normal", skipme=True)
            except RedisError:
                return

    def _after(self, seconds: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._later, (time.monotonic() + seconds, next(self._numbers), action))

    def _do_what_is_due(self, now: float) -> None:
        while self._later and self._later[0][0] <= now:
            heapq.heappop(self._later)[2]()

    def _replace_the_fallen(self) -> None:
        """A process that ends without being killed by us is a trouble, and its part goes on."""
        for child in self.children.values():
            code = child.ended()
            if code is not None:
                self.troubles.append(f"{child.name} ended by itself with {code}")
                if len(self.troubles) > MOST_FALLS:
                    raise RuntimeError(f"processes keep ending by themselves:\n{self.logs()}")
                child.start()

    # -- the end -------------------------------------------------------------------------------------------------------

    def calm(self) -> None:
        """No more faults and no more commands; wait until all has arrived; end the processes in order."""
        self._do_what_is_due(float("inf"))
        for server in self._servers.values():
            if not server.running:
                server.start()
        self._end("writer")
        until = time.monotonic() + DRAIN_SECONDS
        while not asyncio.run(is_drained(self.database_url, self.redis.url)):
            if time.monotonic() > until:
                self.troubles.append(f"something still waits {DRAIN_SECONDS:g} s after the last fault")
                break
            self._replace_the_fallen()
            time.sleep(0.2)
        self._end("relay")
        self._end("consumer")

    def _end(self, role: str) -> None:
        for name, child in self.children.items():
            if name.startswith(role) and (trouble := child.end()) is not None:
                self.troubles.append(trouble)

    def logs(self) -> str:
        """The last of what each process printed."""
        ends = [(child.name, child.log) for child in self.children.values() if child.log.exists()]
        return "\n".join(f"--- {name}\n{log.read_text(errors='replace')[-3000:]}" for name, log in ends)

    # -- looking -------------------------------------------------------------------------------------------------------

    def _client(self) -> Any:
        plain: Any = Redis
        return plain.from_url(self.redis.url, socket_timeout=1.0)

    def _is_consumed(self) -> bool:
        with self._client() as client:
            groups = [group for stream in STREAMS if client.exists(stream) for group in client.xinfo_groups(stream)]
        read = {group["last-delivered-id"] for group in groups if group["name"] == GROUP.encode()}
        return bool(read - {b"0-0"})

    def _stream_length(self) -> int:
        with self._client() as client:
            try:
                self._entries = sum(client.xlen(stream) for stream in STREAMS)
            except RedisError:
                return self._entries
        return self._entries


async def _create_tables(url: str) -> None:
    engine = engine_of(url)
    async with engine.begin() as connection:
        await connection.run_sync(METADATA.create_all)
        await connection.execute(ACCOUNTS.insert(), [{"name": name, "moves": 0} for name in accounts()])
    await engine.dispose()
