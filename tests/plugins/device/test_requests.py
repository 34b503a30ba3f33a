"""Requests by themselves: what goes out, in which order, and what becomes of an answer."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import pytest

from agentvoicebox.plugins.device import requests, wire
from agentvoicebox.plugins.device.requests import Answer, Asking, Away, Failed, Listening, Mailbox, Speaking


def nowhere(_: object) -> None:
    """A link that carries nothing."""


def sent(request: requests.Request) -> list[Any]:
    """All that is to be sent now."""
    frames = iter(request.outgoing, None)
    return [
        (wire.split(frame) if isinstance(frame, bytes) else wire.decode(frame, wire.FROM_DEVICE)) for frame in frames
    ]


@pytest.fixture
def listening() -> Listening:
    return Listening(wire.Listen(1), 1, nowhere)


@pytest.fixture
def speaking() -> Speaking:
    return Speaking(wire.Speak(1, "Hello."), 1, nowhere)


@pytest.fixture
def asking() -> Asking:
    return Asking(wire.Ask(1, "Why?"), 1, nowhere)


# --- a mailbox --------------------------------------------------------------------------------------------------------


def test_pieces_come_in_order_and_then_the_end_for_ever() -> None:
    box: Mailbox[int] = Mailbox()
    box.put(1)
    box.put(2)
    box.close()
    box.put(3)
    assert [box.get(), box.get(), box.get(), box.get()] == [1, 2, None, None]


def test_an_error_comes_after_what_came() -> None:
    box: Mailbox[int] = Mailbox()
    box.put(1)
    box.close(Away("gone"))
    box.close()
    assert box.get() == 1
    for _ in range(2):
        with pytest.raises(Away):
            box.get()


def test_nobody_waits_for_ever() -> None:
    with pytest.raises(TimeoutError):
        Mailbox[int]().get(0.01)


def test_a_reader_in_another_thread_is_woken() -> None:
    box: Mailbox[int] = Mailbox()
    found: list[int | None] = []
    reader = threading.Thread(target=lambda: found.append(box.get()))
    reader.start()
    box.put(7)
    reader.join(30)
    assert found == [7]


async def test_a_reader_on_an_event_loop_is_woken() -> None:
    box: Mailbox[int] = Mailbox()
    reader = asyncio.create_task(box.arrive())
    await asyncio.sleep(0)
    threading.Thread(target=box.put, args=(7,)).start()
    assert await reader == 7


def test_a_loop_that_has_been_closed_holds_up_nobody() -> None:
    box: Mailbox[int] = Mailbox()

    async def give_up() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(box.arrive(), 0.01)

    asyncio.run(give_up())
    box.put(7)
    assert box.get() == 7


# --- speech on its way ------------------------------------------------------------------------------------------------


def test_speech_goes_out_in_order_and_its_end_once(listening: Listening) -> None:
    listening.send(b"\1\2\3\4")
    assert sent(listening) == [wire.Listen(1), (1, b"\1\2\3\4")]
    listening.send(b"\5\6")
    listening.finish()
    listening.finish()
    listening.send(b"\7\7")
    assert sent(listening) == [(1, b"\5\6"), wire.Finish(1)]
    assert sent(listening) == []


def test_samples_that_were_cut_in_two_are_whole_again(listening: Listening) -> None:
    for byte in b"\1\2\3\4\5":
        listening.send(bytes([byte]))
    listening.finish()
    assert sent(listening) == [wire.Listen(1), (1, b"\1\2\3\4"), wire.Finish(1)]


def test_what_piled_up_goes_out_in_frames_that_a_platform_takes(listening: Listening) -> None:
    for _ in range(500):
        listening.send(b"\1\2" * 1000)
    _, *audio = sent(listening)
    assert sum(len(pcm) for _, pcm in audio) == 1_000_000
    assert max(len(pcm) for _, pcm in audio) <= wire.LARGEST_FRAME // 4


def test_more_than_a_minute_of_waiting_speech_is_given_up(listening: Listening) -> None:
    sent(listening)
    for _ in range(100):
        listening.send(bytes(requests.BACKLOG // 99))
    with pytest.raises(Away, match="slow"):
        listening.result()
    assert sent(listening) == [wire.Cancel(1)]


def test_a_network_that_keeps_up_may_carry_speech_for_hours(listening: Listening) -> None:
    for _ in range(200):
        listening.send(bytes(32_000))
        sent(listening)
    assert not listening.over


def test_a_transcript_is_the_result(listening: Listening) -> None:
    listening.hear(wire.Partial(1, "what"))
    listening.hear(wire.Transcript(1, "what time is it"))
    assert listening.result().text == "what time is it"
    with pytest.raises(Away, match="already"):
        listening.result()


def test_partials_are_shown_until_that_fails() -> None:
    shown: list[str] = []

    def show(text: str) -> None:
        shown.append(text)
        if text == "what time":
            raise ValueError

    listening = Listening(wire.Listen(1), 1, nowhere, show)
    for text in ("what", "what time", "what time is"):
        listening.hear(wire.Partial(1, text))
    listening.hear(wire.Transcript(1, "what time is it"))
    assert shown == ["what", "what time"]
    assert listening.result().text == "what time is it"


def test_whoever_does_not_wait_any_longer_cancels(listening: Listening) -> None:
    sent(listening)
    with pytest.raises(Away, match="in time"):
        listening.result(0.01)
    assert sent(listening) == [wire.Cancel(1)]
    listening.send(b"\1\2")
    listening.finish()
    assert sent(listening) == []


# --- answers ----------------------------------------------------------------------------------------------------------


def test_speech_comes_with_its_rate(speaking: Speaking) -> None:
    speaking.hear(wire.Sound(1, 22_050))
    speaking.hear_audio(b"\1\2")
    speaking.hear_audio(b"")
    speaking.hear(wire.Sound(1, 24_000))
    speaking.hear_audio(b"\3\4")
    speaking.hear(wire.Done(1))
    assert list(speaking) == [(b"\1\2", 22_050), (b"\3\4", 24_000)]
    assert list(speaking) == []


async def test_answers_can_be_iterated_over_on_a_loop(speaking: Speaking, asking: Asking) -> None:
    speaking.hear(wire.Sound(1, 22_050))
    speaking.hear_audio(b"\1\2")
    speaking.hear(wire.Done(1))
    asking.hear(wire.Text(1, "It is "))
    asking.hear(wire.Text(1, ""))
    asking.hear(wire.Text(1, "ten."))
    asking.end(Away("gone"))
    assert [piece async for piece in speaking] == [(b"\1\2", 22_050)]
    assert [await anext(asking), await anext(asking)] == ["It is ", "ten."]
    with pytest.raises(Away):
        await anext(asking)


@pytest.mark.parametrize(
    "said", [wire.Sound(1, 0), wire.Sound(1, 10**9), wire.Text(1, "x"), wire.Told(1, {}), wire.Partial(1, "x")]
)
def test_an_answer_out_of_order_fails_after_what_came(speaking: Speaking, said: wire.Said) -> None:
    speaking.hear(wire.Sound(1, 22_050))
    speaking.hear_audio(b"\1\2")
    speaking.hear(said)
    assert next(speaking) == (b"\1\2", 22_050)
    with pytest.raises(Failed) as failed:
        next(speaking)
    assert failed.value.code == "platform_garbled"
    assert sent(speaking)[-1] == wire.Cancel(1)


def test_audio_without_a_rate_is_none(speaking: Speaking) -> None:
    speaking.hear_audio(b"\1\2")
    with pytest.raises(Failed):
        next(speaking)


@pytest.mark.parametrize("kind", [Listening, Asking, Answer])
def test_audio_answers_no_other_request(kind: type[Any]) -> None:
    request = kind(wire.About(1), 1, nowhere)
    request.hear_audio(b"\1\2")
    assert request.over


def test_an_answer_that_nobody_reads_is_given_up(speaking: Speaking) -> None:
    speaking.hear(wire.Sound(1, 24_000))
    for _ in range(requests.UNREAD // 100_000 + 2):
        speaking.hear_audio(bytes(100_000))
    assert speaking.over
    with pytest.raises(Failed) as failed:
        list(speaking)
    assert failed.value.code == "not_read"


def test_an_answer_that_is_read_may_be_of_any_length(speaking: Speaking) -> None:
    speaking.hear(wire.Sound(1, 24_000))
    for _ in range(200):
        speaking.hear_audio(bytes(100_000))
        assert len(next(speaking)[0]) == 100_000
    assert not speaking.over


def test_leaving_the_block_cancels_what_has_not_been_answered(asking: Asking) -> None:
    with asking:
        asking.hear(wire.Text(1, "It is "))
    assert sent(asking) == [wire.Ask(1, "Why?"), wire.Cancel(1)]
    assert next(asking) == "It is "
    with pytest.raises(Away) as away:
        next(asking)
    assert away.value.code == "cancelled"


def test_leaving_the_block_after_the_end_says_nothing(asking: Asking) -> None:
    with asking:
        asking.hear(wire.Done(1))
    asking.cancel()
    assert sent(asking) == [wire.Ask(1, "Why?")]


def test_half_a_character_does_not_keep_a_text_from_its_way() -> None:
    frame = Asking(wire.Ask(1, "\ud83d why"), 1, nowhere).outgoing()
    assert isinstance(frame, str)
    assert json.loads(frame.encode())["text"] == "? why"
