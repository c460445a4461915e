"""This library, in the ways that others are compared with."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.work import ANY, COUNT, NOTE, ORDER, RESULT, AdapterError, Subject, classes, copies
from pipeline_mediator import Command, Context, DomainEvent, EventMap, Mediator, Middleware, Next, RequestMap
from pipeline_mediator.container import Container, PlainContainer
from pipeline_mediator.middlewares import (
    LoggingMiddleware,
    MetricsMiddleware,
    RetryMiddleware,
    TimeoutMiddleware,
    TracingMiddleware,
    TransactionMiddleware,
    ValidationMiddleware,
)

if TYPE_CHECKING:
    from dishka import AsyncContainer


@dataclass(frozen=True)
class PlaceOrder(Command[object]):
    order: int
    note: str


@dataclass(frozen=True)
class OrderPlaced(DomainEvent):
    order: int
    note: str


class Handler:
    async def handle(self, message: PlaceOrder) -> object:
        COUNT[0] += 1
        return RESULT


class ContextHandler:
    async def handle(self, message: PlaceOrder, context: Context) -> object:
        COUNT[0] += 1
        return RESULT


class Session:
    """What lives as long as one message."""


class ScopedHandler:
    def __init__(self, session: Session) -> None:
        self.session = session

    async def handle(self, message: PlaceOrder) -> object:
        COUNT[0] += 1
        return RESULT


async def on_event(self: object, event: OrderPlaced) -> None:
    COUNT[0] += 1


async def pass_on(context: Context, call_next: Next) -> Any:
    return await call_next(context)


async def pass_on_method(self: object, context: Context, call_next: Next) -> Any:
    return await call_next(context)


def place_order() -> PlaceOrder:
    return PlaceOrder(ORDER, NOTE)


def bare() -> Subject:
    return Subject(call=Handler().handle, message=place_order(), steps=(Handler.handle,))


class Handlers:
    """Handlers without dependencies: as classes, made for each message, or as objects, made once."""

    def __init__(self, *, objects: bool) -> None:
        self._objects = objects

    def bare(self) -> Subject:
        return bare()

    def send(self) -> Subject:
        return self._send(Handler)

    def send_context(self) -> Subject:
        return self._send(ContextHandler)

    def send_new(self) -> Subject:
        subject = self._send(Handler)
        return Subject(call=subject.call, message=subject.message, steps=subject.steps, new_message=place_order)

    def functions(self) -> Subject:
        middlewares = copies(pass_on, 5)
        return self._send(Handler, middlewares, steps=middlewares)

    def objects(self) -> Subject:
        made = classes("PassOn", pass_on_method, 5, called="__call__")
        return self._send(Handler, [one() for one in made], steps=[one.__call__ for one in made])

    def emit_1(self) -> Subject:
        return self._emit(1)

    def emit_10(self) -> Subject:
        return self._emit(10)

    def _send(
        self, handler: Any, middlewares: list[Middleware] | None = None, *, steps: list[Any] | None = None
    ) -> Subject:
        requests = RequestMap().bind(PlaceOrder, handler() if self._objects else handler)
        mediator = Mediator(requests, middlewares=middlewares or [])
        return Subject(call=mediator.send, message=place_order(), steps=(*(steps or []), handler.handle))

    def _emit(self, number: int) -> Subject:
        made = classes("OnOrderPlaced", on_event, number)
        events = EventMap().bind(OrderPlaced, *((one() for one in made) if self._objects else made))
        return Subject(
            call=Mediator(event_map=events).emit,
            message=OrderPlaced(ORDER, NOTE),
            steps=tuple(one.handle for one in made),
            handled=number,
            result=None,
        )


class Scoped:
    """A handler with a dependency that lives as long as the message, over one container; and that container alone."""

    def bare(self) -> Subject:
        return bare()

    def scope(self) -> Subject:
        mediator = Mediator(RequestMap().bind(PlaceOrder, ScopedHandler), self.container())
        return Subject(call=mediator.send, message=place_order(), steps=(ScopedHandler.handle,))

    def container(self) -> Container:
        raise NotImplementedError


class Plain(Scoped):
    def container(self) -> Container:
        return PlainContainer(Session)


class Rodi(Scoped):
    def container(self) -> Container:
        import rodi

        from pipeline_mediator.container.rodi import RodiContainer

        services: Any = rodi.Container()  # its methods are only half annotated
        services.add_scoped(Session)
        return RodiContainer(services)

    def scope_alone(self) -> Subject:
        import rodi

        services: Any = rodi.Container()
        services.add_scoped(Session)
        services.add_transient(ScopedHandler)
        provider = services.build_provider()

        def resolve(_: object) -> object:
            scope = provider.create_scope()
            handler = scope.get(ScopedHandler)
            scope.dispose()
            return handler

        return Subject(call=resolve, message=place_order(), handled=0, result=ANY, awaited=False)


class Dishka(Scoped):
    def container(self) -> Container:
        from pipeline_mediator.container.dishka import DishkaContainer

        return DishkaContainer(self._dishka())

    def scope_alone(self) -> Subject:
        container = self._dishka()

        async def resolve(_: object) -> object:
            async with container() as scope:
                return await scope.get(ScopedHandler)

        return Subject(call=resolve, message=place_order(), handled=0, result=ANY)

    def _dishka(self) -> AsyncContainer:
        from dishka import Provider, Scope, make_async_container

        provider = Provider(scope=Scope.REQUEST)
        provider.provide(Session)
        provider.provide(ScopedHandler)
        return make_async_container(provider)


class Di(Scoped):
    def container(self) -> Container:
        import di

        from pipeline_mediator.container.di import DIContainer

        return DIContainer(di.Container())


FIRST, SECOND = copies(pass_on, 2)


class BuiltIn:
    """One built-in middleware behind a pass-through function, so that the first price of a chain is paid already."""

    def bare(self) -> Subject:
        return bare()

    def passed_on(self) -> Subject:
        return self._send()

    def another(self) -> Subject:
        return self._send(SECOND, roles=[None])

    def retry(self) -> Subject:
        return self._send(RetryMiddleware(attempts=3), roles=["retry"])

    def timeout(self) -> Subject:
        return self._send(TimeoutMiddleware(), roles=[])

    def logging(self) -> Subject:
        return self._send(LoggingMiddleware(), roles=["logging"])

    def tracing(self) -> Subject:
        return self._send(TracingMiddleware(), roles=["tracing"])

    def metrics(self) -> Subject:
        return self._send(MetricsMiddleware(), roles=["metrics"])

    def validation(self) -> Subject:
        return self._send(ValidationMiddleware({PlaceOrder: accept}), roles=["validation"])

    def transaction(self) -> Subject:
        return self._send(TransactionMiddleware(no_transaction), roles=["transaction"])

    def all(self) -> Subject:
        return self._send(
            TracingMiddleware(),
            MetricsMiddleware(),
            LoggingMiddleware(),
            ValidationMiddleware({PlaceOrder: accept}),
            RetryMiddleware(attempts=3),
            TimeoutMiddleware(),
            TransactionMiddleware(no_transaction),
            roles=["tracing", "metrics", "logging", "validation", "retry", "transaction"],
        )

    def _send(self, *middlewares: Middleware, roles: Sequence[str | None] = ()) -> Subject:
        mediator = Mediator(RequestMap().bind(PlaceOrder, Handler), middlewares=[FIRST, *middlewares])
        (chain,) = json.loads(mediator.describe(PlaceOrder, format="json"))
        standing = [link["role"] for link in chain["links"]]
        if standing != [None, *roles, "handle"]:
            raise AdapterError(f"in the chain stand {standing}, not {list(roles)}")
        passed_on = [one for one in (FIRST, *middlewares) if one in {FIRST, SECOND}]
        return Subject(call=mediator.send, message=place_order(), steps=(*passed_on, Handler.handle))


def accept(message: PlaceOrder) -> None:
    """A validator that has nothing against it."""


@asynccontextmanager
async def no_transaction() -> AsyncGenerator[Session]:
    yield Session()


SETUPS = {
    "class": lambda: Handlers(objects=False),
    "object": lambda: Handlers(objects=True),
    "plain": Plain,
    "rodi": Rodi,
    "dishka": Dishka,
    "di": Di,
    "built-in": BuiltIn,
}
