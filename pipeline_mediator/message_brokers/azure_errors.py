"""What the Service Bus client raises, in this library's words; the one place where that is translated."""

from __future__ import annotations

from typing import Any, Final

from azure.servicebus import exceptions

from pipeline_mediator.errors import BrokerError, BrokerRefusedError, BrokerUnavailableError

__all__ = ["concerns_content", "explain", "lacks_entity"]

_NOT_FOUND: Final = 404
_CONTENT_CONDITIONS: Final = frozenset(
    {
        "amqp:decode-error",
        "amqp:invalid-field",
        "amqp:not-allowed",
        "amqp:not-implemented",
        "amqp:precondition-failed",
        "com.microsoft:argument-error",
        "com.microsoft:argument-out-of-range",
        "com.microsoft:precondition-failed",
    }
)


def concerns_content(error: Exception) -> bool:
    """Whether a transfer was refused for what is in it: nothing of it was stored, and other messages may be taken."""
    return isinstance(error, exceptions.MessageSizeExceededError) or _condition(error) in _CONTENT_CONDITIONS


def lacks_entity(error: Exception) -> bool:
    """Whether the service answered, and has no such queue or topic; it says so on attaching, or about the token."""
    return isinstance(error, exceptions.MessagingEntityNotFoundError) or _token_status(error) == _NOT_FOUND


def explain(error: Exception, namespace: str, entity: str, timeout: float) -> BrokerError:
    """A new error of ours for what the client raised about this entity."""
    explained = _explained(error, namespace, entity, timeout)
    explained.__cause__ = error
    return explained


def _explained(error: Exception, namespace: str, entity: str, timeout: float) -> BrokerError:
    match error:
        case _ if lacks_entity(error):
            return BrokerRefusedError(
                f"{namespace} has no queue or topic {entity!r}. Create it, or correct the destination."
            )
        case exceptions.ServiceBusAuthenticationError() if _token_status(error) not in {401, 403}:
            return BrokerUnavailableError(
                f"{namespace} did not look at the credentials for {entity!r} (status {_token_status(error)}). Look whether "
                "the service is well."
            )
        case exceptions.ServiceBusAuthenticationError() | exceptions.ServiceBusAuthorizationError():
            return BrokerRefusedError(
                f"{namespace} refused the credentials for {entity!r}, or they do not include the right to send. They stand "
                "in the connection string: Endpoint=sb://<namespace>.servicebus.windows.net/;SharedAccessKeyName=<policy>;"
                "SharedAccessKey=<key>, and the policy needs Send. With Microsoft Entra ID, the identity needs the role "
                "Azure Service Bus Data Sender."
            )
        case exceptions.MessagingEntityDisabledError():
            return BrokerUnavailableError(f"{entity!r} at {namespace} is disabled. Enable it for sending.")
        case exceptions.ServiceBusQuotaExceededError():
            return BrokerUnavailableError(
                f"{entity!r} at {namespace} takes no more: it is full, or has too many connections. Receive from it, clear "
                "its dead letters, or raise its size."
            )
        case exceptions.ServiceBusServerBusyError():
            return BrokerUnavailableError(f"{namespace} is busy and wants senders to {entity!r} to wait.")
        case TimeoutError() | exceptions.OperationTimeoutError():
            return BrokerUnavailableError(
                f"{entity!r} at {namespace} did not answer within {timeout:g} s, and may have the message all the same. Look "
                "whether the service hangs, is overloaded, or sits behind a firewall that drops packets."
            )
        case _ if concerns_content(error):
            return BrokerRefusedError(
                f"{entity!r} at {namespace} does not take the message ({_condition(error)}); what the service said about "
                "it is in this error's cause. An entity that requires sessions takes only messages with a key: "
                '@message(..., key="<field>").'
            )
        case _:
            return BrokerUnavailableError(
                f"{entity!r} at {namespace} cannot be reached, or the connection was dropped ({type(error).__name__}: "
                f"{error}). Look at the address, the network and the service."
            )


def _condition(error: Exception) -> str | None:
    """The AMQP error condition that the service gave as its reason."""
    condition: Any = getattr(getattr(error, "inner_exception", None), "condition", None)
    return bytes(condition).decode() if isinstance(condition, bytes) else None


def _token_status(error: Exception) -> int | None:
    """How the service answered when it was given the token, in the numbers of HTTP."""
    status: Any = getattr(getattr(error, "inner_exception", None), "status_code", None)
    return status if isinstance(status, int) else None
