"""The stock OVOS configuration and the isolated environment of one cell."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import tzlocal

HOST = "127.0.0.1"
"""Cells never listen on anything else than loopback."""

PIPELINE = (
    "agentvoicebox-guard",
    "ovos-stop-pipeline-plugin-high",
    "ovos-converse-pipeline-plugin",
    "agentvoicebox-intents-high",
    "ovos-adapt-pipeline-plugin-high",
    "ovos-fallback-pipeline-plugin-high",
    "ovos-stop-pipeline-plugin-medium",
    "agentvoicebox-intents-medium",
    "ovos-adapt-pipeline-plugin-medium",
    "ovos-fallback-pipeline-plugin-medium",
    # Skills come first; where there is no node to ask, it lets all pass to the fallbacks that answer anything.
    "agentvoicebox-persona",
    "ovos-fallback-pipeline-plugin-low",
)
"""The stages an utterance passes, in order; only their plugins are loaded into a cell."""

CANARY_UTTERANCE = "avb canary"
CANARY_SESSION = "avb-canary"
"""Sessions whose id begins with this are the supervisor's own, never a tenant's."""


_STAGES = ("-high", "-medium", "-low")
_INHERITED = ("PATH", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH")
_NOWHERE = "http://127.0.0.1:9"
_LOG_BYTES = 2_000_000


@dataclass(frozen=True, slots=True)
class Node:
    """The door of the node that the persona of a cell asks, and the one credential of that cell, which opens it."""

    url: str
    """As OpenAI's clients want it: with `/v1`."""
    key: str = field(repr=False)


def plugins() -> tuple[str, ...]:
    """Names of the pipeline plugins that the stages need, each once, in order."""
    names = (stage.removesuffix(next((s for s in _STAGES if stage.endswith(s)), "")) for stage in PIPELINE)
    return tuple(dict.fromkeys(names))


def listed(configuration: Mapping[str, Any], plugin: str) -> bool:
    """Whether the pipeline of a `mycroft.conf` has a stage of this plugin.

    Stock core makes every pipeline plugin that is installed, whether or not a stage of it is listed.
    """
    pipeline = (configuration.get("intents") or {}).get("pipeline") or ()
    return any(stage == plugin or stage.startswith(f"{plugin}-") for stage in pipeline)


def missing() -> tuple[str, ...]:
    """Those of them that are not installed."""
    installed = {entry.name for entry in metadata.entry_points(group="opm.pipeline")}
    return tuple(name for name in plugins() if name not in installed)


def environment(directory: Path, parent: Mapping[str, str]) -> dict[str, str]:
    """The whole environment of a cell in `directory`: nothing of the parent's but paths, language and time zone.

    Whatever OVOS would look up or write outside (other users' configuration, shared temporary files, servers on the
    Internet) leads into the directory or nowhere.
    """
    nothing = str(directory / "none")
    return {name: parent[name] for name in _INHERITED if name in parent} | {
        "HOME": str(directory / "home"),
        "TMPDIR": str(directory / "tmp"),
        "XDG_CONFIG_HOME": str(directory / "config"),
        "XDG_DATA_HOME": str(directory / "data"),
        "XDG_CACHE_HOME": str(directory / "cache"),
        "XDG_STATE_HOME": str(directory / "state"),
        "XDG_RUNTIME_DIR": str(directory / "tmp"),
        "XDG_CONFIG_DIRS": nothing,
        "XDG_DATA_DIRS": nothing,
        "OVOS_DISTRIBUTION_CONFIG": nothing,
        "MYCROFT_SYSTEM_CONFIG": nothing,
        "OVOS_DEFAULT_LOG_LEVEL": "WARNING",
        # A stock skill asks a public server where "Paris" is: what tenants say stays on this machine.
        "http_proxy": _NOWHERE,
        "https_proxy": _NOWHERE,
        "no_proxy": "127.0.0.1,localhost",
        "PYTHONNOUSERSITE": "1",
    }


def write(directory: Path, *, languages: Sequence[str], port: int, route: str, node: Node | None = None) -> Path:
    """Make the cell's directories, its `mycroft.conf` and the key of its persona, readable by their owner only.

    Without a node the cell has no persona. Returns the configuration file.
    """
    for name in ("", "home", "tmp", "config", "config/mycroft", "data", "cache", "state", "logs"):
        (directory / name).mkdir(mode=0o700, parents=True, exist_ok=True)
        (directory / name).chmod(0o700)
    configuration = _configuration(directory, languages, port, route)
    key = directory / "config" / "node.key"
    if node is None:
        key.unlink(missing_ok=True)
    else:
        _keep(key, node.key)
        # Without a place, the section is that of a device.
        configuration["agentvoicebox"] = {"place": "cell", "url": node.url, "key_file": str(key)}
    file = directory / "config" / "mycroft" / "mycroft.conf"
    _keep(file, json.dumps(configuration, indent=2))
    return file


def _keep(file: Path, text: str) -> None:
    """Write a file that only its owner reads, whole or not at all."""
    fresh = file.with_suffix(".new")
    with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as out:
        out.write(text)
    fresh.replace(file)


def _configuration(directory: Path, languages: Sequence[str], port: int, route: str) -> dict[str, Any]:
    return {
        "lang": languages[0],
        "secondary_langs": list(languages[1:]),
        "location": {"timezone": {"code": _timezone()}},
        # At INFO, core writes every utterance into its log.
        "log_level": "WARNING",
        "logs": {"path": str(directory / "logs"), "max_bytes": _LOG_BYTES, "backup_count": 1},
        "websocket": {
            "host": HOST,
            "port": port,
            "route": route,
            "ssl": False,
            "shared_connection": True,
            "max_msg_size": 4,  # MiB; only text crosses the bus
        },
        "network_tests": {
            "ip_url": _NOWHERE,
            "dns_primary": HOST,
            "dns_secondary": HOST,
            "web_url": _NOWHERE,
            "web_url_secondary": _NOWHERE,
            "captive_portal_url": _NOWHERE,
        },
        "skills": {
            "wait_for_internet": False,
            "installer": {"allow_pip": False},
            "blacklisted_skills": [],
        },
        "utterance_transformers": {"ovos-utterance-normalizer": {}},
        "metadata_transformers": {},
        "intent_transformers": {},
        "intents": {"pipeline": list(PIPELINE), "blacklisted_intents": []},
        "gui": {"disable_gui": True},
    }


def _timezone() -> str:
    """Name of this machine's time zone, so that "what time is it" is right without further settings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a machine without a time zone is in UTC, and that is no news
        try:
            tzlocal.reload_localzone()
            return tzlocal.get_localzone_name() or "UTC"
        except (LookupError, ValueError, OSError):
            return "UTC"
