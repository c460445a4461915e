"""The mediator: finds the chain of a message and walks it, as a message of its own or joined to the one at work."""

from __future__ import annotations

import logging
from contextlib import AsyncExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self, TypeVar

from pipeline_mediator.chain import flatten
from pipeline_mediator.concurrency import current_task
from pipeline_mediator.container import PlainContainer
from pipeline_mediator.context import AMBIENT, HOPS, MAX_HOPS, Context, Given, hops_of, new_message_id
from pipeline_mediator.errors import (
    BrokerError,
    BrokerUnavailableError,
    ConfigurationError,
    EmitError,
    MessageLoopError,
    ResolutionError,
    TransactionFinishedError,
    name_of,
)
from pipeline_mediator.events import Event, EventEmitter, EventMap
from pipeline_mediator.messages import key_of
from pipeline_mediator.middlewares.handle import HandleMiddleware
from pipeline_mediator.pipeline import Pipeline
from pipeline_mediator.requests import Request, RequestMap, StreamQuery
from pipeline_mediator.routes import Routes
from pipeline_mediator.stream import Stream
from pipeline_mediator.unit import ENDED, PutOff, Unit, seed_types

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
    from types import TracebackType

    from pipeline_mediator.codec import Codec, Encoded, Facts
    from pipeline_mediator.container import Container
    from pipeline_mediator.deliveries import Arrivals
    from pipeline_mediator.inbox.protocol import InboxStore
    from pipeline_mediator.message_brokers.protocol import Delivery
    from pipeline_mediator.outbox.protocol import OutboxStore, Published, Relayed
    from pipeline_mediator.pipeline import Chain, Middleware
    from pipeline_mediator.unit import QueuedEvent

    Enter = Callable[[Any], Coroutine[Any, Any, Any]]

    class Walk(Protocol):
        """Walks one chain, with a context that was made for the message, or with one of its own."""

        def __call__(self, message: object, context: Context | None = None, /) -> Coroutine[Any, Any, Any]: ...


__all__ = ["Mediator", "Stream"]

R = TypeVar("R")
T_co = TypeVar("T_co", covariant=True)

logger = logging.getLogger(__name__)

_NOTHING = Given()


