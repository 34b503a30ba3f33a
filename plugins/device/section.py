"""The section `agentvoicebox` of a device's mycroft.conf: where its platform is, and its key."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from agentvoicebox.config.errors import BadInput
from agentvoicebox.plugins.device import wire

NAME = "agentvoicebox"
"""Of the section."""

_TENANT = re.compile(r"[A-Za-z0-9-]{1,64}")
_KEY = re.compile(r"[!-~]{8,512}")
_NEAR = ("localhost", ".localhost", ".local", ".lan", ".home", ".internal", ".home.arpa")
_LONGEST_KEY = 4096


@dataclass(frozen=True, slots=True)
class Section:
    """What a device knows of its platform."""

    url: str
    """`https://voice.example.com`; `http://` only within the device or its own network."""
    key_file: Path | None = None
    """The device key is in it, and nothing else."""
    tenant: str = ""
    """Slug or id of the tenant whose key it must be; empty for whosever it is."""
    ca_file: Path | None = None
    """Certificates to trust instead of those of the system."""
    state: Path = Path("~/.local/state/agentvoicebox")
    """Directory of what the device keeps: the tenant's choices, and reports that could not be told yet."""

    def key(self) -> str | None:
        """The device key as it is now; None while there is none, or none that can be read."""
        if self.key_file is None:
            return None
        try:
            with self.key_file.open("rb") as file:
                key = file.read(_LONGEST_KEY).decode("ascii").strip()
        except (OSError, ValueError):
            return None
        return key if _KEY.fullmatch(key) else None

    @property
    def socket(self) -> str:
        """The address of the socket.

        Raises `BadInput` (`url_invalid`, `url_insecure`, `tenant_invalid`) for what makes none.
        """
        try:
            parts = urlsplit(self.url)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise self._invalid() from error
        if not host or parts.scheme not in ("http", "https") or parts.username or parts.path.strip("/") or parts.query:
            raise self._invalid()
        if re.search(r"[^!-~]|[<>\"\\^`{}|]", self.url):
            raise self._invalid()
        if parts.scheme == "http" and not _near(host):
            raise BadInput(
                f"The key of this device would travel to {host} for all to read: use https:// in the url of the "
                f"section {NAME} in mycroft.conf.",
                code="url_insecure",
                param="url",
            )
        if self.tenant and not _TENANT.fullmatch(self.tenant):
            raise BadInput(
                f"The tenant of the section {NAME} in mycroft.conf is none: write its slug or id, or leave it out.",
                code="tenant_invalid",
                param="tenant",
            )
        place = f"[{host}]" if ":" in host else host
        scheme = "wss" if parts.scheme == "https" else "ws"
        return f"{scheme}://{place}{'' if port is None else f':{port}'}{wire.PATH}"

    def _invalid(self) -> BadInput:
        return BadInput(
            f"The url of the section {NAME} in mycroft.conf is no address: write https://host or https://host:port.",
            code="url_invalid",
            param="url",
        )


def read(configuration: Mapping[str, Any] | None) -> Section | None:
    """The section of a whole mycroft.conf; None where no platform is named, and in a cell, which has its node."""
    told = (configuration or {}).get(NAME)
    if not isinstance(told, Mapping) or not told.get("url") or told.get("place") == "cell":
        return None
    return Section(
        url=str(told["url"]).strip(),
        key_file=_path(told.get("key_file")),
        tenant=str(told.get("tenant") or ""),
        ca_file=_path(told.get("ca_file")),
        state=_path(told.get("state")) or _state(),
    )


def _path(told: object) -> Path | None:
    return Path(os.path.expanduser(str(told))) if told else None


def _state() -> Path:
    return Path(os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")) / "agentvoicebox"


def _near(host: str) -> bool:
    """Whether what is said to it stays within the device or its own network."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return "." not in host or host.rstrip(".").lower().endswith(_NEAR)
    return address.is_loopback or address.is_private or address.is_link_local
