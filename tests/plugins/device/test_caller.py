"""Whose message it is that code works for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from ovos_bus_client.message import Message, dig_for_message

from agentvoicebox.plugins.device import caller

OURS = SimpleNamespace(tenant_id="ours")


def handle(message: Message) -> list[Message | None]:
    return deep(5)


def deep(levels: int) -> list[Message | None]:
    return deep(levels - 1) if levels else [caller.message(), dig_for_message()]


def test_the_message_that_is_handled_is_found_as_the_bus_client_finds_it():
    asked = Message("speak")
    assert handle(asked) == [asked, asked]
    assert deep(2) == [None, None]


@pytest.mark.parametrize(
    ("context", "welcome", "foreign"),
    [
        ({}, OURS, False),
        ({}, None, False),
        ({"tenant_id": "ours"}, OURS, False),
        ({"tenant_id": "theirs"}, OURS, True),
        ({"tenant_id": "ours"}, None, True),
        ({"tenant_id": 7}, OURS, True),
        ({"session": {"tenant_id": "theirs"}}, OURS, False),
    ],
)
def test_whose_a_message_is(context: dict[str, object], welcome: SimpleNamespace | None, foreign: bool):
    assert caller.is_foreign(Message("speak", {}, context), welcome) is foreign
    assert caller.is_foreign(None, welcome) is False, "the microphone is the process's own"