class Mediator:
    """Sends requests, emits events and opens streams, each through the one pipeline.

        mediator = Mediator(
            RequestMap().bind(PlaceOrder, PlaceOrderHandler),
            RodiContainer(services),
            event_map=EventMap().bind(OrderPlaced, NotifyWarehouse),
            middlewares=[LoggingMiddleware(), RetryMiddleware(attempts=3), TransactionMiddleware(sessions.begin)],
        )
        async with mediator:
            order_id = await mediator.send(PlaceOrder("book"))

    `async with` connects the brokers that stand in the pipeline and disconnects them; without brokers it may be left
    out. One that is away at that moment is an error, unless an outbox keeps what is meant for it.

    At construction the maps are frozen, and the chain of every bound message is compiled and checked. Before the
    first message, or when entered, the container resolves every handler dry.

    `new_id` makes message ids; UUIDv7 by default. `codec` is what messages are encoded with on the way to a broker.

    Raises `OrderError` for middlewares that stand where their rules forbid, `ResolutionError` for dependencies that the
    container cannot provide, and other `ConfigurationError`s for what else is wrong with the set-up.
    """

    def __init__(
        self,
        request_map: RequestMap | None = None,
        container: Container | None = None,
        *,
        event_map: EventMap | None = None,
        event_emitter: EventEmitter | None = None,
        middlewares: Iterable[Middleware] = (),
        codec: Codec | None = None,
        new_id: Callable[[], str] = new_message_id,
    ) -> None:
        self.requests = RequestMap() if request_map is None else request_map
        self.events, pipeline = _event_half(event_map, event_emitter, Pipeline(*middlewares))
        if container is None and event_emitter is not None:
            container = event_emitter.container
        self.container: Container = PlainContainer() if container is None else container
        self.pipeline = pipeline
        self.new_id = new_id
        self._codec = codec
        handle = HandleMiddleware(self.requests, self.events, self.container, self._destination_for)
        self._middlewares: tuple[Middleware, ...] = (*flatten(pipeline), handle)
        self.routes = Routes(self.requests, self.events, self._middlewares, self._register)
        self._arrivals: Arrivals | None = None
        self._sends: dict[type, Enter] = {}
        self._emits: dict[type, Enter] = {}
        self._prepared = False
        self._open: AsyncExitStack | None = None
        self._unreached: list[Any] = []
        if event_emitter is not None:
            event_emitter.mediator = self
        self.routes.compile_all()
        self.requests.freeze()
        self.events.freeze()

    # -- sending and emitting ------------------------------------------------------------------------------------------

    async def send(
        self,
        request: Request[R],
        /,
        *,
        headers: Mapping[str, str] | None = None,
        correlation_id: str | None = None,
        transaction: object = None,
    ) -> R:
        """Send a request to its one handler and return the handler's result.

        Inside a handler it joins that handler's message: same transaction, same scope. `headers` travel with the
        message; `correlation_id` continues a conversation that began elsewhere. `transaction` is a session or
        connection of the caller's, who commits it: the message runs in it, without a commit or a retry of its own.

        Raises what the handler raises, untouched; `HandlerNotFoundError` if nobody handles the request.
        """
        enter = self._sends.get(type(request))
        if enter is None or headers is not None or correlation_id is not None or transaction is not None:
            enter = partial(self._send, given=Given(headers, correlation_id), transaction=transaction)
        result: R = await enter(request)
        return result

    async def _send(self, request: object, given: Given, transaction: object) -> Any:
        enter = self._sends.get(type(request)) or self._prepare_send(request)
        if transaction is not None:
            return await self._walk_in_callers(self.routes.of_request(type(request)), request, given, transaction)
        if given == _NOTHING:
            return await enter(request)
        return await self._enter(self.routes.of_request(type(request)), request, given)

    async def emit(
        self,
        event: Event,
        /,
        key: str | None = None,
        *,
        headers: Mapping[str, str] | None = None,
        correlation_id: str | None = None,
    ) -> None:
        """Emit an event now: its local handlers run, and it goes to its destination.

        Inside a handler it joins that handler's message. What goes to a broker from inside a transaction leaves after
        the commit; outside one it is published before this returns, or the broker's error is raised. `key` overrides
        the field that orders and partitions.

        Raises `HandlerNotFoundError` for an event that has neither handler nor destination, unless it is a domain
        event.
        """
        enter = self._emits.get(type(event))
        if enter is None or key is not None or headers is not None or correlation_id is not None:
            enter = partial(self._emit, given=Given(headers, correlation_id, key))
        await enter(event)

    async def _emit(self, event: object, given: Given) -> None:
        enter = self._emits.get(type(event)) or self._prepare_emit(event)
        if given == _NOTHING:
            await enter(event)
            return
        for chain in self.routes.of_event(type(event)):
            await self._enter(chain, event, given)

    def stream(self, query: StreamQuery[T_co], /, *, headers: Mapping[str, str] | None = None) -> Stream[T_co]:
        """Open a stream: `async with mediator.stream(query) as items: async for item in items: ...`.

        The chain runs in a task of its own for as long as the block lasts, so a transaction spans the whole stream. One
        item is under way at a time. Leaving the block early ends the chain as cancelled.
        """
        _refuse_unless(StreamQuery, query, "stream")
        self.prepare()
        chain = self.routes.of_request(type(query))
        context = self._root(chain, query, Given(headers), AMBIENT.get())
        return Stream(context, partial(self._walker(chain), query))

    async def __aenter__(self) -> Self:
        if self._open is not None:
            raise ConfigurationError("this mediator is already open; enter it once, at the start of the application")
        self.prepare()
        resources = [one for middleware in self._middlewares for one in getattr(middleware, "resources", ())]
        has_outbox = any(getattr(one, "role", None) == "outbox" for one in self._middlewares)
        async with AsyncExitStack() as stack:
            for resource in {id(one): one for one in resources}.values():
                try:
                    await stack.enter_async_context(resource)
                except BrokerUnavailableError as error:
                    if not has_outbox:
                        raise
                    logger.warning("%s What is emitted waits in the outbox meanwhile.", error)
                    self._unreached.append(resource)
            self._open = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stack, self._open = self._open, None
        self._unreached.clear()
        if stack is not None:
            await stack.__aexit__(kind, error, trace)

    # -- what it is made of --------------------------------------------------------------------------------------------

    @property
    def codec(self) -> Codec:
        """What messages are encoded with."""
        if self._codec is None:
            from pipeline_mediator.codec import Codec

            self._codec = Codec()
        return self._codec

    def describe(self, message_type: type | None = None, /, format: Literal["text", "json", "mermaid"] = "text") -> str:
        """The chains as they were compiled, of one message type or of all that are bound."""
        from pipeline_mediator.describe import describe

        return describe(self, message_type, format)

    def check(self) -> list[str]:
        """What is legal but may surprise, such as events that are published at most once; empty if nothing is.

        Also resolves every handler's dependencies dry. Raises what construction and the first message would raise.
        """
        from pipeline_mediator.describe import warnings_of

        self.prepare()
        return warnings_of(self)

    def prepare(self) -> None:
        """Let the container resolve every handler dry, once."""
        if self._prepared:
            return
        handlers = [handler for one in self.requests if (handler := self.requests.get(one)) is not None]
        for event_type in self.events:
            for binding in self.events.bindings_for(event_type):
                handlers.extend(binding.handlers)
        wanted = dict.fromkeys(one for handler in handlers for one in handler.wanted)
        yielded = [one for middleware in self._middlewares for one in getattr(middleware, "seeds", ())]
        seeded = dict.fromkeys((Context, *(base for one in yielded for base in seed_types(one))))
        try:
            self.container.prepare(tuple(wanted), tuple(seeded))
        except ResolutionError as error:
            # A container is asked for types alone; which function wants one is known here.
            for handler in handlers:
                for name, asked in handler.parameters:
                    if any(entry.startswith(f"{name_of(asked)}:") for entry in error.missing):
                        error.add_note(f"{handler.name}({name}: {name_of(asked)}) asks for it")
            raise
        self._prepared = True

    def check_event(self, event: Event) -> None:
        """Raise what `emit` raises for something that is no event, or that nobody takes."""
        _refuse_unless(Event, event, "emit")
        self.routes.of_event(type(event))

    # -- for publishing and consuming ----------------------------------------------------------------------------------

    def encode(self, context: Context, *, binary: bool) -> tuple[Facts, Encoded]:
        """A message on its way out, and what travels with it. Raises a `CodecError`, or `MessageLoopError`."""
        from pipeline_mediator.codec import Facts

        headers = context.headers
        message: object = context.message
        if HOPS in headers and (hops := hops_of(headers)) > MAX_HOPS:
            raise MessageLoopError(type(message), hops)
        facts = Facts(
            message_id=context.message_id,
            correlation_id=context.correlation_id,
            causation_id=context.causation_id,
            key=key_of(message, context.key),
            headers=headers,
        )
        return facts, self.codec.encode(message, facts, binary=binary)

    async def deliver(self, delivery: Delivery, /, *, skip_unknown: bool = False) -> None:
        """Walk what a broker handed over; `delivery.outcome` says what is to become of it.

        For those who get messages another way than by a `Consumer`, a web hook for example. It is decoded by the
        codec's catalog and walks the chain of its type; one of a type that nobody here handles is passed over. What
        cannot be decoded, is of an unknown type or of a version without upcaster walks the chain of `Undecodable` to
        the DeadLetterMiddleware; with `skip_unknown` what is of an unknown type is passed over too.

        Raises what the chain raises. The outcome is then what a middleware decided, and None if none did; after a
        commit it is `Ack` whatever was raised.
        """
        if self._arrivals is None:
            # Not at the top: a program that consumes nothing does not load it.
            from pipeline_mediator.deliveries import Arrivals

            self.prepare()
            self._arrivals = Arrivals(self, self._walker)
        await self._arrivals.walk(delivery, skip_unknown=skip_unknown)

    # -- for a relay ---------------------------------------------------------------------------------------------------

    @property
    def outbox(self) -> OutboxStore | None:
        """Where the pipeline's outbox keeps its messages; None without one.

        Raises `ConfigurationError` if there are several: which one a relay serves has to be said.
        """
        outboxes: list[Any] = [one for one in self._middlewares if getattr(one, "role", None) == "outbox"]
        stores = {one.store for one in outboxes}
        if len(stores) > 1:
            raise ConfigurationError("this pipeline has several outboxes; give each OutboxRelay its own, by store=")
        return stores.pop() if stores else None

    @property
    def inboxes(self) -> Sequence[InboxStore]:
        """Where the pipeline remembers what came from brokers; a consumer has them forget what is old."""
        inboxes: list[Any] = [one for one in self._middlewares if getattr(one, "role", None) == "inbox"]
        return tuple({id(one.store): one.store for one in inboxes}.values())

    def relay_chain(self, name: str, version: int, destination: str) -> Chain:
        """The chain that stored messages of this wire name and destination are published by.

        One object for all that go to the same place of the same broker. Raises `DestinationError` where nothing in the
        pipeline publishes them.
        """
        return self.routes.relayed(self.codec.find(name, version), destination)

    async def walk_relayed(self, chain: Chain, batch: Relayed) -> Published:
        """Publish a batch by its chain, as a message of its own whoever's message is at work."""
        published: Published = await self._walker(chain)(batch, Context(batch, chain.route, self))
        if self._unreached and published.accepted:
            await self._reach()
        return published

    async def _reach(self) -> None:
        """Enter the brokers that were away at the start and may be back, so that they are left at the end."""
        unreached, self._unreached = self._unreached, []
        for resource in unreached:
            try:
                if self._open is not None:
                    await self._open.enter_async_context(resource)
            except BrokerError:
                self._unreached.append(resource)

    def _destination_for(self, message_type: type) -> str | None:
        return self.routes.destination_for(message_type)

    def _register(self, message_type: type) -> None:
        self.codec.register(message_type)

    # -- ways in -------------------------------------------------------------------------------------------------------

    def _prepare_send(self, request: object) -> Enter:
        _refuse_unless(Request, request, "send")
        self.prepare()
        enter = self._sends[type(request)] = self._way_into(self.routes.of_request(type(request)))
        return enter

    def _prepare_emit(self, event: object) -> Enter:
        _refuse_unless(Event, event, "emit")
        self.prepare()
        ways = [self._way_into(chain) for chain in self.routes.of_event(type(event))]
        enter = self._emits[type(event)] = ways[0] if len(ways) == 1 else partial(_each, ways)
        return enter

    def _way_into(self, chain: Chain) -> Enter:
        """The handler itself where nothing in the chain needs a context, else the walk."""
        return self._walker(chain) if chain.direct is None else chain.direct

    # -- walking -------------------------------------------------------------------------------------------------------

    def _walker(self, chain: Chain) -> Walk:
        """A function that walks this chain as a message of its own; what nobody in it has ended ends there.

        Given no context it makes one, unless another message is at work. A closure, because every name that it need not
        look up for a message counts.
        """
        route, call, begins_unit = chain.route, chain.call, chain.begins_unit
        get_ambient, set_ambient, reset_ambient = AMBIENT.get, AMBIENT.set, AMBIENT.reset

        async def walk(message: object, context: Context | None = None) -> Any:
            if context is None:
                if get_ambient() is not None:
                    return await self._enter(chain, message, _NOTHING)
                context = Context(message, route, self)
            if begins_unit and context.begun_unit is None:
                context.begun_unit = Unit(context, current_task())
            token = set_ambient(context)
            try:
                result = await call(context)
                if context.begun_unit is None:
                    context.begun_unit = ENDED
                elif (ending := context.begun_unit.end_at_once()) is not None:
                    await ending
            except BaseException as error:
                if context.begun_unit is None:
                    context.begun_unit = ENDED
                else:
                    await context.begun_unit.abandon(error)
                raise
            finally:
                reset_ambient(token)
            return result

        return walk

    async def _enter(self, chain: Chain, message: object, given: Given) -> Any:
        """Join the message that is at work, or walk the chain as a message of its own, caused by that one.

        It joins only what it certainly belongs to: the same mediator's message, at work in this very task, its attempt
        still open. A task that a handler started gets a root of its own, or it would write into a transaction that may
        have ended.
        """
        ambient = AMBIENT.get()
        unit = None if ambient is None else ambient.begun_unit
        if (
            ambient is not None
            and unit is not None
            and unit.open
            and unit.task is not None
            and ambient.mediator is self
            and unit.task is current_task()
        ):
            return await self._join(chain, message, ambient, given)
        return await self._walker(chain)(message, self._root(chain, message, given, ambient))

    def _root(self, chain: Chain, message: object, given: Given, cause: Context | None) -> Context:
        """A context for a message of its own; of its cause it keeps ids and headers alone, so that no chain grows."""
        context = Context(message, chain.route, self)
        if cause is not None:
            correlation_id = given.correlation_id or cause.correlation_id
            context.identify(correlation_id=correlation_id, causation_id=cause.message_id, key=given.key)
            context.headers.update(cause.headers)
        elif given.correlation_id is not None or given.key is not None:
            context.identify(correlation_id=given.correlation_id, key=given.key)
        if given.headers is not None:
            context.headers.update(given.headers)
        return context

    async def _walk_in_callers(self, chain: Chain, message: object, given: Given, transaction: object) -> Any:
        if chain.unit_of_work is None:
            raise ConfigurationError(
                f"{chain.route}: send(..., transaction=...) needs a TransactionMiddleware in the chain, which hands "
                "the session to the handlers; there is none"
            )
        context = self._root(chain, message, given, AMBIENT.get())
        context.begun_unit = Unit(context, current_task())
        context.unit.begin(transaction, chain.unit_of_work)
        context.unit.external = True
        return await self._walker(chain)(message, context)

    async def join(self, message: object, parent: Context) -> Any:
        """Send a request inside the attempt of `parent`; what `context.send` calls."""
        _refuse_unless(Request, message, "send")
        return await self._join(self.routes.of_request(type(message)), message, parent, _NOTHING)

    async def walk_queued(self, queued: QueuedEvent) -> None:
        """Walk an event of the queue inside the attempt that emitted it."""
        for chain in self.routes.of_event(type(queued.event)):
            await self._join(chain, queued.event, queued.context, Given(key=queued.key))

    async def walk_put_off(self, put_off: PutOff) -> None:
        """Walk a message that waited for the commit, as a message of its own."""
        context = self._root(put_off.chain, put_off.message, put_off.given, put_off.context)
        await self._walker(put_off.chain)(put_off.message, context)

    async def _join(self, chain: Chain, message: object, parent: Context, given: Given) -> Any:
        unit = parent.unit
        if not unit.open:
            raise TransactionFinishedError(
                f"{type(message).__name__} was sent from {type(parent.message).__name__}, whose attempt has ended: "
                "what it writes would be in no transaction. Await what a handler starts, or call mediator.send "
                "from the task."
            )
        if chain.publishes and unit.resource is not None:
            return self._put_off(chain, message, parent, given)
        if chain.publishes or chain.unit_of_work not in (None, unit.unit_of_work):
            return await self._walker(chain)(message, self._root(chain, message, given, parent))
        context = Context(message, chain.route, self, parent)
        # At once, not when first asked for: what its handler sends through the mediator joins by it.
        context.begun_unit = unit
        if given is not _NOTHING:
            context.identify(correlation_id=given.correlation_id, key=given.key)
            context.headers.update(given.headers or {})
        return await _walk_joined(context, chain, unit)

    def _put_off(self, chain: Chain, message: object, parent: Context, given: Given) -> None:
        unit = parent.unit
        if unit.external:
            raise EmitError(
                f"{type(message).__name__} goes to {chain.route.destination!r} and was emitted inside "
                "send(..., transaction=...): the caller commits that transaction, so it is not known when the message "
                "may leave. Put an OutboxMiddleware in the pipeline, or emit it after your own commit."
            )
        unit.put_off.append(PutOff(chain, message, given, parent))


