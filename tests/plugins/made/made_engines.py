"""Engines for processes of a test, which tell in a directory what they do, and wait there for what the test allows.

Configuration: `directory`. Each thing told is an empty file in it, named after the process and what it does:
`begin-3-PID` when number 3 is begun, `cancelled-3-PID` when it is given up.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ovos_plugin_manager.templates.stt import STT
from ovos_plugin_manager.templates.tts import TTS
from ovos_utils import classproperty

from agentvoicebox.config.errors import BadInput, RateLimited
from agentvoicebox.plugins.pool import cancelled

POISON, REFUSED, LIMITED, HANGING = 13, 14, 15, 16
"""Numbers that kill the process, that are refused, that are too many and that nothing brings to an end."""


class Told:
    """What both engines tell and wait for."""

    def __init__(self, directory: str) -> None:
        self._directory = Path(directory)

    def tell(self, what: str) -> None:
        (self._directory / f"{what}-{os.getpid()}").touch()

    def wait(self, name: str) -> bool:
        """Until there is a file of that name, or one named `all`; false when nobody waits for the work any more."""
        while not ((self._directory / name).exists() or (self._directory / "all").exists()):
            if cancelled():
                return False
            time.sleep(0.005)
        return True


class Ear(STT):
    """Hears a number, the first sample, and waits for `go-NUMBER`; answers with it and with its process."""

    parallel = 4
    thread_safe = True

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        super().__init__(config)
        if self.config.get("deadly"):
            os.kill(os.getpid(), signal.SIGKILL)
        self._told = Told(self.config["directory"])
        self._told.tell("loaded")

    @classproperty
    def available_languages(cls) -> set[str]:
        return {"en-US"}

    def execute(self, audio: Any, language: str | None = None) -> str:
        number = int.from_bytes(audio.frame_data[:2], "little")
        if number == REFUSED:
            raise BadInput("Not this one.", code="unsupported_language", param="language")
        if number == LIMITED:
            raise RateLimited("Not now.", retry_after=7.5)
        self._told.tell(f"begin-{number}")
        if number == POISON:
            os.kill(os.getpid(), signal.SIGKILL)
        while number == HANGING:
            time.sleep(0.1)
        if not self._told.wait(f"go-{number}"):
            self._told.tell(f"cancelled-{number}")
            return ""
        return f"{number} {os.getpid()}"


class Voice(TTS):
    """Says each word as one part; waits for `go-WORD` before the word, unless it is in lower case."""

    thread_safe = True
    voices = frozenset({"ada", "bob"})

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        super().__init__(config={**(config or {}), "enable_cache": False}, audio_ext="wav")
        self._told = Told(self.config["directory"])

    def get_tts(self, sentence: str, wav_file: str, lang: str | None = None) -> tuple[str, None]:
        raise RuntimeError("It speaks in parts.")

    def stream(self, sentence: str, lang: str, voice: str | None, speed: float) -> Iterator[tuple[bytes, int]]:
        for number, word in enumerate(sentence.split()):
            self._told.tell(f"begin-{number}")
            if word != word.lower() and not self._told.wait(f"go-{word}"):
                self._told.tell(f"cancelled-{number}")
                return
            yield word.encode() + b" " * (len(word) % 2), 16_000
