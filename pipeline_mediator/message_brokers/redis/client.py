"""What the Redis brokers share: a client and its life, commands in one go, and redis-py's exceptions explained."""

from __future__ import annotations

import asyncio
import re
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from pipeline_mediator.errors import (
    BrokerError,
    BrokerRefusedError,
    BrokerUnavailableError,
    ConfigurationError,
    MissingExtraError,
)

try:
    from redis import exceptions
    from redis.asyncio import Redis
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff
except ModuleNotFoundError as error:
    if error.name not in {"redis", "redis.asyncio"}:
        raise
    raise MissingExtraError("pipeline_mediator.message_brokers.redis", "redis-py", "redis") from error

pack_command: Any = None
with suppress(ImportError):  # the extra brings it along; without it redis-py works too
    import hiredis

    pack_command = getattr(hiredis, "pack_command", None)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["MAX_MESSAGE_SIZE", "RedisClient", "RedisLine", "lacks_group", "says"]

MAX_MESSAGE_SIZE: Final = 512 * 1024 * 1024
"""Bytes; proto-max-bulk-len, unless the server is told otherwise."""

_PASSING: Final = (
    exceptions.ClusterDownError,
    exceptions.ExecAbortError,
    exceptions.OutOfMemoryError,
    exceptions.ReadOnlyError,
    exceptions.TryAgainError,
)
_PASSING_CODES: Final = ("BUSY", "MISCONF", "NOREPLICAS")
"""Of those that redis-py has no classes for: a script runs too long, a snapshot or log cannot be written, too few
replicas follow."""


_FROM_SCRIPT: Final = re.compile(r".*@user_script: ?\d+: -?", re.DOTALL)
_CODES: Final = {
    "NOPERM": exceptions.NoPermissionError,
    "OOM": exceptions.OutOfMemoryError,
    "READONLY": exceptions.ReadOnlyError,
}


