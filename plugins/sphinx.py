"""pocketsphinx, the offline ear, as an ovos-plugin-manager STT plugin: English commands from a clean microphone.

Two decoders hear the same audio. The one bound to the grammar in `sphinx.jsgf` hears commands almost perfectly, but
forces whatever it is given into one of them; the one with the general language model hears anything, but badly. So
the grammar is believed only where the other one heard something similar.
"""

from __future__ import annotations

import ctypes
import difflib
import json
import queue
import re
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pocketsphinx
import soxr
from ovos_plugin_manager.templates.stt import STT
from ovos_utils import classproperty
from pocketsphinx import _pocketsphinx

from agentvoicebox.config.errors import BadInput, Unavailable
from agentvoicebox.plugins.pool import cancelled

RATE = 16_000
AGREEMENT = 0.55
"""Similarity of the two hypotheses from which the grammar is believed."""
AGREEMENT_SHORT, SHORT = 0.5, 3
"""Sentences of up to so many words need less: one misheard word is much of them."""

_MARGIN = RATE // 4
"""Samples of silence kept around the speech; the noise estimate needs some."""
_BLOCK = RATE // 10
_QUIET = 0.002
"""Pre-emphasised level of the loudest tenth of a second under which there is no speech; mains hum stays under it."""
_PIECE = RATE // 10
"""Samples decoded between two looks at whether somebody still waits: about 20 ms of work."""

_GENERAL = {"fwdflat": False}
"""One pass instead of two: a third less work for hardly more wrong words."""


class SphinxSTT(STT):  # type: ignore[misc]
    """Configuration: `instances` (1), pairs of decoders that may work at the same time, 90 MB each."""

    thread_safe = True

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        super().__init__(config)
        self._pairs: queue.LifoQueue[_Pair] = queue.LifoQueue()
        for _ in range(int(self.config.get("instances", 1))):
            self._pairs.put(_Pair())

    @classproperty  # type: ignore[untyped-decorator]
    def available_languages(cls) -> set[str]:
        return {"en-US"}

    def execute(self, audio: Any, language: str | None = None) -> str:
        """What was said, in lower case; empty when nothing was. Raises `BadInput` for another language than English."""
        wanted = language or self.lang
        if wanted != "auto" and wanted.split("-")[0].lower() != "en":
            raise BadInput(
                f"The offline recogniser hears English only, not {wanted}: fetch a model with `avb models pull`.",
                code="unsupported_language",
                param="language",
            )
        pcm = _speech(audio.get_raw_data(convert_width=2), audio.sample_rate)
        if not pcm or cancelled():
            return ""
        with self._pair() as pair:
            return pair.hear(pcm)

    @contextmanager
    def _pair(self) -> Iterator[_Pair]:
        pair = self._pairs.get()
        try:
            yield pair
        finally:
            self._pairs.put(pair)


def grammar() -> str:
    """The commands, as a JSGF grammar."""
    return resources.files("agentvoicebox.plugins").joinpath("sphinx.jsgf").read_text()


def vocabulary() -> set[str]:
    """The words most frequent in the general language model, the ten thousand that `sphinx.txt` lists.

    With all 72,000 that the model knows, decoding takes twice the time and memory and hears commands no better.
    """
    return set(resources.files("agentvoicebox.plugins").joinpath("sphinx.txt").read_text().split())


def words(jsgf: str) -> set[str]:
    """Every word that a grammar can hear."""
    return {token for rule in _rules(jsgf).values() for token in rule if re.match(r"[\w']", token)}


def dictionary(wanted: set[str]) -> list[str]:
    """Lines of pocketsphinx's pronunciation dictionary for these words, alternatives included."""
    return [line for word, line in _pronunciations() if word in wanted]


@cache
def sentences(jsgf: str) -> re.Pattern[str]:
    """What matches is a whole sentence of the grammar, every word followed by a space."""
    rules = _rules(jsgf)
    marks = {"(": "(?:", "[": "(?:", "]": ")?", ")": ")", "|": "|"}

    def expand(name: str) -> str:
        return f"(?:{''.join(part(token) for token in rules[name])})"

    def part(token: str) -> str:
        return expand(token) if token.startswith("<") else marks.get(token, f"{re.escape(token)} ")

    return re.compile(expand("<command>"))


def complete(text: str, jsgf: str) -> str:
    """The longest beginning of `text` that is a sentence of the grammar; a breath at the end is heard as a word."""
    heard = text.split()
    for length in range(len(heard), 0, -1):
        if sentences(jsgf).fullmatch("".join(f"{word} " for word in heard[:length])):
            return " ".join(heard[:length])
    return ""


def agree(command: str, anything: str) -> bool:
    """Whether what the grammar heard is to be believed, given what was heard without it."""
    needed = AGREEMENT_SHORT if len(command.split()) <= SHORT else AGREEMENT
    return bool(command) and similarity(command, anything) >= needed


def similarity(one: str, other: str) -> float:
    """0 to 1, by letters: words split differently still sound alike."""
    return difflib.SequenceMatcher(None, one.replace(" ", ""), other.replace(" ", "")).ratio()


def _rules(jsgf: str) -> dict[str, list[str]]:
    bare = re.sub(r"/\*.*?\*/", "", jsgf, flags=re.S)
    found = re.findall(r"(?:public\s+)?(<\w+>)\s*=(.*?);", bare, flags=re.S)
    return {name: re.findall(r"<\w+>|[()\[\]|]|[\w']+", body) for name, body in found}


def _pronunciations() -> Iterator[tuple[str, str]]:
    with (_model() / "cmudict-en-us.dict").open() as lines:
        for line in lines:
            yield re.sub(r"\(\d+\)$", "", line.split(" ", 1)[0]), line


