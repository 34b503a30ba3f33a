"""Devices on real sockets against the real node: what they hear, say and are told, and what is theirs alone."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import text
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from agentvoicebox.bus_bridge import gateway, live
from agentvoicebox.bus_bridge.device import devices as places
from agentvoicebox.bus_bridge.device import house, requests, socket
from agentvoicebox.bus_bridge.door import Door
from agentvoicebox.bus_bridge.engines import Engines
from agentvoicebox.config.errors import BadInput, Unavailable
from agentvoicebox.plugins.device import connection, wire
from agentvoicebox.plugins.pool import Speech, Transcript
from agentvoicebox.tenancy import changes, keys, personas, projects, settings, tenants, voices, wake_words
from agentvoicebox.tenancy import devices as records
from agentvoicebox.tenancy.metering import Ledger
from agentvoicebox.tenancy.models import RateClass

DAY = timedelta(days=1)


def words(sentence: str) -> list[str]:
    return re.findall(r"[a-z']+", sentence.lower())


async def until(true: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(30):
        while not await true():
            await asyncio.sleep(0.02)


async def used(stack: Any, customer: Any, metric: str) -> list[float]:
    """What the ledger has of a tenant, one by one."""
    query = text("SELECT quantity FROM usage_events WHERE metric = :metric ORDER BY at, event_id")
    async with stack.database.tenant(customer.id) as session:
        return [float(row[0]) for row in await session.execute(query, {"metric": metric})]


class Ear:
    """Stands where the recognisers are: answers when it is let, and keeps what it is asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[bytes, Any, bool]] = []
        self.arrived = asyncio.Event()
        self.go = asyncio.Event()
        self.go.set()
        self.cancelled = 0
        self.fails: Exception | None = None

        async def transcribe(
            engines: Engines, pcm: bytes, settings: Any, tenant: uuid.UUID, *, tentative: bool = False, deadline: float
        ) -> Transcript:
            self.asked.append((pcm, settings, tentative))
            self.arrived.set()
            try:
                await self.go.wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
            if self.fails is not None:
                raise self.fails
            return Transcript(f"heard {len(pcm)}", 0.5, len(pcm) / 32_000, "en-US", "ear")

        monkeypatch.setattr(Engines, "transcribe", transcribe)


@pytest.fixture
def ear(monkeypatch: pytest.MonkeyPatch) -> Ear:
    return Ear(monkeypatch)


