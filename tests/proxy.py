"""A TCP proxy that makes a network misbehave when a test wants it to: late answers, lost ones, dead lines."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from typing import TYPE_CHECKING, Literal, Self

from anyio import to_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from types import TracebackType

__all__ = ["Action", "Moment", "Proxy"]

Action = Literal["hold", "late", "cut", "cut reply"]
"""What to do to the connection on which the awaited bytes pass.

hold       they reach the server; nothing it says comes back until `Proxy.release`
late       they reach the server when `release` lets them, though the client may have hung up meanwhile
cut        they do not reach the server; the connection is gone
cut reply  they reach the server; when it answers, the connection is gone and the answer lost
"""

_SECONDS = 15.0
_CHUNK = 65536


class Moment:
    """The passing of the awaited bytes, and the server's answer to them."""

    def __init__(self, wanted: bytes, action: Action) -> None:
        self.wanted = wanted
        self.action: Action = action
        self.passed = threading.Event()
        """They came from the client, and `action` was taken."""
        self.answered = threading.Event()
        """The server's answer came as far as the proxy."""
        self.open_gate: Callable[[], object] = lambda: None

    def release(self) -> None:
        """Let through what is kept back on this one connection."""
        self.open_gate()

    def is_in(self, before: bytes, chunk: bytes) -> bool:
        """Whether they end in `chunk`, though they may have begun in what came before it."""
        begun = before[-len(self.wanted) + 1 :] if len(self.wanted) > 1 else b""
        return self.wanted in begun + chunk

    async def happened(self) -> None:
        """Wait until the bytes passed. Raises `TimeoutError`."""
        await self._wait(self.passed, "pass")

    async def was_answered(self) -> None:
        """Wait until the server has answered them, whether or not the client may know. Raises `TimeoutError`."""
        await self._wait(self.answered, "get an answer")

    async def _wait(self, event: threading.Event, what: str) -> None:
        if not await to_thread.run_sync(event.wait, _SECONDS):
            raise TimeoutError(f"{self.wanted!r} did not {what} within {_SECONDS:g} s")


class Proxy:
    """Listens on a loopback port and passes everything on to `port`, in a thread and an event loop of its own.

        with Proxy(server.port) as proxy:
            commit = proxy.when(b"COMMIT", "hold")
            ...                                     # a client of 127.0.0.1:proxy.port commits
            await commit.was_answered()
            ...                                     # committed, and the client does not know it yet
            proxy.release()

    `when` acts once, on the connection concerned; all other methods on all connections, those to come included.
    """

    def __init__(self, port: int) -> None:
        self.port = 0
        self._target = port
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._server: asyncio.Server | None = None
        self._links: set[_Link] = set()
        self._moments: list[Moment] = []
        self._open = {"requests": True, "replies": True}
        self.delay = 0.0
        """Seconds that every answer takes longer."""
        self.opened = 0
        """Connections that clients have made so far."""

    def when(self, wanted: bytes, action: Action) -> Moment:
        """Do `action` when these bytes next come from a client."""
        moment = Moment(wanted, action)
        self._moments.append(moment)
        return moment

    def hold(self) -> None:
        """Keep back what the server answers."""
        self._do(self._gates(requests=True, replies=False))

    def stall(self) -> None:
        """Let nothing through in either direction; connections stay open, and new ones are still taken."""
        self._do(self._gates(requests=False, replies=False))

    def release(self) -> None:
        """Let through what is kept back, and all that follows."""
        self._do(self._gates(requests=True, replies=True))

    def cut(self) -> None:
        """Reset all connections."""
        self._do(self._cut())

    def refuse(self) -> None:
        """Stop listening, so that new connections are refused."""
        self._do(self._refuse())

    def accept(self) -> None:
        """Listen again, on the same port."""
        self._do(self._listen())

    def __enter__(self) -> Self:
        self._thread.start()
        self._do(self._listen())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._do(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_SECONDS)
        self._loop.close()

    def _do(self, action: Coroutine[object, object, None]) -> None:
        asyncio.run_coroutine_threadsafe(action, self._loop).result(_SECONDS)

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _refuse(self) -> None:
        if self._server is not None:
            self._server.close()

    async def _gates(self, *, requests: bool, replies: bool) -> None:
        self._open = {"requests": requests, "replies": replies}
        for link in self._links:
            link.set_gates(requests=requests, replies=replies)

    async def _cut(self) -> None:
        for link in list(self._links):
            link.cut()

    async def _end(self) -> None:
        await self._refuse()
        await self._cut()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.opened += 1
        link = _Link(writer)
        link.set_gates(**self._open)
        self._links.add(link)
        try:
            server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self._target)
            link.writers.append(server_writer)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._pass_requests(link, reader, server_writer))
                tasks.create_task(self._pass_replies(link, server_reader, writer))
        except* OSError:
            pass
        finally:
            self._links.discard(link)
            link.close()

    async def _pass_requests(self, link: _Link, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        before = b""
        while chunk := await reader.read(_CHUNK):
            await link.requests.wait()
            for moment in [one for one in self._moments if one.is_in(before, chunk)]:
                self._moments.remove(moment)
                link.act(moment)
            before = chunk
            await link.requests.wait()
            writer.write(chunk)
            await writer.drain()
        link.close()

    async def _pass_replies(self, link: _Link, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while chunk := await reader.read(_CHUNK):
            link.note_answer()
            await link.replies.wait()
            await asyncio.sleep(self.delay)
            writer.write(chunk)
            await writer.drain()
        link.close()


class _Link:
    """One client's connection and the one to the server that belongs to it."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self.writers = [writer]
        self.requests = asyncio.Event()
        self.replies = asyncio.Event()
        self._moment: Moment | None = None

    def set_gates(self, *, requests: bool, replies: bool) -> None:
        for gate, is_open in ((self.requests, requests), (self.replies, replies)):
            if is_open:
                gate.set()
            else:
                gate.clear()

    def act(self, moment: Moment) -> None:
        self._moment = moment
        if moment.action == "hold":
            self.replies.clear()
        elif moment.action == "late":
            self.requests.clear()
            loop = asyncio.get_running_loop()
            moment.open_gate = lambda: loop.call_soon_threadsafe(self.requests.set)
        elif moment.action == "cut":
            self.cut()
        moment.passed.set()

    def note_answer(self) -> None:
        if self._moment is None:
            return
        if self._moment.action == "cut reply":
            self.cut()
        self._moment.answered.set()
        self._moment = None

    def cut(self) -> None:
        for writer in self.writers:
            client: socket.socket | None = writer.get_extra_info("socket")
            with contextlib.suppress(OSError):
                if client is not None:
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

    def close(self) -> None:
        for writer in self.writers:
            writer.close()
