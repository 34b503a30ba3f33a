"""Audio in the forms that people have it: files in, 16 kHz 16-bit mono out; volume, noise and length.

The only module that parses what strangers upload, so it is narrow on purpose: FFmpeg, through PyAV, is told by the
first bytes which of four demuxers to use, may open decoders of sound only, and nothing but the bytes it was given. What
it decodes is counted while it comes: neither a header that lies nor a file that unpacks to hours costs more memory or
work than the seconds allowed.

Audio without further mention is bytes of 16-bit little-endian mono samples at 16 kHz.
"""

from __future__ import annotations

import io
import math
import wave
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import av
import av.filter
import numpy as np
import soxr
from av.stream import Disposition
from numpy.typing import NDArray

from agentvoicebox.config.errors import AvbError, BadInput, TooLarge

RATE = 16_000
"""Hz."""

_DECODERS = (
    *("pcm_u8", "pcm_s16le", "pcm_s24le", "pcm_s32le", "pcm_f32le", "pcm_f64le", "pcm_alaw", "pcm_mulaw"),
    *("adpcm_ms", "adpcm_ima_wav", "mp3", "mp3float", "flac", "vorbis", "opus", "libopus"),
)

_RATES = range(2_000, 192_001)
"""Hz a file may have; a header can claim anything."""

_CHANNELS = range(1, 9)

_WORK = 2 * 96_000
"""Values (samples of all channels) a second of what may be sent: a few kilobytes can unpack to billions of them."""

_LOUDNESS, _PEAK, _MOST_GAIN = 0.1, 0.89, 30.0
"""RMS wanted (-20 dB), peak allowed (-1 dB), and the factor above which noise would become loud, not speech."""

_BLOCK = RATE // 50
"""Samples (20 ms) whose energy is looked at for a silence."""

_QUIET = 15
"""Blocks (300 ms) that a silence should last."""


def decode(data: bytes, *, longest: float) -> bytes:
    """The sound of a WAV, MP3, FLAC or OGG (Vorbis, Opus) file of any rate, channels and sample format.

    The content decides what it is. A file that breaks off, or is damaged on the way, gives what could be decoded of it.
    Raises `BadInput`: `audio_empty` where there is no sound, `audio_unreadable` where it is something else or nothing
    could be decoded; `TooLarge` with `audio_too_long` for more than `longest` seconds, or more values than so many
    seconds of stereo at 96 kHz have.
    """
    if not data:
        raise BadInput("The audio file is empty.", code="audio_empty", param="file")
    sound = bytearray()
    broken: Exception | None = None
    try:
        for part in _converted(_frames(data), longest):
            sound += part
    except AvbError:
        raise
    except Exception as error:  # FFmpeg fails in as many ways as files are broken
        broken = error
    if sound:
        return bytes(sound)
    if broken is None:
        raise BadInput("There is no sound in the audio file.", code="audio_empty", param="file")
    raise _unreadable() from broken


def normalised(pcm: bytes) -> bytes:
    """The same audio at a volume easy to understand; silence stays as it is."""
    samples = _samples(pcm).astype(np.float32) / 32_768
    if not samples.size or not samples.any():
        return pcm
    gain = min(_LOUDNESS / np.sqrt(np.mean(samples**2)), _PEAK / np.abs(samples).max(), _MOST_GAIN)
    return _pcm(samples * gain)


def denoised(pcm: bytes) -> bytes:
    """The same audio, as long, with less of the noise that is heard where nobody speaks."""
    samples = _samples(pcm)
    if samples.size < _BLOCK:
        return pcm
    quietest = float(np.percentile(_energy(samples), 10)) / 32_768**2
    floor = 10 * math.log10(max(quietest, 1e-8))
    graph = av.filter.Graph()
    source = graph.add_abuffer(sample_rate=RATE, format="s16", layout="mono", time_base=Fraction(1, RATE))
    nodes = (
        graph.add("afftdn", f"noise_floor={min(floor, -20):.0f}"),
        graph.add("aformat", "sample_fmts=s16"),
        graph.add("abuffersink"),
    )
    graph.link_nodes(source, *nodes).configure()
    frame = av.AudioFrame.from_ndarray(samples.reshape(1, -1), format="s16", layout="mono")
    frame.sample_rate, frame.pts, frame.time_base = RATE, 0, Fraction(1, RATE)
    graph.push(frame)
    graph.push(None)
    found = [part.to_ndarray().reshape(-1) for part in _pulled(graph)]
    clean = np.concatenate(found)[: samples.size] if found else samples
    return np.pad(clean, (0, samples.size - clean.size)).astype("<i2").tobytes()


def split(pcm: bytes, most: float) -> list[bytes]:
    """The audio in pieces of at most `most` seconds, cut where it is quietest in the later half of each."""
    samples = _samples(pcm)
    limit = max(2 * _BLOCK, int(most * RATE))
    pieces = []
    while samples.size > limit:
        cut = _quietest(samples[:limit])
        pieces.append(samples[:cut].tobytes())
        samples = samples[cut:]
    return [*pieces, samples.tobytes()] if samples.size else pieces


def wav(pcm: bytes, rate: int) -> bytes:
    """A WAV file of 16-bit mono audio at `rate` Hz."""
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes(pcm)
    return out.getvalue()


