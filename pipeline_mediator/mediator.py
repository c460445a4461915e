"""The mediator: finds the chain of a message and walks it, as a message of its own or joined to the one at work."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, Self, TypeVar

from pipeline_mediator.concurrency import current_task
from pipeline_mediator.container import PlainContainer
from pipeline_mediator.context import AMBIENT, Context, Route, new_message_id
from pipeline_mediator.errors import (
    ConfigurationError,
    EmitError,
    HandlerNotFoundError,
    TransactionFinishedError,
    name_of,
)
from pipeline_mediator.events import (
    DomainEvent,
    ECSTEvent,
    Event,
    EventEmitter,
    EventMap,
    IntegrationEvent,
    NotificationEvent,
)
from pipeline_mediator.middlewares.handle import HandleMiddleware
from pipeline_mediator.pipeline import Chain, Pipeline, compile_chain, destination_of, flatten
from pipeline_mediator.requests import Command, Request, RequestMap, StreamQuery
from pipeline_mediator.unit import PutOff, QueuedEvent, Unit, attempt, seed_types

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping
    from types import TracebackType

    from anyio.abc import ObjectReceiveStream, ObjectSendStream, TaskGroup

    from pipeline_mediator.codec import Codec
    from pipeline_mediator.container import Container
    from pipeline_mediator.pipeline import Middleware

__all__ = ["Mediator", "Stream"]

R = TypeVar("R")
T_co = TypeVar("T_co", covariant=True)

class _Given(NamedTuple):
    """What the caller says about a message beside the message itself."""

    headers: Mapping[str, str] | None = None
    correlation_id: str | None = None
    key: str | None = None


_NOTHING = _Given()


class Mediator:
    """Sends requests, emits events and opens streams, each through the one pipeline.

        mediator = Mediator(
            RequestMap().bind(PlaceOrder, PlaceOrderHandler),
            RodiContainer(services),
            event_map=EventMap().bind(OrderPlaced, NotifyWarehouse),
            middlewares=Pipeline(LoggingMiddleware(), RetryMiddleware(attempts=3), TransactionMiddleware(sessions.begin)),
        )
        async with mediator:
            order_id = await mediator.send(PlaceOrder("book"))

    `async with` connects the brokers that stand in the pipeline and disconnects them; without brokers it may be left out.
    At construction the maps are frozen, and the chain of every bound message is compiled and checked. Before the first
    message, or when entered, the container resolves every handler dry.

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
        handle = HandleMiddleware(self.requests, self.events, self.container, self.destination_for)
        self._middlewares = (*flatten(pipeline), handle)
        self._request_chains: dict[type, Chain] = {}
        self._event_chains: dict[type, tuple[Chain, ...]] = {}
        self._sends: dict[type, Callable[[Any], Awaitable[Any]]] = {}
        self._emits: dict[type, Callable[[Any], Awaitable[Any]]] = {}
        self._prepared = False
        self._open: AsyncExitStack | None = None
        self.requests.freeze()
        self.events.freeze()
        for message_type in self.message_types():
            self.chains_for(message_type)

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
        message; `correlation_id` continues a conversation that began elsewhere. `transaction` is a session or connection
        of the caller's, who commits it: the message runs in it, without a commit or a retry of its own.

        Raises what the handler raises, untouched; `HandlerNotFoundError` if nobody handles the request.
        """
        enter = self._sends.get(type(request))
        if enter is None:
            enter = self._prepare_send(request)
        if headers is None and correlation_id is None and transaction is None:
            result: R = await enter(request)
            return result
        chain = self._request_chains[type(request)]
        given = _Given(headers, correlation_id)
        if transaction is not None:
            result = await self._walk_in_callers(chain, request, given, transaction)
        else:
            result = await self._enter(chain, request, given)
        return result

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

        Raises `HandlerNotFoundError` for an event that has neither handler nor destination, unless it is a domain event.
        """
        enter = self._emits.get(type(event))
        if enter is None:
            enter = self._prepare_emit(event)
        if key is None and headers is None and correlation_id is None:
            await enter(event)
            return
        for chain in self._event_chains[type(event)]:
            await self._enter(chain, event, _Given(headers, correlation_id, key))

    def stream(self, query: StreamQuery[T_co], /, *, headers: Mapping[str, str] | None = None) -> Stream[T_co]:
        """Open a stream: `async with mediator.stream(query) as items: async for item in items: ...`.

        The chain runs in a task of its own for as long as the block lasts, so a transaction spans the whole stream. One
        item is under way at a time. Leaving the block early ends the chain as cancelled.
        """
        if not isinstance(query, StreamQuery):
            raise _wrong_verb(query, "stream")
        self.prepare()
        chain = self._request_chain(type(query))
        return Stream(self._root(chain, query, _Given(headers), AMBIENT.get()), chain)

    async def __aenter__(self) -> Self:
        if self._open is not None:
            raise ConfigurationError("this mediator is already open; enter it once, at the start of the application")
        self.prepare()
        async with AsyncExitStack() as stack:
            entered: set[int] = set()
            for middleware in self._middlewares:
                for resource in getattr(middleware, "resources", ()):
                    if id(resource) not in entered:
                        entered.add(id(resource))
                        await stack.enter_async_context(resource)
            self._open = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stack, self._open = self._open, None
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

    def describe(
        self, message_type: type | None = None, /, format: Literal["text", "json", "mermaid"] = "text"
    ) -> str:
        """The chains as they were compiled, of one message type or of all that are bound."""
        from pipeline_mediator.describe import describe

        return describe(self, message_type, format)

    def check(self) -> list[str]:
        """What is legal but may surprise, such as events that are published at most once; empty if nothing is.

        Also resolves every handler's dependencies dry. Raises what construction and the first message would raise.
        """
        self.prepare()
        found: dict[str, None] = {}
        for message_type in self.message_types():
            for chain in self.chains_for(message_type):
                for link in chain.links:
                    for source in (link.middleware, link.source):
                        warnings_for = getattr(source, "warnings_for", None)
                        if warnings_for is not None:
                            found.update(dict.fromkeys(f"{chain.route}: {text}" for text in warnings_for(chain)))
                            break
        return list(found)

    def message_types(self) -> list[type]:
        """Every type that is bound or has a destination of its own, requests first."""
        mapped = [one for middleware in self._middlewares for one in getattr(middleware, "message_types", ())]
        concrete = [one for one in mapped if one not in _KINDS]
        return list(dict.fromkeys([*self.requests, *(one for one in self.events if one not in _KINDS), *concrete]))

    def chains_for(self, message_type: type) -> tuple[Chain, ...]:
        """The chains that a message of this type may walk: sent or emitted, and as it comes back from a broker."""
        if issubclass(message_type, Event):
            chains = self._chains_of_event(message_type)
            kind: Literal["event", "request"] = "event"
            comes_back = issubclass(message_type, IntegrationEvent) and any(
                binding.runs("broker", None) for binding in self.events.bindings_for(message_type)
            )
        else:
            chains = (self._request_chain(message_type),)
            kind = "request"
            comes_back = chains[0].route.destination is not None and message_type in self.requests
        if comes_back:
            chains = (*chains, self._compile(Route(message_type, kind, "broker")))
        return chains

    def destination_for(self, message_type: type) -> str | None:
        """Where the pipeline publishes messages of this type; None for those that stay in the process."""
        return destination_of(message_type, self._middlewares)

    def check_event(self, event_type: type) -> None:
        """Raise `HandlerNotFoundError` if an event of this type would reach nobody."""
        if event_type not in self._event_chains:
            self._chains_of_event(event_type)

    def prepare(self) -> None:
        """Let the container resolve every handler dry, once."""
        if self._prepared:
            return
        handlers = [handler for one in self.requests if (handler := self.requests.get(one)) is not None]
        for event_type in self.events:
            for binding in self.events.bindings_for(event_type):
                handlers.extend(binding.handlers)
        wanted = dict.fromkeys(one for handler in handlers for one in handler.wanted)
        seeded = {Context: None}
        for middleware in self._middlewares:
            for seed in getattr(middleware, "seeds", ()):
                seeded.update(dict.fromkeys(seed_types(seed)))
        self.container.prepare(tuple(wanted), tuple(seeded))
        self._prepared = True

    # -- chains --------------------------------------------------------------------------------------------------------

    def _request_chain(self, message_type: type) -> Chain:
        chain = self._request_chains.get(message_type)
        if chain is None:
            kind: Literal["stream", "request"] = "stream" if issubclass(message_type, StreamQuery) else "request"
            destination = self.destination_for(message_type) if issubclass(message_type, Command) else None
            chain = self._compile(Route(message_type, kind, "local", destination))
            self._request_chains[message_type] = chain
        return chain

    def _chains_of_event(self, event_type: type) -> tuple[Chain, ...]:
        chains = self._event_chains.get(event_type)
        if chains is None:
            destination = self.destination_for(event_type) if not issubclass(event_type, DomainEvent) else None
            bound = any(one.runs("local", destination) for one in self.events.bindings_for(event_type))
            routes: list[Route] = []
            if bound or issubclass(event_type, DomainEvent):
                routes.append(Route(event_type, "event", "local"))
            if destination is not None:
                routes.append(Route(event_type, "event", "local", destination))
            if not routes and not self._only_delivered(event_type):
                raise HandlerNotFoundError(
                    event_type,
                    "it has neither a handler nor a destination, so it would be lost. Bind a handler with EventMap.bind, "
                    "give it a destination in PublishMiddleware, or derive it from DomainEvent if it may go unheard.",
                )
            chains = tuple(self._compile(route) for route in routes)
            self._event_chains[event_type] = chains
        return chains

    def _only_delivered(self, event_type: type) -> bool:
        return any(one.at == "delivery" for one in self.events.bindings_for(event_type))

    def _compile(self, route: Route) -> Chain:
        if route.destination is not None:
            self.codec.register(route.message_type)
        return compile_chain(route, self._middlewares, attempt)

    def _prepare_send(self, request: Any) -> Callable[[Any], Awaitable[Any]]:
        if not isinstance(request, Request):
            raise _wrong_verb(request, "send")
        self.prepare()
        enter = self._sends[type(request)] = self._enter_function(self._request_chain(type(request)))
        return enter

    def _prepare_emit(self, event: Any) -> Callable[[Any], Awaitable[Any]]:
        if not isinstance(event, Event):
            raise _wrong_verb(event, "emit")
        self.prepare()
        enters = [self._enter_function(chain) for chain in self._chains_of_event(type(event))]
        if len(enters) == 1:
            enter = enters[0]
        else:

            async def enter(event: Any) -> None:
                for one in enters:
                    await one(event)

        self._emits[type(event)] = enter
        return enter

    def _enter_function(self, chain: Chain) -> Callable[[Any], Awaitable[Any]]:
        """The way into a chain, specialised to what the chain needs."""
        if chain.direct is not None:
            return chain.direct
        route = chain.route
        call = chain.call
        begins_unit = chain.begins_unit

        def enter(message: Any) -> Awaitable[Any]:
            ambient = AMBIENT.get()
            if ambient is not None:
                return self._enter_from(ambient, chain, message, _NOTHING)
            context = Context(message, route, self)
            if begins_unit:
                context.begin_unit(current_task())
            return _walk(context, call)

        return enter

    # -- walking -------------------------------------------------------------------------------------------------------

    async def _enter(self, chain: Chain, message: Any, given: _Given) -> Any:
        ambient = AMBIENT.get()
        if ambient is not None:
            return await self._enter_from(ambient, chain, message, given)
        return await _walk(self._root(chain, message, given, None), chain.call)

    async def _enter_from(self, ambient: Context, chain: Chain, message: Any, given: _Given) -> Any:
        """Called while another message is at work: join it, or be a message of its own that it caused.

        It joins only what it certainly belongs to: the same mediator's message, at work in this very task, its attempt
        still open. A task that a handler started gets a root of its own, or it would write into a transaction that may
        have ended.
        """
        unit = ambient.begun_unit
        if (
            unit is not None
            and unit.open
            and unit.task is not None
            and ambient.mediator is self
            and unit.task is current_task()
        ):
            return await self._join(chain, message, ambient, given)
        return await _walk(self._root(chain, message, given, ambient), chain.call)

    def _root(self, chain: Chain, message: Any, given: _Given, cause: Context | None) -> Context:
        """A context for a message of its own; of what caused it only the ids are kept, so that no chain of tasks grows."""
        context = Context(message, chain.route, self)
        if cause is not None:
            correlation_id = given.correlation_id or cause.correlation_id
            context.identify(correlation_id=correlation_id, causation_id=cause.message_id, key=given.key)
        elif given.correlation_id is not None or given.key is not None:
            context.identify(correlation_id=given.correlation_id, key=given.key)
        if given.headers is not None:
            context.headers.update(given.headers)
        if chain.begins_unit:
            context.begin_unit(current_task())
        return context

    async def _walk_in_callers(self, chain: Chain, message: Any, given: _Given, transaction: object) -> Any:
        if chain.unit_of_work is None:
            raise ConfigurationError(
                f"{chain.route}: send(..., transaction=...) needs a TransactionMiddleware in the chain, which hands the "
                "session to the handlers; there is none"
            )
        context = self._root(chain, message, given, AMBIENT.get())
        context.unit.begin(transaction, chain.unit_of_work)
        context.unit.external = True
        return await _walk(context, chain.call)

    async def join(self, message: Any, parent: Context) -> Any:
        """Send a request inside the attempt of `parent`; what `context.send` calls."""
        if not isinstance(message, Request):
            raise _wrong_verb(message, "send")
        return await self._join(self._request_chain(type(message)), message, parent, _NOTHING)

    async def walk_queued(self, queued: QueuedEvent) -> None:
        """Walk an event of the queue inside the attempt that emitted it."""
        for chain in self._chains_of_event(type(queued.event)):
            await self._join(chain, queued.event, queued.context, _Given(key=queued.key))

    async def walk_put_off(self, put_off: PutOff) -> None:
        """Walk a message that waited for the commit, as a message of its own."""
        context = self._root(put_off.chain, put_off.message, _Given(key=put_off.key), put_off.context)
        await _walk(context, put_off.chain.call)

    async def _join(self, chain: Chain, message: Any, parent: Context, given: _Given) -> Any:
        unit = parent.unit
        if not unit.open:
            raise TransactionFinishedError(
                f"{type(message).__name__} was sent from {type(parent.message).__name__}, whose attempt has ended: what "
                "it writes would be in no transaction. Await what a handler starts, or call mediator.send from the task."
            )
        if chain.publishes and unit.resource is not None:
            return self._put_off(chain, message, parent, given)
        if chain.publishes or chain.unit_of_work not in {None, unit.unit_of_work}:
            return await _walk(self._root(chain, message, given, parent), chain.call)
        context = Context(message, chain.route, self, parent)
        if given is not _NOTHING:
            context.identify(correlation_id=given.correlation_id, key=given.key)
            context.headers.update(given.headers or {})
        return await _walk_joined(context, chain, unit)

    def _put_off(self, chain: Chain, message: Any, parent: Context, given: _Given) -> None:
        unit = parent.unit
        if unit.external:
            raise EmitError(
                f"{type(message).__name__} goes to {chain.route.destination!r} and was emitted inside "
                "send(..., transaction=...): the caller commits that transaction, so it is not known when the message may "
                "leave. Put an OutboxMiddleware in the pipeline, or emit it after your own commit."
            )
        unit.put_off.append(PutOff(chain, message, given.key, parent))


