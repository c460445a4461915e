"""A process that reads the streams by hand: the inbox's record and the effect in one transaction, then XACK."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from redis.exceptions import RedisError, ResponseError
from sqlalchemy import insert
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from pipeline_mediator.inbox.sqlalchemy import SQLAlchemyInbox
from tests.faults.application import EFFECTS, INBOX, STREAMS, codec, engine_of
from tests.faults.life import run_until_told
from tests.redis_view import Client

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping

    from pipeline_mediator.codec import Codec, Decoded
    from tests.faults.settings import Settings

__all__ = ["GROUP", "Consumer", "decoded"]

GROUP = "faults"
MIN_IDLE = 2.0
"""Seconds after which what another consumer has not acknowledged is taken over; it may be handled twice at a time."""

logger = logging.getLogger(__name__)


def decoded(known: Codec, fields: Mapping[bytes, bytes]) -> Decoded:
    """The message in an entry of a stream that `RedisStreamBroker` wrote."""
    attributes = {name.decode(): value.decode() for name, value in fields.items() if name != b"data"}
    return known.decode(fields[b"data"], attributes["datacontenttype"], attributes)


class Consumer:
    """Handles each message at least once, and lets it take effect once."""

    def __init__(
        self,
        client: Any,
        sessions: async_sessionmaker[AsyncSession],
        name: str,
        *,
        min_idle: float = MIN_IDLE,
        block: float = 0.5,
    ) -> None:
        self._client = client
        self._sessions = sessions
        self._name = name
        self._min_idle = int(min_idle * 1000)
        self._block = int(block * 1000)
        self._codec = codec()
        self._inbox = SQLAlchemyInbox(INBOX)

    async def run(self) -> None:
        """Until it is cancelled, whatever happens to the servers."""
        while True:
            try:
                await self.join()
                while True:
                    await self.round()
            except (TimeoutError, RedisError, SQLAlchemyError, OSError) as error:
                logger.warning("%s: %s", type(error).__name__, error)
                await asyncio.sleep(0.2)

    async def round(self) -> None:
        """Take over what others left, and read what is new."""
        async for stream, entry, fields in self._deliveries():
            await self.handle(decoded(self._codec, fields))
            await self._client.xack(stream, GROUP, entry)

    async def handle(self, event: Decoded) -> None:
        """The effect in the database, once per message."""
        async with self._sessions.begin() as session:
            if await self._inbox.record(session, GROUP, event.source, event.facts.message_id):
                await session.execute(insert(EFFECTS).values(message_id=event.facts.message_id))

    async def join(self) -> None:
        """Make the group, if it is not there."""
        for stream in STREAMS:
            try:
                await self._client.xgroup_create(stream, GROUP, id="0", mkstream=True)
            except ResponseError as error:
                if "BUSYGROUP" not in str(error):
                    raise

    async def _deliveries(self) -> AsyncGenerator[tuple[Any, Any, Mapping[bytes, bytes]]]:
        for stream in STREAMS:
            # Two or three parts, by the version of the server.
            claimed = await self._client.xautoclaim(stream, GROUP, self._name, self._min_idle, count=100)
            for entry, fields in claimed[1]:
                yield stream, entry, fields
        fresh = await self._client.xreadgroup(
            GROUP, self._name, dict.fromkeys(STREAMS, ">"), count=100, block=self._block
        )
        for stream, delivered in fresh or ():
            for entry, fields in delivered:
                yield stream, entry, fields


async def consume(settings: Settings, name: str) -> None:
    engine = engine_of(settings.database)
    client: Any = Client.from_url(settings.redis, socket_timeout=3.0, socket_connect_timeout=3.0)
    await Consumer(client, async_sessionmaker(engine, expire_on_commit=False), name).run()


if __name__ == "__main__":
    run_until_told(consume)
