"""What is kept of a conversation with tools until its question is answered."""

from __future__ import annotations

from agentvoicebox.bus_bridge.calls import MOST_MESSAGES, Call, Calls

WEATHER = Call("call_1", "weather", '{"city": "Oslo"}')


def test_a_call_and_what_it_returned_go_back_to_the_model():
    calls = Calls()
    calls.asked("how is the weather in Oslo")
    calls.called("", [WEATHER])
    calls.returned("call_1", "rain")
    assert calls.tell() == [
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


def told(calls: Calls) -> list[tuple[str, object]]:
    """What the model is told now, by role, calls by their ids."""
    return [(each["role"], each["content"] or [call["id"] for call in each["tool_calls"]]) for each in calls.tell()]


def test_a_call_that_returns_late_is_answered_late():
    calls = Calls()
    calls.asked("how is the weather")
    calls.called("", [WEATHER, Call("call_2", "time", "{}")])
    calls.returned("call_2", "noon")
    calls.asked("well?")
    assert told(calls)[-1] == ("user", "well?")
    assert calls.question == "how is the weather well?"
    calls.end()
    calls.asked("thanks")
    asked = ("user", "how is the weather")
    assert told(calls) == [asked, ("assistant", ["call_1"]), ("tool", "No result yet."), ("user", "thanks")]
    assert calls.question == "thanks", "what was noted is not noted again"
    calls.returned("call_1", "rain")
    calls.end()
    assert told(calls) == [asked, ("assistant", ["call_1"]), ("tool", "rain")], "the model has not been told it yet"
    assert calls.question == "how is the weather"
    calls.end()
    assert calls.complete() == []


def test_a_result_may_come_while_the_answer_that_wants_it_is_still_spoken():
    calls = Calls()
    calls.asked("how is the weather")
    calls.returned("call_1", "rain")
    calls.called("Let me see.", [WEATHER])
    assert told(calls)[-1] == ("tool", "rain")


def test_the_question_outlives_the_calls():
    calls = Calls()
    calls.asked("how is the weather")
    for number in range(MOST_MESSAGES):
        calls.called("", [Call(f"call_{number}", "again", "{}")])
        calls.returned(f"call_{number}", "ok")
    assert calls.question == "how is the weather"
    assert told(calls)[-1] == ("tool", "ok")


def test_all_results_of_the_most_calls_of_a_turn_are_kept():
    calls = Calls()
    calls.asked("everything")
    calls.called("", [Call(f"call_{number}", "again", "{}") for number in range(64)])
    for number in range(64):
        calls.returned(f"call_{number}", "ok")
    assert len(told(calls)) == 66


def test_calls_that_never_return_are_forgotten():
    calls = Calls()
    for number in range(1_000):
        calls.asked(f"question {number}")
        calls.called("", [Call(f"call_{number}", "again", "{}")])
        calls.tell()
        calls.end()
    assert len(calls.complete()) < MOST_MESSAGES + 2


def test_an_exchange_that_never_ends_is_bounded():
    calls = Calls()
    for number in range(3 * MOST_MESSAGES):
        calls.called("", [Call(f"call_{number}", "again", "{}")])
        calls.returned(f"call_{number}", "ok")
    messages = calls.complete()
    assert len(messages) <= 2 * MOST_MESSAGES
    wanted = [call["id"] for each in messages for call in each.get("tool_calls") or ()]
    assert wanted == [each["tool_call_id"] for each in messages if each["role"] == "tool"]
