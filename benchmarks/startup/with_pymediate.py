"""Import, build a mediator, send one message."""

# Most libraries are untyped, and need not be installed.
# pyright: basic, reportMissingImports=false

import asyncio
from dataclasses import dataclass

from pymediate import Mediator, Request, RequestHandler, Services


@dataclass(frozen=True)
class PlaceOrder(Request[int]):
    order: int


class Handler(RequestHandler[PlaceOrder]):
    async def __call__(self, request: PlaceOrder) -> int:
        return request.order


answer = asyncio.run(Mediator(Services(Handler())).send(PlaceOrder(7)))
