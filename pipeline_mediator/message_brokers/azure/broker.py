"""Azure Service Bus: queues and topics, over AMQP 1.0, with the Azure SDK."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

from pipeline_mediator.errors import BrokerRefusedError, ConfigurationError, MissingExtraError
from pipeline_mediator.message_brokers.protocol import BrokerFeatures

try:
    from azure.servicebus import ServiceBusMessage
    from azure.servicebus.aio import ServiceBusClient
except ModuleNotFoundError as error:
    if error.name not in {"azure", "azure.servicebus", "azure.servicebus.aio"}:
        raise
    raise MissingExtraError("AzureMessageBroker", "azure-servicebus", "azure") from error

from pipeline_mediator.message_brokers.azure.errors import explain, lacks_entity
from pipeline_mediator.message_brokers.azure.messages import SYSTEM
from pipeline_mediator.message_brokers.azure.receiver import Access
from pipeline_mediator.message_brokers.azure.sender import (
    CLOSE_SECONDS,
    EntitySender,
    Entry,
    Limits,
    Publishing,
    close,
    closed_error,
    within,
)
from pipeline_mediator.message_brokers.azure.subscription import AzureSubscription

if TYPE_CHECKING:
    from collections.abc import Collection, Coroutine, Sequence
    from types import TracebackType
    from typing import Self

    from azure.servicebus.amqp import AmqpAnnotatedMessage

    from pipeline_mediator.errors import BrokerError
    from pipeline_mediator.message_brokers.protocol import Outgoing

__all__ = ["AzureMessageBroker"]

_PREFIX: Final = "cloudEvents_"
"""Of the two that CloudEvents' AMQP binding allows the one that it prefers, and that a subscription's filter may write
without quotes: `cloudEvents_type = 'orders.placed'`. The other is `cloudEvents:`; receivers understand both."""
_NOBODY: Final = "pipeline-mediator.nobody"
_STANDARD_SIZE: Final = 256 * 1024


class AzureMessageBroker:
    """Publishes to queues and topics of Azure Service Bus, at least once, in order per key, and receives from them.

        broker = AzureMessageBroker(os.environ["SERVICE_BUS"], entities=("orders",))
        warehouse = broker.subscribe("orders", "warehouse", sessions=True)
        async with broker:
            ...

    A destination is the name of a queue or a topic; a namespace has one set of names for both. What is published to
    one entity at the same time shares transfers, as many messages as fit. A message has its wire name as subject, its
    key as session id, and the attributes of its CloudEvent as application properties (`cloudEvents_type` and so on, by
    CloudEvents' AMQP binding). Partitioned entities take the session id as partition key.

    A transfer whose answer is lost is sent again, with the same message ids: let the entity detect duplicates, or the
    consumer keep an inbox. If one is refused for one of its messages, the others are sent without it. Of one call, no
    message follows a refused one of its key.

    With a connection string the client is the broker's own; it tries twice, and is closed at the end of the last
    `async with`. A client that is handed over keeps its settings and is never closed; mind that by default the SDK's
    tries four times, seconds apart. Each entity in use has a connection of its own. It is closed when it was idle for
    `idle_timeout`: the service does so after ten minutes, and then the next message takes seconds. At most
    `max_senders` idle ones are kept.

    `timeout` is for opening a link and for a call of `publish`, in seconds like all times; after it every message
    without an answer is a `BrokerUnavailableError`, although the service may have it. Leaving waits for what is on its
    way. A message that no batch holds (256 KiB in the Standard tier, 1 MiB in Premium) is a `MessageTooLargeError`,
    unless `max_message_size`, in bytes, allows it, for Premium's large messages. asyncio only. Needs azure-servicebus
    7.15.

    Entering opens the links to `entities`, and to the one that a connection string may name, and raises
    `BrokerUnavailableError` or `BrokerRefusedError` (no such entity, wrong credentials). Without any it finds out
    whether the namespace can be reached and takes the connection string's credentials; a client that is handed over is
    not tried. Raises `ConfigurationError` for what is no connection string and no
    `azure.servicebus.aio.ServiceBusClient`.
    """

    def __init__(
        self,
        client_or_connection_string: ServiceBusClient | str,
        *,
        entities: Collection[str] = (),
        timeout: float = 30.0,
        idle_timeout: float = 300.0,
        max_senders: int = 64,
        max_message_size: int | None = None,
    ) -> None:
        if timeout <= 0 or idle_timeout <= 0 or max_senders < 1:
            raise ConfigurationError(
                f"timeout={timeout}, idle_timeout={idle_timeout}, max_senders={max_senders}: all must be above 0"
            )
        # A second try is for links that were dropped; more is the business of those who know what waits.
        self._client = _client(client_or_connection_string, retry_total=1)
        self._own = self._client is not client_or_connection_string
        self._entities = tuple(dict.fromkeys((*entities, *_entity_path(client_or_connection_string))))
        self._prober = None
        if self._own and not self._entities:
            self._prober = _client(client_or_connection_string, retry_total=0)
        self._limits = Limits(timeout, idle_timeout, max_message_size)
        self._max_senders = max_senders
        self._namespace = f"Service Bus {self._client.fully_qualified_namespace}"
        self._senders: dict[str, EntitySender] = {}
        """The latest used is last."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._users = 0
        self._closed = False
        self._features = BrokerFeatures(
            system=SYSTEM,
            durable=True,
            headers=True,
            ordered_by_key=True,
            max_message_size=max_message_size or _STANDARD_SIZE,
        )

    @property
    def features(self) -> BrokerFeatures:
        """What this broker promises; the message size is the Standard tier's, if none was given."""
        return self._features

    async def publish(self, batch: Sequence[Outgoing], /) -> Sequence[Exception | None]:
        """Accepted is what the service answered; see `MessageBroker.publish`."""
        return await self._send([(message, None) for message in batch])

    def subscribe(
        self,
        entity: str,
        subscription: str | None = None,
        *,
        name: str | None = None,
        sessions: bool = False,
        max_sessions: int = 8,
        session_idle: float = 1.0,
        prefetch: int = 0,
    ) -> AzureSubscription:
        """Receive from a queue, or from the subscription of a topic; see `AzureSubscription`.

        Without a `name` its consumer group is called `entity`, or `entity/subscription`. Raises `ConfigurationError`.
        """
        if max_sessions < 1 or session_idle <= 0 or prefetch < 0:
            raise ConfigurationError(
                f"max_sessions={max_sessions}, session_idle={session_idle}, prefetch={prefetch}: the first two must be "
                "above 0, the last not below"
            )
        path = entity if subscription is None else f"{entity}/{subscription}"
        access = Access(
            client=self._client,
            entity=entity,
            subscription=subscription,
            place=self._place(path),
            timeout=self._limits.timeout,
            send=self._send,
            join=self._join,
            leave=self._leave,
        )
        return AzureSubscription(
            access,
            name or path,
            max_sessions=max_sessions if sessions else 0,
            session_idle=session_idle,
            prefetch=prefetch,
        )

    async def _send(
        self, contents: Sequence[tuple[Outgoing, AmqpAnnotatedMessage | None]]
    ) -> Sequence[Exception | None]:
        """Send messages, or what was made of them already."""
        batch = [message for message, _ in contents]
        if self._closed:
            return [closed_error(self._namespace) for _ in batch]
        publishing = Publishing(len(batch), self._limits.timeout)
        try:
            for index, (message, content) in enumerate(contents):
                self._put(publishing, index, message, content)
            if batch:
                async with asyncio.timeout_at(publishing.deadline):
                    await publishing.done
        except TimeoutError as error:
            for index, message in enumerate(batch):
                late = explain(error, self._place(message.destination), self._limits.timeout)
                publishing.answers.setdefault(index, late)
        finally:
            publishing.done.cancel()  # nobody waits any longer
        return [publishing.answers[index] for index in range(len(batch))]

    def _put(self, publishing: Publishing, index: int, message: Outgoing, content: AmqpAnnotatedMessage | None) -> None:
        try:
            entry = Entry(publishing, index, message, content or _content(message))
            self._sender(message.destination).put(entry)
        except ValueError as error:
            # The client's: an id or a key that is too long, or an entity that this client is not for.
            problem = f"message {message.message_id} cannot go to {message.destination!r}: {error}"
            publishing.refuse(index, message, BrokerRefusedError(problem))

    def _sender(self, entity: str) -> EntitySender:
        sender = self._senders.pop(entity, None)
        if sender is None:
            self._make_room()
            sender = EntitySender(self._client, entity, self._place(entity), self._limits, self._start)
        self._senders[entity] = sender
        return sender

    def _make_room(self) -> None:
        for entity, sender in list(self._senders.items()):
            if len(self._senders) < self._max_senders:
                return
            if sender.idle:
                sender.end()
                del self._senders[entity]

    def _start(self, running: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(running)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def __aenter__(self) -> Self:
        try:
            await self._open()
        except BaseException:
            if self._users == 0:
                await self._end()
            raise
        self._join()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        await self._leave()

    def _join(self) -> None:
        self._users += 1
        self._closed = False

    async def _leave(self) -> None:
        self._users -= 1
        if self._users == 0:
            self._closed = True
            await self._end()

    async def _open(self) -> None:
        if self._prober is not None:
            await self._reach(self._prober)
        try:
            senders = [self._sender(entity) for entity in self._entities]
        except ValueError as error:
            raise ConfigurationError(f"entities={self._entities}: {error}") from error
        errors = [error for error in await asyncio.gather(*[sender.open() for sender in senders]) if error]
        if errors:
            for other in errors[1:]:
                errors[0].add_note(f"and: {other}")
            raise errors[0]

    async def _reach(self, client: ServiceBusClient) -> None:
        """Ask for an entity that is not there: a namespace that says so can be reached and knows us."""
        refusal: BrokerError | None = None
        link = client.get_queue_sender(_NOBODY)
        try:
            await within(self._limits.timeout, link.__aenter__())
        except Exception as error:  # noqa: BLE001 - whatever it is, it is explained
            if not lacks_entity(error):
                refusal = explain(error, self._namespace, self._limits.timeout)
        finally:
            await close(link)
        if isinstance(refusal, BrokerRefusedError):
            hint = "If they are for one entity only, name it: AzureMessageBroker(..., entities=('orders',))."
            raise BrokerRefusedError(f"{refusal} {hint}") from refusal.__cause__
        if refusal is not None:
            raise refusal

    async def _end(self) -> None:
        """Close all links, when what waits was sent."""
        for sender in self._senders.values():
            sender.end()
        self._senders.clear()
        loop = asyncio.get_running_loop()
        latest = loop.time() + self._limits.timeout + CLOSE_SECONDS
        try:
            while self._tasks and loop.time() < latest:  # what fails meanwhile is closed by further tasks
                await asyncio.wait(self._tasks, timeout=latest - loop.time())
        finally:
            for task in self._tasks:
                task.cancel()
        if self._own:
            await self._client.close()

    def _place(self, entity: str) -> str:
        return f"{entity!r} at {self._namespace}"


def _content(message: Outgoing) -> ServiceBusMessage:
    return ServiceBusMessage(
        message.body,
        message_id=message.message_id,
        subject=message.name,
        correlation_id=message.headers.get("correlationid"),
        session_id=message.key,
        content_type=message.content_type,
        scheduled_enqueue_time_utc=message.not_before,
        application_properties={_PREFIX + name: value for name, value in message.headers.items()} or None,
    )


def _client(client_or_connection_string: object, *, retry_total: int) -> ServiceBusClient:
    if isinstance(client_or_connection_string, ServiceBusClient):
        return client_or_connection_string
    if not isinstance(client_or_connection_string, str):
        kind = type(client_or_connection_string)
        raise ConfigurationError(
            "AzureMessageBroker takes a connection string or an azure.servicebus.aio.ServiceBusClient, not "
            f"{kind.__module__}.{kind.__qualname__}"
        )
    try:
        return ServiceBusClient.from_connection_string(
            client_or_connection_string, retry_total=retry_total, retry_backoff_factor=0.1
        )
    except ValueError:
        # Not `from error`: its text may quote a part of the string.
        raise ConfigurationError(
            "this is no Service Bus connection string. It looks like Endpoint=sb://<namespace>.servicebus.windows.net/;"
            "SharedAccessKeyName=<policy>;SharedAccessKey=<key>"
        ) from None


def _entity_path(client_or_connection_string: object) -> Sequence[str]:
    """The one entity that a connection string may be for."""
    if not isinstance(client_or_connection_string, str):
        return ()
    parts = [part.partition("=") for part in client_or_connection_string.split(";")]
    return [value for name, _, value in parts if name.strip().lower() == "entitypath" and value]
