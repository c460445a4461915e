"""The seam to a database that remembers which messages a subscription has handled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from datetime import timedelta

__all__ = ["InboxStore"]


class InboxStore(Protocol):
    """Which messages were handled, by (subscription, source, message id): ids are unique within one source only.

    `pipeline_mediator.testing.InboxStoreSuite` holds an implementation to what stands here.
    """

    async def record(self, resource: object, subscription: str, source: str, message_id: str, /) -> bool:
        """Remember the message in the open transaction of `resource`; False if it was handled before.

        Rolled back, it was not handled. While another transaction has recorded the same message and not ended yet, this
        waits for it: at most one of them commits. Raises `SchemaError` where the table is not there.
        """
        ...

    @property
    def retention(self) -> timedelta:
        """How long a message is remembered; longer than anything may redeliver it."""
        ...

    async def clean(self, limit: int, /) -> int:
        """Forget at most `limit` messages that are older than the retention, by the database's clock; how many."""
        ...

    async def validate_schema(self) -> None:
        """Raise `SchemaError`, which lists every difference between the table and what this version needs."""
        ...
