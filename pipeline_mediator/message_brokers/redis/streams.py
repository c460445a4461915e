"""Redis Streams: messages are kept in order until the groups of their consumers have handled them."""

from __future__ import annotations

import asyncio
import logging
from itertools import chain
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from pipeline_mediator.errors import BrokerUnavailableError, ConfigurationError
from pipeline_mediator.message_brokers.protocol import BrokerFeatures
from pipeline_mediator.message_brokers.redis.client import MAX_MESSAGE_SIZE, RedisClient
from pipeline_mediator.message_brokers.redis.entries import SYSTEM
from pipeline_mediator.message_brokers.redis.scripts import TRIM
from pipeline_mediator.message_brokers.redis.subscription import RedisStreamSubscription

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence
    from types import TracebackType
    from typing import Literal, Self

    from redis.asyncio import Redis

    from pipeline_mediator.message_brokers.protocol import Outgoing

__all__ = ["RedisStreamBroker"]

_TRIMMING: Final = " +eval +xinfo +xlen +xpending +xrange +xtrim"

logger = logging.getLogger(__name__)

_Command: TypeAlias = "Sequence[str | bytes | int]"

_FEATURES: Final = BrokerFeatures(
    system=SYSTEM, durable=True, headers=True, ordered_by_key=True, max_message_size=MAX_MESSAGE_SIZE
)


