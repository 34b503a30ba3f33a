"""Every setting, read once: a default, a line in the YAML file, an `AVB_…` variable or a flag, in rising precedence."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from agentvoicebox.config.errors import BadInput


@dataclass(frozen=True, slots=True)
class Settings:
    """What an operator may choose. Build it with `load`; below the command line nothing else reads the environment."""

    data: Path
    """Everything that must survive a restart lives in this directory."""
    models: Path
    """Speech models, one directory each; shared by all data directories of a user."""
    host: str = "127.0.0.1"
    """Address to listen on; others than loopback need TLS or a declared proxy."""
    port: int = 65020
    """Port to listen on; 0 takes a free one."""
    tls_cert: Path | None = None
    """Certificate chain, PEM."""
    tls_key: Path | None = None
    """Its private key, PEM."""
    behind_proxy: bool = False
    """A proxy that ends TLS stands in front: other hosts than loopback are allowed without a certificate."""
    trusted_proxies: tuple[str, ...] = ("127.0.0.1",)
    """Addresses and networks of that proxy: what it says about clients in X-Forwarded-For and -Proto is believed."""
    allowed_origins: tuple[str, ...] = ()
    """Browser origins, beside our own, that may open a socket."""
    database: str | None = field(default=None, repr=False)
    """DSN of a PostgreSQL; none means the embedded one in the data directory."""
    redis: str | None = field(default=None, repr=False)
    """Address of a Redis that nodes share; none means that there is one node, which keeps its state in process."""
    secrets_keys: str | None = field(default=None, repr=False)
    """Master keys of tenants' secrets, `id:base64,…`, the newest first; none means the file `master.keys` in `data`."""
    base_domain: str | None = None
    """Domain under which `<slug>.<base_domain>` names a tenant; none means that host names name nobody."""
    workers: int = 1
    """Node processes."""
    cells: int = 1
    """OVOS stacks on this machine."""
    languages: tuple[str, ...] = ("en-US",)
    """Languages of every cell; a tenant chooses among them."""
    engine: str = "auto"
    """`auto`, `offline` (flite and pocketsphinx) or `models` (faster-whisper and Kokoro)."""
    vad: str = "silero"
    """`silero` or `webrtc` (lighter, later)."""
    vad_hangover: float = 0.2
    """Seconds of silence that end a turn, unless the session says otherwise."""
    whisper: str = "base"
    """Name of the faster-whisper model that the engine `models` uses."""
    models_url: str | None = None
    """Where `avb models pull` fetches from; none means the addresses in the catalogue."""
    speech: str = "threads"
    """Where engines work: `threads` of the node, `processes` of their own, or the `queue` of `avb worker` in Redis."""
    speech_processes: int = 2
    """Processes that share the engines' work when `speech` is `processes`."""
    speech_memory: int = 0
    """MiB that loaded engines may hold before the one used longest ago is unloaded; 0 is half of this machine's."""
    openai_key: str | None = field(default=None, repr=False)
    """Keys of the platform with providers, for tenants that bring none of their own; none means no such provider."""
    openai_url: str | None = None
    """Addresses of providers; none means the provider's own."""
    anthropic_key: str | None = field(default=None, repr=False)
    anthropic_url: str | None = None
    groq_key: str | None = field(default=None, repr=False)
    groq_url: str | None = None
    ollama_url: str | None = None
    """Of an Ollama server; none means that there is none."""
    compatible_url: str | None = None
    """Of a server that speaks OpenAI's protocol, such as vLLM or llama.cpp."""
    compatible_key: str | None = field(default=None, repr=False)
    deepgram_key: str | None = field(default=None, repr=False)
    deepgram_url: str | None = None
    private_urls: bool = False
    """Whether addresses that tenants give for providers may lead into private networks."""
    log_level: str = "INFO"
    """`DEBUG`, `INFO`, `WARNING` or `ERROR`; of our own log, other packages' begins at warnings."""
    log_format: str = "auto"
    """`console`, `json` (one object per line) or `auto`: console on a terminal, else JSON."""


