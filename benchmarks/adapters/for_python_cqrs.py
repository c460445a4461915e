"""python-cqrs 5: a fork of diator. It resolves the handler and wraps the middlewares for each message."""

# The libraries that are compared with are mostly untyped, and need not be installed.
# pyright: basic, reportMissingImports=false

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import cqrs
from cqrs.bootstrap.requests import bootstrap
from cqrs.container.scope import ScopeStrategy
from cqrs.events import EventEmitter
from cqrs.middlewares import MiddlewareChain

from benchmarks.work import ANY, COUNT, NOTE, ORDER, Subject, classes, copies


class PlaceOrder(cqrs.Request):
    order: int
    note: str


class OrderPlaced(cqrs.DomainEvent):
    order: int
    note: str


class Placed(cqrs.Response):
    """Its logging asks the result for its fields."""


PLACED = Placed()


class Handler(cqrs.RequestHandler[PlaceOrder]):
    async def handle(self, request: PlaceOrder) -> Placed:
        COUNT[0] += 1
        return PLACED


class Session:
    """What lives as long as one message."""


class ScopedHandler(cqrs.RequestHandler[PlaceOrder]):
    def __init__(self, session: Session) -> None:
        self.session = session

    async def handle(self, request: PlaceOrder) -> Placed:
        COUNT[0] += 1
        return PLACED


async def on_event(self: object, event: OrderPlaced) -> None:
    COUNT[0] += 1


async def pass_on(request: Any, handle: Any) -> Any:
    return await handle(request)


async def pass_on_method(self: object, request: Any, handle: Any) -> Any:
    return await handle(request)


def place_order() -> PlaceOrder:
    return PlaceOrder(order=ORDER, note=NOTE)


class Adapter:
    def bare(self) -> Subject:
        return Subject(call=Handler().handle, message=place_order(), steps=(Handler.handle,), result=PLACED)

    def send(self) -> Subject:
        return self._send(Handler)

    def send_new(self) -> Subject:
        subject = self._send(Handler)
        return Subject(
            call=subject.call,
            message=subject.message,
            steps=subject.steps,
            result=subject.result,
            new_message=place_order,
        )

    def functions(self) -> Subject:
        middlewares = copies(pass_on, 5)
        return self._send(Handler, middlewares, middlewares)

    def objects(self) -> Subject:
        made = classes("PassOn", pass_on_method, 5, called="__call__")
        return self._send(Handler, [one() for one in made], [one.__call__ for one in made])

    def emit_1(self) -> Subject:
        return self._emit(1)

    def emit_10(self) -> Subject:
        return self._emit(10)

    def _send(self, handler: Any, middlewares: Sequence[Any] = (), steps: Sequence[Any] = ()) -> Subject:
        mediator = self.mediator(handler, list(middlewares))
        return Subject(call=mediator.send, message=place_order(), steps=(*steps, handler.handle), result=PLACED)

    def _emit(self, number: int) -> Subject:
        handlers = classes("OnOrderPlaced", on_event, number, cqrs.EventHandler)
        events = cqrs.EventMap()
        for one in handlers:
            events.bind(OrderPlaced, one)
        return Subject(
            call=self.emitting(events),
            message=OrderPlaced(order=ORDER, note=NOTE),
            steps=tuple(one.handle for one in handlers),
            handled=number,
            result=ANY,
        )

    def mediator(self, handler: Any, middlewares: list[Any]) -> Any:
        raise NotImplementedError

    def emitting(self, events: Any) -> Any:
        raise NotImplementedError


class Bootstrap(Adapter):
    """As its README has it: handlers through di, its own logging, and its logger at DEBUG as the import leaves it."""

    def mediator(self, handler: Any, middlewares: list[Any]) -> Any:
        import di

        return bootstrap(
            di_container=di.Container(),
            commands_mapper=lambda requests: requests.bind(PlaceOrder, handler),
            middlewares=middlewares,
        )

    def emitting(self, events: Any) -> Any:
        import di

        container = cqrs.DIContainer()
        container.attach_external_container(di.Container())
        return EventEmitter(events, container).emit


class Calling:
    """The least that its container protocol allows."""

    external_container = None

    def attach_external_container(self, container: object) -> None: ...

    async def resolve(self, type_: Any) -> Any:
        return type_()


class Cheapest(Adapter):
    """Mediators by hand, without its logging middleware, and without the DEBUG level that the import sets."""

    def __init__(self) -> None:
        logging.getLogger("cqrs").setLevel(logging.WARNING)

    def mediator(self, handler: Any, middlewares: list[Any]) -> Any:
        return by_hand(Calling(), handler, middlewares)

    def emitting(self, events: Any) -> Any:
        return cqrs.EventMediator(event_map=events, container=Calling()).send


class ScopedByDi:
    """bootstrap with a di scope for each message."""

    def bare(self) -> Subject:
        return Cheapest().bare()

    def scope(self) -> Subject:
        import di

        mediator = bootstrap(
            di_container=di.Container(),
            commands_mapper=lambda requests: requests.bind(PlaceOrder, ScopedHandler),
            scope_strategy=ScopeStrategy.SEND,
        )
        return Subject(call=mediator.send, message=place_order(), steps=(ScopedHandler.handle,), result=PLACED)


class ScopedByDishka:
    """A dishka scope for each message, and nothing that can be left out."""

    def bare(self) -> Subject:
        return Cheapest().bare()

    def scope(self) -> Subject:
        from cqrs.container.dishka import DishkaCQRSContainer
        from dishka import Provider, Scope, make_async_container

        provider = Provider(scope=Scope.REQUEST)
        provider.provide(Session)
        provider.provide(ScopedHandler)
        container = DishkaCQRSContainer(make_async_container(provider))
        mediator = by_hand(container, ScopedHandler, [], ScopeStrategy.SEND)
        return Subject(call=mediator.send, message=place_order(), steps=(ScopedHandler.handle,), result=PLACED)


def by_hand(container: Any, handler: Any, middlewares: list[Any], scopes: ScopeStrategy = ScopeStrategy.NONE) -> Any:
    requests = cqrs.RequestMap()
    requests.bind(PlaceOrder, handler)
    chain = MiddlewareChain()
    for one in middlewares:
        chain.add(one)
    return cqrs.RequestMediator(
        request_map=requests, container=container, middleware_chain=chain, scope_strategy=scopes
    )


SETUPS = {"bootstrap": Bootstrap, "cheapest": Cheapest, "di": ScopedByDi, "dishka": ScopedByDishka}
