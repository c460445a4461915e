"""The terminal for everything that has local handlers; the mediator puts it last in every pipeline."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Awaitable, Callable, MutableSequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from pipeline_mediator.concurrency import finish
from pipeline_mediator.context import AMBIENT, Context
from pipeline_mediator.errors import ConfigurationError, HandlerNotFoundError
from pipeline_mediator.pipeline import Without
from pipeline_mediator.unit import CLOSE_SECONDS, attempt

if TYPE_CHECKING:
    from collections.abc import Iterable

    import anyio

    from pipeline_mediator.container import Container
    from pipeline_mediator.context import Route
    from pipeline_mediator.events import Binding, EventMap, FanOut
    from pipeline_mediator.handlers import Handler
    from pipeline_mediator.pipeline import Chain, Next, Rule
    from pipeline_mediator.requests import RequestMap
    from pipeline_mediator.unit import Unit

__all__ = ["HandleMiddleware"]

Terminal: TypeAlias = Callable[[Context], Awaitable[Any]]
Direct: TypeAlias = Callable[[Any], Awaitable[Any]]


class HandleMiddleware:
    """Ends a chain in the local handlers of the message.

    For each route it is specialised to what those handlers need, so that a handler without dependencies costs no scope
    and one without a context parameter costs no context. Raises `HandlerNotFoundError` for a message that nobody
    handles; a domain event without handlers is legal.
    """

    role: ClassVar[str] = "handle"

    def __init__(
        self,
        request_map: RequestMap,
        event_map: EventMap,
        container: Container,
        destination_for: Callable[[type], str | None],
    ) -> None:
        self._requests = request_map
        self._events = event_map
        self._container = container
        self._destination_for = destination_for
        self._turns = _Turns()

    def for_route(self, route: Route) -> LocalHandlers | None:
        """The handlers of this route; None where the message goes to a broker instead."""
        if route.destination is not None:
            return None
        if route.kind == "event":
            return self._for_event(route)
        handler = self._requests.get(route.message_type)
        if handler is None:
            raise _no_handler(route.message_type, self._requests)
        call = _Call(handler, self._container, self._turns)
        if route.kind == "stream":
            return LocalHandlers([handler], call.stream, None, needs_scope=call.needs_scope)
        comes_back = route.origin == "broker"
        return LocalHandlers([handler], call.terminal, call.direct, needs_scope=call.needs_scope, comes_back=comes_back)

    def _for_event(self, route: Route) -> LocalHandlers:
        destination = self._destination_for(route.message_type)
        bound = self._events.bindings_for(route.message_type)
        bindings = [one for one in bound if one.runs(route.origin, destination)]
        groups = [_Group(binding, self._container, self._turns) for binding in bindings]
        handlers = [handler for binding in bindings for handler in binding.handlers]
        needs_scope = any(group.needs_scope for group in groups)
        rules = tuple(rule for group in groups for rule in group.rules)
        # One without a destination here may never come from a broker at all.
        comes_back = route.origin == "broker" and destination is not None
        if len(groups) == 1 and groups[0].fan_out == "sequential":
            terminal, direct = groups[0].sequential()
            return LocalHandlers(
                handlers, terminal, direct, needs_scope=needs_scope, rules=rules, comes_back=comes_back
            )

        async def run_groups(context: Context) -> None:
            for group in groups:
                await group.run(context)

        return LocalHandlers(handlers, run_groups, None, needs_scope=needs_scope, rules=rules, comes_back=comes_back)

    async def __call__(self, context: Context, call_next: Next) -> Any:
        """Handle the message; a mediator compiles `for_route` instead."""
        if context.route is None:
            raise ConfigurationError("HandleMiddleware was called with a context that has no route")
        handlers = self.for_route(context.route)
        return await (call_next(context) if handlers is None else handlers.terminal(context))


class LocalHandlers:
    """The handlers of one route, as its terminal."""

    ends_chain: ClassVar[bool] = True

    def __init__(
        self,
        handlers: list[Handler],
        terminal: Terminal,
        direct: Direct | None,
        *,
        needs_scope: bool,
        rules: tuple[Rule, ...] = (),
        comes_back: bool = False,
    ) -> None:
        self._comes_back = comes_back
        self.handlers = tuple(handlers)
        self.terminal = terminal
        self.direct = direct
        self.needs_scope = needs_scope
        self.rules = rules

    @property
    def summary(self) -> str:
        """The names of the handlers, in the order they run."""
        return ", ".join(handler.name for handler in self.handlers) or "no handlers"

    def warnings_for(self, chain: Chain) -> Iterable[str]:
        """What comes back from a broker may fail for good; a Timeout cannot stop a handler that runs in a thread."""
        if self._comes_back and not chain.has("dead letter"):
            yield (
                "handled when it comes back from a broker, and nobody decides what becomes of it if that fails: it "
                "comes again for ever. Put DeadLetterMiddleware and RedeliveryMiddleware in front of the others."
            )
        if chain.has("timeout"):
            for handler in self.handlers:
                if not handler.is_async:
                    yield (
                        f"{handler.name} is a plain function in a worker thread: a Timeout cannot stop it, it is "
                        "waited for. Make it async, or give its blocking calls timeouts of their own."
                    )

    async def __call__(self, context: Context, call_next: Next) -> Any:
        return await self.terminal(context)


class _Call:
    """One handler, made ready: the cheapest way to get it and to call it."""

    def __init__(self, handler: Handler, container: Container, turns: _Turns) -> None:
        self._handler = handler
        self._turns = turns
        self.factory: Callable[[], Any] | None = None
        if handler.form == "class":
            factory_of = getattr(container, "factory", None)
            self.factory = None if factory_of is None else factory_of(handler.target)
        self.needs_scope = bool(handler.wanted) and self.factory is None
        plain = handler.is_async and not handler.collects_events and not self.needs_scope
        self.direct: Direct | None = self._without_context() if plain and not handler.takes_context else None
        self.terminal: Terminal = self._terminal(plain=plain)

    def _without_context(self) -> Direct:
        """The call itself, where nothing has to be resolved."""
        factory = self.factory
        if factory is None:
            return self._handler.function
        return lambda message: factory().handle(message)

    def _terminal(self, *, plain: bool) -> Terminal:
        factory, function = self.factory, self._handler.function
        if not plain or self._handler.context_keyword is not None:
            return self._resolving()
        if not self._handler.takes_context:
            if factory is not None:
                return lambda context: factory().handle(context.message)
            return lambda context: function(context.message)
        if factory is not None:
            return lambda context: factory().handle(context.message, context)
        return lambda context: function(context.message, context)

    def _resolving(self) -> Terminal:
        """For handlers that come out of a scope, run in a thread, or keep their events in a property."""
        handler = self._handler
        if handler.form == "class" and handler.is_async and not handler.collects_events and not handler.takes_context:
            wanted = handler.target

            def resolve_class(context: Context) -> Awaitable[Any]:
                unit = context.begun_unit or context.unit
                scope = unit.scope or unit.open_scope()
                if scope.is_async:
                    return _handle_awaited(scope.get(wanted), context)
                handling: Awaitable[Any] = scope.get(wanted).handle(context.message)
                return handling

            return resolve_class

        async def resolve(context: Context) -> Any:
            call, made = await self._get(context)
            if handler.collects_events:
                return await self._turns.collect(made, context, lambda: self._run(call))
            return await self._run(call)

        return resolve

    async def _run(self, call: Callable[[], Any]) -> Any:
        return await call() if self._handler.is_async else await _in_thread(call)

    async def _get(self, context: Context) -> tuple[Callable[[], Any], Any]:
        """The handler with its message and its further arguments, ready to call; and the object it is a method of."""
        handler = self._handler
        keywords: dict[str, Any] = {}
        made = handler.target
        call = handler.function
        if self.factory is not None:
            made = self.factory()
            call = made.handle
        elif handler.wanted:
            unit = context.unit
            scope = unit.scope or unit.open_scope()
            wanted = handler.parameters or ((None, handler.target),)
            for name, wanted_type in wanted:
                resolved = scope.get(wanted_type)
                if scope.is_async:
                    resolved = await resolved
                if name is None:
                    made, call = resolved, resolved.handle
                else:
                    keywords[name] = resolved
        positional = [context.message]
        if handler.takes_context:
            if handler.context_keyword is None:
                positional.append(context)
            else:
                keywords[handler.context_keyword] = context
        return lambda: call(*positional, **keywords), made

    async def stream(self, context: Context) -> None:
        """Hand every item over to who iterates; the generator is closed before the chain goes on."""
        call, made = await self._get(context)
        if self._handler.collects_events:
            await self._turns.collect(made, context, lambda: _hand_over(call(), context))
        else:
            await _hand_over(call(), context)


class _Group:
    """The handlers of one `EventMap.bind`, and how they run."""

    def __init__(self, binding: Binding, container: Container, turns: _Turns) -> None:
        self.fan_out: FanOut = binding.fan_out
        self._event_type = binding.event_type
        self._calls = [_Call(handler, container, turns) for handler in binding.handlers]
        self._own_scopes = binding.scope_per_handler
        self.needs_scope = not self._own_scopes and any(call.needs_scope for call in self._calls)
        self.rules: tuple[Rule, ...] = ()
        if self.fan_out == "concurrent" and not self._own_scopes:
            self.rules = (Without("transaction", _SHARED_SESSION, _SHARED_SESSION_FIX),)
        self._terminals = [self._with_own_scope(call) if self._own_scopes else call.terminal for call in self._calls]

    def sequential(self) -> tuple[Terminal, Direct | None]:
        """One after the other; the first error stops, because the transaction rolls back anyway."""
        directs = [call.direct for call in self._calls if call.direct is not None]
        if self._own_scopes or len(directs) < len(self._calls):
            return _in_turn(self._terminals), None
        factories = [call.factory for call in self._calls if call.factory is not None]
        direct = _in_turn(directs) if len(factories) < len(directs) or len(directs) == 1 else _made_in_turn(factories)
        return lambda context: direct(context.message), direct

    async def run(self, context: Context) -> None:
        """Run the handlers as the bind says."""
        if self.fan_out == "sequential":
            for terminal in self._terminals:
                await terminal(context)
        elif self.fan_out == "collect":
            await self._collect(context)
        else:
            await self._concurrent(context)

    async def _collect(self, context: Context) -> None:
        errors: list[Exception] = []
        for terminal in self._terminals:
            try:
                await terminal(context)
            except Exception as error:  # noqa: BLE001 - raised with the others
                errors.append(error)
        if errors:
            try:
                raise ExceptionGroup(f"{len(errors)} handlers of {self._event_type.__name__} failed", errors)
            finally:
                # The group's traceback holds this frame: without this, a cycle keeps the context alive.
                del errors

    async def _concurrent(self, context: Context) -> None:
        import anyio

        if context.unit.resource is not None and not self._own_scopes:
            raise ConfigurationError(
                f"{self._event_type.__name__} has concurrent handlers and was emitted inside a transaction: "
                f"{_SHARED_SESSION}. {_SHARED_SESSION_FIX}"
            )
        async with anyio.create_task_group() as tasks:
            for terminal in self._terminals:
                tasks.start_soon(_awaited, terminal, context)

    def _with_own_scope(self, call: _Call) -> Terminal:
        if not call.needs_scope:
            return call.terminal

        async def run(context: Context) -> Any:
            alone = context.alone()
            # What the handler sends must not join the message whose transaction it does not share.
            token = AMBIENT.set(alone)
            try:
                return await attempt(alone, call.terminal)
            finally:
                AMBIENT.reset(token)

        return run


_SHARED_SESSION = "concurrent handlers would use one session at the same time"
_SHARED_SESSION_FIX = 'Bind them with scope_per_handler=True, or with fan_out="sequential".'


def _in_turn(calls: list[Callable[[Any], Awaitable[Any]]]) -> Callable[[Any], Awaitable[Any]]:
    if len(calls) == 1:
        return calls[0]

    async def run(argument: Any) -> None:
        for call in calls:
            await call(argument)

    return run


def _made_in_turn(factories: list[Callable[[], Any]]) -> Direct:
    """The same for handlers that are all made without a scope: one call less for each."""

    async def run(message: Any) -> None:
        for make in factories:
            await make().handle(message)

    return run


async def _handle_awaited(made: Awaitable[Any], context: Context) -> Any:
    return await (await made).handle(context.message)


async def _awaited(terminal: Terminal, context: Context) -> None:
    await terminal(context)


async def _in_thread(call: Callable[[], Any]) -> Any:
    """Never abandoned: a thread cannot be stopped, and what it does must not outlive its transaction."""
    import anyio.lowlevel
    import anyio.to_thread

    outcome: list[Any] = []
    await finish(anyio.to_thread.run_sync(_call_into, outcome, call), seconds=math.inf)
    result, error = outcome
    outcome.clear()
    if error is not None:
        try:
            raise error
        finally:
            # Its traceback holds this frame: without this, a cycle keeps the context alive.
            del error
    if inspect.isawaitable(result):
        return await result
    # Who was cancelled meanwhile must not go on to commit.
    await anyio.lowlevel.checkpoint_if_cancelled()
    return result


def _call_into(outcome: list[Any], call: Callable[[], Any]) -> None:
    """Put what the call returns, or what it raises, into the list.

    What a thread returns or raises itself, asyncio and trio keep in a cycle with an error's traceback, and with it the
    context. Nor does trio take a coroutine from a thread, which a decorated async function gives.
    """
    try:
        outcome += call(), None
    except BaseException as error:  # noqa: BLE001 - raised by who awaits the thread
        outcome += None, error


async def _hand_over(items: Any, context: Context) -> None:
    import anyio

    sink, unit = context.sink, context.unit
    if inspect.isawaitable(items):
        items = await items
    try:
        async for item in items:
            unit.handed_over = True
            await sink(item)
    finally:
        close = getattr(items, "aclose", None)
        if close is not None:
            # In this very task: a context variable that the generator has set can be reset nowhere else.
            with anyio.move_on_after(CLOSE_SECONDS, shield=True):
                await close()


class _Turns:
    """Lets a handler that collects events in a property (Diator's way of emitting) work for one attempt at a time.

    One that lives longer than a message would mix the events of concurrent messages, and emit those of a failed one.
    Handlers that emit by their context do not wait for each other.
    """

    def __init__(self) -> None:
        self._at_work: dict[int, tuple[Unit, anyio.Event]] = {}

    async def collect(self, handler: Any, context: Context, work: Callable[[], Awaitable[Any]]) -> Any:
        """Do the work of this handler, then queue what it collected, first in first out."""
        import anyio

        unit, left = context.unit, anyio.Event()
        while (at_work := self._at_work.get(id(handler))) is not None and at_work[0] is not unit:
            await at_work[1].wait()
        joined = at_work is not None
        if not joined:
            self._at_work[id(handler)] = unit, left
        try:
            result = await work()
            for event in _take_events(handler):
                context.emit(event)
        finally:
            _take_events(handler)
            if not joined:
                del self._at_work[id(handler)]
                left.set()
        return result


def _take_events(handler: Any) -> list[Any]:
    """What the handler collected; it is emptied, because an object may live longer than a message."""
    events = handler.events
    taken = list(events)
    if isinstance(events, MutableSequence):
        events.clear()
    return taken


def _no_handler(message_type: type, requests: RequestMap) -> HandlerNotFoundError:
    names = {bound.__name__: bound for bound in requests}
    nearest = difflib.get_close_matches(message_type.__name__, names, n=2)
    base = next((bound for bound in requests if issubclass(message_type, bound)), None)
    if base is not None:
        problem = f"no handler is bound to it; one is bound to its base {base.__name__}, but a request needs its own."
    else:
        problem = "no handler is bound to it. Bind one with RequestMap.bind before the Mediator is made."
    return HandlerNotFoundError(message_type, problem, nearest)