_PATHS = ("data", "models", "tls_cert", "tls_key")
_LISTS = ("languages", "allowed_origins", "trusted_proxies")
_KEYS = ("openai_key", "anthropic_key", "groq_key", "compatible_key", "deepgram_key")
_SECRET = ("database", "redis", "secrets_keys", *_KEYS)
"""An address may hold a password."""
_ADDRESSES = ("openai_url", "anthropic_url", "groq_url", "ollama_url", "compatible_url", "deepgram_url")
_RANGES = {
    "workers": (1, 64),
    "cells": (1, 256),
    "port": (0, 65535),
    "speech_processes": (1, 64),
    "speech_memory": (0, 16_777_216),
}
_CHOICES = {
    "engine": ("auto", "offline", "models"),
    "vad": ("silero", "webrtc"),
    "speech": ("threads", "processes", "queue"),
    "log_level": ("DEBUG", "INFO", "WARNING", "ERROR"),
    "log_format": ("auto", "console", "json"),
}
_REDIS_PATH = re.compile(r"(/\d{0,4})?", re.ASCII)
_DOMAIN = re.compile(r"(?=.{1,253}$)([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z]([a-z0-9-]{0,61}[a-z0-9])?")
_LANGUAGE = re.compile(r"[A-Za-z]{2,3}(-[A-Za-z0-9]{2,8})*")


def load(
    flags: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None, file: Path | None = None
) -> Settings:
    """Settings from all sources. A name nobody knows or a value out of range raises `BadInput` naming it."""
    environ = os.environ if environ is None else environ
    known = [each.name for each in fields(Settings)]
    values: dict[str, Any] = {}
    file = file or (Path(environ["AVB_CONFIG"]) if environ.get("AVB_CONFIG") else None)
    for source in (_from_file(file), _from_environ(environ, known), flags or {}):
        for name, value in source.items():
            if name not in known:
                raise BadInput(f"There is no setting {name!r}; settings are: {', '.join(sorted(known))}.", param=name)
            if value is not None:
                values[name] = _convert(name, value)
    if "data" not in values:
        values["data"] = user_data(environ)
    if "models" not in values:
        values["models"] = _default_models(environ, values["data"])
    settings = Settings(**values)
    _check_exposure(settings)
    return settings


def user_data(environ: Mapping[str, str]) -> Path:
    """Where this user keeps application data, by the XDG base directory specification. Raises `BadInput` if nowhere."""
    base = Path(environ.get("XDG_DATA_HOME", ""))
    if base.is_absolute():  # the specification has relative ones ignored
        return base / "agentvoicebox"
    try:
        home = Path(environ.get("HOME") or Path("~").expanduser())
    except RuntimeError as error:
        raise BadInput("This user has no home directory: name a directory with AVB_DATA.", param="data") from error
    return home.absolute() / ".local" / "share" / "agentvoicebox"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _default_models(environ: Mapping[str, str], data: Path) -> Path:
    try:
        return user_data(environ) / "models"
    except BadInput:
        return data / "models"  # a service without a home keeps all in one place


def _check_exposure(settings: Settings) -> None:
    if bool(settings.tls_cert) != bool(settings.tls_key):
        raise BadInput("TLS needs both --tls-cert and --tls-key.", param="tls_cert")
    for name in ("tls_cert", "tls_key"):
        path = getattr(settings, name)
        if path and not os.access(path, os.R_OK):
            raise BadInput(f"Setting {name}: {path} cannot be read.", param=name)
    if not (is_loopback(settings.host) or settings.tls_cert or settings.behind_proxy):
        raise BadInput(
            f"Host {settings.host!r} is reachable by others: give --tls-cert and --tls-key, or declare the proxy "
            "that ends TLS with AVB_BEHIND_PROXY=1.",
            param="host",
        )


def _from_file(file: Path | None) -> dict[str, Any]:
    if file is None:
        return {}
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInput(f"The settings file {file} cannot be read: {error}.", param="config") from error
    if not isinstance(found, dict):
        raise BadInput(f"The settings file {file} must hold `name: value` lines.", param="config")
    return found


