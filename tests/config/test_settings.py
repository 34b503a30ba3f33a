"""Settings: four sources, one precedence, and one clear line for whatever is wrong."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentvoicebox.config import settings
from agentvoicebox.config.errors import BadInput
from agentvoicebox.config.settings import Settings

HOME = {"HOME": "/home/someone"}
Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a settings file."""

    def make(text: str) -> Path:
        path = tmp_path / "avb.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return make


def refused(**flags: object) -> BadInput:
    with pytest.raises(BadInput) as caught:
        settings.load(flags, HOME)
    return caught.value


def test_a_user_who_chooses_nothing_gets_a_node_of_their_own() -> None:
    found = settings.load({}, HOME)
    assert (found.host, found.port, found.engine) == ("127.0.0.1", 65020, "auto")
    assert found.data == Path("/home/someone/.local/share/agentvoicebox")
    assert found.models == found.data / "models"


def test_flags_beat_the_environment_which_beats_the_file_which_beats_the_defaults(write: Write) -> None:
    file = write("port: 1\nengine: offline\nvad: webrtc\n")
    found = settings.load({"port": 3, "cells": None}, {"AVB_PORT": "2", "AVB_ENGINE": "models"} | HOME, file)
    assert (found.port, found.engine, found.vad, found.cells) == (3, "models", "webrtc", 1)


def test_the_environment_names_the_file(write: Write) -> None:
    assert settings.load({}, HOME | {"AVB_CONFIG": str(write("port: 7"))}).port == 7


def test_an_empty_variable_is_not_set_and_a_foreign_one_is_not_ours() -> None:
    assert settings.load({}, HOME | {"AVB_PORT": "", "AVB_KEY": "of avb say", "PORT": "9"}).port == 65020


def test_every_setting_can_come_from_the_environment_and_from_a_file(write: Write, tmp_path: Path) -> None:
    pem = tmp_path / "file.pem"
    pem.touch()
    texts = {
        "data": "/d", "models": "/m", "host": "0.0.0.0", "port": "1", "tls_cert": str(pem), "tls_key": str(pem),
        "behind_proxy": "yes", "trusted_proxies": "10.0.0.0/8, ::1",
        "allowed_origins": "https://a.example, https://b.example",
        "database": "postgresql://x", "redis": "redis://x", "secrets_keys": "k:AA==", "base_domain": "a.example",
        "workers": "2", "cells": "3", "languages": "en-US,de-DE", "engine": "models",
        "vad": "webrtc", "vad_hangover": "0.4", "whisper": "tiny", "models_url": "https://m.example",
        "log_level": "DEBUG", "log_format": "json",
        "speech": "queue", "speech_processes": "3", "speech_memory": "512", "private_urls": "yes",
        "openai_key": "k1", "anthropic_key": "k2", "groq_key": "k3", "compatible_key": "k4", "deepgram_key": "k5",
        "openai_url": "https://o.example", "anthropic_url": "https://a.example", "groq_url": "https://g.example",
        "ollama_url": "http://l.example:11434", "compatible_url": "http://c.example/v1",
        "deepgram_url": "https://d.example",
    }  # fmt: skip
    assert set(texts) == {each.name for each in fields(Settings)}
    by_environment = settings.load({}, {f"AVB_{name.upper()}": text for name, text in texts.items()})
    by_file = settings.load({}, HOME, write("\n".join(f"{name}: {text}" for name, text in texts.items())))
    assert by_environment == by_file
    assert all(getattr(by_file, name) != getattr(settings.load({}, HOME), name) for name in texts)


def test_the_documentation_names_every_setting_and_its_default() -> None:
    text = (Path(__file__).parents[2] / "docs" / "settings.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`AVB_(\w+)`", text)) - {"CONFIG"} == {each.name.upper() for each in fields(Settings)}
    for name, default in re.findall(r"^\| `AVB_(\w+)` \| `([^`$]+)` \|", text, re.MULTILINE):
        assert settings.load({}, HOME | {f"AVB_{name}": default}) == settings.load({}, HOME), name


