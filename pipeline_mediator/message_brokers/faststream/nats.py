"""FastStream over NATS JetStream: durable pull consumers, acknowledged message by message."""

from __future__ import annotations

import asyncio
import logging
import re
import zlib
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from faststream import AckPolicy
from faststream.nats import JStream, PullSub
from nats.errors import AuthorizationError, ConnectionClosedError, MaxPayloadError, NoRespondersError, NoServersError
from nats.js.api import ConsumerConfig, RetentionPolicy, StreamConfig
from nats.js.errors import APIError, BadRequestError, NoStreamResponseError, NotFoundError

from pipeline_mediator.errors import (
    BrokerError,
    BrokerRefusedError,
    BrokerUnavailableError,
    ConfigurationError,
    DestinationError,
    MessageTooLargeError,
)
from pipeline_mediator.message_brokers.faststream.handler import as_it_is, handler_of
from pipeline_mediator.message_brokers.faststream.held import Held
from pipeline_mediator.message_brokers.faststream.wire import attributes_of, decode_headers, encode_headers
from pipeline_mediator.message_brokers.protocol import BrokerFeatures, DeadDelivery, Delivery

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from pipeline_mediator.errors import MediatorError
    from pipeline_mediator.message_brokers.protocol import Outgoing

__all__ = ["Nats"]

_logger = logging.getLogger(__name__)

_FEATURES: Final = BrokerFeatures(system="nats", durable=True, headers=True, ordered_by_key=True)
_SUBJECT: Final = re.compile(r"[^\s.*>]+(\.[^\s.*>]+)*")
_FETCH: Final = 64
_BAD_REQUEST, _INTERNAL = 400, 500
_TRANSPORT: Final = ("nats-", "content-type", "correlation_id")
"""Headers of NATS and FastStream themselves, which are not the message's."""
_REASON, _DIED, _ATTEMPT = "deadreason", "deadtime", "deadattempt"


class Nats:
    """Publishes to JetStream: accepted is what a stream has stored."""

    features = _FEATURES

    def __init__(self, broker: Any, timeout: float) -> None:
        self.broker = broker
        self.timeout = timeout
        self._streams: dict[str, str] = {}

    @property
    def client(self) -> Any:
        """nats-py's connection."""
        return self.broker.connection

    async def publish(self, message: Outgoing) -> None:
        """Store it in the stream of its subject."""
        try:
            await self.send(message.destination, message.body, attributes_of(message), message.content_type)
        except MaxPayloadError:
            raise MessageTooLargeError(message.name, len(message.body), self.client.max_payload) from None

    async def send(
        self,
        subject: str,
        body: bytes,
        headers: Mapping[str, str],
        content_type: str | None,
        stream: StreamConfig | None = None,
    ) -> None:
        """Store a message in the stream of this subject, and wait until it is."""
        encoded = encode_headers(headers)
        if content_type:
            encoded |= encode_headers({"content-type": content_type})
        await self.broker.publish(
            body,
            subject,
            headers=encoded,
            correlation_id=encoded.get("correlationid") or encoded.get("id"),
            stream=await self.stream_of(subject, stream),
            timeout=self.timeout,
        )

    async def stream_of(self, subject: str, config: StreamConfig | None = None) -> str:
        """The stream that has a subject; made, with this configuration, if none has."""
        if subject in self._streams:
            return self._streams[subject]
        if not _SUBJECT.fullmatch(subject):
            raise DestinationError(
                f"{subject!r} is no subject that NATS could store: words between dots, without spaces, * and >"
            )
        manager = self.client.jetstream()
        try:
            name = await manager.find_stream_name_by_subject(subject)
        except NotFoundError:
            try:
                await manager.add_stream(config or StreamConfig(name=_token(subject), subjects=[subject]))
            except BadRequestError as error:
                _logger.debug("stream for %s: %s", subject, error.description)
            # Asked again: somebody else may have made it at the same moment, or another stream has its name.
            name = await manager.find_stream_name_by_subject(subject)
        self._streams[subject] = str(name)
        return self._streams[subject]

    def consume(self, destinations: Sequence[str], name: str, *, hold: float, prefetch: int) -> NatsConsuming:
        """What a subscription needs of it."""
        return NatsConsuming(self, destinations, name, hold)

    def explain(self, error: Exception, doing: str) -> MediatorError:
        """An error of nats-py as one of ours."""
        if isinstance(error, BrokerError | ConfigurationError | MessageTooLargeError):
            return error
        if isinstance(error, AuthorizationError):
            ours: MediatorError = BrokerRefusedError(f"NATS does not let this client {doing}: check its credentials")
        elif isinstance(error, NoStreamResponseError | NoRespondersError):
            ours = BrokerUnavailableError(
                f"could not {doing}: no JetStream stream answers. Is JetStream enabled (nats-server -js), and was the "
                "stream deleted?"
            )
            self._streams.clear()
        elif isinstance(error, APIError):
            # It may be full, or deleted: nothing that could not be mended, so no reason to give up a message.
            self._streams.clear()
            ours = BrokerUnavailableError(f"JetStream does not {doing}: {error.description}")
        elif isinstance(error, ConnectionClosedError):
            ours = BrokerUnavailableError(
                f"could not {doing}: the client gave up its connection. Give NatsBroker max_reconnect_attempts=-1."
            )
        elif isinstance(error, NoServersError | OSError | TimeoutError):
            ours = BrokerUnavailableError(f"could not {doing}: NATS does not answer")
        else:
            ours = BrokerUnavailableError(f"could not {doing}: {type(error).__name__}")
        ours.__cause__ = error
        return ours


