"""Dead letters of the outbox and of subscriptions alike."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest

from tests.cli.called import Called
from tests.cli.shops import SHOP
from tests.servers import RedisServer

Call = Callable[..., Called]


@pytest.fixture
def shop(write: Callable[[str], str]) -> str:
    return write(SHOP)


def letters_of(shop: str) -> Any:
    return sys.modules[shop].letters


# -- looking -----------------------------------------------------------------------------------------------------------


def test_the_list_has_every_place(shop: str, call: Call) -> None:
    called = call("dead-letters", "list", f"{shop}:create_consumer", "--json")
    assert called.code == 0
    outbox, warehouse = called.document["places"]
    assert (outbox["place"], outbox["kind"], outbox["count"]) == ("outbox", "outbox", 1)
    assert (warehouse["place"], warehouse["kind"], warehouse["count"]) == ("warehouse", "subscription", 2)
    assert warehouse["letters"][0] == {
        "id": "d-1",
        "message_id": "m-1",
        "name": "orders.placed",
        "version": None,
        "destination": "orders",
        "key": None,
        "attempts": 5,
        "reason": "OutOfStockError: none left",
        "stored_at": None,
        "died_at": "2024-02-29T12:00:00+00:00",
    }


def test_for_people_each_place_is_a_table(shop: str, call: Call) -> None:
    called = call("dead-letters", "list", f"{shop}:create_consumer")
    assert "d-1" in called.out
    assert "2024-02-29T12:00:00+00:00" in called.out
    assert "sku" not in called.out
    assert called.err.endswith("outbox: 1 of 1 dead letters\nwarehouse: 2 of 2 dead letters\n")


def test_the_list_of_one_place(shop: str, call: Call) -> None:
    arguments = ["--place", "warehouse", "--after", "d-1", "--json"]
    (place,) = call("dead-letters", "list", f"{shop}:create_consumer", *arguments).document["places"]
    assert [letter["id"] for letter in place["letters"]] == ["d-2"]


@pytest.mark.parametrize("target", ["create_mediator", "create_relay"])
def test_without_a_consumer_it_is_the_outbox(target: str, shop: str, call: Call) -> None:
    (place,) = call("dead-letters", "list", f"{shop}:{target}", "--json").document["places"]
    assert place["place"] == "outbox"


def test_a_subscription_that_is_called_outbox_has_a_number(shop: str, call: Call) -> None:
    places = call("dead-letters", "list", f"{shop}:create_namesake", "--json").document["places"]
    assert [(place["place"], place["kind"]) for place in places] == [("outbox", "outbox"), ("outbox#2", "subscription")]


def test_payloads_of_any_kind_are_shown_when_they_are_asked_for(shop: str, call: Call) -> None:
    target = f"{shop}:create_lonely"
    first, second = call("dead-letters", "show", target, "d-1", "d-2", "--payload", "--json").document["letters"]
    assert (first["payload"], first["payload_encoding"]) == ('{"sku": "book"}', "utf-8")
    assert (second["payload"], second["payload_encoding"]) == ("AP8=", "base64")
    assert "payload" not in call("dead-letters", "show", target, "d-1", "--json").document["letters"][0]


def test_one_far_behind_is_found(shop: str, call: Call) -> None:
    called = call("dead-letters", "show", f"{shop}:create_crowded", "d-249", "d-251", "--json")
    assert called.code == 1
    assert [letter["id"] for letter in called.document["letters"]] == ["d-249"]
    assert called.document["missing"] == ["d-251"]


# -- acting ------------------------------------------------------------------------------------------------------------


def test_some_are_delivered_again(shop: str, call: Call) -> None:
    called = call("dead-letters", "retry", f"{shop}:create_consumer", "--place", "warehouse", "d-2", "--json")
    assert called.code == 0
    assert called.document == {"place": "warehouse", "asked": 1, "retried": 1}
    assert letters_of(shop).retried == ["d-2"]


def test_those_of_the_outbox_are_retried_by_the_same_command(shop: str, call: Call) -> None:
    called = call("dead-letters", "retry", f"{shop}:create_consumer", "--place", "outbox", "--all")
    assert called.code == 0
    assert sys.modules[shop].store.state_of(1) == "pending"
    assert letters_of(shop).retried == []


def test_where_there_is_one_place_it_need_not_be_named(shop: str, call: Call) -> None:
    called = call("dead-letters", "retry", f"{shop}:create_lonely", "--all", "--json")
    assert called.document == {"place": "warehouse", "asked": 2, "retried": 2}


def test_all_of_many_with_progress(shop: str, call: Call) -> None:
    called = call("dead-letters", "drop", f"{shop}:create_crowded", "--all", "--yes", "--json")
    assert called.document == {"place": "warehouse", "asked": 250, "dropped": 250}
    assert "warehouse: dropped: 200 of 250" in called.err


def test_dropping_asks_first(shop: str, call: Call) -> None:
    assert call("dead-letters", "drop", f"{shop}:create_lonely", "d-1", answers="\n").code == 1
    assert list(letters_of(shop).kept) == ["d-1", "d-2"]
    assert call("dead-letters", "drop", f"{shop}:create_lonely", "d-1", answers="yes\n").code == 0
    assert list(letters_of(shop).kept) == ["d-2"]


def test_what_breaks_half_way_says_how_far_it_came(shop: str, call: Call) -> None:
    called = call("dead-letters", "retry", f"{shop}:create_breaking", "--all", "--json")
    assert (called.code, called.out) == (2, "")
    assert "warehouse: 200 of 250 were retried before it stopped" in called.err
    assert "warehouse cannot be read: OSError: the line is dead: redis://***@host/0" in called.err


# -- with a broker -----------------------------------------------------------------------------------------------------

BROKER = """
    import asyncio

    from pipeline_mediator import Mediator
    from pipeline_mediator.consumer import Consumer
    from pipeline_mediator.message_brokers import MemoryBroker
    from pipeline_mediator.message_brokers.protocol import Dead, Outgoing

    subscriptions = []

    async def create_consumer():
        broker = MemoryBroker()
        subscription = broker.subscribe("orders", name="warehouse")
        subscriptions.append(subscription)
        publishing = asyncio.ensure_future(
            broker.publish([
                Outgoing("orders", b"{}", "application/json", name, "orders.placed", None, {"type": "orders.placed"})
                for name in ("a", "b")
            ])
        )
        deliveries = await subscription.receive(2)
        for delivery in deliveries:
            delivery.outcome = Dead(f"nobody wants {delivery.message_id}")
        await subscription.settle(deliveries)
        await publishing
        return Consumer(Mediator(), subscription)
