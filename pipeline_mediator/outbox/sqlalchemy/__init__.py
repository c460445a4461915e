"""The outbox in a database that SQLAlchemy speaks to: PostgreSQL, MariaDB, MySQL, SQLite."""

from __future__ import annotations

from pipeline_mediator.errors import MissingExtraError

try:
    from pipeline_mediator.outbox.sqlalchemy.store import SQLAlchemyOutbox
    from pipeline_mediator.outbox.sqlalchemy.tables import OutboxTables, outbox_tables
except ModuleNotFoundError as error:  # pragma: no cover - shown in a subprocess
    if error.name is None or error.name.partition(".")[0] != "sqlalchemy":
        raise
    raise MissingExtraError("pipeline_mediator.outbox.sqlalchemy", "SQLAlchemy", "sqlalchemy") from error

__all__ = ["OutboxTables", "SQLAlchemyOutbox", "outbox_tables"]
