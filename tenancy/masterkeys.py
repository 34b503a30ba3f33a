"""The keys under which tenants' data keys are wrapped, and where an operator keeps them.

One text format, in the file and in the environment: `id:base64 of 32 bytes`, the newest first. The newest wraps, the
others only unwrap what they once wrapped, until `secrets.rotate_master` has wrapped it anew.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import fcntl
import os
import re
import secrets
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

from agentvoicebox.config.errors import BadInput, Unavailable

_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_BYTES = 32
_HEADING = (
    "# Master keys of AgentVoiceBox, the newest first; each line is id:base64. Without the key that wrapped it\n"
    "# no secret can be read again: keep a copy of this file elsewhere than the store's backups.\n"
)


class SecretUnreadable(Unavailable):
    """A secret is there but cannot be opened: its envelope was changed, or its master key is lost."""

    default_code = "secret_unreadable"


class MasterKeys(Protocol):
    """Where master keys come from: a file, the environment, later a vault."""

    def current(self) -> tuple[str, bytes]:
        """The id and the 32 bytes of the key that wraps now. Raises `Unavailable`."""

    def get(self, key_id: str) -> bytes:
        """The 32 bytes of a key that has wrapped something. Raises `SecretUnreadable` when it is lost."""


class EnvironmentKeys:
    """Keys given as one text, `id:base64,id:base64`, by whoever reads AVB_SECRETS_KEYS."""

    def __init__(self, text: str) -> None:
        """Raises `BadInput` for what is not the format, without quoting it."""
        self._keys = _parsed(text.split(","), "AVB_SECRETS_KEYS")

    def __repr__(self) -> str:
        return f"EnvironmentKeys({', '.join(self._keys)})"

    def current(self) -> tuple[str, bytes]:
        return next(iter(self._keys.items()))

    def get(self, key_id: str) -> bytes:
        return _found(self._keys, key_id, "AVB_SECRETS_KEYS")


class FileKeys:
    """Keys in a file that only its owner can read; made with one key at its first use, read again when it changes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._keys: dict[str, bytes] = {}
        self._seen: tuple[int, int, int] | None = None

    def __repr__(self) -> str:
        return f"FileKeys({str(self._path)!r})"

    def current(self) -> tuple[str, bytes]:
        return next(iter(self._read().items()))

    def get(self, key_id: str) -> bytes:
        return _found(self._read(), key_id, str(self._path))

    def renew(self) -> str:
        """Put a new key on top, by which everything is wrapped from now on; its id. Raises `Unavailable`."""
        made = _made()
        with (
            self._explained(),
            self._alone(),
            _written(self._path.parent, [made, *self._read().items()]) as name,
        ):
            os.replace(name, self._path)
        return made[0]

    def _read(self) -> dict[str, bytes]:
        with self._explained():
            if not self._path.exists():
                self._make()
            status = self._path.stat()
            seen = (status.st_mtime_ns, status.st_size, status.st_ino)
            if seen != self._seen:
                if status.st_mode & 0o077:
                    raise Unavailable(
                        f"Others may read the master keys in {self._path}: `chmod 600` it, and renew them if any did.",
                        code="master_keys_exposed",
                    )
                self._keys = _parsed(self._path.read_text().splitlines(), str(self._path))
                self._seen = seen
        return self._keys

    def _make(self) -> None:
        """Write the file whole, unless another process was faster."""
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _written(self._path.parent, [_made()]) as name, contextlib.suppress(FileExistsError):
            os.link(name, self._path)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """One renewal at a time, of all processes: of two that read the same keys, the later would drop a key."""
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # A file of its own, since the keys' is replaced.
        lock = os.open(self._path.with_name(f"{self._path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (OSError, UnicodeDecodeError) as error:
            raise Unavailable(
                f"The master keys in {self._path} cannot be used: {error.__class__.__name__}. Mend the file or its "
                "directory, or bring back its copy.",
                code="master_keys_unusable",
            ) from error


def _made() -> tuple[str, bytes]:
    return f"m-{secrets.token_hex(4)}", secrets.token_bytes(_BYTES)


@contextlib.contextmanager
def _written(directory: Path, keys: Iterable[tuple[str, bytes]]) -> Iterator[str]:
    """The keys in a file that is wholly on disk, by a name of its own; what is made of the name is on disk then too."""
    handle, name = tempfile.mkstemp(dir=directory, prefix=".master")  # mode 0600
    try:
        with os.fdopen(handle, "w") as file:
            file.write(_HEADING)
            file.writelines(f"{key_id}:{base64.b64encode(key).decode()}\n" for key_id, key in keys)
            file.flush()
            os.fsync(file.fileno())
        yield name
        _sync(directory)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def _sync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _parsed(lines: Iterable[str], source: str) -> dict[str, bytes]:
    keys: dict[str, bytes] = {}
    for line in map(str.strip, lines):
        if not line or line.startswith("#"):
            continue
        key_id, _, text = line.partition(":")
        try:
            key = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            key = b""
        if not _ID.fullmatch(key_id) or len(key) != _BYTES or key_id in keys:
            raise BadInput(
                f"The master keys in {source} cannot be read: each is `id:base64` of {_BYTES} bytes, with its own id.",
                code="master_keys_unusable",
            )
        keys[key_id] = key
    if not keys:
        raise BadInput(f"There is no master key in {source}: bring back its copy.", code="master_keys_unusable")
    return keys


def _found(keys: dict[str, bytes], key_id: str, source: str) -> bytes:
    if key_id not in keys:
        raise SecretUnreadable(
            f"The master key {key_id!r} is not in {source}: put it back, below the newest, or set the secret anew."
        )
    return keys[key_id]
