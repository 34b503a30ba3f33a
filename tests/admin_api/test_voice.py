"""How a tenant's assistant sounds, over HTTP (API-081..084)."""

from __future__ import annotations

import asyncio
import io
import wave
from collections.abc import AsyncGenerator
from typing import Any, ClassVar

import av
import httpx
import pytest

from agentvoicebox.admin_api import speech
from agentvoicebox.config.errors import Unavailable
from agentvoicebox.plugins.pool import Speech, Voice

VOICE = "/api/v2/voice"
CONFIG = f"{VOICE}/config"
TTS = f"{VOICE}/tts"


def samples(wav: bytes) -> tuple[int, bytes]:
    """Rate and audio of a WAV file that may not say how long it is."""
    with wave.open(io.BytesIO(wav)) as file:
        assert (file.getnchannels(), file.getsampwidth()) == (1, 2)
        return file.getframerate(), file.readframes(len(wav))


async def test_the_choices_are_read_and_changed(client: Any):
    before = (await client.http.get(CONFIG)).json()
    assert before == {
        "voice": "auto",
        "speed": 1.0,
        "language": "en-US",
        "wake_word": "hey mycroft",
        "persona_name": "Assistant",
        "disabled_skills": [],
        "stt": "auto",
        "stt_fallbacks": [],
        "tts": "auto",
        "tts_fallbacks": [],
    }
    wanted = {
        "voice": "af_sarah",
        "speed": 1.5,
        "wake_word": "okay nabu",
        "disabled_skills": ["skill-date-time.openvoiceos"],
        "tts_fallbacks": ["agentvoicebox-tts-flite"],
    }
    reply = await client.http.patch(CONFIG, json=wanted)
    assert reply.json() == (await client.http.get(CONFIG)).json() == {**before, **wanted}
    assert (await client.http.patch(CONFIG, json={})).json() == {**before, **wanted}
    lines = (await client.http.get("/api/v2/audit?resource_type=voice_config")).json()
    assert lines["total"] == 1


WRONG: list[tuple[str, Any]] = [
    ("voice", "../x"),
    ("voice", None),
    ("speed", 0.4),
    ("speed", "1"),
    ("language", "english!"),
    ("wake_word", "x"),
    ("persona_name", "a\nb"),
    ("disabled_skills", ["../etc"]),
    ("tts", ""),
    ("tts_fallbacks", ["a"] * 6),
    ("llm_url", "https://example.com"),
    ("unknown", 1),
]


async def test_what_makes_no_sense_is_refused_by_name(client: Any):
    for field, value in WRONG:
        reply = await client.http.patch(CONFIG, json={field: value})
        assert (reply.status_code, reply.json()["error"]) == (400, "validation_error"), field
        assert list(reply.json()["details"]) == [field]


async def test_only_what_a_device_can_hear_is_its_wake_word(client: Any):
    before = (await client.http.get(CONFIG)).json()
    for changes, code in (
        ({"wake_word": "hey xqzzkw"}, "phrase_unpronounceable"),
        ({"wake_word": "hi"}, "phrase_too_short"),
        ({"wake_word": "?!"}, "phrase_invalid"),
        ({"wake_word": "alexa", "language": "de-DE"}, "phrase_language"),
    ):
        reply = await client.http.patch(CONFIG, json=changes)
        assert (reply.status_code, reply.json()["error"]) == (400, code)
        assert list(reply.json()["details"]) == ["wake_word"]
    assert (await client.http.get(CONFIG)).json() == before
    for changes in ({"wake_word": "  Hey Computer! "}, {"wake_word": "okay nabu", "language": "de-DE"}):
        assert (await client.http.patch(CONFIG, json=changes)).status_code == 200
    assert (await client.http.get(CONFIG)).json()["wake_word"] == "okay nabu"


