"""Speech models on disk: which there are, which are here, how they get here, and which engines follow from it."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import hashlib
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Literal

import httpx

from agentvoicebox.config.errors import AvbError, NotFound, Unavailable
from agentvoicebox.plugins.pool import EngineSpec

Tell = Callable[[int, int], None]
"""Called with the bytes that are here and the bytes there will be."""

NOTICE = (
    "Speaking and hearing with the offline engines ({engines}): they know English only and clean command speech, and "
    "do not understand people well. Fetch better ones with `avb models pull {models}`."
)

_TIMEOUT = httpx.Timeout(30, connect=5)
_ATTEMPTS = 3
"""Connections one file may break off before the pull gives up; what has arrived is kept."""


class BrokenDownload(AvbError):
    """What arrived is not what the catalogue promises."""

    status = 502
    default_code = "model_broken"


@dataclass(frozen=True, slots=True)
class File:
    """One file of a model, as its publisher made it."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Model:
    """A model of the catalogue. `installed` tells of the directory it was looked up for."""

    name: str
    kind: Literal["stt", "tts"]
    license: str
    url: str
    files: tuple[File, ...]
    installed: bool

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


@dataclass(frozen=True, slots=True)
class Choice:
    """The engines to use; `notice` is one line for the operator when they are not the good ones."""

    stt: EngineSpec
    tts: EngineSpec
    notice: str | None


@dataclass(frozen=True, slots=True)
class TradeOff:
    """What a Whisper model costs and gives. Errors and speed are published figures, to compare models by."""

    model: str
    word_errors: float
    """Percent of the words of read English that are misunderstood."""
    speed: float
    """Times as fast as the large ones."""
    size: int
    """Bytes to fetch and to keep on disk."""
    memory: int
    """Bytes it holds on a CPU, estimated."""


_PUBLISHED = {
    "tiny": (7.6, 10.0),
    "base": (5.0, 7.0),
    "small": (3.4, 4.0),
    "medium": (2.9, 2.0),
    "large-v2": (2.7, 1.0),
    "large-v3": (2.0, 1.0),
}
"""LibriSpeech test-clean from Whisper's paper (arXiv 2212.04356, appendix D.1), large-v3 from the Open ASR Leaderboard;
speeds from the model card."""


def available(models_dir: Path) -> list[Model]:
    """Every model of the catalogue, and whether it is in this directory."""
    return [_model(name, models_dir) for name in _catalogue()]


def installed(name: str, models_dir: Path) -> bool:
    """Whether a model is here, every file of it in full length. Raises `NotFound` for a name nobody knows."""
    return _model(name, models_dir).installed


def pull(name: str, models_dir: Path, tell: Tell, *, url: str | None = None) -> Path:
    """Fetch a model and return its directory; what an earlier try left is continued.

    `url` stands for the addresses of the catalogue: files are at `url`/model/file. Raises `NotFound`, `Unavailable`
    (`models_unreachable`, `models_interrupted`, `disk_full`) or `BrokenDownload`; a model is whole or not there.
    """
    model = _model(name, models_dir)
    base = f"{url.rstrip('/')}/{name}" if url else model.url
    with _disk_errors(models_dir), _alone(models_dir, name):
        # Another process may have fetched it while this one waited for its turn.
        if not installed(name, models_dir):
            staging = models_dir / f".{name}.part"
            staging.mkdir(exist_ok=True)
            _fetch(model, base, staging, tell)
            shutil.rmtree(models_dir / name, ignore_errors=True)
            staging.rename(models_dir / name)
    tell(model.size, model.size)
    return models_dir / name


def defaults(whisper: str = "base") -> tuple[str, str]:
    """The models of the good ear and the good voice."""
    return f"faster-whisper-{whisper}", "kokoro"


