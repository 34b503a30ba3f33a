"""How a tenant's assistant listens, over HTTP (API-085, API-086, API-196)."""

from __future__ import annotations

import io
import math
import struct
import threading
import wave
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
import pytest

from agentvoicebox.config.errors import Unavailable
from agentvoicebox.plugins import audio, models
from agentvoicebox.plugins.pool import EngineMetrics, Transcript
from agentvoicebox.tenancy.models import PLATFORM
from agentvoicebox.tenancy.voices import VoiceConfig

STT = "/api/v2/stt"
CONFIG = f"{STT}/config"
DOORS = (f"{STT}/transcribe", f"{STT}/test")


def wav(pcm: bytes, rate: int = 16_000) -> bytes:
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes(pcm)
    return out.getvalue()


def encoded(pcm: bytes, rate: int, container: str, codec: str) -> bytes:
    """The same as a file of another kind."""
    out = io.BytesIO()
    with av.open(out, "w", format=container) as file:
        stream = file.add_stream(codec, rate=rate)
        frame = av.AudioFrame.from_ndarray(np.frombuffer(pcm, "<i2").reshape(1, -1), format="s16", layout="mono")
        frame.sample_rate = rate
        for made in (frame, None):
            file.mux(stream.encode(made))
    return out.getvalue()


def tone(seconds: float, rate: int = 16_000) -> bytes:
    return b"".join(struct.pack("<h", round(9_000 * math.sin(n / 8))) for n in range(round(seconds * rate)))


async def post(client: Any, body: bytes, door: str = DOORS[0], kind: str = "audio/wav", **query: str) -> httpx.Response:
    reply: httpx.Response = await client.http.post(door, content=body, headers={"content-type": kind}, params=query)
    return reply


@pytest.fixture(scope="module")
async def question(offline: Any) -> Any:
    """Somebody asks what time it is."""
    begin = offline.engines.begin(VoiceConfig(), "base", "slt")
    return await offline.engines.speak("What time is it?", replace(begin, voice="slt"), PLATFORM)


async def test_the_choices_are_read_and_changed(client: Any):
    before = (await client.http.get(CONFIG)).json()
    assert before == {
        "model": "auto",
        "language": "",
        "vad_enabled": True,
        "engine": "auto",
        "fallbacks": [],
        "compute": None,
    }
    wanted = {
        "model": "large-v3",
        "language": "auto",
        "vad_enabled": False,
        "engine": "deepgram",
        "fallbacks": ["openai"],
    }
    assert (await client.http.patch(CONFIG, json=wanted)).json() == {**before, **wanted}
    assert (await client.http.patch(CONFIG, json={"language": "de-AT"})).json()["language"] == "de-AT"
    assert (await client.http.get("/api/v2/voice/config")).json()["stt"] == "deepgram"
    lines = (await client.http.get("/api/v2/audit?resource_type=voice_config")).json()
    assert lines["total"] == 2


WRONG: list[tuple[str, Any]] = [
    ("model", "huge"),
    ("language", "english!"),
    ("vad_enabled", 1),
    ("engine", "a b"),
    ("fallbacks", ["../x"]),
    ("fallbacks", ["a"] * 6),
    ("compute", {}),
]


async def test_what_makes_no_sense_is_refused_by_name(client: Any):
    for field, value in WRONG:
        reply = await client.http.patch(CONFIG, json={field: value})
        assert (reply.status_code, list(reply.json()["details"])) == (400, [field])


async def test_only_engines_that_are_there_can_be_chosen(client: Any):
    for path, field, value in (
        (CONFIG, "engine", "acme-merger-with-initech"),
        (CONFIG, "fallbacks", ["auto", "agentvoicebox-tts-flite"]),
        ("/api/v2/voice/config", "stt", "acme"),
        ("/api/v2/voice/config", "stt_fallbacks", ["acme"]),
    ):
        reply = await client.http.patch(path, json={field: value})
        assert (reply.status_code, reply.json()["error"], list(reply.json()["details"])) == (
            400,
            "unknown_engine",
            [field],
        )
        for name in ("auto", "whisper", "deepgram", "openai", "agentvoicebox-stt-sphinx"):
            assert name in reply.json()["message"]
    told = {each["name"] for each in (await client.http.get(STT)).json()["engines"]}
    assert {"auto", "whisper", "deepgram", "openai", "agentvoicebox-stt-sphinx"} <= told
    for name in told:
        assert (await client.http.patch(CONFIG, json={"engine": name})).status_code == 200