async def test_scopes(client: Any, new_client: Any):
    speaker = await new_client("realtime", tenant=client.tenant)
    nobody = await new_client("billing", tenant=client.tenant)
    assert (await speaker.http.get(CONFIG)).status_code == 200
    assert (await speaker.http.patch(CONFIG, json={"speed": 2})).status_code == 403
    assert (await (await new_client("usage")).http.get(f"{VOICE}/usage")).status_code == 200
    for method, path, body in (
        ("GET", CONFIG, None),
        ("GET", f"{VOICE}/voices", None),
        ("GET", f"{VOICE}/metrics", None),
        ("GET", f"{VOICE}/voices/slt/preview", None),
        ("POST", TTS, {"text": "Hello"}),
        ("GET", f"{VOICE}/usage", None),
    ):
        assert (await nobody.http.request(method, path, json=body)).status_code == 403, path


async def test_only_engines_that_are_there_can_be_chosen(client: Any):
    for field, value in (("tts", "acme"), ("tts", "whisper"), ("tts_fallbacks", ["auto", "acme"])):
        reply = await client.http.patch(CONFIG, json={field: value})
        assert (reply.status_code, reply.json()["error"], list(reply.json()["details"])) == (
            400,
            "unknown_engine",
            [field],
        )
        assert "agentvoicebox-tts-kokoro" in reply.json()["message"]
    assert (await client.http.patch(CONFIG, json={"tts": "agentvoicebox-tts-flite"})).status_code == 200


async def test_tts_02_a_voice_is_heard_in_its_own_language(client: Any, service: Any, speaking: Any):
    class Foreign(Slow):
        said: ClassVar[list[str]] = []

        async def voices(self) -> list[Voice]:
            return [Voice("hf_alpha", "hi-IN"), Voice("jf_alpha", "ja-JP"), Voice("zf_xiaobei", "zh-CN")]

        async def speak(self, text: str, settings: Any, tenant: Any) -> Speech:
            self.said.append(text)
            return Speech(bytes(3_200), 16_000)

    service.app.state.engines = Foreign(speaking.engines)
    for name in ("hf_alpha", "jf_alpha", "zf_xiaobei"):
        assert (await client.http.get(f"{VOICE}/voices/{name}/preview")).status_code == 200
    assert [text.isascii() for text in Foreign.said] == [False] * 3
    assert len(set(Foreign.said)) == 3


async def test_how_well_it_goes(client: Any, operator: httpx.AsyncClient, speaking: Any):
    await client.http.post(TTS, json={"text": "How well does it go?"})
    (told,) = (await client.http.get(f"{VOICE}/metrics")).json()["items"]
    assert told["engine"] == "agentvoicebox-tts-flite"
    assert told["average_seconds"] > 0
    assert told["average_audio_seconds"] > 0
    assert 0 <= told["failure_rate"] < 1
    counts = ("requests", "failures", "waiting", "working", "loaded", "memory", "open_circuits")
    assert [told[name] for name in counts] == [None] * 7, "which would tell of other tenants"
    (told,) = (await operator.get(f"{VOICE}/metrics", headers={"X-Tenant-ID": str(client.tenant)})).json()["items"]
    assert told["requests"] >= 1
    assert (told["waiting"], told["working"], told["loaded"], told["open_circuits"]) == (0, 0, 1, 0)


async def test_choices_of_two_tenants_are_two(client: Any, new_client: Any):
    other = await new_client("admin")
    await client.http.patch(CONFIG, json={"voice": "mine"})
    assert (await other.http.get(CONFIG)).json()["voice"] == "auto"
    reply = await other.http.patch(CONFIG, json={"voice": "x"}, headers={"X-Tenant-ID": str(client.tenant)})
    assert (reply.status_code, reply.json()["error"]) == (403, "permission_denied")


async def test_without_engines_it_says_so(client: Any):
    for reply in (
        await client.http.get(f"{VOICE}/voices"),
        await client.http.get(f"{VOICE}/voices/slt/preview"),
        await client.http.get(f"{VOICE}/metrics"),
        await client.http.post(TTS, json={"text": "Hello"}),
    ):
        assert (reply.status_code, reply.json()["error"]) == (503, "no_engines")


async def test_the_voices_there_are(client: Any, speaking: Any):
    listed = (await client.http.get(f"{VOICE}/voices")).json()["items"]
    assert "slt" in [each["name"] for each in listed]
    assert all(set(each) == {"name", "language", "gender"} for each in listed)


