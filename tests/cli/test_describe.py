"""What an application's mediator says about itself, from outside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.cli.called import Called

Call = Callable[..., Called]

SHOP = """
    from pipeline_mediator import Command, EventMap, IntegrationEvent, Mediator, Pipeline, RequestMap, message
    from pipeline_mediator.consumer import Consumer
    from pipeline_mediator.message_brokers import MemoryBroker
    from pipeline_mediator.middlewares import PublishMiddleware, TimeoutMiddleware

    print("a line that the application prints when it is imported")

    class PlaceOrder(Command[int]):
        pass

    @message("orders.placed")
    class OrderPlaced(IntegrationEvent):
        pass

    class Old:
        class OrderPlaced(IntegrationEvent):
            pass

    async def place(command: PlaceOrder) -> int:
        return 1

    async def ship(event: OrderPlaced) -> None:
        pass

    async def forget(event: Old.OrderPlaced) -> None:
        pass

    requests = RequestMap().bind(PlaceOrder, place)
    broker = MemoryBroker()
    quiet = Mediator(requests, middlewares=Pipeline(TimeoutMiddleware(5.0)))

    async def create_mediator():
        return Mediator(
            requests,
            event_map=EventMap().bind(OrderPlaced, ship).bind(Old.OrderPlaced, forget),
            middlewares=Pipeline(TimeoutMiddleware(5.0), PublishMiddleware(broker, {OrderPlaced: "orders"})),
        )

    async def create_consumer():
        return Consumer(await create_mediator(), broker.subscribe("orders", name="warehouse"))

    class Nobody:
        pass

    async def place_for(command: PlaceOrder, nobody: Nobody) -> int:
        return 1

    def create_unresolvable():
        return Mediator(RequestMap().bind(PlaceOrder, place_for))
"""


@pytest.fixture
def shop(write: Callable[[str], str]) -> str:
    return write(SHOP)


# -- describe ----------------------------------------------------------------------------------------------------------


def test_every_chain_is_printed(shop: str, call: Call) -> None:
    called = call("describe", f"{shop}:create_mediator")
    assert called.code == 0
    assert "PlaceOrder (request)\n   1  TimeoutMiddleware  5 s\n" in called.out
    assert "PublishMiddleware  MemoryBroker → orders" in called.out


def test_a_consumer_has_a_mediator_too(shop: str, call: Call) -> None:
    assert "OrderPlaced (event from broker)" in call("describe", f"{shop}:create_consumer").out


@pytest.mark.parametrize("options", [["--json"], ["--format", "json"], ["--json", "--format", "text"]])
def test_as_json_it_is_one_document(options: list[str], shop: str, call: Call) -> None:
    called = call("describe", f"{shop}:create_mediator", *options)
    chains: list[dict[str, Any]] = called.document
    assert {"PlaceOrder", "OrderPlaced"} <= {chain["message"] for chain in chains}
    assert "a line that the application prints" in called.err


def test_as_mermaid_it_is_a_flowchart(shop: str, call: Call) -> None:
    out = call("describe", f"{shop}:create_mediator", "--format", "mermaid").out
    assert "flowchart LR\n" in out


@pytest.mark.parametrize("name", ["orders.placed", "{shop}.OrderPlaced"])
def test_one_type_is_named_by_its_class_or_its_name_on_the_wire(name: str, shop: str, call: Call) -> None:
    called = call("describe", f"{shop}:create_mediator", "--type", name.format(shop=shop), "--json")
    assert {chain["message"] for chain in called.document} >= {"OrderPlaced"}
    assert "PlaceOrder" not in {chain["message"] for chain in called.document}


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("PlaceOrders", "no message type 'PlaceOrders' is bound, or has a destination. Did you mean PlaceOrder"),
        ("OrderPlaced", "several message types are called OrderPlaced: {shop}.OrderPlaced, {shop}.Old.OrderPlaced"),
    ],
)
def test_a_type_that_cannot_be_told(name: str, complaint: str, shop: str, call: Call) -> None:
    called = call("describe", f"{shop}:create_mediator", "--type", name)
    assert called.code == 2
    assert complaint.format(shop=shop) in called.err


# -- check -------------------------------------------------------------------------------------------------------------


def test_warnings_are_told(shop: str, call: Call) -> None:
    called = call("check", f"{shop}:create_mediator")
    assert called.code == 0
    assert "MemoryBroker → orders keeps nothing" in called.out

    called = call("check", f"{shop}:create_mediator", "--json", "--strict")
    assert called.code == 1
    assert any("MemoryBroker → orders keeps nothing" in warning for warning in called.document["warnings"])


def test_nothing_to_warn_of(shop: str, call: Call) -> None:
    called = call("check", f"{shop}:quiet", "--strict", "--json")
    assert called.code == 0
    assert called.document == {"warnings": []}
    assert call("check", f"{shop}:quiet").out.endswith("nothing to warn of\n")


def test_what_is_wrong_is_an_error_that_says_who_asked(shop: str, call: Call) -> None:
    called = call("check", f"{shop}:create_unresolvable", "--json")
    assert (called.code, called.out) == (2, "")
    assert "Nobody" in called.err
    assert "place_for(nobody: Nobody) asks for it" in called.err
    assert "Traceback" not in called.err
