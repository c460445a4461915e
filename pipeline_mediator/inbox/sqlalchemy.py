"""An inbox in the application's own database, by SQLAlchemy: PostgreSQL, MariaDB, MySQL and SQLite."""

from __future__ import annotations

from datetime import timedelta
from hashlib import sha256
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakSet

from pipeline_mediator.errors import ConfigurationError, MissingExtraError, SchemaError, name_of

try:
    from sqlalchemy import Column, Double, Index, Integer, LargeBinary, Table, Text, bindparam, delete, select, text
    from sqlalchemy.dialects import mysql, postgresql, sqlite
    from sqlalchemy.exc import DBAPIError
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession
except ModuleNotFoundError as error:  # pragma: no cover - shown in a subprocess
    if error.name is None or error.name.partition(".")[0] != "sqlalchemy":
        raise
    raise MissingExtraError("pipeline_mediator.inbox.sqlalchemy", "SQLAlchemy", "sqlalchemy") from error

from pipeline_mediator.databases import Timestamp, differences, missing_from, seconds_ago

if TYPE_CHECKING:
    from sqlalchemy import CursorResult, Dialect, Engine, Executable, Insert, MetaData

__all__ = ["SQLAlchemyInbox", "inbox_table"]

_BATCH = 1000
"""Rows deleted by one transaction: few enough that nobody waits for it."""


def inbox_table(metadata: MetaData, name: str = "inbox", schema: str | None = None) -> Table:
    """The table of an inbox, in the application's own metadata, so that `create_all` and Alembic know it.

        INBOX = inbox_table(Base.metadata)

    Its key is a digest of subscription, source and message id: so they may be of any length, and no collation takes two
    of them for the same. They stand beside it for people who look.
    """
    return Table(
        name,
        metadata,
        Column("digest", LargeBinary(32).with_variant(mysql.BINARY(32), "mysql", "mariadb"), primary_key=True),
        Column("subscription", Text, nullable=False),
        Column("source", Text, nullable=False),
        Column("message_id", Text, nullable=False),
        Column("handled_at", Timestamp, nullable=False),
        Index(f"ix_{name}_handled_at", "handled_at"),
        schema=schema,
        # A server's default character set may have no letters but the western ones.
        mysql_charset="utf8mb4",
        mariadb_charset="utf8mb4",
    )