def _from_environ(environ: Mapping[str, str], known: list[str]) -> dict[str, str]:
    """What is set there; AVB_KEY and others belong to single commands, and empty means not set."""
    return {name: value for name in known if (value := environ.get(f"AVB_{name.upper()}"))}


def _convert(name: str, value: Any) -> Any:
    """Bring one value into its type. Text is what the environment has; YAML brings types of its own."""
    try:
        if name in _PATHS:
            return Path(_text(value) if not isinstance(value, Path) else value).expanduser().absolute()
        if name in _RANGES:
            return _whole(value, *_RANGES[name])
        if name == "vad_hangover":
            return _seconds(value, 0.05, 5)
        if name in ("behind_proxy", "private_urls"):
            return _boolean(value)
        if name in _LISTS:
            parts = _list(value)
            if name == "languages" and not (parts and all(map(_LANGUAGE.fullmatch, parts))):
                raise ValueError("must be language tags such as en-US, one or more")
            if name == "trusted_proxies" and not all(map(_is_network, parts)):
                raise ValueError("must be addresses or networks such as 10.0.0.0/8")
            return parts
        text = _text(value)
        if name == "redis" and not _is_redis(text):
            raise ValueError("must be redis://host:6379/0, rediss://host:6379/0 or unix:///path/to/socket")
        if name in _ADDRESSES and not _is_http(text):
            raise ValueError("must be an address such as https://host/v1, without user name, query or fragment")
        if name in _KEYS and not (text.isascii() and text.isprintable()):
            raise ValueError("holds characters that no key has, such as a line's end")
        if name == "base_domain" and not _DOMAIN.fullmatch(text):
            raise ValueError("must be a domain such as voice.example.com")
        if name in _CHOICES and text not in _CHOICES[name]:
            raise ValueError(f"must be one of {', '.join(_CHOICES[name])}")
        return text
    except (ValueError, RuntimeError) as error:
        shown = "" if name in _SECRET or name in _ADDRESSES else f"={value!r}"
        raise BadInput(f"Setting {name}{shown}: {error}.", param=name) from error


def _text(value: Any) -> str:
    if isinstance(value, str) and value and "\0" not in value:
        return value
    raise ValueError("must be text, and not empty")


def _whole(value: Any, low: int, high: int) -> int:
    text = "" if isinstance(value, bool) else str(value).strip()
    if text.isascii() and text.isdigit() and low <= (number := int(text[:9])) <= high:
        return number
    raise ValueError(f"must be a whole number from {low} to {high}")


def _seconds(value: Any, low: float, high: float) -> float:
    try:
        number = float("nan" if isinstance(value, bool) else value)
    except (TypeError, ValueError):
        number = float("nan")
    if low <= number <= high:
        return number
    raise ValueError(f"must be {low:g} to {high:g} seconds")


def _list(value: Any) -> tuple[str, ...]:
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list | tuple) or not all(isinstance(part, str) for part in parts):
        raise ValueError("must be a list, or text with commas")
    return tuple(part.strip() for part in parts if part.strip())


def _is_network(text: str) -> bool:
    try:
        ipaddress.ip_network(text)
    except ValueError:
        return False
    return True


def _is_http(text: str) -> bool:
    try:
        url = urlsplit(text)
        port = url.port
    except ValueError:
        return False
    plain = url.username is None and url.password is None and not {"?", "#", " "} & {*text} and text.isprintable()
    return url.scheme in ("http", "https") and bool(url.hostname) and port != 0 and plain


def _is_redis(text: str) -> bool:
    try:
        url = urlsplit(text)
        port = url.port
    except ValueError:
        return False
    if url.scheme == "unix":
        return len(url.path) > 1
    return (
        url.scheme in ("redis", "rediss") and bool(url.hostname) and port != 0 and bool(_REDIS_PATH.fullmatch(url.path))
    )


def _boolean(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if str(value).lower() in ("1", "true", "yes", "on"):
        return True
    if str(value).lower() in ("0", "false", "no", "off"):
        return False
    raise ValueError("must be true or false")