def test_they_cannot_be_changed_afterwards() -> None:
    with pytest.raises(FrozenInstanceError):
        settings.load({}, HOME).port = 1  # type: ignore[misc]


@pytest.mark.parametrize("name", ["openai_key", "anthropic_key", "groq_key", "compatible_key", "deepgram_key"])
def test_a_key_of_a_provider_is_not_shown(name: str) -> None:
    assert "hunter2" not in repr(settings.load({name: "hunter2"}, HOME))
    assert "hunter2" not in str(refused(**{name: ["hunter2"]}))


def test_a_dsn_is_not_shown() -> None:
    assert "hunter2" not in repr(settings.load({"database": "postgresql://u:hunter2@h/db"}, HOME))
    assert "hunter2" not in str(refused(database=["hunter2"]))


@pytest.mark.parametrize(
    "address",
    ["redis://h", "redis://h:6379/0", "rediss://:hunter2@[::1]:6380/", "unix:///run/redis.sock", "unix:///a?db=2"],
)
def test_an_address_of_redis_is_taken_and_not_shown(address: str) -> None:
    found = settings.load({"redis": address}, HOME)
    assert found.redis == address
    assert address not in repr(found)


@pytest.mark.parametrize(
    "address",
    [
        "h:6379/hunter2",
        "http://:hunter2@h",
        "redis://u:hunter2",
        "redis://:hunter2@",
        "redis://h:hunter2/0",
        "redis://h:99999/hunter2",
        "redis://h:0/hunter2",
        "redis://h/hunter2",
        "unix://hunter2",
        "redis://[hunter2",
        ["redis://hunter2"],
    ],
)
def test_what_is_no_address_of_redis_is_refused_and_not_shown(address: object) -> None:
    error = refused(redis=address)
    assert (error.code, error.param) == ("validation_error", "redis")
    assert "hunter2" not in str(error)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", "65536"),
        ("port", "-1"),
        ("port", "http"),
        ("port", "9" * 5000),
        ("port", "٤"),
        ("port", 1.5),
        ("port", True),
        ("workers", 0),
        ("workers", 65),
        ("cells", "0"),
        ("vad_hangover", "nan"),
        ("vad_hangover", "inf"),
        ("vad_hangover", 0.01),
        ("vad_hangover", True),
        ("vad_hangover", [1]),
        ("behind_proxy", "perhaps"),
        ("engine", "best"),
        ("vad", "none"),
        ("log_level", "LOUD"),
        ("log_format", "xml"),
        ("whisper", 3),
        ("whisper", ""),
        ("host", ["127.0.0.1"]),
        ("data", "a\0b"),
        ("data", "~nobody-has-this-name/x"),
        ("languages", ","),
        ("languages", []),
        ("languages", {"en": 1}),
        ("languages", [False]),
        ("languages", "../../etc"),
        ("allowed_origins", 7),
        ("trusted_proxies", "proxy.example"),
        ("trusted_proxies", "10.0.0.1/8"),
        ("speech", "elsewhere"),
        ("speech_processes", 0),
        ("private_urls", "perhaps"),
        ("ollama_url", "host:11434"),
        ("compatible_url", "file:///etc/passwd"),
        ("ollama_url", "http://u:hunter2@host:11434"),
        ("compatible_url", "https://host/v1?api-version=hunter2"),
        ("openai_url", "https://host/v1#hunter2"),
        ("groq_url", "https://host/v1\n"),
        ("openai_key", "hunter2\n"),
        ("deepgram_key", "hünter2"),
    ],
)
def test_a_value_that_cannot_be_is_named_with_what_could(name: str, value: object) -> None:
    error = refused(**{name: value})
    assert (error.code, error.param) == ("validation_error", name)
    assert error.message.startswith(f"Setting {name}")
    assert "invalid literal" not in error.message
    assert "nter2" not in str(error)


