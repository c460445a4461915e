"""pymediate 0.10: handler objects; behaviors are composed for each message, handlers of events run in tasks."""

# The libraries that are compared with are mostly untyped, and need not be installed.
# pyright: basic, reportMissingImports=false

# No `from __future__ import annotations`: the library reads annotations as they stand.

from dataclasses import dataclass
from typing import Any

from pymediate import Mediator, Notification, NotificationHandler, PipelineBehavior, Request, RequestHandler, Services

from benchmarks.work import COUNT, NOTE, ORDER, RESULT, Subject, classes


@dataclass(frozen=True)
class PlaceOrder(Request[tuple[str]]):
    order: int
    note: str


class Handler(RequestHandler[PlaceOrder]):
    async def __call__(self, request: PlaceOrder) -> tuple[str]:
        COUNT[0] += 1
        return RESULT


async def pass_on(self: object, request: Any, next: Any) -> Any:  # noqa: A002 - the library's name
    return await next()


def place_order() -> PlaceOrder:
    return PlaceOrder(ORDER, NOTE)


class Adapter:
    def bare(self) -> Subject:
        return Subject(call=Handler().__call__, message=place_order(), steps=(Handler.__call__,))

    def send(self) -> Subject:
        return self._send([])

    def send_new(self) -> Subject:
        subject = self._send([])
        return Subject(call=subject.call, message=subject.message, steps=subject.steps, new_message=place_order)

    def objects(self) -> Subject:
        return self._send(classes("PassOn", pass_on, 5, PipelineBehavior[Request[Any]], called="__call__"))

    def emit_1(self) -> Subject:
        return self._emit(1)

    def emit_10(self) -> Subject:
        return self._emit(10)

    def _send(self, behaviors: list[Any]) -> Subject:
        services = Services(Handler(), *(one() for one in behaviors))
        steps = (*(one.__call__ for one in behaviors), Handler.__call__)
        return Subject(call=Mediator(services, behaviors=behaviors).send, message=place_order(), steps=steps)

    def _emit(self, number: int) -> Subject:
        # Handlers are registered with the event's class, for good: each row has an event of its own.
        @dataclass(frozen=True)
        class OrderPlaced(Notification):
            order: int
            note: str

        async def on_event(self: object, notification: OrderPlaced) -> None:
            COUNT[0] += 1

        handlers = classes("OnOrderPlaced", on_event, number, NotificationHandler[OrderPlaced], called="__call__")
        return Subject(
            call=Mediator(Services(*(one() for one in handlers))).publish,
            message=OrderPlaced(ORDER, NOTE),
            steps=tuple(one.__call__ for one in handlers),
            handled=number,
            result=None,
        )


SETUPS = {"object": Adapter}
