"""What `describe` and `check` say about a mediator: the chains as they are, and what may surprise."""

import json
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest

from pipeline_mediator import (
    Command,
    Context,
    DomainEvent,
    EventMap,
    IntegrationEvent,
    Mediator,
    Middleware,
    Next,
    Query,
    RequestMap,
    StreamQuery,
    only,
    unless,
)
from pipeline_mediator.errors import ConfigurationError, HandlerNotFoundError, ResolutionError
from pipeline_mediator.message_brokers.protocol import BrokerFeatures
from pipeline_mediator.middlewares.publish import PublishMiddleware
from pipeline_mediator.middlewares.retry import RetryMiddleware
from pipeline_mediator.middlewares.timeout import TimeoutMiddleware
from pipeline_mediator.middlewares.transaction import TransactionMiddleware
from tests.fakes import Broker, Database


@dataclass(frozen=True)
class PlaceOrder(Command[int]):
    sku: str = "book"


@dataclass(frozen=True)
class ShipOrder(Command[None]):
    sku: str = "book"


@dataclass(frozen=True)
class CountOrders(Query[int]):
    sku: str = "book"


@dataclass(frozen=True)
class ExportOrders(StreamQuery[str]):
    prefix: str = "a"


@dataclass(frozen=True)
class StockRanLow(DomainEvent):
    sku: str = "book"


@dataclass(frozen=True)
class OrderPlaced(IntegrationEvent):
    sku: str = "book"


class PlaceOrderHandler:
    async def handle(self, command: PlaceOrder) -> int:
        return 1


def count_orders(query: CountOrders) -> int:
    return 1


async def export_orders(query: ExportOrders) -> AsyncIterator[str]:
    yield ""


async def warn(event: StockRanLow) -> None: ...


async def reorder(event: StockRanLow) -> None: ...


async def ship(event: OrderPlaced) -> None: ...


async def audit(context: Context, call_next: Next) -> Any:
    return await call_next(context)


def shop(**options: Any) -> Mediator:
    stack: list[Middleware] = [
        RetryMiddleware(3),
        unless(StreamQuery, TimeoutMiddleware({Query: 1.5}, default=5)),
        only(Command, audit),
        TransactionMiddleware(Database().begin),
        PublishMiddleware(Broker(), {OrderPlaced: "orders", ShipOrder: "warehouse"}),
    ]
    requests = (
        RequestMap()
        .bind(PlaceOrder, PlaceOrderHandler)
        .bind(CountOrders, count_orders)
        .bind(ExportOrders, export_orders)
    )
    events = EventMap().bind(StockRanLow, warn, reorder).bind(OrderPlaced, ship)
    return Mediator(requests, event_map=events, middlewares=stack, **options)


def test_text_shows_every_chain_as_it_was_compiled() -> None:
    assert (
        shop().describe()
        == """\
PlaceOrder (request)
   1  RetryMiddleware        3 attempts
   2  TimeoutMiddleware      5 s
   3  audit
   4  TransactionMiddleware  Session
   5  HandleMiddleware       PlaceOrderHandler

CountOrders (request)
   1  RetryMiddleware        3 attempts
   2  TimeoutMiddleware      1.5 s
   3  TransactionMiddleware  Session
   4  HandleMiddleware       count_orders

ExportOrders (stream)
   1  RetryMiddleware        3 attempts
   2  TransactionMiddleware  Session
   3  HandleMiddleware       export_orders

StockRanLow (event)
   1  RetryMiddleware        3 attempts
   2  TimeoutMiddleware      5 s
   3  TransactionMiddleware  Session
   4  HandleMiddleware       warn, reorder

OrderPlaced (event to orders)
   1  RetryMiddleware    3 attempts
   2  TimeoutMiddleware  5 s
   3  PublishMiddleware  Broker → orders

OrderPlaced (event from broker)
   1  RetryMiddleware        3 attempts
   2  TimeoutMiddleware      5 s
   3  TransactionMiddleware  Session
   4  HandleMiddleware       ship

ShipOrder (request to warehouse)
   1  RetryMiddleware    3 attempts
   2  TimeoutMiddleware  5 s
   3  audit
   4  PublishMiddleware  Broker → warehouse"""
    )


