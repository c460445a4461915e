"""What has been committed is never done again, whatever is raised after it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import anyio
import pytest
from sqlalchemy import make_url, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from pipeline_mediator.context import Context
from pipeline_mediator.errors import CommitOutcomeUnknownError, MediatorError
from pipeline_mediator.middlewares.publish import PublishMiddleware
from pipeline_mediator.middlewares.retry import RetryMiddleware
from pipeline_mediator.middlewares.timeout import TimeoutMiddleware
from pipeline_mediator.middlewares.transaction import TransactionMiddleware
from tests.middlewares.databases import Database, put
from tests.middlewares.shop import AT_ONCE, Place, Placed, RecordingBroker, Reserved, mediator_of
from tests.proxy import Proxy


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Base(DeclarativeBase):
    pass


class Row(Base):
    __tablename__ = "placed"
    n: Mapped[int] = mapped_column(primary_key=True)


async def place(command: Place, session: AsyncSession) -> int:
    await put(session, command.n)
    return command.n


def retry() -> RetryMiddleware:
    return RetryMiddleware(3, wait=AT_ONCE)


async def test_at_publish_time_the_row_is_visible_from_another_connection(database: Database) -> None:
    broker = RecordingBroker()
    seen: list[list[int]] = []

    async def look() -> None:
        seen.append(await database.rows())

    broker.on_publish = look

    async def place_and_emit(command: Place, context: Context, session: AsyncSession) -> int:
        context.emit(Placed())
        assert await database.rows() == []
        return await place(command, session)

    mediator = mediator_of(
        {Place: place_and_emit},
        TransactionMiddleware(database.sessions.begin),
        PublishMiddleware(broker, {Placed: "orders"}),
    )
    await mediator.send(Place())
    assert seen == [[1]]


async def test_a_late_timeout_does_not_repeat_it(database: Database) -> None:
    """A middleware between Timeout and Transaction that takes its time after the commit."""

    async def dawdle(context: Context, call_next: Any) -> Any:
        result = await call_next(context)
        await anyio.sleep_forever()
        return result

    mediator = mediator_of(
        {Place: place}, retry(), TimeoutMiddleware(0.2), dawdle, TransactionMiddleware(database.sessions.begin)
    )
    with pytest.raises(TimeoutError, match=r"Place took longer than 0\.2 s"):
        await mediator.send(Place())
    assert await database.rows() == [1]


async def test_an_error_of_a_middleware_outside_does_not_repeat_it(database: Database) -> None:
    async def break_after(context: Context, call_next: Any) -> Any:
        await call_next(context)
        raise ConnectionError("the audit log is away")

    mediator = mediator_of({Place: place}, retry(), break_after, TransactionMiddleware(database.sessions.begin))
    with pytest.raises(ConnectionError, match="the audit log is away"):
        await mediator.send(Place())
    assert await database.rows() == [1]


async def test_a_commit_in_a_second_attempt_is_final_too(database: Database) -> None:
    attempts: list[int] = []

    async def break_after(context: Context, call_next: Any) -> Any:
        await call_next(context)
        raise ConnectionError("the audit log is away")

    async def fail_first(command: Place, session: AsyncSession) -> int:
        attempts.append(1)
        await put(session, command.n)
        if len(attempts) == 1:
            raise ConnectionError("reset")
        return 1

    mediator = mediator_of({Place: fail_first}, retry(), break_after, TransactionMiddleware(database.sessions.begin))
    with pytest.raises(ConnectionError, match="the audit log is away"):
        await mediator.send(Place())
    assert await database.rows() == [1]
    assert len(attempts) == 2


async def test_a_failing_clean_up_and_a_failing_hook_do_not_repeat_it(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    class PlaceHandler:
        def __init__(self, session: AsyncSession) -> None:
            self._session = session

        async def handle(self, command: Place, context: Context) -> int:
            async def fail() -> None:
                raise RuntimeError("no mail server")

            context.after_commit(fail)
            return await place(command, self._session)

        async def aclose(self) -> None:
            raise RuntimeError("cannot close")

    mediator = mediator_of({Place: PlaceHandler}, retry(), TransactionMiddleware(database.sessions.begin))
    assert await mediator.send(Place()) == 1
    assert await database.rows() == [1]
    assert "no mail server" in caplog.text
    assert "cannot close" in caplog.text


# -- a handler that commits by itself ----------------------------------------------------------------------------------


class Committer:
    """Commits by itself; then fails as often as it is told."""

    def __init__(self, *, fails: bool) -> None:
        self.attempts = 0
        self._fails = fails

    async def by_session(self, command: Place, context: Context, session: AsyncSession) -> int:
        return await self._handle(command, context, session)

    async def by_connection(self, command: Place, context: Context, connection: AsyncConnection) -> int:
        return await self._handle(command, context, connection)

    async def _handle(self, command: Place, context: Context, session: AsyncSession | AsyncConnection) -> int:
        self.attempts += 1
        await put(session, command.n)
        context.emit(Placed())
        await session.commit()
        if self._fails:
            raise ConnectionError("after the commit")
        return command.n


@pytest.mark.parametrize("unit_of_work", ["session", "connection"])
@pytest.mark.parametrize("fails", [True, False])
async def test_a_handler_that_commits_by_itself(database: Database, unit_of_work: str, *, fails: bool) -> None:
    committer = Committer(fails=fails)
    broker = RecordingBroker()
    on_connection = unit_of_work == "connection"
    mediator = mediator_of(
        {Place: committer.by_connection if on_connection else committer.by_session},
        retry(),
        TransactionMiddleware(database.engine.begin if on_connection else database.sessions.begin),
        PublishMiddleware(broker, {Placed: "orders"}),
    )
    if fails:
        with pytest.raises(ConnectionError, match="after the commit"):
            await mediator.send(Place())
    else:
        assert await mediator.send(Place()) == 1
    assert await database.rows() == [1]
    assert committer.attempts == 1
    assert broker.names == ([] if fails else ["Placed"])


@pytest.mark.parametrize("unit_of_work", ["session", "connection"])
async def test_the_release_of_a_savepoint_is_no_commit(database: Database, unit_of_work: str) -> None:
    attempts: list[int] = []

    async def handle(session: AsyncSession | AsyncConnection) -> int:
        attempts.append(1)
        async with session.begin_nested():
            await put(session, 1)
            async with session.begin_nested():
                await put(session, 2)
        if len(attempts) < 3:
            raise ConnectionError("reset")
        return 1

    async def by_session(command: Place, session: AsyncSession) -> int:
        return await handle(session)

    async def by_connection(command: Place, connection: AsyncConnection) -> int:
        return await handle(connection)

    on_connection = unit_of_work == "connection"
    mediator = mediator_of(
        {Place: by_connection if on_connection else by_session},
        retry(),
        TransactionMiddleware(database.engine.begin if on_connection else database.sessions.begin),
    )
    assert await mediator.send(Place()) == 1
    assert len(attempts) == 3
    assert await database.rows() == [1, 2]


async def test_a_rollback_by_the_handler_is_no_commit(database: Database) -> None:
    attempts: list[int] = []

    async def roll_back(command: Place, connection: AsyncConnection) -> int:
        attempts.append(1)
        await put(connection, 1)
        await connection.rollback()
        raise ConnectionError("reset")

    mediator = mediator_of({Place: roll_back}, retry(), TransactionMiddleware(database.engine.begin))
    with pytest.raises(ConnectionError):
        await mediator.send(Place())
    assert len(attempts) == 3
    assert await database.rows() == []


# -- the answer to COMMIT ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit_of_work", ["session", "connection"])
async def test_a_commit_that_is_refused_is_tried_again(postgres_database: str, unit_of_work: str) -> None:
    """A constraint that is checked at COMMIT: the answer is known, and it is no."""
    database = Database(postgres_database)
    await database.create()
    async with database.other_connection() as connection:
        await connection.execute(text("ALTER TABLE placed ADD UNIQUE (n) DEFERRABLE INITIALLY DEFERRED"))
        await put(connection, 1)
    attempts: list[int] = []

    async def handle(session: AsyncSession | AsyncConnection) -> int:
        attempts.append(1)
        # The first attempt collides with the row that is there; the second does not.
        await put(session, len(attempts))
        return 1

    async def by_session(command: Place, session: AsyncSession) -> int:
        return await handle(session)

    async def by_connection(command: Place, connection: AsyncConnection) -> int:
        return await handle(connection)

    on_connection = unit_of_work == "connection"
    mediator = mediator_of(
        {Place: by_connection if on_connection else by_session},
        RetryMiddleware(3, on=IntegrityError, wait=AT_ONCE),
        TransactionMiddleware(database.engine.begin if on_connection else database.sessions.begin),
    )
    assert await mediator.send(Place()) == 1
    assert len(attempts) == 2
    assert await database.rows() == [1, 2]
    await database.wait_until_left()
    await database.close()


class Remote:
    """PostgreSQL behind a proxy, and a mediator that reaches it only through that."""

    def __init__(self, url: str, proxy: Proxy, *middlewares: Any, seconds: float = 10.0) -> None:
        self.proxy = proxy
        self.attempts = 0
        self.database = Database(url)
        self.through = Database(make_url(url).set(port=proxy.port).render_as_string(hide_password=False))
        self.mediator = mediator_of(
            {Place: self.place}, *middlewares, TransactionMiddleware(self.through.sessions.begin, seconds=seconds)
        )

    async def place(self, command: Place, session: AsyncSession) -> int:
        self.attempts += 1
        return await place(command, session)


@pytest.fixture
async def proxied(postgres_database: str) -> AsyncGenerator[Any]:
    made: list[Remote] = []
    port = make_url(postgres_database).port
    assert port is not None
    with Proxy(port) as proxy:

        def make(*middlewares: Any, seconds: float = 10.0) -> Remote:
            made.append(Remote(postgres_database, proxy, *middlewares, seconds=seconds))
            return made[0]

        database = Database(postgres_database)
        await database.create()
        await database.close()
        yield make
        for remote in made:
            await remote.through.wait_until_left()
            await remote.through.close()
            await remote.database.close()


async def test_a_timeout_shorter_than_the_answer_to_commit_has_no_effect(proxied: Any) -> None:
    remote = proxied(retry(), TimeoutMiddleware(0.2))
    commit = remote.proxy.when(b"COMMIT;", "hold")
    task = asyncio.ensure_future(remote.mediator.send(Place()))
    await commit.was_answered()
    await asyncio.sleep(0.3)  # past the timeout
    assert not task.done()
    remote.proxy.release()
    assert await task == 1
    assert remote.attempts == 1
    assert await remote.database.rows() == [1]


async def test_an_answer_to_commit_that_takes_too_long_leaves_the_outcome_unknown(proxied: Any) -> None:
    remote = proxied(retry(), seconds=0.2)
    commit = remote.proxy.when(b"COMMIT;", "hold")
    with pytest.raises(CommitOutcomeUnknownError, match="the outcome of the commit of Place is unknown"):
        await remote.mediator.send(Place())
    assert commit.passed.is_set()
    remote.proxy.release()
    assert remote.attempts == 1
    assert await remote.database.rows() == [1]


@pytest.mark.parametrize(("action", "rows"), [("cut", []), ("cut reply", [1])])
async def test_a_connection_that_dies_at_commit_leaves_the_outcome_unknown(
    proxied: Any, action: Any, rows: list[int]
) -> None:
    remote = proxied(retry())
    remote.proxy.when(b"COMMIT;", action)
    with pytest.raises(CommitOutcomeUnknownError) as caught:
        await remote.mediator.send(Place())
    assert caught.value.__cause__ is not None
    assert remote.attempts == 1
    assert await remote.database.rows() == rows


async def test_a_policy_that_names_the_unknown_outcome_tries_again(proxied: Any) -> None:
    remote = proxied(RetryMiddleware(3, on=(CommitOutcomeUnknownError, ConnectionError), wait=AT_ONCE))
    remote.proxy.when(b"COMMIT;", "cut")
    assert await remote.mediator.send(Place()) == 1
    assert remote.attempts == 2
    assert await remote.database.rows() == [1]


@pytest.mark.parametrize("on", [Exception, MediatorError])
async def test_a_policy_that_names_only_a_base_of_it_does_not(proxied: Any, on: type[Exception]) -> None:
    remote = proxied(RetryMiddleware(3, on=on, wait=AT_ONCE))
    remote.proxy.when(b"COMMIT;", "cut reply")
    with pytest.raises(CommitOutcomeUnknownError):
        await remote.mediator.send(Place())
    assert await remote.database.rows() == [1]


async def test_a_connection_that_dies_before_the_commit_is_tried_again(proxied: Any) -> None:
    remote = proxied(retry())
    remote.proxy.when(b"INSERT", "cut")
    assert await remote.mediator.send(Place()) == 1
    assert remote.attempts == 2
    assert await remote.database.rows() == [1]


async def test_a_flush_that_waits_for_a_lock_can_be_timed_out(postgres_database: str) -> None:
    """What the session still keeps in memory is written before the commit, where a timeout still counts."""
    database = Database(postgres_database)
    async with database.other_connection() as connection:
        await connection.run_sync(Base.metadata.create_all)

    async def add(command: Place, session: AsyncSession) -> int:
        session.add(Row(n=command.n))
        return 1

    mediator = mediator_of({Place: add}, TimeoutMiddleware(0.2), TransactionMiddleware(database.sessions.begin))
    async with database.other_connection() as connection:
        await connection.execute(text("LOCK TABLE placed"))
        with anyio.fail_after(5), pytest.raises(TimeoutError, match="Place took longer"):
            await mediator.send(Place())
    assert await database.rows() == []
    assert await mediator.send(Place()) == 1
    assert await database.rows() == [1]
    await database.wait_until_left()
    await database.close()


async def test_concurrent_handlers_lose_no_update(database: Database) -> None:
    """On SQLite because of prepare_sqlite; on PostgreSQL because the handler locks the row."""
    async with database.other_connection() as connection:
        await put(connection, 0)
    lock = "" if database.is_sqlite else " FOR UPDATE"

    async def count(command: Place, session: AsyncSession) -> int:
        n: int = (await session.execute(text(f"SELECT n FROM placed{lock}"))).scalar_one()
        await asyncio.sleep(0)
        await session.execute(text("UPDATE placed SET n = :n"), {"n": n + 1})
        return n + 1

    mediator = mediator_of({Place: count}, TransactionMiddleware(database.sessions.begin))
    async with asyncio.TaskGroup() as tasks:
        results = [tasks.create_task(mediator.send(Place())) for _ in range(20)]
    assert sorted(task.result() for task in results) == list(range(1, 21))
    assert await database.rows() == [20]


async def test_an_event_handler_that_fails_takes_the_row_with_it(database: Database) -> None:
    async def place_and_emit(command: Place, context: Context, session: AsyncSession) -> int:
        context.emit(Reserved())
        return await place(command, session)

    async def fail(event: Reserved) -> None:
        raise ValueError("out of stock")

    mediator = mediator_of({Place: place_and_emit, Reserved: fail}, TransactionMiddleware(database.sessions.begin))
    with pytest.raises(ValueError, match="out of stock"):
        await mediator.send(Place())
    assert await database.rows() == []
