"""What a device may say, and when."""

from __future__ import annotations

from typing import Any

import pytest

from agentvoicebox.bus_bridge.device import protocol
from agentvoicebox.bus_bridge.device.protocol import Audio, Over, Protocol
from agentvoicebox.plugins.device import wire

HELLO = wire.Hello("listener")


def say(protocol: Protocol, said: wire.Said) -> list[Any]:
    return protocol.receive(wire.encode(said))


@pytest.fixture
def greeted() -> Protocol:
    made = Protocol()
    assert say(made, HELLO) == [HELLO]
    return made


@pytest.mark.parametrize("frame", [wire.encode(wire.Speak(1, "x")), wire.audio(1, b"\0\0")])
def test_hello_comes_first(frame: str | bytes):
    problem, over = Protocol().receive(frame)
    assert (problem.id, problem.code) == (0, "hello_expected")
    assert over == Over(1008, "hello_expected")


def test_a_request_to_listen_hears_its_own_audio_until_it_is_finished(greeted: Protocol):
    listen, finish = wire.Listen(1), wire.Finish(1)
    assert say(greeted, listen) == [listen]
    assert greeted.receive(wire.audio(1, b"\1\0")) == [Audio(1, b"\1\0")]
    assert say(greeted, finish) == [finish]
    [problem] = greeted.receive(wire.audio(1, b"\1\0"))
    assert (problem.id, problem.code) == (0, "garbled")


def test_what_comes_for_a_request_that_is_over_is_passed_over(greeted: Protocol):
    say(greeted, wire.Listen(3))
    greeted.answered(3)
    assert greeted.receive(wire.audio(3, b"\1\0")) == []
    assert say(greeted, wire.Finish(3)) == say(greeted, wire.Cancel(3)) == []
    assert say(greeted, wire.Listen(2)) == [wire.Listen(2)], "numbers need not come in order"
    [problem] = say(greeted, wire.Cancel(4))
    assert problem.code == "garbled", "there was no such request"


def test_one_request_hears_so_much_and_no_more(greeted: Protocol):
    say(greeted, wire.Listen(1))
    second = bytes(32_000)
    for _ in range(60):
        assert greeted.receive(wire.audio(1, second)) == [Audio(1, second)]
    cancel, problem = greeted.receive(wire.audio(1, b"\0\0"))
    assert cancel == wire.Cancel(1)
    assert (problem.id, problem.code) == (1, "audio_too_long")
    assert greeted.receive(wire.audio(1, second)) == [], "what was on its way"


def test_requests_at_once_are_few(greeted: Protocol):
    for number in range(1, protocol.MOST_REQUESTS + 1):
        assert say(greeted, wire.About(number)) == [wire.About(number)]
    [problem] = say(greeted, wire.About(9))
    assert (problem.id, problem.code) == (9, "too_many_requests")
    greeted.answered(4)
    assert say(greeted, wire.About(9)) == [wire.About(9)]


def test_requests_to_listen_are_fewer_also_while_what_they_heard_is_understood(greeted: Protocol):
    for number in range(1, protocol.MOST_LISTENING + 1):
        assert say(greeted, wire.Listen(number)) == [wire.Listen(number)]
        assert say(greeted, wire.Finish(number)) == [wire.Finish(number)]
    [problem] = say(greeted, wire.Listen(7))
    assert (problem.id, problem.code) == (7, "too_many_requests")
    assert say(greeted, wire.Speak(8, "yes")) == [wire.Speak(8, "yes")]
    greeted.answered(2)
    assert say(greeted, wire.Listen(9)) == [wire.Listen(9)]


@pytest.mark.parametrize(
    "frame",
    [
        "",
        "[]",
        "{}",
        "{" * 100_000,
        '{"type": "speak", "id": 1}',
        '{"type": "speak", "id": -1, "text": "x"}',
        '{"type": "speak", "id": 0, "text": "x"}',
        '{"type": "speak", "id": 1, "text": 7}',
        '{"type": "speak", "id": 1, "text": "\\ud800"}',
        '{"type": "ask", "id": 1, "messages": [{"role": "user", "content": "\\udc00"}]}',
        '{"type": "welcome"}',
        '{"type": "hello", "process": "listener"}',
        b"",
        b"\0\0\0",
        b"\0\0\0\1\0",
        wire.audio(7, b"\0\0"),
        bytes(wire.LARGEST_FRAME + 2),
        "x" * (wire.LARGEST_FRAME + 1),
    ],
)
def test_what_makes_no_sense_is_told_and_the_socket_lives(greeted: Protocol, frame: str | bytes):
    [problem] = greeted.receive(frame)
    assert (problem.id, problem.code) == (0, "garbled")
    assert say(greeted, wire.Speak(1, "hello \N{GRINNING FACE}")) == [wire.Speak(1, "hello \N{GRINNING FACE}")]


def test_too_much_without_sense_ends_the_connection(greeted: Protocol):
    for _ in range(protocol.MOST_GARBLED):
        assert len(greeted.receive("x")) == 1
    assert greeted.receive("x")[1:] == [Over(1008, "garbled")]
