"""What an operator does with an outbox: look, retry, delete."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest

from pipeline_mediator.cli.main import main
from tests.cli.called import Called
from tests.cli.shops import SHOP

Call = Callable[..., Called]


@pytest.fixture
def shop(write: Callable[[str], str]) -> str:
    return write(SHOP)


def store_of(shop: str) -> Any:
    return sys.modules[shop].store


# -- looking -----------------------------------------------------------------------------------------------------------


def test_the_status_counts_what_waits(shop: str, call: Call) -> None:
    called = call("outbox", "status", f"{shop}:create_mediator", "--json")
    assert called.code == 0
    assert called.document == {"pending": 0, "waiting": 0, "dead": 3, "oldest": 0.0, "next_due": None}

    called = call("outbox", "status", f"{shop}:create_unbroken")
    assert [line.split() for line in called.out.splitlines()] == [
        ["pending", "0"],
        ["waiting", "0"],
        ["dead", "3"],
        ["oldest", "0.0", "s"],
    ]


def test_a_strict_status_finds_dead_letters(shop: str, call: Call) -> None:
    assert call("outbox", "status", f"{shop}:create_unbroken", "--strict").code == 0
    assert call("outbox", "status", f"{shop}:create_mediator", "--strict").code == 1
    assert call("outbox", "status", f"{shop}:create_unbroken").code == 0


@pytest.mark.parametrize("target", ["create_mediator", "create_relay", "create_consumer"])
def test_whatever_has_an_outbox_will_do(target: str, shop: str, call: Call) -> None:
    assert call("outbox", "status", f"{shop}:{target}", "--json").document["dead"] >= 1


def test_the_list_has_reasons_and_no_payloads(shop: str, call: Call) -> None:
    called = call("outbox", "list", f"{shop}:create_mediator", "--limit", "2", "--json")
    assert called.code == 0
    document = called.document
    assert (document["place"], document["count"]) == ("outbox", 3)
    assert [letter["id"] for letter in document["letters"]] == ["1", "2"]
    assert document["letters"][0] == {
        "id": "1",
        "message_id": "m1",
        "name": "orders.placed",
        "version": 1,
        "destination": "orders",
        "key": "k1",
        "attempts": 3,
        "reason": "BrokerRefusedError: \x1b[31mno, by redis://***@h/0",
        "stored_at": "1970-01-01T00:00:00+00:00",
        "died_at": None,
    }


def test_the_list_goes_on_behind_an_id(shop: str, call: Call) -> None:
    document = call("outbox", "list", f"{shop}:create_mediator", "--after", "2", "--json").document
    assert [letter["id"] for letter in document["letters"]] == ["3"]


def test_the_list_is_longer_than_one_page(shop: str, call: Call) -> None:
    document = call("outbox", "list", f"{shop}:create_big", "--limit", "240", "--json").document
    assert [letter["id"] for letter in document["letters"]] == [str(number) for number in range(1, 241)]


def test_for_people_the_list_is_a_table_that_no_message_can_paint(shop: str, call: Call) -> None:
    called = call("outbox", "list", f"{shop}:create_mediator")
    assert "m1" in called.out
    assert r"BrokerRefusedError: \x1b[31mno, by redis://***@h/0" in called.out
    assert "\x1b" not in called.out
    assert "sku" not in called.out
    assert called.err.endswith("outbox: 3 of 3 dead letters\n")


def test_one_is_shown_in_full_but_for_the_payload(shop: str, call: Call) -> None:
    called = call("outbox", "show", f"{shop}:create_mediator", "2", "--json")
    assert called.code == 0
    (letter,) = called.document["letters"]
    assert letter["message_id"] == "m2"
    assert letter["headers"] == {"type": "orders.placed", "authority": "amqp://***@host", "x\x1b": "y"}
    assert letter["size"] == len('{"sku": "büch\x1b"}'.encode())
    assert "payload" not in letter

    shown = call("outbox", "show", f"{shop}:create_unbroken", "2").out
    assert "sku" not in shown
    assert "\x1b" not in shown


def test_the_payload_is_shown_when_it_is_asked_for(shop: str, call: Call) -> None:
    (letter,) = call("outbox", "show", f"{shop}:create_mediator", "2", "--payload", "--json").document["letters"]
    assert (letter["payload"], letter["payload_encoding"]) == ('{"sku": "büch\x1b"}', "utf-8")

    shown = call("outbox", "show", f"{shop}:create_unbroken", "2", "--payload").out
    assert shown.endswith('payload (utf-8)\n{"sku": "büch\\x1b"}\n')


def test_what_is_not_there_cannot_be_shown(shop: str, call: Call) -> None:
    called = call("outbox", "show", f"{shop}:create_mediator", "2", "99", "--json")
    assert called.code == 1
    assert called.document["missing"] == ["99"]
    assert "there is no dead letter 99" in call("outbox", "show", f"{shop}:create_unbroken", "99").err


# -- acting ------------------------------------------------------------------------------------------------------------


def test_some_are_made_due_again(shop: str, call: Call) -> None:
    called = call("outbox", "retry", f"{shop}:create_mediator", "1", "3", "1", "--json")
    assert called.code == 0
    assert called.document == {"place": "outbox", "asked": 2, "retried": 2}
    assert [store_of(shop).state_of(number) for number in (1, 2, 3)] == ["pending", "dead", "pending"]


def test_an_id_that_is_not_there_is_told(shop: str, call: Call) -> None:
    called = call("outbox", "retry", f"{shop}:create_mediator", "1", "99")
    assert called.code == 1
    assert called.out.endswith("outbox: 1 of 2 dead letters retried\n")


def test_all_are_made_due_again_page_by_page(shop: str, call: Call) -> None:
    called = call("outbox", "retry", f"{shop}:create_big", "--all", "--json")
    assert called.code == 0
    assert called.document == {"place": "outbox", "asked": 250, "retried": 250}
    assert {row.state for row in store_of(shop).rows.values()} == {"pending"}
    assert "outbox: retried: 100 of 250\noutbox: retried: 200 of 250\n" in called.err


def test_of_all_the_oldest_first(shop: str, call: Call) -> None:
    assert call("outbox", "retry", f"{shop}:create_big", "--all", "--limit", "120", "--json").document["retried"] == 120
    dead = [number for number, row in store_of(shop).rows.items() if row.state == "dead"]
    assert dead == list(range(121, 251))


def test_what_dies_again_meanwhile_is_not_run_after(shop: str, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    call("outbox", "status", f"{shop}:create_big")
    store = store_of(shop)
    calls: list[int] = []

    async def retry(ids: list[int]) -> int:
        calls.extend(ids)
        return len(ids)  # and a relay gives them up again at once

    monkeypatch.setattr(store, "retry", retry)
    assert call("outbox", "retry", f"{shop}:create_unbroken", "--all", "--json").document["retried"] == 250
    assert sorted(calls) == list(range(1, 251))


def test_deleting_asks_first(shop: str, call: Call) -> None:
    called = call("outbox", "purge", f"{shop}:create_mediator", "--all", answers="n\n")
    assert called.code == 1
    assert "Delete 3 dead letters of outbox for good? [y/N] nothing was deleted" in called.err
    assert len(store_of(shop).rows) == 3

    called = call("outbox", "purge", f"{shop}:create_unbroken", "1", "--json", answers="y\n")
    assert called.code == 0
    assert called.document == {"place": "outbox", "asked": 1, "purged": 1}
    assert sorted(store_of(shop).rows) == [2, 3]


def test_deleting_without_anybody_to_ask_deletes_nothing(shop: str, call: Call) -> None:
    called = call("outbox", "purge", f"{shop}:create_mediator", "--all")
    assert called.code == 2
    assert "nobody answered, and nothing was deleted; --yes needs no answer" in called.err
    assert len(store_of(shop).rows) == 3


def test_deleting_need_not_ask(shop: str, call: Call) -> None:
    called = call("outbox", "purge", f"{shop}:create_mediator", "--all", "--yes")
    assert (called.code, called.err) == (0, "")
    assert called.out.endswith("outbox: 3 of 3 dead letters purged\n")
    assert store_of(shop).rows == {}


# -- with a database ---------------------------------------------------------------------------------------------------

DATABASE = """
    from contextlib import asynccontextmanager

    from sqlalchemy import MetaData
    from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

    from pipeline_mediator import IntegrationEvent, Mediator, Pipeline, message
    from pipeline_mediator.middlewares import OutboxMiddleware, PublishMiddleware, TransactionMiddleware
    from pipeline_mediator.outbox.protocol import Failure, Policy, StoredMessage
    from pipeline_mediator.outbox.sqlalchemy import SQLAlchemyOutbox, outbox_tables
    from pipeline_mediator.unit_of_work.sqlalchemy import prepare_sqlite
    from tests.outbox.relay_fakes import Broker

    @message("orders.placed")
    class OrderPlaced(IntegrationEvent):
        pass

    metadata = MetaData()
    tables = outbox_tables(metadata)

    class Talking(Broker):
        async def publish(self, batch):
            print("publishing", *(outgoing.message_id for outgoing in batch))
            return await super().publish(batch)

    @asynccontextmanager
    async def create_mediator():
        engine = prepare_sqlite(create_async_engine("sqlite+aiosqlite:///shop.db"))
        pipeline = Pipeline(
            TransactionMiddleware(async_sessionmaker(engine).begin),
            OutboxMiddleware(SQLAlchemyOutbox(engine, tables)),
            PublishMiddleware(Talking(), {OrderPlaced: "orders"}),
        )
        try:
            yield Mediator(middlewares=pipeline)
        finally:
            await engine.dispose()

    @asynccontextmanager
    async def fill():
        engine = prepare_sqlite(create_async_engine("sqlite+aiosqlite:///shop.db"))
        store = SQLAlchemyOutbox(engine, tables)
        async with engine.begin() as connection:
            await connection.run_sync(metadata.create_all)
            await store.add(connection, [
                StoredMessage(name, "orders.placed", 1, "orders", "application/json", b"{}", {"id": name}, name)
                for name in ("a", "b", "c")
            ])
        while True:
            async with store.take(10, Policy()) as batch:
                if batch is None:
                    break
                batch.failed([Failure(row.id, "refused", None) for row in batch.rows])
        await engine.dispose()
        async with create_mediator() as mediator:
            yield mediator

    @asynccontextmanager
    async def create_closed():
        raise ConnectionRefusedError("nobody is at home")
        yield
