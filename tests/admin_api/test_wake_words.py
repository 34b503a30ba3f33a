"""Wake words over HTTP (API-091, API-092; WAK-01 to WAK-05)."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from agentvoicebox.admin_api import wake_words as routes
from agentvoicebox.plugins import audio, detector
from agentvoicebox.tenancy import devices
from agentvoicebox.tenancy.devices import DeviceEvent

WORDS = "/api/v2/wake-words"
CONFIG = "/api/v2/voice/config"
WAV = {"content-type": "audio/wav"}


async def made(client: Any, phrase: str = "alexa", **more: Any) -> dict[str, Any]:
    reply = await client.http.post(WORDS, json={"phrase": phrase, **more})
    assert reply.status_code == 201, reply.text
    word: dict[str, Any] = reply.json()
    return word


async def heard(client: Any) -> list[tuple[str, float]]:
    """What devices listen for."""
    return [(each["phrase"], each["sensitivity"]) for each in (await client.http.get(WORDS)).json()["heard"]]


async def test_wak_01_a_wake_word_comes_changes_and_goes(client: Any):
    word = await made(client, "Okay,  Nabu!", sensitivity=0.7)
    there = f"{WORDS}/{word['id']}"
    assert {name: word[name] for name in ("phrase", "sensitivity", "enabled", "model_ref")} == {
        "phrase": "okay nabu",
        "sensitivity": 0.7,
        "enabled": True,
        "model_ref": "micro/okay_nabu",
    }
    assert (await client.http.get(there)).json() == word
    changed = (await client.http.patch(there, json={"sensitivity": 0.2})).json()
    assert {**changed, "updated_at": ""} == {**word, "sensitivity": 0.2, "updated_at": ""}
    changed = (await client.http.patch(there, json={"phrase": "Hey Computer"})).json()
    assert (changed["phrase"], changed["model_ref"], changed["sensitivity"]) == ("hey computer", "sphinx", 0.2)
    replaced = (await client.http.put(there, json={"phrase": "alexa", "enabled": False})).json()
    assert (replaced["phrase"], replaced["model_ref"]) == ("alexa", "micro/alexa")
    assert (replaced["sensitivity"], replaced["enabled"]) == (0.5, False)
    assert (await client.http.delete(there)).status_code == 204
    for reply in (await client.http.get(there), await client.http.delete(there)):
        assert (reply.status_code, reply.json()["error"]) == (404, "not_found")
    lines = (await client.http.get("/api/v2/audit?resource_type=wake_word")).json()
    assert lines["total"] == 5


async def test_a_new_one_has_the_engines_own_sensitivity(client: Any):
    """WAK-02."""
    word = await made(client)
    assert (word["sensitivity"], word["enabled"]) == (0.5, True)


async def test_it_is_clear_what_devices_listen_for(client: Any):
    """One that is disabled is heard by nobody and keeps what was chosen for it; nobody's devices are ever deaf."""
    await client.http.patch(CONFIG, json={"wake_word": "hey jarvis"})
    nothing = (await client.http.get(WORDS)).json()
    assert (nothing["items"], nothing["total"]) == ([], 0)
    assert nothing["heard"] == [{"id": None, "phrase": "hey jarvis", "sensitivity": 0.5, "problem": ""}]
    first, second = await made(client, "alexa", sensitivity=0.9), await made(client, "okay nabu")
    listed = (await client.http.get(WORDS)).json()
    assert listed["total"] == 2
    assert sorted(await heard(client)) == [("alexa", 0.9), ("okay nabu", 0.5)]
    off = (await client.http.patch(f"{WORDS}/{first['id']}", json={"enabled": False})).json()
    assert (off["phrase"], off["sensitivity"], off["model_ref"]) == ("alexa", 0.9, "micro/alexa")
    assert await heard(client) == [("okay nabu", 0.5)]
    await client.http.delete(f"{WORDS}/{second['id']}")
    assert await heard(client) == [("hey jarvis", 0.5)]
    await client.http.patch(f"{WORDS}/{first['id']}", json={"enabled": True})
    assert await heard(client) == [("alexa", 0.9)]


