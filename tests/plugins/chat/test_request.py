"""Requests and endpoints are refused early, and translated for those who speak otherwise."""

from __future__ import annotations

from typing import Any

import pytest

from agentvoicebox.config.errors import BadInput
from agentvoicebox.plugins.chat import Endpoint, Request, anthropic, ollama
from agentvoicebox.plugins.chat.addresses import public, resolve
from agentvoicebox.plugins.chat.connections import Lines
from agentvoicebox.plugins.chat.errors import ProviderFailed
from agentvoicebox.plugins.chat.request import measure

USER = {"role": "user", "content": "Hello"}


def called(arguments: str) -> dict[str, Any]:
    """What an assistant says that calls a tool."""
    call = {"id": "c1", "type": "function", "function": {"name": "light", "arguments": arguments}}
    return {"role": "assistant", "content": "Well.", "tool_calls": [call]}


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "Hello",
        [None],
        [{"content": "Hello"}],
        [{"role": "god", "content": "Hello"}],
        [{"role": "user", "content": 7}],
        [{"role": "user", "content": ["Hello"]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "assistant", "tool_calls": "light"}],
        [{"role": "assistant", "tool_calls": [{"id": "c1"}]}],
        [{"role": "user", "content": "\ud800"}],
        [{"role": "user", "content": "Hello", "more": object()}],
    ],
)
def test_messages_that_are_none_are_refused(messages: Any) -> None:
    with pytest.raises(BadInput) as caught:
        measure(Request(messages))
    assert caught.value.code == "messages_invalid"


@pytest.mark.parametrize(
    "more",
    [
        {"temperature": -0.1},
        {"temperature": 2.1},
        {"temperature": float("nan")},
        {"max_tokens": 0},
        {"max_tokens": 5000},
    ],
)
def test_parameters_out_of_bounds_are_refused(more: dict[str, Any]) -> None:
    with pytest.raises(BadInput) as caught:
        measure(Request([USER], **more))
    assert (caught.value.code, caught.value.param) == ("parameter_invalid", *more)


@pytest.mark.parametrize(
    "tools",
    [
        "light",
        [7],
        [{"type": "function"}],
        [{"function": {"name": 7}}],
        [{"function": {"name": "x", "parameters": "nope"}}],
        [{"function": {"name": "x", "description": ["nope"]}}],
    ],
)
def test_tools_that_are_none_are_refused(tools: Any) -> None:
    with pytest.raises(BadInput) as caught:
        measure(Request([USER], tools=tools))
    assert caught.value.code == "messages_invalid"


@pytest.mark.parametrize("choice", [{"function": "x"}, {"function": {}}, {"name": 7}, {}, "any", 7, ["auto"], True])
def test_choices_of_tools_that_are_none_are_refused(choice: Any) -> None:
    tools = [{"type": "function", "function": {"name": "x"}}]
    with pytest.raises(BadInput) as caught:
        measure(Request([USER], tools=tools, tool_choice=choice))
    assert (caught.value.code, caught.value.param) == ("messages_invalid", "tool_choice")
    for good in (None, "auto", "none", "required", {"type": "function", "name": "x"}, {"function": {"name": "x"}}):
        assert measure(Request([USER], tools=tools, tool_choice=good)) > 0


@pytest.mark.parametrize(
    ("provider", "url", "trusted", "code"),
    [
        ("skynet", "", True, "provider_unknown"),
        ("compatible", "", True, "provider_url_invalid"),
        ("compatible", "models.example", True, "provider_url_invalid"),
        ("compatible", "ftp://models.example", True, "provider_url_invalid"),
        ("compatible", "https://me:secret@models.example", True, "provider_url_invalid"),
        ("compatible", "https://models.example/?key=secret", True, "provider_url_invalid"),
        ("compatible", "https://models.example/#x", True, "provider_url_invalid"),
        ("compatible", "https://models.example:99999", True, "provider_url_invalid"),
        ("compatible", "https://models .example", True, "provider_url_invalid"),
        ("compatible", "https://models.example\n", True, "provider_url_invalid"),
        ("compatible", "http://models.example", False, "provider_url_invalid"),
        ("ollama", "", False, "provider_url_invalid"),
    ],
)
def test_endpoints_that_cannot_be_asked_are_refused(provider: str, url: str, trusted: bool, code: str) -> None:
    with pytest.raises(BadInput) as caught:
        Endpoint(provider, "key", url, trusted)
    assert caught.value.code == code
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("key", ["a\r\nHost: evil", "schlüssel"])
def test_keys_that_are_none_are_refused(key: str) -> None:
    with pytest.raises(BadInput) as caught:
        Endpoint("openai", key)
    assert caught.value.code == "provider_key_invalid"


