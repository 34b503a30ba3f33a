"""A device with stock OVOS services and our plugins: it hears, thinks and speaks; with a platform, and without one."""

from __future__ import annotations

import asyncio
import io
import re
import subprocess
import wave
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from parts.node import Node
from parts.ovos import Device, running, silence, spoken

from agentvoicebox.plugins.device.mycroft import Lines

WAKE, OTHER = "alexa", "okay nabu"
NOWHERE = "http://127.0.0.1:9"


@dataclass
class Platform:
    """A node in a process of its own, which can die, and a tenant of it."""

    node: Node
    slug: str
    admin: str
    """A key that administers the tenant."""

    async def call(self, method: str, path: str, **more: Any) -> Any:
        """Ask the REST service; raises unless it agrees."""
        headers = {"Authorization": f"Bearer {self.admin}"}
        async with httpx.AsyncClient(base_url=self.node.url, headers=headers, trust_env=False, timeout=30) as http:
            answer = await http.request(method, f"/api/v2{path}", **more)
            assert answer.status_code < 300, answer.text
            return answer.json() if answer.content else None

    def key(self, name: str) -> tuple[str, str]:
        """A new device key, and its id."""
        made = self.node.tell("key", "create", "--tenant", self.slug, "--name", name, "--scopes", "realtime")
        return made["key"], made["id"]


@pytest.fixture(scope="module")
async def model(new_language_model: Callable[[], Any]) -> AsyncIterator[Any]:
    """The language model of the platform."""
    model = new_language_model()
    await model.start()
    yield model
    await model.stop()


@pytest.fixture(scope="module")
async def platform(tmp_path_factory: pytest.TempPathFactory, model: Any) -> AsyncIterator[Platform]:
    # All that blocks is done in threads: another node, with its cell, lives on this loop, and is taken for dead.
    node = Node(tmp_path_factory.mktemp("platform"), AVB_COMPATIBLE_URL=model.url, AVB_COMPATIBLE_KEY="ours")
    await asyncio.to_thread(node.start)
    voice = ("--voice", "slt", "--wake-word", WAKE)
    admin = await asyncio.to_thread(node.admit, "acme", *voice, name="Acme", scopes="admin,realtime")
    yield Platform(node, "acme", admin)
    await asyncio.to_thread(node.kill)


def ours(url: str, key: Path) -> dict[str, Any]:
    """What `avb device init` writes, and a phrase for the time before the platform has told one."""
    return {**Lines(url, key).wanted(), "hotwords": {"agentvoicebox": {"phrases": [WAKE]}}}


@pytest.fixture
async def device(platform: Platform, tmp_path: Path) -> AsyncIterator[Device]:
    """A device of the tenant, with the platform."""
    key = tmp_path / "device.key"
    key.write_text((await asyncio.to_thread(platform.key, "device"))[0])
    changes = ours(platform.node.url, key)
    changes["tts"]["agentvoicebox-tts"]["player"] = [str(tmp_path / "device" / "player"), "-"]
    (tmp_path / "device").mkdir()
    async with running(tmp_path / "device", changes) as device:
        await device.linked()
        yield device


async def ask(
    device: Device, question: str, wake: str = WAKE, during: Callable[[], Awaitable[None] | None] | None = None
) -> tuple[list[str], bytes]:
    """Wake it and ask something; what it says, and the audio that it plays. `during` happens in mid-question."""
    place, played = len(device.messages), len(device.played)
    words = spoken(question)
    half = len(words) // 4 * 2
    await device.speak(silence(0.3), spoken(wake), silence(0.2), words[:half])
    if during is not None and (doing := during()) is not None:
        await doing
    await device.speak(words[half:], silence(1.5))
    audio = (await device.plays(played + 1))[played][1]
    await device.wait_for("recognizer_loop:audio_output_end", place)
    return device.said(place), audio


def seconds(audio: bytes) -> float:
    """How long it is, as a WAV file or bare."""
    if audio[:4] == b"RIFF":
        with wave.open(io.BytesIO(audio)) as wav:
            return wav.getnframes() / wav.getframerate()
    return len(audio) / 32_000


async def spent(platform: Platform) -> dict[str, Any]:
    """What the tenant has used, as its ledger says."""
    return dict((await platform.call("GET", "/usage"))["amounts"])


async def until(check: Callable[[], Awaitable[Any]]) -> Any:
    """What `check` returns once that is something."""
    async with asyncio.timeout(30):
        while not (found := await check()):
            await asyncio.sleep(0.1)
        return found


async def test_it_hears_on_the_platform_thinks_here_and_speaks_in_the_tenants_voice(
    platform: Platform, device: Device
) -> None:
    before = await spent(platform)
    said, audio = await ask(device, "what time is it")
    assert len(said) == 1
    after = await spent(platform)
    assert after["tts_audio_seconds"] - before["tts_audio_seconds"] == pytest.approx(seconds(audio), abs=0.05)
    assert 1 < after["stt_audio_seconds"] - before["stt_audio_seconds"] < 5
    assert await platform.call("GET", "/wake-words/analytics")  # which is asked for more closely below


async def test_with_no_platform_at_all_it_answers(tmp_path: Path) -> None:
    async with running(tmp_path / "device", ours(NOWHERE, tmp_path / "none.key")) as device:
        said, audio = await ask(device, "what time is it")
    assert len(said) == 1
    assert seconds(audio) > 0.5


