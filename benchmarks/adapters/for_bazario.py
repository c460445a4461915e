"""bazario 0.4: handlers and behaviors come from a resolver, behaviors are wrapped for each message."""

# The libraries that are compared with are mostly untyped, and need not be installed.
# pyright: basic, reportMissingImports=false

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from bazario import Notification, Request
from bazario.asyncio import Dispatcher, NotificationHandler, PipelineBehavior, Registry, RequestHandler, Resolver

from benchmarks.work import COUNT, NOTE, ORDER, RESULT, Subject, classes


@dataclass(frozen=True)
class PlaceOrder(Request[object]):
    order: int
    note: str


@dataclass(frozen=True)
class OrderPlaced(Notification):
    order: int
    note: str


class Handler(RequestHandler[PlaceOrder, object]):
    async def handle(self, request: PlaceOrder) -> object:
        COUNT[0] += 1
        return RESULT


class Session:
    """What lives as long as one message."""


class ScopedHandler(RequestHandler[PlaceOrder, object]):
    def __init__(self, session: Session) -> None:
        self.session = session

    async def handle(self, request: PlaceOrder) -> object:
        COUNT[0] += 1
        return RESULT


async def on_event(self: object, notification: OrderPlaced) -> None:
    COUNT[0] += 1


async def pass_on(self: object, request: Any, handle_next: Any) -> Any:
    return await handle_next(request)


def place_order() -> PlaceOrder:
    return PlaceOrder(ORDER, NOTE)


class Calling(Resolver):
    """The least that its resolver protocol allows."""

    async def resolve(self, dependency_type: Any) -> Any:
        return dependency_type()


class Adapter:
    def bare(self) -> Subject:
        return Subject(call=Handler().handle, message=place_order(), steps=(Handler.handle,))

    def send(self) -> Subject:
        return self._send(Handler)

    def send_new(self) -> Subject:
        subject = self._send(Handler)
        return Subject(call=subject.call, message=subject.message, steps=subject.steps, new_message=place_order)

    def objects(self) -> Subject:
        return self._send(Handler, classes("PassOn", pass_on, 5, PipelineBehavior))

    def emit_1(self) -> Subject:
        return self._emit(1)

    def emit_10(self) -> Subject:
        return self._emit(10)

    def _send(self, handler: Any, behaviors: Iterable[Any] = ()) -> Subject:
        registry = Registry()
        registry.add_request_handler(PlaceOrder, handler)
        # What was registered first runs innermost.
        registry.add_pipeline_behaviors(PlaceOrder, *reversed(list(behaviors)))
        call = self.way_in(registry, [handler, *behaviors], "send")
        return Subject(call=call, message=place_order(), steps=(*(one.handle for one in behaviors), handler.handle))

    def _emit(self, number: int) -> Subject:
        handlers = classes("OnOrderPlaced", on_event, number, NotificationHandler)
        registry = Registry()
        registry.add_notification_handlers(OrderPlaced, *handlers)
        return Subject(
            call=self.way_in(registry, handlers, "publish"),
            message=OrderPlaced(ORDER, NOTE),
            steps=tuple(one.handle for one in handlers),
            handled=number,
            result=None,
        )

    def way_in(self, registry: Registry, wanted: list[Any], method: str) -> Any:
        return getattr(Dispatcher(Calling(), registry), method)


class Dishka(Adapter):
    """A dishka scope for each message, and the dispatcher out of it."""

    def scope(self) -> Subject:
        return self._send(ScopedHandler)

    def way_in(self, registry: Registry, wanted: list[Any], method: str) -> Any:
        from bazario.asyncio.resolvers.dishka import DishkaResolver
        from dishka import Provider, Scope, make_async_container

        provider = Provider(scope=Scope.REQUEST)
        provider.provide(lambda: registry, provides=Registry, scope=Scope.APP)
        provider.provide(DishkaResolver, provides=Resolver)
        provider.provide(Dispatcher)
        provider.provide(Session)
        for one in wanted:
            provider.provide(one)
        container = make_async_container(provider)

        async def send(message: Any) -> Any:
            async with container() as scope:
                dispatcher = await scope.get(Dispatcher)
                return await getattr(dispatcher, method)(message)

        return send


SETUPS = {"cheapest": Adapter, "dishka": Dishka}