def test_an_endpoint_keeps_its_key_to_itself() -> None:
    assert repr(Endpoint("openai", "secret")) == "Endpoint(provider='openai', url='', trusted=True)"
    assert Endpoint("openai", "a") != Endpoint("openai", "b")
    assert len({Endpoint("openai", "a"), Endpoint("openai", "a")}) == 1


def test_anthropic_gets_a_conversation_that_begins_with_the_user() -> None:
    made = anthropic.messages(
        Request([{"role": "assistant", "content": "Hi!"}, {"role": "user", "content": " "}, USER, called("{}")])
    )
    assert [each["role"] for each in made["messages"]] == ["user", "assistant"]
    assert made["messages"][0]["content"] == [{"type": "text", "text": "Hello"}]
    assert made["messages"][1]["content"][1] == {"type": "tool_use", "id": "c1", "name": "light", "input": {}}
    alone = anthropic.messages(Request([{"role": "system", "content": "A"}, {"role": "developer", "content": "B"}]))
    assert alone == {"messages": [{"role": "user", "content": [{"type": "text", "text": "B"}]}], "system": "A"}


@pytest.mark.parametrize(
    ("choice", "made"),
    [
        ("auto", {"type": "auto"}),
        ("none", {"type": "none"}),
        ("required", {"type": "any"}),
        ({"type": "function", "function": {"name": "light"}}, {"type": "tool", "name": "light"}),
        (None, None),
    ],
)
def test_anthropic_gets_a_choice_of_tools(choice: Any, made: Any) -> None:
    tools = [{"type": "function", "function": {"name": "light"}}]
    asked = anthropic.messages(Request([USER], tools=tools, tool_choice=choice))
    assert asked.get("tool_choice") == made
    assert asked["tools"] == [{"name": "light", "input_schema": {"type": "object"}}]


def test_ollama_gets_the_tools_that_may_be_used() -> None:
    tools = [{"type": "function", "function": {"name": name}} for name in ("light", "door")]
    choices: list[Any] = [None, "none", {"type": "function", "function": {"name": "door"}}]
    assert [ollama.tools(Request([USER], tools=tools, tool_choice=each)) for each in choices] == [tools, [], tools[1:]]


@pytest.mark.parametrize("arguments", ["{", "[1]", '"on"'])
def test_arguments_that_are_no_object_are_refused(arguments: str) -> None:
    for translate in (anthropic.messages, ollama.messages):
        with pytest.raises(BadInput) as caught:
            translate(Request([USER, called(arguments)]))
        assert caught.value.code == "messages_invalid"


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_lines_are_the_same_however_they_are_cut(size: int) -> None:
    text = b': hello\r\ndata: {"a": 1}\r\n\r\nevent: x\ndata:two\n\nid: 7\nretry: 1\ndata: [DONE]'
    lines, found = Lines(), list[bytes]()
    for start in range(0, len(text), size):
        found += lines.feed(text[start : start + size])
    assert found + lines.end() == [b'{"a": 1}', b"two", b"[DONE]"]


def test_what_is_no_event_stream_is_garbage() -> None:
    with pytest.raises(ProviderFailed):
        Lines().feed(b"<html>\n")


PUBLIC = ["8.8.8.8", "2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]
OTHERS = [
    "10.0.0.1",
    "172.16.0.1",
    "192.168.1.1",
    "127.0.0.1",
    "0.0.0.0",
    "169.254.169.254",
    "100.64.0.1",
    "100.127.255.255",
    "224.0.0.1",
    "240.0.0.1",
    "255.255.255.255",
    "192.0.2.1",
    "198.18.0.1",
    "::",
    "::1",
    "fe80::1",
    "fe80::1%eth0",
    "fec0::1",
    "fc00::1",
    "fd00:ec2::254",
    "ff02::1",
    "ff0e::1",
    "2001:db8::1",
    "::ffff:10.0.0.1",
    "::ffff:127.0.0.1",
    "64:ff9b::a00:1",
    "64:ff9b::a9fe:a9fe",
    "2002:a00:1::",
    "2002:7f00:1::",
    "2001:0:4136:e378:8000:63bf:f5ff:fffe",
    "::10.0.0.1",
    "localhost",
    "127.1",
]


def test_only_public_addresses_are_public() -> None:
    assert [each for each in PUBLIC if not public(each)] == []
    assert [each for each in OTHERS if public(each)] == []


async def test_names_are_resolved_to_all_their_addresses() -> None:
    assert set(await resolve("localhost", 443)) <= {"127.0.0.1", "::1"}
