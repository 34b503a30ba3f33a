"""OpenAI's transcription protocol, spoken over HTTP with a server of the test, through the real SDK."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from email import message_from_bytes
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import pytest
from ovos_plugin_manager.utils.audio import AudioData

from agentvoicebox.config.errors import AvbError, BadInput, TooLarge, Unavailable
from agentvoicebox.plugins.openai_stt import OpenAISTT

KEY = "a key that nobody else knows"
AUDIO = AudioData(bytes(range(250)) * 128, 16_000, 2)


class Service(ThreadingHTTPServer):
    """Answers with `body` and `status`; `hang` and `cut` make it worse."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.status, self.body, self.hang, self.cut = 200, b"", False, False
        self.paths: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.forms: list[dict[str, bytes]] = []
        self.over = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def says(self, found: Any) -> None:
        self.body = json.dumps(found).encode()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is part of the tests."""


class Handler(BaseHTTPRequestHandler):
    server: Service
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        server = self.server
        body = self.rfile.read(int(self.headers["Content-Length"]))
        server.paths.append(self.path)
        server.headers.append({name.lower(): value for name, value in self.headers.items()})
        server.forms.append(fields(self.headers["Content-Type"], body))
        if server.hang:
            server.over.wait()
            self.close_connection = True
            return
        self.send_response(server.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(server.body) + 1000 * server.cut))
        self.end_headers()
        self.wfile.write(server.body)
        self.close_connection = server.cut

    def log_message(self, *args: object) -> None:
        """Quiet."""


def fields(kind: str, body: bytes) -> dict[str, bytes]:
    """The parts of a form, by name."""
    form = message_from_bytes(f"Content-Type: {kind}\r\n\r\n".encode() + body)
    found = {}
    for part in form.get_payload():
        name = part.get_param("name", header="content-disposition")  # type: ignore[union-attr]
        found[str(name)] = part.get_payload(decode=True)  # type: ignore[union-attr]
    return found  # type: ignore[return-value]


@pytest.fixture
def service() -> Iterator[Service]:
    with Service() as made:
        made.says({"text": "What time is it?"})
        threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True).start()
        yield made
        made.over.set()
        made.shutdown()


@pytest.fixture
def ear(service: Service) -> Iterator[OpenAISTT]:
    made = OpenAISTT({"key": KEY, "url": service.url, "model": "whisper-1"})
    yield made
    made.shutdown()


def error_of(ear: OpenAISTT) -> AvbError:
    with pytest.raises(AvbError) as caught:
        ear.transcribe(AUDIO, "en-US")
    assert KEY not in str(caught.value)
    return caught.value


def test_an_utterance_is_a_form_with_a_wav_file(service: Service, ear: OpenAISTT) -> None:
    assert ear.transcribe(AUDIO, "en-US") == [("What time is it?", 1.0)]
    assert service.paths == ["/v1/audio/transcriptions"]
    assert service.headers[0]["authorization"] == f"Bearer {KEY}"
    [form] = service.forms
    assert form["file"].startswith(b"RIFF")
    assert form["file"].endswith(AUDIO.frame_data)
    assert {name: value for name, value in form.items() if name != "file"} == {
        "model": b"whisper-1", "response_format": b"verbose_json", "language": b"en",
    }  # fmt: skip


def test_the_account_of_whoever_started_the_node_is_not_named(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_ORG_ID", "org-of-the-operator")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "project-of-the-operator")
    monkeypatch.setenv("OPENAI_API_KEY", "key-of-the-operator")
    ear = OpenAISTT({"url": service.url})
    assert ear.execute(AUDIO, "en-US") == "What time is it?"
    ear.shutdown()
    assert "operator" not in str(service.headers)


def test_whisper_tells_the_language_and_how_sure_it_is(service: Service, ear: OpenAISTT) -> None:
    service.says(
        {"text": " Guten Tag ", "language": "german", "segments": [{"avg_logprob": -0.1}, {"avg_logprob": -0.3}]}
    )
    text, confidence, language = ear.hear(AUDIO.frame_data, 16_000, "auto")
    assert (text, language) == ("Guten Tag", "de")
    assert confidence == pytest.approx(math.exp(-0.2))
    assert "language" not in service.forms[0]


def test_newer_models_are_asked_for_what_they_can_tell(service: Service) -> None:
    service.says({"text": "Bonjour", "logprobs": [{"token": "Bonjour", "logprob": -0.5}]})
    ear = OpenAISTT({"key": KEY, "url": service.url, "model": "gpt-4o-transcribe"})
    text, confidence, language = ear.hear(AUDIO.frame_data, 16_000, "fr-FR")
    assert (text, language) == ("Bonjour", "fr")
    assert confidence == pytest.approx(math.exp(-0.5))
    assert service.forms[0]["response_format"] == b"json"
    assert service.forms[0]["include[]"] == b"logprobs"
    ear.shutdown()
    service.says({"text": "Bonjour", "languages": [{"code": "fr"}]})
    ear = OpenAISTT({"key": KEY, "url": service.url})
    assert ear.hear(AUDIO.frame_data, 16_000, "auto") == ("Bonjour", None, "fr")
    assert service.forms[1]["model"] == b"gpt-transcribe"
    ear.shutdown()


def test_a_batch_holds_what_each_job_came_to(service: Service, ear: OpenAISTT) -> None:
    jobs = [SimpleNamespace(pcm16k=AUDIO.frame_data, language="en-US", tentative=False)]
    assert ear.transcribe_batch(jobs) == [("What time is it?", None, "en")]
    service.status = 401
    [error] = ear.transcribe_batch(jobs)
    assert isinstance(error, Unavailable)
    assert error.code == "engine_refused"


@pytest.mark.parametrize(
    ("status", "kind", "code"),
    [
        (400, BadInput, "engine_rejects_input"),
        (401, Unavailable, "engine_refused"),
        (403, Unavailable, "engine_refused"),
        (404, Unavailable, "engine_refused"),
        (413, TooLarge, "payload_too_large"),
        (422, BadInput, "engine_rejects_input"),
        (429, Unavailable, "engine_overloaded"),
        (500, Unavailable, "engine_failed"),
        (503, Unavailable, "engine_failed"),
    ],
)
def test_what_goes_wrong_has_a_name_and_is_not_tried_again_here(
    service: Service, ear: OpenAISTT, status: int, kind: type[AvbError], code: str
) -> None:
    service.status = status
    service.says({"error": {"message": "what was said"}})
    error = error_of(ear)
    assert (type(error), error.code) == (kind, code)
    assert "what was said" not in error.message
    assert len(service.paths) == 1


@pytest.mark.parametrize("body", [b"<html></html>", b"", b"[]", b"null", b'{"text": 7}', b"\xff\xfe", b"[" * 100_000])
def test_garbage_is_no_transcript(service: Service, ear: OpenAISTT, body: bytes) -> None:
    service.body = body
    assert error_of(ear).code == "engine_garbage"


@pytest.mark.parametrize(
    "found",
    [
        {"text": "stop", "segments": "none"},
        {"text": "stop", "segments": [{"avg_logprob": "low"}, 3, {"avg_logprob": 2}]},
        {"text": "stop", "language": "klingon", "logprobs": []},
    ],
)
def test_what_is_odd_beside_the_text_is_left_out(service: Service, ear: OpenAISTT, found: Any) -> None:
    service.says(found)
    assert ear.hear(AUDIO.frame_data, 16_000, "en-US") == ("stop", None, "en")


def test_a_connection_that_ends_within_the_answer(service: Service, ear: OpenAISTT) -> None:
    service.cut = True
    assert error_of(ear).code == "engine_broke_off"


def test_a_service_that_hangs(service: Service) -> None:
    service.hang = True
    ear = OpenAISTT({"key": KEY, "url": service.url, "timeout": 0.2})
    assert error_of(ear).code == "engine_timeout"
    ear.timeout = 30.0  # what is to be closed has its time
    ear.shutdown()


def test_no_server_at_all() -> None:
    with Service() as gone:
        url = gone.url
    ear = OpenAISTT({"key": KEY, "url": url})
    assert error_of(ear).code == "engine_unreachable"
    ear.shutdown()