async def test_tts_02_each_can_be_heard(client: Any, speaking: Any, used: Any):
    sizes = {}
    for speed in (1, 2):
        reply = await client.http.get(f"{VOICE}/voices/slt/preview?speed={speed}")
        assert (reply.status_code, reply.headers["content-type"]) == (200, "audio/wav")
        rate, pcm = samples(reply.content)
        sizes[speed] = len(pcm) / 2 / rate
    assert sizes[1] > 1.5 * sizes[2] > 1
    assert await used(client) == {"tts_audio_seconds": pytest.approx(sum(sizes.values()), abs=1e-5)}
    assert (await client.http.get(f"{VOICE}/voices/slt/preview?speed=3")).status_code == 400
    reply = await client.http.get(f"{VOICE}/voices/nobody/preview")
    assert (reply.status_code, list(reply.json()["details"])) == (404, ["name"])


async def test_speech_is_what_was_said_and_is_metered(client: Any, new_client: Any, speaking: Any, used: Any):
    speaker = await new_client("realtime", tenant=client.tenant)
    reply = await speaker.http.post(TTS, json={"text": "Hello there. How are you?"})
    assert (reply.status_code, reply.headers["content-type"]) == (200, "audio/wav")
    rate, pcm = samples(reply.content)
    assert (reply.headers["x-sample-rate"], len(pcm) > rate) == (str(rate), True)
    assert await used(client) == {"tts_audio_seconds": pytest.approx(len(pcm) / 2 / rate, abs=1e-5)}
    with av.open(io.BytesIO(reply.content)) as file:
        assert sum(frame.samples for frame in file.decode(audio=0)) == len(pcm) // 2
    bare = await speaker.http.post(TTS, json={"text": "Hello there. How are you?", "format": "pcm"})
    assert (bare.headers["content-type"], bare.headers["x-sample-rate"]) == ("audio/pcm", str(rate))
    assert bare.content == pcm
    fast = await speaker.http.post(TTS, json={"text": "Hello there. How are you?", "speed": 2, "voice": "slt"})
    assert len(fast.content) < 0.75 * len(pcm)


@pytest.mark.parametrize("text", ["", "...", "?!", " \n "])
async def test_what_says_nothing_is_silence(client: Any, speaking: Any, text: str):
    reply = await client.http.post(TTS, json={"text": text})
    assert reply.status_code == 200, reply.text
    rate, pcm = samples(reply.content)
    assert rate > 0
    assert not any(pcm)


WRONG_SPEECH: list[tuple[dict[str, Any], str]] = [
    ({}, "text"),
    ({"text": None}, "text"),
    ({"text": "x" * 8_001}, "text"),
    ({"text": "x", "speed": 3}, "speed"),
    ({"text": "x", "voice": "a b"}, "voice"),
    ({"text": "x", "language": "!"}, "language"),
    ({"text": "x", "format": "mp3"}, "format"),
    ({"text": "x", "tts": "other"}, "tts"),
]


async def test_speech_is_asked_for_properly(client: Any, speaking: Any):
    for wrong, field in WRONG_SPEECH:
        reply = await client.http.post(TTS, json=wrong)
        assert (reply.status_code, list(reply.json()["details"])) == (400, [field])


async def test_a_megabyte_of_text_is_too_large(client: Any, speaking: Any):
    reply = await client.http.post(TTS, json={"text": "x" * 1_000_000})
    assert (reply.status_code, reply.json()["error"]) == (413, "payload_too_large")


async def test_a_tenant_without_voice_has_none(client: Any, speaking: Any):
    await client.http.patch("/api/v2/tenants/me/settings", json={"default_voice_provider": "disabled"})
    for reply in (
        await client.http.post(TTS, json={"text": "Hello"}),
        await client.http.get(f"{VOICE}/voices/slt/preview"),
    ):
        assert (reply.status_code, reply.json()["error"]) == (403, "voice_disabled")


