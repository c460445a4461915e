"""Import, build a mediator over di, send one message."""

# Most libraries are untyped, and need not be installed.
# pyright: basic, reportMissingImports=false

import asyncio

import cqrs
import di
from cqrs.bootstrap.requests import bootstrap


class PlaceOrder(cqrs.Request):
    order: int


class Placed(cqrs.Response):
    order: int


class Handler(cqrs.RequestHandler[PlaceOrder]):
    async def handle(self, request: PlaceOrder) -> Placed:
        return Placed(order=request.order)


mediator = bootstrap(di_container=di.Container(), commands_mapper=lambda requests: requests.bind(PlaceOrder, Handler))
answer = asyncio.run(mediator.send(PlaceOrder(order=7))).order