async def test_it_is_told_when_devices_are_deaf(client: Any):
    """What they listen for may not be heard in the language that was chosen later."""
    await client.http.patch(CONFIG, json={"wake_word": "hey jarvis"})
    await client.http.patch(CONFIG, json={"language": "de-DE"})
    (told,) = (await client.http.get(WORDS)).json()["heard"]
    assert told["phrase"] == "hey jarvis"
    assert "okay nabu" in told["problem"]
    await made(client, "okay nabu")
    assert [each["problem"] for each in (await client.http.get(WORDS)).json()["heard"]] == [""]


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({}, "phrase", "validation_error"),
    ({"phrase": ""}, "phrase", "validation_error"),
    ({"phrase": 7}, "phrase", "validation_error"),
    ({"phrase": "x" * 101}, "phrase", "validation_error"),
    ({"phrase": "alexa", "sensitivity": 1.1}, "sensitivity", "validation_error"),
    ({"phrase": "alexa", "sensitivity": -0.1}, "sensitivity", "validation_error"),
    ({"phrase": "alexa", "sensitivity": True}, "sensitivity", "validation_error"),
    ({"phrase": "alexa", "enabled": 1}, "enabled", "validation_error"),
    ({"phrase": "alexa", "model_ref": "micro/alexa"}, "model_ref", "validation_error"),
    ({"phrase": "alexa", "id": str(uuid.uuid4())}, "id", "validation_error"),
    ({"phrase": "?!"}, "phrase", "phrase_invalid"),
    ({"phrase": "r2d2 wake up"}, "phrase", "phrase_invalid"),
    ({"phrase": "hi"}, "phrase", "phrase_too_short"),
    ({"phrase": "computer " * 8}, "phrase", "phrase_too_long"),
    ({"phrase": "hey xqzzkw"}, "phrase", "phrase_unpronounceable"),
]


async def test_wak_02_what_nobody_could_hear_is_refused_by_name(client: Any):
    word = await made(client)
    for wrong, field, code in WRONG:
        replies = [await client.http.post(WORDS, json=wrong)]
        replies.append(await client.http.put(f"{WORDS}/{word['id']}", json=wrong))
        if wrong:
            replies.append(await client.http.patch(f"{WORDS}/{word['id']}", json=wrong))
        for reply in replies:
            assert (reply.status_code, reply.json()["error"]) == (400, code), wrong
            assert list(reply.json()["details"]) == [field], wrong
    assert (await client.http.get(f"{WORDS}/{word['id']}")).json() == word


async def test_a_phrase_is_for_the_language_of_the_assistant(client: Any):
    await client.http.patch(CONFIG, json={"language": "de-DE"})
    reply = await client.http.post(WORDS, json={"phrase": "hey computer"})
    assert (reply.status_code, reply.json()["error"]) == (400, "phrase_language")


async def test_one_phrase_one_wake_word(client: Any, new_client: Any):
    word, other = await made(client), await made(client, "okay nabu")
    replies = [await client.http.post(WORDS, json={"phrase": "ALEXA"})]
    replies.append(await client.http.patch(f"{WORDS}/{other['id']}", json={"phrase": "Alexa"}))
    for reply in replies:
        assert (reply.status_code, reply.json()["error"]) == (409, "wake_word_exists")
    assert (await client.http.put(f"{WORDS}/{word['id']}", json={"phrase": "Alexa"})).status_code == 200
    await made(await new_client("admin"))  # that of others is theirs


async def test_there_are_so_many_and_no_more(client: Any):
    for name in ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]:
        await made(client, f"computer {name}")
    reply = await client.http.post(WORDS, json={"phrase": "alexa"})
    assert (reply.status_code, reply.json()["error"]) == (409, "too_many_wake_words")


