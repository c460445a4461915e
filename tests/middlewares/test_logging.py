"""Logging: which line at which level, what a record carries, and what it never says unless asked."""

from __future__ import annotations

import gc
import logging
import re
import weakref
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import anyio
import pytest

from pipeline_mediator import (
    Command,
    Context,
    Mediator,
    PermanentError,
    Query,
    RequestMap,
    Route,
    StreamQuery,
)
from pipeline_mediator.errors import ConfigurationError
from pipeline_mediator.middlewares import LoggingMiddleware
from pipeline_mediator.pipeline import Next

SECRET = "4111-1111-1111-1111"
NAME = "pipeline_mediator.middlewares.logging"


@dataclass(frozen=True)
class Pay(Command[str]):
    card: str = SECRET


@dataclass(frozen=True)
class GetBalance(Query[int]):
    account: str = SECRET


@dataclass(frozen=True)
class ListPayments(StreamQuery[int]):
    pass


async def pay(command: Pay) -> str:
    return "paid"


async def get_balance(query: GetBalance) -> int:
    raise LookupError(query.account)


class RefusedError(PermanentError):
    pass


class Kept(logging.Handler):
    """Keeps the records of a logger."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    """The middleware's own logger, which logs everything."""
    logger = logging.getLogger(NAME)
    logger.setLevel(logging.DEBUG)
    yield logger
    logger.setLevel(logging.NOTSET)


@pytest.fixture
def records(logger: logging.Logger) -> Iterator[list[logging.LogRecord]]:
    """What it logs."""
    handler = Kept()
    logger.addHandler(handler)
    yield handler.records
    logger.removeHandler(handler)


def lines(records: list[logging.LogRecord]) -> list[tuple[str, str]]:
    """Level and text of each record, without the times."""
    return [(one.levelname, re.sub(r"\d+\.\d ms", "# ms", one.getMessage())) for one in records]


async def test_a_message_that_ends_well(records: list[logging.LogRecord]) -> None:
    contexts: list[Context] = []

    async def keep(context: Context, call_next: Next) -> Any:
        contexts.append(context)
        return await call_next(context)

    mediator = Mediator(RequestMap().bind(Pay, pay), middlewares=[LoggingMiddleware(), keep])
    assert await mediator.send(Pay(), correlation_id="conversation") == "paid"
    assert lines(records) == [("DEBUG", "Pay started"), ("INFO", "Pay done in # ms")]
    began, ended = (vars(one) for one in records)
    assert began["outcome"] == "started"
    assert began["message_type"] == ended["message_type"] == "Pay"
    assert began["message_id"] == ended["message_id"] == contexts[0].message_id
    assert began["correlation_id"] == ended["correlation_id"] == "conversation"
    assert (ended["outcome"], ended["attempt"], ended["error_type"]) == ("done", 1, None)
    assert 0 <= ended["duration"] < 60


async def test_a_failure_is_logged_by_type_and_raised_untouched(records: list[logging.LogRecord]) -> None:
    mediator = Mediator(RequestMap().bind(GetBalance, get_balance), middlewares=[LoggingMiddleware()])
    with pytest.raises(LookupError):
        await mediator.send(GetBalance())
    assert lines(records)[1:] == [("ERROR", "GetBalance failed after # ms with LookupError")]
    assert (vars(records[1])["outcome"], vars(records[1])["error_type"]) == ("failed", "LookupError")
    assert records[1].exc_info is None


async def test_what_the_sender_did_wrong_is_a_warning(records: list[logging.LogRecord]) -> None:
    async def refuse(command: Pay) -> str:
        raise RefusedError

    mediator = Mediator(RequestMap().bind(Pay, refuse), middlewares=[LoggingMiddleware()])
    with pytest.raises(RefusedError):
        await mediator.send(Pay())
    assert records[-1].levelno == logging.WARNING
    assert vars(records[-1])["error_type"] == f"{__name__}.RefusedError"


async def test_what_is_cancelled_is_no_failure(records: list[logging.LogRecord]) -> None:
    async def hang(command: Pay) -> str:
        scope.cancel()
        await anyio.sleep_forever()
        return "never"

    mediator = Mediator(RequestMap().bind(Pay, hang), middlewares=[LoggingMiddleware(stack=True)])
    with anyio.CancelScope() as scope:
        await mediator.send(Pay())
    assert lines(records)[1:] == [("INFO", "Pay cancelled after # ms")]
    assert (vars(records[1])["outcome"], vars(records[1])["error_type"]) == ("cancelled", "cancelled")
    assert records[1].exc_info is None


