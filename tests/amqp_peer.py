"""What a sender sees of Azure Service Bus, on loopback: an AMQP 1.0 peer on Qpid Proton that can be told to fail.

It stores what is published and shows it to the test. It knows shared access keys, unknown entities, batches, size
limits, and the ways in which a service, or the network before it, lets a sender down.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import threading
import traceback
from collections import deque
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final, Literal, Self
from urllib.parse import parse_qs, quote_plus, urlsplit

from anyio import to_thread

from tests.servers import MissingServerError, free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

__all__ = ["Action", "AmqpPeer", "Entity", "Fault"]

Action = Literal["reject", "reject barely", "hold", "ignore", "lose answer", "drop", "detach"]
"""What to do with a transfer.

reject         not stored; the answer is an error condition
reject barely  the same, with an outcome that gives no reason at all
hold           stored; the answer waits for `Fault.release`
ignore         not stored and never answered
lose answer    stored; the connection is gone instead of the answer
drop           not stored; the connection is gone
detach         not stored; the link is detached by force, the connection stays
"""

_SECONDS: Final = 15.0
_CREDIT: Final = 100
_SECTIONS: Final = range(0x70, 0x79)
_DATA: Final = 0x75


class Fault:
    """What will happen to one transfer, and whether it has."""

    def __init__(self, action: Action, condition: str) -> None:
        self.action: Action = action
        self.condition = condition
        self.released = threading.Event()
        self._struck = threading.Event()
        self._answer: Callable[[], None] | None = None
        self._peer: AmqpPeer | None = None

    def strike(self, peer: AmqpPeer, answer: Callable[[], None]) -> None:
        """The transfer is here; `answer` accepts it."""
        self._peer, self._answer = peer, answer
        self._struck.set()

    async def struck(self) -> None:
        """Wait until it has happened. Raises `TimeoutError`."""
        if not await to_thread.run_sync(self._struck.wait, _SECONDS):
            raise TimeoutError(f"nothing came to {self.action} within {_SECONDS:g} s")

    def release(self) -> None:
        """Give the answer that was held back."""
        assert self._peer is not None
        assert self._answer is not None
        self._peer.call(self._answer)


class Entity:
    """A queue or a topic."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.max_message_size = 256 * 1024
        self.max_batch_size: int | None = None
        """As Service Bus says it when a link is attached; None: it does not."""
        self.closed_with: str | None = None
        """The condition with which links to it are refused."""
        self.rule: Callable[[Sequence[Any]], str | None] | None = None
        """Looks at the messages of a transfer; a condition refuses them all."""
        self.transfers: list[bytes] = []
        """What was stored, as it came; one entry for each transfer."""
        self.refused = 0
        """Transfers that were not stored."""
        self.links: set[Any] = set()
        self._faults: deque[Fault] = deque()

    def next(self, action: Action, condition: str = "") -> Fault:
        """What happens to the next transfer for which nothing is set yet."""
        fault = Fault(action, condition)
        self._faults.append(fault)
        return fault

    def take_fault(self) -> Fault | None:
        return self._faults.popleft() if self._faults else None

    @property
    def batches(self) -> list[list[Any]]:
        """The stored messages, as `proton.Message`, transfer by transfer."""
        return [_messages(transfer) for transfer in self.transfers]

    @property
    def messages(self) -> list[Any]:
        """The stored messages, in order."""
        return [message for batch in self.batches for message in batch]

    @property
    def bodies(self) -> list[bytes]:
        return [bytes(message.body) for message in self.messages]