async def test_scopes(client: Any, new_client: Any):
    word = await made(client)
    speaker = await new_client("realtime", "sessions", "usage", tenant=client.tenant)
    one = f"{WORDS}/{word['id']}"
    asked = [("GET", WORDS), ("POST", WORDS), ("GET", f"{WORDS}/analytics"), ("POST", f"{one}/test")]
    for method, path in [*asked, *((method, one) for method in ("GET", "PUT", "PATCH", "DELETE"))]:
        reply = await speaker.http.request(method, path, json={"phrase": "okay nabu"} if method != "GET" else None)
        assert (reply.status_code, reply.json()["error"]) == (403, "insufficient_scope"), (method, path)


async def test_wake_words_are_the_tenants_own(client: Any, new_client: Any):
    await made(client)
    other = await new_client("admin")
    listed = (await other.http.get(WORDS)).json()
    assert (listed["total"], listed["heard"][0]["id"]) == (0, None)


# --- trying one with a recording --------------------------------------------------------------------------------------


Say = Callable[..., bytes]


@pytest.fixture
def recording(speech: Say) -> Say:
    """Somebody says a sentence, with half a second of silence around it, as a file."""

    def record(sentence: str, voice: str = "slt") -> bytes:
        quiet = bytes(audio.RATE)
        return audio.wav(quiet + speech(sentence, voice) + quiet, audio.RATE)

    return record


async def tried(client: Any, word: dict[str, Any], file: bytes, **query: float) -> Any:
    reply = await client.http.post(f"{WORDS}/{word['id']}/test", content=file, headers=WAV, params=query)
    assert reply.status_code == 200, reply.text
    return reply.json()


@pytest.mark.parametrize("voice", ["slt", "rms", "awb"])
async def test_wak_03_a_recording_tells_whether_it_wakes(client: Any, recording: Say, voice: str):
    alexa, computer = await made(client), await made(client, "hey computer")
    told = await tried(client, alexa, recording("alexa", voice))
    assert told["detected"] is True
    assert 0.5 < told["confidence"] <= 1
    assert 0.5 < told["at"] < told["audio_seconds"] + 1
    assert told["sensitivity"] == 0.5
    for word, sentence in ((alexa, "open the window"), (computer, "alexa")):
        told = await tried(client, word, recording(sentence, voice))
        assert (told["detected"], told["at"]) == (False, None)
        assert told["confidence"] < 0.5


async def test_a_phrase_without_a_model_of_its_own_is_tried_too(client: Any, recording: Say):
    word = await made(client, "hey computer", sensitivity=0.8)
    told = await tried(client, word, recording("hey computer", "rms"))
    assert (told["detected"], told["sensitivity"]) == (True, 0.8)


async def test_another_sensitivity_can_be_tried(client: Any, monkeypatch: pytest.MonkeyPatch):
    """And that of the wake word stays as it is."""
    used = []
    hear = detector.hear

    def seen(pcm: bytes, word: Any) -> Any:
        used.append((word.phrase, word.sensitivity, word.model))
        return hear(pcm, word)

    monkeypatch.setattr(detector, "hear", seen)
    word = await made(client, sensitivity=0.6)
    silence = audio.wav(bytes(audio.RATE), audio.RATE)
    for query, expected in (({}, 0.6), ({"sensitivity": 0.1}, 0.1), ({"sensitivity": 0}, 0), ({"sensitivity": 1}, 1)):
        told = await tried(client, word, silence, **query)
        assert (told["sensitivity"], told["detected"]) == (expected, False)
        assert used.pop() == ("alexa", expected, "micro/alexa")
    assert (await client.http.get(f"{WORDS}/{word['id']}")).json() == word
    for wrong in ("2", "-1", "nan", "much", ""):
        there = f"{WORDS}/{word['id']}/test?sensitivity={wrong}"
        reply = await client.http.post(there, content=silence, headers=WAV)
        assert (reply.status_code, list(reply.json()["details"])) == (400, ["sensitivity"]), wrong


