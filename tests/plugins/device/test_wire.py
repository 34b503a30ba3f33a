"""What devices and platforms say: all of it survives the way, and nothing else gets through."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentvoicebox.plugins.device import wire

TEXT = st.text(st.characters(codec="utf-8"), max_size=40)
NUMBER = st.integers(0, 2**32 - 1)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=8,
)
OBJECT = st.dictionaries(TEXT, JSON, max_size=4)
KNOWN = (*wire.FROM_DEVICE, *wire.FROM_PLATFORM)


def said(kind: type[Any]) -> st.SearchStrategy[Any]:
    """Anything of one kind that can be said."""
    of = {
        int: NUMBER,
        str: TEXT,
        bool: st.booleans(),
        float: st.floats(allow_nan=False, allow_infinity=False),
        dict: OBJECT,
        list: st.lists(JSON),
    }
    return st.builds(
        kind,
        **{
            name: st.one_of(*(st.none() if each is type(None) else of[each] for each in types))
            for name, types in wire._allowed(kind).items()
        },
    )


@pytest.mark.parametrize("kind", KNOWN, ids=lambda kind: kind.type)
@given(data=st.data())
def test_what_is_said_arrives(kind: type[Any], data: Any) -> None:
    told = data.draw(said(kind))
    assert wire.decode(wire.encode(told), (kind,)) == told


def test_every_kind_has_a_name_of_its_own() -> None:
    for side in (wire.FROM_DEVICE, wire.FROM_PLATFORM):
        assert len({kind.type for kind in side}) == len(side)


@given(NUMBER, st.binary(max_size=100).map(lambda pcm: pcm[: len(pcm) & ~1]))
def test_audio_arrives_with_its_number(number: int, pcm: bytes) -> None:
    assert wire.split(wire.audio(number, pcm)) == (number, pcm)


@given(st.binary(max_size=20))
def test_audio_is_a_number_and_whole_samples(frame: bytes) -> None:
    if len(frame) >= 4 and len(frame) % 2 == 0:
        assert wire.audio(*wire.split(frame)) == frame
    else:
        with pytest.raises(wire.Garbled):
            wire.split(frame)


@given(st.text(max_size=60) | JSON.map(json.dumps) | OBJECT.map(lambda told: json.dumps({"type": "sound", **told})))
def test_what_is_garbled_is_called_so_and_nothing_else_happens(frame: str) -> None:
    with contextlib.suppress(wire.Garbled):
        assert isinstance(wire.decode(frame, KNOWN), wire.Said)


@pytest.mark.parametrize(
    "frame",
    [
        *("", "x", "[]", "{}", "null", '"sound"', '{"type":"sound"}', '{"type":"sound","id":1}'),
        '{"type":"sound","id":"1","rate":8000}',
        '{"type":"sound","id":true,"rate":8000}',
        '{"type":"sound","id":1.0,"rate":8000}',
        '{"type":"sound","id":-1,"rate":8000}',
        '{"type":"sound","id":4294967296,"rate":8000}',
        '{"type":"sound","id":1,"rate":null}',
        '{"type":"hello","process":"core"}',
        '{"type":["sound"],"id":1,"rate":8000}',
        "[" * 100_000,
    ],
)
def test_a_frame_that_says_nothing_is_garbled(frame: str) -> None:
    with pytest.raises(wire.Garbled):
        wire.decode(frame, wire.FROM_PLATFORM)


def test_fields_of_a_later_version_are_passed_over() -> None:
    assert wire.decode('{"type":"working","id":7,"mood":"good"}', wire.FROM_PLATFORM) == wire.Working(7)


def test_a_whole_number_is_a_time_as_well() -> None:
    told = wire.decode('{"type":"welcome","tenant_id":"","tenant_name":"","device_id":"","time":3}', wire.FROM_PLATFORM)
    assert isinstance(told, wire.Welcome)
    assert (told.time, type(told.time)) == (3.0, float)


@pytest.mark.parametrize("time", ["1" + "0" * 400, "1e999", "NaN", "-Infinity"])
def test_what_is_no_time_is_garbled(time: str) -> None:
    frame = f'{{"type":"welcome","tenant_id":"t","tenant_name":"T","device_id":"d","time":{time}}}'
    with pytest.raises(wire.Garbled):
        wire.decode(frame, wire.FROM_PLATFORM)
