"""Import, build a mediator over rodi, send one message."""

# Most libraries are untyped, and need not be installed.
# pyright: basic, reportMissingImports=false, reportArgumentType=false

import asyncio
from dataclasses import dataclass

import rodi
from diator.container.rodi import RodiContainer
from diator.mediator import Mediator
from diator.requests import Request, RequestMap


@dataclass(frozen=True, kw_only=True)
class PlaceOrder(Request):
    order: int


class Handler:
    events = ()

    async def handle(self, request: PlaceOrder) -> int:
        return request.order


services = rodi.Container()
services.add_transient(Handler)
container = RodiContainer()
container.attach_external_container(services)
requests = RequestMap()
requests.bind(PlaceOrder, Handler)
mediator = Mediator(requests, container)
answer = asyncio.run(mediator.send(PlaceOrder(order=7)))