class SQLAlchemyInbox:
    """An `InboxStore`: each handled message is a row, inserted in the transaction of its handler.

        inbox = SQLAlchemyInbox(INBOX, engine)
        Pipeline(TransactionMiddleware(sessions.begin), InboxMiddleware(inbox), ...)

    `retention` has to be longer than anything may redeliver a message: what came again after it would be handled again.
    Without an engine it cleans what it has recorded in, and cannot validate: for tenants, each with a database of its
    own.

    A copy that arrives while the first one is being handled waits for it, and holds a connection meanwhile: keep the
    consumer's concurrency below the pool's size. If the first is rolled back while several copies wait, MariaDB and
    MySQL may end some of them as a deadlock; they are rolled back, and may be tried again.

    Raises `SchemaError` where the table is not there, `ConfigurationError` for a resource that is not SQLAlchemy's.
    """

    def __init__(
        self, table: Table, engine: AsyncEngine | None = None, *, retention: timedelta = timedelta(days=7)
    ) -> None:
        if retention <= timedelta(0):
            raise ConfigurationError(f"SQLAlchemyInbox(retention={retention!r}): nothing would be remembered")
        self.table = table
        self._engine = engine
        self._engines: WeakSet[Engine] = WeakSet()
        """Those it has recorded through."""
        self._retention = retention
        values = {"handled_at": seconds_ago(0)}
        # IGNORE also makes a warning of what does not fit, but nothing here has a length that could be exceeded.
        ignoring = mysql.insert(table).values(values).prefix_with("IGNORE")
        inserts: dict[str, Insert] = {
            "postgresql": postgresql.insert(table).values(values).on_conflict_do_nothing(),
            "sqlite": sqlite.insert(table).values(values).on_conflict_do_nothing(),
            "mysql": ignoring,
            "mariadb": ignoring,
        }
        self._inserts = {name: it.execution_options(preserve_rowcount=True) for name, it in inserts.items()}

    @property
    def retention(self) -> timedelta:
        """How long a message is remembered."""
        return self._retention

    async def record(self, resource: object, subscription: str, source: str, message_id: str, /) -> bool:
        """Remember the message in the open transaction of `resource`; False if it was handled before."""
        if not isinstance(resource, AsyncSession | AsyncConnection):
            raise ConfigurationError(
                f"SQLAlchemyInbox writes through an AsyncSession or AsyncConnection, and the transaction's resource is "
                f"a {name_of(type(resource))}. Let TransactionMiddleware begin with sessions.begin or engine.begin."
            )
        row = {
            "digest": _digest(subscription, source, message_id),
            "subscription": subscription,
            "source": source,
            "message_id": message_id,
        }
        try:
            result = await resource.execute(self._insert_for(resource), row)
        except DBAPIError as error:
            if (problem := missing_from(error)) is not None:
                raise self._schema_error([problem]) from error
            raise
        return cast("CursorResult[object]", result).rowcount == 1

    async def clean(self, limit: int, /) -> int:
        """Forget at most `limit` messages that are older than the retention, a small batch per transaction."""
        engines = [AsyncEngine(one) for one in self._engines] if self._engine is None else [self._engine]
        deleted = 0
        for engine in engines:
            while deleted < limit:
                size = min(limit - deleted, _BATCH)
                batch = await self._clean_batch(engine, size)
                deleted += batch
                if batch < size:
                    break
        return deleted

    async def validate_schema(self) -> None:
        """Raise `SchemaError`, which lists every difference between the table and what this version needs."""
        if self._engine is None:
            raise ConfigurationError(
                "this SQLAlchemyInbox was made without an engine: it records in the transactions of others, and cannot "
                "validate its table. Give it one: SQLAlchemyInbox(INBOX, engine)."
            )
        async with self._engine.connect() as connection:
            found = await connection.run_sync(differences, self.table)
        if found:
            raise self._schema_error(found)

    async def _clean_batch(self, engine: AsyncEngine, size: int) -> int:
        if engine.dialect.name != "sqlite":
            # Above it, MariaDB locks the gaps between rows too, and who inserts there waits.
            engine = engine.execution_options(isolation_level="READ COMMITTED")
        values = {"seconds": self._retention.total_seconds(), "size": size}
        async with engine.begin() as connection:
            return (await connection.execute(self._delete_for(engine.dialect), values)).rowcount

    def _delete_for(self, dialect: Dialect) -> Executable:
        table = self.table
        if dialect.name in {"mysql", "mariadb"}:
            # They know no subquery with a limit, SQLAlchemy no DELETE with an order. Two statements will not do: told
            # the rows by their keys, MariaDB reads all of a small table, and two cleaners end in a deadlock.
            name = dialect.identifier_preparer.format_table(table)
            old = "handled_at < UTC_TIMESTAMP(6) - INTERVAL :seconds SECOND ORDER BY handled_at LIMIT :size"
            return text(f"DELETE FROM {name} WHERE {old}")  # noqa: S608 - a quoted name; what varies is a parameter
        oldest = (
            select(table.c.digest)
            .where(table.c.handled_at < seconds_ago(bindparam("seconds", type_=Double)))
            .order_by(table.c.handled_at)
            .limit(bindparam("size", type_=Integer))
            .with_for_update(skip_locked=True)
        )
        if dialect.name == "postgresql":
            # It may run a subquery more than once, and each time it would lock other rows; not so a CTE.
            oldest = select(oldest.cte("oldest").c.digest)
        return delete(table).where(table.c.digest.in_(oldest))

    def _insert_for(self, resource: AsyncSession | AsyncConnection) -> Insert:
        bound: Any = resource.get_bind(clause=self.table) if isinstance(resource, AsyncSession) else resource
        dialect = bound.dialect.name
        engine: Any = bound.engine
        self._engines.add(getattr(engine, "sync_engine", engine))
        try:
            return self._inserts[dialect]
        except KeyError:
            known = ", ".join(sorted(self._inserts))
            raise ConfigurationError(f"SQLAlchemyInbox knows {known}, and not {dialect}") from None

    def _schema_error(self, found: list[str]) -> SchemaError:
        return SchemaError(
            self.table.fullname,
            found,
            "It should be as inbox_table(...) of this version makes it: create it with MetaData.create_all, or bring "
            "it there with a migration.",
        )


def _digest(subscription: str, source: str, message_id: str) -> bytes:
    # With the lengths, or ("ab", "c") would be ("a", "bc").
    return sha256(f"{len(subscription)}:{len(source)}:{subscription}{source}{message_id}".encode()).digest()
