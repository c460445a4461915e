"""NATS as the tests of FastStreamBroker see it."""

from __future__ import annotations

import logging
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from faststream.nats import NatsBroker

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

__all__ = ["emptied", "jetstream", "new_broker"]


def new_broker(url: str) -> NatsBroker:
    """A FastStream broker that is not connected, and says nothing on stderr."""
    return NatsBroker(url, logger=None, log_level=logging.DEBUG, reconnect_time_wait=0, max_reconnect_attempts=-1)


@asynccontextmanager
async def jetstream(url: str) -> AsyncGenerator[Any]:
    """JetStream on a connection of its own."""
    async with new_broker(url) as broker:
        client: Any = broker.connection
        yield client.jetstream()


async def emptied(url: str) -> None:
    """Delete all streams."""
    async with jetstream(url) as streams:
        for info in await streams.streams_info():
            await streams.delete_stream(info.config.name)