class Slow:
    """Stands before the engines: a second of speech, then it waits, and does what it is told to at the end."""

    def __init__(self, engines: Any, error: Exception | None = None) -> None:
        self._engines = engines
        self._error = error
        self.go_on, self.closed = asyncio.Event(), asyncio.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engines, name)

    async def stream(self, text: str, settings: Any, tenant: Any) -> AsyncGenerator[Speech]:
        try:
            yield Speech(bytes(32_000), 16_000)
            await self.go_on.wait()
            if self._error is not None:
                raise self._error
            yield Speech(bytes(16_000), 16_000)
        finally:
            self.closed.set()


async def test_speech_is_sent_as_it_is_made(client: Any, service: Any, speaking: Any, used: Any):
    slow = service.app.state.engines = Slow(speaking.engines)
    async with client.http.stream("POST", TTS, json={"text": "Hello", "format": "pcm"}) as reply:
        pieces = reply.aiter_raw()
        assert len(await anext(pieces)) == 32_000
        assert await used(client) == {}
        slow.go_on.set()
        assert [len(piece) async for piece in pieces] == [16_000]
    assert await used(client) == {"tts_audio_seconds": 1.5}


async def test_who_hangs_up_ends_the_work_and_pays_for_what_was_done(
    client: Any, service: Any, speaking: Any, used: Any
):
    slow = service.app.state.engines = Slow(speaking.engines)
    async with (
        httpx.AsyncClient(base_url=service.url, headers=client.http.headers, timeout=60) as caller,
        caller.stream("POST", TTS, json={"text": "Hello", "format": "pcm"}) as reply,
    ):
        assert len(await anext(reply.aiter_raw())) == 32_000
    async with asyncio.timeout(30):
        await slow.closed.wait()
        while not await used(client):
            await asyncio.sleep(0.01)
    assert await used(client) == {"tts_audio_seconds": 1.0}


async def test_the_work_of_a_client_that_is_gone_has_ended_when_the_answer_has():
    """And not only when somebody collects what is left of it."""
    closed = asyncio.Event()

    async def speaking_on() -> AsyncGenerator[Speech]:
        try:
            while True:
                yield Speech(bytes(2), 16_000)
        finally:
            closed.set()

    full = asyncio.Event()

    async def receive() -> dict[str, Any]:
        await full.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if message.get("body"):
            full.set()
            await asyncio.Event().wait()

    rest = speaking_on()
    answer = speech.Streamed(await anext(rest), rest, wav=True)
    await answer({"type": "http", "asgi": {"spec_version": "2.3"}}, receive, send)
    assert closed.is_set()


async def test_what_breaks_off_does_not_look_whole(client: Any, service: Any, speaking: Any, used: Any):
    slow = service.app.state.engines = Slow(speaking.engines, Unavailable("gone", code="engine_failed"))
    slow.go_on.set()
    with pytest.raises(httpx.RemoteProtocolError):
        await client.http.post(TTS, json={"text": "Hello"})
    assert await used(client) == {"tts_audio_seconds": 1.0}


async def test_what_fails_at_once_is_told(client: Any, service: Any, speaking: Any, used: Any):
    class Broken(Slow):
        async def stream(self, text: str, settings: Any, tenant: Any) -> AsyncGenerator[Speech]:
            raise Unavailable("The engine failed; try again.", code="engine_failed")
            yield

    service.app.state.engines = Broken(speaking.engines)
    reply = await client.http.post(TTS, json={"text": "Hello"})
    assert (reply.status_code, reply.json()["error"]) == (503, "engine_failed")
    assert await used(client) == {}


async def test_usage_is_told_in_minutes(client: Any, speaking: Any):
    rate, pcm = samples((await client.http.post(TTS, json={"text": "Hello there."})).content)
    told = (await client.http.get(f"{VOICE}/usage?period=7d")).json()
    assert told["tts_minutes"] == pytest.approx(len(pcm) / 2 / rate / 60, abs=1e-6)
    assert (told["stt_minutes"], told["llm_input_tokens"], told["llm_output_tokens"]) == (0, 0, 0)
    assert (await client.http.get(f"{VOICE}/usage?period=1y")).status_code == 400