async def test_a_model_that_is_not_installed_is_refused(client: Any, service: Any, speaking: Any, tmp_path: Path):
    for door in (CONFIG, DOORS[0]):
        if door == CONFIG:
            reply = await client.http.patch(CONFIG, json={"model": "small"})
        else:
            reply = await post(client, wav(tone(0.1)), door, model="small")
        assert (reply.status_code, reply.json()["error"]) == (409, "model_not_installed")
        assert "avb models pull faster-whisper-small" in reply.json()["message"]
        assert "Installed: none" in reply.json()["message"]
    assert (await client.http.get(CONFIG)).json()["model"] == "auto"
    for each in models.available(tmp_path):
        if each.name == "faster-whisper-tiny":
            (tmp_path / each.name).mkdir()
            for file in each.files:
                with (tmp_path / each.name / file.name).open("wb") as out:
                    out.truncate(file.size)
    here = speaking.engines
    service.app.state.engines = replace(here, settings=replace(here.settings, models=tmp_path, engine="auto"))
    assert "Installed: tiny." in (await client.http.patch(CONFIG, json={"model": "small"})).json()["message"]
    for model in ("tiny", "auto"):
        assert (await client.http.patch(CONFIG, json={"model": model})).json()["model"] == model
    listed = (await client.http.get(STT)).json()["models"]
    assert [each["name"] for each in listed if each["installed"]] == ["tiny"]
    # What the operator has yet to fetch may be named as the default of all sessions.
    settings = {"default_stt_model": "large-v3"}
    assert (await client.http.patch("/api/v2/tenants/me/settings", json=settings)).status_code == 200
    reply = await client.http.patch("/api/v2/tenants/me/settings", json={"default_stt_model": "whisper-1"})
    assert (reply.status_code, list(reply.json()["details"])) == (400, ["default_stt_model"])


async def test_scopes(client: Any, new_client: Any, speaking: Any):
    speaker = await new_client("realtime", tenant=client.tenant)
    nobody = await new_client("billing", tenant=client.tenant)
    for path in (STT, CONFIG, f"{STT}/metrics"):
        assert (await speaker.http.get(path)).status_code == 200
        assert (await nobody.http.get(path)).status_code == 403
    assert (await speaker.http.patch(CONFIG, json={"model": "tiny"})).status_code == 403
    assert (await post(speaker, wav(bytes(3_200)))).status_code == 200
    assert (await post(speaker, wav(bytes(3_200)), DOORS[1])).status_code == 403
    for door in DOORS:
        assert (await post(nobody, b"", door)).status_code == 403


async def test_stt_05_models_are_shown_with_their_trade_offs(client: Any, speaking: Any):
    told = (await client.http.get(STT)).json()
    assert [each["name"] for each in told["models"]] == ["tiny", "base", "small", "medium", "large-v2", "large-v3"]
    errors, sizes = ([each[name] for each in told["models"]] for name in ("word_errors", "size"))
    assert errors == sorted(errors, reverse=True)
    assert sizes[0] < sizes[-1]
    assert not any(each["installed"] for each in told["models"])
    ready = {each["name"]: each["ready"] for each in told["engines"]}
    assert (ready["auto"], ready["agentvoicebox-stt-sphinx"], ready["agentvoicebox-stt-deepgram"]) == (
        True,
        True,
        False,
    )
    await client.http.put("/api/v2/llm/credentials/deepgram", json={"api_key": "a key of ours"})
    ready = {each["name"]: each["ready"] for each in (await client.http.get(STT)).json()["engines"]}
    assert (ready["agentvoicebox-stt-deepgram"], ready["deepgram"], ready["openai"]) == (True, True, False)
    assert (await client.http.get(CONFIG)).json()["compute"]["engine"] == "agentvoicebox-stt-sphinx"


async def test_without_engines_it_says_so(client: Any):
    assert not any(each["ready"] for each in (await client.http.get(STT)).json()["engines"])
    for reply in (await post(client, wav(tone(0.1))), await client.http.get(f"{STT}/metrics")):
        assert (reply.status_code, reply.json()["error"]) == (503, "no_engines")


