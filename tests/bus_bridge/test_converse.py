"""Realtime sessions that the language model answers without core, with the unmodified `openai` package."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import uuid
from typing import Any

import pytest
from openai import AsyncOpenAI
from websockets.exceptions import ConnectionClosed

from agentvoicebox.bus_bridge import converse
from agentvoicebox.bus_bridge import events as ev
from agentvoicebox.bus_bridge.calls import Call, Calls, Wish
from agentvoicebox.bus_bridge.converse import Conversation
from agentvoicebox.bus_bridge.models import SessionSettings, Tokens, TurnStatus
from agentvoicebox.bus_bridge.realtime.codec import RealtimeCodec
from agentvoicebox.bus_bridge.talk import Talk
from agentvoicebox.plugins.chat import Delta
from agentvoicebox.plugins.chat import Tokens as Used
from agentvoicebox.tenancy import personas, sessions, usage
from agentvoicebox.tenancy.usage import Period

WEATHER = {
    "type": "function",
    "name": "weather",
    "description": "Tells the weather.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}


@pytest.fixture
async def shop(stack: Any, new_customer: Any, language_model: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A tenant whose language model is the test's own."""
    answers = stack.gateway.answers
    monkeypatch.setattr(answers, "_settings", dataclasses.replace(stack.settings, compatible_url=language_model.url))
    return await new_customer(llm_provider="compatible", llm_model="m")


