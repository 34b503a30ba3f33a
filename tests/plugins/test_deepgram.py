"""Deepgram's protocol, spoken over HTTP with a server of the test."""

from __future__ import annotations

import asyncio
import json
import threading
import wave
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from ovos_plugin_manager.utils.audio import AudioData

from agentvoicebox.config.errors import AvbError, BadInput, TooLarge, Unavailable
from agentvoicebox.plugins.deepgram import DeepgramSTT, deepgram_tag
from agentvoicebox.plugins.pool import EngineSpec, Pool

KEY = "a key that nobody else knows"
AUDIO = AudioData(bytes(range(250)) * 128, 16_000, 2)


class Service(ThreadingHTTPServer):
    """Answers like Deepgram, or like `status` and `body` say; `hang` and `cut` make it worse."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.status, self.body, self.hang, self.cut, self.drip = 200, b"", False, False, False
        self.asked: list[tuple[str, dict[str, list[str]], str | None, bytes]] = []
        self.begun, self.over = threading.Event(), threading.Event()
        self.left = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def says(self, found: Any) -> None:
        self.body = json.dumps(found).encode()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is part of the tests."""


class Handler(BaseHTTPRequestHandler):
    server: Service
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        url, server = urlsplit(self.path), self.server
        body = self.rfile.read(int(self.headers["Content-Length"]))
        server.asked.append((url.path, parse_qs(url.query), self.headers["Authorization"], body))
        server.begun.set()
        if server.hang:
            if not self.connection.recv(1):  # until the client hangs up
                server.left.set()
            self.close_connection = True
            return
        self.send_response(server.status)
        self.send_header("Content-Length", str(len(server.body) + 1000 * (server.cut or server.drip)))
        self.end_headers()
        self.wfile.write(server.body)
        while server.drip and not server.over.wait(0.02):
            self.wfile.write(b" ")
        self.close_connection = server.cut or server.drip

    def log_message(self, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def service() -> Iterator[Service]:
    with Service() as made:
        made.says(heard("What time is it?"))
        threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True).start()
        yield made
        made.over.set()
        made.shutdown()


@pytest.fixture
def ear(service: Service) -> Iterator[DeepgramSTT]:
    made = DeepgramSTT({"key": KEY, "url": f"{service.url}/"})
    yield made
    made.shutdown()


def heard(text: str, confidence: Any = 0.93, **channel: Any) -> Any:
    """A whole answer, as the reference of the service describes it."""
    best = {"transcript": text, "confidence": confidence, "words": []}
    return {"metadata": {"channels": 1}, "results": {"channels": [{"alternatives": [best], **channel}]}}


def error_of(ear: DeepgramSTT) -> AvbError:
    with pytest.raises(AvbError) as caught:
        ear.transcribe(AUDIO, "en-US")
    assert KEY not in str(caught.value)
    return caught.value


def test_an_utterance_is_one_post_of_a_wav_file(service: Service, ear: DeepgramSTT) -> None:
    assert ear.transcribe(AUDIO, "en-US") == [("What time is it?", 0.93)]
    assert ear.execute(AUDIO, "de-DE") == "What time is it?"
    (path, query, authorization, body), (_, german, _, _) = service.asked
    assert (path, authorization) == ("/v1/listen", f"Token {KEY}")
    assert query == {"model": ["nova-3"], "smart_format": ["true"], "language": ["en-US"]}
    assert german["language"] == ["de"]
    with wave.open(BytesIO(body)) as wav:
        assert (wav.getframerate(), wav.getnchannels(), wav.getsampwidth()) == (16_000, 1, 2)
        assert wav.readframes(wav.getnframes()) == AUDIO.frame_data


def test_the_language_is_detected_where_none_is_given(service: Service, ear: DeepgramSTT) -> None:
    service.says(heard("Wie spät ist es?", detected_language="de", language_confidence=0.99))
    assert ear.hear(AUDIO.frame_data, 16_000, "auto") == ("Wie spät ist es?", 0.93, "de")
    _, query, _, _ = service.asked[0]
    assert query["detect_language"] == ["true"]
    assert "language" not in query


def test_silence_is_an_empty_text(service: Service, ear: DeepgramSTT) -> None:
    service.says(heard("", 0))
    assert ear.hear(bytes(32_000), 16_000, "en-US") == ("", 0.0, "en-US")