@pytest.mark.parametrize("door", DOORS)
async def test_stt_09_what_is_said_is_understood_and_metered(
    client: Any, speaking: Any, used: Any, question: Any, door: str
):
    reply = await post(client, wav(question.pcm, question.rate), door)
    assert reply.status_code == 200, reply.text
    told = reply.json()
    assert "time" in told["text"]
    assert (told["engine"], told["model"], told["audio_seconds"]) == (
        "agentvoicebox-stt-sphinx",
        "",
        pytest.approx(question.seconds, abs=0.01),
    )
    assert told["segments"] == [
        {"start": 0, "end": pytest.approx(told["audio_seconds"], abs=0.01), "text": told["text"]}
    ]
    assert await used(client) == {"stt_audio_seconds": pytest.approx(told["audio_seconds"], abs=1e-5)}


@pytest.mark.parametrize(
    ("container", "codec", "kind"),
    [("flac", "flac", "audio/flac"), ("mp3", "libmp3lame", "audio/mpeg"), ("ogg", "libopus", "audio/ogg")],
)
async def test_stt_03_files_of_all_kinds(
    client: Any, speaking: Any, question: Any, container: str, codec: str, kind: str
):
    body = encoded(question.pcm, question.rate, container, codec)
    for told in (kind, "application/octet-stream"):
        reply = await post(client, body, kind=told)
        assert "time" in reply.json()["text"]
    # What it is called does not matter: its content decides.
    assert "time" in (await post(client, body, kind="audio/wav")).json()["text"]


@pytest.mark.parametrize("silence", [bytes(32_000), bytes(2), bytes(16_000 * 2 * 30)], ids=["1s", "nothing", "30s"])
async def test_silence_is_no_text(client: Any, speaking: Any, used: Any, silence: bytes):
    reply = await post(client, wav(silence))
    assert (reply.status_code, reply.json()["text"], reply.json()["segments"]) == (200, "", [])
    assert reply.json()["audio_seconds"] == pytest.approx(len(silence) / 32_000, abs=1e-3)


async def test_what_is_no_audio_is_refused(client: Any, speaking: Any, used: Any):
    for body, code in (
        (b"", "audio_empty"),
        (b"RIFF", "audio_unreadable"),
        (b"this is no audio at all" * 100, "audio_unreadable"),
        (wav(tone(0.1))[:20], "audio_unreadable"),
        (b"\x89PNG\r\n\x1a\n" + bytes(500), "audio_unreadable"),
    ):
        for door in DOORS:
            reply = await post(client, body, door)
            assert (reply.status_code, reply.json()["error"]) == (400, code)
    assert await used(client) == {}


