"""What is kept of a conversation with tools until its question is answered."""

from __future__ import annotations

from agentvoicebox.bus_bridge.calls import MOST_MESSAGES, Call, Calls

WEATHER = Call("call_1", "weather", '{"city": "Oslo"}')


def test_a_call_and_what_it_returned_go_back_to_the_model():
    calls = Calls()
    calls.asked("how is the weather in Oslo")
    calls.called("", [WEATHER])
    assert calls.returned("call_1", "rain")
    assert calls.complete() == [
        {"role": "user", "content": "how is the weather in Oslo"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    ]
    assert calls.question == "how is the weather in Oslo"
    calls.end()
    assert calls.complete() == []


def test_a_provider_never_sees_a_call_without_a_result():
    calls = Calls()
    calls.asked("two things")
    calls.called("Let me see.", [WEATHER, Call("call_2", "time", "{}")])
    calls.returned("call_2", "noon")
    calls.asked("and hurry")
    roles = [(each["role"], each.get("tool_call_id")) for each in calls.complete()]
    assert roles == [("user", None), ("assistant", None), ("tool", "call_1"), ("tool", "call_2"), ("user", None)]


def test_what_nobody_called_returns_nothing():
    calls = Calls()
    assert not calls.returned("call_9", "surprise")
    assert calls.complete() == []


def test_an_exchange_that_never_ends_is_bounded():
    calls = Calls()
    for number in range(3 * MOST_MESSAGES):
        calls.called("", [Call(f"call_{number}", "again", "{}")])
        calls.returned(f"call_{number}", "ok")
    messages = calls.complete()
    assert len(messages) <= 2 * MOST_MESSAGES
    wanted = [call["id"] for each in messages for call in each.get("tool_calls") or ()]
    assert wanted == [each["tool_call_id"] for each in messages if each["role"] == "tool"]