def test_text_of_one_type() -> None:
    assert (
        shop().describe(CountOrders)
        == """\
CountOrders (request)
   1  RetryMiddleware        3 attempts
   2  TimeoutMiddleware      1.5 s
   3  TransactionMiddleware  Session
   4  HandleMiddleware       count_orders"""
    )


def test_a_domain_event_that_nobody_bound_may_be_described() -> None:
    class Unheard(DomainEvent):
        pass

    assert Mediator().describe(Unheard).endswith("Unheard (event)\n   1  HandleMiddleware  no handlers")


def test_json_has_the_same_chains() -> None:
    mediator = shop()

    chains = json.loads(mediator.describe(format="json"))
    assert [(chain["message"], chain["kind"], chain["origin"], chain["destination"]) for chain in chains] == [
        ("PlaceOrder", "request", "local", None),
        ("CountOrders", "request", "local", None),
        ("ExportOrders", "stream", "local", None),
        ("StockRanLow", "event", "local", None),
        ("OrderPlaced", "event", "local", "orders"),
        ("OrderPlaced", "event", "broker", None),
        ("ShipOrder", "request", "local", "warehouse"),
    ]
    assert json.loads(mediator.describe(CountOrders, format="json")) == [
        {
            "message": "CountOrders",
            "kind": "request",
            "origin": "local",
            "destination": None,
            "links": [
                {"name": "RetryMiddleware", "role": "retry", "summary": "3 attempts"},
                {"name": "TimeoutMiddleware", "role": "timeout", "summary": "1.5 s"},
                {"name": "TransactionMiddleware", "role": "transaction", "summary": "Session"},
                {"name": "HandleMiddleware", "role": "handle", "summary": "count_orders"},
            ],
        }
    ]


def test_mermaid_is_a_flow_chart_with_a_subgraph_for_each_chain() -> None:
    assert (
        shop().describe(OrderPlaced, format="mermaid")
        == """\
flowchart LR
  subgraph c0["OrderPlaced (event to orders)"]
    n0_0(["OrderPlaced"])
    n0_1["RetryMiddleware<br/>3 attempts"]
    n0_2["TimeoutMiddleware<br/>5 s"]
    n0_3[["PublishMiddleware<br/>Broker → orders"]]
    n0_0 --> n0_1 --> n0_2 --> n0_3
  end
  subgraph c1["OrderPlaced (event from broker)"]
    n1_0(["OrderPlaced"])
    n1_1["RetryMiddleware<br/>3 attempts"]
    n1_2["TimeoutMiddleware<br/>5 s"]
    n1_3["TransactionMiddleware<br/>Session"]
    n1_4[["HandleMiddleware<br/>ship"]]
    n1_0 --> n1_1 --> n1_2 --> n1_3 --> n1_4
  end"""
    )


def test_mermaid_takes_no_name_for_markup() -> None:
    class Quoted:
        summary = 'says "#1" & <more>'

        async def __call__(self, context: Context, call_next: Next) -> Any:
            return await call_next(context)

    text = Mediator(RequestMap().bind(PlaceOrder, PlaceOrderHandler), middlewares=[Quoted()]).describe(format="mermaid")

    name = "test_mermaid_takes_no_name_for_markup.#lt;locals#gt;.Quoted"
    assert f'n0_1["{name}<br/>says #quot;#35;1#quot; #amp; #lt;more#gt;"]' in text
    for label in re.findall(r'"([^"]*)"', text):
        assert not re.search(r"[<>&]", label.replace("<br/>", ""))


def test_a_mediator_without_messages_describes_nothing() -> None:
    assert Mediator().describe() == ""
    assert json.loads(Mediator().describe(format="json")) == []
    assert Mediator().describe(format="mermaid") == "flowchart LR"