async def test_a_disabled_one_can_be_tried(client: Any, recording: Say):
    word = await made(client, enabled=False)
    assert (await tried(client, word, recording("alexa")))["detected"] is True


async def test_what_is_no_recording_is_refused(client: Any):
    there = f"{WORDS}/{(await made(client))['id']}/test"
    for body, code in ((b"", "audio_empty"), (b"no audio at all" * 50, "audio_unreadable")):
        reply = await client.http.post(there, content=body, headers=WAV)
        assert (reply.status_code, reply.json()["error"]) == (400, code)
    long = audio.wav(bytes(2 * audio.RATE * 31), audio.RATE)
    for body, code in ((long, "audio_too_long"), (bytes(routes.LARGEST + 1), "payload_too_large")):
        reply = await client.http.post(there, content=body, headers=WAV)
        assert (reply.status_code, reply.json()["error"]) == (413, code)
    reply = await client.http.post(there, json={})
    assert (reply.status_code, reply.json()["error"]) == (415, "unsupported_media_type")
    unknown = await client.http.post(f"{WORDS}/{uuid.uuid4()}/test", content=long, headers=WAV)
    assert unknown.status_code == 404


async def test_recordings_wait_in_no_long_line(client: Any, new_client: Any, monkeypatch: pytest.MonkeyPatch):
    """One tenant leaves room for others, and all of them together do for the node."""
    monkeypatch.setattr(routes, "MOST_TRIALS", 3)
    go = asyncio.Event()
    waiting = []

    async def stuck(*_: Any) -> Any:
        waiting.append(None)
        await go.wait()
        return 1.0, detector.Heard(False, 0.1, None)

    monkeypatch.setattr(routes, "_listen", stuck)
    silence = audio.wav(bytes(audio.RATE), audio.RATE)

    async def post(whose: Any, word: Any) -> httpx.Response:
        reply: httpx.Response = await whose.http.post(f"{WORDS}/{word['id']}/test", content=silence, headers=WAV)
        return reply

    other = await new_client("admin")
    mine, theirs = await made(client), await made(other)
    first = [asyncio.create_task(post(client, mine)) for _ in range(2)]
    while len(waiting) < 2:
        await asyncio.sleep(0.01)
    reply = await post(client, mine)
    assert (reply.status_code, reply.json()["error"]) == (503, "busy")
    first.append(asyncio.create_task(post(other, theirs)))
    while len(waiting) < 3:
        await asyncio.sleep(0.01)
    assert (await post(other, theirs)).json()["error"] == "busy"
    go.set()
    assert {(await each).status_code for each in first} == {200}
    assert (await post(client, mine)).status_code == 200
    go.clear()
    monkeypatch.setattr(routes, "PATIENCE", 0.05)
    reply = await post(client, mine)
    assert (reply.status_code, reply.json()["error"]) == (503, "engine_timeout")
    go.set()
    monkeypatch.setattr(routes, "PATIENCE", 60.0)
    assert (await post(client, mine)).status_code == 200


# --- analytics --------------------------------------------------------------------------------------------------------


async def reported(
    service: Any, client: Any, word: dict[str, Any] | None, **at: list[tuple[str, float | None]]
) -> None:
    """A device of the client's told of these outcomes and confidences, so many `days` ago: `d0`, `d3` …"""
    store = service.database
    device = await devices.arrive(store, client.tenant, client.key_id, None, "Kitchen", "1.0")
    told = [
        DeviceEvent(
            uuid.uuid4(),
            "wake",
            datetime.now(UTC) - timedelta(days=int(ago[1:])),
            phrase=word["phrase"] if word else "hey mycroft",
            wake_word_id=uuid.UUID(word["id"]) if word else None,
            outcome=outcome,
            confidence=confidence,
        )
        for ago, outcomes in at.items()
        for outcome, confidence in outcomes
    ]
    assert await devices.record(store, client.tenant, device.id, told) == len(told)


