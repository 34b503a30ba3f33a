"""`avb say`: one turn with a running node, spoken or written."""

from __future__ import annotations

import argparse
import asyncio
import wave
from pathlib import Path
from typing import Any

import numpy as np

from agentvoicebox.admin_api.cli import console
from agentvoicebox.bus_bridge import audio, client
from agentvoicebox.config.errors import BadInput, Unavailable

STAGES = ("vad", "stt", "core", "tts", "first_audio", "total")
RATE = 16_000
"""Hz at which questions are sent."""


def configure(parser: argparse.ArgumentParser) -> None:
    """The flags of `avb say`."""
    parser.add_argument("--url", required=True, metavar="U", help="where the node is, as in http://127.0.0.1:65020")
    parser.add_argument("--key", required=True, metavar="K", help="an API key of the tenant, with the scope realtime")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("file", nargs="?", type=Path, metavar="FILE.wav", help="16-bit WAV with a question")
    what.add_argument("--text", metavar="T", help="write the question instead")
    parser.add_argument("-o", "--output", type=Path, metavar="OUT.wav", help="where to write the spoken answer")
    console.add_json(parser)
    parser.set_defaults(run=run)


def run(found: argparse.Namespace) -> int:
    """Have the turn; print what was understood, answered and how long it took."""
    pcm = read_wav(found.file) if found.file else None
    answer = asyncio.run(_turn(found.url, found.key, pcm, found.text))
    if answer.error:
        raise Unavailable(answer.error["message"], code=answer.error["code"])
    if found.output:
        write_wav(found.output, bytes(answer.audio), answer.rate)
    result = summary(answer, found.text)
    if found.json:
        console.emit(result)
        return 0
    console.stdout.print(f"understood: [bold]{result['transcript'] or '(nothing)'}[/bold]")
    console.stdout.print(f"answered:   [bold]{result['answer'] or '(nothing)'}[/bold]")
    console.stdout.print(", ".join(f"{name} {value:.0f} ms" for name, value in result["timings_ms"].items()))
    if found.output:
        console.stdout.print(f"{result['audio_seconds']:.1f} s of audio in {found.output}")
    return 0


async def _turn(url: str, key: str, pcm: bytes | None, text: str | None) -> client.Answer:
    async with client.session(url, key, {"input_rate": RATE}) as session:
        return await (session.say(pcm, RATE) if pcm is not None else session.write(text or ""))


def summary(answer: client.Answer, text: str | None = None) -> dict[str, Any]:
    """The turn in the shape of `--json`; a stage that a turn did not need took no time."""
    return {
        "transcript": answer.transcript if text is None else text,
        "answer": answer.text,
        "audio_seconds": round(answer.audio_seconds, 3),
        "timings_ms": {stage: answer.timings_ms.get(stage, 0.0) for stage in STAGES},
    }


def read_wav(file: Path) -> bytes:
    """A WAV file as 16-bit mono at `RATE`. Raises `BadInput`."""
    try:
        with wave.open(str(file), "rb") as wav:
            if wav.getsampwidth() != 2:
                raise BadInput(f"{file} has {8 * wav.getsampwidth()}-bit samples; 16-bit is needed.", param="file")
            rate, channels = wav.getframerate(), wav.getnchannels()
            pcm = wav.readframes(wav.getnframes())
    except (OSError, EOFError, wave.Error) as error:
        raise BadInput(f"{file} cannot be read as a WAV file: {error}.", param="file") from error
    if channels > 1:
        pcm = np.frombuffer(pcm, "<i2").reshape(-1, channels).mean(axis=1).astype("<i2").tobytes()
    return audio.resample(pcm, rate, RATE)


def write_wav(file: Path, pcm: bytes, rate: int) -> None:
    """Write 16-bit mono audio. Raises `Unavailable`."""
    try:
        with wave.open(str(file), "wb") as wav:
            wav.setnchannels(1)
            wav.setsampwidth(2)
            wav.setframerate(rate)
            wav.writeframes(pcm)
    except OSError as error:
        raise Unavailable(f"{file} cannot be written: {error.strerror}.") from error