def test_an_unknown_format_is_refused() -> None:
    describe: Any = shop().describe
    with pytest.raises(ConfigurationError, match=r"""describe\(format='yaml'\): it is "text", "json" or "mermaid\""""):
        describe(format="yaml")


def test_a_message_instead_of_its_type_is_refused() -> None:
    describe: Any = shop().describe
    with pytest.raises(ConfigurationError, match=r"describe\(\) takes a message type, not a message: PlaceOrder"):
        describe(PlaceOrder())


def test_a_request_that_nobody_handles_cannot_be_described() -> None:
    class Unbound(Command[int]):
        pass

    with pytest.raises(HandlerNotFoundError, match="Unbound: no handler is bound to it"):
        shop().describe(Unbound)


async def test_what_is_shown_is_what_is_walked() -> None:
    walked: list[str] = []

    class Noted:
        def __init__(self, name: str) -> None:
            self.summary = name

        async def __call__(self, context: Context, call_next: Next) -> Any:
            walked.append(self.summary)
            return await call_next(context)

    stack: list[Middleware] = [Noted("a"), only(Query, Noted("b")), unless(Query, Noted("c")), Noted("d")]
    mediator = Mediator(
        RequestMap().bind(PlaceOrder, PlaceOrderHandler).bind(CountOrders, count_orders), middlewares=stack
    )
    for message in (PlaceOrder(), CountOrders()):
        walked.clear()
        await mediator.send(message)
        (chain,) = json.loads(mediator.describe(type(message), format="json"))
        assert [link["summary"] for link in chain["links"][:-1]] == walked


# -- check -------------------------------------------------------------------------------------------------------------


class Forgetful(Broker):
    features = BrokerFeatures(system="fake", durable=False, headers=False, ordered_by_key=False)


def test_check_tells_what_may_surprise() -> None:
    assert shop().check() == [
        (
            "CountOrders (request): count_orders is a plain function in a worker thread: a Timeout cannot stop it, it "
            "is waited for. Make it async, or give its blocking calls timeouts of their own."
        ),
        (
            "OrderPlaced (event to orders), ShipOrder (request to warehouse): emitted inside a transaction it is "
            "published after the commit, at most once: a crash in between loses it. An OutboxMiddleware before the "
            "PublishMiddleware stores it in the transaction."
        ),
        (
            "OrderPlaced (event from broker): handled when it comes back from a broker, and nobody decides what "
            "becomes of it if that fails: it comes again for ever. Put DeadLetterMiddleware and RedeliveryMiddleware "
            "in front of the others."
        ),
    ]


def test_check_tells_that_a_broker_keeps_nothing() -> None:
    found = Mediator(middlewares=[PublishMiddleware(Forgetful(), {OrderPlaced: "orders"})]).check()

    assert (
        "OrderPlaced (event to orders): Forgetful → orders keeps nothing: a message that nobody listens for is gone."
        in (found)
    )


def test_check_finds_nothing_where_nothing_surprises() -> None:
    assert Mediator(RequestMap().bind(PlaceOrder, PlaceOrderHandler), middlewares=[TimeoutMiddleware(5)]).check() == []
    assert Mediator(RequestMap().bind(CountOrders, count_orders)).check() == []


def test_check_asks_middlewares_of_the_user_too() -> None:
    class Warns:
        def for_route(self, route: Any) -> Any:
            return audit

        def warnings_for(self, chain: Any) -> list[str]:
            return [f"{len(chain.links)} links", f"{len(chain.links)} links"]

        async def __call__(self, context: Context, call_next: Next) -> Any: ...

    mediator = Mediator(RequestMap().bind(PlaceOrder, PlaceOrderHandler), middlewares=[only(Command, Warns())])

    assert mediator.check() == ["PlaceOrder (request): 2 links"]


def test_check_resolves_what_handlers_ask_for() -> None:
    class Needs:
        def __init__(self, missing: Database) -> None: ...

        async def handle(self, command: PlaceOrder) -> int:
            return 1

    with pytest.raises(ResolutionError, match=r"Needs\(missing: Database\)"):
        Mediator(RequestMap().bind(PlaceOrder, Needs)).check()
