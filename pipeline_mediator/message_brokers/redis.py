"""Redis Pub/Sub: every subscriber that listens at this moment gets the message, nobody else ever does."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

from pipeline_mediator.errors import (
    BrokerError,
    BrokerRefusedError,
    BrokerUnavailableError,
    ConfigurationError,
    MissingExtraError,
)
from pipeline_mediator.message_brokers.protocol import BrokerFeatures

try:
    from redis import exceptions
    from redis.asyncio import Redis
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff
except ModuleNotFoundError as error:
    if error.name not in {"redis", "redis.asyncio"}:
        raise
    raise MissingExtraError("RedisMessageBroker", "redis-py", "redis") from error

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType
    from typing import Self

    from pipeline_mediator.message_brokers.protocol import Outgoing

__all__ = ["RedisMessageBroker"]

_FEATURES: Final = BrokerFeatures(
    system="redis", durable=False, headers=False, ordered_by_key=False, max_message_size=512 * 1024 * 1024
)


class RedisMessageBroker:
    """Publishes by Redis Pub/Sub, at most once: a message that nobody listens for is gone.

        broker = RedisMessageBroker("redis://localhost:6379/0")
        async with broker:
            ...

    One PUBLISH per message to the channel named like its destination (`channel_prefix` goes before it), the messages of
    a batch in one pipeline, at most `max_connections` batches at a time. With a URL the client is the broker's own and
    never retries; it is closed at the end of the last `async with`. A client that is handed over is used as it is and
    never closed; mind that one which retries, as `Redis(...)` does by default, may publish a batch twice when a
    connection drops.

    `timeout` is in seconds, for connecting and for a batch; after it every message of the batch is a
    `BrokerUnavailableError`, although the server may have had some of them. asyncio only. redis-py >= 5.1.

    Entering raises `BrokerUnavailableError` if the server cannot be reached, `BrokerRefusedError` if it does not take
    the credentials. Raises `ConfigurationError` for what is no Redis URL and no `redis.asyncio.Redis`.
    """

    def __init__(
        self,
        client_or_url: Redis | str,
        *,
        channel_prefix: str | None = None,
        timeout: float = 10.0,
        max_connections: int = 16,
    ) -> None:
        if timeout <= 0 or max_connections < 1:
            raise ConfigurationError(f"timeout={timeout}, max_connections={max_connections}: both must be above 0")
        self._own = isinstance(client_or_url, str)
        # Any: redis-py's annotations are partial, and not the same in any two versions.
        self._client: Any = _client(client_or_url, timeout)
        self._prefix = channel_prefix or ""
        self._timeout = timeout
        self._connections = asyncio.Semaphore(max_connections)
        self._place = _place(self._client)
        self._users = 0
        self._closed = False

    @property
    def features(self) -> BrokerFeatures:
        """What this broker promises."""
        return _FEATURES

    async def publish(self, batch: Sequence[Outgoing], /) -> Sequence[Exception | None]:
        """Accepted is what the server answered; see `MessageBroker.publish`."""
        if self._closed:
            return [BrokerUnavailableError(f"the broker for {self._place} was closed") for _ in batch]
        pipeline = self._client.pipeline(transaction=False)
        for message in batch:
            pipeline.publish(self._prefix + message.destination, message.body)
        try:
            async with asyncio.timeout(self._timeout), self._connections:
                # Errors are taken from the replies: raised, redis-py's text would quote the command, payload included.
                replies = await pipeline.execute(raise_on_error=False)
        except (exceptions.RedisError, OSError) as error:
            return [self._explain(error) for _ in batch]
        return [self._explain(reply) if isinstance(reply, Exception) else None for reply in replies]

    async def __aenter__(self) -> Self:
        try:
            async with asyncio.timeout(self._timeout):
                await self._client.ping()
        except exceptions.NoPermissionError:
            pass  # a user that may do nothing but PUBLISH: it is there and knows us
        except (exceptions.RedisError, OSError) as error:
            if self._users == 0:
                await self._disconnect()
            raise self._explain(error) from error
        self._users += 1
        self._closed = False
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        self._users -= 1
        if self._users == 0:
            self._closed = True
            await self._disconnect()

    async def _disconnect(self) -> None:
        if self._own:
            await self._client.aclose()

    def _explain(self, error: Exception) -> BrokerError:
        """The one place where redis-py's exceptions become ours."""
        explained = self._explained(error)
        if type(error) is not exceptions.ResponseError:  # its text may quote the command, payload included
            explained.__cause__ = error
        return explained

    def _explained(self, error: Exception) -> BrokerError:
        place = self._place
        match error:
            case exceptions.NoPermissionError():
                return BrokerRefusedError(
                    f"{place} does not let this user publish to the channel. Allow it: "
                    "ACL SETUSER <user> +publish &<channel>"
                )
            case exceptions.AuthenticationError() | exceptions.AuthorizationError():
                return BrokerRefusedError(
                    f"{place} refused the credentials, or the lack of them. They stand in the URL: "
                    "redis://<user>:<password>@<host>:<port>/<db>"
                )
            case TimeoutError() | exceptions.TimeoutError():
                return BrokerUnavailableError(
                    f"{place} did not answer within {self._timeout:g} s. Look whether it hangs, is overloaded, or sits "
                    "behind a firewall that drops packets."
                )
            case exceptions.ClusterDownError() | exceptions.OutOfMemoryError() | exceptions.ReadOnlyError():
                return BrokerUnavailableError(f"{place} takes no messages at the moment: {error}")
            case exceptions.ResponseError():
                return BrokerRefusedError(f"{place} refused the command PUBLISH. Look at its configuration and log.")
            case _:
                return BrokerUnavailableError(
                    f"{place} cannot be reached, or dropped the connection ({error}). Start it, or correct the address."
                )


def _client(client_or_url: object, timeout: float) -> Any:
    client_class: Any = Redis
    if isinstance(client_or_url, client_class):
        return client_or_url
    if not isinstance(client_or_url, str):
        raise ConfigurationError(
            f"RedisMessageBroker takes a URL or a redis.asyncio.Redis, not {type(client_or_url).__module__}."
            f"{type(client_or_url).__qualname__}"
        )
    try:
        return client_class.from_url(
            client_or_url,
            socket_timeout=None,  # `publish` has one for the whole batch, and one per answer costs a timer each
            socket_connect_timeout=timeout,
            retry=Retry(NoBackoff(), 0),  # a retry could publish a message twice
            protocol=2,  # with 3, redis-py 8.0 and 8.1 reuse a connection that the server has closed (their #4252)
        )
    except ValueError:
        # Not `from error`: its text may quote a part of the URL, and with it of the password.
        raise ConfigurationError(
            "this is no Redis URL. It looks like redis://<user>:<password>@<host>:<port>/<db>, rediss:// for TLS, or "
            "unix://<path>; special characters in the password are percent-encoded."
        ) from None


def _place(client: Any) -> str:
    """Where the server is, without credentials."""
    pool = client.connection_pool
    settings = pool.connection_kwargs
    if hasattr(pool, "service_name"):
        return f"Redis service {pool.service_name!r}"
    if "path" in settings:
        return f"Redis at {settings['path']}"
    return f"Redis at {settings.get('host', 'localhost')}:{settings.get('port', 6379)}/{settings.get('db', 0)}"