def _model() -> Path:
    return Path(pocketsphinx.get_model_path("en-us"))


def _speech(pcm: bytes, rate: int) -> bytes:
    """The part of 16-bit audio from its first to its last sound, at 16 kHz; nothing where there is no sound."""
    samples = np.frombuffer(pcm[: len(pcm) // 2 * 2], "<i2").astype(np.float32) / 32_768
    if rate != RATE and samples.size:
        samples = soxr.resample(samples, rate, RATE)
    edges = np.diff(samples)
    blocks = edges[: edges.size // _BLOCK * _BLOCK].reshape(-1, _BLOCK)
    levels = np.sqrt((blocks**2).mean(axis=1)) if blocks.size else np.zeros(0)
    if not levels.size or levels.max() < _QUIET:
        return b""
    loud = np.flatnonzero(levels > max(levels.max() / 100, 1e-5))
    start, end = loud[0] * _BLOCK - _MARGIN, (loud[-1] + 1) * _BLOCK + _MARGIN
    kept = np.clip(samples[max(0, start) : end] * 32_768, -32_768, 32_767)
    return bytes(kept.astype("<i2").tobytes())


class _Pair:
    """A grammar decoder and a general one; one utterance at a time."""

    def __init__(self) -> None:
        self._jsgf = grammar()
        commands = words(self._jsgf)
        self._commands = _Decoder(commands)
        self._commands.follow(self._jsgf)
        self._general = _Decoder(commands | vocabulary(), lm=str(_model() / "en-us.lm.bin"), **_GENERAL)

    def hear(self, pcm: bytes) -> str:
        """What 16-bit audio at 16 kHz says; empty when nothing, or when nobody wants to know any more."""
        mean = self._commands.listen(pcm)
        found: list[str] = []
        other = threading.Thread(target=lambda: found.append(self._commands.finish()), name="sphinx-grammar")
        other.start()
        try:
            anything = self._general.decode(pcm, mean)
        finally:
            other.join()
        command = complete(found[0], self._jsgf) if found else ""
        if anything is None:
            return ""
        return command if agree(command, anything) else anything


class _Decoder:
    """pocketsphinx through its C interface: the one for Python holds the interpreter's lock while it decodes,
    which would stop every other session of the process."""

    def __init__(self, known: set[str], **settings: Any) -> None:
        self._call = _library()
        with tempfile.NamedTemporaryFile("w", suffix=".dict") as pronunciations:
            pronunciations.writelines(dictionary(known))
            pronunciations.flush()
            everything = {"hmm": str(_model() / "en-us"), "dict": pronunciations.name, "loglevel": "FATAL", **settings}
            self._handle = self._call.ps_init(self._call.ps_config_parse_json(None, json.dumps(everything).encode()))
        if not self._handle:
            raise Unavailable(
                "pocketsphinx cannot load its model: reinstall it with `pip install --force-reinstall pocketsphinx`.",
                code="engine_missing",
            )

    def follow(self, jsgf: str) -> None:
        """Hear sentences of this grammar only."""
        if self._call.ps_add_jsgf_string(self._handle, b"commands", jsgf.encode()):
            raise Unavailable("pocketsphinx does not take its grammar sphinx.jsgf.", code="engine_failed")
        self._call.ps_activate_search(self._handle, b"commands")

    def listen(self, pcm: bytes) -> bytes:
        """Begin a whole utterance; returns the mean of its features, by which the channel is taken out."""
        self._begin()
        self._call.ps_process_raw(self._handle, pcm, len(pcm) // 2, 1, 1)
        return bytes(self._call.ps_get_cmn(self._handle, 1))

    def finish(self) -> str:
        """Search what was listened to; returns what was heard."""
        self._call.ps_end_utt(self._handle)
        heard = self._call.ps_get_hyp(self._handle, None)
        return heard.decode().strip() if heard else ""

    def decode(self, pcm: bytes, mean: bytes) -> str | None:
        """Hear a whole utterance piece by piece; None when nobody wanted to know any more."""
        self._begin()
        # Without it the first seconds would be heard through the previous speaker's microphone.
        self._call.ps_set_cmn(self._handle, mean)
        gone = False
        for start in range(0, len(pcm), 2 * _PIECE):
            if gone := cancelled():
                break
            piece = pcm[start : start + 2 * _PIECE]
            self._call.ps_process_raw(self._handle, piece, len(piece) // 2, 0, 0)
        heard = self.finish()
        return None if gone else heard

    def _begin(self) -> None:
        self._call.ps_start_stream(self._handle)
        self._call.ps_start_utt(self._handle)

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._call.ps_free(self._handle)


@cache
def _library() -> ctypes.CDLL:
    """The public C interface (pocketsphinx.h), which the extension module of the wheel exports."""
    pointer, text, number, size = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_size_t
    library = ctypes.CDLL(_pocketsphinx.__file__)
    for name, result, *arguments in (
        ("ps_config_parse_json", pointer, pointer, text),
        ("ps_init", pointer, pointer),
        ("ps_free", number, pointer),
        ("ps_add_jsgf_string", number, pointer, text, text),
        ("ps_activate_search", number, pointer, text),
        ("ps_start_stream", number, pointer),
        ("ps_start_utt", number, pointer),
        ("ps_process_raw", number, pointer, text, size, number, number),
        ("ps_end_utt", number, pointer),
        ("ps_get_hyp", text, pointer, pointer),
        ("ps_get_cmn", text, pointer, number),
        ("ps_set_cmn", number, pointer, text),
        ("err_set_loglevel_str", text, text),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    library.err_set_loglevel_str(b"FATAL")
    return library