async def test_wak_05_how_well_devices_hear(service: Any, client: Any, new_client: Any):
    word, other = await made(client), await made(client, "okay nabu")
    stranger = await new_client("admin")
    await reported(service, stranger, await made(stranger), d0=[("detected", 0.1)] * 5)
    await reported(
        service,
        client,
        word,
        d0=[("detected", 0.9), ("detected", 0.7), ("missed", 0.3)],
        d2=[("detected", 0.8), ("false_positive", 0.6)],
        d29=[("missed", 0.2)],
    )
    await reported(service, client, other, d0=[("missed", None)])
    await reported(service, client, None, d1=[("detected", 0.5)])
    told = (await client.http.get(f"{WORDS}/{word['id']}/analytics")).json()
    today = datetime.now(UTC).date()
    assert (told["until"], told["since"]) == (today.isoformat(), (today - timedelta(29)).isoformat())
    assert (told["detections"], told["false_positives"], told["missed"]) == (4, 1, 2)
    assert told["detection_rate"] == pytest.approx(3 / 5)
    assert told["average_confidence"] == pytest.approx(0.75)
    assert len(told["days"]) == 30
    by_day = {each["date"]: each for each in told["days"]}
    assert by_day[today.isoformat()] == {
        "date": today.isoformat(),
        "detections": 2,
        "false_positives": 0,
        "missed": 1,
    }
    assert by_day[(today - timedelta(2)).isoformat()] == {
        "date": (today - timedelta(2)).isoformat(),
        "detections": 2,
        "false_positives": 1,
        "missed": 0,
    }
    everything = (await client.http.get(f"{WORDS}/analytics")).json()
    assert (everything["detections"], everything["missed"]) == (5, 3)
    await client.http.delete(f"{WORDS}/{word['id']}")
    assert (await client.http.get(f"{WORDS}/{word['id']}/analytics")).status_code == 404
    assert (await client.http.get(f"{WORDS}/analytics")).json() == everything


async def test_analytics_of_some_days(service: Any, client: Any):
    word = await made(client)
    await reported(service, client, word, d0=[("detected", 0.9)], d9=[("missed", None)], d20=[("detected", 0.5)])
    today = datetime.now(UTC).date()

    async def missed_and_detected(**span: str) -> tuple[int, int, int]:
        reply = await client.http.get(f"{WORDS}/{word['id']}/analytics", params=span)
        assert reply.status_code == 200, reply.text
        return reply.json()["missed"], reply.json()["detections"], len(reply.json()["days"])

    days = {ago: (today - timedelta(ago)).isoformat() for ago in (9, 10, 20, 365)}
    assert await missed_and_detected(**{"from": days[9]}) == (1, 1, 10)
    assert await missed_and_detected(**{"from": days[10], "to": days[9]}) == (1, 0, 2)
    assert await missed_and_detected(to=days[20]) == (0, 1, 30)
    assert await missed_and_detected(**{"from": days[365], "to": "9999-12-31"}) == (1, 2, 366)
    assert await missed_and_detected(to="0001-01-01") == (0, 0, 1)


async def test_nothing_told_is_nothing_known(client: Any):
    told = (await client.http.get(f"{WORDS}/analytics")).json()
    assert (told["detections"], told["detection_rate"], told["average_confidence"]) == (0, None, None)


@pytest.mark.parametrize(
    "query",
    ["from=yesterday", "to=2026-13-01", "from=9999-12-31", "from=2026-01-02&to=2026-01-01", "from=2020-01-01", "from="],
)
async def test_analytics_are_asked_for_properly(client: Any, query: str):
    word = await made(client)
    for path in (f"{WORDS}/analytics", f"{WORDS}/{word['id']}/analytics"):
        reply = await client.http.get(f"{path}?{query}")
        assert (reply.status_code, reply.json()["error"]) == (400, "validation_error"), query
