"""Import, build a mediator, send one message."""

# Most libraries are untyped, and need not be installed.
# pyright: basic, reportMissingImports=false

import asyncio
from dataclasses import dataclass

from mediatorx import ICommand, Mediator


@dataclass(frozen=True)
class PlaceOrder(ICommand[int]):
    order: int


class Handler:
    async def handle(self, command: PlaceOrder) -> int:
        return command.order


mediator = Mediator().register(PlaceOrder, Handler)
answer = asyncio.run(mediator.send(PlaceOrder(7)))
