"""Any broker that FastStream has a client for: Kafka, RabbitMQ and NATS, without an adapter of ours."""

from __future__ import annotations

import asyncio
import logging
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol

import anyio

from pipeline_mediator.errors import BrokerUnavailableError, ConfigurationError, MissingExtraError
from pipeline_mediator.message_brokers.faststream.subscription import FastStreamSubscription

if find_spec("faststream") is None:
    raise MissingExtraError("FastStreamBroker", "faststream", "faststream")

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType
    from typing import Self

    from pipeline_mediator.errors import MediatorError
    from pipeline_mediator.message_brokers.faststream.subscription import Consuming
    from pipeline_mediator.message_brokers.protocol import BrokerFeatures, Outgoing

__all__ = ["FastStreamBroker"]

_logger = logging.getLogger(__name__)

_AT_A_TIME = 64
"""Messages of one batch whose answers are awaited at the same time."""


class Kind(Protocol):
    """What one kind of broker does."""

    @property
    def features(self) -> BrokerFeatures: ...

    async def publish(self, message: Outgoing) -> None:
        """Send it, and wait for the broker's answer."""
        ...

    def consume(self, destinations: Sequence[str], name: str, *, hold: float, prefetch: int) -> Consuming:
        """What a subscription needs of it."""
        ...

    def explain(self, error: Exception, doing: str) -> MediatorError:
        """An error of the client as one of ours."""
        ...


class FastStreamBroker:
    """Publishes to and consumes from a FastStream broker, at least once.

        broker = FastStreamBroker(NatsBroker("nats://localhost:4222"))
        consumer = Consumer(mediator, broker.subscribe("shop.events", name="warehouse"))

    What a destination is: a subject of JetStream (NATS), a durable fanout exchange (RabbitMQ), a topic (Kafka). What is
    missing on the server is made when it is first used, but for Kafka's topics. Headers are the CloudEvent's attributes
    under their own names, percent-encoded where a transport takes ASCII only; the key is `partitionkey` among them,
    RabbitMQ's routing key, and Kafka's key.

    The FastStream broker stays its owner's: one that is connected is neither connected nor stopped here. One that is
    not is connected by the first `async with` or the first publishing, and stopped by the last to leave, unless it was
    started meanwhile. Its middlewares see what is published and consumed.

    `timeout` is in seconds, for connecting and for a batch; after it every message without an answer is a
    `BrokerUnavailableError`, although the broker may have it. asyncio only.

    Raises `ConfigurationError` for what is no FastStream broker of these three kinds.
    """

    def __init__(self, broker: Any, /, *, timeout: float = 10.0) -> None:
        if timeout <= 0:
            raise ConfigurationError(f"timeout={timeout}: must be above 0")
        self._broker = broker
        self._kind = _kind_of(broker, timeout)
        self._timeout = timeout
        self._users = 0
        self._connecting = asyncio.Lock()
        self._ours = False

    @property
    def features(self) -> BrokerFeatures:
        """What this broker promises; it depends on what is behind FastStream."""
        return self._kind.features

    @property
    def timeout(self) -> float:
        """Seconds for connecting, for a batch, and for leaving."""
        return self._timeout

    def subscribe(
        self, *destinations: str, name: str, hold: float = 30.0, prefetch: int = 100
    ) -> FastStreamSubscription:
        """A subscription of the group `name`: durable, shared by all processes that use this name.

        It reads at most `prefetch` messages ahead (and what FastStream fetches at once). `hold` is for NATS: after so
        many seconds what a dead process had is delivered to another one; a living one keeps it for as long as it takes.

        `Later(delay)`: NATS keeps the message back itself (a later one of its key may overtake it), whatever becomes of
        this process. RabbitMQ and Kafka cannot: this process keeps it, not acknowledged, and its key waits for it; if
        the process ends, it is delivered again at once. With Kafka, where a group's progress is a position, one message
        is out at a time, and a delay stops the subscription: keep delays below `max_poll_interval_ms`.

        `Dead(reason)`: the message is written elsewhere first, with the reason, and acknowledged then (a rejection
        would carry no reason). NATS: subject `dead.<name>.<destination>`, read by `subscription.dead_letters`.
        RabbitMQ: queue `<destination>.<name>.dead`. Kafka: topic `<destination>.<name>.dead`.

        Raises `ConfigurationError` for no destination, no name, and limits that let nothing through.
        """
        if not destinations or not all(destinations):
            raise ConfigurationError(f"subscription {name!r} has no destination: subscribe('orders', name={name!r})")
        if not name or hold <= 0 or prefetch < 1:
            raise ConfigurationError(
                f"subscription name={name!r}, hold={hold}, prefetch={prefetch}: a name is needed, hold must be above "
                "0, prefetch at least 1"
            )
        consuming = self._kind.consume(tuple(dict.fromkeys(destinations)), name, hold=hold, prefetch=prefetch)
        return FastStreamSubscription(self, consuming, name, prefetch=prefetch)

    async def publish(self, batch: Sequence[Outgoing], /) -> Sequence[Exception | None]:
        """Accepted is what the broker answered; see `MessageBroker.publish`."""
        if not batch:
            return []
        answers: list[Exception | None] = [_no_answer(message, self._timeout) for message in batch]
        lanes: dict[object, list[int]] = {}
        for index, message in enumerate(batch):
            lanes.setdefault(index if message.key is None else message.key, []).append(index)
        limit = asyncio.Semaphore(_AT_A_TIME)

        async def publish(lane: list[int]) -> None:
            async with limit:
                for place, index in enumerate(lane):
                    answers[index] = await self._publish(batch[index])
                    if answers[index] is not None:
                        for behind in lane[place + 1 :]:
                            answers[behind] = _behind(batch[behind])
                        return

        with anyio.move_on_after(self._timeout):
            try:
                await self._connect()
            except Exception as error:  # noqa: BLE001  # each message is answered
                return [self._kind.explain(error, f"publish to {message.destination!r}") for message in batch]
            async with asyncio.TaskGroup() as tasks:
                for lane in lanes.values():
                    tasks.create_task(publish(lane))
        return answers

    async def _publish(self, message: Outgoing) -> Exception | None:
        try:
            await self._kind.publish(message)
        except Exception as error:  # noqa: BLE001  # what a client raises is no list that could be written down
            return self._kind.explain(error, f"publish to {message.destination!r}")
        return None

    async def _connect(self) -> None:
        async with self._connecting:
            if not _is_connected(self._broker):
                await self._broker.connect()
                self._ours = True

    async def __aenter__(self) -> Self:
        try:
            with anyio.fail_after(self._timeout):
                await self._connect()
        except Exception as error:  # mapped, with the client's own as its cause
            raise self._kind.explain(error, "connect") from error
        self._users += 1
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        self._users -= 1
        if self._users == 0 and self._ours:
            self._ours = False
            if not self._broker.running:
                with anyio.move_on_after(self._timeout, shield=True):
                    await self._stop()

    async def _stop(self) -> None:
        try:
            await self._broker.stop()
        except Exception as error:  # noqa: BLE001  # it is left anyway, and what it had is not acknowledged
            _logger.warning("the FastStream broker did not stop in order: %s", type(error).__name__)


