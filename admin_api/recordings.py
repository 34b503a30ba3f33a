"""Audio files as the body of a request."""

from __future__ import annotations

import re
from typing import Any

from fastapi import Request

from agentvoicebox.admin_api.schemas import UnsupportedMediaType

_KINDS = ("application/octet-stream", "audio/wav", "audio/mpeg", "audio/flac", "audio/ogg")
_AUDIO = re.compile(r"(?:audio/[a-z0-9.+-]+|application/octet-stream)\s*(?:;.*)?", re.IGNORECASE)


def document(largest: int, longest: float) -> dict[str, Any]:
    """The OpenAPI `requestBody` of a route that reads one, of so many bytes and seconds."""
    return {
        "requestBody": {
            "required": True,
            "description": f"WAV, MP3, FLAC or OGG at any rate, at most {largest} bytes and {longest:g} s.",
            "content": {kind: {"schema": {"type": "string", "format": "binary"}} for kind in _KINDS},
        }
    }


def check(request: Request) -> None:
    """Raise `UnsupportedMediaType` for a body that says itself that it is something else."""
    if not _AUDIO.fullmatch(request.headers.get("content-type", "")):
        raise UnsupportedMediaType(
            "The body must be the audio file itself: send it with Content-Type: audio/wav (or audio/mpeg, audio/flac, "
            "audio/ogg, application/octet-stream)."
        )