async def test_a_file_that_breaks_off_is_heard_as_far_as_it_goes(client: Any, speaking: Any, used: Any, question: Any):
    whole = wav(question.pcm, question.rate)
    reply = await post(client, whole[: len(whole) // 2])
    assert reply.status_code == 200
    assert 0 < reply.json()["audio_seconds"] < question.seconds


async def test_files_are_read_by_threads_of_their_own(client: Any, speaking: Any, monkeypatch: pytest.MonkeyPatch):
    decode, names = audio.decode, []

    def seen(data: bytes, *, longest: float) -> bytes:
        names.append(threading.current_thread().name)
        return decode(data, longest=longest)

    monkeypatch.setattr(audio, "decode", seen)
    for door in DOORS:
        assert (await post(client, wav(tone(0.1)), door)).status_code == 200
    assert [name.startswith("audio-files") for name in names] == [True, True]


async def test_what_is_too_long_is_refused_before_anybody_listens(client: Any, speaking: Any, used: Any):
    long = encoded(bytes(2 * 8_000 * 60 * 11), 8_000, "flac", "flac")
    reply = await post(client, long, kind="audio/flac")
    assert (reply.status_code, reply.json()["error"]) == (413, "audio_too_long")
    assert await used(client) == {}


async def test_what_is_too_large_is_not_even_read(client: Any, speaking: Any):
    for door in DOORS:
        reply = await post(client, bytes(25 * 1024 * 1024 + 1), door)
        assert (reply.status_code, reply.json()["error"]) == (413, "payload_too_large")


async def test_it_is_asked_for_properly(client: Any, speaking: Any):
    for kind in (
        "application/json",
        "multipart/form-data; boundary=x",
        "application/x-www-form-urlencoded",
        "video/mp4",
    ):
        reply = await post(client, wav(tone(0.1)), kind=kind)
        assert (reply.status_code, reply.json()["error"]) == (415, "unsupported_media_type")
    for query in ("language=english!", "language=", "model=huge", "model="):
        there = f"{DOORS[0]}?{query}"
        reply = await client.http.post(there, content=wav(tone(0.1)), headers={"content-type": "audio/wav"})
        assert (reply.status_code, reply.json()["error"]) == (400, "validation_error")


async def test_a_language_that_nobody_knows_is_refused(client: Any, speaking: Any, used: Any, question: Any):
    reply = await post(client, wav(question.pcm, question.rate), language="tlh")
    assert (reply.status_code, reply.json()["error"]) == (400, "unsupported_language")
    assert await used(client) == {}


async def test_a_tenant_without_voice_has_none(client: Any, speaking: Any):
    await client.http.patch("/api/v2/tenants/me/settings", json={"default_voice_provider": "disabled"})
    reply = await post(client, wav(tone(0.1)))
    assert (reply.status_code, reply.json()["error"]) == (403, "voice_disabled")


class Listening:
    """Stands before the engines: says the number of each piece, until it fails."""

    def __init__(self, engines: Any, fails_at: int = 99) -> None:
        self._engines = engines
        self._fails_at = fails_at
        self.heard: list[tuple[float, str]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engines, name)

    async def transcribe(self, pcm: bytes, settings: Any, tenant: Any) -> Transcript:
        self.heard.append((len(pcm) / 32_000, settings.stt_language))
        if len(self.heard) > self._fails_at:
            raise Unavailable("The engine failed; try again.", code="engine_failed")
        return Transcript(str(len(self.heard)), 0.5, len(pcm) / 32_000, "de", "stand-in")


async def test_what_is_long_is_heard_in_pieces(client: Any, service: Any, speaking: Any, used: Any):
    ear = service.app.state.engines = Listening(speaking.engines)
    told = (await post(client, wav(bytes(32_000 * 60)), language="auto")).json()
    assert [language for _, language in ear.heard] == ["auto"] + ["de"] * (len(ear.heard) - 1)
    assert len(ear.heard) >= 3
    assert all(seconds <= 25 for seconds, _ in ear.heard)
    assert told["text"] == " ".join(each["text"] for each in told["segments"])
    assert (told["language"], told["confidence"], told["engine"]) == ("de", pytest.approx(0.5), "stand-in")
    assert [each["start"] for each in told["segments"][1:]] == [each["end"] for each in told["segments"][:-1]]
    assert told["segments"][-1]["end"] == pytest.approx(60)
    assert await used(client) == {"stt_audio_seconds": pytest.approx(60)}


async def test_the_model_that_served_is_told(client: Any, service: Any, speaking: Any):
    class Whispering(Listening):
        async def transcribe(self, pcm: bytes, settings: Any, tenant: Any) -> Transcript:
            return replace(await super().transcribe(pcm, settings, tenant), engine="agentvoicebox-stt-whisper")

    here = speaking.engines
    service.app.state.engines = Whispering(replace(here, settings=replace(here.settings, whisper="small")))
    assert (await post(client, wav(tone(0.1)))).json()["model"] == "small"


async def test_stt_15_noise_is_taken_away_where_that_is_wanted(client: Any, service: Any, speaking: Any, used: Any):
    class Hearing(Listening):
        async def transcribe(self, pcm: bytes, settings: Any, tenant: Any) -> Transcript:
            levels.append(np.frombuffer(pcm, "<i2").astype(float))
            return await super().transcribe(pcm, settings, tenant)

    levels: list[Any] = []
    service.app.state.engines = Hearing(speaking.engines)
    noise = np.random.default_rng(0).standard_normal(48_000) * 100
    noise[16_000:32_000] += np.frombuffer(tone(1), "<i2") / 10
    file = wav(noise.astype("<i2").tobytes())
    for clean in ("false", "true"):
        reply = await post(client, file, clean=clean)
        assert (reply.status_code, reply.json()["audio_seconds"]) == (200, pytest.approx(3))
    plain, clean_ = levels
    assert np.abs(plain - noise).max() < 4
    assert clean_.std() > 2 * plain.std(), "louder"
    assert clean_[4_000:12_000].std() / clean_.std() < 0.7 * plain[4_000:12_000].std() / plain.std(), "with less noise"
    assert (await post(client, file, clean="maybe")).status_code == 400


async def test_what_was_heard_before_a_failure_is_metered(client: Any, service: Any, speaking: Any, used: Any):
    ear = service.app.state.engines = Listening(speaking.engines, fails_at=1)
    reply = await post(client, wav(bytes(32_000 * 60)))
    assert (reply.status_code, reply.json()["error"]) == (503, "engine_failed")
    assert await used(client) == {"stt_audio_seconds": pytest.approx(ear.heard[0][0], abs=1e-5)}


class Counting:
    """Stands before the engines, and has counted what it is told to have counted."""

    def __init__(self, engines: Any, *counted: EngineMetrics) -> None:
        self._engines = engines
        self.counted = counted

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engines, name)

    def metrics(self) -> list[EngineMetrics]:
        return list(self.counted)


COUNTS = ("requests", "failures", "waiting", "working", "loaded", "memory", "open_circuits")


async def test_stt_08_how_well_it_goes(client: Any, operator: httpx.AsyncClient, speaking: Any, question: Any):
    await post(client, wav(question.pcm, question.rate))
    (told,) = (await client.http.get(f"{STT}/metrics")).json()["items"]
    assert told["engine"] == "agentvoicebox-stt-sphinx"
    assert told["average_seconds"] > 0
    assert told["average_audio_seconds"] > 0
    assert told["average_confidence"] is None or 0 <= told["average_confidence"] <= 1
    assert 0 <= told["failure_rate"] < 1
    assert [told[name] for name in COUNTS] == [None] * 7, "which would tell of other tenants"
    mine = {"X-Tenant-ID": str(client.tenant)}
    (told,) = (await operator.get(f"{STT}/metrics", headers=mine)).json()["items"]
    assert told["requests"] >= 1
    assert (told["waiting"], told["working"], told["loaded"], told["open_circuits"]) == (0, 0, 1, 0)


async def test_a_tenant_sees_the_recognisers_that_it_could_have(
    client: Any, operator: httpx.AsyncClient, service: Any, speaking: Any
):
    names = ("agentvoicebox-stt-sphinx", "agentvoicebox-stt-deepgram", "acme-merger-with-initech", "other")
    counted = [EngineMetrics("stt", name, "") for name in names] + [EngineMetrics("tts", "agentvoicebox-tts-flite", "")]
    service.app.state.engines = Counting(speaking.engines, *counted)

    async def seen(http: httpx.AsyncClient, **headers: str) -> list[str]:
        return [each["engine"] for each in (await http.get(f"{STT}/metrics", headers=headers)).json()["items"]]

    assert await seen(client.http) == ["agentvoicebox-stt-sphinx"]
    await client.http.put("/api/v2/llm/credentials/deepgram", json={"api_key": "a key of ours"})
    assert await seen(client.http) == ["agentvoicebox-stt-sphinx", "agentvoicebox-stt-deepgram"]
    assert await seen(operator, **{"X-Tenant-ID": str(client.tenant)}) == list(names)


async def test_guesses_that_gave_way_are_no_failures(
    client: Any, operator: httpx.AsyncClient, service: Any, speaking: Any
):
    counted = EngineMetrics("stt", "agentvoicebox-stt-sphinx", "")
    service.app.state.engines = Counting(speaking.engines, counted)
    for code in ("busy", "busy", "engine_failed"):
        counted.asked("", "en")
        counted.failed(code)
    counted.asked("", "en")
    counted.waiting, counted.memory, counted.open = 3, 4_096, 1
    (told,) = (await client.http.get(f"{STT}/metrics")).json()["items"]
    assert told["failure_rate"] == 0.5
    (told,) = (await operator.get(f"{STT}/metrics", headers={"X-Tenant-ID": str(client.tenant)})).json()["items"]
    assert [told[name] for name in COUNTS] == [2, 1, 3, 0, 0, 4_096, 1]