@pytest.fixture
async def talker(stack: Any, new_customer: Any, language_model: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A tenant whose language model is the test's, with two personas."""
    ours = dataclasses.replace(stack.settings, compatible_url=language_model.url, compatible_key="local")
    monkeypatch.setattr(stack.gateway.answers, "_settings", ours)
    customer = await new_customer(persona_name="House", llm_provider="compatible", llm_model="m")
    for name in ("Ada", "Bo"):
        await personas.create(stack.database, customer.id, personas.Character(name, system_prompt=f"You are {name}."))
    return customer


# --- who comes in -----------------------------------------------------------------------------------------------------


async def test_a_device_is_welcomed_and_told_what_it_does_not_know(stack: Any, devices: Any, new_customer: Any):
    customer = await new_customer(wake_word="Hey Computer", persona_name="Ada", speed=1.25)
    async with devices.device(customer) as device:
        told = await device.configured()
        assert (told.tenant, told.language, told.persona, told.speed) == (customer.name, "en-US", "Ada", 1.25)
        assert [(word.phrase, word.sensitivity) for word in told.wake_words] == [("hey computer", 0.5)]
        welcome = device.welcome
        assert (welcome.tenant_id, welcome.tenant_name) == (str(customer.id), customer.name)
        assert abs(welcome.time - time.time()) < 60
    async with devices.device(customer, "audio", have=told.etag) as device:
        assert device.welcome.device_id == welcome.device_id, "one key, one device"
        await device.say(wire.About(1))
        await device.answer(1)
        assert device.choices.empty(), "which it knew"
    listed = await records.list_(stack.database, customer.id)
    assert [(row.name, row.version, str(row.id)) for row in listed.items] == [("kitchen", "1.0", welcome.device_id)]


async def test_who_may_not_speak_does_not_get_in(stack: Any, devices: Any, new_customer: Any, customer: Any):
    other = await new_customer(scopes=("usage",))
    stranger = dataclasses.replace(customer, key="avb_" + "x" * 43)
    cases = (
        (other, {}, 403, "insufficient_scope"),
        (stranger, {}, 401, "invalid_api_key"),
        (customer, {"X-Tenant-ID": other.slug}, 403, "permission_denied"),
        (customer, {"Origin": "https://evil.example"}, 403, "origin_not_allowed"),
    )
    for who, headers, status, code in cases:
        with pytest.raises(InvalidStatus) as caught:
            async with connect(devices.url, additional_headers=who.headers | headers):
                pass
        assert caught.value.response.status_code == status
        assert code in caught.value.response.body.decode()


async def test_who_does_not_say_hello_is_not_waited_for(devices: Any, customer: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(socket, "GREETING", 0.05)
    async with devices.socket(customer) as device:
        assert await device.closed() == (1008, "hello_expected")
        assert [problem.code for problem in device.problems] == ["hello_expected"]


async def test_a_store_that_is_away_lets_nobody_in_and_says_so(
    devices: Any, customer: Any, monkeypatch: pytest.MonkeyPatch
):
    async def away(*_: Any) -> Any:
        raise Unavailable("The store does not answer.")

    monkeypatch.setattr(records, "arrive", away)
    async with devices.socket(customer) as device:
        await device.say(wire.Hello("core"))
        assert await device.closed() == (1013, "service_unavailable")
        assert [problem.code for problem in device.problems] == ["service_unavailable"]


async def test_names_that_cannot_be_written_down_are_cut_to_what_can(stack: Any, devices: Any, new_customer: Any):
    customer = await new_customer()
    async with devices.socket(customer) as device:
        await device.say(wire.Hello("core\0" * 99, "kit\0\n\N{BELL}chen" * 99, "1\0" * 99, "\0" * 99))
        await device.configured()
    [row] = (await records.list_(stack.database, customer.id)).items
    assert row.name.startswith("kit\N{BELL}chen")


async def test_the_newest_sockets_of_a_device_are_those_that_stay(
    devices: Any, customer: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(places, "MOST_SOCKETS", 2)
    async with (
        devices.device(customer, "audio") as audio,
        devices.device(customer) as first,
        devices.device(customer) as second,
    ):
        assert await first.closed() == (places.REPLACED, "replaced"), "the one of the same process"
        await second.say(wire.About(1))
        await audio.say(wire.About(1))
        assert isinstance((await second.answer(1))[-1], wire.Told)
        assert isinstance((await audio.answer(1))[-1], wire.Told)
    assert "is its key on several devices?" in caplog.text


async def test_of_many_that_come_at_once_few_are_let_in_at_a_time(
    stack: Any, devices: Any, customer: Any, monkeypatch: pytest.MonkeyPatch
):
    """After a restart all do; the node has to hear meanwhile what changes, or it looks up every key again and again."""
    there: list[int] = [0]
    go = asyncio.Event()
    admit = Door.admit

    async def slow(door: Door, scope: Any) -> Any:
        there.append(there[-1] + 1)
        await go.wait()
        there.append(there[-1] - 1)
        return await admit(door, scope)

    async def come() -> None:
        async with devices.device(customer):
            pass

    monkeypatch.setattr(Door, "admit", slow)

    async def are_there() -> bool:
        return there[-1] == 2

    monkeypatch.setattr(stack.gateway, "_coming", asyncio.Semaphore(2))
    monkeypatch.setattr(gateway, "OPENING", 60.0)
    coming = [asyncio.create_task(come()) for _ in range(5)]
    await until(are_there)
    await asyncio.sleep(0.2)
    go.set()
    await asyncio.gather(*coming)
    assert max(there) == 2
    go.clear()
    monkeypatch.setattr(gateway, "OPENING", 0.05)
    coming = [asyncio.create_task(come()) for _ in range(3)]
    done, _ = await asyncio.wait(coming, return_when=asyncio.FIRST_COMPLETED)
    with pytest.raises(InvalidStatus, match="503"):
        await done.pop()
    go.set()
    await asyncio.wait(coming)


def test_nobody_is_welcomed_who_does_not_wait_for_it():
    assert socket.WELCOME <= connection.WELCOME
    assert gateway.OPENING < connection.OPENING


async def test_devices_are_no_sessions_and_leave_nothing_behind(stack: Any, devices: Any, new_customer: Any):
    customer = await new_customer(tier="free")
    before = stack.gateway.connections
    async with devices.device(customer), devices.device(customer, "audio"), devices.device(customer, "core"):
        assert stack.gateway.connections == before
        assert customer.id in stack.gateway.devices._homes
        visits = [visit for visit in stack.gateway.live if visit.grant.tenant_id == customer.id]
        assert len(visits) == 3
        for visit in visits:
            visit.connection._heard_at -= 30 * 86_400
            assert visit.timer is None, "a device may be silent for a month"
        stack.gateway.live._end_idle()
        assert not any(visit.connection._outbox.closing for visit in visits)

    async def is_gone() -> bool:
        return customer.id not in stack.gateway.devices._homes

    await until(is_gone)
    assert await used(stack, customer, "sessions") == []


async def test_a_node_that_restarts_says_so(stack: Any, devices: Any, customer: Any):
    async with devices.device(customer) as device:
        for visit in stack.gateway.live:
            if visit.grant.tenant_id == customer.id:
                visit.connection.close(1012, "restarting")
        assert await device.closed() == (1012, "restarting")


# --- listening --------------------------------------------------------------------------------------------------------


async def test_what_is_said_is_understood_and_metered_once(
    stack: Any, devices: Any, new_customer: Any, speech: Callable[..., bytes]
):
    customer = await new_customer()
    pcm = speech("what time is it") + bytes(32_000)
    async with devices.device(customer) as device:
        [heard] = await device.listen(1, pcm)
        assert isinstance(heard, wire.Transcript), heard
        assert "time" in words(heard.text)
        assert (heard.language, heard.engine) == ("en-US", "agentvoicebox-stt-sphinx")
        [quantity] = await used(stack, customer, "stt_audio_seconds")
        assert abs(quantity - len(pcm) / 32_000) < 1e-3
        [again] = await device.listen(2, pcm, "en-us")
        assert again.text == heard.text
    assert len(await used(stack, customer, "stt_audio_seconds")) == 2


async def test_working_is_said_at_once_and_again(devices: Any, customer: Any, ear: Ear):
    ear.go.clear()
    async with devices.device(customer) as device:
        await device.say(wire.Listen(1))

        async def has_been(times: int) -> None:
            async def said() -> bool:
                return device.working >= times

            await until(said)

        await has_been(3)  # before there is any audio
        await device.say(wire.audio(1, bytes(3200)), wire.Finish(1))
        await has_been(6)
        ear.go.set()
        assert isinstance((await device.answer(1))[-1], wire.Transcript)


async def test_recognition_begins_at_the_first_silence_and_counts_if_that_was_all(
    stack: Any, devices: Any, new_customer: Any, ear: Ear, speech: Callable[..., bytes]
):
    customer = await new_customer()
    pcm = speech("what time is it") + bytes(16_000)
    async with devices.device(customer) as device:
        await device.say(wire.Listen(1))
        for i in range(0, len(pcm), 1_280):
            await device.say(wire.audio(1, pcm[i : i + 1_280]))
        await asyncio.wait_for(ear.arrived.wait(), 30)
        await device.say(wire.audio(1, bytes(16_000)), wire.Finish(1))
        [heard] = await device.answer(1)
    assert [tentative for _, _, tentative in ear.asked] == [False]
    early = len(ear.asked[0][0])
    assert heard.text == f"heard {early}"
    assert early <= len(pcm)
    [quantity] = await used(stack, customer, "stt_audio_seconds")
    assert abs(quantity - len(pcm) / 32_000 - 0.5) < 1e-3, "all that was sent is metered"


async def test_who_goes_on_speaking_is_heard_to_the_end(
    devices: Any, customer: Any, ear: Ear, speech: Callable[..., bytes]
):
    said = speech("what time is it")
    ear.go.clear()
    async with devices.device(customer) as device:
        await device.say(wire.Listen(1))
        for part in (said, bytes(16_000)):
            for i in range(0, len(part), 1_280):
                await device.say(wire.audio(1, part[i : i + 1_280]))
        await asyncio.wait_for(ear.arrived.wait(), 30)
        for i in range(0, len(said), 1_280):
            await device.say(wire.audio(1, said[i : i + 1_280]))
        await device.say(wire.Finish(1))

        async def whole() -> bool:
            return len(ear.asked[-1][0]) == 2 * len(said) + 16_000

        await until(whole)
        ear.go.set()
        [heard] = await device.answer(1)
    assert heard.text == f"heard {2 * len(said) + 16_000}"
    assert ear.cancelled >= 1, "the guess was in vain"


async def test_an_early_recognition_that_fails_is_made_again_with_all_there_is(
    devices: Any, customer: Any, ear: Ear, speech: Callable[..., bytes]
):
    pcm = speech("what time is it") + bytes(16_000)
    ear.fails = Unavailable("no")
    async with devices.device(customer) as device:
        await device.say(wire.Listen(1))
        for i in range(0, len(pcm), 1_280):
            await device.say(wire.audio(1, pcm[i : i + 1_280]))
        await asyncio.wait_for(ear.arrived.wait(), 30)
        await asyncio.sleep(0)
        ear.fails = None
        ear.go.set()
        await device.say(wire.Finish(1))
        [heard] = await device.answer(1)
    assert isinstance(heard, wire.Transcript)


async def test_a_service_that_is_paid_for_hears_once(
    devices: Any, new_customer: Any, ear: Ear, speech: Callable[..., bytes]
):
    customer = await new_customer(stt="deepgram")
    pcm = speech("what time is it") + bytes(16_000)
    async with devices.device(customer) as device:
        await device.say(wire.Listen(1), wire.audio(1, pcm))

        async def is_silent() -> bool:
            return device.working >= 3

        await until(is_silent)
        await device.say(wire.audio(1, bytes(3_200)), wire.Finish(1))
        [heard] = await device.answer(1)
    assert heard.text == f"heard {len(pcm) + 3_200}"
    assert [len(asked) for asked, _, _ in ear.asked] == [len(pcm) + 3_200]


async def test_what_is_understood_is_told_as_it_is_spoken(
    stack: Any, devices: Any, new_customer: Any, ear: Ear, speech: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
):
    """And is metered, also when the device goes before the end: it has been told."""
    customer = await new_customer()

    async def transcribe(*_: Any, **__: Any) -> Transcript:
        return Transcript("what time is it", None, 1.0)

    monkeypatch.setattr(Engines, "transcribe", transcribe)
    pcm = speech("what time is it what time is it")
    async with devices.device(customer) as device:
        await device.say(wire.Listen(1, partials=True))
        sending = 0
        while device.of(1).empty():
            await device.say(wire.audio(1, pcm[sending : sending + 3_200]))
            sending = (sending + 3_200) % len(pcm)
            await asyncio.sleep(0.01)
        assert await device.next(1) == wire.Partial(1, "what time is it")

    async def is_metered() -> bool:
        return len(await used(stack, customer, "stt_audio_seconds")) == 1

    await until(is_metered)


async def test_cancelling_and_leaving_end_the_work_and_nothing_is_metered(
    stack: Any, devices: Any, new_customer: Any, ear: Ear
):
    customer = await new_customer()
    ear.go.clear()
    async with devices.device(customer) as device:
        await device.say(wire.Listen(1), wire.audio(1, bytes(3_200)), wire.Finish(1))
        await asyncio.wait_for(ear.arrived.wait(), 30)
        await device.say(wire.Cancel(1))

        async def cancelled() -> bool:
            return ear.cancelled == 1

        await until(cancelled)
        ear.arrived.clear()
        await device.say(wire.Listen(1), wire.audio(1, bytes(3_200)), wire.Finish(1))
        await asyncio.wait_for(ear.arrived.wait(), 30)

    async def left() -> bool:
        return ear.cancelled == 2

    await until(left)
    assert device.of(1).empty()
    assert await used(stack, customer, "stt_audio_seconds") == []


async def test_a_transcript_that_cannot_be_metered_is_not_told(
    devices: Any, customer: Any, ear: Ear, monkeypatch: pytest.MonkeyPatch
):
    async def away(ledger: Ledger, usages: Any) -> None:
        raise Unavailable("The store does not answer.")

    monkeypatch.setattr(Ledger, "record", away)
    async with devices.device(customer) as device:
        [problem] = await device.listen(1, bytes(32_000))
        assert problem.code == "service_unavailable"
        await device.say(wire.Speak(2, "hello"))
        assert (await device.answer(2))[-1].code == "service_unavailable"


async def test_a_device_that_falls_silent_in_the_middle_is_not_waited_for(
    devices: Any, customer: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(requests, "SILENT", 0.05)
    async with devices.device(customer) as device:
        await device.say(wire.Listen(1), wire.audio(1, bytes(640)))
        [problem] = await device.answer(1)
        assert problem.code == "timeout"


async def test_a_minute_from_a_file_comes_as_fast_as_it_goes_and_more_is_refused(devices: Any, customer: Any, ear: Ear):
    async with devices.device(customer) as device:
        [heard] = await device.listen(1, bytes(60 * 32_000))
        assert heard.text == f"heard {60 * 32_000}"
        [problem] = await device.listen(2, bytes(60 * 32_000 + 2))
        assert problem.code == "audio_too_long"


async def test_a_language_that_the_assistant_does_not_speak_is_the_tenants(devices: Any, customer: Any, ear: Ear):
    async with devices.device(customer) as device:
        for number, language in enumerate(("", "en-us", "tlh-KL", "x"), 1):
            await device.listen(number, bytes(640), language)
    assert {settings.language for _, settings, _ in ear.asked} == {"en-US"}


# --- speaking ---------------------------------------------------------------------------------------------------------


async def test_what_is_spoken_comes_in_small_pieces_and_is_metered_once(stack: Any, devices: Any, new_customer: Any):
    customer = await new_customer()
    async with devices.device(customer, "audio") as device:
        await device.say(wire.Speak(1, "Hello there, this is a test."))
        sound, *pieces, done = await device.answer(1)
        assert isinstance(sound, wire.Sound)
        assert done == wire.Done(1)
        assert all(isinstance(piece, bytes) and len(piece) <= sound.rate * 2 * requests.CHUNK for piece in pieces)
        seconds = sum(map(len, pieces)) / 2 / sound.rate
        assert seconds > 1
    [quantity] = await used(stack, customer, "tts_audio_seconds")
    assert abs(quantity - seconds) < 1e-3


async def test_a_voice_is_the_tenants_its_personas_or_one_that_there_is(
    stack: Any, devices: Any, new_customer: Any, monkeypatch: pytest.MonkeyPatch
):
    customer = await new_customer(voice="slt", speed=1.5)
    character = personas.Character("Ada", voice="rms", speed=0.75)
    ada = await personas.create(stack.database, customer.id, character)
    said: list[tuple[str, float]] = []

    async def stream(engines: Engines, text: str, settings: Any, tenant: uuid.UUID, **_: Any) -> AsyncIterator[Speech]:
        said.append((settings.voice, settings.speed))
        yield Speech(bytes(320), 16_000)

    monkeypatch.setattr(Engines, "stream", stream)
    async with devices.device(customer, "audio") as device:
        known = (await stack.engines.voices())[0].name
        assert (await device.configured()).voice == "slt"
        for number, voice in enumerate(("", known, "nobody"), 1):
            await device.say(wire.Speak(number, "hello", "", voice))
            assert (await device.answer(number))[-1] == wire.Done(number)
        await personas.make_default(stack.database, customer.id, ada.id)
        told = await device.configured()
        assert (told.persona, told.voice, told.speed) == ("Ada", "rms", 0.75)
        await device.say(wire.Speak(4, "hello"))
        await device.answer(4)
    assert said == [("slt", 1.5), (known, 1.5), ("slt", 1.5), ("rms", 0.75)]


async def test_what_was_spoken_is_metered_also_when_nobody_waits_for_the_rest(
    stack: Any, devices: Any, new_customer: Any, monkeypatch: pytest.MonkeyPatch
):
    customer = await new_customer()
    closed = 0

    async def stream(*_: Any, **__: Any) -> AsyncIterator[Speech]:
        nonlocal closed
        try:
            yield Speech(bytes(32_000), 16_000)
            await asyncio.Event().wait()
        finally:
            closed += 1

    monkeypatch.setattr(Engines, "stream", stream)
    async with devices.device(customer, "audio") as device:
        await device.say(wire.Speak(1, "hello"))
        await device.next(1)
        await device.say(wire.Cancel(1))

        async def metered() -> bool:
            return await used(stack, customer, "tts_audio_seconds") == [1.0]

        await until(metered)
        await device.say(wire.Speak(2, "hello"))
        await device.next(2)

    async def twice() -> bool:
        return await used(stack, customer, "tts_audio_seconds") == [1.0, 1.0]

    await until(twice)
    assert closed == 2


async def test_a_device_that_takes_nothing_makes_its_engine_wait(
    devices: Any, new_customer: Any, stack: Any, monkeypatch: pytest.MonkeyPatch
):
    customer = await new_customer()
    monkeypatch.setattr(requests, "ENOUGH", 100_000)
    made = 0

    async def stream(*_: Any, **__: Any) -> AsyncIterator[Speech]:
        nonlocal made
        for _ in range(400):
            made += 1
            yield Speech(bytes(96_000), 48_000)

    monkeypatch.setattr(Engines, "stream", stream)
    async with connect(devices.url, additional_headers=customer.headers, compression=None, max_queue=1) as raw:
        await raw.send(wire.encode(wire.Hello("audio")))
        await raw.recv()
        await raw.recv()
        await raw.send(wire.encode(wire.Speak(1, "hello")))

        async def is_making() -> bool:
            return made > 0

        await until(is_making)
        before = -1
        while before != made:
            before = made
            await asyncio.sleep(0.3)
        assert 0 < made < 400
        [visit] = [each for each in stack.gateway.live if each.grant.tenant_id == customer.id]
        assert visit.connection._outbox.size < 2 * 96_000 + 100_000
        got = 0
        while not isinstance(frame := await raw.recv(), str) or "done" not in frame:
            got += len(frame) - 4 if isinstance(frame, bytes) else 0
    assert got == 400 * 96_000


@pytest.mark.parametrize(
    ("said", "code"), [("", "validation_error"), (" \n", "validation_error"), ("x" * 8_001, "text_too_long")]
)
async def test_texts_that_cannot_be_spoken_or_asked(devices: Any, customer: Any, said: str, code: str):
    async with devices.device(customer) as device:
        await device.say(wire.Speak(1, said), wire.Ask(2, said))
        for number in (1, 2):
            [problem] = await device.answer(number)
            assert problem.code == code


# --- answering --------------------------------------------------------------------------------------------------------


async def ask(device: Any, number: int, said: str, **more: Any) -> str:
    await device.say(wire.Ask(number, said, **more))
    *pieces, done = await device.answer(number)
    assert done == wire.Done(number), done
    return "".join(piece.text for piece in pieces)


async def test_a_conversation_is_the_devices_whichever_socket_asks(
    stack: Any, devices: Any, talker: Any, language_model: Any
):
    async with devices.device(talker, "core") as core, devices.device(talker, "listener") as listener:
        assert await ask(core, 1, "first question") == "Hello there."
        assert await ask(listener, 1, "second question") == "Hello there."
    said = [message["content"] for message in language_model.asked[-1]["messages"][1:]]
    assert said == ["first question", "Hello there.", "second question"]
    assert sum(await used(stack, talker, "llm_input_tokens")) == 14
    async with devices.device(talker, "core") as core:
        assert await ask(core, 1, "third question") == "Hello there."
    assert len(language_model.asked[-1]["messages"]) == 6, "a network that broke does not end it"


async def test_a_conversation_that_is_brought_along_stands_alone(devices: Any, talker: Any, language_model: Any):
    messages = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    async with devices.device(talker, "core") as device:
        await ask(device, 1, "", messages=[*messages, {"role": "user", "content": "three"}])
        assert [each["content"] for each in language_model.asked[-1]["messages"][1:]] == ["one", "two", "three"]
        await ask(device, 2, "four")
        assert [each["content"] for each in language_model.asked[-1]["messages"][1:]] == ["four"]
        for number, bad in enumerate(([], [{}], ["x"], messages, [{"role": "tool", "content": "x"}]), 3):
            await device.say(wire.Ask(number, messages=bad))
            [problem] = await device.answer(number)
            assert problem.code == "validation_error"


async def test_who_answers_changes_by_voice_and_by_choice_for_all_sockets_of_the_device(
    stack: Any, devices: Any, talker: Any, language_model: Any
):
    issued = await keys.issue(stack.database, talker.id, "other", ("realtime",), rate_class=RateClass.UNLIMITED)
    another = dataclasses.replace(talker, key=issued.key, key_id=issued.id)
    async with (
        devices.device(talker, "core") as core,
        devices.device(talker, "audio") as audio,
        devices.device(another, "core") as neighbour,
    ):
        for device in (core, audio, neighbour):
            told = await device.configured()
            assert (told.persona, told.personas) == ("House", ("Ada", "Bo"))
        assert "Ada" in await ask(core, 1, "talk to Ada", language="en-us")
        assert (await core.configured()).persona == (await audio.configured()).persona == "Ada"
        await ask(core, 2, "colorless ideas")
        assert "You are Ada." in language_model.asked[-1]["messages"][0]["content"]
        await core.say(wire.Choose(3, "bo"))
        assert await core.answer(3) == [wire.Told(3, {"persona": "Bo"})]
        assert (await core.configured()).persona == (await audio.configured()).persona == "Bo"
        await core.say(wire.Choose(4, "Zebediah"))
        assert [problem.code for problem in await core.answer(4)] == ["persona_not_found"]
        await audio.say(wire.Choose(5, ""))
        assert await audio.answer(5) == [wire.Told(5, {"persona": "House"})]
        assert neighbour.choices.empty(), "another device of the tenant talks to whom it likes"


async def test_a_persona_that_goes_takes_nobody_with_it(stack: Any, devices: Any, talker: Any, language_model: Any):
    async with devices.device(talker, "core") as device:
        await device.configured()
        await device.say(wire.Choose(1, "Ada"))
        await device.answer(1)
        assert (await device.configured()).persona == "Ada"
        ada = next(id_ for id_, name in await personas.names(stack.database, talker.id) if name == "Ada")
        await personas.delete(stack.database, talker.id, ada)
        told = await device.configured()
        assert (told.persona, told.personas) == ("House", ("Bo",))
        await ask(device, 2, "colorless ideas")
        assert "You are House" in language_model.asked[-1]["messages"][0]["content"]


async def test_an_answer_nobody_wants_is_ended_and_its_tokens_are_metered_once(
    stack: Any, devices: Any, talker: Any, language_model: Any
):
    language_model.says("one ", "two ", "three", hold_after=2)
    async with devices.device(talker, "core") as device:
        await device.say(wire.Ask(1, "a question"))
        assert await device.next(1) == wire.Text(1, "one ")
        await device.say(wire.Cancel(1))
        await asyncio.wait_for(language_model.hung_up.wait(), 30)

        async def metered() -> bool:
            return len(await used(stack, talker, "llm_output_tokens")) == 1

        await until(metered)


async def test_a_device_is_told_whose_it_is(devices: Any, talker: Any):
    async with devices.device(talker, "core") as device:
        await device.say(wire.About(1, "skill-account.agentvoicebox"), wire.About(2, "../etc"))
        [told] = await device.answer(1)
        assert (told.about["tenant"]["name"], told.about["persona"], told.about["locale"]) == (
            talker.name,
            "House",
            "en-US",
        )
        [problem] = await device.answer(2)
        assert problem.code == "validation_error"


# --- reports ----------------------------------------------------------------------------------------------------------


def event(**changes: Any) -> dict[str, Any]:
    return {"id": uuid.uuid4().hex, "kind": "wake", "at": time.time(), "outcome": "detected", "phrase": "x"} | changes


async def test_what_is_reported_counts_once_and_what_makes_no_sense_not_at_all(
    stack: Any, devices: Any, new_customer: Any, caplog: pytest.LogCaptureFixture
):
    customer = await new_customer()
    events = [event(), event(), event(at="x", phrase="secret words"), "nonsense"]
    async with devices.device(customer) as device:
        for number in (1, 2):
            await device.say(wire.Report(number, events))
            assert await device.answer(number) == [wire.Done(number)]
        await device.say(wire.Report(3, [event() for _ in range(wire.MOST_EVENTS + 1)]), wire.Report(4, []))
        assert [problem.code for problem in await device.answer(3)] == ["too_many_events"]
        assert await device.answer(4) == [wire.Done(4)]
        device_id = uuid.UUID(device.welcome.device_id)
    kept = (await records.events(stack.database, customer.id, device_id)).items
    assert {row.id for row in kept} == {uuid.UUID(each["id"]) for each in events[:2]}
    assert "2 events" in caplog.text
    assert "secret" not in caplog.text


async def test_a_report_that_is_not_in_the_store_is_not_done(
    devices: Any, customer: Any, monkeypatch: pytest.MonkeyPatch
):
    async def away(*_: Any) -> int:
        raise Unavailable("The store does not answer.")

    monkeypatch.setattr(records, "record", away)
    async with devices.device(customer) as device:
        await device.say(wire.Report(1, [event()]))
        assert [problem.code for problem in await device.answer(1)] == ["service_unavailable"]


async def test_whoever_asks_the_store_too_often_waits(devices: Any, new_customer: Any, monkeypatch: pytest.MonkeyPatch):
    customer = await new_customer()  # whose device has not been there with another pace
    monkeypatch.setattr(requests, "PACE", (0.001, 2.0))
    async with devices.device(customer, "audio") as audio, devices.device(customer) as device:
        for each in (audio, device):
            await each.say(wire.Report(1, []))
            assert await each.answer(1) == [wire.Done(1)]
        monkeypatch.setitem(requests.PATIENCE, wire.Report, 0.05)
        await audio.say(wire.Report(2, []), wire.Speak(3, "yes"))
        assert [problem.code for problem in await audio.answer(2)] == ["timeout"]
        assert (await audio.answer(3))[-1] == wire.Done(3)


async def test_long_texts_count_more(devices: Any, customer: Any, monkeypatch: pytest.MonkeyPatch):
    """What has to be read takes as long as it is, whatever it says."""
    spent: list[float] = []
    spend = socket.Budget.spend

    def note(budget: Any, now: float, amount: float = 1) -> float:
        spent.append(amount)
        return spend(budget, now, amount)

    async with devices.device(customer) as device:
        monkeypatch.setattr(socket.Budget, "spend", note)
        await device.say("x" * 100_000)
        await device.say(wire.About(1))
        await device.answer(1)
    assert spent[0] > 10
    assert spent[1] == 1


# --- live configuration -----------------------------------------------------------------------------------------------


async def test_what_an_administrator_changes_arrives_on_all_devices_of_the_tenant_and_no_others(
    stack: Any, devices: Any, new_customer: Any
):
    customer, other = await new_customer(), await new_customer()
    async with (
        devices.device(customer) as device,
        devices.device(customer, "audio") as audio,
        devices.device(other) as stranger,
    ):
        for each in (device, audio, stranger):
            await each.configured()
        word = await wake_words.create(stack.database, customer.id, "okay nabu", sensitivity=0.25)
        for each in (device, audio):
            [told] = (await each.configured()).wake_words
            assert (told.phrase, told.sensitivity, told.id) == ("okay nabu", 0.25, str(word.id))
        await wake_words.update(stack.database, customer.id, word.id, {"enabled": False})
        assert [told.phrase for told in (await device.configured()).wake_words] == ["hey mycroft"]
        await voices.patch(stack.database, customer.id, {"speed": 1.5, "voice": "slt"})
        told = await device.configured()
        assert (told.speed, told.voice) == (1.5, "slt")
        ada = await personas.create(stack.database, customer.id, personas.Character("Ada", voice="rms"))
        assert (await device.configured()).personas == ("Ada",)
        await personas.make_default(stack.database, customer.id, ada.id)
        told = await device.configured()
        assert (told.persona, told.voice, told.speed) == ("Ada", "rms", 1.5)
        await personas.update(stack.database, customer.id, ada.id, {"description": "of which devices know nothing"})
        await tenants.update(stack.database, customer.id, name="Renamed")
        assert (await device.configured()).tenant == "Renamed"
        assert device.choices.empty()
        assert stranger.choices.empty()


async def test_what_changes_while_a_device_arrives_is_not_missed(
    stack: Any, devices: Any, new_customer: Any, monkeypatch: pytest.MonkeyPatch
):
    customer = await new_customer()
    resolve, changed = personas.resolve, False

    async def slow(database: Any, tenant_id: uuid.UUID, *more: Any) -> Any:
        nonlocal changed
        if tenant_id == customer.id and not changed:
            changed = True
            home = stack.gateway.devices._homes[customer.id]
            before = home.changes
            await voices.patch(stack.database, customer.id, {"speed": 1.75})

            async def told() -> bool:
                return home.changes > before and home.task.done() is False

            await until(told)
        return await resolve(database, tenant_id, *more)

    monkeypatch.setattr(personas, "resolve", slow)
    async with devices.device(customer) as device:
        told = await device.configured()
        while told.speed != 1.75:
            told = await device.configured()


async def test_a_store_that_is_away_delays_the_news(
    stack: Any, devices: Any, new_customer: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(places, "AGAIN", 0.01)
    customer = await new_customer()
    async with devices.device(customer) as device:
        await device.configured()
        read, asked = house.read, 0

        async def busy(*arguments: Any) -> Any:
            nonlocal asked
            asked += 1
            if asked < 4:
                raise Unavailable("The store does not answer.")
            return await read(*arguments)

        monkeypatch.setattr(house, "read", busy)
        await voices.patch(stack.database, customer.id, {"speed": 0.75})
        assert (await device.configured()).speed == 0.75


async def test_after_a_gap_everything_is_read_anew(
    stack: Any, devices: Any, new_customer: Any, monkeypatch: pytest.MonkeyPatch
):
    customer = await new_customer()
    async with devices.device(customer) as device:
        await device.configured()
        passed_over: list[uuid.UUID] = []
        # As when nobody tells us.
        monkeypatch.setattr(places.Devices, "_renew", lambda _, tenant_id: passed_over.append(tenant_id))
        await voices.patch(stack.database, customer.id, {"speed": 0.75})

        feed, patched = stack.gateway.door.keyring._feed, time.monotonic()

        async def has_come() -> bool:
            return feed.fresh_until >= patched + changes._LEASE

        await until(has_come)
        assert customer.id in passed_over
        monkeypatch.undo()
        assert device.choices.empty()
        feed._report_gap()
        assert (await device.configured()).speed == 0.75


# --- credentials that die ---------------------------------------------------------------------------------------------


async def test_a_key_that_is_revoked_while_somebody_speaks_ends_it_all(
    stack: Any, devices: Any, new_customer: Any, ear: Ear
):
    customer = await new_customer()
    ear.go.clear()
    async with devices.device(customer) as device:
        await device.say(wire.Listen(1), wire.audio(1, bytes(6_400)), wire.Finish(1))
        await asyncio.wait_for(ear.arrived.wait(), 30)
        await keys.revoke(stack.database, customer.id, customer.key_id)
        assert await device.closed() == (live.UNAUTHORISED, "api_key_revoked")
        assert [problem.code for problem in device.problems] == ["api_key_revoked"]

    async def cancelled() -> bool:
        return ear.cancelled == 1

    await until(cancelled)
    assert device.of(1).empty()


async def test_suspension_a_voice_switched_off_and_removal_close_the_socket(
    stack: Any, devices: Any, new_customer: Any
):
    suspended, silent, removed = [await new_customer() for _ in range(3)]
    async with devices.device(suspended) as one, devices.device(silent) as two, devices.device(removed) as three:
        await tenants.suspend(stack.database, suspended.id, "unpaid")
        assert await one.closed() == (live.SUSPENDED, "tenant_suspended")
        await settings.patch(stack.database, silent.id, {"default_voice_provider": "disabled"})
        assert await two.closed() == (live.UNAUTHORISED, "voice_disabled")
        await records.remove(stack.database, removed.id, uuid.UUID(three.welcome.device_id))
        assert await three.closed() == (live.UNAUTHORISED, "api_key_revoked")


async def test_a_key_that_moves_to_another_project_takes_its_device_along(
    stack: Any, devices: Any, new_customer: Any, ear: Ear
):
    customer = await new_customer()
    shop = await projects.create(stack.database, customer.id, "Shop")
    async with devices.device(customer) as device:
        await keys.update(stack.database, customer.id, customer.key_id, project_id=shop.id)
        assert await device.closed() == (live.MOVED, "project_changed")
        async with devices.device(customer) as again:  # while the first may not have left yet
            assert again.welcome.device_id == device.welcome.device_id
            await again.say(wire.About(1))
            [told] = await again.answer(1)
            assert told.about["project"] == {"id": str(shop.id), "name": "Shop"}
            await again.listen(2, bytes(3_200))
    async with stack.database.tenant(customer.id) as session:
        assert (await session.scalars(text("SELECT project_id FROM usage_events"))).all() == [shop.id]


async def test_a_key_that_expires_closes_the_socket(stack: Any, devices: Any, new_customer: Any):
    customer = await new_customer()
    async with devices.device(customer) as device:
        await keys.rotate(stack.database, customer.id, customer.key_id, grace=0)
        assert (await device.closed())[0] == live.UNAUTHORISED


# --- two tenants ------------------------------------------------------------------------------------------------------


async def test_what_is_one_tenants_is_nobody_elses(stack: Any, devices: Any, talker: Any, language_model: Any):
    """Configuration, personas, conversation, reports and usage; also for who knows the other's ids."""
    issued = await tenants.create(stack.database, f"t-{uuid.uuid4().hex[:12]}", "Other", "enterprise")
    await voices.patch(stack.database, issued.id, {"llm_provider": "compatible", "llm_model": "m"})
    key = await keys.issue(stack.database, issued.id, "k", ("realtime",), rate_class=RateClass.UNLIMITED)
    other = dataclasses.replace(talker, id=issued.id, slug=issued.slug, name="Other", key=key.key, key_id=key.id)
    word = await wake_words.create(stack.database, talker.id, "okay nabu")
    async with devices.device(talker, "core") as ours, devices.device(other, "core") as theirs:
        assert [told.phrase for told in (await ours.configured()).wake_words] == ["okay nabu"]
        told = await theirs.configured()
        assert (told.personas, [each.phrase for each in told.wake_words]) == ((), ["hey mycroft"])
        await ask(ours, 1, "the cellar key lies under the mat")
        await ask(theirs, 1, "where is the key")
        assert "cellar" not in str(language_model.asked[-1])
        ada = next(id_ for id_, _ in await personas.names(stack.database, talker.id))
        for number, name in enumerate(("Ada", str(ada)), 2):
            await theirs.say(wire.Choose(number, name))
            assert [problem.code for problem in await theirs.answer(number)] == ["persona_not_found"]
        same = event(wake_word=str(word.id))
        await ours.say(wire.Report(9, [same]))
        await ours.answer(9)
        await theirs.say(wire.Report(9, [same]))
        await theirs.answer(9)
        for owner, device in ((talker, ours), (other, theirs)):
            kept = await records.events(stack.database, owner.id, uuid.UUID(device.welcome.device_id))
            assert [row.id.hex for row in kept.items] == [same["id"]]
        now = datetime.now(UTC)
        found = await wake_words.analytics(stack.database, talker.id, word.id, now - DAY, now + DAY)
        assert found.detections == 1, "what another tenant reports of it counts for nothing"


async def test_nothing_that_is_said_is_logged(
    devices: Any, talker: Any, language_model: Any, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.DEBUG, "agentvoicebox")
    language_model.says(status=500)
    async with devices.device(talker, "core") as device:
        await device.say(wire.Ask(1, "the cellar key"), wire.Speak(2, "the cellar key"), wire.Choose(3, "the cellar"))
        for number in (1, 2, 3):
            await device.answer(number)
    assert "cellar" not in caplog.text


async def test_an_unexpected_failure_is_told_as_one_and_the_socket_lives(
    devices: Any, customer: Any, ear: Ear, caplog: pytest.LogCaptureFixture
):
    ear.fails = RuntimeError("the cellar key")
    async with devices.device(customer) as device:
        [problem] = await device.listen(1, bytes(640))
        assert problem.code == "internal_error"
        ear.fails = BadInput("no such language", code="language_unknown")
        [problem] = await device.listen(2, bytes(640))
        assert problem.code == "language_unknown"
    assert "RuntimeError" in caplog.text
    assert "cellar" not in caplog.text