class NatsConsuming:
    """Two durable pull consumers for each destination: of its subject, and of what was retried for this group."""

    waits = False

    def __init__(self, nats: Nats, destinations: Sequence[str], name: str, hold: float) -> None:
        self._nats = nats
        self._destinations = destinations
        self._name = name
        self._group = _token(name)
        self._subscribers: list[Any] = []
        self.hold: float | None = hold
        self.dead_letters = NatsDeadLetters(nats, destinations, name)

    @property
    def connected(self) -> bool:
        """Whether the client has a connection at this moment."""
        return bool(self._nats.client.is_connected)

    async def open(self, take: Callable[[Any, str], Awaitable[None]]) -> None:
        """Consumers that are there are used as they are; the hold is theirs."""
        for destination in self._destinations:
            for subject, stream in (
                (destination, None),
                (f"retry.{self._group}.{destination}", _group_stream("retry", self._group)),
            ):
                await self._subscribe(subject, await self._nats.stream_of(subject, stream), destination, take)

    async def _subscribe(
        self, subject: str, stream: str, destination: str, take: Callable[[Any, str], Awaitable[None]]
    ) -> None:
        durable = f"{self._group}-{_token(destination)}"
        subscriber = self._nats.broker.subscriber(
            subject,
            stream=JStream(stream, declare=False),
            durable=durable,
            config=ConsumerConfig(ack_wait=self.hold),
            pull_sub=PullSub(batch_size=_FETCH, timeout=1.0),
            ack_policy=AckPolicy.MANUAL,
            no_reply=True,
            persistent=False,
            include_in_schema=False,
        )
        subscriber(handler_of(take, destination), decoder=as_it_is)
        self._subscribers.append(subscriber)
        await subscriber.start()
        _wait_behind_the_end(subscriber.subscription)
        found = (await self._nats.client.jetstream().consumer_info(stream, durable)).config
        if found.filter_subject not in (None, subject):
            raise DestinationError(
                f"stream {stream!r} has a consumer {durable!r} for {found.filter_subject!r} already: give the "
                f"subscription another name than {self._name!r}"
            )
        self.hold = min(self.hold or found.ack_wait, found.ack_wait)

    async def close(self) -> None:
        """Stop FastStream's subscribers."""
        while self._subscribers:
            await self._subscribers.pop().stop()

    def read(self, raw: Any, destination: str, now: float) -> Held:
        """A JetStream message as a delivery."""
        metadata = raw.raw_message.metadata
        headers = _own(decode_headers(raw.raw_message.headers or {}))
        delivery = Delivery(
            destination=destination,
            body=raw.raw_message.data,
            content_type=headers.get("datacontenttype") or raw.content_type or None,
            headers=headers,
            message_id=headers.get("id"),
            key=headers.get("partitionkey"),
            attempt=metadata.num_delivered,
            subscription=self._name,
            system=_FEATURES.system,
        )
        identity = (metadata.stream, metadata.sequence.stream)
        return Held(raw, identity, metadata.sequence.stream, delivery, now)

    async def keep(self, held: Held) -> None:
        """Begin its time anew."""
        await held.raw.raw_message.in_progress()

    async def ack(self, held: Held) -> None:
        """Acknowledge it, and wait until the server has that."""
        await self._answer(held, b"+ACK")

    async def back(self, held: Held, delay: float) -> bool:
        """The server keeps it back, and counts it as an attempt."""
        nanoseconds = int(delay * 1e9)
        await self._answer(held, b'-NAK {"delay": %d}' % nanoseconds if nanoseconds > 0 else b"-NAK")
        return True

    async def release(self, held: Held) -> None:
        """Have it delivered again, to whoever asks first."""
        await self.back(held, 0.0)

    async def bury(self, held: Held, reason: str) -> None:
        """Store it as a dead letter."""
        delivery = held.delivery
        dead = {_REASON: reason, _DIED: datetime.now(UTC).isoformat(), _ATTEMPT: str(delivery.attempt)}
        await self._nats.send(
            f"dead.{self._group}.{delivery.destination}",
            delivery.body,
            {**delivery.headers, **dead},
            delivery.content_type,
            _group_stream("dead", self._group),
        )

    async def _answer(self, held: Held, answer: bytes) -> None:
        # nats-py waits for the server with acknowledgements only; a lost -NAK would be found out by the hold's end.
        await self._nats.client.request(held.raw.raw_message.reply, answer, timeout=self._nats.timeout)

    def explain(self, error: Exception, doing: str) -> MediatorError:
        """An error of nats-py as one of ours."""
        if isinstance(error, APIError) and (error.code or _INTERNAL) < _INTERNAL:
            ours = BrokerRefusedError(f"JetStream refuses to {doing}: {error.description}")
            ours.__cause__ = error
            return ours
        return self._nats.explain(error, doing)


