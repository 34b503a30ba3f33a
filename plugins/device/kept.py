"""The tenant's choices as a device keeps them on disk, for a start without its platform."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from agentvoicebox.plugins.device import choices
from agentvoicebox.plugins.device.choices import Choices

_LARGEST = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Kept:
    """What was last told, to whose key, under which etag."""

    choices: Choices
    etag: str
    owner: str


def owner(key: str) -> str:
    """Tells keys apart without telling them."""
    return hashlib.sha256(b"choices\0" + key.encode()).hexdigest()[:32]


def read(path: Path, key: str | None) -> Kept | None:
    """What is kept, unless it was another key's; None where there is nothing that can be used."""
    try:
        with path.open("rb") as file:
            told = json.loads(file.read(_LARGEST))
        kept = Kept(choices.of(told["choices"]), str(told["etag"]), str(told["owner"]))
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    return kept if key is None or kept.owner == owner(key) else None


def write(path: Path, kept: Kept) -> None:
    """Keep this instead of what was kept before: all of it, or nothing. Raises `OSError`."""
    told = {"owner": kept.owner, "etag": kept.etag, "choices": kept.choices.as_dict()}
    replace(path, json.dumps(told, ensure_ascii=False).encode("utf-8", "replace"))


def replace(path: Path, content: bytes) -> None:
    """Write a file that only its owner reads, so that there is always the old or the new one. Raises `OSError`."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    number, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(number, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
