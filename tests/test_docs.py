"""The documentation names every setting, event and close code that the code has."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from agentvoicebox.admin_api.app import ROUTERS
from agentvoicebox.bus_bridge import gateway, live, native
from agentvoicebox.bus_bridge.device import devices, protocol, socket
from agentvoicebox.bus_bridge.realtime import requests
from agentvoicebox.config.settings import Settings
from agentvoicebox.plugins.device import wire

ROOT = Path(__file__).parent.parent
SETTINGS = (ROOT / "docs" / "settings.md").read_text()
PROTOCOLS = (ROOT / "docs" / "protocols.md").read_text()


@pytest.mark.parametrize("name", [field.name for field in fields(Settings)])
def test_every_setting_is_described(name: str):
    assert f"`AVB_{name.upper()}`" in SETTINGS


def test_no_setting_is_invented():
    known = {f"AVB_{field.name.upper()}" for field in fields(Settings)} | {"AVB_CONFIG", "AVB_"}
    assert set(re.findall(r"AVB_[A-Z_]*", SETTINGS)) <= known


def tags(decoder: object) -> set[str]:
    return {kind.__struct_config__.tag for kind in decoder.type.__args__}


@pytest.mark.parametrize("tag", sorted(tags(native._DECODER)))
def test_every_native_client_event_is_described(tag: str):
    assert f"`{tag}`" in PROTOCOLS


def test_every_native_server_event_is_described():
    sent = re.findall(r'_frame\("([a-z.]+)"', Path(native.__file__).read_text())
    assert sent
    assert [kind for kind in sent if f"`{kind}`" not in PROTOCOLS] == []


def test_every_served_realtime_event_is_described():
    served = {
        kind.__struct_config__.tag
        for kind in requests.DECODER.type.__args__
        if not issubclass(kind, requests._NotServed)
    }
    text = PROTOCOLS.replace("`.commit`", "`input_audio_buffer.commit`").replace(
        "`.clear`", "`input_audio_buffer.clear`"
    )
    assert [tag for tag in served if f"`{tag}`" not in text] == []


@pytest.mark.parametrize("said", [*wire.FROM_DEVICE, *wire.FROM_PLATFORM])
def test_every_frame_of_devices_is_described(said: type[wire.Said]):
    assert f"`{said.type}`" in PROTOCOLS


@pytest.mark.parametrize(
    "code",
    [
        *(live.UNAUTHORISED, live.SUSPENDED, gateway.NO_SESSION, live.EXPIRED, gateway.IN_USE),
        *(protocol.POLICY, socket.AGAIN, devices.REPLACED),
    ],
)
def test_every_close_code_is_described(code: int):
    assert f"| {code} |" in PROTOCOLS


def test_every_rest_resource_is_described():
    document = (ROOT / "docs" / "rest.md").read_text(encoding="utf-8")
    prefixes = {route.path.removeprefix("/api/v2").split("/")[1] for router in ROUTERS for route in router.routes}
    assert {"tenants", "api-keys", "audit", "sessions"} <= prefixes
    assert [name for name in sorted(prefixes) if f"/{name}" not in document] == []
