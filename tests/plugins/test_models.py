"""Models arrive whole or not at all, from a server of the tests."""

from __future__ import annotations

import asyncio
import hashlib
import http.server
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from agentvoicebox.config.errors import NotFound, Unavailable
from agentvoicebox.plugins import models
from agentvoicebox.plugins.models import BrokenDownload, File, Model

CONTENT = {"a.bin": bytes(range(256)) * 4_000, "b.json": b'{"b": 1}'}
NAME = "tiny-test"


class Server(http.server.ThreadingHTTPServer):
    """Serves `CONTENT`; `cut` bytes into a file it hangs up, `times` times; `lie` changes what it sends."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.cut, self.times, self.lie, self.ranges = 0, 0, False, True
        self.asked: list[tuple[str, str | None]] = []

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is part of the tests."""


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        name, wanted = self.path.rsplit("/", 1)[1], self.headers.get("Range")
        self.server.asked.append((name, wanted))
        if name not in CONTENT:
            self.send_error(404)
            return
        body = CONTENT[name]
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.server.ranges else 0
        self.send_response(206 if start else 200)
        part = body[start:]
        if self.server.lie and part:
            part = part[:-1] + b"!"
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if self.server.times and name == "a.bin":
            self.server.times -= 1
            self.wfile.write(part[: self.server.cut])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.wfile.write(part)

    def log_message(self, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    files = tuple(File(n, len(c), hashlib.sha256(c).hexdigest()) for n, c in CONTENT.items())
    with Server() as made:
        url = f"http://127.0.0.1:{made.server_port}"
        entry = Model(NAME, "stt", "MIT", f"{url}/{NAME}", files, False)
        monkeypatch.setattr(models, "_catalogue", lambda: {NAME: entry})
        threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True).start()
        yield made
        made.shutdown()


def silent(done: int, total: int) -> None:
    """Nobody looks."""


def whole(directory: Path) -> bool:
    return models.installed(NAME, directory) and all(
        (directory / NAME / n).read_bytes() == c for n, c in CONTENT.items()
    )


def test_a_model_is_fetched_with_progress_and_only_once(server: Server, tmp_path: Path):
    told: list[tuple[int, int]] = []
    assert models.pull(NAME, tmp_path, lambda *now: told.append(now)) == tmp_path / NAME
    assert whole(tmp_path)
    total = sum(map(len, CONTENT.values()))
    assert told[-1] == (total, total)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    asked = len(server.asked)
    models.pull(NAME, tmp_path, silent)
    assert len(server.asked) == asked
    assert [m.installed for m in models.available(tmp_path)] == [True]


def test_another_address_can_be_used(server: Server, tmp_path: Path):
    models.pull(NAME, tmp_path, silent, url=f"http://127.0.0.1:{server.server_port}/mirror/")
    assert whole(tmp_path)


def test_a_download_that_breaks_off_goes_on_where_it_was(server: Server, tmp_path: Path):
    server.cut, server.times = 300_000, 1
    models.pull(NAME, tmp_path, silent)
    assert whole(tmp_path)
    assert ("a.bin", "bytes=300000-") in server.asked


def test_what_arrived_before_giving_up_is_kept_for_the_next_try(server: Server, tmp_path: Path):
    server.cut, server.times = 100_000, 3
    with pytest.raises(Unavailable, match="pull again") as caught:
        models.pull(NAME, tmp_path, silent)
    assert caught.value.code == "models_interrupted"
    assert not models.installed(NAME, tmp_path)
    models.pull(NAME, tmp_path, silent)
    assert whole(tmp_path)
    assert ("a.bin", "bytes=300000-") in server.asked


def test_a_server_without_ranges_starts_over(server: Server, tmp_path: Path):
    server.cut, server.times, server.ranges = 300_000, 1, False
    models.pull(NAME, tmp_path, silent)
    assert whole(tmp_path)


