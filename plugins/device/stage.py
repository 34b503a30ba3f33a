"""Speech that is played while it is still being made, in its place among everything else that a device plays.

ovos-audio has one queue of files, and one thread that plays them in order; its stop button, its messages and its
question whether anybody speaks know of nothing else. So a sentence that is still being made goes into that queue as
well, and the thread is taught to play it.
"""

from __future__ import annotations

import tempfile
import threading
import wave
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ovos_bus_client.message import Message
from ovos_plugin_manager.templates.tts import TTS
from ovos_utils.file_utils import get_cache_directory
from ovos_utils.log import LOG

from agentvoicebox.plugins.device.player import Player, PlayerBroke
from agentvoicebox.plugins.pool.engine import at_rate

LONGEST = 120.0
"""Seconds for which a sentence may make no progress before it is given up."""


class Part(NamedTuple):
    """A piece of a sentence's audio."""

    take: int
    """How often the sentence had been begun anew."""
    pcm: bytes
    rate: int


class Sentence:
    """A sentence on its way to the loudspeaker: one thread adds its audio, another one plays it, any may stop it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._parts: list[Part] = []
        self._take = 0
        self._over = self.stopped = self.heard = False
        self._player: Player | None = None
        self._when_stopped: Callable[[], None] | None = None

    # --- whoever makes the audio --------------------------------------------------------------------------------------

    def add(self, pcm: bytes, rate: int) -> None:
        """Add 16-bit mono audio."""
        with self._changed:
            self._parts.append(Part(self._take, pcm, rate))
            self._changed.notify_all()

    def mark(self) -> int:
        """Where it has come to, for `again`."""
        return len(self._parts)

    def again(self, mark: int = 0) -> None:
        """What came since the mark does not count, and is said anew; what is played begins from the beginning."""
        with self._changed:
            self._take += 1
            self._parts = [part._replace(take=self._take) for part in self._parts[:mark]]
            player = self._player
            self._changed.notify_all()
        if player is not None:
            player.stop()  # nobody has to hear out half a sentence

    def end(self) -> None:
        """All of it has come."""
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def when_stopped(self, act: Callable[[], None]) -> None:
        """Call this as soon as nobody wants to hear the sentence any more; at once if that is so."""
        with self._changed:
            self._when_stopped = act
            stopped = self.stopped
        if stopped:
            act()

    @property
    def waiting(self) -> int:
        """Bytes that have not been heard yet."""
        return 0 if self.heard or self.stopped else sum(len(part.pcm) for part in list(self._parts))

    # --- whoever hears it ---------------------------------------------------------------------------------------------

    def begins(self) -> bool:
        """Whether there is something to play; returns when that is known."""
        with self._changed:
            self._changed.wait_for(lambda: self._parts or self._over or self.stopped, LONGEST)
            return bool(self._parts) and not self.stopped

    def play(self, command: Sequence[str]) -> None:
        """Play all of it; returns when it has been heard or stopped. Raises `PlayerBroke`."""
        take = number = 0
        try:
            while (part := self.part(take, number)) is not None:
                if part.take != take:
                    self._change(None)
                    take, number = part.take, 0
                try:
                    self._at(part.rate, command).write(part.pcm)
                    number += 1
                except PlayerBroke:
                    if self._take == take:
                        raise
            if self._player is not None and not self.stopped:
                self._player.finish()
        except PlayerBroke:
            if not self.stopped:
                raise
        finally:
            self._change(None)

    def terminate(self) -> None:
        """Be silent at once: what `PlaybackThread` calls on whatever it plays."""
        with self._changed:
            self.stopped = True
            act, player = self._when_stopped, self._player
            self._changed.notify_all()
        if player is not None:
            player.stop()
        if act is not None:
            act()

    def write(self, path: str) -> bool:
        """Write all of it to a WAV file, once all is there; false when there is nothing."""
        with self._changed:
            self._changed.wait_for(lambda: self._over or self.stopped, LONGEST)
            parts = [(part.pcm, part.rate) for part in self._parts]
        return write(path, parts) > 0

    def part(self, take: int, number: int) -> Part | None:
        """That part of that take, or else the first one of a later take; None when there are no more."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._begun_anew(take) or (self._take == take and len(self._parts) > number) or self._done(),
                LONGEST,
            )
            if self._take != take:
                number = 0
            return self._parts[number] if len(self._parts) > number and not self.stopped else None

    def _begun_anew(self, take: int) -> bool:
        return self._take != take and bool(self._parts)

    def _done(self) -> bool:
        return self._over or self.stopped

    def _at(self, rate: int, command: Sequence[str]) -> Player:
        """A player for this rate."""
        player = self._player
        if player is None or player.rate != rate:
            if player is not None:
                player.finish()
            player = Player(command, rate)
            self._change(player)
        return player

    def _change(self, player: Player | None) -> None:
        with self._changed:
            before, self._player = self._player, player
            stopped = self.stopped
        if before is not None:
            before.close()
        if stopped and player is not None:
            player.stop()


