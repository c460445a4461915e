"""Messages for an outbox that wait for the commit of their transaction, to be written by one statement."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipeline_mediator.outbox.protocol import OutboxStore, StoredMessage

__all__ = ["Staged"]


class Staged:
    """What one transaction will have written into its outbox, or, if it is rolled back, not.

    `place` tells for work that is done now a function that says later whether it is still part of the transaction:
    a savepoint around it, or the transaction itself, may have been rolled back since. None where that cannot be told.
    """

    __slots__ = ("_messages", "_place", "_resource", "_written")

    def __init__(self, resource: object, place: Callable[[], Callable[[], bool] | None] | None) -> None:
        self._resource = resource
        self._place = place
        self._messages: dict[OutboxStore, list[tuple[StoredMessage, Callable[[], bool] | None]]] = {}
        self._written: set[OutboxStore] = set()

    def __bool__(self) -> bool:
        return bool(self._messages)

    def add(self, store: OutboxStore, message: StoredMessage) -> None:
        """Take a message, in the order in which they shall stand."""
        remains = None if self._place is None else self._place()
        self._messages.setdefault(store, []).append((message, remains))

    async def write(self) -> None:
        """Write what is still part of the transaction."""
        for store in tuple(self._messages):
            waiting = self._messages.pop(store)
            messages = [message for message, remains in waiting if remains is None or remains()]
            if not messages:
                continue
            try:
                await store.add(self._resource, messages)
            except BaseException:
                # Whoever catches this and commits again shall not lose them.
                self._messages[store] = waiting + self._messages.get(store, [])
                raise
            self._written.add(store)

    def absorb(self, other: Staged) -> None:
        """Take over what another one has not written."""
        for store, waiting in other._messages.items():
            self._messages.setdefault(store, []).extend(waiting)
        other._messages = {}

    def committed(self) -> None:
        """Tell the stores that were written to."""
        while self._written:
            self._written.pop().committed()