class RedisClient:
    """One server, and how to talk to it: never longer than `timeout`, by at most `max_connections` at a time.

    With a URL the client is its own: it never retries, and is closed when the last user left. One that is handed over
    is used as it is and never closed. `owner` is the class that users know, `rights` what its user needs in the
    server's access control list.

    Raises `ConfigurationError` for what is no Redis URL and no `redis.asyncio.Redis`.
    """

    def __init__(
        self, client_or_url: Redis | str, owner: str, rights: str, *, timeout: float, max_connections: int
    ) -> None:
        if timeout <= 0 or max_connections < 1:
            raise ConfigurationError(f"timeout={timeout}, max_connections={max_connections}: both must be above 0")
        self.timeout = timeout
        self._own = isinstance(client_or_url, str)
        # Any: redis-py's annotations are partial, and not the same in any two versions.
        self._client: Any = _client(client_or_url, owner, timeout)
        self._rights = rights
        self._connections = asyncio.Semaphore(max_connections)
        self._place = _place(self._client)
        self._users = 0
        self._closed = False

    async def execute(self, commands: Sequence[Sequence[Any]], until: float | None = None) -> list[Any]:
        """Send all of them at once; the replies in order, an exception where there is none or it says no.

        `until` is the event loop's time at which to give up, `timeout` from now unless told.
        """
        if self._closed:
            return [BrokerUnavailableError(f"the broker for {self._place} was closed") for _ in commands]
        return await self._send(commands, asyncio.get_running_loop().time() + self.timeout if until is None else until)

    async def _send(self, commands: Sequence[Sequence[Any]], until: float) -> list[Any]:
        pipeline = self._client.pipeline(transaction=False)
        for command in commands:
            pipeline.execute_command(*command)
        try:
            async with asyncio.timeout_at(until), self._connections:
                # Errors are taken from the replies: raised, redis-py's text would quote the command, payload included.
                replies: list[Any] = await pipeline.execute(raise_on_error=False)
        except (exceptions.RedisError, OSError) as error:
            return [error for _ in commands]
        if self._own and any(isinstance(reply, exceptions.ReadOnlyError) for reply in replies):
            # The server was demoted; whoever took over has its name by now, which only new connections look up.
            await self._client.connection_pool.disconnect(inuse_connections=False)
        return replies

    async def enter(self, *probes: Sequence[Any]) -> None:
        """Connect, and see that the server takes these commands. Raises `BrokerError`."""
        until = asyncio.get_running_loop().time() + self.timeout
        try:
            await self._reach(until)
            for reply in await self._send(probes, until) if probes else ():
                if isinstance(reply, Exception):
                    raise self.explain(reply)
        except BrokerError:
            if self._users == 0:
                await self._disconnect()
            raise
        self._users += 1
        self._closed = False

    def line(self) -> RedisLine:
        """A connection beside the pool, made when it is first used; whoever asked for it closes it."""
        pool = self._client.connection_pool
        settings = {
            name: value for name, value in pool.connection_kwargs.items() if not name.startswith(("maint_", "oss_"))
        }
        settings |= {
            "decode_responses": False,
            "health_check_interval": 0,
            "protocol": 2,
            "retry": Retry(NoBackoff(), 0),
            "socket_connect_timeout": self.timeout,
            "socket_timeout": None,
        }
        return RedisLine(self, pool.connection_class(**settings))

    async def leave(self) -> None:
        """The last one closes the client."""
        self._users -= 1
        if self._users == 0:
            self._closed = True
            await self._disconnect()

    async def _reach(self, until: float) -> None:
        try:
            async with asyncio.timeout_at(until):
                await self._client.ping()
        except exceptions.NoPermissionError:
            pass  # a user that may do nothing but publish: it is there and knows us
        except (exceptions.RedisError, OSError) as error:
            raise self.explain(error) from error

    async def _disconnect(self) -> None:
        if self._own:
            await self._client.aclose()

    def explain(self, error: Exception, destination: str | None = None, *, reading: str | None = None) -> BrokerError:
        """The one place where redis-py's exceptions become ours; `reading` is the rights for what is no publishing."""
        if isinstance(error, BrokerError):
            return error
        refusal: str | None
        if reading is not None and isinstance(error, exceptions.NoPermissionError):
            what = "" if destination is None else f" from {destination!r}"
            refusal = f"{self._place} does not let this user consume{what}. Allow it: ACL SETUSER <user> {reading}"
        else:
            refusal = self._refusal(error, "" if destination is None else f" {destination!r}")
        explained = BrokerUnavailableError(self._trouble(error)) if refusal is None else BrokerRefusedError(refusal)
        if type(error) is not exceptions.ResponseError:  # its text may quote the command, payload included
            explained.__cause__ = error
        return explained

    @property
    def place(self) -> str:
        """Where the server is, without credentials."""
        return self._place

    def _refusal(self, error: Exception, destination: str) -> str | None:
        """Why trying again does not help; None if it may."""
        place = self._place
        text = str(error)
        match error:
            case exceptions.NoPermissionError():
                to = destination and f" to{destination}"
                return f"{place} does not let this user publish{to}. Allow it: ACL SETUSER <user> {self._rights}"
            case exceptions.AuthenticationError() | exceptions.AuthorizationError():
                return (
                    f"{place} refused the credentials, or the lack of them. They stand in the URL: "
                    "redis://<user>:<password>@<host>:<port>/<db>"
                )
            case exceptions.ResponseError() if text.startswith("WRONGTYPE"):
                return f"{place} has something else under the name{destination}. Choose another, or delete that key."
            case exceptions.ResponseError() if not (isinstance(error, _PASSING) or text.startswith(_PASSING_CODES)):
                return f"{place} refused the command. Look at its configuration and log."
            case _:
                return None

    def _trouble(self, error: Exception) -> str:
        """Why it did not work this time."""
        place = self._place
        if isinstance(error, (TimeoutError, exceptions.TimeoutError)):
            return (
                f"{place} did not answer within {self.timeout:g} s. Look whether it hangs, is overloaded, or sits "
                "behind a firewall that drops packets."
            )
        if isinstance(error, exceptions.ResponseError):
            return f"{place} takes no messages at the moment: {error}"
        return f"{place} cannot be reached, or dropped the connection ({error}). Start it, or correct the address."