def written(text: str) -> dict[str, Any]:
    return {"type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]}


async def answered(connection: Any) -> Any:
    """The response, when it is done; events that say otherwise fail the test."""
    async with asyncio.timeout(60):
        async for event in connection:
            assert event.type != "error", event
            if event.type == "response.done":
                return event.response


async def news(connection: Any, kind: str) -> Any:
    """The next event of that kind, whatever comes before it."""
    async with asyncio.timeout(60):
        async for event in connection:
            if event.type == kind:
                return event


def connected(stack: Any, key: str, model: str = "gpt-realtime") -> Any:
    client = AsyncOpenAI(api_key=key, base_url=f"{stack.url}/v1", max_retries=0)
    return client.realtime.connect(model=model)


async def test_a_function_is_called_and_its_result_answered(stack: Any, shop: Any, language_model: Any):
    call = {"index": 0, "id": "call_7", "type": "function", "function": {"name": "weather", "arguments": '{"city":'}}
    more = {"index": 0, "function": {"arguments": ' "Oslo"}'}}
    language_model.says({"tool_calls": [call]}, {"tool_calls": [more]}, finish="tool_calls")
    async with connected(stack, shop.key) as connection:
        session = {"type": "realtime", "output_modalities": ["text"], "tools": [WEATHER], "instructions": "Be brief."}
        await connection.session.update(session=session)
        await connection.conversation.item.create(item=written("how is the weather in Oslo"))
        await connection.response.create()
        response = await answered(connection)
        (item,) = response.output
        assert (item.type, item.name, item.call_id) == ("function_call", "weather", "call_7")
        assert json.loads(item.arguments) == {"city": "Oslo"}
        asked = language_model.asked[0]
        assert asked["tools"][0]["function"]["name"] == "weather"
        assert any("Be brief." in str(each["content"]) for each in asked["messages"] if each["role"] == "system")

        language_model.says("It rains", " in Oslo.")
        result = {"type": "function_call_output", "call_id": "call_7", "output": "rain"}
        await connection.conversation.item.create(item=result)
        await connection.response.create()
        response = await answered(connection)
        assert response.output[0].content[0].text == "It rains in Oslo."
        assert (response.usage.input_token_details.text_tokens, response.usage.output_tokens) == (7, 3)
        told = [(each["role"], each.get("content")) for each in language_model.asked[1]["messages"]]
        assert told[-3:] == [("user", "how is the weather in Oslo"), ("assistant", None), ("tool", "rain")]

        # What is said next has all that behind it, and no open call.
        await connection.conversation.item.create(item=written("thanks"))
        await connection.response.create()
        await answered(connection)
        told = [(each["role"], each["content"]) for each in language_model.asked[2]["messages"][-3:]]
        assert told == [
            ("user", "how is the weather in Oslo"),
            ("assistant", "It rains in Oslo."),
            ("user", "thanks"),
        ]
    amounts = (await usage.summary(stack.database, shop.id, Period.MONTH)).amounts
    assert (amounts.llm_input_tokens, amounts.llm_output_tokens) == (21, 9)


async def test_the_sessions_record_tells_its_tokens(stack: Any, shop: Any, language_model: Any):
    async with connected(stack, shop.key) as connection:
        await connection.session.update(session={"type": "realtime", "output_modalities": ["text"], "tools": [WEATHER]})
        await connection.conversation.item.create(item=written("hello"))
        await connection.response.create()
        await answered(connection)
    async with asyncio.timeout(30):
        while True:
            (row,) = (await sessions.list_(stack.database, shop.id)).items
            if row.ended_at is not None:
                break
            await asyncio.sleep(0.05)
    assert (row.input_tokens, row.output_tokens) == (7, 3)


async def test_an_answer_apart_has_its_own_input_and_leaves_no_trace(stack: Any, shop: Any, language_model: Any):
    language_model.says("spam")
    async with connected(stack, shop.key) as connection:
        await connection.response.create(
            response={
                "conversation": "none",
                "metadata": {"topic": "classification"},
                "output_modalities": ["text"],
                "instructions": "Classify the message.",
                "input": [written("win a million")],
            }
        )
        response = await answered(connection)
        assert response.metadata == {"topic": "classification"}
        assert response.conversation_id is None
        assert response.output[0].content[0].text == "spam"
        language_model.says("Hello.")
        await connection.conversation.item.create(item=written("hello"))
        await connection.response.create(response={"output_modalities": ["text"], "instructions": "Be kind."})
        await answered(connection)
    assert "win a million" in str(language_model.asked[0]["messages"])
    assert "win a million" not in str(language_model.asked[1]["messages"])


async def test_a_spoken_answer_of_the_model_comes_sentence_by_sentence(stack: Any, shop: Any, language_model: Any):
    language_model.says("It is sunny. Enjoy", " your", " day.", hold_after=1)
    async with connected(stack, shop.key) as connection:
        await connection.conversation.item.create(item=written("how is the weather"))
        await connection.response.create(response={"instructions": "Be brief."})
        heard = ""
        async with asyncio.timeout(60):
            async for event in connection:
                assert event.type != "error", event
                if event.type == "response.output_audio_transcript.delta":
                    heard += event.delta
                elif event.type == "response.output_audio.delta" and not language_model.go_on.is_set():
                    assert heard == "It is sunny.", "the first sentence is heard while the model still writes"
                    language_model.go_on.set()
                elif event.type == "response.done":
                    break
        assert heard == "It is sunny. Enjoy your day."


async def test_a_client_that_cancels_ends_the_models_work(stack: Any, shop: Any, language_model: Any):
    language_model.says("One. ", "Two.", hold_after=1)
    async with connected(stack, shop.key) as connection:
        await connection.conversation.item.create(item=written("count"))
        await connection.response.create(response={"output_modalities": ["text"], "instructions": "Count."})
        async with asyncio.timeout(60):
            while not language_model.asked:
                await asyncio.sleep(0.01)
        await connection.response.cancel()
        assert (await answered(connection)).status == "cancelled"
        async with asyncio.timeout(30):
            await language_model.hung_up.wait()


async def test_without_a_language_model_the_answer_fails_by_name(stack: Any, customer: Any):
    async with connected(stack, customer.key) as connection:
        await connection.conversation.item.create(item=written("hello"))
        await connection.response.create(response={"output_modalities": ["text"], "instructions": "Be kind."})
        response = await answered(connection)
    assert response.status == "failed"
    assert response.status_details.error.code == "no_language_model"


async def test_what_nobody_called_is_refused_and_answered_by_nobody(stack: Any, shop: Any, language_model: Any):
    async with connected(stack, shop.key) as connection:
        await connection.session.update(session={"type": "realtime", "output_modalities": ["text"], "tools": [WEATHER]})
        result = {"type": "function_call_output", "call_id": "call_9", "output": "surprise"}
        await connection.conversation.item.create(item=result)
        assert (await news(connection, "error")).error.code == "unknown_call"
        await connection.response.create()
        assert (await news(connection, "error")).error.code == "nothing_to_answer"
    assert language_model.asked == []


async def test_an_answer_to_read_is_what_the_model_wrote(stack: Any, shop: Any, language_model: Any):
    pieces = ("# Sum\n\nAdd", " them:\n\n```python\n\nx = 1\n\n\n", "y = 2\n```\n\n* a\n* b")
    language_model.says(*pieces, hold_after=1)
    heard: list[str] = []
    async with connected(stack, shop.key) as connection:
        await connection.conversation.item.create(item=written("add two numbers"))
        await connection.response.create(response={"output_modalities": ["text"], "instructions": "Be brief."})
        async with asyncio.timeout(60):
            async for event in connection:
                if event.type == "response.output_text.delta":
                    heard.append(event.delta)
                    language_model.go_on.set()  # the first words are told while the model still writes
                elif event.type == "response.done":
                    break
    assert "".join(heard) == "".join(pieces)
    assert event.response.output[0].content[0].text == "".join(pieces)


async def test_whom_the_user_wants_to_talk_to_answers_in_sessions_with_tools_too(
    stack: Any, shop: Any, language_model: Any
):
    ada = personas.Character("Ada", system_prompt="You count.", voice="rms", speed=1.2)
    bob = personas.Character("Bob", system_prompt="You sail.", speed=0.8)
    for character in (ada, bob):
        await personas.create(stack.database, shop.id, character)
    async with connected(stack, shop.key, "persona:Ada") as connection:
        session = {"type": "realtime", "output_modalities": ["text"], "tools": [WEATHER]}
        await connection.session.update(session=session | {"audio": {"output": {"speed": 1.5}}})
        await connection.conversation.item.create(item=written("talk to Bob"))
        await connection.response.create()
        assert "Bob" in (await answered(connection)).output[0].content[0].text
        assert language_model.asked == []
        await connection.conversation.item.create(item=written("hello"))
        await connection.response.create()
        await answered(connection)
        assert "You sail." in language_model.asked[0]["messages"][0]["content"]
        await connection.session.update(session={"type": "realtime"})
        output = (await news(connection, "session.updated")).session.audio.output
    assert (output.voice, output.speed) == ("rms", 1.5), "left open by Bob, and chosen by the client"


async def test_a_switch_by_voice_leaves_what_the_client_has_chosen(stack: Any, shop: Any, sockets: Any):
    bob = personas.Character("Bob", voice="rms", speed=0.8)
    await personas.create(stack.database, shop.id, bob)
    stack.gateway.answers.forget(shop.id)
    async with sockets.native(shop, modality="text", speed=1.5) as socket:
        message = {"type": "response.create", "messages": [{"role": "user", "content": "talk to Bob"}]}
        await socket.send(json.dumps(message))
        while (event := await sockets.read(socket))["type"] != "session.updated":
            assert event["type"] != "response.done", event
    assert (event["data"]["config"]["voice"], event["data"]["config"]["speed"]) == ("rms", 1.5)


async def test_the_voice_of_a_persona_that_is_gone_goes_with_it(stack: Any, shop: Any, language_model: Any):
    default = await personas.create(stack.database, shop.id, personas.Character("Ada", voice="rms"))
    await personas.make_default(stack.database, shop.id, default.id)
    gone = await personas.create(stack.database, shop.id, personas.Character("Bob", voice="awb"))
    async with connected(stack, shop.key) as connection:
        await connection.session.update(session={"type": "realtime", "output_modalities": ["text"], "tools": [WEATHER]})
        await connection.conversation.item.create(item=written("talk to Bob"))
        await connection.response.create()
        await answered(connection)
        await personas.delete(stack.database, shop.id, gone.id)
        stack.gateway.answers.forget(shop.id)
        await connection.conversation.item.create(item=written("who am I talking to"))
        await connection.response.create()
        assert (await news(connection, "session.updated")).session.audio.output.voice == "rms"
        assert "Ada" in (await answered(connection)).output[0].content[0].text


async def test_a_session_that_cannot_be_told_something_ends(
    stack: Any, shop: Any, language_model: Any, monkeypatch: pytest.MonkeyPatch
):
    def fail(self: RealtimeCodec, told: ev.ReplyText) -> list[str]:
        raise UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed")

    monkeypatch.setattr(RealtimeCodec, "_text", fail)
    async with connected(stack, shop.key) as connection:
        await connection.conversation.item.create(item=written("hello"))
        await connection.response.create(response={"output_modalities": ["text"], "instructions": "Be kind."})
        with pytest.raises(ConnectionClosed) as caught:
            await news(connection, "response.done")
    assert caught.value.rcvd is not None
    assert caught.value.rcvd.code == 1011
    async with asyncio.timeout(30):
        while (row := (await sessions.list_(stack.database, shop.id)).items[0]).ended_at is None:
            await asyncio.sleep(0.05)
    kinds = [line.event_type for line in await sessions.history(stack.database, shop.id, row.id)]
    assert kinds == ["transcript", "response"], "the turn has ended, and is written down"


class Script:
    """Stands where `Answers` stands: gives the deltas of a test."""

    def __init__(self, *deltas: Delta) -> None:
        self._deltas = deltas

    async def obey(self, *_: Any) -> None:
        return None

    async def answering(self, *_: Any) -> None:
        return None

    async def stream(self, *_: Any, **__: Any) -> Any:
        for delta in self._deltas:
            yield delta


def conversation(*deltas: Delta) -> Conversation:
    name = uuid.UUID(int=1)
    return Conversation(Script(*deltas), name, name, Talk(), Calls())  # type: ignore[arg-type]


@pytest.mark.parametrize("speaks", [True, False])
async def test_whatever_the_model_is_at_keeps_the_session_waiting(speaks: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(converse, "SIGN", 0.0)
    piece = {"index": 0, "function": {"name": "weather", "arguments": "{"}}
    told: list[ev.Event] = []
    asked = ev.Converse("resp_1", "hello", Wish(), speaks)
    talk = conversation(Delta(tool_calls=[piece]), Delta("A long sentence"), Delta(finish="stop", tokens=Used(7, 3)))
    await talk.answer(asked, SessionSettings(), told.append)
    assert [event for event in told if isinstance(event, ev.Progressed)] == [ev.Progressed("resp_1")] * 3
    assert told[-1] == ev.Handled("resp_1", Tokens(7, 3))


async def test_a_turn_wants_a_bounded_number_of_calls():
    pieces = [{"index": n, "id": f"call_{n}", "function": {"name": "f", "arguments": "{}"}} for n in range(500)]
    told: list[ev.Event] = []
    await conversation(Delta(tool_calls=pieces)).answer(
        ev.Converse("resp_1", "hello", Wish(), False), SessionSettings(), told.append
    )
    calls = [event.call for event in told if isinstance(event, ev.Called)]
    assert calls == [Call(f"call_{n}", "f", "{}") for n in range(64)]


@pytest.mark.parametrize("apology", [True, False])
def test_an_apology_is_no_memory(apology: bool):
    talk = conversation()
    ended = ev.ReplyEnded("resp_1", TurnStatus.COMPLETED, None, None, "No.", 0.0, asked="hello", apology=apology)
    talk.note(ended)
    assert [each["content"] for each in talk.talk.messages()] == ([] if apology else ["hello", "No."])


@pytest.mark.parametrize("wish", [Wish(apart=True), Wish(instructions="Be kind.")])
async def test_an_answer_apart_reads_the_conversation_and_leaves_it(wish: Wish):
    talk = conversation(Delta("Hello."))
    talk.talk.note("before", "Yes.")
    asked = ev.Converse("resp_1", "hello", wish, False)
    await talk.answer(asked, SessionSettings(), lambda event: None)
    assert talk.calls.question == ("" if wish.apart else "hello")