async def noted(context: Context, call_next: Next) -> Any:
    context.note("retry", attempt=2, error="LookupError", wait=0.0123456)
    context.note("kept back", message=context.message, error=LookupError)
    context.note("duplicate")
    return await call_next(context)


async def test_notes_are_logged_and_attempts_counted(records: list[logging.LogRecord]) -> None:
    requests = RequestMap().bind(Pay, pay).bind(GetBalance, get_balance)
    mediator = Mediator(requests, middlewares=[LoggingMiddleware(), noted])
    await mediator.send(Pay())
    assert lines(records)[1:] == [
        ("INFO", "Pay: retry (attempt=2, error=LookupError, wait=0.0123)"),
        ("INFO", "Pay: kept back (message=Pay, error=LookupError)"),
        ("INFO", "Pay: duplicate"),
        ("INFO", "Pay done in # ms, attempt 2"),
    ]
    assert [vars(one)["outcome"] for one in records] == ["started", "noted", "noted", "noted", "done"]
    assert [vars(one)["attempt"] for one in records] == [1, 2, 2, 2, 2]
    records.clear()
    with pytest.raises(LookupError):
        await mediator.send(GetBalance())
    assert lines(records)[-1] == ("ERROR", "GetBalance failed after # ms with LookupError, attempt 2")


async def test_a_note_from_outside_is_not_logged(records: list[logging.LogRecord]) -> None:
    async def note_afterwards(context: Context, call_next: Next) -> Any:
        result = await call_next(context)
        context.note("afterwards")
        return result

    mediator = Mediator(RequestMap().bind(Pay, pay), middlewares=[note_afterwards, LoggingMiddleware()])
    await mediator.send(Pay())
    assert lines(records) == [("DEBUG", "Pay started"), ("INFO", "Pay done in # ms")]


async def test_a_slow_message_is_a_warning(records: list[logging.LogRecord]) -> None:
    requests = RequestMap().bind(Pay, pay)
    await Mediator(requests, middlewares=[LoggingMiddleware(slow=1e-9)]).send(Pay())
    await Mediator(requests, middlewares=[LoggingMiddleware(slow=3600)]).send(Pay())
    slow, quick = (one for one in records if vars(one)["outcome"] == "done")
    assert slow.levelno == logging.WARNING
    assert slow.getMessage().endswith("ms, more than 1e-09 s")
    assert quick.levelno == logging.INFO


async def test_a_slow_message_is_reported_where_the_others_are_not(
    logger: logging.Logger, records: list[logging.LogRecord]
) -> None:
    logger.setLevel(logging.WARNING)
    requests = RequestMap().bind(Pay, pay)
    await Mediator(requests, middlewares=[LoggingMiddleware(slow=1e-9)]).send(Pay())
    await Mediator(requests, middlewares=[LoggingMiddleware(slow=3600)]).send(Pay())
    assert [one.levelname for one in records] == ["WARNING"]


async def test_the_pace_of_a_stream_is_the_callers(records: list[logging.LogRecord]) -> None:
    async def numbers(query: ListPayments) -> AsyncIterator[int]:
        yield 1
        yield 2

    mediator = Mediator(RequestMap().bind(ListPayments, numbers), middlewares=[LoggingMiddleware(slow=1e-9)])
    async with mediator.stream(ListPayments()) as items:
        assert [item async for item in items] == [1, 2]
    assert lines(records) == [("DEBUG", "ListPayments started"), ("INFO", "ListPayments done in # ms")]


async def test_failures_are_logged_where_nothing_else_is(
    logger: logging.Logger, records: list[logging.LogRecord]
) -> None:
    logger.setLevel(logging.WARNING)
    ids: list[str] = []

    def new_id() -> str:
        ids.append(f"id {len(ids)}")
        return ids[-1]

    requests = RequestMap().bind(Pay, pay).bind(GetBalance, get_balance)
    mediator = Mediator(requests, middlewares=[LoggingMiddleware(), noted], new_id=new_id)
    await mediator.send(Pay())
    assert ids == []  # a message that nobody writes about has no id
    with pytest.raises(LookupError):
        await mediator.send(GetBalance())
    assert lines(records) == [("ERROR", "GetBalance failed after # ms with LookupError")]
    assert vars(records[0])["message_id"] == "id 0"
    assert vars(records[0])["attempt"] is None
    logger.setLevel(logging.CRITICAL)
    with pytest.raises(LookupError):
        await mediator.send(GetBalance())
    assert (len(records), ids) == (1, ["id 0"])