async def _walk_joined(context: Context, chain: Chain, unit: Unit) -> Any:
    """Walk a chain inside the attempt of another message; an error dooms the transaction, or rolls back a savepoint."""
    token = AMBIENT.set(context)
    try:
        if unit.savepoint is None:
            return await chain.call(context)
        async with unit.savepoint():
            return await chain.call(context)
    except BaseException as error:
        unit.drop_events_of(context)
        if unit.resource is not None and unit.savepoint is None:
            unit.doom(chain.route.message_type, error)
        raise
    finally:
        AMBIENT.reset(token)


async def _each(ways: list[Enter], event: Any) -> None:
    for enter in ways:
        await enter(event)


def _event_half(
    event_map: EventMap | None, emitter: EventEmitter | None, pipeline: Pipeline
) -> tuple[EventMap, Pipeline]:
    """The events and the pipeline, whether they came the new way or in Diator's EventEmitter."""
    if emitter is None:
        return EventMap() if event_map is None else event_map, pipeline
    if event_map is not None:
        raise ConfigurationError("pass event_map= or event_emitter=, not both: the emitter already has an event map")
    if emitter.message_broker is not None:
        from pipeline_mediator.middlewares.publish import PublishMiddleware

        pipeline += [PublishMiddleware(emitter.message_broker)]
    return emitter.event_map, pipeline


def _refuse_unless(kind: type, message: object, verb: str) -> None:
    """Raise `ConfigurationError` if `verb` is not for this message, and say which is."""
    if isinstance(message, kind):
        return
    if isinstance(message, type):
        raise ConfigurationError(f"{verb}() takes a message, not its class: {name_of(message)}(...)")
    name = name_of(type(message))
    for other, right in ((Request, "send"), (Event, "emit"), (StreamQuery, "stream")):
        if isinstance(message, other):
            raise ConfigurationError(f"{name} is a {other.__name__}: mediator.{right}() takes it, not {verb}()")
    raise ConfigurationError(
        f"{name} is no message: derive it from Command[R], Query[R], StreamQuery[T], DomainEvent or IntegrationEvent"
    )
