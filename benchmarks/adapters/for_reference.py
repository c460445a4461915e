"""No library: the least that finds a handler by type and walks middlewares compiled once.

It has no context, no joining, no scope, no errors of its own. What a mediator costs above this is what it offers.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.work import COUNT, NOTE, ORDER, RESULT, Subject, classes, copies


@dataclass(frozen=True)
class PlaceOrder:
    order: int
    note: str


@dataclass(frozen=True)
class OrderPlaced:
    order: int
    note: str


def place_order() -> PlaceOrder:
    return PlaceOrder(ORDER, NOTE)


class Handler:
    async def handle(self, message: PlaceOrder) -> object:
        COUNT[0] += 1
        return RESULT


async def on_event(self: object, event: OrderPlaced) -> None:
    COUNT[0] += 1


async def pass_on(message: Any, call_next: Any) -> Any:
    return await call_next(message)


async def pass_on_method(self: object, message: Any, call_next: Any) -> Any:
    return await call_next(message)


class Reference:
    def __init__(self, handlers: dict[type, list[Any]], middlewares: list[Any]) -> None:
        self.chains = {kind: self.compile(bound, middlewares) for kind, bound in handlers.items()}

    def compile(self, handlers: list[Any], middlewares: list[Any]) -> Callable[[Any], Awaitable[Any]]:
        handler = handlers[0]

        def call(message: Any) -> Any:
            return handler().handle(message)

        async def call_each(message: Any) -> None:
            for one in handlers:
                await one().handle(message)

        chain: Callable[[Any], Any] = call if len(handlers) == 1 else call_each
        for middleware in reversed(middlewares):
            chain = self.link(middleware, chain)
        return chain

    def link(self, middleware: Any, call_next: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return lambda message: middleware(message, call_next)

    async def send(self, message: Any) -> Any:
        return await self.chains[type(message)](message)


class Adapter:
    def bare(self) -> Subject:
        return Subject(call=Handler().handle, message=place_order(), steps=(Handler.handle,))

    def send(self, *middlewares: Any, steps: tuple[Any, ...] = ()) -> Subject:
        mediator = Reference({PlaceOrder: [Handler]}, list(middlewares))
        return Subject(call=mediator.send, message=place_order(), steps=(*steps, Handler.handle))

    def send_new(self) -> Subject:
        mediator = Reference({PlaceOrder: [Handler]}, [])
        return Subject(call=mediator.send, message=place_order(), steps=(Handler.handle,), new_message=place_order)

    def functions(self) -> Subject:
        middlewares = copies(pass_on, 5)
        return self.send(*middlewares, steps=tuple(middlewares))

    def objects(self) -> Subject:
        made = classes("PassOn", pass_on_method, 5, called="__call__")
        return self.send(*(one().__call__ for one in made), steps=tuple(one.__call__ for one in made))

    def emit_1(self) -> Subject:
        return self._emit(1)

    def emit_10(self) -> Subject:
        return self._emit(10)

    def _emit(self, number: int) -> Subject:
        handlers = classes("OnOrderPlaced", on_event, number)
        mediator = Reference({OrderPlaced: handlers}, [])
        steps = tuple(one.handle for one in handlers)
        return Subject(call=mediator.send, message=OrderPlaced(ORDER, NOTE), steps=steps, handled=number, result=None)


SETUPS = {"minimal": Adapter}
