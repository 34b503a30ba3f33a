"""The private PostgreSQL: its start, its end, and whatever may come between."""

from __future__ import annotations

import asyncio
import errno
import os
import pwd
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import psycopg
import pytest

from agentvoicebox.config.errors import Unavailable
from agentvoicebox.tenancy import acl, embedded, roles
from agentvoicebox.tenancy.embedded import Account, Postgres, serving

HOLD = """
import sys
from pathlib import Path
from agentvoicebox.tenancy.embedded import serving
with serving(Path(sys.argv[1])) as postgres:
    print(*postgres.pids(), flush=True)
    sys.stdin.read()
"""
ONCE = """
import resource, sys
from pathlib import Path
from agentvoicebox.config.errors import Unavailable
from agentvoicebox.tenancy.embedded import serving
if len(sys.argv) > 2:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    with serving(Path(sys.argv[1])) as postgres:
        print("served", len(postgres.pids()))
except Unavailable as error:
    sys.exit(f"{error.code}: {error.message}")
"""
BUSY = "SELECT count(*) FROM generate_series(1, 10000000)"


def run(script: str, *arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def spawn(script: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def eventually(holds: Callable[[], bool], patience: float = 60) -> bool:
    deadline = time.monotonic() + patience
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def ask(postgres: Postgres, query: str) -> list[tuple[object, ...]]:
    with psycopg.connect(postgres.url(roles.ADMIN, "postgres"), autocommit=True) as connection:
        cursor = connection.execute(query)
        return cursor.fetchall() if cursor.description else []


def sockets_of(postgres: Postgres) -> Path:
    return Path(str(ask(postgres, "SHOW unix_socket_directories")[0][0]).strip('"'))


def test_what_was_written_is_there_at_the_next_start(data: Path) -> None:
    with serving(data) as postgres:
        assert ask(postgres, "SELECT one FROM kept") == [(1,)]
        assert postgres.alive()
    assert not postgres.alive()
    assert postgres.pids() == []


def test_it_is_reachable_by_a_private_socket_only(server: Postgres) -> None:
    assert ask(server, "SHOW listen_addresses") == [("",)]
    assert ask(server, "SHOW fsync") == [("on",)]
    assert ask(server, "SELECT type, auth_method FROM pg_hba_file_rules") == [("local", "peer")]
    socket = sockets_of(server) / ".s.PGSQL.5432"
    assert socket.stat().st_mode & 0o077 == 0
    assert socket.parent.stat().st_mode & 0o077 == 0
    postmaster = psutil.Process(server.pids()[0])
    assert postmaster.uids().real != 0
    assert not postmaster.net_connections("inet")


def test_an_error_leaves_no_row_in_the_log(data: Path) -> None:
    with serving(data) as postgres:
        ask(postgres, "CREATE TABLE said (line text CHECK (line <> 'a secret sentence'))")
        with pytest.raises(psycopg.errors.CheckViolation):
            ask(postgres, "INSERT INTO said VALUES ('a secret sentence')")
    assert "secret" not in (data / "logs" / "postgres.log").read_text()


def test_who_finds_a_server_running_leaves_it_running(data: Path) -> None:
    with serving(data) as first:
        with serving(data) as second:
            assert second.pids()[0] == first.pids()[0]
            assert second.url(roles.ADMIN) == first.url(roles.ADMIN)
        assert first.alive()
        assert ask(first, "SELECT one FROM kept") == [(1,)]


def test_another_process_uses_the_server_too(data: Path) -> None:
    with serving(data) as postgres:
        assert run(ONCE, data).stdout.startswith("served")
        assert postgres.alive()


async def test_a_guest_takes_over_when_the_owner_leaves(data: Path) -> None:
    owner = spawn(HOLD, data)
    assert owner.stdout is not None
    pids = [int(pid) for pid in owner.stdout.readline().split()]
    with serving(data) as guest:
        assert guest.pids()[0] == pids[0]
        keeper = asyncio.create_task(guest.keep(every=0.05))
        owner.communicate()
        deadline = asyncio.get_running_loop().time() + 60
        while not guest.alive() or guest.pids()[0] == pids[0]:
            assert asyncio.get_running_loop().time() < deadline
            await asyncio.sleep(0.05)
        assert ask(guest, "SELECT one FROM kept") == [(1,)]
        keeper.cancel()


def test_two_first_starts_at_once_make_one_store(tmp_path: Path) -> None:
    both = [spawn(ONCE, tmp_path / "data") for _ in range(2)]
    for process in both:
        output, _ = process.communicate(timeout=120)
        assert (process.returncode, output.split()[0]) == (0, "served")
    assert not list((tmp_path / "data").glob("postgres.new*"))


def test_kill_9_of_the_parent_leaves_no_postgres(data: Path) -> None:
    parent = spawn(HOLD, data)
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) > 1
    parent.kill()
    parent.communicate()
    assert eventually(lambda: not any(psutil.pid_exists(pid) for pid in pids))


def test_a_start_right_after_kill_9_waits_for_the_old_server_to_end(data: Path) -> None:
    parent = spawn(HOLD, data)
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    parent.kill()
    parent.communicate()
    with serving(data) as postgres:
        assert postgres.pids()[0] not in pids
        assert ask(postgres, "SELECT one FROM kept") == [(1,)]


def test_a_start_waits_for_orphans_of_a_killed_server(data: Path) -> None:
    """They are at work on the same files, and notice that their postmaster is gone when their query ends."""

    def work() -> None:
        """Again and again, so that it is seen at work however late that is looked for."""
        with suppress(psycopg.OperationalError), psycopg.connect(postgres.url(roles.ADMIN, "postgres")) as connection:
            while True:
                connection.execute(BUSY)

    with serving(data) as postgres:
        busy = threading.Thread(target=work)
        with psycopg.connect(postgres.url(roles.ADMIN, "postgres"), autocommit=True) as connection:
            busy.start()
            is_busy = "SELECT count(*) FROM pg_stat_activity WHERE query = %s AND state = 'active'"
            assert eventually(lambda: connection.execute(is_busy, (BUSY,)).fetchone() == (1,))
        os.kill(postgres.pids()[0], signal.SIGKILL)
        assert eventually(lambda: not postgres.alive())
        postgres.start()
        assert ask(postgres, "SELECT one FROM kept") == [(1,)]
        busy.join()


def test_kill_9_during_the_first_start_blocks_nothing(tmp_path: Path) -> None:
    parent = spawn(ONCE, tmp_path)
    assert eventually(lambda: any(tmp_path.glob("postgres.new*/*")))
    parent.kill()
    parent.communicate()
    with serving(tmp_path) as postgres:
        assert ask(postgres, "SELECT 1") == [(1,)]
    with serving(tmp_path):
        assert not list(tmp_path.glob("postgres.new*"))


def test_it_starts_again_after_its_own_death(data: Path) -> None:
    with serving(data) as postgres:
        ask(postgres, "CREATE TABLE late AS SELECT 2 AS two")
        os.kill(postgres.pids()[0], signal.SIGKILL)
        assert eventually(lambda: not postgres.alive())
        postgres.start()
        assert ask(postgres, "SELECT two FROM late") == [(2,)]


def test_a_stale_pid_that_belongs_to_a_stranger_now_does_not_block(data: Path) -> None:
    with serving(data) as postgres:
        pids = postgres.pids()
        pidfile = data / "postgres" / "postmaster.pid"
        kept, owner = pidfile.read_text(), pidfile.stat()
        os.kill(pids[0], signal.SIGKILL)
        assert eventually(lambda: not any(psutil.pid_exists(pid) for pid in pids[1:]))
    who = {"user": owner.st_uid, "group": owner.st_gid, "extra_groups": []} if os.geteuid() == 0 else {}
    stranger = subprocess.Popen(["sleep", "60"], **who)
    try:
        pidfile.write_text(kept.replace(str(pids[0]), str(stranger.pid), 1))
        with serving(data) as postgres:
            assert postgres.pids()[0] != stranger.pid
            assert ask(postgres, "SELECT one FROM kept") == [(1,)]
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_a_path_too_long_for_a_socket(made: Path, tmp_path: Path) -> None:
    data = tmp_path / ("deep" * 30) / ("deeper" * 20)
    data.parent.mkdir()
    subprocess.run(["cp", "-a", made, data], check=True)
    with serving(data) as postgres:
        sockets = sockets_of(postgres)
        assert sockets.stat().st_mode & 0o777 == 0o700
        assert run(ONCE, data).stdout.startswith("served")  # and another process finds it there
    with serving(data) as postgres:
        assert ask(postgres, "SELECT one FROM kept") == [(1,)]
    sockets.rmdir()


def test_somebody_elses_directory_is_not_used_for_sockets(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / ("deep" * 30)
    subprocess.run(["cp", "-a", made, data], check=True)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/tmp")
    with serving(data) as postgres:
        sockets = sockets_of(postgres)
    sockets.chmod(0o777)
    with pytest.raises(Unavailable, match="not a private directory"), serving(data):
        pass
    sockets.rmdir()


def test_a_path_of_odd_characters(made: Path, tmp_path: Path) -> None:
    data = tmp_path / "a b,c%d'e\"f:g ü"
    subprocess.run(["cp", "-a", made, data], check=True)
    with serving(data) as postgres:
        sockets = sockets_of(postgres)
        assert ask(postgres, "SELECT one FROM kept") == [(1,)]
    sockets.rmdir()  # elsewhere: libpq takes a comma for the end of a host


def test_directories_above_stay_closed_to_others(made: Path, tmp_path: Path) -> None:
    above = tmp_path / "private"
    above.mkdir(mode=0o700)
    subprocess.run(["cp", "-a", made, above / "data"], check=True)
    with serving(above / "data") as postgres:
        assert ask(postgres, "SELECT one FROM kept") == [(1,)]
    for directory in (above, above / "data"):
        assert stat.S_IMODE(directory.stat().st_mode) & 0o007 == 0
        users = [entry for entry in acl.read(directory) if entry.tag == 0x02]
        if os.geteuid() == 0:
            assert users == [acl.Entry(0x02, acl.SEARCH, pwd.getpwnam(embedded.USER).pw_uid)]
        else:
            assert users == []


def test_no_access_control_list_means_an_error_that_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(acl, "grant", unsupported)
    with pytest.raises(Unavailable, match="--data") as caught:
        embedded._grant(Account("agentvoicebox", 999, 999, switch=True), tmp_path, acl.SEARCH)
    assert caught.value.code == "store_unavailable"
    assert str(tmp_path) in caught.value.message


def test_a_system_user_that_cannot_be_made_means_an_error_that_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "USER", "agentvoicebox-test")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(Unavailable, match="useradd --system --no-create-home --shell /usr/sbin/nologin"):
        embedded._system_user()


def test_a_store_of_another_user_is_not_taken_over(data: Path) -> None:
    if os.geteuid() == 0:
        subprocess.run(["chown", "-R", "nobody", data / "postgres"], check=True)
        with pytest.raises(Unavailable, match="chown -R agentvoicebox"), serving(data):
            pass
    else:
        assert embedded._account(data / "postgres").uid == os.geteuid()


def test_programs_installed_for_one_user_only_are_opened_for_the_server(tmp_path: Path) -> None:
    package = embedded._binaries().parent.parent
    site = tmp_path / "site"
    site.mkdir(mode=0o700)
    (site / package.name).mkdir()
    shutil.copy(package / "__init__.py", site / package.name)
    for part in ("bin/initdb", "bin/postgres", "lib", "share"):
        (site / package.name / "pginstall18" / part).parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            ["cp", "-a", package / "pginstall18" / part, site / package.name / "pginstall18" / part], check=True
        )
    subprocess.run(["cp", "-a", package.with_name(package.name + ".libs"), site], check=True)
    subprocess.run(["chmod", "-R", "go-rwx", site], check=True)
    served = run(ONCE, tmp_path / "data", env={**os.environ, "PYTHONPATH": str(site)})
    assert served.stdout.startswith("served"), served.stderr
    assert (site / package.name).stat().st_mode & 0o007 == 0


