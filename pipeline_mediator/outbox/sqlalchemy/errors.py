"""Telling a connection that is gone from a statement that is wrong."""

from __future__ import annotations

from sqlalchemy.exc import DBAPIError

from pipeline_mediator.errors import LeaseLostError

__all__ = ["is_gone", "lease_lost"]

_GONE = ("08", "57P", "25P03", "25P04")
"""SQLSTATE: connection exceptions, operator intervention, the two session timeouts."""
_DRIVERS = frozenset({"aiomysql", "asyncmy", "asyncpg", "psycopg", "pymysql"})


def is_gone(error: BaseException) -> bool:
    """Whether this error means that the session, its transaction and its locks are no more."""
    if isinstance(error, DBAPIError):
        state = getattr(error.orig, "sqlstate", None) or ""
        return error.connection_invalidated or state.startswith(_GONE)
    # asyncpg's InternalClientError, for one, when the server ended the session while nothing was asked of it.
    # TimeoutError, which is an OSError: nobody knows what became of it.
    return isinstance(error, OSError | EOFError) or type(error).__module__.partition(".")[0] in _DRIVERS


def lease_lost(reason: str) -> LeaseLostError:
    """What a relay is told that comes back too late."""
    return LeaseLostError(
        f"{reason}. Nothing was settled, so what this relay published will be published again. If nobody was killed or "
        "stopped: make the lease longer than a batch may take, or the batch smaller."
    )
