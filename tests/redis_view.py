"""What a Redis server gets and holds, seen from beside the client that is tested."""

from __future__ import annotations

import traceback
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import redis.asyncio

from pipeline_mediator.message_brokers import Outgoing
from tests.proxy import Proxy

__all__ = ["Client", "batch", "command", "outgoing", "through", "watching", "whole_text"]

# Any: redis-py's annotations are partial, and not the same in any two versions.
Client: Any = redis.asyncio.Redis


def outgoing(number: int, destination: str = "orders", key: str | None = None) -> Outgoing:
    return Outgoing(destination, b"secret body %d" % number, "text/plain", f"id-{number}", "n", key)


def batch(size: int) -> list[Outgoing]:
    return [outgoing(number) for number in range(size)]


def through(proxy: Proxy) -> str:
    return f"redis://127.0.0.1:{proxy.port}/0"


async def command(url: str, *words: str | bytes | int) -> Any:
    async with Client.from_url(url) as client:
        return await client.execute_command(*words)


@asynccontextmanager
async def watching(url: str) -> AsyncGenerator[list[tuple[str, str]]]:
    """Every command that the server gets meanwhile, as (client, command)."""
    seen: list[tuple[str, str]] = []
    async with Client.from_url(url) as client, Client.from_url(url) as end, client.monitor() as monitor:
        yield seen
        await end.echo("that was all")
        while "that was all" not in (entry := await monitor.next_command())["command"]:
            seen.append((f"{entry['client_address']}:{entry['client_port']}", entry["command"]))


def whole_text(error: BaseException) -> str:
    return "".join(traceback.format_exception(error, limit=0))
