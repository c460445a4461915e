"""Import, register a handler, send one message."""

# Most libraries are untyped, and need not be installed.
# pyright: basic, reportMissingImports=false, reportArgumentType=false

import asyncio
from dataclasses import dataclass

from mediatr import Mediator


@dataclass(frozen=True)
class PlaceOrder:
    order: int


@Mediator.handler
class Handler:
    async def handle(self, request: PlaceOrder) -> int:
        return request.order


answer = asyncio.run(Mediator().send_async(PlaceOrder(7)))