async def test_when_the_platform_dies_in_mid_question_it_answers_and_tells_of_it_once(
    platform: Platform, device: Device
) -> None:
    pids = device.pids
    said, _ = await ask(device, "what time is it", during=partial(asyncio.to_thread, platform.node.kill))
    assert len(said) == 1
    said, audio = await ask(device, "what day is it")
    assert len(said) == 1
    assert seconds(audio) > 0.5
    await asyncio.to_thread(platform.node.start)
    await device.linked()
    said, _ = await ask(device, "what time is it")
    assert len(said) == 1
    assert device.pids == pids
    events = await until(partial(local, platform, 4))
    used = Counter((event["kind"], event["engine"]) for event in events)
    assert used == {("stt", "agentvoicebox-stt-sphinx"): 2, ("tts", "agentvoicebox-tts-flite"): 2}


async def local(platform: Platform, count: int) -> list[dict[str, Any]]:
    """What the newest device has told of its own engines, if that is so many events by now."""
    newest = max((await platform.call("GET", "/devices"))["items"], key=lambda each: each["created_at"])
    told = (await platform.call("GET", f"/devices/{newest['id']}/events"))["items"]
    found = [event for event in told if event["kind"] in ("stt", "tts")]
    return found if len(found) >= count else []


async def test_what_an_administrator_changes_is_live_without_a_restart(platform: Platform, device: Device) -> None:
    pids = device.pids
    _, before = await ask(device, "what is your name")
    made = await platform.call("POST", "/wake-words", json={"phrase": OTHER})
    try:
        await platform.call("PATCH", "/voice/config", json={"voice": "rms"})
        await until(partial(heard, device, f"wake words: {OTHER}"))
        place = len(device.messages)
        await device.speak(silence(0.3), spoken(WAKE), silence(2))
        _, after = await ask(device, "what is your name", wake=OTHER)
        woken = [each["data"]["key_phrase"] for _, each in device.messages[place:] if "listen" in each["data"]]
        assert len(woken) == 1, "the old word wakes it no more"
    finally:
        await platform.call("PATCH", "/voice/config", json={"voice": "slt"})
        await platform.call("DELETE", f"/wake-words/{made['id']}")
    assert after != before, "another voice"
    assert device.pids == pids


async def heard(device: Device, line: str) -> bool:
    """Whether the listener has logged this."""
    return line in device.log("dinkum-listener")


async def test_a_wake_up_after_which_nothing_is_said_is_a_false_one(platform: Platform, device: Device) -> None:
    made = await platform.call("POST", "/wake-words", json={"phrase": WAKE})
    try:
        await until(partial(heard, device, f"wake words: {WAKE}"))
        await ask(device, "what time is it")
        place = len(device.messages)
        await device.speak(silence(0.3), spoken(WAKE), silence(7))
        await device.wait_for("recognizer_loop:speech.recognition.unknown", place)

        async def known() -> Any:
            found = await platform.call("GET", f"/wake-words/{made['id']}/analytics")
            return found if found["detections"] >= 2 else None

        found = await until(known)
        assert (found["detections"], found["false_positives"]) == (2, 1)
        assert 0.5 < found["average_confidence"] <= 1
    finally:
        await platform.call("DELETE", f"/wake-words/{made['id']}")


async def test_a_key_that_is_revoked_while_it_listens_makes_it_a_local_device(
    platform: Platform, tmp_path: Path
) -> None:
    file = tmp_path / "device.key"
    secret, key_id = await asyncio.to_thread(platform.key, "to be revoked")
    file.write_text(secret)
    async with running(tmp_path / "device", ours(platform.node.url, file)) as device:
        await device.linked()

        async def revoke() -> None:
            await platform.call("DELETE", f"/api-keys/{key_id}")

        said, _ = await ask(device, "what time is it", during=revoke)
        assert len(said) == 1
        assert "avb device pair" in device.log("dinkum-listener")
        file.write_text((await asyncio.to_thread(platform.key, "a new one"))[0])
        await device.linked()
        before = await spent(platform)
        said, _ = await ask(device, "what time is it")
        assert len(said) == 1
        assert (await spent(platform))["stt_audio_seconds"] > before["stt_audio_seconds"]


async def test_what_no_skill_knows_the_tenants_persona_answers(device: Device, model: Any) -> None:
    model.says("I am ", "Ada. ", "How nice.")
    place = len(device.messages)
    await ask(device, "tell me a joke")
    assert device.said(place) == ["I am Ada.", "How nice."]
    assert "joke" in model.asked[-1]["messages"][-1]["content"]
    assert model.keys[-1] == "ours"


async def test_the_device_says_the_code_by_which_it_is_paired(platform: Platform, tmp_path: Path) -> None:
    file = tmp_path / "device.key"
    async with running(tmp_path / "device", ours(platform.node.url, file)) as device:
        command = platform.node.avb("device", "pair", "--config", str(device.configuration), "--json")
        pairing = await asyncio.create_subprocess_exec(
            *command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=device.environment()
        )
        try:
            told = await device.wait_for("speak")
            code = "".join(re.findall(r"\d", told["data"]["utterance"]))
            assert re.fullmatch(r"\d{8}", code)
            claimed = await platform.call("POST", "/devices", json={"code": code, "name": "Kitchen"})
            out, err = await asyncio.wait_for(pairing.communicate(), 30)
        finally:
            if pairing.returncode is None:
                pairing.kill()
        assert pairing.returncode == 0, (out, err)
        await device.linked()
        said, _ = await ask(device, "what time is it")
        assert len(said) == 1
        assert claimed["name"] == "Kitchen"
        known = await platform.call("GET", f"/devices/{claimed['id']}")
        assert known["last_seen_at"] is not None
