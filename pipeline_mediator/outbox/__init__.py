"""Messages that leave with the transaction that caused them: stored in it, published by a relay after its commit."""

from typing import TYPE_CHECKING

__all__ = ["OutboxRelay"]

if TYPE_CHECKING:
    from pipeline_mediator.outbox.relay import OutboxRelay
else:
    from pipeline_mediator.lazy import lazy_names

    __getattr__, __dir__ = lazy_names(__name__, {"relay": ("OutboxRelay",)})