def _frames(data: bytes) -> Iterator[av.AudioFrame]:
    """What can be decoded, as it comes; damaged packets are left out."""
    only = {"format_whitelist": "wav,mp3,flac,ogg", "codec_whitelist": ",".join(_DECODERS), "protocol_whitelist": ""}
    source = io.BytesIO(data)
    with av.open(source, "r", format=_format(data), metadata_errors="ignore", container_options=only) as file:
        if not file.streams.audio or any(not _picture(stream) for stream in file.streams.video):
            raise _unreadable()
        stream = file.streams.audio[0]
        if stream.codec_context.name not in _DECODERS:
            raise _unreadable()
        for packet in file.demux(stream):
            try:
                frames = packet.decode()
            except av.error.InvalidDataError:
                continue
            yield from frames


def _picture(stream: Any) -> bool:
    """Whether a "video" is the cover of an album."""
    return bool(stream.disposition & Disposition.attached_pic)


def _converted(frames: Iterator[av.AudioFrame], longest: float) -> Iterator[bytes]:
    """The frames at 16 kHz, 16-bit mono. Raises `TooLarge` after `longest` seconds."""
    seconds, values, rate = 0.0, 0, 0
    stream: Any = None
    for frame in frames:
        channels = frame.layout.nb_channels
        if frame.sample_rate not in _RATES or channels not in _CHANNELS:
            raise BadInput(
                "The audio has more than 8 channels, or a rate beyond 2 to 192 kHz: send mono at 16 kHz.",
                code="audio_unreadable",
                param="file",
            )
        seconds += frame.samples / frame.sample_rate
        values += frame.samples * channels
        if seconds > longest or values > longest * _WORK:
            raise TooLarge(
                f"The audio is longer than {longest:g} s, or as much at a high rate of many channels: send a shorter "
                "piece of it, or mono at 16 kHz.",
                code="audio_too_long",
                param="file",
            )
        if frame.sample_rate != rate:  # files that were put together from several change it on the way
            if stream is not None:
                yield _pcm(stream.resample_chunk(np.zeros(0, np.float32), last=True))
            rate = frame.sample_rate
            stream = soxr.ResampleStream(rate, RATE, 1, dtype="float32")
        yield _pcm(stream.resample_chunk(_mono(frame)))
    if stream is not None:
        yield _pcm(stream.resample_chunk(np.zeros(0, np.float32), last=True))


def _mono(frame: av.AudioFrame) -> NDArray[np.float32]:
    """The mean of a frame's channels, -1 to 1."""
    values = frame.to_ndarray()
    if not frame.format.is_planar:
        values = values.reshape(-1, frame.layout.nb_channels).T
    samples = values.astype(np.float32)
    if values.dtype == np.uint8:
        samples = samples / np.float32(128) - np.float32(1)
    elif values.dtype.kind == "i":
        samples /= 2 ** (8 * values.itemsize - 1)
    # Files of floating point may hold anything, also what is no number.
    return np.ascontiguousarray(np.nan_to_num(samples, posinf=1, neginf=-1).clip(-1, 1).mean(axis=0))


def _format(data: bytes) -> str:
    """What FFmpeg calls the container that starts like this. Raises `BadInput`."""
    start = 0
    if data[:3] == b"ID3" and len(data) >= 10:
        # Such a tag may stand before anything; four bytes of seven bits tell how long it is.
        size = 0
        for byte in data[6:10]:
            size = size << 7 | byte & 0x7F
        start = 10 + size
    head = data[start : start + 12]
    if head[:4] in (b"RIFF", b"RF64") and head[8:] == b"WAVE":
        return "wav"
    if head[:4] == b"fLaC":
        return "flac"
    if head[:4] == b"OggS":
        return "ogg"
    # Eleven bits of sync and "layer III"; a tag may be followed by padding.
    if start or (len(head) > 1 and head[0] == 0xFF and head[1] & 0xE6 == 0xE2):
        return "mp3"
    raise _unreadable()


def _unreadable() -> BadInput:
    return BadInput(
        "The audio cannot be read: send a WAV, MP3, FLAC or OGG (Vorbis, Opus) file.",
        code="audio_unreadable",
        param="file",
    )


def _pulled(graph: av.filter.Graph) -> Iterator[Any]:
    while True:
        try:
            yield graph.pull()
        except (av.error.BlockingIOError, av.error.EOFError):
            return


def _quietest(samples: NDArray[np.int16]) -> int:
    """Where to cut: the middle of the quietest 300 ms (or less, of a short piece) in the later half."""
    energy = _energy(samples)
    first = energy.size // 2
    length = min(_QUIET, max(1, energy.size - first - 1))
    around = np.convolve(energy[first:], np.ones(length), "valid")
    return max(1, first + int(np.argmin(around)) + length // 2) * _BLOCK


def _energy(samples: NDArray[np.int16]) -> NDArray[np.float32]:
    """Mean square of each whole block."""
    blocks = samples[: samples.size // _BLOCK * _BLOCK].reshape(-1, _BLOCK).astype(np.float32)
    return np.asarray(np.mean(blocks**2, axis=1))


def _samples(pcm: bytes) -> NDArray[np.int16]:
    return np.frombuffer(pcm, "<i2", len(pcm) // 2)


def _pcm(samples: NDArray[np.float32]) -> bytes:
    return (samples * 32_767).round().clip(-32_768, 32_767).astype("<i2").tobytes()
