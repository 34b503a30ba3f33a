"""Calls that come in pieces become whole."""

from __future__ import annotations

import json

from agentvoicebox.plugins.chat.pieces import Pieces


def test_pieces_become_calls_in_their_order() -> None:
    pieces = Pieces()
    pieces.add([{"index": 1, "id": "b", "function": {"name": "time", "arguments": ""}}])
    pieces.add([{"index": 0, "id": "a", "type": "function", "function": {"name": "light", "arguments": '{"on"'}}])
    pieces.add([{"index": 0, "function": {"arguments": ": true}"}}, {"index": 1, "function": {"arguments": "{}"}}])
    assert pieces.whole() == [
        {"id": "a", "type": "function", "function": {"name": "light", "arguments": '{"on": true}'}},
        {"id": "b", "type": "function", "function": {"name": "time", "arguments": "{}"}},
    ]


def test_what_providers_leave_out_is_made_up_for() -> None:
    pieces = Pieces()
    pieces.add([{"function": {"name": "light"}}, {"index": 1, "id": "b"}, {"index": 2, "function": None}])
    pieces.add([{"index": None, "function": {"name": "light", "arguments": "{}"}}])  # some repeat the name
    [call] = pieces.whole()
    assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == ("light", {})
    assert call["id"].startswith("call_")
    assert Pieces().whole() == []