"""


def test_what_was_retried_is_published_and_what_was_purged_is_not(write: Callable[[str], str], call: Call) -> None:
    shop = write(DATABASE)
    letters = call("outbox", "list", f"{shop}:fill", "--json").document["letters"]
    assert {letter["message_id"] for letter in letters} == {"a", "b", "c"}
    first, second, _ = (letter["id"] for letter in sorted(letters, key=lambda letter: letter["message_id"]))

    target = f"{shop}:create_mediator"
    assert call("outbox", "retry", target, first).code == 0
    assert call("outbox", "purge", target, second, "--yes").code == 0
    drained = call("relay", target, "--drain")
    assert (drained.code, drained.out) == (0, "publishing a\n")
    assert call("outbox", "status", target, "--json").document["dead"] == 1


def test_a_table_that_is_not_there_is_told(write: Callable[[str], str], call: Call) -> None:
    called = call("outbox", "status", f"{write(DATABASE)}:create_mediator")
    assert called.code == 2
    assert "no such table" in called.err
    assert "SELECT" not in called.err


def test_a_factory_that_cannot_be_entered_is_told(write: Callable[[str], str], call: Call) -> None:
    shop = write(DATABASE)
    called = call("outbox", "status", f"{shop}:create_closed")
    assert called.code == 2
    assert f"{shop}:create_closed failed: ConnectionRefusedError: nobody is at home" in called.err


# -- what cannot be done -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["list", "{shop}:bare"], "no OutboxMiddleware stands in the pipeline of this mediator"),
        (["status", "{shop}:create_broken"], "the outbox cannot be read: ConnectionRefusedError: no database at"),
        (["retry", "{shop}:create_mediator"], "say which: the ids, as `list` shows them, or --all"),
        (["retry", "{shop}:create_mediator", "1", "--all"], "say which: the ids, as `list` shows them, or --all"),
        (["purge", "{shop}:create_mediator", "1", "--limit", "1"], "--limit belongs to --all"),
        (["show", "{shop}:create_mediator", "d-1"], "'d-1' is no id of the outbox"),
        (["retry", "{shop}:create_mediator", "0"], "'0' is no id of the outbox"),
        (["purge", "{shop}:create_mediator", "9223372036854775808", "--yes"], "is no id of the outbox"),
        (["list", "{shop}:create_mediator", "--limit", "0"], "Invalid value for '--limit'"),
    ],
)
def test_what_cannot_be_done_is_told(
    arguments: list[str], complaint: str, shop: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["outbox", *(one.format(shop=shop) for one in arguments)]) == 2
    told = capsys.readouterr().err
    assert complaint in told
    assert "secret" not in told
    assert "Traceback" not in told
