"""mediatorx 1: a dict of handler classes; behaviors are resolved and wrapped for each message."""

# The libraries that are compared with are mostly untyped, and need not be installed.
# pyright: basic, reportMissingImports=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mediatorx import DictResolver, ICommand, INotification, Mediator

from benchmarks.work import COUNT, NOTE, ORDER, RESULT, Subject, classes


@dataclass(frozen=True)
class PlaceOrder(ICommand[object]):
    order: int
    note: str


@dataclass(frozen=True)
class OrderPlaced(INotification):
    order: int
    note: str


class Handler:
    async def handle(self, command: PlaceOrder) -> object:
        COUNT[0] += 1
        return RESULT


async def on_event(self: object, notification: OrderPlaced) -> None:
    COUNT[0] += 1


async def pass_on(self: object, message: Any, next: Any) -> Any:  # noqa: A002 - the library's name
    return await next()


def place_order() -> PlaceOrder:
    return PlaceOrder(ORDER, NOTE)


class Adapter:
    def __init__(self, *, objects: bool) -> None:
        self._objects = objects

    def bare(self) -> Subject:
        return Subject(call=Handler().handle, message=place_order(), steps=(Handler.handle,))

    def send(self) -> Subject:
        return self._send([])

    def send_new(self) -> Subject:
        subject = self._send([])
        return Subject(call=subject.call, message=subject.message, steps=subject.steps, new_message=place_order)

    def objects(self) -> Subject:
        return self._send(classes("PassOn", pass_on, 5))

    def emit_1(self) -> Subject:
        return self._emit(1)

    def emit_10(self) -> Subject:
        return self._emit(10)

    def _send(self, behaviors: list[Any]) -> Subject:
        mediator = self._mediator([Handler, *behaviors])
        mediator.register(PlaceOrder, Handler)
        for one in behaviors:
            mediator.add_behavior(one)
        steps = (*(one.handle for one in behaviors), Handler.handle)
        return Subject(call=mediator.send, message=place_order(), steps=steps)

    def _emit(self, number: int) -> Subject:
        handlers = classes("OnOrderPlaced", on_event, number)
        mediator = self._mediator(handlers)
        for one in handlers:
            mediator.register_notification(OrderPlaced, one)
        return Subject(
            call=mediator.publish,
            message=OrderPlaced(ORDER, NOTE),
            steps=tuple(one.handle for one in handlers),
            handled=number,
            result=None,
        )

    def _mediator(self, wanted: list[Any]) -> Any:
        resolver = DictResolver()
        if self._objects:
            for one in wanted:
                resolver.add_instance(one, one())
        return Mediator(resolver)


SETUPS = {"class": lambda: Adapter(objects=False), "object": lambda: Adapter(objects=True)}
