"""What a client sees of Azure Service Bus, on loopback: an AMQP 1.0 peer on Qpid Proton that can be told to fail.

It stores what is published, shows it to the test and hands it to receivers. It knows shared access keys, unknown
entities, batches, size limits, locks, sessions, dead letters, messages for later and the detection of duplicates, and
the ways in which a service, or the network before it, lets a client down.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from secrets import token_hex
from typing import TYPE_CHECKING, Any, Final, Literal, Self
from urllib.parse import parse_qs, quote_plus, urlsplit
from uuid import UUID

from anyio import to_thread

from tests.servers import MissingServerError, free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

__all__ = ["Action", "AmqpPeer", "Entity", "Fault", "Queue", "Topic"]

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
_TICK: Final = 0.02
_MANAGEMENT: Final = "/$management"
_DEAD_LETTERS: Final = "/$DeadLetterQueue"
_SCHEDULED: Final = "x-opt-scheduled-enqueue-time"
_SESSION_FILTER: Final = "com.microsoft:session-filter"
_TICKS_BEFORE_1970: Final = 621_355_968_000_000_000


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


@dataclass(eq=False)
class Stored:
    """A message in a queue."""

    number: int
    message: Any
    """`proton.Message`"""
    due: float
    deliveries: int = 0
    """Those that failed: locks that ran out, and what was abandoned."""
    until: float = 0.0
    link: Any = None


@dataclass(eq=False)
class SessionLock:
    """A session that a receiver has for itself."""

    link: Any
    until: float


class Queue(Entity):
    """An entity that can be received from: a queue, the subscription of a topic, or the dead letters of one of them."""

    def __init__(
        self,
        name: str,
        *,
        lock: float = 30.0,
        sessions: bool = False,
        max_deliveries: int = 10,
        detects_duplicates: bool = False,
        dead: Queue | None = None,
    ) -> None:
        super().__init__(name)
        self.lock = lock
        """How long a message, or a session, stays with its receiver, in seconds."""
        self.sessions = sessions
        self.max_deliveries = max_deliveries
        self.dead = dead
        self.ready: list[Stored] = []
        """In order of their numbers; those for later are among them."""
        self.locked: dict[UUID, Stored] = {}
        self.session_locks: dict[str, SessionLock] = {}
        self.settled: list[tuple[str, Any]] = []
        """What receivers did, in order, and the message's id."""
        self.renewed = 0
        self.handed_over = 0
        self.waiting: dict[Any, float] = {}
        """Links that wait for a session, and until when."""
        self._ids: set[Any] | None = set() if detects_duplicates else None
        self._number = 0
        self._settle_faults: deque[tuple[str, str]] = deque()
        self._request_faults: deque[tuple[str, str]] = deque()

    def next_settlement(
        self, action: Literal["reject", "drop", "ignore", "settle and drop"], condition: str = ""
    ) -> None:
        """What happens to the next settlement for which nothing is set yet."""
        self._settle_faults.append((action, condition))

    def next_request(self, action: Literal["reject", "drop", "ignore"], condition: str = "") -> None:
        """What happens to the next request, to renew a lock for instance, for which nothing is set yet."""
        self._request_faults.append((action, condition))

    def take_settle_fault(self) -> tuple[str, str]:
        return self._settle_faults.popleft() if self._settle_faults else ("", "")

    def take_request_fault(self) -> tuple[str, str]:
        return self._request_faults.popleft() if self._request_faults else ("", "")

    def add(self, message: Any) -> None:
        """Store a message."""
        if self._ids is not None:
            if message.id in self._ids:
                return
            self._ids.add(message.id)
        self._number += 1
        due = _dict(message.annotations).get(_SCHEDULED, time.time() * 1000) / 1000
        self.ready.append(Stored(self._number, message, due))

    def take(self, link: Any, session: str | None, now: float) -> tuple[UUID, Stored] | None:
        """Lock the next message for the link."""
        for index, stored in enumerate(self.ready):
            if stored.due <= now and (not self.sessions or stored.message.group_id == session):
                del self.ready[index]
                # Proton wants tags that are text.
                token = UUID(bytes_le=token_hex(8).encode())
                stored.until, stored.link = now + self.lock, link
                self.locked[token] = stored
                self.handed_over += 1
                return token, stored
        return None

    def free_session(self, now: float) -> str | None:
        """A session with messages that nobody has."""
        for stored in self.ready:
            session = stored.message.group_id
            if stored.due <= now and session is not None and session not in self.session_locks:
                return str(session)
        return None

    def settle(self, token: UUID, action: str, reason: Any = None, description: Any = None) -> bool:
        """Whether it was still locked."""
        stored = self.locked.pop(token, None)
        if stored is None:
            return False
        self.settled.append((action, stored.message.id))
        if action == "dead-letter":
            self._bury(stored, reason, description)
        elif action != "complete":
            self.put_back(stored, counted=action == "abandon")
        return True

    def put_back(self, stored: Stored, *, counted: bool) -> None:
        stored.deliveries += counted
        if stored.deliveries >= self.max_deliveries and self.dead is not None:
            self._bury(stored, "MaxDeliveryCountExceeded", f"{stored.deliveries} attempts")
            return
        self.ready.append(stored)
        self.ready.sort(key=lambda one: one.number)

    def _bury(self, stored: Stored, reason: Any, description: Any) -> None:
        assert self.dead is not None
        facts = {"DeadLetterReason": reason, "DeadLetterErrorDescription": description}
        known = {name: value for name, value in facts.items() if value is not None}
        stored.message.properties = dict(stored.message.properties or {}) | known
        self.dead.add(stored.message)
        self.dead.ready[-1].deliveries = stored.deliveries

    def expire(self, now: float) -> list[Any]:
        """Take back what was locked for too long; links whose session is lost."""
        for token, stored in list(self.locked.items()):
            if not self.sessions and stored.until <= now:
                del self.locked[token]
                self.settled.append(("expire", stored.message.id))
                self.put_back(stored, counted=True)
        lost = [(name, lock) for name, lock in self.session_locks.items() if lock.until <= now]
        for name, lock in lost:
            self.release_session(name, lock.link)
        return [lock.link for _, lock in lost]

    def release_session(self, session: str, link: Any) -> None:
        lock = self.session_locks.get(session)
        if lock is not None and lock.link == link:
            del self.session_locks[session]
            for token, stored in list(self.locked.items()):
                if stored.link == link:
                    del self.locked[token]
                    self.put_back(stored, counted=False)

    def session_links(self) -> list[Any]:
        return [lock.link for lock in self.session_locks.values()]

    def lose_locks(self) -> None:
        """Let all locks run out, at the peer's next look."""
        for stored in list(self.locked.values()):
            stored.until = 0.0
        for lock in list(self.session_locks.values()):
            lock.until = 0.0