@pytest.mark.parametrize(
    ("status", "kind", "code"),
    [
        (400, BadInput, "engine_rejects_input"),
        (401, Unavailable, "engine_refused"),
        (402, Unavailable, "engine_refused"),
        (403, Unavailable, "engine_refused"),
        (404, Unavailable, "engine_refused"),
        (413, TooLarge, "payload_too_large"),
        (429, Unavailable, "engine_overloaded"),
        (302, Unavailable, "engine_refused"),
        (500, Unavailable, "engine_failed"),
        (503, Unavailable, "engine_failed"),
        (504, Unavailable, "engine_timeout"),
    ],
)
def test_what_goes_wrong_has_a_name(
    service: Service, ear: DeepgramSTT, status: int, kind: type[AvbError], code: str
) -> None:
    service.status, service.body = status, b'{"err_code": "X", "err_msg": "what was said"}'
    error = error_of(ear)
    assert (type(error), error.code) == (kind, code)
    assert "what was said" not in error.message
    service.status = 200
    service.says(heard("stop"))
    assert ear.execute(AUDIO, "en-US") == "stop"


@pytest.mark.parametrize(
    "body",
    [
        b"<html>it works</html>", b"", b"[]", b"null", b'{"results": {}}', b'{"results": {"channels": []}}',
        b'{"results": {"channels": [{"alternatives": [{"transcript": 7}]}]}}', b"\xff\xfe", b"[" * 100_000,
    ],
)  # fmt: skip
def test_garbage_is_no_transcript(service: Service, ear: DeepgramSTT, body: bytes) -> None:
    service.body = body
    assert error_of(ear).code == "engine_garbage"


@pytest.mark.parametrize("confidence", ["high", None, float("nan"), True])
def test_a_confidence_that_is_none_is_none(service: Service, ear: DeepgramSTT, confidence: Any) -> None:
    service.says(heard("stop", confidence))
    assert ear.hear(AUDIO.frame_data, 16_000, "en-US") == ("stop", None, "en-US")


def test_an_endless_answer_is_given_up(service: Service, ear: DeepgramSTT) -> None:
    service.body = b" " * 9_000_000
    assert error_of(ear).code == "engine_garbage"


def test_a_connection_that_ends_within_the_answer(service: Service, ear: DeepgramSTT) -> None:
    service.cut = True
    assert error_of(ear).code == "engine_broke_off"


@pytest.mark.parametrize("how", ["hang", "drip"])
def test_a_service_that_hangs_or_drips_has_so_much_time_altogether(service: Service, how: str) -> None:
    setattr(service, how, True)
    ear = DeepgramSTT({"key": KEY, "url": service.url, "timeout": 0.2})
    assert error_of(ear).code == "engine_timeout"
    ear.timeout = 30.0  # what is to be closed has its time
    ear.shutdown()


def test_no_server_at_all(service: Service) -> None:
    with Service() as gone:
        url = gone.url
    ear = DeepgramSTT({"key": KEY, "url": url})
    assert error_of(ear).code == "engine_unreachable"
    ear.shutdown()


def test_without_a_key_there_is_no_such_ear() -> None:
    with pytest.raises(Unavailable) as caught:
        DeepgramSTT({})
    assert caught.value.code == "engine_refused"


@pytest.mark.parametrize(
    ("tag", "wanted"),
    [("en-US", "en-US"), ("en-ZA", "en"), ("pt_BR", "pt-BR"), ("DE", "de"), ("de-DE", "de"), ("zh-Hant", "zh-Hant")],
)
def test_a_region_is_named_where_it_is_known(tag: str, wanted: str) -> None:
    assert deepgram_tag(tag) == wanted


async def test_in_a_pool_the_next_ear_hears_what_this_one_does_not(service: Service) -> None:
    with Service() as gone:
        away = gone.url
    pool = Pool()
    specs = [
        EngineSpec("stt", "agentvoicebox-stt-deepgram", (("key", KEY), ("url", url))) for url in (away, service.url)
    ]
    transcript = await pool.transcribe(specs, AUDIO.frame_data, 16_000, "en-US")
    assert (transcript.text, transcript.confidence, transcript.language) == ("What time is it?", 0.93, "en-US")
    assert len(service.asked) == 1
    assert KEY not in repr(specs)
    await asyncio.to_thread(pool.close)


async def test_who_is_cancelled_hangs_up(service: Service) -> None:
    service.hang = True
    pool = Pool()
    spec = EngineSpec("stt", "agentvoicebox-stt-deepgram", (("key", KEY), ("url", service.url)))
    job = asyncio.create_task(pool.transcribe(spec, AUDIO.frame_data, 16_000, "en-US"))
    assert await asyncio.to_thread(service.begun.wait, 30)
    job.cancel()
    with pytest.raises(asyncio.CancelledError):
        await job
    assert await asyncio.to_thread(service.left.wait, 30)
    await asyncio.to_thread(pool.close)
