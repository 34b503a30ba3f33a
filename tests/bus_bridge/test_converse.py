"""Realtime sessions that the language model answers without core, with the unmodified `openai` package."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from typing import Any

import pytest
from openai import AsyncOpenAI

from agentvoicebox.tenancy import sessions, usage
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
    async with asyncio.timeout(20):
        async for event in connection:
            assert event.type != "error", event
            if event.type == "response.done":
                return event.response


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
        assert (await answered(connection)).output[0].content[0].text == "It rains in Oslo."
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
    async with asyncio.timeout(10):
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
        async with asyncio.timeout(20):
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
        async with asyncio.timeout(20):
            while not language_model.asked:
                await asyncio.sleep(0.01)
        await connection.response.cancel()
        assert (await answered(connection)).status == "cancelled"
        async with asyncio.timeout(10):
            await language_model.hung_up.wait()


async def test_without_a_language_model_the_answer_fails_by_name(stack: Any, customer: Any):
    async with connected(stack, customer.key) as connection:
        await connection.conversation.item.create(item=written("hello"))
        await connection.response.create(response={"output_modalities": ["text"], "instructions": "Be kind."})
        response = await answered(connection)
    assert response.status == "failed"
    assert response.status_details.error.code == "no_language_model"
