"""Import, build a mediator, send one message."""

import asyncio
from dataclasses import dataclass

from pipeline_mediator import Command, Mediator, RequestMap


@dataclass(frozen=True)
class PlaceOrder(Command[int]):
    order: int


class Handler:
    async def handle(self, message: PlaceOrder) -> int:
        return message.order


mediator = Mediator(RequestMap().bind(PlaceOrder, Handler))
answer = asyncio.run(mediator.send(PlaceOrder(7)))
