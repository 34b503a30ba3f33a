"""The tenant's wake words, as a stock OVOS listener loads them: one hotword hears every phrase that is chosen.

The stock listener changes hotwords by stopping its loop, throwing all engines away and making new ones (hazard H18).
This engine stays where it is and changes what it hears between two chunks of audio. No message reaches a hotword
engine (H16): the tenant is the one whose key the process has.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from ovos_bus_client.message import Message
from ovos_plugin_manager.templates.hotwords import HotWordEngine
from ovos_utils.log import LOG

from agentvoicebox.config.errors import AvbError
from agentvoicebox.plugins import phrases
from agentvoicebox.plugins.detector import RATE, Detection, Detector
from agentvoicebox.plugins.device import link
from agentvoicebox.plugins.device.choices import Choices, WakeWord
from agentvoicebox.plugins.device.link import Link

MODULE = "agentvoicebox-ww"
PATIENCE = 15.0
"""Seconds in which something is heard after a wake word that was meant."""

_RECENT = 2 * RATE * 3 // 2
"""Bytes of what was heard last, from which a new detector goes on."""


class TenantWakeWord(HotWordEngine):  # type: ignore[misc]
    """Hears all of the tenant's wake words, and follows the tenant's choices while the listener runs.

    Configuration: `phrases`, a list, and `sensitivity` (0.5, for all of them), which count where there is no platform
    and until it has been heard of. Without them it hears its own name if that can be heard, else “hey mycroft”.

    Audio is 16-bit mono at 16 kHz: hotword engines are not told what their microphone gives, and this is what all of
    the stock ones take.
    """

    config: dict[str, Any]

    def __init__(self, key_phrase: str = "hey mycroft", config: dict[str, Any] | None = None) -> None:
        super().__init__(key_phrase, config)
        # The listener looks for the module when a word is heard, and ends when it is not there.
        self.config = {"module": MODULE, **self.config}
        platform = _link()
        self._ears = _Ears(_local(self.key_phrase, self.config))
        self._outcomes = Outcomes(platform)
        leave = self._ears.follow(platform)
        self._detector = self._ears.detector
        self._recent: deque[bytes] = deque()
        self._recent_size = 0
        self._found = self._failing = False
        # Neither the link nor the bus holds the engine, as the listener does not stop every engine that it drops.
        self._end = weakref.finalize(self, _end, leave, self._outcomes)

    def bind(self, bus: Any) -> None:
        """Tell from this bus what came of a detection."""
        self._outcomes.bind(bus)

    def update(self, chunk: bytes) -> None:
        """Hear a chunk of the microphone."""
        detector = self._ears.detector
        if detector is not self._detector:
            # Who was speaking as the change came is heard to the end.
            for each in self._recent:
                detector.feed(each)
            self._detector = detector
        self._remember(chunk)
        try:
            found = detector.feed(chunk)
        except Exception as error:
            # The listener would write a line for each chunk, eight in a second, for as long as that goes on.
            if not self._failing:
                LOG.error(f"wake words are not heard for a moment ({type(error).__name__}): it is tried again")
            self._failing = True
            with suppress(Exception):
                detector.reset()
            return
        self._failing = False
        if found is not None:
            self._found = True
            self._outcomes.detected(found)

    def found_wake_word(self) -> bool:
        """Whether a wake word has been said since this was asked last."""
        found, self._found = self._found, False
        return found

    def reset(self) -> None:
        """The audio has been interrupted: a command was spoken."""
        self._found = False
        self._forget()
        self._detector.reset()

    def stop(self) -> None:
        """Hear nothing any more, and let go of link, bus and models."""
        self._end()
        self._ears.detector = Detector(())
        self._forget()

    def _remember(self, chunk: bytes) -> None:
        self._recent.append(chunk)
        self._recent_size += len(chunk)
        while self._recent_size > _RECENT:
            self._recent_size -= len(self._recent.popleft())

    def _forget(self) -> None:
        self._recent.clear()
        self._recent_size = 0


class Outcomes:
    """What came of each detection, told to the platform: something was said after it, or nothing was.

    Detections come on the listener's thread, what is said on the bus's.
    """

    def __init__(self, platform: Link | None, patience: float = PATIENCE) -> None:
        self._link = platform
        self._patience = patience
        self._bus: Any = None
        self._lock = threading.Lock()
        self._waiting: Detection | None = None
        self._timer: threading.Timer | None = None
        self._handlers: tuple[tuple[str, Callable[[Message], None]], ...] = (
            ("recognizer_loop:utterance", self._understood),
            ("recognizer_loop:speech.recognition.unknown", self._nothing),
        )

    def bind(self, bus: Any) -> None:
        """Listen to this bus, and to no other any more."""
        self._unbind()
        if self._link is None:
            return
        for name, handler in self._handlers:
            bus.on(name, handler)
        self._bus = bus

    def detected(self, detection: Detection) -> None:
        """A wake word was heard; what comes of it is not known yet."""
        for confidence in detection.missed:
            self._tell(replace(detection, confidence=confidence), "missed")
        if self._bus is None:
            self._tell(detection, "detected")
            return
        with self._lock:
            before = self._take()
            self._waiting = detection
            self._timer = threading.Timer(self._patience, self._expire, (detection,))
            self._timer.name, self._timer.daemon = "agentvoicebox-wake", True
            self._timer.start()
        if before is not None:
            # It has been said again and nothing in between: the first was none, or nobody knew that it was heard.
            self._tell(before, "false_positive")

    def close(self) -> None:
        """Wait for nothing any more."""
        self._unbind()
        self._settle("detected")

    def _understood(self, message: Message) -> None:
        if _of_microphone(message):
            self._settle("detected")

    def _nothing(self, message: Message) -> None:
        if _of_microphone(message):
            self._settle("false_positive")

    def _expire(self, detection: Detection) -> None:
        with self._lock:
            late = self._take() if self._waiting is detection else None
        if late is not None:
            self._tell(late, "false_positive")

    def _settle(self, outcome: str) -> None:
        with self._lock:
            settled = self._take()
        if settled is not None:
            self._tell(settled, outcome)

    def _take(self) -> Detection | None:
        if self._timer is not None:
            self._timer.cancel()
        taken, self._waiting, self._timer = self._waiting, None, None
        return taken

    def _tell(self, detection: Detection, outcome: str) -> None:
        if self._link is not None:
            word, confidence = detection.word, round(detection.confidence, 3)
            self._link.report("wake", phrase=word.phrase, wake_word=word.id, confidence=confidence, outcome=outcome)

    def _unbind(self) -> None:
        bus, self._bus = self._bus, None
        if bus is not None:
            for name, handler in self._handlers:
                bus.remove(name, handler)


class _Ears:
    """The detector of what was chosen last; made on the thread that tells of the choice, taken up by the listener's."""

    def __init__(self, local: tuple[WakeWord, ...]) -> None:
        self._local = local
        self.detector = Detector(())

    def follow(self, platform: Link | None) -> Callable[[], None]:
        """Hear what is chosen there, now and later; returns what ends that."""
        if platform is not None:
            return platform.on_choices(self.choose)
        self.hear(self._local)
        return lambda: None

    def choose(self, choices: Choices) -> None:
        """Hear the wake words of these choices from the next chunk on."""
        self.hear(self._local if choices == Choices() else choices.wake_words)

    def hear(self, words: Iterable[WakeWord]) -> None:
        """Hear these and no others; those that cannot be heard are left out, unless that leaves nothing."""
        wanted = tuple(words)
        able = _able(wanted)
        if wanted and not able:
            # A device that nobody can wake is no help: from the beginning it hears at least its own words.
            able = self.detector.words or _able(self._local) or _able(Choices().wake_words)
            LOG.warning(f"none of the wake words can be heard: still listening for {_names(able)}")
        if able == self.detector.words:
            return
        try:
            self.detector = Detector(able)
        except (AvbError, OSError, RuntimeError, ValueError) as error:
            LOG.error(f"wake words cannot be changed ({error}): those from before stay")
            return
        LOG.info(f"wake words: {_names(able) or 'none'}")