class RedisLine:
    """One connection for one user, who waits on it as long as it likes while others publish.

    Replies are as the server gave them: bytes and lists, in the order of its protocol. One call at a time, the others
    wait; a call that fails or is cancelled costs the connection, and the next one makes another.
    """

    def __init__(self, client: RedisClient, connection: Any) -> None:
        self._client = client
        self._connection = connection
        self._turn = asyncio.Lock()

    async def execute(self, commands: Sequence[Sequence[Any]], *, seconds: float | None = None) -> list[Any]:
        """Send all at once; the replies in order, an exception where the server says no.

        `seconds` to wait at most, the client's timeout unless told. Raises `BrokerError`.
        """
        try:
            async with asyncio.timeout(self._client.timeout if seconds is None else seconds), self._turn:
                return await self._talk(commands)
        except (exceptions.RedisError, OSError) as error:
            explained = self._client.explain(error)
            raise explained from explained.__cause__

    async def read(self, *, seconds: float) -> Any:
        """The next thing the server says by itself. Raises `TimeoutError`, which costs nothing, and `BrokerError`."""
        try:
            async with asyncio.timeout(seconds):
                return await self._connection.read_response(disable_decoding=True, disconnect_on_error=False)
        except TimeoutError:
            raise
        except (exceptions.RedisError, OSError) as error:
            await self.close()
            explained = self._client.explain(error)
            raise explained from explained.__cause__

    async def close(self) -> None:
        """Hang up."""
        with suppress(exceptions.RedisError, OSError):
            await self._connection.disconnect(nowait=True)

    async def _talk(self, commands: Sequence[Sequence[Any]]) -> list[Any]:
        connection = self._connection
        whole = False
        try:
            if not connection.is_connected:
                await connection.connect()
            await connection.send_packed_command(connection.pack_commands(commands), check_health=False)
            replies = [await self._reply() for _ in commands]
            whole = not any(isinstance(reply, exceptions.ReadOnlyError) for reply in replies)
        finally:
            if not whole:
                await self.close()
        return replies

    async def _reply(self) -> Any:
        try:
            return await self._connection.read_response(disable_decoding=True)
        except exceptions.ResponseError as error:
            return _unwrapped(error)


def says(reply: object, *codes: str) -> bool:
    """Whether the server's answer is an error that begins with one of these."""
    return isinstance(reply, exceptions.ResponseError) and str(reply).startswith(codes)


def lacks_group(reply: object) -> bool:
    """Whether the stream is gone, or its group; the second code is for whoever waited for entries at that moment."""
    return says(reply, "NOGROUP", "UNBLOCKED")


def _unwrapped(error: exceptions.ResponseError) -> Exception:
    """What a command inside of a script said; Redis 6.2 puts it at the end of a sentence about the script."""
    text = str(error)
    if "ACL failure in script" in text:
        return exceptions.NoPermissionError(text)
    if "Error running script" not in text:
        return error
    inner = _FROM_SCRIPT.sub("", text)
    return _CODES.get(inner.partition(" ")[0], exceptions.ResponseError)(inner)


def _client(client_or_url: object, owner: str, timeout: float) -> Any:
    client_class: Any = Redis
    if isinstance(client_or_url, client_class):
        return client_or_url
    if not isinstance(client_or_url, str):
        kind = type(client_or_url)
        raise ConfigurationError(
            f"{owner} takes a URL or a redis.asyncio.Redis, not {kind.__module__}.{kind.__qualname__}"
        )
    try:
        client = client_class.from_url(
            client_or_url,
            socket_timeout=None,  # `execute` has one for all, and one per answer costs a timer each
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
    if pack_command is not None:
        pool = client.connection_pool
        pool.connection_class = type("PackingConnection", (_Packing, pool.connection_class), {})
    return client


class _Packing:
    """What redis-py's connections for asyncio do in Python, an argument at a time, and others by hiredis.

    For the dozen fields of an entry it is most of what publishing costs.
    """

    def pack_commands(self, commands: Iterable[Sequence[Any]]) -> list[bytes]:
        return [pack_command(tuple(command)) for command in commands]


def _place(client: Any) -> str:
    """Where the server is, without credentials."""
    pool = client.connection_pool
    settings = pool.connection_kwargs
    if hasattr(pool, "service_name"):
        return f"Redis service {pool.service_name!r}"
    if "path" in settings:
        return f"Redis at {settings['path']}"
    return f"Redis at {settings.get('host', 'localhost')}:{settings.get('port', 6379)}/{settings.get('db', 0)}"
