"""A voice in a process of its own: sentences come in at its standard input, audio goes out at its standard output.

This file is run as a script, without the packages of its environment, so that such a process is small and there at
once. flite's C code parses what tenants say: when that makes it fail, one sentence is lost and nothing else. The
process ends when its input does, whatever its parent died of.
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import sys

REQUEST = struct.Struct("<8sfI")
"""What comes before a text in UTF-8: the voice's name, how much longer than usual it speaks, the bytes of the text."""

PART = struct.Struct("<II")
"""What comes before 16-bit mono audio: its rate in Hz, its bytes. Both are 0 after the last part of a sentence."""

VOICES = ("slt", "rms", "awb", "kal16", "kal")

_FIRST = 800
"""Samples of the first part at least: a twentieth of a second."""
_LATER = 4_000
_MOST_CPU = 20.0
"""Seconds that a part may take before it counts as an endless loop, which nobody may be left to stop."""
_SET_NAME = 15


class _Wave(ctypes.Structure):
    """flite's `cst_wave`."""

    _fields_ = (
        ("type", ctypes.c_char_p),
        ("rate", ctypes.c_int),
        ("count", ctypes.c_int),
        ("channels", ctypes.c_int),
        ("samples", ctypes.c_void_p),
    )


_Listener = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(_Wave), ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_void_p
)
"""Is given a wave, the first new sample in it, their number, whether they are the last; 0 asks for more."""


class _Streaming(ctypes.Structure):
    """How flite's `cst_audio_streaming_info` begins. flite makes them: the rest of it is none of our business."""

    _fields_ = (("least", ctypes.c_int), ("listener", _Listener))


class _Voice(ctypes.Structure):
    """How flite's `cst_voice` begins."""

    _fields_ = (("name", ctypes.c_char_p), ("features", ctypes.c_void_p))


# flite keeps the pointers to such names and no copies of them.
_STREAMING = b"streaming_info"
_STRETCH = b"duration_stretch"
_TOKENS = (b"text_whitespace", b"text_singlecharsymbols", b"text_prepunctuation", b"text_postpunctuation")


class Flite:
    """flite's libraries. Audio is written to the file descriptor `out` as it is made. Raises OSError without them."""

    def __init__(self, out: int) -> None:
        self._out = out
        self._listener = _Listener(self._listen)
        self._system = ctypes.CDLL(None)
        self._library = flite = ctypes.CDLL("libflite.so.1")
        flite.new_audio_streaming_info.restype = ctypes.POINTER(_Streaming)
        flite.audio_streaming_info_val.restype = ctypes.c_void_p
        flite.flite_feat_set.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
        flite.flite_feat_set_float.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_float)
        flite.flite_get_param_string.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p)
        flite.flite_get_param_string.restype = ctypes.c_void_p
        flite.ts_open_string.argtypes = (ctypes.c_char_p, *(ctypes.c_void_p for _ in _TOKENS))
        flite.ts_open_string.restype = ctypes.c_void_p
        flite.flite_ts_to_speech.argtypes = (ctypes.c_void_p, ctypes.POINTER(_Voice), ctypes.c_char_p)
        flite.flite_ts_to_speech.restype = ctypes.c_float
        flite.flite_init()
        self._voices = {name: self._voice(name) for name in VOICES}

    def speak(self, text: bytes, voice: str, stretch: float) -> None:
        """Say a text without NUL in it, sentence by sentence as the command of the same name does."""
        speaker, streaming = self._voices[voice]
        features = speaker.contents.features
        self._library.flite_feat_set_float(features, _STRETCH, stretch)
        streaming.contents.least = _FIRST
        signs = [self._library.flite_get_param_string(features, name, None) for name in _TOKENS]
        # The noise in a voice is of the system's random numbers: as in a new process, a text always sounds the same.
        self._system.srand(1)
        _limit_cpu()
        self._library.flite_ts_to_speech(self._library.ts_open_string(text, *signs), speaker, b"stream")
        _write(self._out, PART.pack(0, 0))

    def _voice(self, name: str) -> tuple[ctypes._Pointer[_Voice], ctypes._Pointer[_Streaming]]:
        library = ctypes.CDLL(f"libflite_cmu_us_{name}.so.1")
        register = library[f"register_cmu_us_{name}"]
        register.argtypes = (ctypes.c_char_p,)
        register.restype = ctypes.POINTER(_Voice)
        voice = register(None)
        streaming = self._library.new_audio_streaming_info()
        streaming.contents.listener = self._listener
        value = self._library.audio_streaming_info_val(streaming)
        self._library.flite_feat_set(voice.contents.features, _STREAMING, value)
        return voice, streaming

    def _listen(self, wave: ctypes._Pointer[_Wave], start: int, count: int, last: int, streaming: int) -> int:
        if count > 0:
            whole = wave.contents
            pcm = ctypes.string_at(whole.samples + 2 * start, 2 * count)
            _write(self._out, PART.pack(whole.rate, len(pcm)) + pcm)
            ctypes.cast(streaming, ctypes.POINTER(_Streaming)).contents.least = _LATER
        _limit_cpu()
        return 0


def _limit_cpu() -> None:
    signal.setitimer(signal.ITIMER_VIRTUAL, _MOST_CPU)


def _write(out: int, data: bytes) -> None:
    while data:
        data = data[os.write(out, data) :]


def main() -> None:
    """Answer one request after the other."""
    # The parent ends this process, not the Ctrl-C that its terminal sends to all; and nobody needs it without a reader.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    out = os.dup(1)
    os.dup2(2, 1)  # whatever the library prints must not get between the parts
    flite = Flite(out)
    ctypes.CDLL(None).prctl(_SET_NAME, b"flite", 0, 0, 0)
    while len(head := sys.stdin.buffer.read(REQUEST.size)) == REQUEST.size:
        voice, stretch, size = REQUEST.unpack(head)
        flite.speak(sys.stdin.buffer.read(size), voice.rstrip(b"\0").decode(), stretch)


if __name__ == "__main__":
    main()