@pytest.fixture(params=["limit", "disk"])
def too_small(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, list[object]]]:
    """A directory with room for a megabyte: by a real full disk where we may mount one, else by a limit on files."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "none", str(disk)]
    if request.param == "disk" and subprocess.run(mount, capture_output=True, check=False).returncode == 0:
        yield disk / "data", []
        subprocess.run(["umount", disk], check=True)
    else:
        yield disk / "data", [1_000_000]


def test_no_room_for_a_store_leaves_nothing_half_made(too_small: tuple[Path, list[object]]) -> None:
    data, limit = too_small
    failed = run(ONCE, data, *limit)
    assert failed.returncode == 1
    assert failed.stderr.startswith("store_unavailable: The store in ")
    assert len(failed.stderr.strip().splitlines()) == 1
    if not limit:
        assert "disk is full" in failed.stderr
    assert sorted(path.name for path in data.iterdir()) in (["postgres.lock"], ["logs", "postgres.lock"])


def test_after_a_failed_first_start_the_next_one_works(tmp_path: Path) -> None:
    assert run(ONCE, tmp_path, 1_000_000).returncode == 1
    with serving(tmp_path) as postgres:
        assert ask(postgres, "SELECT 1") == [(1,)]


def test_a_store_of_another_version_is_left_alone(data: Path) -> None:
    (data / "postgres" / "PG_VERSION").write_text("17\n")
    with pytest.raises(Unavailable, match="PostgreSQL 17"), serving(data):
        pass


def test_a_directory_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "postgres").mkdir()
    (tmp_path / "postgres" / "thesis.txt").write_text("years of work")
    with pytest.raises(Unavailable, match="something else"), serving(tmp_path):
        pass
    assert (tmp_path / "postgres" / "thesis.txt").read_text() == "years of work"


def test_a_place_where_nothing_can_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Unavailable, match="--data"), serving(tmp_path / "file" / "data"):
        pass


def test_a_damaged_store_says_why(data: Path) -> None:
    (data / "postgres" / "global" / "pg_control").unlink()
    with pytest.raises(Unavailable, match="pg_control"), serving(data):
        pass


def test_it_belongs_on_the_main_thread(tmp_path: Path) -> None:
    caught: list[BaseException] = []

    def start() -> None:
        try:
            Postgres(tmp_path).start()
        except RuntimeError as error:
            caught.append(error)

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    assert "main thread" in str(caught[0])


def test_nothing_is_asked_of_a_server_that_was_never_started(tmp_path: Path) -> None:
    postgres = Postgres(tmp_path)
    assert not postgres.alive()
    assert postgres.pids() == []
    with pytest.raises(RuntimeError):
        postgres.url(roles.APP)
    postgres.stop()