def test_a_wrong_checksum_is_removed_and_said(server: Server, tmp_path: Path):
    server.lie = True
    with pytest.raises(BrokenDownload, match="checksum"):
        models.pull(NAME, tmp_path, silent)
    assert not list(tmp_path.rglob("a.bin"))
    assert not models.installed(NAME, tmp_path)
    server.lie = False
    models.pull(NAME, tmp_path, silent)
    assert whole(tmp_path)


def test_without_a_server_it_says_so_at_once(server: Server, tmp_path: Path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(Unavailable) as caught:
        models.pull(NAME, tmp_path, silent, url=f"http://127.0.0.1:{port}")
    assert caught.value.code == "models_unreachable"
    with pytest.raises(Unavailable) as caught:
        models.pull(NAME, tmp_path, silent, url="http://no.such.host.invalid")
    assert caught.value.code == "models_unreachable"
    assert not models.installed(NAME, tmp_path)


def test_a_full_disk_is_said_and_leaves_nothing_that_counts(server: Server, tmp_path: Path):
    staging = tmp_path / f".{NAME}.part"
    staging.mkdir(parents=True)
    (staging / "a.bin").symlink_to("/dev/full")  # every write to it fails as on a full disk
    with pytest.raises(Unavailable, match="space") as caught:
        models.pull(NAME, tmp_path, silent)
    assert caught.value.code == "disk_full"
    assert not models.installed(NAME, tmp_path)


def test_a_model_cut_short_does_not_count(server: Server, tmp_path: Path):
    models.pull(NAME, tmp_path, silent)
    (tmp_path / NAME / "a.bin").write_bytes(b"short")
    assert not models.installed(NAME, tmp_path)
    models.pull(NAME, tmp_path, silent)
    assert whole(tmp_path)


FETCH = """
import hashlib, sys
from pathlib import Path
from agentvoicebox.plugins import models
from agentvoicebox.plugins.models import File, Model
name, url, directory, *files = sys.argv[1:]
entry = Model(name, "stt", "MIT", url, tuple(File(n, int(s), d) for n, s, d in (f.split(":") for f in files)), False)
models._catalogue = lambda: {name: entry}
models.pull(name, Path(directory), lambda done, total: None)
"""


def test_two_processes_fetch_it_once(server: Server, tmp_path: Path):
    url = f"http://127.0.0.1:{server.server_port}/{NAME}"
    files = [f"{n}:{len(c)}:{hashlib.sha256(c).hexdigest()}" for n, c in CONTENT.items()]
    command = [sys.executable, "-c", FETCH, NAME, url, str(tmp_path), *files]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(2)]
    for process in running:
        _, trouble = process.communicate(timeout=300)
        assert process.returncode == 0, trouble.decode()
    assert whole(tmp_path)
    assert [name for name, _ in server.asked] == ["a.bin", "b.json"]


def test_a_model_nobody_knows():
    with pytest.raises(NotFound, match="faster-whisper-base") as caught:
        models.installed("faster-whisper-giant", Path("/nowhere"))
    assert caught.value.code == "unknown_model"


def test_every_file_of_the_catalogue_has_a_pinned_address_and_a_checksum():
    found = models.available(Path("/nowhere"))
    assert {m.name for m in found} > {"kokoro", "faster-whisper-tiny", "faster-whisper-base", "faster-whisper-small"}
    for model in found:
        assert not model.installed
        assert model.license in ("MIT", "Apache-2.0")
        assert "/main" not in model.url
        assert all(len(bytes.fromhex(f.sha256)) == 32 and f.size > 0 for f in model.files)


def lay_down(directory: Path, name: str) -> None:
    """Files of the right length, which take no space."""
    (directory / name).mkdir(parents=True)
    for file in next(m for m in models.available(directory) if m.name == name).files:
        with (directory / name / file.name).open("wb") as out:
            out.truncate(file.size)


