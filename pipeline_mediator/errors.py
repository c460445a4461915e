"""Every error this library raises; what a handler raises passes through untouched.

MediatorError
├── ConfigurationError                 found before the first message; fix the set-up
│   ├── BindError                      a handler or message that cannot be bound as it is
│   │   ├── DuplicateHandlerError
│   │   ├── HandlerSignatureError
│   │   └── FrozenMapError
│   ├── OrderError                     middlewares in an order that breaks their rules
│   ├── ResolutionError                dependencies that the container cannot provide
│   ├── DestinationError               a message type mapped to a broker that cannot go there
│   ├── DatabaseNotPreparedError
│   ├── SchemaError                    a table that is missing, or not what this version needs
│   └── MissingExtraError              also an ImportError
├── HandlerNotFoundError               nobody handles this message
├── PermanentError                     trying again cannot help
│   ├── InvalidMessageError            a validator refused it
│   ├── MessageLoopError               it goes round between applications
│   ├── DeliveryExhaustedError         handed over often enough, and never settled
│   └── CodecError
│       ├── EncodeError
│       ├── DecodeError
│       ├── UnknownMessageError
│       ├── MissingUpcasterError
│       └── MessageTooLargeError
├── EmitError                          an event emitted where it cannot be delivered
├── TransactionError
│   ├── TransactionFinishedError
│   ├── TransactionDoomedError
│   ├── CommitOutcomeUnknownError
│   └── CommittedButNotPublishedError
├── OutboxError
│   ├── OutboxFullError                more messages wait than `max_pending` allows
│   └── LeaseLostError                 what a relay had taken is another's by now
└── BrokerError
    ├── BrokerUnavailableError
    └── BrokerRefusedError             wrong credentials, no rights: trying again cannot help
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, get_origin

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "BindError",
    "BrokerError",
    "BrokerRefusedError",
    "BrokerUnavailableError",
    "CodecError",
    "CommitOutcomeUnknownError",
    "CommittedButNotPublishedError",
    "ConfigurationError",
    "DatabaseNotPreparedError",
    "DecodeError",
    "DeliveryExhaustedError",
    "DestinationError",
    "DuplicateHandlerError",
    "EmitError",
    "EncodeError",
    "FrozenMapError",
    "HandlerNotFoundError",
    "HandlerSignatureError",
    "InvalidMessageError",
    "LeaseLostError",
    "MediatorError",
    "MessageLoopError",
    "MessageTooLargeError",
    "MissingExtraError",
    "MissingUpcasterError",
    "OrderError",
    "OutboxError",
    "OutboxFullError",
    "PermanentError",
    "ResolutionError",
    "SchemaError",
    "TransactionDoomedError",
    "TransactionError",
    "TransactionFinishedError",
    "UnknownMessageError",
]


class MediatorError(Exception):
    """Root of every error this library raises."""


class ConfigurationError(MediatorError):
    """The set-up is wrong; raised before the first message is handled."""


class BindError(ConfigurationError):
    """A message type or a handler that a map cannot take."""


class DuplicateHandlerError(BindError):
    """A second handler for a request that already has one."""

    def __init__(self, message_type: type, existing: object, refused: object) -> None:
        self.message_type = message_type
        self.existing = existing
        self.refused = refused
        super().__init__(message_type, existing, refused)

    def __str__(self) -> str:
        return (
            f"{self.message_type.__name__} is already bound to {name_of(self.existing)}; a request has exactly one "
            f"handler, so {name_of(self.refused)} was refused. Remove one of the two binds."
        )


class HandlerSignatureError(BindError):
    """A handler that cannot be called with the message it is bound to, or returns something else than promised."""

    def __init__(self, handler: object, message_type: type | None, problem: str) -> None:
        self.handler = handler
        self.message_type = message_type
        self.problem = problem
        super().__init__(handler, message_type, problem)

    def __str__(self) -> str:
        to = f" to {self.message_type.__name__}" if self.message_type is not None else ""
        return f"{name_of(self.handler)} cannot be bound{to}: {self.problem}"


class FrozenMapError(BindError):
    """A bind after a mediator has compiled the map."""

    def __init__(self, map_name: str, message_type: type) -> None:
        self.map_name = map_name
        self.message_type = message_type
        super().__init__(map_name, message_type)

    def __str__(self) -> str:
        return (
            f"{self.map_name} is frozen: a mediator has compiled it, so {self.message_type.__name__} cannot be bound "
            "any more. Bind every handler before the Mediator is constructed."
        )


class OrderError(ConfigurationError):
    """Middlewares that stand where their rules forbid it.

    `violations` lists every one of them, as text that names both middlewares, their positions, the reason and the fix.
    """

    def __init__(self, violations: Sequence[str]) -> None:
        self.violations = tuple(violations)
        super().__init__(self.violations)

    def __str__(self) -> str:
        lines = "\n".join(f"  - {violation}" for violation in self.violations)
        return f"the middlewares stand in an order that breaks {len(self.violations)} of their rules:\n{lines}"


class ResolutionError(ConfigurationError):
    """Dependencies that the container cannot provide; `missing` lists all of them as text."""

    def __init__(self, container: object, missing: Sequence[str]) -> None:
        self.container = container
        self.missing = tuple(missing)
        super().__init__(container, self.missing)

    def __str__(self) -> str:
        lines = "\n".join(f"  - {entry}" for entry in self.missing)
        return (
            f"{type(self.container).__name__} cannot provide what {len(self.missing)} "
            f"{'parameter needs' if len(self.missing) == 1 else 'parameters need'}:\n{lines}"
        )


class DestinationError(ConfigurationError):
    """A message type that cannot go to the destination it is mapped to."""


class DatabaseNotPreparedError(ConfigurationError):
    """A database engine that would lose updates as it is configured."""


class SchemaError(ConfigurationError):
    """The table of an outbox or an inbox is not there, or is not what this version needs."""

    def __init__(self, table: str, differences: Sequence[str], fix: str) -> None:
        super().__init__(table, differences, fix)
        self.table = table
        self.differences = tuple(differences)
        self.fix = fix

    def __str__(self) -> str:
        return f"table {self.table}: {'; '.join(self.differences)}. {self.fix}"


class MissingExtraError(ConfigurationError, ImportError):
    """An optional library that is not installed; the text names the extra."""

    def __init__(self, feature: str, library: str, extra: str) -> None:
        self.feature = feature
        self.library = library
        self.extra = extra
        super().__init__(feature, library, extra)

    def __str__(self) -> str:
        return f'{self.feature} needs {self.library}. Install it with: pip install "pipeline-mediator[{self.extra}]"'


class HandlerNotFoundError(MediatorError):
    """Nobody handles this message type."""

    def __init__(self, message_type: type, problem: str, nearest: Sequence[str] = ()) -> None:
        self.message_type = message_type
        self.problem = problem
        self.nearest = tuple(nearest)
        super().__init__(message_type, problem, self.nearest)

    def __str__(self) -> str:
        hint = f" Did you mean {' or '.join(self.nearest)}?" if self.nearest else ""
        return f"{self.message_type.__name__}: {self.problem}{hint}"


class PermanentError(MediatorError):
    """Trying again cannot help; retry and redelivery pass it on. An application may raise subclasses of its own."""


class InvalidMessageError(PermanentError):
    """A validator refused the message; `__cause__` is what the validator raised."""

    def __init__(self, message_type: type, reason: str) -> None:
        self.message_type = message_type
        self.reason = reason
        super().__init__(message_type, reason)

    def __str__(self) -> str:
        return f"{self.message_type.__name__} is not valid: {self.reason}"


class MessageLoopError(PermanentError):
    """What is to be published was caused by so many deliveries one after the other that it must be going in circles."""

    def __init__(self, message_type: type, hops: int) -> None:
        self.message_type = message_type
        self.hops = hops
        super().__init__(f"{message_type.__name__} ({hops} hops)")

    def __str__(self) -> str:
        return (
            f"{self.message_type.__name__} is not published: {self.hops} deliveries, each caused by the one before, "
            "led to it. Do two applications answer each other's events? Break the circle in one of their handlers."
        )


class DeliveryExhaustedError(PermanentError):
    """A message was handed over again and again and never settled: it may have ended the process each time."""

    def __init__(self, attempt: int, attempts: int) -> None:
        self.attempt = attempt
        self.attempts = attempts
        super().__init__(f"attempt {attempt} of {attempts}")

    def __str__(self) -> str:
        return (
            f"this is attempt {self.attempt} of {self.attempts}: those before ended without an outcome. Did the "
            "message end the process that handled it? It is not handled again until somebody retries the dead letter."
        )


class CodecError(PermanentError):
    """A message that cannot be turned into bytes or back."""


class EncodeError(CodecError):
    """A message with a field that has no form on the wire; `field` is its path, None where it is the message itself."""

    def __init__(self, message_type: type, field: str | None, problem: str) -> None:
        self.message_type = message_type
        self.field = field
        self.problem = problem
        super().__init__(message_type, field, problem)

    def __str__(self) -> str:
        what = f"field `{self.field}` of {self.message_type.__name__}" if self.field else self.message_type.__name__
        return f"{what} cannot be encoded: {self.problem}"


class DecodeError(CodecError):
    """Bytes that are not a message; `where` is the path of the part that is wrong, never what stood there."""

    def __init__(self, name: str | None, where: str, problem: str) -> None:
        self.name = name
        self.where = where
        self.problem = problem
        super().__init__(name, where, problem)

    def __str__(self) -> str:
        return f"{self.name or 'what arrived'} cannot be decoded: {self.problem} (at {self.where})"


class UnknownMessageError(CodecError):
    """A message type or wire name that is not in the codec's catalog; `nearest` are names that are, with versions."""

    def __init__(self, name: str, version: int, nearest: Sequence[str] = ()) -> None:
        self.name = name
        self.version = version
        self.nearest = tuple(nearest)
        super().__init__(name, version, self.nearest)

    def __str__(self) -> str:
        hint = f" Nearest: {', '.join(self.nearest)}." if self.nearest else ""
        return (
            f"{self.name!r} in version {self.version} is not in the codec's catalog.{hint} Give its type to the codec, "
            "or bind a handler or a destination to it."
        )