"""


def test_a_subscription_of_a_real_broker(write: Callable[[str], str], call: Call) -> None:
    target = f"{write(BROKER)}:create_consumer"
    (place,) = call("dead-letters", "list", target, "--json").document["places"]
    assert [(one["message_id"], one["reason"]) for one in place["letters"]] == [
        ("a", "nobody wants a"),
        ("b", "nobody wants b"),
    ]
    first = place["letters"][0]["id"]
    assert call("dead-letters", "show", target, first, "--payload", "--json").document["letters"][0]["payload"] == "{}"
    assert call("dead-letters", "retry", target, "--all", "--json").document["retried"] == 2
    assert call("dead-letters", "drop", target, first, "--yes", "--json").document["dropped"] == 1


REDIS = """
    import os
    from contextlib import asynccontextmanager

    from pipeline_mediator import IntegrationEvent, Mediator, message
    from pipeline_mediator.consumer import Consumer
    from pipeline_mediator.message_brokers import RedisStreamBroker
    from pipeline_mediator.message_brokers.protocol import Ack, Dead, Outgoing
    from pipeline_mediator.middlewares import PublishMiddleware

    @message("orders.placed")
    class OrderPlaced(IntegrationEvent):
        pass

    def create_consumer():
        broker = RedisStreamBroker(os.environ["SHOP_REDIS_URL"])
        mediator = Mediator(middlewares=[PublishMiddleware(broker, {OrderPlaced: "orders"})])
        return Consumer(mediator, broker.subscribe("orders", name="warehouse"))

    async def settle(outcome):
        async with RedisStreamBroker(os.environ["SHOP_REDIS_URL"]) as broker:
            if isinstance(outcome, Dead):
                await broker.publish([
                    Outgoing("orders", b"{}", "application/json", one, "orders.placed", None, {"type": "orders.placed"})
                    for one in ("a", "b")
                ])
            async with broker.subscribe("orders", name="warehouse") as subscription:
                deliveries = await subscription.receive(2)
                for delivery in deliveries:
                    delivery.outcome = outcome
                    print("received", delivery.message_id)
                await subscription.settle(deliveries)

    async def fill():
        await settle(Dead("nobody wants it"))
        return create_consumer()

    async def drain():
        await settle(Ack())
        return create_consumer()
"""


def test_a_subscription_of_redis(
    write: Callable[[str], str], call: Call, own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOP_REDIS_URL", own_redis.url)
    shop = write(REDIS)
    target = f"{shop}:create_consumer"
    (place,) = call("dead-letters", "list", f"{shop}:fill", "--json").document["places"]
    assert (place["place"], place["count"]) == ("warehouse", 2)
    assert [(one["message_id"], one["reason"]) for one in place["letters"]] == [
        ("a", "nobody wants it"),
        ("b", "nobody wants it"),
    ]
    first, second = (letter["id"] for letter in place["letters"])

    assert call("dead-letters", "drop", target, second, "--yes").code == 0
    assert call("dead-letters", "retry", target, "--all", "--json").document["retried"] == 1
    called = call("dead-letters", "list", f"{shop}:drain")
    assert called.out == "received a\n"
    assert called.err.endswith("warehouse: 0 of 0 dead letters\n")
    assert call("dead-letters", "retry", target, first).code == 1

    called = call("dead-letters", "retry", target, "nonsense")
    assert called.code == 2
    assert "pipeline-mediator: warehouse: " in called.err
    assert "nonsense" in called.err


# -- what cannot be done -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["retry", "create_consumer", "d-1"], "say which one by --place, of outbox, warehouse"),
        (["list", "create_consumer", "--after", "d-1"], "say which one by --place, of outbox, warehouse"),
        (["list", "create_consumer", "--place", "live"], "there is no place 'live' that keeps dead letters; there is"),
        (["list", "bare"], "there is no outbox, and no subscription whose broker keeps dead letters"),
        (["list", "create_silent"], "there is no outbox, and no subscription whose broker keeps dead letters"),
        (["drop", "create_lonely", "--yes"], "say which: the ids, as `list` shows them, or --all"),
    ],
)
def test_what_cannot_be_done_is_told(arguments: list[str], complaint: str, shop: str, call: Call) -> None:
    command, target, *rest = arguments
    called = call("dead-letters", command, f"{shop}:{target}", *rest)
    assert called.code == 2
    assert complaint in called.err