class Stage:
    """The playback thread of ovos-audio, which plays sentences too from now on."""

    def __init__(self, playback: Any, command: Sequence[str]) -> None:
        self._playback, self._command = playback, command
        self._stock_play, self._stock_clear = playback._play, playback.clear_queue
        self._sentences: weakref.WeakSet[Sentence] = weakref.WeakSet()
        playback._play, playback.clear_queue = self._play, self._clear

    @staticmethod
    def fits(playback: Any) -> bool:
        """Whether this playback thread can be taught. One that hands finished files to transformers cannot."""
        taught = all(callable(getattr(playback, name, None)) for name in ("_play", "clear_queue", "on_start", "on_end"))
        return taught and not getattr(getattr(playback, "tts_transform", None), "loaded_plugins", None)

    def put(self, sentence: Sentence, listen: bool, tts_id: str, message: Message) -> None:
        """Play this after all that has been queued before; open the microphone at its end if `listen`."""
        self._sentences.add(sentence)
        TTS.queue.put((sentence, None, listen, tts_id, message))

    def waiting(self) -> int:
        """Bytes of the sentences that have not been heard yet."""
        return sum(sentence.waiting for sentence in list(self._sentences))

    def stop(self) -> None:
        """Stop all sentences, those that wait too."""
        for sentence in list(self._sentences):
            sentence.terminate()

    def leave(self) -> None:
        """Stop what is said, and leave the thread as it was."""
        self.stop()
        for name, ours in (("_play", self._play), ("clear_queue", self._clear)):
            if self._playback.__dict__.get(name) == ours:
                delattr(self._playback, name)

    def _clear(self) -> None:
        """Forget all that is queued; whoever makes sentences of it need not go on."""
        self.stop()
        self._stock_clear()

    def _play(self) -> None:
        playing = self._playback._now_playing
        if playing is None or not isinstance(playing[0], Sentence):
            self._stock_play()
            return
        try:
            self._perform(*playing)
        except Exception as error:
            LOG.error("A sentence was not played to its end (%s): it is passed over.", type(error).__name__)
            if self._playback._processing_queue:
                self._playback.on_end()
        self._playback._now_playing = None

    def _perform(self, sentence: Sentence, visemes: Any, listen: bool, tts_id: str, message: Message) -> None:
        playback = self._playback
        playback.p = sentence
        begins = sentence.begins()
        playback.on_start(message)
        if begins:
            playback.bus.emit(message.forward("recognizer_loop:utterance_start", message.data))
            try:
                sentence.play(self._command)
            except PlayerBroke as error:
                LOG.warning(
                    "The player for speech failed (%s): a file is played. Look whether a sound device is there.", error
                )
                self._play_file(sentence, listen, tts_id, message)
                sentence.heard = True
                return
        sentence.heard = True
        if playback.queue.empty():
            playback.on_end(listen and not sentence.stopped, message)

    def _play_file(self, sentence: Sentence, listen: bool, tts_id: str, message: Message) -> None:
        place = get_cache_directory("agentvoicebox")
        with tempfile.TemporaryDirectory(prefix="agentvoicebox-", dir=place) as directory:
            path = str(Path(directory) / "sentence.wav")
            sentence.write(path)
            if sentence.stopped:
                self._playback.on_end(False, message)
                return
            self._playback._now_playing = (path, None, listen, tts_id, message)
            self._stock_play()


def write(path: str, parts: Sequence[tuple[bytes, int]]) -> float:
    """Write 16-bit mono audio to a WAV file, at the rate of its first part; returns its seconds, 0.0 for none."""
    rate = parts[0][1] if parts else 16_000
    pcm = b"".join(at_rate(pcm, each, rate) for pcm, each in parts)
    with wave.open(path, "wb") as wav:
        wav.setparams((1, 2, rate, 0, "NONE", ""))
        wav.writeframes(pcm or bytes(rate // 5))
    return len(pcm) / 2 / rate