class MissingUpcasterError(CodecError):
    """A message of an older version than is known here, and nothing that turns it into that one.

    `version` is the one that arrived, `reached` the one that has no upcaster, `known` the nearest that has a type.
    """

    def __init__(self, name: str, version: int, reached: int, known: int) -> None:
        self.name = name
        self.version = version
        self.reached = reached
        self.known = known
        super().__init__(name, version, reached, known)

    def __str__(self) -> str:
        return (
            f"{self.name!r} in version {self.version} cannot be read: here it is known in version {self.known}, and "
            f"nothing turns version {self.reached} into {self.reached + 1}. Register a function that does: "
            f"@codec.upcaster({self.name!r}, {self.reached})."
        )


class MessageTooLargeError(CodecError):
    """An encoded message above the size limit."""

    def __init__(self, name: str, size: int, limit: int) -> None:
        self.name = name
        self.size = size
        self.limit = limit
        super().__init__(name, size, limit)

    def __str__(self) -> str:
        return (
            f"{self.name} is {self.size} bytes encoded, the limit is {self.limit}. Send a reference to the content "
            "instead of the content, or raise max_size if the broker takes more."
        )


class EmitError(MediatorError):
    """An event emitted where it cannot be delivered."""


class TransactionError(MediatorError):
    """Something about the life of a transaction."""