def _names(words: Iterable[WakeWord]) -> str:
    return ", ".join(word.phrase for word in words)


def _able(words: Iterable[WakeWord]) -> tuple[WakeWord, ...]:
    """Those that can be heard, each phrase once; says why the others cannot."""
    able: dict[str, WakeWord] = {}
    for word in words:
        try:
            known = phrases.check(word.phrase)
        except AvbError as error:
            LOG.warning(f"a wake word is left out: {error.message}")
            continue
        # A record of the tenant's says more than the voice configuration's default, which has no id.
        if known.phrase not in able or word.id:
            able[known.phrase] = replace(word, phrase=known.phrase, model=known.model)
    return tuple(able.values())


def _local(name: str, config: Mapping[str, Any]) -> tuple[WakeWord, ...]:
    """What is to be heard while nobody has chosen."""
    sensitivity = min(1.0, max(0.0, float(config.get("sensitivity", 0.5))))
    listed = config.get("phrases")
    if listed:
        wanted = [listed] if isinstance(listed, str) else [str(each) for each in listed]
        return tuple(WakeWord(phrase, sensitivity) for phrase in wanted)
    try:
        return (WakeWord(phrases.check(name).phrase, sensitivity),)
    except AvbError:
        return tuple(replace(word, sensitivity=sensitivity) for word in Choices().wake_words)


def _link() -> Link | None:
    """The process's link; wake words work without one, whatever is wrong with its section."""
    try:
        return link.shared("listener")
    except AvbError as error:
        LOG.error(f"wake words go on without the platform: {error.message}")
        return None


def _of_microphone(message: Message) -> bool:
    session = message.context.get("session") or {}
    return bool(session.get("session_id", "default") == "default")


def _end(leave: Callable[[], None], outcomes: Outcomes) -> None:
    leave()
    outcomes.close()
