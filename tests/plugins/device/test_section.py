"""The section of mycroft.conf that says where the platform is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from agentvoicebox.config.errors import BadInput
from agentvoicebox.plugins.device import section
from agentvoicebox.plugins.device.section import Section


@pytest.mark.parametrize(
    "configuration",
    [
        *(None, {}, {"agentvoicebox": None}, {"agentvoicebox": "x"}, {"agentvoicebox": {}}),
        {"agentvoicebox": {"url": ""}},
        {"agentvoicebox": {"url": "http://127.0.0.1:1/v1", "key_file": "k", "place": "cell"}},
    ],
)
def test_without_a_platform_there_is_no_section(configuration: Any) -> None:
    assert section.read(configuration) is None


def test_all_of_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ovos")
    told = {"url": " https://voice.example.com ", "key_file": "~/k", "tenant": "acme", "ca_file": "/c", "state": "~/s"}
    assert section.read({"agentvoicebox": told}) == Section(
        "https://voice.example.com", Path("/home/ovos/k"), "acme", Path("/c"), Path("/home/ovos/s")
    )


def test_a_url_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    found = section.read({"agentvoicebox": {"url": "https://voice.example.com"}})
    assert found == Section("https://voice.example.com", state=Path("/state/agentvoicebox"))
    assert found.key() is None
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", "/home/ovos")
    found = section.read({"agentvoicebox": {"url": "https://voice.example.com"}})
    assert found is not None
    assert found.state == Path("/home/ovos/.local/state/agentvoicebox")


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("https://voice.example.com", "wss://voice.example.com/ws/v2/device"),
        ("https://voice.example.com/", "wss://voice.example.com/ws/v2/device"),
        ("https://voice.example.com:8443", "wss://voice.example.com:8443/ws/v2/device"),
        ("https://[2001:db8::1]:8443", "wss://[2001:db8::1]:8443/ws/v2/device"),
        ("http://127.0.0.1:8181", "ws://127.0.0.1:8181/ws/v2/device"),
        ("http://localhost:8181/", "ws://localhost:8181/ws/v2/device"),
        ("http://[::1]:8181", "ws://[::1]:8181/ws/v2/device"),
        ("http://192.168.1.5", "ws://192.168.1.5/ws/v2/device"),
        ("http://node.local", "ws://node.local/ws/v2/device"),
        ("http://nas", "ws://nas/ws/v2/device"),
    ],
)
def test_the_address_of_the_socket(url: str, address: str) -> None:
    assert Section(url).socket == address


@pytest.mark.parametrize(
    "url", ["http://voice.example.com", "http://8.8.8.8:80", "http://[2606:4700::1]", "http://a.b"]
)
def test_a_key_does_not_travel_in_the_clear(url: str) -> None:
    with pytest.raises(BadInput, match="https://") as refused:
        _ = Section(url).socket
    assert refused.value.code == "url_insecure"


@pytest.mark.parametrize(
    "url",
    [
        *("x", "voice.example.com", "ftp://host", "https://", "https://host:99999", "https://host:x", "https://[::1"),
        "https://user:word@host",
        "https://host/path",
        "https://host?x=1",
        "https://ho st",
        "https://host\r\nX: y",
        "wss://host",
    ],
)
def test_what_is_no_address_is_called_so(url: str) -> None:
    with pytest.raises(BadInput, match=r"mycroft\.conf") as refused:
        _ = Section(url).socket
    assert refused.value.code == "url_invalid"


@pytest.mark.parametrize("tenant", ["a b", "acme\r\nX-Evil: 1", "ä", "x" * 65])
def test_a_tenant_that_no_header_holds(tenant: str) -> None:
    with pytest.raises(BadInput) as refused:
        _ = Section("https://host", tenant=tenant).socket
    assert refused.value.code == "tenant_invalid"


@pytest.mark.parametrize("content", [b"", b"short", b"two words", b"avb_\xff" * 9, b"k" * 5000, b"\0" * 40])
def test_a_file_without_a_key_has_none(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(content)
    assert Section("https://host", tmp_path / "key").key() is None


def test_the_key_is_read_each_time(tmp_path: Path) -> None:
    found = Section("https://host", tmp_path / "key")
    assert found.key() is None
    (tmp_path / "key").write_text("  avb_0123456789\n")
    assert found.key() == "avb_0123456789"
    assert Section("https://host", tmp_path).key() is None