async def fetch_defaults(
    models_dir: Path, whisper: str, tell: Callable[[str], None], *, url: str | None = None
) -> None:
    """Fetch what is missing of the default models, where there is a network; without one, say so and go on."""
    stopped = threading.Event()
    for name in defaults(whisper):
        if installed(name, models_dir):
            continue
        shown = -1

        def progress(done: int, total: int, name: str = name) -> None:
            nonlocal shown
            if stopped.is_set():
                raise Unavailable("The download was stopped.", code="models_interrupted")
            if (tenth := done * 10 // total) > shown:
                shown = tenth
                tell(f"fetching {name}: {tenth * 10} % of {total / 1e6:.0f} MB")

        try:
            await asyncio.to_thread(pull, name, models_dir, progress, url=url)
        except asyncio.CancelledError:
            stopped.set()  # the thread looks at its next block
            raise
        except AvbError as error:
            tell(error.message)
            return


def choose(engine: str, models_dir: Path, whisper: str = "base") -> Choice:
    """The engines that setting `engine` means with the models there are; ear and voice are chosen independently.

    Raises `Unavailable` naming the remedy when `models` are wanted and one is missing.
    """
    ear, voice = defaults(whisper)
    good = wanted(models_dir, whisper)
    missing = [name for name in (ear, voice) if not installed(name, models_dir)]
    if engine == "models" and missing:
        raise Unavailable(
            f"Engine `models` needs {' and '.join(missing)}: fetch with `avb models pull {' '.join(missing)}`.",
            code="models_missing",
        )
    offline = [ear, voice] if engine == "offline" else missing
    stt = _offline_stt() if ear in offline else good.stt
    tts = _offline_tts() if voice in offline else good.tts
    engines = [{ear: "pocketsphinx", voice: "flite"}[name] for name in offline]
    notice = NOTICE.format(engines=", ".join(engines), models=" ".join(offline)) if offline else None
    return Choice(stt, tts, notice)


def wanted(models_dir: Path, whisper: str = "base") -> Choice:
    """The good ear and the good voice, wherever their models are: a worker's are in a directory of its own."""
    _, voice = defaults(whisper)
    tts = _spec("tts", "agentvoicebox-tts-kokoro", model=str(models_dir / voice))
    return Choice(whisper_spec(models_dir, whisper, vad=True), tts, None)


def whisper_spec(models_dir: Path, model: str, *, vad: bool) -> EngineSpec:
    """The engine that hears with a Whisper model, tiny to large-v3; with `vad`, silence is cut out first."""
    return _spec("stt", "agentvoicebox-stt-whisper", model=str(models_dir / defaults(model)[0]), vad=vad)


def trade_offs() -> list[TradeOff]:
    """What each Whisper model costs and gives, from the fastest to the most accurate."""
    sizes = {name: _catalogue()[defaults(name)[0]].size for name in _PUBLISHED}
    return [
        # Weights have 16 bits on disk and 8 in memory; what is computed with them takes about a hundred megabytes more.
        TradeOff(name, errors, speed, sizes[name], sizes[name] // 2 + 100_000_000)
        for name, (errors, speed) in _PUBLISHED.items()
    ]


def _offline_stt() -> EngineSpec:
    return _spec("stt", "agentvoicebox-stt-sphinx")


def _offline_tts() -> EngineSpec:
    return _spec("tts", "agentvoicebox-tts-flite")


def _spec(kind: Literal["stt", "tts"], plugin: str, **config: str | int | bool) -> EngineSpec:
    return EngineSpec(kind, plugin, tuple(sorted(config.items())))


@cache
def _catalogue() -> dict[str, Model]:
    text = resources.files("agentvoicebox.plugins").joinpath("models.json").read_text()
    return {
        name: Model(
            name, entry["kind"], entry["license"], entry["url"], tuple(File(**f) for f in entry["files"]), False
        )
        for name, entry in json.loads(text).items()
    }


def _model(name: str, models_dir: Path) -> Model:
    if name not in _catalogue():
        raise NotFound(
            f"There is no model {name!r}; there are: {', '.join(sorted(_catalogue()))}.",
            code="unknown_model",
            param="name",
        )
    model = _catalogue()[name]
    whole = all(_size(models_dir / name / file.name) == file.size for file in model.files)
    return Model(name, model.kind, model.license, model.url, model.files, whole)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _fetch(model: Model, base: str, staging: Path, tell: Tell) -> None:
    done = 0
    with httpx.Client(timeout=_TIMEOUT, follow_redirects=True) as client:
        for file in model.files:
            path = staging / file.name
            if _size(path) > file.size:
                path.unlink()
            if shutil.disk_usage(staging).free < file.size - max(0, _size(path)):
                raise _no_space(staging)

            def tell_all(here: int, before: int = done) -> None:
                tell(before + here, model.size)

            _download(client, f"{base}/{file.name}", path, file, tell_all)
            _verify(path, file, model.name)
            done += file.size


def _download(client: httpx.Client, url: str, path: Path, file: File, tell: Callable[[int], None]) -> None:
    """Append to `path` until it is complete, over as many connections as that takes."""
    for attempt in range(_ATTEMPTS):
        here = max(0, _size(path))
        if here == file.size:
            return
        try:
            _receive(client, url, path, here, file, tell)
        except httpx.HTTPStatusError as error:
            raise Unavailable(
                f"{url} answers {error.response.status_code}: see AVB_MODELS_URL, or try again later.",
                code="models_unreachable",
            ) from error
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
            raise Unavailable(
                f"{httpx.URL(url).host or url} cannot be reached: check the network, or set AVB_MODELS_URL.",
                code="models_unreachable",
            ) from error
        except httpx.TransportError as error:
            if attempt == _ATTEMPTS - 1:
                raise _interrupted(file, path) from error
    if _size(path) != file.size:
        raise _interrupted(file, path)


def _receive(client: httpx.Client, url: str, path: Path, here: int, file: File, tell: Callable[[int], None]) -> None:
    # Compressed transfer would make the offsets of a continued download meaningless.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={here}-"} if here else {})
    with client.stream("GET", url, headers=headers) as response:
        response.raise_for_status()
        continued = here > 0 and response.status_code == httpx.codes.PARTIAL_CONTENT
        with path.open("ab" if continued else "wb") as out:
            written = here if continued else 0
            # As it arrives: what waits for a full block would be lost when the connection breaks.
            for block in response.iter_raw():
                out.write(block[: file.size - written + 1])
                written += len(block)
                tell(min(written, file.size))
                if written > file.size:
                    return  # longer than promised: the checksum says the rest


def _verify(path: Path, file: File, model: str) -> None:
    with path.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if found != file.sha256:
        path.unlink()
        raise BrokenDownload(
            f"{file.name} of {model} is not what its publisher made (wrong checksum) and was removed: pull again, and "
            "check AVB_MODELS_URL if it happens twice.",
        )


@contextmanager
def _alone(models_dir: Path, name: str) -> Iterator[None]:
    """One process at a time fetches a model; the lock falls with the process."""
    models_dir.mkdir(parents=True, exist_ok=True)
    with (models_dir / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _disk_errors(models_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise _no_space(models_dir) from error
        raise Unavailable(
            f"The models directory {models_dir} cannot be written ({error.strerror}): set AVB_MODELS to another one.",
            code="models_unwritable",
        ) from error


def _no_space(directory: Path) -> Unavailable:
    return Unavailable(
        f"There is no space left for the model in {directory}: free some, or set AVB_MODELS to another disk.",
        code="disk_full",
    )


def _interrupted(file: File, path: Path) -> Unavailable:
    return Unavailable(
        f"The download of {file.name} broke off at {max(0, _size(path))} of {file.size} bytes: pull again to continue.",
        code="models_interrupted",
    )
