"""The service over HTTP: each route turns a request into a message, and an error into a status."""

from collections.abc import AsyncIterator
from http import HTTPStatus
from typing import TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Lifespan, Receive, Scope, Send

from pipeline_mediator import Mediator, Stream
from pipeline_mediator.errors import CommitOutcomeUnknownError, InvalidMessageError

from .errors import OrderNotFoundError, OrderRefusedError
from .mediator import MAY_PASS
from .messages import CancelOrder, ExportedOrder, ExportOrders, GetOrder, PlaceOrder

__all__ = ["create_web"]

M = TypeVar("M")

MAX_BODY = 64 * 1024

STATUS: dict[type[Exception], HTTPStatus] = {
    msgspec.DecodeError: HTTPStatus.BAD_REQUEST,
    msgspec.ValidationError: HTTPStatus.UNPROCESSABLE_ENTITY,
    InvalidMessageError: HTTPStatus.UNPROCESSABLE_ENTITY,
    OrderNotFoundError: HTTPStatus.NOT_FOUND,
    OrderRefusedError: HTTPStatus.CONFLICT,
    # Whatever became of the order, its reference makes it safe to send it again.
    **dict.fromkeys((*MAY_PASS, TimeoutError, CommitOutcomeUnknownError), HTTPStatus.SERVICE_UNAVAILABLE),
}


def create_web(mediator: Mediator, lifespan: Lifespan[Starlette] | None = None) -> Starlette:
    """The routes over this mediator."""

    async def place_order(request: Request) -> Response:
        command = msgspec.json.decode(await _body(request), type=PlaceOrder)
        receipt = await mediator.send(command)
        return _json(receipt, 201, {"Location": f"/orders/{receipt.order_id}"})

    async def get_order(request: Request) -> Response:
        return _json(await mediator.send(_from_path(GetOrder, request)))

    async def cancel_order(request: Request) -> Response:
        await mediator.send(_from_path(CancelOrder, request))
        return Response(status_code=204)

    async def export_orders(_request: Request) -> Response:
        return CsvResponse(mediator.stream(ExportOrders()))

    return Starlette(
        routes=[
            Route("/orders", place_order, methods=["POST"]),
            Route("/orders/{order_id}", get_order, methods=["GET"]),
            Route("/orders/{order_id}/cancel", cancel_order, methods=["POST"]),
            Route("/orders.csv", export_orders, methods=["GET"]),
        ],
        exception_handlers=dict.fromkeys(STATUS, _explain),
        lifespan=lifespan,
    )


class CsvResponse(StreamingResponse):
    """Opens the stream in the task that sends it, so that a client who leaves ends the query and its transaction."""

    def __init__(self, orders: Stream[ExportedOrder]) -> None:
        super().__init__(iter(()), media_type="text/csv")
        self._orders = orders

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send row by row."""
        async with self._orders:
            self.body_iterator = _csv(self._orders)
            await super().__call__(scope, receive, send)


async def _csv(orders: Stream[ExportedOrder]) -> AsyncIterator[str]:
    yield ",".join(ExportedOrder.__dataclass_fields__) + "\r\n"
    async for order in orders:
        # No field can hold a comma or a quote: references are checked by validation.
        yield f"{order.order_id},{order.customer_id},{order.reference},{order.status},{order.total_cents}\r\n"


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY:
            raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the limit is {MAX_BODY} bytes")
    return bytes(body)


def _from_path(message_type: type[M], request: Request) -> M:
    return msgspec.convert(request.path_params, message_type, strict=False)


def _json(answer: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(answer), status, headers, media_type="application/json")


async def _explain(_request: Request, error: Exception) -> Response:
    status = next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)
    detail = status.phrase if status is HTTPStatus.SERVICE_UNAVAILABLE else str(error)
    return _json({"error": type(error).__name__, "detail": detail}, status)