class RedisStreamBroker:
    """Publishes to Redis Streams and consumes them, at least once, in order per key.

        broker = RedisStreamBroker("redis://localhost:6379/0")
        async with broker:
            ...

    A destination is the name of a stream (`stream_prefix` goes before it), which is made when it is first written to.
    An entry is the CloudEvent: a field for each of its attributes, under its own name, and the payload in `data`.
    `subscribe` makes a consumer of a group; `RedisStreamSubscription` says what that promises.

    Of one call, what goes to one stream is one transaction of the server (MULTI, XADD for each message, EXEC): all of
    it is there or nothing. So no message follows a refused one of its key, whatever the server refuses: memory full, a
    replica after a failover, missing rights, a name that something else has. If a key goes to two streams, the second
    waits for the first one's answer.

    `max_length` bounds the streams that it writes to: every now and then the oldest entries beyond it are deleted, as
    far as all groups of a stream have read and settled them. So a stream is longer while a group lags, or has none.
    Without it nothing is ever trimmed. What is accepted survives what the server's persistence survives; set
    `appendonly yes`, and mind that replicas lag behind.

    With a URL the client is the broker's own and never retries; it is closed at the end of the last `async with`. A
    client that is handed over is used as it is and never closed; mind that one which retries, as `Redis(...)` does by
    default, may add a batch twice when a connection drops. At most `max_connections` calls at a time talk to the
    server.

    `timeout` is in seconds, for connecting and for a call; after it every message without an answer is a
    `BrokerUnavailableError`, although the server may have it. asyncio only. redis-py >= 5.1, Redis >= 6.2.

    Entering raises `BrokerUnavailableError` if the server cannot be reached, `BrokerRefusedError` if it does not take
    the credentials, or lets this user have no transaction. Raises `ConfigurationError` for what is no Redis URL and no
    `redis.asyncio.Redis`.
    """

    def __init__(
        self,
        client_or_url: Redis | str,
        *,
        stream_prefix: str | None = None,
        max_length: int | None = None,
        timeout: float = 10.0,
        max_connections: int = 16,
    ) -> None:
        if max_length is not None and max_length < 1:
            raise ConfigurationError(f"max_length={max_length}: must be above 0, or None for no bound")
        self._client = RedisClient(
            client_or_url,
            "RedisStreamBroker",
            "+xadd +multi +exec ~<stream>" + ("" if max_length is None else _TRIMMING),
            timeout=timeout,
            max_connections=max_connections,
        )
        self._prefix = stream_prefix or ""
        self._max_length = max_length
        self._added: dict[str, int] = {}

    @property
    def features(self) -> BrokerFeatures:
        """What this broker promises."""
        return _FEATURES

    async def publish(self, batch: Sequence[Outgoing], /) -> Sequence[Exception | None]:
        """Accepted is what the server answered; see `MessageBroker.publish`."""
        until = asyncio.get_running_loop().time() + self._client.timeout
        answers: list[Exception | None] = []
        refused: set[str] = set()
        for part in _parts(batch):
            further = await self._publish(part, refused, until)
            outcomes = zip(part, further, strict=True)
            refused.update(
                message.key for message, answer in outcomes if answer is not None and message.key is not None
            )
            answers += further
        return answers

    async def _publish(
        self, part: Sequence[Outgoing], refused: Collection[str], until: float
    ) -> list[Exception | None]:
        answers: list[Exception | None] = [_behind(message) if message.key in refused else None for message in part]
        streams: dict[str, list[int]] = {}
        for index, message in enumerate(part):
            if answers[index] is None:
                streams.setdefault(message.destination, []).append(index)
        blocks = [_block([_entry(self._prefix, part[index]) for index in indices]) for indices in streams.values()]
        trims = self._trims(streams)
        sent = [command for block in blocks for command in block]
        replies = iter(await self._client.execute([*sent, *trims], until))
        for (destination, indices), block in zip(streams.items(), blocks, strict=True):
            for index, outcome in zip(indices, _outcomes([next(replies) for _ in block]), strict=True):
                if isinstance(outcome, Exception):
                    answers[index] = self._client.explain(outcome, self._prefix + destination)
        for command, reply in zip(trims, replies, strict=True):
            if isinstance(reply, Exception):
                logger.warning("stream %r was not trimmed: %s", command[3], self._client.explain(reply))
        return answers

    def _trims(self, streams: dict[str, list[int]]) -> list[_Command]:
        """For those to which so much was added since that it is worth it; each deletes more than that."""
        if self._max_length is None:
            return []
        due: list[_Command] = []
        for destination, indices in streams.items():
            added = self._added.pop(destination, 0) + len(indices)
            if added >= min(500, max(1, self._max_length // 10)):
                due.append(("EVAL", TRIM, 1, self._prefix + destination, self._max_length))
            elif len(self._added) < _MOST_COUNTED:
                self._added[destination] = added
        return due

    def subscribe(
        self,
        *streams: str,
        name: str,
        consumer: str | None = None,
        min_idle: float = 60.0,
        ordered: bool = False,
        start: Literal["0", "$"] = "0",
    ) -> RedisStreamSubscription:
        """One consumer of the group `name`, for the entries of these streams.

        `min_idle` is in seconds: how long after its death others take over what a consumer had. `ordered=True` keeps a
        key's order over redelivery, with one consumer at a time for each stream. A group that is new begins with the
        oldest entry, with `start="$"` with the next one. `consumer` is its name in the group, made up unless told; one
        that stays from run to run gets at once what the run before had left, and no two processes may share it.

        Raises `ConfigurationError` for a subscription without stream or name.
        """
        return RedisStreamSubscription(
            self._client,
            streams,
            prefix=self._prefix,
            name=name,
            consumer=consumer,
            min_idle=min_idle,
            ordered=ordered,
            start=start,
        )

    async def __aenter__(self) -> Self:
        await self._client.enter(("MULTI",), ("EXEC",))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        await self._client.leave()


_MOST_COUNTED: Final = 1000
"""Destinations; beyond that some are trimmed less often."""


def _parts(batch: Sequence[Outgoing]) -> Iterator[Sequence[Outgoing]]:
    """In order, as many messages at a time as leave each key in one stream. Nearly always one part."""
    begin = 0
    places: dict[str, str] = {}
    for index, message in enumerate(batch):
        key = message.key
        if key is not None and places.setdefault(key, message.destination) != message.destination:
            yield batch[begin:index]
            begin = index
            places = {key: message.destination}
    if begin < len(batch):
        yield batch[begin:]


def _block(entries: list[_Command]) -> list[_Command]:
    """The commands for the entries of one stream: together all of them, or none."""
    return entries if len(entries) == 1 else [("MULTI",), *entries, ("EXEC",)]


def _outcomes(replies: list[Any]) -> Sequence[Any]:
    """One for each entry, from the replies to its block."""
    if len(replies) == 1:
        return replies
    error = next((reply for reply in replies if isinstance(reply, Exception)), None)
    return replies[-1] if error is None else [error] * (len(replies) - 2)


def _entry(prefix: str, message: Outgoing) -> _Command:
    fields: dict[str, str | bytes] = {"id": message.message_id}
    if message.key is not None:
        fields["partitionkey"] = message.key
    fields.update(message.headers)
    fields["datacontenttype"] = message.content_type
    fields["data"] = message.body
    return ("XADD", prefix + message.destination, "*", *chain.from_iterable(fields.items()))


def _behind(message: Outgoing) -> BrokerUnavailableError:
    return BrokerUnavailableError(
        f"not sent to {message.destination!r}: an earlier message of its key was refused, and nothing may overtake it"
    )