class AmqpPeer:
    """Listens on a loopback port, in a thread of its own.

        with AmqpPeer() as peer:
            orders = peer.entity("orders")
            client = ServiceBusClient.from_connection_string(peer.connection_string)
            ...
            assert orders.bodies == [b"..."]

    Raises `MissingServerError` without python-qpid-proton.
    """

    def __init__(self) -> None:
        self._proton = _load("proton")
        self._reactor = _load("proton.reactor")
        self.port = free_port()
        self.key = "the right key"
        self.entities: dict[str, Entity] = {}
        self.opened = 0
        """Connections that clients have made so far."""
        self.connections: set[Any] = set()
        """Those that are open."""
        self.abandoned = 0
        """Those that clients left without a word of AMQP."""
        self.unknown: Literal["token", "attach"] = "token"
        """When a sender learns that there is no such entity: with its token, as from the cloud, or on attaching."""
        self.token_status = 202
        """How right tokens are answered."""
        self._errors: list[str] = []
        self._running = True
        self._container: Any = None
        self._acceptor: Any = None
        self._injector: Any = None
        self._awake = threading.Event()
        self._started = threading.Event()
        self._cbs: dict[Any, Any] = {}
        self._thread = threading.Thread(target=self._run, name="amqp-peer", daemon=True)

    @property
    def connection_string(self) -> str:
        """For a namespace-wide policy; plain TCP, as the SDK does it for the emulator."""
        return (
            f"Endpoint=sb://127.0.0.1:{self.port}/;SharedAccessKeyName=shop;SharedAccessKey={self.key};"
            "UseDevelopmentEmulator=true;"
        )

    def entity(self, name: str) -> Entity:
        """A new queue or topic; Service Bus has one set of names for both."""
        entity = self.entities[name] = Entity(name)
        return entity

    def cut(self) -> None:
        """Drop all connections, without a word of AMQP."""
        for connection in list(self.connections):
            self.call(partial(self._drop, connection))

    def detach(self, entity: Entity) -> None:
        """Detach all links to the entity by force, as Service Bus does to links that were idle for ten minutes."""
        for link in list(entity.links):
            self.call(partial(self._close_link, link, "amqp:link:detach-forced"))

    def refuse(self) -> None:
        """Stop listening, and drop all connections."""
        self.call(self._acceptor.close)
        self.cut()

    def accept(self) -> None:
        """Listen again, on the same port."""
        self.call(self._listen)

    def pause(self) -> None:
        """Let it hang: connections stay open, new ones are taken by the kernel, and nothing is answered."""
        self._awake.clear()
        self._post(self._awake.wait)

    def resume(self) -> None:
        self._awake.set()

    def call(self, action: Callable[[], object]) -> None:
        """Do it in the peer's thread, and wait until it is done."""
        done = threading.Event()

        def act() -> None:
            try:
                action()
            finally:
                done.set()

        self._post(act)
        if not done.wait(_SECONDS):
            raise TimeoutError(f"the peer did not do it within {_SECONDS:g} s: {self._errors}")

    def __enter__(self) -> Self:
        self._thread.start()
        if not self._started.wait(_SECONDS):
            raise TimeoutError(f"the peer did not start within {_SECONDS:g} s: {self._errors}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.resume()
        self.refuse()
        self._running = False
        self._injector.close()
        self._thread.join(_SECONDS)
        assert not self._errors, "\n".join(self._errors)

    # In the peer's thread

    def _run(self) -> None:
        self._container = self._reactor.Container(_Events(self._actions(), self._errors))
        self._container.timeout = _SECONDS
        self._injector = self._reactor.EventInjector()
        self._container.selectable(self._injector)
        self._container.start()
        self._listen()
        self._started.set()
        while self._container.process() and self._running:
            pass

    def _listen(self) -> None:
        self._acceptor = self._container.acceptor("127.0.0.1", self.port)

    def _post(self, action: Callable[[], object]) -> None:
        self._injector.trigger(self._reactor.ApplicationEvent("called", subject=action))

    def _actions(self) -> dict[str, Callable[[Any], object]]:
        return {
            "on_called": lambda event: event.subject(),
            "on_connection_remote_open": lambda event: self._open_connection(event.connection),
            "on_connection_remote_close": lambda event: event.connection.close(),
            "on_session_remote_open": lambda event: event.session.open(),
            "on_session_remote_close": lambda event: event.session.close(),
            "on_link_remote_open": lambda event: self._attach(event.link),
            "on_link_remote_close": lambda event: self._forget_link(event.link),
            "on_transport_closed": lambda event: self._forget(event.transport),
            "on_delivery": lambda event: self._deliver(event.delivery),
        }

    def _open_connection(self, connection: Any) -> None:
        self.opened += 1
        self.connections.add(connection)
        connection.open()

    def _forget(self, transport: Any) -> None:
        connection = transport.connection
        if connection in self.connections:
            self.abandoned += not connection.state & self._proton.Endpoint.REMOTE_CLOSED
            self.connections.remove(connection)
        self._cbs.pop(connection, None)
        for entity in self.entities.values():
            entity.links = {link for link in entity.links if link.connection != connection}

    def _forget_link(self, link: Any) -> None:
        for entity in self.entities.values():
            entity.links.discard(link)
        link.close()

    def _drop(self, connection: Any) -> None:
        self.connections.discard(connection)
        if transport := connection.transport:
            transport.close_tail()
            transport.close_head()

    def _attach(self, link: Any) -> None:
        link.source.copy(link.remote_source)
        link.target.copy(link.remote_target)
        if link.is_sender:
            self._cbs[link.connection] = link
            link.open()
            return
        name = _entity_of(link.remote_target.address)
        entity = self.entities.get(name)
        condition = "amqp:not-found" if entity is None and name != "$cbs" else entity and entity.closed_with
        if condition:
            link.target.type = self._proton.Terminus.UNSPECIFIED
            link.open()
            self._close_link(link, condition)
            return
        if entity is not None:
            entity.links.add(link)
            link.max_message_size = entity.max_message_size
            if entity.max_batch_size is not None:
                name = self._proton.symbol("com.microsoft:max-message-batch-size")
                link.properties = {name: self._proton.ulong(entity.max_batch_size)}
        link.open()
        link.flow(_CREDIT)

    def _close_link(self, link: Any, condition: str) -> None:
        link.condition = self._proton.Condition(condition, "by order of the test")
        link.close()

    def _deliver(self, delivery: Any) -> None:
        link = delivery.link
        if link.is_sender or link.state & self._proton.Endpoint.LOCAL_CLOSED:
            delivery.settle()
        elif delivery.readable and not delivery.partial:
            transfer = link.recv(delivery.pending)
            link.advance()
            link.flow(1)
            name = _entity_of(link.remote_target.address)
            if name == "$cbs":
                self._accept(delivery)
                self._answer_token(link.connection, self._decode(transfer))
            else:
                self._take(self.entities[name], delivery, transfer)

    def _take(self, entity: Entity, delivery: Any, transfer: bytes) -> None:
        fault = entity.take_fault()
        action = fault.action if fault is not None else None
        condition = fault.condition if fault is not None else entity.rule and entity.rule(_messages(transfer))
        if len(transfer) > entity.max_message_size:
            action, condition = "detach", "amqp:link:message-size-exceeded"
        if action in {None, "hold", "lose answer"} and not condition:
            entity.transfers.append(bytes(transfer))
        else:
            entity.refused += 1
        match action:
            case "hold" | "ignore":
                pass
            case "lose answer" | "drop":
                self._drop(delivery.connection)
            case "detach":
                self._close_link(delivery.link, condition or "amqp:link:detach-forced")
            case "reject barely":
                self._reject(delivery, None)
            case _ if condition:
                self._reject(delivery, condition)
            case _:
                self._accept(delivery)
        if fault is not None:
            fault.strike(self, lambda: self._accept(delivery))

    def _accept(self, delivery: Any) -> None:
        delivery.update(self._proton.Delivery.ACCEPTED)
        delivery.settle()

    def _reject(self, delivery: Any, condition: str | None) -> None:
        if condition is not None:
            # With an info map: without one, the SDK stumbles, and waits for the answer that it has had.
            reason = self._proton.Condition(condition, "by order of the test", {self._proton.symbol("a"): "b"})
            delivery.local.condition = reason
        delivery.update(self._proton.Delivery.REJECTED)
        delivery.settle()

    def _answer_token(self, connection: Any, request: Any) -> None:
        status, description = self._check_token(request.properties["name"], request.body)
        answer = self._proton.Message(
            correlation_id=request.id,
            properties={"status-code": self._proton.int32(status), "status-description": description},
        )
        self._cbs[connection].send(answer)

    def _check_token(self, audience: str, token: str) -> tuple[int, str]:
        facts = {name: values[0] for name, values in parse_qs(token.removeprefix("SharedAccessSignature ")).items()}
        signed = f"{quote_plus(facts['sr'])}\n{facts['se']}"
        signature = hmac.new(self.key.encode(), signed.encode(), hashlib.sha256).digest()
        if not hmac.compare_digest(base64.b64encode(signature).decode(), facts["sig"]):
            return 401, "InvalidSignature: The token has an invalid signature."
        if self.unknown == "token" and _entity_of(audience) not in self.entities:
            return 404, f"The messaging entity '{audience}' could not be found."
        return self.token_status, "by order of the test"

    def _decode(self, encoded: bytes) -> Any:
        message = self._proton.Message()
        message.decode(encoded)
        return message


class _Events:
    """Hands Proton's events to their actions; an error in one must not end the peer."""

    def __init__(self, actions: dict[str, Callable[[Any], object]], errors: list[str]) -> None:
        self._actions = actions
        self._errors = errors

    def on_unhandled(self, name: str, event: Any) -> None:
        if action := self._actions.get(name):
            try:
                action(event)
            except Exception:  # noqa: BLE001 - shown when the peer is closed
                self._errors.append(traceback.format_exc())


def _messages(transfer: bytes) -> list[Any]:
    """The messages of a transfer.

    Proton does not tell the format of a message, so a batch is known by its looks: its data sections hold messages.
    """
    proton = _load("proton")
    parts: list[bytes] = []
    rest = transfer
    while rest:
        section = proton.Data()
        rest = rest[section.decode(rest) :]
        section.rewind()
        section.next()
        value = section.get_py_described()
        if int(value.descriptor) == _DATA:
            parts.append(bytes(value.value))
    messages = parts if len(parts) > 1 or _is_message(parts[0]) else [transfer]
    decoded = [proton.Message() for _ in messages]
    for message, encoded in zip(decoded, messages, strict=True):
        message.decode(encoded)
    return decoded


def _is_message(part: bytes) -> bool:
    return len(part) > 2 and part[:2] == b"\x00\x53" and part[2] in _SECTIONS


def _entity_of(address: str) -> str:
    """Clients send a URI."""
    return urlsplit(address).path.strip("/") if "://" in address else address


def _load(module: str) -> Any:
    """As `Any`: Proton is not where every type checker runs."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise MissingServerError(
            "python-qpid-proton is not there: pip install 'pipeline-mediator[test-azure]', which builds it from source "
            "and needs a C compiler"
        ) from error
