"""The stock services load the offline pair by configuration, the way a device does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from ovos_plugin_manager.stt import find_stt_plugins
from ovos_plugin_manager.tts import find_tts_plugins

# In a process of its own: OVOS reads its configuration once, from the home directory.
SERVICES = """
import json, sys, threading
from ovos_audio.service import PlaybackService
from ovos_audio.tts import TTSFactory
from ovos_config.config import Configuration
from ovos_dinkum_listener.plugins import load_stt_module
from ovos_plugin_manager.templates.tts import TTS
from ovos_utils.fakebus import FakeBus

service = PlaybackService(bus=FakeBus(), disable_ocp=True, validate_source=False)
voice = service.tts
audio, _ = voice.synth("what time is it", lang="en-US")
fast, _ = voice.synth("what time is it", lang="en-US", speed=2.0)
import wave
with wave.open(str(audio)) as wav:
    rate, pcm = wav.getframerate(), wav.readframes(wav.getnframes())
ear = load_stt_module(Configuration()["stt"])
silence = bytes(rate // 2)
ear.stream_start("en-US")
print("", flush=True)
print("FOUND" + json.dumps({
    "tts": type(voice).__name__, "factory": type(TTSFactory.create(Configuration())).__name__,
    "stt": type(getattr(ear, "engine", ear)).__name__,
    "apart": str(audio) != str(fast),
    "heard": ear.transcribe(silence + pcm + silence, "en-US")[0][0],
}), flush=True)
import os
os._exit(0)
"""


def test_stock_services_load_the_offline_pair(tmp_path: Path):
    home = tmp_path / "home"
    places = {f"XDG_{kind}_HOME": str(tmp_path / kind.lower()) for kind in ("CONFIG", "DATA", "CACHE", "STATE")} | {
        f"XDG_{kind}_DIRS": str(tmp_path / "none") for kind in ("CONFIG", "DATA")
    }
    configuration = {
        "lang": "en-US",
        "stt": {"module": "agentvoicebox-stt-sphinx", "fallback_module": ""},
        "tts": {
            "module": "agentvoicebox-tts-flite",
            "fallback_module": "",
            "agentvoicebox-tts-flite": {"voice": "slt"},
        },
        "Audio": {"backends": {}},
        "enable_old_audioservice": False,
        "disable_ocp": True,
        "play_wav_cmdline": "true",
    }
    (tmp_path / "config" / "mycroft").mkdir(parents=True)
    (tmp_path / "config" / "mycroft" / "mycroft.conf").write_text(json.dumps(configuration))
    home.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", SERVICES],
        env={"PATH": os.environ["PATH"], "HOME": str(home), **places},
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND")]
    assert lines, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads(lines[0].removeprefix("FOUND"))
    assert found["tts"] == found["factory"] == "FliteTTS"
    assert found["apart"], "two speeds of one sentence are two files"
    assert found["heard"] == "what time is it"


def test_they_are_registered():
    assert "agentvoicebox-stt-sphinx" in find_stt_plugins()
    assert {"agentvoicebox-tts-flite", "agentvoicebox-tts-kokoro"} <= set(find_tts_plugins())
