"""diator 0.1: the seed of this library. It resolves the handler and wraps the middlewares for each message."""

# The libraries that are compared with are mostly untyped, and need not be installed.
# pyright: basic, reportMissingImports=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diator.events import DomainEvent, EventEmitter, EventMap
from diator.mediator import Mediator
from diator.middlewares import MiddlewareChain
from diator.requests import Request, RequestMap

from benchmarks.work import COUNT, NOTE, ORDER, RESULT, Subject, classes, copies


@dataclass(frozen=True, kw_only=True)
class PlaceOrder(Request):
    order: int
    note: str


@dataclass(frozen=True, kw_only=True)
class OrderPlaced(DomainEvent):
    order: int
    note: str


class Handler:
    events = ()

    async def handle(self, request: PlaceOrder) -> object:
        COUNT[0] += 1
        return RESULT


async def on_event(self: object, event: OrderPlaced) -> None:
    COUNT[0] += 1


async def pass_on(request: Any, handle: Any) -> Any:
    return await handle(request)


async def pass_on_method(self: object, request: Any, handle: Any) -> Any:
    return await handle(request)


def place_order() -> PlaceOrder:
    return PlaceOrder(order=ORDER, note=NOTE)


class Cheapest:
    """The least that its container protocol allows."""

    async def resolve(self, wanted: Any) -> Any:
        return wanted()


def rodi_container(handlers: list[Any]) -> Any:
    import rodi
    from diator.container.rodi import RodiContainer

    services = rodi.Container()
    for one in handlers:
        services.add_transient(one)
    container = RodiContainer()
    container.attach_external_container(services)
    return container


def di_container(handlers: list[Any]) -> Any:
    import di
    from di import bind_by_type
    from di.dependent import Dependent
    from diator.container.di import DIContainer

    services = di.Container()
    for one in handlers:
        services.bind(bind_by_type(Dependent(one, scope="request"), one))
    container = DIContainer()
    container.attach_external_container(services)
    return container


class Adapter:
    def __init__(self, container: Any) -> None:
        self._container = container

    def bare(self) -> Subject:
        return Subject(call=Handler().handle, message=place_order(), steps=(Handler.handle,))

    def send(self) -> Subject:
        return self._send()

    def send_new(self) -> Subject:
        subject = self._send()
        return Subject(call=subject.call, message=subject.message, steps=subject.steps, new_message=place_order)

    def functions(self) -> Subject:
        middlewares = copies(pass_on, 5)
        return self._send(middlewares, middlewares)

    def objects(self) -> Subject:
        made = classes("PassOn", pass_on_method, 5, called="__call__")
        return self._send([one() for one in made], [one.__call__ for one in made])

    def emit_1(self) -> Subject:
        return self._emit(1)

    def emit_10(self) -> Subject:
        return self._emit(10)

    def _send(self, middlewares: list[Any] | None = None, steps: list[Any] | None = None) -> Subject:
        requests = RequestMap()
        requests.bind(PlaceOrder, Handler)
        chain = MiddlewareChain()
        for one in middlewares or []:
            chain.add(one)
        mediator = Mediator(requests, self._container([Handler]), middleware_chain=chain)
        return Subject(call=mediator.send, message=place_order(), steps=(*(steps or []), Handler.handle))

    def _emit(self, number: int) -> Subject:
        handlers = classes("OnOrderPlaced", on_event, number)
        events = EventMap()
        for one in handlers:
            events.bind(OrderPlaced, one)
        return Subject(
            call=EventEmitter(events, self._container(handlers)).emit,
            message=OrderPlaced(order=ORDER, note=NOTE),
            steps=tuple(one.handle for one in handlers),
            handled=number,
            result=None,
        )


SETUPS = {
    "rodi": lambda: Adapter(rodi_container),
    "di": lambda: Adapter(di_container),
    "cheapest": lambda: Adapter(lambda handlers: Cheapest()),
}