def test_a_name_nobody_knows_is_an_error_that_lists_the_names(write: Write) -> None:
    with pytest.raises(BadInput, match=r"no setting 'prot'.*port") as caught:
        settings.load({}, HOME, write("prot: 1"))
    assert caught.value.param == "prot"


@pytest.mark.parametrize("text", ["- a\n- b", "just text", "a: [", "\tx: 1", "!!python/object:os.system {}"])
def test_a_file_that_is_no_settings_file(write: Write, text: str) -> None:
    with pytest.raises(BadInput, match=r"settings file .*avb\.yaml"):
        settings.load({}, HOME, write(text))


def test_a_file_that_is_missing_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot be read"):
        settings.load({}, HOME, tmp_path / "nowhere.yaml")
    (tmp_path / "noise").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInput, match="cannot be read"):
        settings.load({}, HOME, tmp_path / "noise")


def test_an_empty_file_changes_nothing(write: Write) -> None:
    assert settings.load({}, HOME, write("# nothing\n")) == settings.load({}, HOME)


def test_directories_follow_the_xdg_specification() -> None:
    assert settings.user_data(HOME | {"XDG_DATA_HOME": "/x"}) == Path("/x/agentvoicebox")
    assert settings.user_data(HOME | {"XDG_DATA_HOME": "relative"}) == settings.user_data(HOME)


def test_paths_are_absolute_and_know_the_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    found = settings.load({"data": "here", "models": "~/models"}, {})
    assert (found.data, found.models) == (tmp_path / "here", tmp_path / "home" / "models")


def test_a_user_without_a_home_names_a_directory_instead(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000_000)  # an arbitrary user of a container
    with pytest.raises(BadInput, match="AVB_DATA"):
        settings.load({}, {})
    assert settings.load({"data": tmp_path}, {}).models == tmp_path / "models"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost", "LocalHost"])
def test_loopback_needs_no_certificate(host: str) -> None:
    assert settings.load({"host": host}, HOME).host == host


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "example.org", "127.0.0.1.example.org"])
def test_any_other_host_needs_tls_or_a_declared_proxy(host: str, tmp_path: Path) -> None:
    error = refused(host=host)
    assert error.param == "host"
    assert re.search(r"--tls-cert.*AVB_BEHIND_PROXY=1", error.message)
    assert settings.load({"host": host, "behind_proxy": "1"}, HOME).behind_proxy
    pem = tmp_path / "both.pem"
    pem.touch()
    assert settings.load({"host": host, "tls_cert": pem, "tls_key": pem}, HOME).tls_cert == pem


def test_half_of_tls_and_unreadable_tls(tmp_path: Path) -> None:
    pem = tmp_path / "cert.pem"
    pem.touch()
    assert refused(tls_cert=str(pem)).param == "tls_cert"
    assert refused(tls_cert=str(pem), tls_key=str(tmp_path / "missing.pem")).param == "tls_key"


@given(st.ip_addresses())
def test_only_loopback_addresses_are_loopback(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    assert settings.is_loopback(str(address)) is address.is_loopback


@given(
    st.sampled_from([each.name for each in fields(Settings)]),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    ),
)
def test_whatever_yaml_brings_is_taken_or_refused(name: str, value: object) -> None:
    with contextlib.suppress(BadInput):
        settings.load({name: value}, HOME)


def test_a_base_domain_is_a_domain() -> None:
    assert settings.load({"base_domain": "voice.example.com"}, HOME).base_domain == "voice.example.com"
    for wrong in (
        "com",
        "Voice.example.com",
        "127.0.0.1",
        "a..b",
        "-a.example.com",
        "example.com:80",
        "a.example.com.",
    ):
        with pytest.raises(BadInput) as caught:
            settings.load({"base_domain": wrong}, HOME)
        assert caught.value.param == "base_domain"


def test_master_keys_are_not_shown() -> None:
    assert "hunter2" not in repr(settings.load({"secrets_keys": "k1:hunter2"}, HOME))
