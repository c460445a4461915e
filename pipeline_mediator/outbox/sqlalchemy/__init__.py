"""The outbox in SQLAlchemy: PostgreSQL (asyncpg, psycopg), MariaDB and MySQL (asyncmy, aiomysql), SQLite (aiosqlite)."""

from __future__ import annotations

from pipeline_mediator.errors import MissingExtraError

try:
    import sqlalchemy.ext.asyncio as _sqlalchemy
except ModuleNotFoundError as error:  # pragma: no cover - shown in a subprocess
    if error.name is None or error.name.partition(".")[0] != "sqlalchemy":
        raise
    raise MissingExtraError("pipeline_mediator.outbox.sqlalchemy", "SQLAlchemy", "sqlalchemy") from error
del _sqlalchemy

from pipeline_mediator.outbox.sqlalchemy.store import SQLAlchemyOutbox
from pipeline_mediator.outbox.sqlalchemy.tables import OutboxTables, outbox_tables

__all__ = ["OutboxTables", "SQLAlchemyOutbox", "outbox_tables"]
