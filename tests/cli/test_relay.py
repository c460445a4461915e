"""The relay as a process: it loads what it is told to, publishes, and ends as it is told to."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline_mediator.cli.main import main
from tests.cli.called import Called
from tests.cli.processes import SECONDS, read_until, running

SHOP = """
    from pipeline_mediator import Mediator
    from pipeline_mediator.errors import BrokerUnavailableError
    from pipeline_mediator.middlewares import PublishMiddleware
    from tests.outbox.relay_fakes import DESTINATIONS, Broker, Shop

    class Talking(Broker):
        away = False

        async def publish(self, batch):
            for outgoing in batch:
                print("publishing", outgoing.message_id, flush=True)
            return await super().publish(batch)

        async def __aenter__(self):
            if self.away:
                raise BrokerUnavailableError("nobody is at home")
            return self

    class Outbox:
        role = "outbox"
        store = None

        def for_route(self, route):
            return None

        async def __call__(self, context, call_next):
            return await call_next(context)

    broker = Talking()
    shop = Shop(broker)
    Outbox.store = shop.store

    class app:
        def create():
            return Mediator(middlewares=[Outbox(), PublishMiddleware(broker, DESTINATIONS)])

    mediator = app.create()

    async def create_mediator():
        await shop.put("a", "b")
        return app.create()

    async def create_hanging():
        import anyio
        broker.hangs["orders"] = anyio.Event()
        return await create_mediator()

    async def create_lonely():
        broker.away = True
        return await create_mediator()

    async def create_slowly():
        import anyio
        print("creating", flush=True)
        await anyio.sleep(60)

    async def create_unwelcome():
        broker.refuse = lambda _: BrokerUnavailableError("nobody is at home")
        return await create_mediator()

    def create_relay():
        from pipeline_mediator.outbox import OutboxRelay
        return OutboxRelay(app.create(), name="settled")

    async def create_broken():
        shop.store.broken = ConnectionRefusedError("no database")
        return app.create()