def _is_connected(broker: Any) -> bool:
    # FastStream has no public word for "connected, but not started".
    return bool(broker.running) or broker._connection is not None


def _kind_of(broker: Any, timeout: float) -> Kind:
    """By the classes' homes, so that only what is installed is imported."""
    homes = {".".join(one.__module__.split(".")[:2]) for one in type(broker).__mro__}
    if "faststream.nats" in homes:
        from pipeline_mediator.message_brokers.faststream.nats import Nats

        return Nats(broker, timeout)
    if "faststream.rabbit" in homes:
        from pipeline_mediator.message_brokers.faststream.rabbit import Rabbit

        return Rabbit(broker, timeout)
    if "faststream.kafka" in homes:
        from pipeline_mediator.message_brokers.faststream.kafka import Kafka

        return Kafka(broker, timeout)
    raise ConfigurationError(
        f"FastStreamBroker takes FastStream's NatsBroker, RabbitBroker or KafkaBroker, not {type(broker).__name__}. "
        "For Redis there is RedisStreamBroker."
    )


def _behind(message: Outgoing) -> BrokerUnavailableError:
    return BrokerUnavailableError(
        f"not sent to {message.destination!r}: an earlier message of its key was refused, and nothing may overtake it"
    )


def _no_answer(message: Outgoing, timeout: float) -> BrokerUnavailableError:
    return BrokerUnavailableError(f"no answer from the broker of {message.destination!r} within {timeout:g} s")