class NatsDeadLetters:
    """The dead letters of one group, in a stream of its own; ids are their places there."""

    def __init__(self, nats: Nats, destinations: Sequence[str], name: str) -> None:
        self._nats = nats
        self._name = name
        self._group = _token(name)
        self._prefix = f"dead.{self._group}."
        self._subjects = {f"{self._prefix}{destination}" for destination in destinations}
        self._stream = str(_group_stream("dead", self._group).name)

    async def count(self) -> int:
        """How many there are."""
        try:
            info = await self._manager.stream_info(self._stream, subjects_filter=f"{self._prefix}>")
        except NotFoundError:
            return 0
        except Exception as error:
            raise self._nats.explain(error, "count dead letters") from error
        numbers: dict[str, int] = info.state.subjects or {}
        return sum(number for subject, number in numbers.items() if subject in self._subjects)

    async def list(self, limit: int, /, *, after: str | None = None) -> Sequence[DeadDelivery]:
        """At most `limit` of them, oldest first, beginning behind the id `after`."""
        found: list[DeadDelivery] = []
        place = _place(after) if after else 0
        while len(found) < limit:
            raw = await self._next(place + 1)
            if raw is None:
                break
            place = int(raw.seq)
            if raw.subject in self._subjects:
                found.append(self._read(raw))
        return found

    async def retry(self, ids: Sequence[str], /) -> int:
        """Deliver them again to this group only; how many there were."""
        retried = 0
        for letter_id in ids:
            raw = await self._get(letter_id)
            if raw is None:
                continue
            delivery = self._read(raw).delivery
            try:
                await self._nats.send(
                    f"retry.{self._group}.{delivery.destination}",
                    delivery.body,
                    delivery.headers,
                    delivery.content_type,
                    _group_stream("retry", self._group),
                )
            except Exception as error:
                raise self._nats.explain(error, f"retry dead letter {letter_id}") from error
            await self._delete(letter_id)
            retried += 1
        return retried

    async def drop(self, ids: Sequence[str], /) -> int:
        """Delete them for good; how many there were."""
        dropped = 0
        for letter_id in ids:
            if await self._get(letter_id) is not None:
                dropped += await self._delete(letter_id)
        return dropped

    @property
    def _manager(self) -> Any:
        return self._nats.client.jetstream()

    async def _next(self, place: int) -> Any:
        try:
            return await self._manager.get_msg(self._stream, seq=place, subject=f"{self._prefix}>", next=True)
        except NotFoundError:
            return None
        except Exception as error:
            raise self._nats.explain(error, "list dead letters") from error

    async def _get(self, letter_id: str) -> Any:
        place = _place(letter_id)
        raw = await self._next(place) if place else None
        return raw if raw is not None and raw.seq == place and raw.subject in self._subjects else None

    async def _delete(self, letter_id: str) -> bool:
        try:
            return bool(await self._manager.delete_msg(self._stream, _place(letter_id)))
        except APIError as error:
            if isinstance(error, NotFoundError) or error.code == _BAD_REQUEST:
                return False  # another operator was faster
            raise self._nats.explain(error, f"delete dead letter {letter_id}") from error
        except Exception as error:
            raise self._nats.explain(error, f"delete dead letter {letter_id}") from error

    def _read(self, raw: Any) -> DeadDelivery:
        headers = _own(decode_headers(raw.headers or {}))
        reason, died, attempt = (headers.pop(name, "") for name in (_REASON, _DIED, _ATTEMPT))
        delivery = Delivery(
            destination=raw.subject.removeprefix(self._prefix),
            body=raw.data or b"",
            content_type=headers.get("datacontenttype") or None,
            headers=headers,
            message_id=headers.get("id"),
            key=headers.get("partitionkey"),
            attempt=int(attempt) if attempt.isdecimal() else 1,
            subscription=self._name,
            system=_FEATURES.system,
        )
        return DeadDelivery(str(raw.seq), delivery, reason, _time(died))


def _wait_behind_the_end(subscription: Any) -> None:
    """FastStream asks for messages again at once when the client has given up its connection: the loop would hang."""
    fetch = subscription.fetch

    async def waiting(*args: Any, **options: Any) -> Any:
        try:
            return await fetch(*args, **options)
        except ConnectionClosedError:
            await asyncio.sleep(1.0)
            raise

    subscription.fetch = waiting


def _group_stream(use: str, group: str) -> StreamConfig:
    retention = RetentionPolicy.WORK_QUEUE if use == "retry" else RetentionPolicy.LIMITS
    return StreamConfig(name=f"{use}-{group}", subjects=[f"{use}.{group}.>"], retention=retention)


def _token(name: str) -> str:
    """A name that NATS takes for streams, consumers and words of subjects; another one for each name."""
    token = re.sub(r"[^A-Za-z0-9_-]", "_", name)
    return token if token == name else f"{token}-{zlib.crc32(name.encode()):08x}"


def _own(headers: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in headers.items() if not name.lower().startswith(_TRANSPORT)}


def _place(letter_id: str) -> int:
    return int(letter_id) if letter_id.isdecimal() else 0


def _time(text: str) -> datetime | None:
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        return None
