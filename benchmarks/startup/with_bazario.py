"""Import, build a dispatcher with the least resolver, send one message."""

# Most libraries are untyped, and need not be installed.
# pyright: basic, reportMissingImports=false

import asyncio
from dataclasses import dataclass

from bazario import Request
from bazario.asyncio import Dispatcher, Registry, RequestHandler, Resolver


@dataclass(frozen=True)
class PlaceOrder(Request[int]):
    order: int


class Handler(RequestHandler[PlaceOrder, int]):
    async def handle(self, request: PlaceOrder) -> int:
        return request.order


class Calling(Resolver):
    async def resolve(self, dependency_type: type) -> object:
        return dependency_type()


registry = Registry()
registry.add_request_handler(PlaceOrder, Handler)
answer = asyncio.run(Dispatcher(Calling(), registry).send(PlaceOrder(7)))