def test_auto_takes_what_is_here_ear_and_voice_apart(tmp_path: Path):
    nothing = models.choose("auto", tmp_path)
    assert (nothing.stt.plugin, nothing.tts.plugin) == ("agentvoicebox-stt-sphinx", "agentvoicebox-tts-flite")
    assert nothing.notice is not None
    assert "\n" not in nothing.notice
    for said in ("English only", "do not understand people well", "avb models pull faster-whisper-base kokoro"):
        assert said in nothing.notice

    lay_down(tmp_path, "kokoro")
    voice = models.choose("auto", tmp_path)
    assert (voice.stt.plugin, voice.tts.plugin) == ("agentvoicebox-stt-sphinx", "agentvoicebox-tts-kokoro")
    assert voice.notice is not None
    assert "flite" not in voice.notice

    lay_down(tmp_path, "faster-whisper-base")
    both = models.choose("auto", tmp_path)
    assert both.stt.plugin == "agentvoicebox-stt-whisper"
    assert both.stt == models.whisper_spec(tmp_path, "base", vad=True)
    assert dict(both.stt.config)["model"] == str(tmp_path / "faster-whisper-base")
    assert both.notice is None
    assert both == models.choose("models", tmp_path)
    assert hash(both.stt) == hash(models.choose("auto", tmp_path).stt)

    forced = models.choose("offline", tmp_path)
    assert (forced.stt, forced.tts) == (nothing.stt, nothing.tts)


def test_what_workers_have_need_not_be_here(tmp_path: Path):
    there = models.wanted(tmp_path, "small")
    assert (there.stt, there.notice) == (models.whisper_spec(tmp_path, "small", vad=True), None)
    assert there.tts.plugin == "agentvoicebox-tts-kokoro"
    for name in models.defaults("small"):
        lay_down(tmp_path, name)
    assert there == models.choose("models", tmp_path, "small")


def test_what_a_whisper_model_gives_it_costs():
    told = models.trade_offs()
    assert [choice.model for choice in told] == ["tiny", "base", "small", "medium", "large-v2", "large-v3"]
    for smaller, larger in pairwise(told):
        assert smaller.word_errors > larger.word_errors
        assert smaller.speed >= larger.speed
        assert smaller.size < larger.size
        assert smaller.memory < larger.memory


def test_models_that_are_required_and_missing_name_the_remedy(tmp_path: Path):
    with pytest.raises(Unavailable, match="avb models pull faster-whisper-tiny kokoro") as caught:
        models.choose("models", tmp_path, "tiny")
    assert caught.value.code == "models_missing"


async def test_the_first_start_fetches_what_is_missing_and_shows_how_far_it_is(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(models, "defaults", lambda whisper: (NAME,))
    told: list[str] = []
    await models.fetch_defaults(tmp_path, "base", told.append)
    assert models.installed(NAME, tmp_path)
    assert whole(tmp_path)
    assert told[-1].startswith(f"fetching {NAME}: 100 %")
    asked = len(server.asked)
    await models.fetch_defaults(tmp_path, "base", told.append)
    assert len(server.asked) == asked, "the next start fetches nothing"


@pytest.mark.parametrize("trouble", ["lie", "gone"])
async def test_a_first_start_without_them_says_so_once_and_goes_on(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: str
):
    monkeypatch.setattr(models, "defaults", lambda whisper: (NAME, NAME))
    server.lie = trouble == "lie"
    told: list[str] = []
    nowhere = "http://127.0.0.1:9" if trouble == "gone" else None
    await models.fetch_defaults(tmp_path, "base", told.append, url=nowhere)
    said = [line for line in told if not line.startswith("fetching")]
    assert len(said) == 1
    assert not models.installed(NAME, tmp_path)


async def test_a_first_start_that_is_stopped_stops_the_download(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(models, "defaults", lambda whisper: (NAME,))
    begun, go_on = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def tell(step: str) -> None:
        loop.call_soon_threadsafe(begun.set)
        go_on.wait(60)

    fetching = asyncio.create_task(models.fetch_defaults(tmp_path, "base", tell))
    await asyncio.wait_for(begun.wait(), 30)
    fetching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await fetching
    go_on.set()
    with models._alone(tmp_path, NAME):  # the thread has let go of it
        assert not models.installed(NAME, tmp_path)
