"""Voice activity detection: how probably a window of audio holds speech. One model, one small stream a session."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing

from agentvoicebox.bus_bridge.models import LISTENING_RATE
from agentvoicebox.config.errors import Unavailable


class VadStream(Protocol):
    """One session's detector. `window` is the number of samples (16 kHz) of one decision."""

    window: int

    def probabilities(self, pcm: bytes) -> list[float]:
        """Speech probability, 0 to 1, of every window in `pcm` (16-bit mono, a whole number of windows)."""
        ...


class SileroStream:
    """Silero VAD v6, the ONNX model that ships with faster-whisper; about 0.12 ms CPU per 32 ms of audio."""

    window = 512
    _CONTEXT = 64

    __slots__ = ("_context", "_state_c", "_state_h")

    def __init__(self) -> None:
        self._state_h = np.zeros((1, 1, 128), np.float32)
        self._state_c = np.zeros((1, 1, 128), np.float32)
        self._context: np.typing.NDArray[np.float32] = np.zeros(self._CONTEXT, np.float32)

    def probabilities(self, pcm: bytes) -> list[float]:
        samples = np.frombuffer(pcm, "<i2").astype(np.float32) / np.float32(32768)
        windows = samples.reshape(-1, self.window)
        # Every window is shown with the last samples of the one before it.
        before = np.vstack([self._context, windows[:-1, -self._CONTEXT :]])
        self._context = windows[-1, -self._CONTEXT :].copy()
        inputs = {"input": np.hstack([before, windows]), "h": self._state_h, "c": self._state_c}
        found, self._state_h, self._state_c = _silero().run(None, inputs)
        return [float(p) for p in found.reshape(-1)]


class WebRtcStream:
    """WebRTC's detector: a fiftieth of the work, later to notice the end of speech."""

    window = 480

    __slots__ = ("_detector",)

    def __init__(self) -> None:
        import webrtcvad

        self._detector = webrtcvad.Vad(2)

    def probabilities(self, pcm: bytes) -> list[float]:
        size = self.window * 2
        return [
            1.0 if self._detector.is_speech(pcm[i : i + size], LISTENING_RATE) else 0.0
            for i in range(0, len(pcm), size)
        ]


STREAMS: dict[str, type[SileroStream] | type[WebRtcStream]] = {"silero": SileroStream, "webrtc": WebRtcStream}


def warm(name: str) -> None:
    """Load the detector's model now rather than at the first word. Raises `Unavailable` when it is not installed."""
    try:
        stream = STREAMS[name]()
        stream.probabilities(bytes(stream.window * 2))
    except (ImportError, OSError) as error:
        raise Unavailable(
            f"The voice activity detector {name!r} cannot be loaded ({error}); "
            "install agentvoicebox[server], or choose the other one with AVB_VAD.",
            code="vad_unavailable",
        ) from error


@cache
def _silero() -> Any:
    import onnxruntime

    # Only the file is wanted: importing the package would load its whole inference engine.
    found = find_spec("faster_whisper")
    if found is None or not found.submodule_search_locations:
        raise ImportError("faster-whisper, which ships the model, is not installed")

    options = onnxruntime.SessionOptions()
    options.inter_op_num_threads = options.intra_op_num_threads = 1
    options.enable_cpu_mem_arena = False
    options.log_severity_level = 3
    assets = Path(found.submodule_search_locations[0]) / "assets"
    model = max(assets.glob("silero_vad_v*.onnx"), default=assets / "silero_vad.onnx")
    return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