"""


@pytest.fixture
def shop(write: Callable[[str], str]) -> str:
    return write(SHOP)


# -- draining ----------------------------------------------------------------------------------------------------------


def test_it_publishes_what_is_due(shop: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["relay", f"{shop}:create_mediator", "--drain"]) == 0
    assert sorted(capsys.readouterr().out.split()) == ["a", "b", "publishing", "publishing"]


def test_it_tells_what_it_left(shop: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    assert main(["relay", f"{shop}:create_unwelcome", "--drain"]) == 1
    assert "0 messages published; left: 2 pending, 0 waiting, 0 dead" in caplog.messages


@pytest.mark.parametrize("attribute", ["mediator", "app.create", "create_mediator"])
def test_a_mediator_will_do_and_whatever_makes_one(attribute: str, shop: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    settings = ["--batch", "10", "--poll", "0.1", "--attempts", "3", "--lease", "9", "--on-dead", "park", "--name", "x"]
    assert main(["relay", f"{shop}:{attribute}", "--drain", *settings]) == 0
    assert (
        f"{2 if attribute == 'create_mediator' else 0} messages published; left: 0 pending, 0 waiting, 0 dead"
        in caplog.messages
    )


def test_a_relay_will_do_with_the_settings_that_it_has(
    shop: str, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level("INFO")
    assert main(["relay", f"{shop}:create_relay", "--drain"]) == 0
    assert "0 messages published; left: 0 pending, 0 waiting, 0 dead" in caplog.messages

    assert main(["relay", f"{shop}:create_relay", "--batch", "10", "--stop-within", "1"]) == 2
    assert "is a relay with settings of its own: leave out --batch, --stop-within" in capsys.readouterr().err


def test_draining_ends_with_one_document(shop: str, call: Callable[..., Called]) -> None:
    called = call("relay", f"{shop}:create_mediator", "--drain", "--json")
    assert called.code == 0
    left = {"pending": 0, "waiting": 0, "dead": 0, "oldest": 0.0}
    assert called.document == {"published": 2, "left": left, "signal": None, "forced": False}
    assert "publishing a" in called.err  # which the application printed

    called = call("relay", f"{shop}:create_unwelcome", "--drain", "--json")
    assert called.code == 1
    assert called.document["left"]["pending"] == 2


# -- what cannot be done -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "complaint"),
    [
        ("{shop}", "'{shop}' names nothing: it should look like shop.app:create_mediator"),
        (":create", "':create' names nothing"),
        ("{shop}x:create", "there is no module '{shop}x', neither in {here} nor among what is installed"),
        ("nowhere.app:create", "there is no module 'nowhere'"),
        ("{shop}:create_mediators", "there is no 'create_mediators' in {shop}. Did you mean create_mediator"),
        ("{shop}:app.missing", "there is no 'missing' in {shop}."),
        ("{shop}:DESTINATIONS", "{shop}:DESTINATIONS is a dict; needed is a Mediator, or what returns one"),
        ("{shop}:Talking", "{shop}:Talking returns a Talking; needed is a Mediator"),
        ("{shop}:broker.has", "{shop}:broker.has failed: TypeError: Broker.has() missing 1 required"),
    ],
)
def test_a_target_that_is_none_is_told(
    target: str, complaint: str, shop: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["relay", target.format(shop=shop)]) == 2
    shown = capsys.readouterr()
    assert complaint.format(shop=shop, here=tmp_path) in shown.err
    assert shown.out == ""


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("\n1 / 0\n", "cannot be imported: ZeroDivisionError: division by zero ({file}:2)"),
        ("import no_such_library\n", "cannot be imported: ModuleNotFoundError: No module named 'no_such_library'"),
        ("def create():\n    raise KeyError('DATABASE_URL')\n", "create failed: KeyError: 'DATABASE_URL' ({file}:2)"),
        (
            "from pipeline_mediator import Mediator\ndef create():\n    return Mediator()\n",
            "no OutboxMiddleware stands in the mediator's pipeline",
        ),
    ],
)
def test_a_mistake_of_the_applications_is_told_with_its_place(
    text: str, complaint: str, write: Callable[[str], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = write(text)
    assert main(["relay", f"{name}:create"]) == 2
    assert complaint.format(file=tmp_path / f"{name}.py") in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["create_mediator", "--batch", "0"], "batch=0, and has to be at least 1"),
        (["create_broken", "--drain"], "the outbox cannot be read: ConnectionRefusedError: no database"),
    ],
)
def test_what_cannot_be_done_is_told(
    arguments: list[str], complaint: str, shop: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["relay", f"{shop}:{arguments[0]}", *arguments[1:]]) == 2
    assert complaint in capsys.readouterr().err


# -- a process ---------------------------------------------------------------------------------------------------------


def test_it_runs_until_it_is_told_to_end(shop: str) -> None:
    with running("relay", f"{shop}:create_mediator") as relay:
        read_until(relay, "outbox: relay started")
        read_until(relay, "publishing b")
        relay.send_signal(signal.SIGTERM)
        read_until(relay, "SIGTERM: the batch at hand is finished, then it ends")
        read_until(relay, "outbox: relay stopped")
        assert relay.wait(SECONDS) == 0


def test_told_twice_it_ends_at_once(shop: str) -> None:
    with running("relay", f"{shop}:create_hanging", "--stop-within", "60") as relay:
        read_until(relay, "publishing a")
        relay.send_signal(signal.SIGTERM)
        read_until(relay, "the batch at hand is finished")
        relay.send_signal(signal.SIGTERM)
        assert relay.wait(SECONDS) == 128 + signal.SIGTERM


def test_told_to_end_it_says_what_is_left(shop: str) -> None:
    with running("relay", f"{shop}:create_hanging", "--drain", "--stop-within", "0") as relay:
        read_until(relay, "publishing a")
        relay.send_signal(signal.SIGTERM)
        read_until(relay, "0 messages published; left: 2 pending, 0 waiting, 0 dead")
        assert relay.wait(SECONDS) == 1


def test_told_to_end_before_it_began_it_ends(shop: str) -> None:
    with running("relay", f"{shop}:create_slowly") as relay:
        read_until(relay, "creating")
        relay.send_signal(signal.SIGTERM)
        assert relay.wait(SECONDS) == 128 + signal.SIGTERM


def test_it_begins_without_its_broker(shop: str) -> None:
    with running("relay", f"{shop}:create_lonely") as relay:
        read_until(relay, "nobody is at home")
        read_until(relay, "publishing b")
        relay.send_signal(signal.SIGTERM)
        assert relay.wait(SECONDS) == 0


def test_it_says_in_a_document_what_ended_it(shop: str) -> None:
    with running("relay", f"{shop}:create_mediator", "--json", apart=True) as relay:
        assert relay.stderr is not None
        assert any("publishing b" in line for line in relay.stderr)
        relay.send_signal(signal.SIGINT)
        said, _ = relay.communicate(timeout=SECONDS)
        assert relay.returncode == 0
    assert json.loads(said) == {"signal": "SIGINT", "forced": False}