class TransactionFinishedError(TransactionError):
    """Something was asked of an attempt that has already ended."""


class TransactionDoomedError(TransactionError):
    """The transaction was rolled back because a joined message failed, though its caller caught the error.

    `message_type` is the joined message's, `error` the name of what it raised.
    """

    def __init__(self, message_type: type, root_type: type, error: str) -> None:
        self.message_type = message_type
        self.root_type = root_type
        self.error = error
        super().__init__(message_type, root_type, error)

    def __str__(self) -> str:
        return (
            f"{self.root_type.__name__} may not commit: {self.message_type.__name__}, sent from its handler, failed "
            f"inside its transaction with {self.error}, and what it had written cannot be told apart. Let the error "
            "pass, or give "
            'joined messages a savepoint with TransactionMiddleware(..., nested="savepoint").'
        )


class CommitOutcomeUnknownError(TransactionError):
    """The connection died between the start of COMMIT and its answer: the work is committed or it is not.

    Never retried unless the retry policy names this class. `__cause__` is the driver's error.
    """

    def __init__(self, message_type: type) -> None:
        self.message_type = message_type
        super().__init__(message_type)

    def __str__(self) -> str:
        return (
            f"the outcome of the commit of {self.message_type.__name__} is unknown: no answer to COMMIT came back. "
            "Look in the database before repeating it, or make the message idempotent and let RetryMiddleware name "
            "this error."
        )


class CommittedButNotPublishedError(TransactionError):
    """The transaction committed, but events that belong to it did not reach the broker.

    `result` is what the handler returned, `events` what was not published, in order.
    """

    def __init__(self, result: Any, events: Sequence[object]) -> None:
        self.result = result
        self.events = tuple(events)
        super().__init__(result, self.events)

    def __str__(self) -> str:
        names = ", ".join(type(event).__name__ for event in self.events)
        return (
            f"the transaction committed, but {len(self.events)} of its events did not reach the broker: {names}. Do "
            "not send the request again; publish the events. An outbox stores them in the transaction instead."
        )


class OutboxError(MediatorError):
    """The outbox could not do what was asked."""


class OutboxFullError(OutboxError):
    """More messages would wait than the outbox's `max_pending` allows; the transaction is rolled back."""

    def __init__(self, pending: int, added: int, max_pending: int) -> None:
        super().__init__(pending, added, max_pending)
        self.pending = pending
        self.added = added
        self.max_pending = max_pending

    def __str__(self) -> str:
        return (
            f"{self.pending} messages wait in the outbox, {self.added} more would exceed max_pending={self.max_pending}"
            ". Is a relay running, and does its broker answer?"
        )


class LeaseLostError(OutboxError):
    """What a relay had taken is another's by now: it hung, or its connection died. Nothing was settled."""


class BrokerError(MediatorError):
    """A broker did not take a message."""


class BrokerUnavailableError(BrokerError):
    """The broker cannot be reached, hung, or dropped the connection; trying again may help."""


class BrokerRefusedError(BrokerError, PermanentError):
    """The broker answered no: wrong credentials, no rights, no such destination."""


def name_of(thing: object) -> str:
    """The name by which a person knows this class, function or object."""
    while isinstance(thing, partial):
        thing = thing.func
    if thing is None or get_origin(thing) is not None:
        return str(thing)
    name = getattr(thing, "__qualname__", None)
    return name if isinstance(name, str) else f"{type(thing).__qualname__} object"
