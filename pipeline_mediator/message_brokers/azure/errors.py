"""What the Service Bus client raises, in this library's words; the one place where that is translated."""

from __future__ import annotations

from typing import Any, Final

from azure.servicebus import exceptions

from pipeline_mediator.errors import BrokerError, BrokerRefusedError, BrokerUnavailableError

__all__ = ["concerns_content", "explain", "explain_receiving", "is_of_another_kind", "lacks_entity"]

_NOT_FOUND: Final = 404
_NOT_AUTHORIZED: Final = frozenset({401, 403})
_NOT_ALLOWED: Final = "amqp:not-allowed"
_NOT_TAKEN: Final = frozenset(
    {
        _NOT_ALLOWED,
        "amqp:decode-error",
        "amqp:invalid-field",
        "amqp:not-implemented",
        "amqp:precondition-failed",
        "com.microsoft:argument-error",
        "com.microsoft:argument-out-of-range",
        "com.microsoft:precondition-failed",
    }
)

_UNAVAILABLE: Final[dict[type[Exception], str]] = {
    exceptions.MessagingEntityDisabledError: "{place} is disabled. Enable it.",
    exceptions.OperationTimeoutError: (
        "{place} did not answer within {timeout:g} s; what was on its way may have arrived all the same. Look whether "
        "the service hangs, is overloaded, or sits behind a firewall that drops packets."
    ),
    exceptions.ServiceBusAuthenticationError: (
        "{place} did not get to look at the credentials ({error}). Look whether the service is well."
    ),
    exceptions.ServiceBusQuotaExceededError: (
        "{place} takes no more: it is full, or has too many connections. Receive from it, clear its dead letters, or "
        "raise its size."
    ),
    exceptions.ServiceBusServerBusyError: "{place} is busy, and wants its clients to wait.",
}
_UNAVAILABLE[TimeoutError] = _UNAVAILABLE[exceptions.OperationTimeoutError]
_UNREACHABLE: Final = (
    "{place} cannot be reached, or the connection was dropped ({kind}: {error}). Look at the address, the network and "
    "the service."
)


def concerns_content(error: Exception) -> bool:
    """Whether a transfer was refused for what is in it: nothing of it was stored, and other messages may be taken."""
    return isinstance(error, exceptions.MessageSizeExceededError) or _condition(error) in _NOT_TAKEN


def lacks_entity(error: Exception) -> bool:
    """Whether the service answered, and has no such queue or topic; it says so on attaching, or about the token."""
    return isinstance(error, exceptions.MessagingEntityNotFoundError) or _token_status(error) == _NOT_FOUND


def explain(error: Exception, place: str, timeout: float) -> BrokerError:
    """A new error of ours for what the client raised; `place` is the entity, or only the namespace."""
    explained = _explained(error, place, timeout)
    if not isinstance(error, TimeoutError):  # ours: says nothing more, and holds all that was interrupted, sockets too
        explained.__cause__ = error
    return explained


def _explained(error: Exception, place: str, timeout: float) -> BrokerError:
    if lacks_entity(error):
        return BrokerRefusedError(
            f"there is no queue or topic {place}. Create it, or correct the destination or the namespace."
        )
    if isinstance(error, exceptions.ServiceBusAuthorizationError) or _token_status(error) in _NOT_AUTHORIZED:
        return BrokerRefusedError(
            f"{place} refused the credentials, or they do not include the right to send. They stand in the connection "
            "string: Endpoint=sb://<namespace>.servicebus.windows.net/;SharedAccessKeyName=<policy>;"
            "SharedAccessKey=<key>, and the policy needs Send. With Microsoft Entra ID, the identity needs the role "
            "Azure Service Bus Data Sender."
        )
    if concerns_content(error):
        condition = _condition(error)
        hint = " An entity that requires sessions takes only messages with a key." if condition == _NOT_ALLOWED else ""
        return BrokerRefusedError(
            f"{place} does not take the message ({condition}); what the service said about it is in this error's cause."
            + hint
        )
    return _unavailable(error, place, timeout)


def _unavailable(error: Exception, place: str, timeout: float) -> BrokerError:
    text = _UNAVAILABLE.get(type(error), _UNREACHABLE)
    return BrokerUnavailableError(text.format(place=place, timeout=timeout, kind=type(error).__name__, error=error))


def is_of_another_kind(error: Exception) -> bool:
    """Whether the service answered that the entity is there, and cannot be received from in this way."""
    return _condition(error) in _NOT_TAKEN


def explain_receiving(error: Exception, place: str, timeout: float) -> BrokerError:
    """As `explain`, for those who receive."""
    explained = _explained_receiving(error, place, timeout)
    if not isinstance(error, TimeoutError):
        explained.__cause__ = error
    return explained


def _explained_receiving(error: Exception, place: str, timeout: float) -> BrokerError:
    if lacks_entity(error):
        return BrokerRefusedError(
            f"there is no queue or subscription {place}. Create it, or correct its name, its topic's, or the namespace."
        )
    if isinstance(error, exceptions.ServiceBusAuthorizationError) or _token_status(error) in _NOT_AUTHORIZED:
        return BrokerRefusedError(
            f"{place} refused the credentials, or they do not include the right to receive: the policy of the "
            "connection string needs Listen, and Send for what is delivered later or again. With Microsoft Entra ID, "
            "the identity needs the roles Azure Service Bus Data Receiver and Data Sender."
        )
    if is_of_another_kind(error):
        return BrokerRefusedError(
            f"{place} cannot be received from in this way ({_condition(error)}). A queue or subscription that requires "
            "sessions needs sessions=True, any other sessions=False, and a topic the name of a subscription."
        )
    if isinstance(error, ValueError):
        return BrokerUnavailableError(f"the link to {place} was closed before it was used ({error})")
    return _unavailable(error, place, timeout)


def _condition(error: Exception) -> str | None:
    """The AMQP error condition that the service gave as its reason."""
    condition: Any = getattr(getattr(error, "inner_exception", None), "condition", None)
    return bytes(condition).decode() if isinstance(condition, bytes) else None


def _token_status(error: Exception) -> int | None:
    """How the service answered when it was given the token, in the numbers of HTTP."""
    status: Any = getattr(getattr(error, "inner_exception", None), "status_code", None)
    return status if isinstance(status, int) else None
