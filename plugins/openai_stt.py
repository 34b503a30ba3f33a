"""OpenAI's transcription, or that of any server with its protocol, as an ovos-plugin-manager STT plugin."""

from __future__ import annotations

import math
from typing import Any

from agentvoicebox.plugins.remote import Answer, RemoteSTT, likelihood

URL = "https://api.openai.com/v1"
MODEL = "gpt-transcribe"

_SPOKEN = (
    "afrikaans:af arabic:ar armenian:hy azerbaijani:az belarusian:be bosnian:bs bulgarian:bg catalan:ca chinese:zh "
    "croatian:hr czech:cs danish:da dutch:nl english:en estonian:et finnish:fi french:fr galician:gl german:de "
    "greek:el hebrew:he hindi:hi hungarian:hu icelandic:is indonesian:id italian:it japanese:ja kannada:kn "
    "kazakh:kk korean:ko latvian:lv lithuanian:lt macedonian:mk malay:ms marathi:mr maori:mi nepali:ne "
    "norwegian:no persian:fa polish:pl portuguese:pt romanian:ro russian:ru serbian:sr slovak:sk slovenian:sl "
    "spanish:es swahili:sw swedish:sv tagalog:tl tamil:ta thai:th turkish:tr ukrainian:uk urdu:ur vietnamese:vi "
    "welsh:cy"
)
LANGUAGES = dict(pair.split(":") for pair in _SPOKEN.split())
"""Whisper names the language that it has heard in English words."""


class OpenAISTT(RemoteSTT):
    """Configuration: `key` (none for a server that wants none), `url` (OpenAI's own, ends in /v1 as a rule), `model`
    (gpt-transcribe), `timeout` (10 seconds for the whole call)."""

    service = "The transcription service"

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        from openai import AsyncOpenAI

        super().__init__(config)
        self._model = str(self.config.get("model") or MODEL)
        self._client = AsyncOpenAI(
            api_key=str(self.config.get("key") or "none"),
            base_url=str(self.config.get("url") or URL),
            timeout=self.timeout,
            max_retries=0,  # the pool has other engines to try, and a turn has no time
        )
        # The SDK takes them from the environment, where they belong to whoever started the node, not to this key.
        self._client.organization = self._client.project = None
        self.close_with(self._client.close)

    async def ask(self, wav: bytes, language: str) -> Answer:
        """Have it heard by the service."""
        import openai

        try:
            # Taken as it came: the SDK's types let through what is none of theirs, and fail later.
            response = await self._client.audio.transcriptions.with_raw_response.create(
                file=("utterance.wav", wav, "audio/wav"), model=self._model, **self._choices(language)
            )
            found = response.http_response.json()
        except openai.APITimeoutError as error:
            raise TimeoutError from error
        except openai.APIStatusError as error:
            raise self.refused_with(error.status_code) from error
        except openai.APIConnectionError as error:
            raise (self.unreachable() if _never_connected(error) else self.broke_off()) from error
        except (openai.OpenAIError, ValueError, RecursionError) as error:
            raise self.garbage() from error
        if not isinstance(found, dict) or not isinstance(found.get("text"), str):
            raise self.garbage()
        return Answer(found["text"].strip(), _confidence(found), _language(found) or _primary(language))

    def _choices(self, language: str) -> dict[str, Any]:
        """What this model can be asked for: Whisper and its like tell more than OpenAI's newer ones."""
        choices: dict[str, Any] = {"response_format": "verbose_json"}
        if self._model.startswith("gpt-"):
            choices["response_format"] = "json"
            if self._model.startswith("gpt-4o"):
                choices["include"] = ["logprobs"]
        if language != "auto":
            choices["language"] = _primary(language)
        return choices


def _primary(language: str) -> str:
    return "" if language == "auto" else language.replace("_", "-").partition("-")[0].lower()


def _confidence(found: dict[str, Any]) -> float | None:
    """The mean likelihood of the words, where the answer has them: of each token, or of each segment."""
    for name, field in (("logprobs", "logprob"), ("segments", "avg_logprob")):
        given = found.get(name)
        logs = [each.get(field) for each in given if isinstance(each, dict)] if isinstance(given, list) else []
        numbers = [log for log in logs if isinstance(log, int | float) and log <= 0]
        if numbers:
            return likelihood(math.exp(sum(numbers) / len(numbers)))
    return None


def _language(found: dict[str, Any]) -> str:
    """The language that was heard, as a tag; empty where the answer does not say."""
    heard = found.get("language")
    if not isinstance(heard, str):
        several = found.get("languages")
        first = several[0] if isinstance(several, list) and several else None
        heard = first.get("code") if isinstance(first, dict) else first
    if not isinstance(heard, str):
        return ""
    heard = heard.lower()
    return LANGUAGES.get(heard, heard if len(heard) <= 3 else "")


def _never_connected(error: BaseException) -> bool:
    """Whether the cause of an SDK's error is that there was no connection at all, whichever httpx it uses."""
    return type(error.__cause__).__name__ in ("ConnectError", "UnsupportedProtocol")