async def _walk(context: Context, call: Callable[[Context], Awaitable[Any]]) -> Any:
    """Walk a chain as a message of its own; what nobody in the chain has ended ends here."""
    token = AMBIENT.set(context)
    try:
        result = await call(context)
        if context.begun_unit is not None:
            await context.begun_unit.end()
    except BaseException as error:
        if context.begun_unit is not None:
            await context.begun_unit.abandon(error)
        raise
    finally:
        AMBIENT.reset(token)
    return result


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


class Stream(Generic[T_co]):
    """The items of a `StreamQuery`, for as long as the `async with` block lasts.

    What the chain raises is raised by the iteration, or when the block ends.
    """

    def __init__(self, context: Context, chain: Chain) -> None:
        self._context = context
        self._chain = chain
        self._error: Exception | None = None
        self._tasks: TaskGroup | None = None
        self._items: ObjectReceiveStream[T_co] | None = None

    async def __aenter__(self) -> Self:
        import anyio

        if self._tasks is not None:
            raise ConfigurationError("a stream is opened once; call mediator.stream(query) again")
        send, self._items = anyio.create_memory_object_stream[T_co](0)
        self._context.sink = send.send
        self._tasks = anyio.create_task_group()
        await self._tasks.__aenter__()
        self._tasks.start_soon(self._walk, send)
        return self

    async def _walk(self, items: ObjectSendStream[T_co]) -> None:
        try:
            if self._chain.begins_unit:
                self._context.begin_unit(current_task())
            await _walk(self._context, self._chain.call)
        except Exception as error:  # noqa: BLE001 - raised to who iterates
            self._error = error
        finally:
            await items.aclose()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T_co:
        import anyio

        if self._items is None:
            raise ConfigurationError("open the stream first: `async with mediator.stream(query) as items:`")
        try:
            return await self._items.receive()
        except anyio.EndOfStream:
            self._raise_error()
            raise StopAsyncIteration from None

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        tasks, items = self._tasks, self._items
        if tasks is None or items is None:
            return
        tasks.cancel_scope.cancel()
        await items.aclose()
        # The task group would wrap the block's own error in a group: it is not told of it, and the block raises it.
        await tasks.__aexit__(None, None, None)
        if error is None:
            self._raise_error()

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        try:
            if error is not None:
                raise error
        finally:
            # Its traceback holds this frame: without this, a cycle keeps the context alive.
            del error


_KINDS = frozenset({Event, DomainEvent, IntegrationEvent, NotificationEvent, ECSTEvent, Request, Command})
"""Message kinds: nobody sends or emits a message of exactly these types."""


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


def _wrong_verb(message: object, verb: str) -> ConfigurationError:
    name = name_of(message if isinstance(message, type) else type(message))
    if isinstance(message, type):
        return ConfigurationError(f"{verb}() takes a message, not its class: {name}(...)")
    for kind, right in ((Request, "send"), (Event, "emit"), (StreamQuery, "stream")):
        if isinstance(message, kind):
            return ConfigurationError(f"{name} is a {kind.__name__}: mediator.{right}() takes it, not {verb}()")
    return ConfigurationError(
        f"{name} is no message: derive it from Command[R], Query[R], StreamQuery[T], DomainEvent or IntegrationEvent"
    )
