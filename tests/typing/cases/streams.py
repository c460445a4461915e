"""What a stream yields."""

from __future__ import annotations

from dataclasses import dataclass
from typing import assert_type

from pipeline_mediator import Mediator, Query, Stream, StreamQuery


@dataclass(frozen=True)
class ExportOrders(StreamQuery[str]):
    prefix: str


@dataclass(frozen=True)
class ListOrders(Query[list[str]]):
    prefix: str


async def items(mediator: Mediator) -> None:
    assert_type(mediator.stream(ExportOrders("a")), Stream[str])
    async with mediator.stream(ExportOrders("a"), headers={"tenant": "acme"}) as orders:
        assert_type(orders, Stream[str])
        async for order in orders:
            assert_type(order, str)
            order.bit_length()  # expect-error
    wider: Stream[object] = mediator.stream(ExportOrders("a"))
    print(wider)

    narrower: Stream[bool] = mediator.stream(ExportOrders("a"))  # expect-error
    mediator.stream(ListOrders("a"))  # expect-error
    mediator.stream(ExportOrders)  # expect-error
    await mediator.stream(ExportOrders("a"))  # expect-error
    print(narrower)