async def test_it_follows_the_level_of_its_logger_at_run_time(
    logger: logging.Logger, records: list[logging.LogRecord]
) -> None:
    mediator = Mediator(RequestMap().bind(Pay, pay), middlewares=[LoggingMiddleware()])
    logger.setLevel(logging.WARNING)
    await mediator.send(Pay())
    assert records == []
    logger.setLevel(logging.INFO)
    await mediator.send(Pay())
    assert lines(records) == [("INFO", "Pay done in # ms")]


async def test_logger_and_level_can_be_chosen(caplog: pytest.LogCaptureFixture) -> None:
    middleware = LoggingMiddleware(logging.getLogger("shop"), level=logging.ERROR, slow=3600)
    mediator = Mediator(RequestMap().bind(Pay, pay), middlewares=[middleware])
    await mediator.send(Pay())
    assert [(one.name, one.levelname) for one in caplog.records] == [("shop", "ERROR")]
    assert "LoggingMiddleware  ERROR, slow from 3600 s" in mediator.describe()


async def test_nothing_quotes_the_message_unless_asked(records: list[logging.LogRecord]) -> None:
    requests = RequestMap().bind(Pay, pay).bind(GetBalance, get_balance)

    async def send_both(middleware: LoggingMiddleware) -> str:
        records.clear()
        mediator = Mediator(requests, middlewares=[middleware, noted])
        await mediator.send(Pay())
        with pytest.raises(LookupError):
            await mediator.send(GetBalance())
        formatter = logging.Formatter("%(message)s")
        return "\n".join(formatter.format(one) + str(vars(one)) for one in records)

    assert SECRET not in await send_both(LoggingMiddleware())
    assert f"Pay started: Pay(card='{SECRET}')" in await send_both(LoggingMiddleware(payload=True))
    assert f"LookupError: {SECRET}" in await send_both(LoggingMiddleware(stack=True))


@pytest.mark.parametrize(
    ("route", "name"),
    [
        (Route(Pay, "request", "local"), "Pay"),
        (Route(Pay, "request", "local", "payments"), "Pay to payments"),
        (Route(Pay, "request", "broker"), "Pay from broker"),
    ],
    ids=str,
)
async def test_a_line_says_where_the_message_came_from_or_goes(
    records: list[logging.LogRecord], route: Route, name: str
) -> None:
    async def end(context: Context) -> None:
        return None

    await LoggingMiddleware()(Context(Pay(), route), end)
    assert lines(records) == [("DEBUG", f"{name} started"), ("INFO", f"{name} done in # ms")]


async def test_what_a_relay_publishes_is_for_debugging(records: list[logging.LogRecord]) -> None:
    """It publishes many batches a second."""

    async def end(context: Context) -> None:
        return None

    await LoggingMiddleware()(Context(Pay(), Route(Pay, "event", "relay", "payments")), end)
    assert lines(records) == [("DEBUG", "Pay to payments started"), ("DEBUG", "Pay to payments done in # ms")]


async def test_a_context_without_a_route_passes(records: list[logging.LogRecord]) -> None:
    async def end(context: Context) -> str:
        return "end"

    assert await LoggingMiddleware()(Context(Pay()), end) == "end"
    assert records == []


@pytest.mark.parametrize("slow", [0, -1.0, float("nan")])
def test_a_limit_that_is_none_is_refused(slow: float) -> None:
    with pytest.raises(ConfigurationError, match="it must be above 0 s, or None"):
        LoggingMiddleware(slow=slow)


@pytest.mark.parametrize("level", [logging.WARNING, logging.DEBUG])
async def test_no_context_is_kept_alive(logger: logging.Logger, level: int) -> None:
    logger.setLevel(level)
    contexts: list[weakref.ref[Context]] = []

    async def remember(context: Context, call_next: Next) -> Any:
        contexts.append(weakref.ref(context))
        return await call_next(context)

    requests = RequestMap().bind(Pay, pay).bind(GetBalance, get_balance)
    mediator = Mediator(requests, middlewares=[LoggingMiddleware(), noted, remember])
    gc.disable()
    try:
        await mediator.send(Pay())
        with pytest.raises(LookupError):
            await mediator.send(GetBalance())
        assert [one() for one in contexts] == [None, None]
    finally:
        gc.enable()
