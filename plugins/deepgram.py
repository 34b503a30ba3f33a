"""Deepgram, a cloud ear, as an ovos-plugin-manager STT plugin: one POST per utterance, so it needs no SDK."""

from __future__ import annotations

import json
from typing import Any

from agentvoicebox.config.errors import Unavailable
from agentvoicebox.plugins.remote import Answer, RemoteSTT, likelihood

URL = "https://api.deepgram.com"
MODEL = "nova-3"

_REGIONAL = (
    "da-DK de-CH en-AU en-GB en-IN en-NZ en-US es-419 fr-CA hi-Latn ko-KR nl-BE pt-BR pt-PT sv-SE th-TH zh-CN zh-HK "
    "zh-Hans zh-Hant zh-TW"
)
"""Tags with a region that Deepgram knows; of all others it wants the language alone."""

_MOST_BYTES = 8_000_000
"""Of an answer; what is longer than all words of an hour is none."""


class DeepgramSTT(RemoteSTT):
    """Configuration: `key`, `url` (Deepgram's own), `model` (nova-3), `timeout` (10 seconds for the whole call)."""

    service = "Deepgram"

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        import httpx

        super().__init__(config)
        key = self.config.get("key")
        if not key:
            raise Unavailable("Deepgram needs a key: configure it, or choose another engine.", code="engine_refused")
        self._address = f"{(self.config.get('url') or URL).rstrip('/')}/v1/listen"
        self._model = str(self.config.get("model") or MODEL)
        self._http = httpx.AsyncClient(
            headers={"Authorization": f"Token {key}", "Content-Type": "audio/wav"},
            timeout=self.timeout,
            limits=httpx.Limits(max_connections=self.parallel, keepalive_expiry=60),
        )
        self.close_with(self._http.aclose)

    async def ask(self, wav: bytes, language: str) -> Answer:
        """Have it heard by Deepgram."""
        import httpx

        wanted = {"detect_language": "true"} if language == "auto" else {"language": deepgram_tag(language)}
        query = {"model": self._model, "smart_format": "true", **wanted}
        try:
            async with self._http.stream("POST", self._address, params=query, content=wav) as response:
                if not response.is_success:
                    raise self.refused_with(response.status_code)
                body = bytearray()
                async for part in response.aiter_bytes():
                    body += part
                    if len(body) > _MOST_BYTES:
                        raise self.garbage()
        except httpx.TimeoutException as error:
            raise TimeoutError from error
        except (httpx.ConnectError, httpx.UnsupportedProtocol) as error:
            raise self.unreachable() from error
        except httpx.DecodingError as error:
            raise self.garbage() from error
        except httpx.HTTPError as error:
            raise self.broke_off() from error
        try:
            return _answer(json.loads(body), "" if language == "auto" else language)
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise self.garbage() from error


def deepgram_tag(language: str) -> str:
    """A language tag as Deepgram wants it: "de-DE" is "de" to it, "pt-BR" is "pt-BR"."""
    primary, _, region = language.replace("_", "-").partition("-")
    tag = f"{primary.lower()}-{region}" if region else primary.lower()
    return tag if tag in _REGIONAL.split() else primary.lower()


def _answer(found: Any, language: str) -> Answer:
    """Read an answer; raises something of `LookupError`, `TypeError` or `ValueError` when it is none."""
    channel = found["results"]["channels"][0]
    best = channel["alternatives"][0]
    text = best["transcript"]
    if not isinstance(text, str):
        raise TypeError("not a text")
    detected = channel.get("detected_language")
    return Answer(text.strip(), likelihood(best.get("confidence")), detected if isinstance(detected, str) else language)
