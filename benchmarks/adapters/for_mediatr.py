"""mediatr 1: handlers and behaviors are registered in the module; a chain is walked by number for each message."""

# The libraries that are compared with are mostly untyped, and need not be installed.
# pyright: basic, reportMissingImports=false

# No `from __future__ import annotations`: the library reads annotations as they stand.

from dataclasses import dataclass
from typing import Any

from mediatr import Mediator, __behaviors__, __handlers__

from benchmarks.work import COUNT, NOTE, ORDER, RESULT, Subject, classes, copies


@dataclass(frozen=True)
class PlaceOrder:
    order: int
    note: str


class Handler:
    async def handle(self, request: PlaceOrder) -> object:
        COUNT[0] += 1
        return RESULT


async def handle(request: PlaceOrder) -> object:
    COUNT[0] += 1
    return RESULT


async def pass_on(request: object, next: Any) -> Any:  # noqa: A002 - the library's name
    return await next()


async def pass_on_method(self: object, request: object, next: Any) -> Any:  # noqa: A002 - likewise
    return await next()


def place_order() -> PlaceOrder:
    return PlaceOrder(ORDER, NOTE)


class Adapter:
    def __init__(self, *, functions: bool) -> None:
        self._handler: Any = handle if functions else Handler
        self._handle = handle if functions else Handler.handle
        if functions:
            self.functions = self._functions
        else:
            self.objects = self._objects

    def bare(self) -> Subject:
        return Subject(call=Handler().handle, message=place_order(), steps=(Handler.handle,))

    def send(self) -> Subject:
        return self._send([], [])

    def send_new(self) -> Subject:
        subject = self._send([], [])
        return Subject(call=subject.call, message=subject.message, steps=subject.steps, new_message=place_order)

    def _functions(self) -> Subject:
        behaviors = copies(pass_on, 5)
        return self._send(behaviors, behaviors)

    def _objects(self) -> Subject:
        behaviors = classes("PassOn", pass_on_method, 5)
        return self._send(behaviors, [one.handle for one in behaviors])

    def _send(self, behaviors: list[Any], steps: list[Any]) -> Subject:
        # They are the module's own, and outlive a mediator; a second handler of a message would be ignored.
        __handlers__.clear()
        __behaviors__.clear()
        mediator = Mediator()
        Mediator.register_handler(self._handler)
        for one in behaviors:
            Mediator.register_behavior(one)
        return Subject(call=mediator.send_async, message=place_order(), steps=(*steps, self._handle))


SETUPS = {"class": lambda: Adapter(functions=False), "function": lambda: Adapter(functions=True)}
