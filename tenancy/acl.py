"""POSIX access control lists on Linux: let one more user in, and nobody else.

The attribute `system.posix_acl_access` is a version word and entries of tag, permission and id
(linux/posix_acl_xattr.h).
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from pathlib import Path
from typing import NamedTuple

READ, SEARCH = 4, 1
"""Search, on a directory, is what execute is on a file."""

_ATTRIBUTE = "system.posix_acl_access"
_VERSION = struct.pack("<I", 2)
_ENTRY = struct.Struct("<HHI")
_NOBODY = 0xFFFFFFFF
_OWNER, _USER, _OWNING_GROUP, _GROUP, _MASK, _OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
_CAPPED = (_USER, _OWNING_GROUP, _GROUP)
"""Entries that get no more than the mask allows."""


class Entry(NamedTuple):
    """One line of an access control list."""

    tag: int
    permission: int
    id: int = _NOBODY


def grant(path: Path, uid: int, permission: int) -> None:
    """Let user `uid` do `permission` to `path`. Raises `OSError` where the file system has no such lists."""
    os.setxattr(path, _ATTRIBUTE, _pack(admit(read(path), uid, permission)))


def read(path: Path) -> list[Entry]:
    """The list of `path`, or what its mode means where it has none."""
    try:
        packed = os.getxattr(path, _ATTRIBUTE)
    except OSError as error:
        if error.errno != errno.ENODATA:
            raise
        mode = stat.S_IMODE(path.stat().st_mode)
        return [Entry(_OWNER, mode >> 6 & 7), Entry(_OWNING_GROUP, mode >> 3 & 7), Entry(_OTHER, mode & 7)]
    return [Entry(*entry) for entry in _ENTRY.iter_unpack(packed[len(_VERSION) :])]


def admit(entries: list[Entry], uid: int, permission: int) -> list[Entry]:
    """`entries` plus `permission` for one user; everybody else may do exactly what they could before."""
    mask = next((entry.permission for entry in entries if entry.tag == _MASK), 7)
    # The mask must grow by our permission, so what it held back from others is taken out of their entries.
    capped = [e._replace(permission=e.permission & mask) if e.tag in _CAPPED else e for e in entries if e.tag != _MASK]
    had = next((e.permission for e in capped if e.tag == _USER and e.id == uid), 0)
    kept = [e for e in capped if not (e.tag == _USER and e.id == uid)]
    kept.append(Entry(_USER, had | permission, uid))
    widest = 0
    for entry in kept:
        if entry.tag in _CAPPED:
            widest |= entry.permission
    return sorted([*kept, Entry(_MASK, widest)], key=lambda entry: (entry.tag, entry.id))


def _pack(entries: list[Entry]) -> bytes:
    return _VERSION + b"".join(_ENTRY.pack(*entry) for entry in entries)
