"""The tenant's language on what is said to a device, so that skills and persona answer in it."""

from __future__ import annotations

from typing import Any

from ovos_plugin_manager.templates.transformers import AudioTransformer

from agentvoicebox.plugins.device.link import Link, shared

NAME = "agentvoicebox-language"


def same_language(one: str, other: str) -> bool:
    """Whether two BCP 47 tags are of one language, as far as both tell."""
    first, second = one.lower().split("-"), other.lower().split("-")
    return first[0] == second[0] and (len(first) == 1 or len(second) == 1 or first == second)


class TenantLanguage(AudioTransformer):  # type: ignore[misc]
    """Tells the core in which language an utterance is: the tenant's choice of the moment.

    A stock listener says that all it hears is in the language of `mycroft.conf`, and has no other place to say
    something else. What another audio transformer finds of one utterance (`stt_lang`) counts more, for the core too.
    """

    def __init__(self, config: dict[str, Any] | None = None, *, link: Link | None = None) -> None:
        super().__init__(NAME, config=config)
        self._link = link or shared("listener")

    def transform(self, audio_data: bytes) -> tuple[bytes, dict[str, Any]]:
        """The audio as it is, and the language where the tenant's choice is known."""
        choices = self._link.choices if self._link is not None else None
        return audio_data, {"lang": choices.language} if choices is not None and choices.tenant else {}

    # Of the audio itself nothing is wanted: the template would keep copies of it.

    def feed_audio_chunk(self, chunk: bytes) -> None:
        """Pass it over."""

    def feed_hotword_chunk(self, chunk: bytes) -> None:
        """Pass it over."""

    def feed_speech_chunk(self, chunk: bytes) -> None:
        """Pass it over."""