class Topic(Entity):
    """An entity whose messages go to all of its subscriptions."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.subscriptions: dict[str, Queue] = {}


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
        self._answers: dict[tuple[Any, str], Any] = {}
        self._sessions: dict[Any, str] = {}
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

    def queue(self, name: str, **settings: Any) -> Queue:
        """A new queue that can be received from, and its dead letters; `settings` are those of `Queue`."""
        dead = Queue(name + _DEAD_LETTERS, lock=settings.get("lock", 30.0))
        self.entities[dead.name] = dead
        queue = self.entities[name] = Queue(name, dead=dead, **settings)
        return queue

    def topic(self, name: str) -> Topic:
        """A new topic, without subscriptions."""
        topic = self.entities[name] = Topic(name)
        return topic

    def subscription(self, topic: Topic, name: str, **settings: Any) -> Queue:
        """A new subscription of a topic."""
        queue = topic.subscriptions[name] = self.queue(f"{topic.name}/Subscriptions/{name}", **settings)
        return queue

    def put(self, queue: Queue, *messages: Any) -> None:
        """Store messages, `proton.Message`, as if somebody had sent them."""

        def add() -> None:
            for message in messages:
                queue.add(message)
            self._feed(queue)

        self.call(add)

    def cut(self) -> None:
        """Drop all connections, without a word of AMQP."""
        for connection in list(self.connections):
            self.call(partial(self._drop, connection))

    def detach(self, entity: Entity) -> None:
        """Detach all links to the entity by force, as Service Bus does to links that were idle for ten minutes."""
        for link in list(entity.links):
            self.call(partial(self._close_link, link, "amqp:link:detach-forced"))

    def delete(self, entity: Entity) -> None:
        """Let there be no such entity any more."""
        del self.entities[entity.name]
        for link in list(entity.links):
            self.call(partial(self._close_link, link, "amqp:not-found"))

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
        self._tick()
        self._started.set()
        while self._container.process() and self._running:
            pass

    def _tick(self) -> None:
        """Look at the clock, every now and then."""
        now = time.time()
        for queue in list(self.entities.values()):
            if isinstance(queue, Queue):
                for link in queue.expire(now):
                    self._close_link(link, "com.microsoft:session-lock-lost")
                for link in [link for link, latest in queue.waiting.items() if latest <= now]:
                    del queue.waiting[link]
                    self._open_refused(link, "com.microsoft:timeout")
                self._feed(queue)
        self._container.schedule(_TICK, _Timer(self._tick, self._errors))

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
            "on_link_remote_detach": lambda event: self._forget_link(event.link),
            "on_link_flow": lambda event: self._flow(event.link),
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
        for name in [name for name in self._answers if name[0] == connection]:
            del self._answers[name]
        for entity in list(self.entities.values()):
            for link in [link for link in entity.links if link.connection == connection]:
                self._unlink(entity, link)

    def _forget_link(self, link: Any) -> None:
        for entity in list(self.entities.values()):
            self._unlink(entity, link)
        link.close()

    def _unlink(self, entity: Entity, link: Any) -> None:
        entity.links.discard(link)
        if isinstance(entity, Queue):
            entity.waiting.pop(link, None)
            if link in entity.session_links():
                entity.release_session(self._sessions.pop(link), link)
                self._feed(entity)

    def _drop(self, connection: Any) -> None:
        self.connections.discard(connection)
        if transport := connection.transport:
            transport.close_tail()
            transport.close_head()

    def _attach(self, link: Any) -> None:
        link.source.copy(link.remote_source)
        link.target.copy(link.remote_target)
        if link.is_sender:
            self._attach_receiver(link)
            return
        name = _entity_of(link.remote_target.address)
        if name.endswith(_MANAGEMENT):
            link.open()
            link.flow(_CREDIT)
            return
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

    def _attach_receiver(self, link: Any) -> None:
        """A client wants to receive: its answers about tokens or requests, or messages."""
        name = _entity_of(link.remote_source.address)
        if name == "$cbs":
            self._cbs[link.connection] = link
            link.open()
            return
        if name.endswith(_MANAGEMENT):
            self._answers[link.connection, name] = link
            link.open()
            return
        queue = self.entities.get(name)
        filters = _map_of(link.remote_source.filter)
        wants_session = _SESSION_FILTER in filters
        if queue is None:
            self._open_refused(link, "amqp:not-found")
        elif queue.closed_with:
            self._open_refused(link, queue.closed_with)
        elif not isinstance(queue, Queue) or queue.sessions != wants_session:
            self._open_refused(link, "amqp:not-allowed")
        elif wants_session:
            queue.links.add(link)
            session = filters[_SESSION_FILTER]
            if session is not None:
                if session in queue.session_locks:
                    self._open_refused(link, "com.microsoft:session-cannot-be-locked")
                else:
                    self._open_session(queue, link, session)
                return
            timeout = _dict(link.remote_properties).get("com.microsoft:timeout", 60_000) / 1000
            queue.waiting[link] = time.time() + timeout
            self._feed(queue)
        else:
            queue.links.add(link)
            link.open()

    def _open_refused(self, link: Any, condition: str) -> None:
        link.source.type = self._proton.Terminus.UNSPECIFIED
        link.open()
        self._close_link(link, condition)

    def _feed(self, queue: Queue) -> None:
        """Give receivers what there is for them."""
        now = time.time()
        for link in list(queue.waiting):
            session = queue.free_session(now)
            if session is None:
                break
            del queue.waiting[link]
            self._open_session(queue, link, session)
        for link in list(queue.links):
            self._flow(link, queue)

    def _open_session(self, queue: Queue, link: Any, session: str) -> None:
        until = time.time() + queue.lock
        queue.session_locks[session] = SessionLock(link, until)
        self._sessions[link] = session
        link.source.filter.clear()
        link.source.filter.put_dict({self._proton.symbol(_SESSION_FILTER): session})
        ticks = int(until * 10_000_000) + _TICKS_BEFORE_1970
        link.properties = {self._proton.symbol("com.microsoft:locked-until-utc"): ticks}
        link.open()

    def _flow(self, link: Any, queue: Queue | None = None) -> None:
        if not link.is_sender:
            return
        if queue is None:
            entity = self.entities.get(_entity_of(link.source.address or ""))
            if not isinstance(entity, Queue) or link not in entity.links:
                return
            queue = entity
        session = self._sessions.get(link)
        if (queue.sessions and session is None) or link.state & self._proton.Endpoint.LOCAL_CLOSED:
            return
        now = time.time()
        while link.credit > 0 and (taken := queue.take(link, session, now)):
            token, stored = taken
            link.delivery(token.bytes_le)
            link.send(self._encoded(stored))
            link.advance()
        if link.drain_mode:
            link.drained()

    def _encoded(self, stored: Stored) -> bytes:
        message = stored.message
        symbol, stamp = self._proton.symbol, self._proton.timestamp
        annotations = {symbol(name): value for name, value in _dict(message.annotations).items()}
        annotations[symbol("x-opt-sequence-number")] = stored.number
        annotations[symbol("x-opt-enqueued-time")] = stamp(int(stored.due * 1000))
        if stored.until:
            annotations[symbol("x-opt-locked-until")] = stamp(int(stored.until * 1000))
        message.annotations = annotations
        message.delivery_count = stored.deliveries
        return bytes(message.encode())

    def _settle(self, delivery: Any) -> None:
        """A receiver says what became of a message."""
        states = self._proton.Delivery
        queue = self.entities.get(_entity_of(delivery.link.source.address or ""))
        action = {
            states.ACCEPTED: "complete",
            states.RELEASED: "release",
            states.MODIFIED: "abandon",
            states.REJECTED: "dead-letter",
        }.get(delivery.remote_state)
        if not isinstance(queue, Queue) or action is None:
            delivery.settle()
            return
        fault, condition = queue.take_settle_fault()
        if fault in {"ignore", "drop"}:
            if fault == "drop":
                self._drop(delivery.connection)
            return
        if fault == "reject":
            self._reject(delivery, condition)
            return
        info: dict[str, Any] = {}
        if action == "dead-letter" and delivery.remote.condition is not None:
            info = {str(name): value for name, value in _dict(delivery.remote.condition.info).items()}
        token = UUID(bytes_le=delivery.tag.encode())
        if queue.settle(token, action, info.get("DeadLetterReason"), info.get("DeadLetterErrorDescription")):
            if fault == "settle and drop":
                self._drop(delivery.connection)
                return
            delivery.update(delivery.remote_state)
            delivery.settle()
        else:
            self._reject(delivery, "com.microsoft:message-lock-lost")
        self._feed(queue)

    def _request(self, link: Any, request: Any) -> None:
        """What clients ask over the management link of an entity."""
        name = _entity_of(link.remote_target.address)
        queue = self.entities.get(name.removesuffix(_MANAGEMENT))
        assert isinstance(queue, Queue)
        fault, condition = queue.take_request_fault()
        if fault == "drop":
            self._drop(link.connection)
        if fault in {"drop", "ignore"}:
            return
        operation = str(request.properties["operation"]).removeprefix("com.microsoft:")
        body = request.body
        if fault == "reject":
            answer: dict[str, Any] | str = condition
        elif operation == "renew-lock":
            answer = self._renew(queue, list(body["lock-tokens"]))
        elif operation == "renew-session-lock":
            answer = self._renew_session(queue, body["session-id"], link.connection)
        elif operation == "peek-message":
            answer = self._peek(queue, body["from-sequence-number"], body["message-count"])
        elif operation == "update-disposition":
            answer = self._update(queue, body)
        else:
            answer = "amqp:not-implemented"
        properties: dict[str, Any] = {
            "statusCode": self._proton.int32(200),
            "statusDescription": "by order of the test",
        }
        if isinstance(answer, str):
            properties |= {"statusCode": self._proton.int32(410), "errorCondition": self._proton.symbol(answer)}
        elif not answer.get("messages", True):
            properties["statusCode"] = self._proton.int32(204)
        content = {} if isinstance(answer, str) else answer
        message = self._proton.Message(content, correlation_id=request.id, properties=properties)
        self._answers[link.connection, name].send(message)
        self._feed(queue)

    def _renew(self, queue: Queue, tokens: list[UUID]) -> dict[str, Any] | str:
        if any(token not in queue.locked for token in tokens):
            return "com.microsoft:message-lock-lost"
        for token in tokens:
            queue.locked[token].until = time.time() + queue.lock
        queue.renewed += len(tokens)
        return {"expirations": [self._proton.timestamp(int(queue.locked[token].until * 1000)) for token in tokens]}

    def _renew_session(self, queue: Queue, session: str, connection: Any) -> dict[str, Any] | str:
        lock = queue.session_locks.get(session)
        if lock is None or lock.link.connection != connection:
            return "com.microsoft:session-lock-lost"
        lock.until = time.time() + queue.lock
        queue.renewed += 1
        return {"expiration": self._proton.timestamp(int(lock.until * 1000))}

    def _peek(self, queue: Queue, first: int, count: int) -> dict[str, Any]:
        everything = sorted([*queue.ready, *queue.locked.values()], key=lambda one: one.number)
        page = [one for one in everything if one.number >= first][:count]
        return {"messages": [{"message": self._encoded(one)} for one in page]}

    def _update(self, queue: Queue, body: dict[str, Any]) -> dict[str, Any] | str:
        action = {"completed": "complete", "abandoned": "abandon", "suspended": "dead-letter"}[
            body["disposition-status"]
        ]
        for token in body["lock-tokens"]:
            if not queue.settle(token, action, body.get("deadletter-reason"), body.get("deadletter-description")):
                return "com.microsoft:message-lock-lost"
        return {}

    def _close_link(self, link: Any, condition: str) -> None:
        link.condition = self._proton.Condition(condition, "by order of the test")
        link.close()

    def _deliver(self, delivery: Any) -> None:
        link = delivery.link
        if link.is_sender and delivery.updated and not link.state & self._proton.Endpoint.LOCAL_CLOSED:
            self._settle(delivery)
        elif link.is_sender or link.state & self._proton.Endpoint.LOCAL_CLOSED:
            delivery.settle()
        elif delivery.readable and not delivery.partial:
            transfer = link.recv(delivery.pending)
            link.advance()
            link.flow(1)
            name = _entity_of(link.remote_target.address)
            if name == "$cbs":
                self._accept(delivery)
                self._answer_token(link.connection, self._decode(transfer))
            elif name.endswith(_MANAGEMENT):
                self._accept(delivery)
                self._request(link, self._decode(transfer))
            else:
                self._take(self.entities[name], delivery, transfer)

    def _take(self, entity: Entity, delivery: Any, transfer: bytes) -> None:
        fault = entity.take_fault()
        action = fault.action if fault is not None else None
        condition = fault.condition if fault is not None else entity.rule and entity.rule(_messages(transfer))
        if len(transfer) > entity.max_message_size:
            action, condition = "detach", "amqp:link:message-size-exceeded"
        if action in {None, "hold", "lose answer"} and not condition:
            self._keep(entity, bytes(transfer))
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

    def _keep(self, entity: Entity, transfer: bytes) -> None:
        entity.transfers.append(transfer)
        for queue in _queues_of(entity):
            for message in _messages(transfer):
                queue.add(message)
            self._feed(queue)

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


class _Timer:
    """Does something when Proton says that its time has come."""

    def __init__(self, action: Callable[[], object], errors: list[str]) -> None:
        self._action = action
        self._errors = errors

    def on_timer_task(self, event: Any) -> None:
        del event
        try:
            self._action()
        except Exception:  # noqa: BLE001 - shown when the peer is closed
            self._errors.append(traceback.format_exc())


def _queues_of(entity: Entity) -> Iterator[Queue]:
    if isinstance(entity, Queue):
        yield entity
    elif isinstance(entity, Topic):
        yield from entity.subscriptions.values()


def _map_of(section: Any) -> dict[str, Any]:
    section.rewind()
    if section.next() is None:
        return {}
    content = section.get_object()
    return {str(name): value for name, value in _dict(content).items()}


def _dict(content: Any) -> dict[Any, Any]:
    return dict(content or {})


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
    messages = parts if len(parts) > 1 or (parts and _is_message(parts[0])) else [transfer]
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
