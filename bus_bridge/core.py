"""Stock ovos-core, started by us: with the plugins of our pipeline only, without what a server has no use for."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from ovos_adapt.opm import AdaptPipeline
from ovos_bus_client.message import Message
from ovos_core import __main__ as stock
from ovos_core import skill_manager
from ovos_core.intent_services import IntentService
from ovos_plugin_manager import utils
from ovos_utils import dialog
from ovos_utils.bracket_expansion import expand_template

from agentvoicebox.bus_bridge.child import replace
from agentvoicebox.config import ovos

_MAX_BRACKETS = 8


class Prepared(IntentService):  # type: ignore[misc]
    """The stock service, with its pipeline loaded before core first asks for it: a "not yet" costs a second's pause."""

    def __init__(self, bus: Any) -> None:
        super().__init__(bus, preload_pipelines=False)
        self.handle_reload_pipelines(Message("intent.service.pipelines.reload"))


@cache
def _installed(group: str) -> tuple[EntryPoint, ...]:
    found = tuple(entry_points(group=group))
    return tuple(e for e in found if e.name in ovos.plugins()) if group == "opm.pipeline" else found


def _iterate(group: str) -> Iterator[EntryPoint]:
    """Stand in for ovos-plugin-manager's look at what is installed.

    It would load every pipeline plugin there is, used or not, among them one whose state is global; and it reads the
    metadata of all installed packages anew for each plugin it looks for, and again for the skills every 30 seconds.
    """
    return iter(_installed(str(getattr(group, "value", group))))


def _expand(line: str) -> list[str]:
    """Stand in for the expansion of "(one|other)" in dialogs, which the stock renderer does after filling in words.

    These may be what a user said: some thirty pairs of brackets in it would be more sentences than memory can hold.
    """
    return expand_template(line) if line.count("(") + line.count("[") <= _MAX_BRACKETS else [line]


def _register(self: AdaptPipeline, value: str, kind: str, alias_of: str, regex: str, lang: str) -> None:
    """Stand in for Adapt's registration of words: without regular expressions, which cost it exponential time.

    With the one that the date-time skill brings, "in a in a in a …" of 24 words keeps core busy for 17 seconds.
    """
    if not regex:
        _register_words(self, value, kind, alias_of, regex, lang)


_register_words = AdaptPipeline.register_vocabulary


def main() -> None:
    logging.getLogger("geocoder").setLevel(logging.CRITICAL)  # it logs the places that people ask about
    replace(AdaptPipeline, "register_vocabulary", _register)
    replace(dialog, "expand_template", _expand)
    replace(utils, "_iter_plugins", _iterate)
    replace(skill_manager, "IntentService", Prepared)
    stock.main(enable_installer=False, enable_file_watcher=False)
