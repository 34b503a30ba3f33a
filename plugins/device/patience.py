"""How long a device waits for a platform that is at work, before it goes on by itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ovos_utils.log import LOG

PATIENCE = 4.0
"""Seconds, unless the plugin's section says otherwise: nobody stands before a silent device for longer."""

_LEAST, _MOST = 0.5, 60.0


def of(section: Mapping[str, Any]) -> float:
    """The `patience` of a plugin's section, in seconds; what is none is said in the log, and passed over."""
    told = section.get("patience", PATIENCE)
    if isinstance(told, int | float) and not isinstance(told, bool) and _LEAST <= told <= _MOST:
        return float(told)
    LOG.warning("patience in mycroft.conf is not %g to %g seconds: it is %g.", _LEAST, _MOST, PATIENCE)
    return PATIENCE
