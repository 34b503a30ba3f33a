"""Ears that are services on the network, as ovos-plugin-manager STT plugins.

Their calls share one event loop in a thread of its own, so that a call ends at once when nobody waits for it any more,
and altogether after its time, however slowly the service drips.
"""

from __future__ import annotations

import asyncio
import io
import threading
import wave
import weakref
from abc import abstractmethod
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future
from functools import cache
from typing import Any, ClassVar, NamedTuple

from ovos_plugin_manager.templates.stt import STT
from ovos_utils import classproperty

from agentvoicebox.config.errors import AvbError, BadInput, TooLarge, Unavailable
from agentvoicebox.plugins.pool import when_cancelled

LISTENING_RATE = 16_000
TIMEOUT = 10.0
"""Seconds for a whole call, unless configured otherwise."""


class Answer(NamedTuple):
    """What a service has heard: the text, how sure it is (0 to 1, where it tells), and the language (or "")."""

    text: str
    confidence: float | None
    language: str


class RemoteSTT(STT):  # type: ignore[misc]
    """An ear elsewhere. Configuration: `key`, `url`, `model`, `timeout` (10 seconds for the whole call)."""

    thread_safe = True
    parallel = 32
    """Calls that one instance makes at once; the pool has a thread for each."""
    batch = 1
    memory = 4 << 20
    """Bytes that it holds, about: connections and threads."""
    service: ClassVar[str]

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        super().__init__(config)
        self.timeout = float(self.config.get("timeout") or TIMEOUT)

    @classproperty  # type: ignore[untyped-decorator]
    def available_languages(cls) -> set[str]:
        """None named: the service knows, by its model."""
        return set()

    @abstractmethod
    async def ask(self, wav: bytes, language: str) -> Answer:
        """Have a 16-bit mono WAV file heard; language "auto" is for the service to find out. Raises `AvbError`."""

    def close_with(self, close: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Have what is open to the service closed when this is shut down, or forgotten without."""
        self._end = weakref.finalize(self, _run, close)
        self._end.atexit = False

    def hear(self, pcm: bytes, rate: int, language: str) -> Answer:
        """What is said in 16-bit mono audio at `rate` Hz. Raises `AvbError`."""
        call = asyncio.run_coroutine_threadsafe(self._within_time(_wav(pcm, rate), language), _loop())

        def stop() -> None:
            call.cancel()

        with when_cancelled(stop):
            try:
                return call.result()
            except CancelledError:
                raise Unavailable(f"Nobody waits for {self.service} any more.", code="engine_failed") from None

    def transcribe_batch(self, jobs: list[Any]) -> list[Answer | AvbError]:
        """The same for jobs of the pool, whose audio has 16 kHz."""
        heard: list[Answer | AvbError] = []
        for job in jobs:
            try:
                heard.append(self.hear(job.pcm16k, LISTENING_RATE, job.language))
            except AvbError as error:
                heard.append(error)
        return heard

    def transcribe(self, audio: Any, lang: str | None = None) -> list[tuple[str, float]]:
        """The same as stock OVOS asks for it; an ear that does not say how sure it is counts as sure."""
        answer = self.hear(audio.get_raw_data(convert_width=2), audio.sample_rate, lang or self.lang)
        return [(answer.text, 1.0 if answer.confidence is None else answer.confidence)]

    def execute(self, audio: Any, language: str | None = None) -> str:
        """What was said; empty when nothing was."""
        return self.transcribe(audio, language)[0][0]

    def shutdown(self) -> None:
        """Close what is open to the service."""
        if closing := self._end():
            closing.result(self.timeout)

    async def _within_time(self, wav: bytes, language: str) -> Answer:
        try:
            async with asyncio.timeout(self.timeout):
                return await self.ask(wav, language)
        except TimeoutError:
            raise Unavailable(
                f"{self.service} has not answered within {self.timeout:g} s: try again, or choose another engine.",
                code="engine_timeout",
            ) from None

    # --- what services say when they do not serve ---------------------------------------------------------------------

    def refused_with(self, status: int) -> AvbError:
        """The error for an HTTP status that is not 2xx.

        Only what is certainly the caller's own audio is held against the caller; all else lets another engine try.
        """
        if status in (400, 422):
            return BadInput(
                f"{self.service} takes this audio or language not: choose another language, model or engine.",
                code="engine_rejects_input",
            )
        if status == 413:
            return TooLarge(f"{self.service} does not take audio this long: send shorter pieces.")
        if status in (408, 504):
            return Unavailable(
                f"{self.service} took too long: try again, or choose another engine.", code="engine_timeout"
            )
        if status == 429:
            return Unavailable(
                f"{self.service} is asked too often: try later, or raise the limit of the account.",
                code="engine_overloaded",
            )
        if status >= 500:
            return Unavailable(
                f"{self.service} failed (HTTP {status}): try again, or choose another engine.", code="engine_failed"
            )
        return Unavailable(
            f"{self.service} refuses the call (HTTP {status}): check the key, the model and the address.",
            code="engine_refused",
        )

    def unreachable(self) -> Unavailable:
        """The error for a service to which there is no connection."""
        return Unavailable(
            f"{self.service} cannot be reached: check its address and the network.", code="engine_unreachable"
        )

    def broke_off(self) -> Unavailable:
        """The error for a connection that ended within the call."""
        return Unavailable(f"{self.service} broke off: try again, or choose another engine.", code="engine_broke_off")

    def garbage(self) -> Unavailable:
        """The error for an answer that is none."""
        return Unavailable(
            f"{self.service} answered something else than a transcript: check its address.", code="engine_garbage"
        )


def likelihood(value: object) -> float | None:
    """A confidence as services give it, within 0 to 1; None for anything else."""
    if isinstance(value, int | float) and not isinstance(value, bool) and value == value:
        return min(max(float(value), 0.0), 1.0)
    return None


def _wav(pcm: bytes, rate: int) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as wav:
        wav.setparams((1, 2, rate, 0, "NONE", ""))
        wav.writeframes(pcm)
    return file.getvalue()


def _run(close: Callable[[], Coroutine[Any, Any, None]]) -> Future[None]:
    return asyncio.run_coroutine_threadsafe(close(), _loop())


@cache
def _loop() -> asyncio.AbstractEventLoop:
    """The loop of all services; it ends with the process."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="remote-ears", daemon=True).start()
    return loop
